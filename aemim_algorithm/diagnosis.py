"""Where a loss or a gradient became NaN or infinite: the sample, the parameter, or the branch and its layer.

Every rank must call these functions alike: a pass over a sharded model needs all of them, and what one finds
all of them name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor, nn

from aemim_algorithm.adapters import adversarial_mode, preserved_buffers
from aemim_algorithm.exchange.files import few
from aemim_algorithm.randomness import RngState
from aemim_algorithm.samples import first_dimension, map_tensors

__all__ = ["Pass", "describe_gradients", "describe_losses"]

PrecisionContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Pass:
    """What one micro-batch started from, and which of its losses are finite.

    Attributes:
        batch: The micro-batch, on the device.
        rng: The global generators before its forward pass.
        finite: For each named loss a scalar, bool.
    """

    batch: Any
    rng: RngState
    finite: dict[str, Tensor] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Names of the losses that are not finite; of the total only if no part of it is named."""
        names = [name for name, finite in self.finite.items() if not finite]
        return [name for name in names if name != "total"] or names


def describe_losses(
    model: nn.Module, passes: Sequence[Pass], precision: PrecisionContext = nullcontext
) -> str:
    """Which losses are not finite on any rank, and where that began.

    Args:
        model: The model, unwrapped; the generators and the buffers end as they were.
        passes: This rank's micro-batches.
        precision: Makes the precision context of a pass.

    Returns:
        One line, the same on every rank; empty if all losses are finite.
    """
    numbers = [number for number, each in enumerate(passes) if each.broken()]
    local = ([name for number in numbers for name in passes[number].broken()], numbers[:1])
    gathered: list[Any] = dist.all_gather_object(local)
    names = list(dict.fromkeys(name for broken, _ in gathered for name in broken))
    if not names:
        return ""
    first = min(number for _, numbers in gathered for number in numbers)
    cause = _cause(model, passes, min(first, len(passes) - 1), names, precision)
    verb = "is" if len(names) == 1 else "are"
    return f"the {' and the '.join(names)} loss {verb} NaN or infinite ({cause})"


def describe_gradients(norms: Mapping[str, Tensor]) -> str:
    """Which gradients are not finite on any rank, those nearest to the loss first.

    Args:
        norms: A norm of each gradient of this rank, by parameter, in the model's order.

    Returns:
        One line, the same on every rank.
    """
    local = [name for name, norm in norms.items() if not norm.isfinite()]
    names = list(dict.fromkeys(name for broken in dist.all_gather_object(local) for name in reversed(broken)))
    copies = [name for name in names if "adversarial" in name]
    branch = " (adversarial branch)" if copies and len(copies) == len(names) else ""
    noun = "parameter" if len(names) == 1 else "parameters"
    return f"the gradients of {len(names)} {noun} are NaN or infinite{branch}: {few(names)}"


def _cause(
    model: nn.Module, passes: Sequence[Pass], number: int, names: list[str], precision: PrecisionContext
) -> str:
    """The sample or the parameter that was broken before, else the layer where it began."""
    samples = sorted(_everywhere(_broken_samples(passes)))
    if samples:
        noun = "sample" if len(samples) == 1 else "samples"
        return f"the input of {noun} {few(map(str, samples))} is not finite"
    if parameters := _everywhere(_broken_values(model)):
        return f"the parameter {few(parameters)} is not finite"
    branches = ["adversarial"] if names == ["adversarial"] else ["clean"]
    if "adversarial" in names and branches == ["clean"]:
        branches.append("adversarial")
    for branch in branches:
        layer = _first_layer(model, passes[number], branch, precision)
        if found := _everywhere([layer] if layer else []):
            return f"first in the output of {found[0]} ({branch} branch)"
    return f"in no layer of a second pass over the clean images; {' and '.join(branches)} branch"


def _everywhere(found: Sequence[Any]) -> list[Any]:
    """What the ranks found, in their order, each once."""
    return list(dict.fromkeys(one for rank in dist.all_gather_object(list(found)) for one in rank))


def _broken_samples(passes: Sequence[Pass]) -> list[int]:
    """Positions in the global batch of the samples whose input is not finite."""
    sizes = [first_dimension(each.batch) for each in passes]
    start = dist.get_global_rank() * sum(sizes)
    positions: list[int] = []
    for each, size in zip(passes, sizes, strict=True):
        broken = torch.zeros(size, dtype=torch.bool)

        def look(tensor: Tensor, broken: Tensor = broken) -> None:
            if tensor.is_floating_point() and tensor.ndim and len(tensor) == len(broken):
                broken |= ~tensor.detach().reshape(len(tensor), -1).isfinite().all(dim=1).cpu()

        map_tensors(each.batch, look)
        positions += [start + row for row in broken.nonzero().flatten().tolist()]
        start += size
    return positions


def _broken_values(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers, or of this rank's shards of them, that are not finite."""
    values = [*model.named_parameters(), *model.named_buffers()]
    return [n for n, value in values if not getattr(value, "_local_tensor", value).detach().isfinite().all()]


def _first_layer(model: nn.Module, each: Pass, branch: str, precision: PrecisionContext) -> str | None:
    """Name of the module that is the first to return something that is not finite."""
    mode = adversarial_mode(model) if branch == "adversarial" else nullcontext()
    found: list[str] = []
    after = RngState.capture()
    each.rng.restore()
    try:
        # Compiled code would pass the hooks by.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            preserved_buffers(model),
            mode,
            precision(),
            _watched(model, found),
        ):
            model(each.batch)
    except Exception:
        pass  # it is the NaN that is to be reported, not what a model makes of it
    finally:
        torch.clear_autocast_cache()
        after.restore()
    return found[0] if found else None


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Puts the name of the first module whose output is not finite into ``found``."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(name or type(module).__name__)

        return look

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        yield


def _is_finite(value: Any) -> bool:
    """Whether every floating-point tensor in a module's output is."""
    flags: list[bool] = []

    def look(tensor: Tensor) -> None:
        if tensor.is_floating_point():
            flags.append(bool(tensor.isfinite().all()))

    map_tensors(value, look)
    return all(flags)
