"""Augmentation of fine-tuning: RandAugment for each image, mixup or CutMix for each batch.

Both are timm's, and draw nothing from the global generators: what happens to an image is a function of its
seed, and what happens to a batch one of its first sample's seed. A run that resumes in mid-epoch therefore
goes on bit for bit, and no state is saved.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from composer.core.data_spec import default_split_batch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.validation import require_integer, require_number

__all__ = ["BatchMixing", "RandAugment", "seeded_globals"]

_SECTIONS = re.compile(r"rand(-t[a-z]+|-(?!t)[a-z]+\d[^-]*)*")
_PARTNER, _PARTNER_LABEL, _SEED = "partner", "partner_label", "mixing_seed"


class RandAugment:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as timm does it, a function of a seed.

    Args:
        policy: timm's description, such as ``rand-m9-mstd0.5-inc1``: magnitude 9 with a standard deviation of
            0.5, operations whose severity rises with the magnitude.
        image_size: Side of the images, in pixels; translations go up to 45% of it.
        mean: Colour that fills what an operation leaves empty, per channel in [0, 1].

    Raises:
        ValueError: The policy is not one of RandAugment.
    """

    def __init__(self, policy: str, *, image_size: int, mean: Sequence[float]) -> None:
        require_integer("image_size", image_size, low=1)
        fill = tuple(min(255, round(255 * value)) for value in mean)
        options = {
            "translate_const": int(image_size * 0.45),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        try:
            if not _SECTIONS.fullmatch(policy):  # timm passes over a name without its value
                raise ValueError(policy)
            self._augment = rand_augment_transform(policy, options)
        except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"randaugment={policy!r}: expected a policy of timm, such as rand-m9-mstd0.5-inc1"
            ) from error
        self.policy, self.image_size, self.mean = policy, image_size, tuple(mean)

    def __call__(self, image: Tensor, generator_seed: int) -> Tensor:
        """Augment one image.

        Args:
            image: Shape (3, height, width), uint8.
            generator_seed: Alone decides what is done, at least 0.

        Returns:
            Same shape, uint8.
        """
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        with seeded_globals(generator_seed):
            augmented = self._augment(picture)
        return torch.from_numpy(np.array(augmented)).permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        return f"RandAugment({self.policy!r}, image_size={self.image_size}, mean={self.mean!r})"


class BatchMixing:
    """Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing, timm's.

    Sample ``i`` of a device's batch of ``B`` is mixed with sample ``B - 1 - i``, under one ratio and one box
    for the whole batch, as is timm's default. Who is mixed with whom is settled by `pair`, before the batch
    is cut into micro-batches; the mixing itself happens in `mix`, on the device and after normalisation. So
    the size of a micro-batch changes nothing. Each process mixes its own share of the global batch, with a
    ratio that follows from the seed of its own first sample: another number of processes mixes otherwise.

    Args:
        num_classes: Number of classes.
        normalize: What `mix` normalises images with.
        mixup: Parameter of the beta distribution of mixup's ratio; 0: no mixup.
        cutmix: The same of CutMix.
        switch_prob: How often CutMix is taken where both are on.
        label_smoothing: Share of the target that all classes have in equal parts.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        normalize: Normalize,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        require_integer("num_classes", num_classes, low=2)
        for name, value, high in (
            ("mixup", mixup, float("inf")),
            ("cutmix", cutmix, float("inf")),
            ("switch_prob", switch_prob, 1),
            ("label_smoothing", label_smoothing, 1),
        ):
            require_number(name, value, low=0, high=high)
        self.num_classes, self.normalize, self.label_smoothing = num_classes, normalize, label_smoothing
        self._mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self.mixes = mixup > 0 or cutmix > 0

    def split(self, batch: dict[str, Any], microbatch_size: int | float) -> Sequence[Any]:
        """Cut a device's batch into micro-batches that hold what `mix` needs: Composer's `split_batch`."""
        return default_split_batch(self.pair(batch), microbatch_size)

    def pair(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Lay each sample's partner beside it; for a device's whole batch.

        Args:
            batch: ``{"image": (batch, 3, height, width), uint8, "label": (batch,), "seed": (batch,), ...}``.

        Returns:
            The batch and what `mix` needs.
        """
        if not self.mixes:
            return batch
        # A list, not a tensor: `mix` would have to wait for the GPU to read it.
        seed = int(batch["seed"][0]) & (1 << 64) - 1
        return batch | {
            _PARTNER: batch["image"].flip(0),
            _PARTNER_LABEL: batch["label"].flip(0),
            _SEED: [seed] * len(batch["label"]),
        }

    def mix(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise images, and mix them with their partners; for any part of a paired batch.

        Args:
            batch: Part of what `pair` returned, on the device.

        Returns:
            ``image`` as float32, and ``label`` as the share of each class, shape (batch, classes), float32.
            Without mixing and smoothing the labels stay as they are. The rest of the batch as it was.
        """
        rest = {key: value for key, value in batch.items() if key not in (_PARTNER, _PARTNER_LABEL, _SEED)}
        if _PARTNER not in batch:
            return self.normalize(rest) | {"label": self._smoothed(batch["label"])}
        # timm pairs i with n - 1 - i: of these 2n, samples and partners.
        images = torch.cat([batch["image"], batch[_PARTNER].flip(0)])
        labels = torch.cat([batch["label"], batch[_PARTNER_LABEL].flip(0)])
        count = len(batch["label"])
        normalised = self.normalize({"image": images})["image"]
        with seeded_globals(batch[_SEED][0]):
            mixed, targets = self._mixup(normalised, labels)
        return rest | {"image": mixed[:count], "label": targets[:count]}

    def _smoothed(self, labels: Tensor) -> Tensor:
        if self.label_smoothing == 0:
            return labels
        return mixup_target(labels, self.num_classes, lam=1.0, smoothing=self.label_smoothing)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators, and put them back afterwards.

    Args:
        seed: At least 0; all of its bits count.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
