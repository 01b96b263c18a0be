"""Attention within windows, for images with too many patches for all of them to attend to one another.

As in ViTDet (Li et al. 2022, arXiv 2203.16527), most blocks of a plain ViT attend within windows and a few,
evenly spread, to everything. Three details are ours:

- The windows of an image are of one size, at most the given one, and as small as their number allows: 50
  patches a side are four windows of 13, not of 14.
- Where the last window reaches over the edge, nothing attends to what is not there. ViTDet lets all attend
  to the padding.
- The class token takes part, as in pre-training: it is in each window, and what it gathers there is averaged.

So one window that holds the whole image gives just what attention to everything does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WindowBlock", "Windows", "global_positions", "use_windows"]


@dataclass(frozen=True)
class Windows:
    """How a grid of patches is cut.

    Attributes:
        grid: Rows and columns of patches.
        shape: Those of one window.
    """

    grid: tuple[int, int]
    shape: tuple[int, int]

    @classmethod
    def at_most(cls, size: int, grid: tuple[int, int]) -> Windows:
        """As few windows as their largest side, in patches, allows, and these as small as can be."""
        rows, columns = (math.ceil(side / math.ceil(side / size)) for side in grid)
        return cls(grid, (rows, columns))

    @property
    def counts(self) -> tuple[int, int]:
        """Windows below one another, and beside one another."""
        rows, columns = (math.ceil(side / part) for side, part in zip(self.grid, self.shape, strict=True))
        return rows, columns

    @property
    def missing(self) -> tuple[int, int]:
        """Rows and columns that the last windows have beyond the grid."""
        parts = zip(self.counts, self.shape, self.grid, strict=True)
        rows, columns = (count * part - side for count, part, side in parts)
        return rows, columns

    def cut(self, patches: Tensor) -> Tensor:
        """Patches of shape (batch, rows * columns, dim) as (batch * windows, patches of a window, dim)."""
        (down, beside), (height, width) = self.counts, self.shape
        below, right = self.missing
        maps = F.pad(patches.unflatten(1, self.grid), (0, 0, 0, right, 0, below))
        parts = maps.unflatten(1, (down, height)).unflatten(3, (beside, width))
        return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def join(self, windows: Tensor) -> Tensor:
        """The opposite of `cut`."""
        (down, beside), (height, width), (rows, columns) = self.counts, self.shape, self.grid
        parts = windows.unflatten(1, (height, width)).unflatten(0, (-1, down, beside)).transpose(2, 3)
        maps = parts.flatten(1, 2).flatten(2, 3)
        return maps[:, :rows, :columns].flatten(1, 2)

    def mask(self, batch: int, prefix: int, like: Tensor) -> Tensor | None:
        """What is added to the scores of keys: minus infinity where there is no patch.

        Args:
            batch: Number of images.
            prefix: Tokens before the patches of each window.
            like: Tells type and device.

        Returns:
            Shape (batch * windows, 1, 1, prefix + patches of a window); ``None`` if there is nothing to hide.
        """
        if not any(self.missing):
            return None
        there = self.cut(like.new_ones(1, self.grid[0] * self.grid[1], 1))[..., 0]
        scores = F.pad(there.log(), (prefix, 0))
        return scores.repeat(batch, 1)[:, None, None]


class WindowBlock(Block):
    """timm's block with the parameters that it has; made of one by `use_windows`.

    Attributes:
        window: Largest side of a window, in patches; ``None``: all tokens attend to all.
    """

    window: int | None = None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Transform tokens.

        Args:
            x: Shape (batch, prefix + rows * columns, dim), the class token before the patches.
            grid: Rows and columns of patches. An argument, so that a recomputation has it too.

        Returns:
            Shape as ``x``.
        """
        x = x + self.drop_path1(self.ls1(self._attend(self.norm1(x), grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.window is None or max(grid) <= self.window:
            return self.attn(x)
        windows = Windows.at_most(self.window, grid)
        batch, prefix = len(x), x.shape[1] - grid[0] * grid[1]
        parts = windows.cut(x[:, prefix:])
        count = len(parts) // batch
        tokens = torch.cat([x[:, :prefix].repeat_interleave(count, 0), parts], dim=1)
        seen = self.attn(tokens, attn_mask=windows.mask(batch, prefix, x))
        gathered = seen[:, :prefix].unflatten(0, (batch, count)).mean(1)
        return torch.cat([gathered, windows.join(seen[:, prefix:])], dim=1)


def use_windows(blocks: nn.Sequential, *, window: int | None, global_blocks: int) -> None:
    """Make the blocks of a ViT attend within windows, in place; parameters stay what they are.

    Args:
        blocks: timm's.
        window: Largest side of a window, in patches; ``None``: there are none.
        global_blocks: How many blocks attend to everything, see `global_positions`.

    Raises:
        ValueError: A block is none of timm's plain ones.
    """
    everywhere = global_positions(len(blocks), global_blocks)
    for number, block in enumerate(blocks):
        if type(block) not in (Block, WindowBlock):
            raise ValueError(f"block {number} is a {type(block).__name__}, expected timm's plain Block")
        block.__class__ = WindowBlock
        block.window = None if number in everywhere else window


def global_positions(depth: int, count: int) -> set[int]:
    """The last block of each of ``count`` equal parts of ``depth`` blocks: 2, 5, 8, 11 of 12 for 4."""
    count = min(count, depth)
    return {(part + 1) * depth // count - 1 for part in range(count)}
