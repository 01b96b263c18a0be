"""ViTDet's simple feature pyramid: maps of several sizes from the last one of a plain ViT.

Li et al. 2022, arXiv 2203.16527, Section 3: there is no path from top to bottom, as a ViT has one map only.
"""

from __future__ import annotations

from collections import OrderedDict

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LEVELS", "POOLED", "SimplePyramid", "level_strides"]

LEVELS = ("0", "1", "2", "3")  # the names that torchvision's heads look for
POOLED = "pool"


def level_strides(patch_size: int) -> tuple[int, ...]:
    """Pixels between two cells of each map: 4, 8, 16, 32 and 64 for patches of 16 pixels."""
    return tuple(patch_size * step // 4 for step in (1, 2, 4, 8, 16))


class SimplePyramid(nn.Module):
    """Four maps of a quarter to twice the patch's stride, and a fifth for the proposals of large objects.

    Args:
        dim: Width of the ViT, a multiple of 4.
        channels: Width of the maps.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    _doubled(dim, dim // 2),
                    LayerNorm2d(dim // 2),
                    nn.GELU(),
                    _doubled(dim // 2, dim // 4),
                    _narrowed(dim // 4, channels),
                ),
                nn.Sequential(_doubled(dim, dim // 2), _narrowed(dim // 2, channels)),
                _narrowed(dim, channels),
                nn.Sequential(nn.MaxPool2d(2), _narrowed(dim, channels)),
            ]
        )

    def forward(self, features: Tensor) -> OrderedDict[str, Tensor]:
        """Make the maps.

        Args:
            features: Shape (batch, dim, rows, columns), with rows and columns even.

        Returns:
            By name, the finest first, each of shape (batch, channels, height, width).
        """
        maps = OrderedDict((name, level(features)) for name, level in zip(LEVELS, self.levels, strict=True))
        maps[POOLED] = F.max_pool2d(maps[LEVELS[-1]], kernel_size=1, stride=2)
        return maps


def _doubled(dim: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, out, kernel_size=2, stride=2)


def _narrowed(dim: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(dim, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
