"""A grid of pictures that shows what the model sees and makes of it.

One row an image: original, masked, clean reconstruction and, under AEMIM, adversarial image, perturbation and
adversarial reconstruction. The images are the first that the process trains on, so that pictures can be
compared over time. Costs one forward, and one attack, of a few images each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State, Time
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from matplotlib.figure import Figure
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.utils import make_grid

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.evaluation.features import evaluating
from aemim_algorithm.models.masking import images_in, mask_images, mask_patch_size
from aemim_algorithm.randomness import RngState
from aemim_algorithm.samples import first_dimension, take_samples
from aemim_algorithm.sharding import unwrapped
from aemim_algorithm.validation import require_integer, require_per_channel

__all__ = ["ReconstructionPictures", "draw_pictures"]


class ReconstructionPictures(Callback):
    """Write a PNG grid of reconstructions at an interval.

    Args:
        folder: Where the pictures go; ``{run_name}`` is filled in.
        interval: Time between two grids, e.g. ``"10ep"`` or ``"500ba"``; also drawn at the end.
        num_images: Rows of the grid.
        mean: Mean of the images' normalisation, one value for each channel.
        std: Standard deviation of the images' normalisation, likewise.

    Raises:
        ValueError: If an argument is out of range; at ``INIT`` if the model can't be drawn.
    """

    def __init__(
        self,
        folder: str = "{run_name}/pictures",
        *,
        interval: str | int | Time = "1ep",
        num_images: int = 8,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        require_integer("num_images", num_images, low=1)
        require_per_channel("mean", mean)
        require_per_channel("std", std, positive=True)
        self.folder, self.num_images, self.mean, self.std = folder, num_images, mean, std
        self._due = create_interval_scheduler(interval)
        self._batch: Any = None

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model that can't be drawn."""
        if not hasattr(state.model, "reconstruct"):
            raise ValueError(
                f"ReconstructionPictures cannot draw {type(state.model).__name__}: the model needs a method "
                "reconstruct(outputs, batch) that returns images; drop the callback"
            )

    def after_forward(self, state: State, logger: Logger) -> None:
        """Keep the first images."""
        if self._batch is None:
            size = first_dimension(state.batch)
            self._batch = take_samples(state.batch, torch.arange(min(size, self.num_images)), size)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Draw if it is time."""
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._draw(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Draw if it is time."""
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self._draw(state)

    def _draw(self, state: State) -> None:
        model = unwrapped(state.model)
        aemim = next((a for a in state.algorithms if isinstance(a, AEMIM)), None)
        pictures = draw_pictures(model, self._batch, aemim, seed=state.rank_zero_seed)
        if dist.get_global_rank() == 0:
            folder = Path(self.folder.format(run_name=state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            figure = _grid(pictures, self.mean, self.std, aemim, f"batch {int(state.timestamp.batch)}")
            path = folder / f"batch{int(state.timestamp.batch):07d}.png"
            partial = path.with_name(f".{path.name}.partial")
            figure.savefig(partial, dpi=100, format="png")
            partial.replace(path)  # there is no half a picture


@dataclass(frozen=True)
class Pictures:
    """Normalised images of shape (rows, 3, height, width); the last three are there under AEMIM."""

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    adversarial: Tensor | None = None
    perturbation: Tensor | None = None
    adversarial_reconstruction: Tensor | None = None


def draw_pictures(model: Any, batch: Any, aemim: AEMIM | None, *, seed: int = 0) -> Pictures:
    """Reconstruct a batch, clean and attacked, and leave no trace in the model or the generators.

    Args:
        model: A model with ``reconstruct``, unwrapped.
        batch: The batch to draw.
        aemim: The algorithm that is attached to the model, if any.
        seed: Decides the masks and the attack's noise: the same seed gives comparable pictures.

    Returns:
        The pictures.
    """
    rng = RngState.capture()
    torch.manual_seed(seed)
    try:
        with evaluating(model), torch.no_grad():
            return _reconstruct(model, batch, aemim, seed)
    finally:
        rng.restore()


def _reconstruct(model: Any, batch: Any, aemim: AEMIM | None, seed: int) -> Pictures:
    images = images_in(batch)
    if aemim is None:
        outputs, result = model(batch), None
    else:
        outputs, result = aemim.attack(model, batch, step=0, seed=seed)
    mask = outputs["mask"]
    patch_size = mask_patch_size(images, mask)  # not always the encoder's
    clean = (images, mask_images(images, mask, patch_size), model.reconstruct(outputs, images))
    if result is None:
        return Pictures(*clean)
    # Hidden patches carry noise that no one sees: only what the encoder gets is shown.
    perturbation = mask_images(result.images - images, mask, patch_size)
    attacked = model.reconstruct(result.outputs, images, visible_from=result.images)
    return Pictures(*clean, result.images, perturbation, attacked)


def _grid(
    pictures: Pictures, mean: tuple[float, ...], std: tuple[float, ...], aemim: AEMIM | None, title: str
) -> Figure:
    center, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    columns = {
        "original": _pixels(pictures.original, center, scale),
        "masked": _pixels(pictures.masked, center, scale),
        "reconstruction": _pixels(pictures.reconstruction, center, scale),
    }
    if aemim is not None and pictures.adversarial is not None and pictures.perturbation is not None:
        epsilon = aemim.present("epsilon")
        gain = 127.5 / max(epsilon, 1e-3)
        amplified = 0.5 + gain * pictures.perturbation.cpu().float() * scale
        columns |= {
            f"adversarial, ε={epsilon:g}/255": _pixels(pictures.adversarial, center, scale),
            f"perturbation ×{gain:.0f}": amplified.clamp(0, 1),
            "its reconstruction": _pixels(pictures.adversarial_reconstruction, center, scale),
        }
    return _figure(columns, title)


def _pixels(images: Tensor | None, center: Tensor, scale: Tensor) -> Tensor:
    assert images is not None
    return (images.cpu().float() * scale + center).clamp(0, 1)


_CAPTION = (
    "Visible patches are shown as the model saw them. Hidden patches are its prediction; if it predicts "
    "patches normalised\nby their own statistics, each one's true mean and standard deviation are used to "
    "show it: its colour and contrast are given, its structure is not."
)


def _figure(columns: dict[str, Tensor], title: str) -> Figure:
    """One image with a title above each column: an axis for each picture takes seconds to draw."""
    width = next(iter(columns.values())).shape[-1]
    gap = max(1, width // 16)
    images = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    grid = make_grid(images, nrow=len(columns), padding=gap, pad_value=1.0)
    wide, above, below = 1.7 * len(columns), 0.7, 0.4  # inches
    high = wide * grid.shape[1] / grid.shape[2]
    figure = Figure(figsize=(wide, high + above + below))
    axis = figure.add_axes((0, below / (high + above + below), 1, high / (high + above + below)))
    axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_axis_off()
    for column, name in enumerate(columns):
        center = gap + column * (width + gap) + width / 2
        axis.text(center, -gap, name, ha="center", va="bottom", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(_CAPTION, fontsize=6.5)
    return figure
