"""Parallelism as recipes name it, in the form that Composer takes."""

from __future__ import annotations

from dataclasses import dataclass

from composer.utils import FSDP2Config

__all__ = ["HybridFSDP2Config"]


@dataclass
class HybridFSDP2Config(FSDP2Config):
    """FSDP2 whose shards are replicated (HSDP): gathering stays inside of a group, such as a node.

    Composer 0.32 takes the degree from FSDP1's config only, and replaces a mesh that it is given.

    Args:
        data_parallel_replicate_degree: Number of groups that each hold the whole model; ``None`` shards
            over all processes.
    """

    data_parallel_replicate_degree: int | None = None
