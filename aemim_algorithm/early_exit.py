"""The attack's passes end at a layer inside the encoder: distance and gradient are those of its output.

An attack on lower layers costs the share of the encoder that it runs through, and raises the distance of the
encoder's features as well (Huang et al. 2019, arXiv 1907.10823; measured in docs/attack_cost.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from aemim_algorithm.samples import detached_copy, first_tensor

__all__ = ["EarlyExit", "layer_of"]


class EarlyExit:
    """A hook on a layer that keeps its output in a clean pass, and ends a pass of the attack there.

    Args:
        model: The model that holds the layer.
        path: Dotted path of the layer.
        encoder: The encoder, or the module that its method belongs to; ``None`` if it is no module's.

    Raises:
        ValueError: If there is no such layer in the encoder.
    """

    def __init__(self, model: nn.Module, path: str, encoder: nn.Module | None) -> None:
        self.path = path
        self.layer: nn.Module | None = layer_of(model, path, encoder)
        self._recording = self._ending = False
        self._output: Tensor | None = None
        self._hook = self.layer.register_forward_hook(self._leave)

    def require_whole(self, model: nn.Module) -> None:
        """Refuse what a pass that ends early would leave half-done.

        Args:
            model: The model as it trains, wrapped.

        Raises:
            ValueError: If FSDP shards it.
        """
        if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                f"attack_layer={self.path!r} under FSDP, whose units would not be put back after a pass that "
                "ends early: leave it out, or train with DDP"
            )

    def start(self) -> None:
        """A clean pass of the encoder begins."""
        self._recording, self._output = True, None

    def cancel(self) -> None:
        """Forget the clean pass."""
        self._recording, self._output = False, None

    def stop(self) -> Tensor:
        """The clean pass has ended.

        Returns:
            What the layer returned first, detached.

        Raises:
            ValueError: If it was not called, or returned no floating-point tensor.
        """
        output = self._output
        self.cancel()
        if output is None:
            raise ValueError(
                f"attack_layer={self.path!r} returned no floating-point tensor in the encoder's forward: "
                "expected a layer that every pass calls"
            )
        return output

    def output_of(self, encode: Callable[[], Any]) -> Tensor:
        """Call the encoder, and end the pass at the layer.

        Returns:
            The layer's output, with gradient.
        """
        self._ending = True
        try:
            encode()
        except _Reached as reached:
            return reached.output
        finally:
            self._ending = False
        raise ValueError(
            f"a pass of the attack went through attack_layer={self.path!r} without ending there: in an "
            "encoder that is compiled by itself name a whole block; a model must not catch every exception"
        )

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._hook.remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._ending:
            tensor = first_tensor(output)
            if tensor is not None:
                raise _Reached(tensor)
        if self._recording and self._output is None:
            # A copy: what follows may change it in place, which a pass that ends here never does.
            self._output = detached_copy(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyExit:
        # As the tap of a copied model, it is idle.
        copied = object.__new__(EarlyExit)
        copied.__dict__ = self.__getstate__() | {"layer": None, "_hook": None}
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_output": None, "_recording": False, "_ending": False}


def layer_of(model: nn.Module, path: str, encoder: nn.Module | None) -> nn.Module:
    """A layer inside of the encoder; arguments and errors as of :class:`EarlyExit`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    outer = model if encoder is None else encoder
    inside = set(outer.modules()) - {outer, model}
    layer = modules.get(path)
    if layer is None or layer not in inside:
        known = [name for name, module in modules.items() if module in inside and name.count(".") < 3]
        shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        raise ValueError(
            f"attack_layer={path!r}: expected the dotted path of a layer inside of the encoder, such as "
            f"{shown}"
        )
    return layer


class _Reached(Exception):  # noqa: N818 - no error
    """Carries a layer's output out of the encoder."""

    def __init__(self, output: Tensor) -> None:
        super().__init__("the pass has ended at the layer that is attacked")
        self.output = output
