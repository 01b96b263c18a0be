"""Batches of any make: find their size, take some of their samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_dimension", "map_tensors", "take_samples"]


def take_samples(value: Any, index: Tensor, size: int) -> Any:
    """Take some samples of everything in ``value`` whose first dimension is the batch.

    A flat tensor with one entry for each true entry of a mask beside it, such as the codes of the
    hidden patches that Hugging Face's BEiT takes as labels, is cut as that mask is.

    Args:
        value: A tensor, or (nested) mappings, lists and tuples that hold tensors.
        index: Samples to take, shape (count,), int64.
        size: Batch size: other tensors are left alone.

    Returns:
        The same structure.
    """
    counts: list[Tensor] = []

    def count(tensor: Tensor) -> None:
        if tensor.dtype == torch.bool and tensor.ndim > 1 and tensor.shape[0] == size:
            counts.append(tensor.flatten(1).sum(dim=1))

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim > 0 and tensor.shape[0] == size:
            return tensor[index.to(tensor.device)]
        if tensor.ndim == 1:
            for entries in counts:
                if int(entries.sum()) == len(tensor):
                    parts = tensor.split(entries.tolist())
                    return torch.cat([parts[i] for i in index.tolist()])
        return tensor

    map_tensors(value, count)
    return map_tensors(value, take)


def first_dimension(batch: object) -> int:
    """Batch size: the first dimension of the images, else of the first tensor, of a batch.

    Raises:
        ValueError: If it holds no tensor.
    """
    found: list[Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) if tensor.ndim else None)
    if not found:
        raise ValueError(f"the batch ({type(batch).__name__}) holds no tensor with a batch dimension")
    return next((tensor for tensor in found if tensor.ndim >= 4), found[0]).shape[0]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuild nested mappings, sequences and dataclasses with ``function`` of each tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "items") and callable(value.items):  # dict, UserDict, BatchFeature, ModelOutput
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = map_tensors(item, function)
        return mapped
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **map_tensors(fields, function))
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
