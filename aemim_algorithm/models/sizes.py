"""Checks of the sizes that models are built with: by name, before timm fails on them or, worse, does not."""

from __future__ import annotations

from collections.abc import Sequence

from aemim_algorithm.validation import require_integer

__all__ = ["require_swin_sizes", "require_vit_sizes", "require_width"]


def require_vit_sizes(
    *,
    image_size: int | Sequence[int],
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    drop_path: float = 0.0,
) -> None:
    """Raise ``ValueError`` unless a Vision Transformer can be built with these sizes.

    Args:
        image_size: Side of the square input, or (height, width), in pixels: multiples of ``patch_size``.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the transformer, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of each block.
        drop_path: Rate of stochastic depth, in [0, 1).
    """
    require_integer("patch_size", patch_size, low=1)
    if any(side % patch_size for side in _sides_of(image_size)):
        raise ValueError(
            f"image_size={image_size} is not a multiple of patch_size={patch_size} pixels: choose one that is"
        )
    require_integer("depth", depth, low=1)
    require_width("embed_dim", embed_dim, "num_heads", num_heads)
    _require_drop_path(drop_path)


def require_swin_sizes(
    *,
    image_size: int | Sequence[int],
    patch_size: int,
    window_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    drop_path: float = 0.0,
) -> None:
    """Raise ``ValueError`` unless a Swin Transformer can be built with these sizes, and pads nothing.

    Args:
        image_size: Side of the square input, or (height, width), in pixels.
        patch_size: Side of a patch of the first stage, in pixels.
        window_size: Side of an attention window, in patches of its stage; a divisor of what a side of each
            larger stage has.
        embed_dim: Width of the first stage; each further stage has twice the width of the one before.
        depths: Number of blocks of each stage.
        num_heads: Attention heads of each stage.
        drop_path: Rate of stochastic depth, in [0, 1).
    """
    require_integer("patch_size", patch_size, low=1)
    require_integer("window_size", window_size, low=1)
    if not len(depths) == len(num_heads) > 0:
        raise ValueError(f"got {depths=} and {num_heads=}: expected one of each for every stage")
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        require_integer(f"depths[{stage}]", depth, low=1)
        require_width("embed_dim", embed_dim, f"num_heads[{stage}]", heads, times=2**stage)
    _require_drop_path(drop_path)
    for side in _sides_of(image_size):
        _require_even_cut(side, image_size, patch_size, window_size, len(depths))


def require_width(width_name: str, width: int, heads_name: str, heads: int, *, times: int = 1) -> None:
    """Raise ``ValueError`` unless attention of ``width * times`` can be split into ``heads``."""
    require_integer(width_name, width, low=1)
    require_integer(heads_name, heads, low=1)
    if width * times % heads:
        given = f"{width_name}={width}" if times == 1 else f"{times} * {width_name}={width * times}"
        raise ValueError(f"{given} must be a multiple of {heads_name}={heads}")


def _require_drop_path(rate: object) -> None:
    """Raise ``ValueError`` unless ``rate`` is a rate of stochastic depth: at 1 no branch would be left."""
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise ValueError(f"drop_path={rate!r} is out of range: expected a number in [0, 1)")


def _sides_of(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of images whose size is given as one side or as both, in pixels."""
    sides = [image_size, image_size] if isinstance(image_size, int) else image_size
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise ValueError(
            f"image_size={image_size!r}: expected an integer of at least 1, or two as (height, width)"
        )
    for side in sides:
        require_integer("image_size", side, low=1)
    return sides[0], sides[1]


def _require_even_cut(
    side: int, image_size: int | Sequence[int], patch_size: int, window: int, stages: int
) -> None:
    stride = patch_size * 2 ** (stages - 1)
    if side % stride:
        raise ValueError(
            f"image_size={image_size} is not a multiple of {stride}, the pixels that a feature of the "
            f"last of {stages} stages covers: choose one that is"
        )
    for stage in range(stages):
        patches = side // (patch_size * 2**stage)
        # timm shrinks a window that is larger than its stage, and pads one that does not fit.
        if patches > window and patches % window:
            raise ValueError(
                f"window_size={window} does not divide the {patches} patches along a side of stage "
                f"{stage + 1} at image_size={image_size}: choose a divisor, or another image_size"
            )
