"""One table of masked-image models: the tests of training, resuming and exporting run over all of it.

Every model is tiny, in float32 and comes with batches of eight samples in its own layout. What
AEMIM needs to know about it stands in ``arguments``, and is nothing but for a monolith.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import models_foreign as foreign
import models_own as own
import pytest
import torch
from composer.core import DataSpec
from composer.models import ComposerModel
from conftest import normalised_images
from torch import Tensor, nn

__all__ = [
    "BATCH_SIZE",
    "SETTINGS",
    "Setting",
    "every_setting",
    "transformers_installed",
    "with_mask_of_batch",
    "without_randomness",
]

BATCH_SIZE, BATCHES = 8, 4


@dataclass(frozen=True)
class Setting:
    """A model and what is expected of AEMIM on it.

    Attributes:
        name: Its name in the README's table, in Markdown.
        make: Builds it from the global generators.
        batch: Makes its batch of a number: the images normalised, inside the pixel range.
        decided: Likewise, where that leaves the mask to the model: a batch that decides it.
        encoder: Dotted path under which AEMIM finds the encoder.
        feature_dim: Dimension of the encoder's output that holds a token's features.
        class_token: Whether it has one for the adapter ``"cls_token"``.
        arguments: What AEMIM must be told, by argument.
        data: How Composer splits and counts a batch, if not by the first dimension.
        indivisible: Why micro-batches do not add up to the batch, with or without AEMIM; empty if
            they do.
    """

    name: str
    make: Callable[[], ComposerModel]
    batch: Callable[[int], Any]
    encoder: str
    decided: Callable[[int], Any] | None = None
    feature_dim: int = -1
    class_token: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    indivisible: str = ""

    def build(self, seed: int = 0) -> ComposerModel:
        """The model, in training mode; the same seed gives the same one."""
        torch.manual_seed(seed)
        return self.make().train()

    def batches(self) -> list[Any]:
        """Four batches of eight samples."""
        return [self.batch(number) for number in range(BATCHES)]

    def loader(self) -> Any:
        """The batches as the Trainer takes them."""
        return DataSpec(self.batches(), **self.data) if self.data else self.batches()

    @property
    def needs_transformers(self) -> bool:
        """Whether the model is one of Hugging Face's."""
        return self.name.startswith("Hugging Face")


def without_randomness(model: ComposerModel) -> ComposerModel:
    """Turn off dropout and stochastic depth: for equal numbers, or for a gradient everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("drop_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if hasattr(getattr(module, "config", None), "attention_probs_dropout_prob"):
            module.config.attention_probs_dropout_prob = 0.0
    return model


def with_mask_of_batch(model: ComposerModel) -> ComposerModel:
    """Give a model whose ``forward`` takes a mask the one that is in the batch."""
    if "mask" in inspect.signature(model.forward).parameters:
        stock: Any = type(model)

        def forward(self: Any, batch: Any, mask: Tensor | None = None) -> Any:
            return stock.forward(self, batch, batch[1] if mask is None else mask)

        model.__class__ = type(stock.__name__, (stock,), {"forward": forward})
    return model


def masks(number: int, patches: int = 16, hidden: int = 12) -> Tensor:
    """Masks that hide as many patches of each image; shape (8, patches), bool, true where hidden."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = [torch.randperm(patches, generator=generator) < hidden for _ in range(BATCH_SIZE)]
    return torch.stack(rows)


def images_and_masks(number: int) -> tuple[Tensor, Tensor]:
    """A batch of (images, mask)."""
    return normalised_images(BATCH_SIZE, seed=number), masks(number)


def images_and_labels(number: int) -> tuple[Tensor, Tensor]:
    """A batch of (images, labels)."""
    return normalised_images(BATCH_SIZE, seed=number), torch.arange(BATCH_SIZE)


def pixel_values(
    number: int, *, size: int = 16, frames: int = 0, noise: bool = False, patches: int = 0
) -> dict[str, Tensor]:
    """A batch as transformers takes it: images or videos, and the mask or the noise it is made from."""
    images = normalised_images(BATCH_SIZE, size, seed=number)
    if frames:
        images = torch.stack([images.roll(frame, -1) for frame in range(frames)], dim=1)
    batch = {"pixel_values": images}
    if noise:
        batch["noise"] = torch.rand(BATCH_SIZE, 16, generator=torch.Generator().manual_seed(number))
    if patches:
        batch["bool_masked_pos"] = masks(number, patches, patches * 5 // 8)
    return batch


def visual_tokens(number: int) -> dict[str, Tensor]:
    """BEiT's batch: each image hides another number of patches; one label for each, flat."""
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randperm(16, generator=generator) < 4 + sample for sample in range(BATCH_SIZE)]
    hidden = torch.stack(rows)
    labels = torch.randint(11, (int(hidden.sum()),), generator=generator)
    return pixel_values(number) | {"bool_masked_pos": hidden, "labels": labels}


