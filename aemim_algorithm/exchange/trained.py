"""What an export starts from: the clean part of a trained model, and its architecture where that matters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aemim_algorithm.adapters import remove_adapters
from aemim_algorithm.exchange.files import few, require_fit

__all__ = ["Trained", "clean_part", "require_model", "resized"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained model, without its adversarial adapters, on the CPU.

    ``encoder`` and ``decoder`` are the parameters by our names without their prefix; ``decoder`` is
    ``None`` where it is not asked for. ``model`` tells what parameters do not: heads, windows, image
    size. Its own values do not count, and it is ``None`` where nothing is asked of it.
    """

    encoder: StateDict
    decoder: StateDict | None = None
    model: nn.Module | None = None

    def renameable(self) -> StateDict:
        """Parameters by our full names, without what only pre-training needs."""
        encoder = {k: v for k, v in _folded_scales(self.encoder).items() if k != "mask_token"}
        named = {f"encoder.{key}": value for key, value in encoder.items()}
        return named | {f"decoder.{key}": value for key, value in (self.decoder or {}).items()}


def clean_part(state: Mapping[str, Tensor], part: str) -> StateDict:
    """The parameters and buffers of a submodule, without its prefix and without adversarial copies.

    Args:
        state: State dict of a model.
        part: Name of the submodule.

    Returns:
        Copies on the CPU; independent of the model, so that training may go on.

    Raises:
        ValueError: If there is no such part, or its tensors are shards of a distributed model.
    """
    prefix = f"{part}."
    found = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and "adversarial" not in key
    }
    if not found:
        raise ValueError(
            f"found no {part} among {len(state)} parameters ({few(state)}); "
            f"expected names that start with {prefix!r}, as in the models of this package"
        )
    # A shard is a DTensor; asking for the whole would need every rank, which a file write is not.
    sharded = [key for key, value in found.items() if hasattr(value, "full_tensor")]
    if sharded:
        raise ValueError(
            f"got a sharded {part} ({few(sharded)}); expected whole tensors: save a checkpoint "
            "with state_dict_type='full' and export that"
        )
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def require_model(trained: Trained, why: str) -> nn.Module:
    """The architecture, which a state dict alone does not tell.

    Raises:
        ValueError: If it is not known.
    """
    if trained.model is None:
        raise ValueError(
            f"{why} needs the model's architecture, which a checkpoint does not hold; expected a recipe.yaml "
            "beside it, or --model with a recipe or a model's name (model= in Python)"
        )
    return trained.model


def resized(trained: Trained, *, image_size: tuple[int, int] | None, window_size: int | None) -> Trained:
    """The same model for another input size, as timm converts a checkpoint on loading.

    Position embeddings are resampled bicubically with antialiasing, fixed sin-cos ones too, as
    fine-tuning at another size does; the slot of the class token is kept. Tables of relative positions
    are interpolated where a window changes.

    Args:
        trained: The model; it is left as it is.
        image_size: (height, width) in pixels; ``None`` for its own.
        window_size: Side of a Swin's windows, in patches; ``None`` for its own.

    Raises:
        ValueError: If the architecture is not known or does not fit, or a size is impossible.
    """
    if image_size is None and window_size is None:
        return trained
    model = copy.deepcopy(require_model(trained, "another image or window size")).cpu()
    remove_adapters(model)
    encoder = timm_encoder(model)
    require_fit(encoder, trained.encoder, whose="the checkpoint's encoder")
    encoder.load_state_dict(trained.encoder)
    old_grid = encoder.patch_embed.grid_size
    size = image_size or encoder.patch_embed.img_size
    _require_multiple(size, encoder.patch_embed.patch_size)
    if isinstance(encoder, SwinTransformer):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.searchsorted")  # how timm looks values up is its affair
            encoder.set_input_size(img_size=size, window_size=window_size or window_of(encoder))
    elif window_size is not None:
        raise ValueError(
            f"got window_size={window_size}; expected none, {type(encoder).__name__} has no windows"
        )
    else:
        encoder.set_input_size(img_size=size)
    decoder = trained.decoder
    if decoder is not None:
        new_grid = list(encoder.patch_embed.grid_size)
        position = resample_abs_pos_embed(decoder["pos_embed"], new_size=new_grid, old_size=list(old_grid))
        decoder = decoder | {"pos_embed": position}
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    return Trained(state, decoder, model)


def timm_encoder(model: nn.Module) -> VisionTransformer | SwinTransformer:
    """The encoder of a model, if it is one of the two kinds that other libraries know.

    Raises:
        ValueError: If it is another kind.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, VisionTransformer | SwinTransformer):
        raise ValueError(
            f"got {type(encoder).__name__} as the encoder of {type(model).__name__}; "
            "expected timm's VisionTransformer or SwinTransformer, or a subclass"
        )
    return cast(VisionTransformer | SwinTransformer, encoder)


def window_of(encoder: SwinTransformer) -> int:
    """The window of a Swin, in patches; timm shrinks it in stages that are smaller."""
    return max(max(block.window_size) for stage in encoder.layers for block in stage.blocks)


def _folded_scales(encoder: StateDict) -> StateDict:
    """Multiply the factors of residual branches into the layers before them; other libraries have none."""
    folded = dict(encoder)
    for key in [key for key in encoder if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, scale = key.rsplit(".", 2)[:2]
        factor = folded.pop(key)
        layer = f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
        folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * factor[:, None]
        folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * factor
    return folded


def _require_multiple(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if any(side < cell or side % cell for side, cell in zip(size, patch, strict=True)):
        raise ValueError(
            f"got image_size={size[0]}x{size[1]}; expected multiples of the patch, "
            f"{patch[0]}x{patch[1]} pixels"
        )
