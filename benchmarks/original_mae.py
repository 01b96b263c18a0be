"""Build the model of the original MAE code from a clone of it, with today's timm and NumPy.

Nothing of the clone is changed or copied. What it asks for and no longer is there stands in while it is
imported and built: `qk_scale` of timm's block, which it always leaves at its default, and `np.float`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from timm.models import vision_transformer
from torch import nn

__all__ = ["build_original", "require_clone"]

_MODEL, _POSITIONS = "models_mae.py", "util/pos_embed.py"


class _Block(vision_transformer.Block):
    """timm's block, which took another argument in 2021."""

    def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def require_clone(clone: Path) -> None:
    """Refuse what is no clone.

    Raises:
        ValueError: A file is missing.
    """
    for name in (_MODEL, _POSITIONS):
        if not (clone / name).is_file():
            raise ValueError(f"expected a clone of github.com/facebookresearch/mae (it has no {name})")


def build_original(clone: Path, sizes: dict[str, Any]) -> nn.Module:
    """The original model; its forward takes images and a mask ratio, and returns the loss first.

    Args:
        clone: Folder of the code.
        sizes: The arguments of our `MAE`.

    Returns:
        The model, of the same sizes.
    """
    with _as_of_2021(clone):
        module = _load("models_mae", clone / _MODEL)
        model: nn.Module = module.MaskedAutoencoderViT(
            img_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            embed_dim=sizes["embed_dim"],
            depth=sizes["depth"],
            num_heads=sizes["num_heads"],
            decoder_embed_dim=sizes["decoder_dim"],
            decoder_depth=sizes["decoder_depth"],
            decoder_num_heads=sizes["decoder_heads"],
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=sizes["norm_pixel_target"],
        )
    return model


def _load(name: str, file: Path) -> ModuleType:
    """Run a file as a module that only the caller knows."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _as_of_2021(clone: Path) -> Iterator[None]:
    """What the code was written for; everything is as before afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "util"}
    block = vision_transformer.Block
    util = ModuleType("util")  # a folder without __init__.py: any other `util` on the path would come first
    util.__path__ = [str(clone / "util")]
    had_float = "float" in vars(np)
    try:
        _forget_util()
        sys.modules["util"] = util
        vision_transformer.Block = _Block
        if not had_float:
            np.float = float  # type: ignore[attr-defined]
        yield
    finally:
        vision_transformer.Block = block
        if not had_float:
            vars(np).pop("float", None)
        _forget_util()
        sys.modules |= before


def _forget_util() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "util"]:
        del sys.modules[name]