def split_visual_tokens(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Micro-batches of BEiT's batch: the flat labels follow their images."""
    images, hidden = (batch[key].split(size) for key in ("pixel_values", "bool_masked_pos"))
    labels = batch["labels"].split([int(part.sum()) for part in hidden])
    parts = zip(images, hidden, labels, strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def count_images(batch: dict[str, Tensor]) -> int:
    """Samples of BEiT's batch."""
    return len(batch["pixel_values"])


def _huggingface(name: str) -> ComposerModel:
    import models_huggingface

    return getattr(models_huggingface, name)()


def _transformers(
    name: str, builder: str, batch: Callable[[int], Any], encoder: str, **extra: Any
) -> Setting:
    return Setting(
        f"Hugging Face `{name}`", partial(_huggingface, builder), batch, f"model.{encoder}", **extra
    )


def _conv(norm: str, name: str, batch: Callable[[int], Any], **extra: Any) -> Setting:
    make = partial(foreign.conv_mim, name, foreign.NORMS[norm], own_mask=norm == "BatchNorm2d")
    return Setting(f"convolutions with `{norm}`", make, batch, name, feature_dim=1, **extra)


_SIMMIM = partial(pixel_values, patches=16)
_SIMMIM_64 = partial(pixel_values, patches=64)
_NOISE = partial(pixel_values, noise=True)
_LARGE = partial(pixel_values, size=32)
_FLAT = "the loss is a mean over the batch's hidden patches, and images hide different numbers of them"

SETTINGS: tuple[Setting, ...] = (
    Setting("`MAE`", own.mae, images_and_masks, "encoder", class_token=True),
    Setting("`SimMIM` on a ViT", own.simmim_on_vit, images_and_masks, "encoder", class_token=True),
    Setting("`SimMIM` on a Swin Transformer", own.simmim_on_swin, images_and_masks, "encoder"),
    Setting("`MaskFeat`", own.maskfeat, images_and_masks, "encoder", class_token=True),
    Setting("`BEiT`", own.beit, images_and_masks, "encoder", class_token=True),
    _transformers("ViTMAEForPreTraining", "vit_mae", pixel_values, "vit", decided=_NOISE, class_token=True),
    _transformers("ViTForMaskedImageModeling", "vit", _SIMMIM, "vit", class_token=True),
    _transformers("DeiTForMaskedImageModeling", "deit", _SIMMIM, "deit", class_token=True),
    _transformers("SwinForMaskedImageModeling", "swin", _SIMMIM_64, "swin"),
    _transformers("Swinv2ForMaskedImageModeling", "swinv2", _SIMMIM_64, "swinv2"),
    _transformers("FocalNetForMaskedImageModeling", "focalnet", _SIMMIM_64, "focalnet"),
    _transformers(
        "BeitForMaskedImageModeling",
        "beit",
        visual_tokens,
        "beit",
        class_token=True,
        data={"split_batch": split_visual_tokens, "get_num_samples_in_batch": count_images},
        indivisible=_FLAT,
    ),
    _transformers("HieraForPreTraining", "hiera", _LARGE, "hiera", decided=partial(_LARGE, noise=True)),
    _transformers("VideoMAEForPreTraining", "videomae", partial(_SIMMIM, frames=2), "videomae"),
    Setting(
        "a monolith like the original MAE code",
        foreign.monolith,
        images_and_masks,
        "model.forward_encoder",
        class_token=True,
        arguments={"encoder": "model.forward_encoder"},
        indivisible="it draws its mask inside, for the samples of a micro-batch together",
    ),
    _conv(
        "BatchNorm2d",
        "encoder",
        images_and_labels,  # its encoder draws the mask
        indivisible="batch statistics are those of a micro-batch, and so is the mask it draws inside",
    ),
    _conv("GroupNorm", "trunk", images_and_masks),
    _conv("RmsNorm2d", "encoder", images_and_labels, decided=images_and_masks),  # drawn before the encoder
    _conv("LayerNorm2d", "backbone", images_and_masks),
    Setting(
        "ConvNeXt V2 blocks with `GlobalResponseNorm`",
        partial(foreign.grn_mim, "net"),
        images_and_masks,
        "net",
        feature_dim=1,
    ),
    Setting(
        "timm `VisionTransformer`, called by `forward_features`",
        foreign.vit_mim,
        images_and_masks,
        "backbone.forward_features",
        class_token=True,
    ),
    Setting(
        "timm `SwinTransformer`, features (batch, height, width, channels)",
        foreign.swin_mim,
        images_and_masks,
        "backbone.forward_features",
        indivisible="its head has batch statistics, those of a micro-batch",
    ),
)
"""The table: every model that AEMIM is tested on, in the order of the README's."""

transformers_installed = importlib.util.find_spec("transformers") is not None
"""Whether the models of Hugging Face can be built."""


def _parameter(setting: Setting) -> Any:
    plain = setting.name.replace("Hugging Face ", "").replace("`", "")
    missing = setting.needs_transformers and not transformers_installed
    mark = pytest.mark.skipif(missing, reason="transformers is not installed")
    return pytest.param(setting, id=plain.replace(" ", "-"), marks=mark)


every_setting = pytest.mark.parametrize("setting", [_parameter(setting) for setting in SETTINGS])
"""Runs a test once for each model."""
