"""Batches of any make: find their size, take some of their samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["detached_copy", "first_dimension", "first_tensor", "map_tensors", "take_samples"]


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

    Raises:
        ValueError: If it is not certain how a flat tensor belongs to the samples.
    """
    masks: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        if tensor.dtype == torch.bool and tensor.ndim > 1 and tensor.shape[0] == size:
            masks.append(tensor)

    def take(tensor: Tensor) -> Tensor:
        entries = _entries_of(tensor, masks) if tensor.ndim == 1 else None
        if entries is not None:
            parts = tensor.split(entries.tolist())
            return torch.cat([parts[i] for i in index.tolist()])
        batched = tensor.ndim > 0 and tensor.shape[0] == size
        return tensor[index.to(tensor.device)] if batched else tensor

    map_tensors(value, remember)
    return map_tensors(value, take)


def _entries_of(flat: Tensor, masks: list[Tensor]) -> Tensor | None:
    """How many entries of a flat tensor each sample has, if that is what a mask counts."""
    # Labels, one for each sample, are in nearly every batch: do not wait for a GPU because of them.
    masks = [mask for mask in masks if len(flat) != len(mask) or not mask.is_cuda]
    counts = [mask.flatten(1).sum(dim=1) for mask in masks]
    fitting = [entries for entries in counts if int(entries.sum()) == len(flat)]
    if not fitting or all(torch.equal(entries, torch.ones_like(entries)) for entries in fitting):
        return None
    if any(not torch.equal(entries, fitting[0]) for entries in fitting):
        raise ValueError(
            f"a flat tensor of {len(flat)} values could hold the entries of several masks in the batch: "
            "give it a batch dimension"
        )
    if len(flat) == len(fitting[0]):
        raise ValueError(
            f"a flat tensor of {len(flat)} values could hold one for each sample or one for each true entry "
            "of a mask in the batch: give it a batch dimension"
        )
    return fitting[0]


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


def first_tensor(output: object) -> Tensor | None:
    """The first floating-point tensor of a module's output (tensor, tuple, dict or ModelOutput)."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | list | tuple):
        return None
    return next((t for value in values if (t := first_tensor(value)) is not None), None)  # type: ignore[attr-defined]


def detached_copy(output: object) -> Tensor | None:
    """A copy of :func:`first_tensor`, without its graph."""
    tensor = first_tensor(output)
    return None if tensor is None else tensor.detach().clone()
