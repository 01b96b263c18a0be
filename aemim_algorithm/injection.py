"""The injection point: the one module of a model that receives the image.

In the clean pass an :class:`EncoderTap` records how the encoder was called and what it returned. In the
adversarial pass it swaps the image for the adversarial one on its way in, while the model around it
still sees the clean batch. So every target that the model computes from its own input stays clean
(Eq. 5), without one line of model-specific code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from aemim_algorithm.early_exit import EarlyExit
from aemim_algorithm.randomness import RngState
from aemim_algorithm.samples import detached_copy, first_tensor, map_tensors, take_samples
from aemim_algorithm.search import candidates, resolve_encoder
from aemim_algorithm.sharding import gathering, keep_images_exact, make_fsdp_unit

__all__ = ["EncoderCall", "EncoderTap", "feature_dim"]


@dataclass(frozen=True)
class EncoderCall:
    """One recorded call of the encoder.

    Attributes:
        args: Positional arguments, tensors detached.
        kwargs: Keyword arguments, tensors detached.
        slot: Which of them is the image: an index into ``args`` or a key of ``kwargs``.
        rng: The global generators as the encoder found them.
        features: What it returned, detached: the stop-gradient reference of Eq. 7.
        feature_dim: Which dimension of them holds a token's features.
        reference: What the attack compares with: the features, or the output of the layer that it ends at.
        reference_dim: Which dimension of it holds a token's features.
        deterministic: Whether the encoder drew nothing from the global generators.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str
    rng: RngState
    features: Tensor
    feature_dim: int
    reference: Tensor
    reference_dim: int
    deterministic: bool

    @property
    def images(self) -> Tensor:
        """The images that the encoder received, shape (batch, ...)."""
        return self.args[self.slot] if isinstance(self.slot, int) else self.kwargs[self.slot]

    def take(self, index: Tensor) -> EncoderCall:
        """The same call for some samples of the batch only."""
        size = self.images.shape[0]
        args, kwargs = take_samples((self.args, self.kwargs), index, size)
        features, reference = take_samples((self.features, self.reference), index, size)
        return replace(self, args=args, kwargs=kwargs, features=features, reference=reference)


class EncoderTap:
    """Records an encoder's calls, injects images into them, and calls it with recorded arguments.

    Idle unless inside :meth:`inject`, or between :meth:`start` and :meth:`stop`.

    Args:
        model: The model that holds the encoder.
        path: Dotted path of a submodule or of a method, as :func:`find_encoder` returns it.
        layer: Dotted path of a layer inside of it at which the attack's passes end; ``None`` for its end.

    Raises:
        ValueError: If there is no such submodule, method or layer.
    """

    def __init__(self, model: nn.Module, path: str, layer: str | None = None) -> None:
        self.path = path
        owner, name, self._encoder = resolve_encoder(model, path)
        # A method answers for its module.
        self.module: nn.Module | None = self._encoder if isinstance(self._encoder, nn.Module) else owner
        self._exit = None if layer is None else EarlyExit(model, layer, self.module)
        self._gathering_encoder = self._encoder  # what the attack calls
        make_fsdp_unit(model, self.module)
        self._hook: RemovableHandle | None = None
        self._hint = candidates(model)
        self._recording, self._calls = False, 0
        self._injected: tuple[Tensor, RngState] | None = None
        self._features: Tensor | None = None
        self._entered: tuple[tuple[Any, ...], dict[str, Any], int | str, RngState] | None = None
        self._call: EncoderCall | None = None
        if isinstance(self._encoder, nn.Module):
            self._enter_first(self._encoder)
            self._encoder.register_forward_hook(self._leave)
        else:
            setattr(owner, name, functools.partial(self._call_method, self._encoder))

    def prepare_sharded(self, model: nn.Module) -> None:
        """Let the encoder find its parameters gathered and its images exact where FSDP has the model.

        Args:
            model: The model as it trains, its parts wrapped by FSDP; without DDP's wrapper.

        Raises:
            ValueError: If FSDP1 has sharded it, and the encoder is a method; if FSDP has, and the attack ends
                at a layer.
        """
        if self._exit is not None:
            self._exit.require_whole(model)
        if self.module is None:
            return
        is_method = not isinstance(self._encoder, nn.Module)
        keep_images_exact(model, self.module, also_inside=is_method)
        if is_method:
            self._gathering_encoder = gathering(model, self.module, self._encoder)
        elif isinstance(self.module, FSDPModule):
            self._enter_first(self._encoder)  # before FSDP casts the images
        else:
            self._gathering_encoder = resolve_encoder(model, self.path)[2]  # FSDP1's wrapper, if it is there

    def _enter_first(self, encoder: nn.Module) -> None:
        """First in, last out: other hooks on the encoder see what it really gets and gives."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = encoder.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)

    def start(self) -> None:
        """Record the next call, until :meth:`stop`; forgets what was recorded before."""
        self._recording, self._call, self._entered, self._injected = True, None, None, None
        self._calls = 0

    def stop(self) -> EncoderCall:
        """Stop recording.

        Returns:
            The call that was recorded.

        Raises:
            ValueError: If the encoder was not called with an image, or more than once: then it is not
                known which of its inputs is the one to attack, and which makes a target.
        """
        call, calls = self._call, self._calls
        self.cancel()
        if call is None:
            raise ValueError(
                f"the encoder {self.path!r} was not called with an image during the forward pass: pass "
                f"AEMIM(encoder=...) the dotted path of the module or method that is; {self._hint}"
            )
        if calls > 1:
            raise ValueError(
                f"the encoder {self.path!r} was called {calls} times in one forward pass: AEMIM attacks one "
                "view and needs a clean target; give the target an encoder of its own"
            )
        return call

    @property
    def batch_size(self) -> int | None:
        """Number of images of the call that was recorded, if one was."""
        return None if self._call is None else self._call.images.shape[0]

    def cancel(self) -> None:
        """Stop recording and forget what was recorded."""
        self._recording, self._call, self._entered = False, None, None
        if self._exit is not None:
            self._exit.cancel()

    @property
    def ends_early(self) -> bool:
        """Whether the attack's passes end before the encoder's end."""
        return self._exit is not None

    def sees_the_batch(self) -> bool:
        """Whether features depend on the other samples: batch normalization, in training mode."""
        modules = self.module.modules() if self.module is not None else ()
        return any(module.training for module in modules if isinstance(module, _BatchNorm))

    @contextmanager
    def inject(self, images: Tensor, rng: RngState) -> Iterator[Callable[[], Tensor]]:
        """Give the encoder's next call inside the block these images instead of its own.

        Args:
            images: What replaces the image.
            rng: The generators that the encoder shall find.

        Yields:
            A function that returns the features of that call, detached.
        """
        self._injected, self._features = (images, rng), None
        try:
            yield self._take_features
        finally:
            self._injected = self._features = None

    def _take_features(self) -> Tensor:
        assert self._features is not None, "the injected pass did not reach the encoder"
        return self._features

    def encode(self, call: EncoderCall, images: Tensor) -> Tensor:
        """Call the encoder as it was called before, randomness included, with other images.

        Returns:
            What belongs beside the call's ``reference``.
        """
        call.rng.restore()
        args, kwargs = _replace_image(call.args, call.kwargs, call.slot, images)
        if self._exit is not None:
            return self._exit.output_of(functools.partial(self._gathering_encoder, *args, **kwargs))
        features = first_tensor(self._gathering_encoder(*args, **kwargs))
        assert features is not None  # the recorded call has returned some
        return features

    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._injected is not None and self._features is None:
            images, rng = self._injected
            rng.restore()
            return _replace_image(args, kwargs, self._slot(args, kwargs), images)
        if self._recording and self._entered is None:
            self._calls += 1
        if self._recording and self._call is None and self._entered is None:
            slot = self._slot(args, kwargs)
            args, kwargs = map_tensors((args, kwargs), Tensor.detach)
            self._entered = (args, kwargs, slot, RngState.capture())
            if self._exit is not None:
                self._exit.start()
        return None

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if self._injected is not None and self._features is None:
            self._features = detached_copy(output)
        if not self._recording or self._entered is None:
            return
        (args, kwargs, slot, rng), self._entered = self._entered, None
        features = detached_copy(output)  # the model may go on to change them in place
        if features is None:
            raise ValueError(
                f"the encoder {self.path!r} returned {type(output).__name__}, which holds no "
                "floating-point tensor: pass AEMIM(encoder=...) a module that returns features"
            )
        unchanged = rng == RngState.capture()
        dim = feature_dim(self.module, features)
        reference, reference_dim = features, dim
        if self._exit is not None:
            reference = self._exit.stop()
            reference_dim = feature_dim(self.module, reference)
        self._call = EncoderCall(
            args, kwargs, slot, rng, features, dim, reference, reference_dim, deterministic=unchanged
        )

    def _call_method(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._enter(None, args, kwargs) or (args, kwargs)
        output = method(*args, **kwargs)
        self._leave(None, args, output)
        return output

    def _slot(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
        slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for slot, value in slots:
            if isinstance(value, Tensor) and value.ndim >= 4 and value.is_floating_point():
                return slot
        kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
        raise ValueError(
            f"the encoder {self.path!r} received no image, only ({', '.join(kinds)}): expected a "
            "floating-point tensor of shape (batch, channels, height, width) among its arguments; "
            f"pass AEMIM(encoder=...) the module or method that receives it; {self._hint}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderTap:
        # A copied model (EMA, SWA) must not inject or record; its hooks point to an idle tap.
        copied = object.__new__(EncoderTap)
        parts = ("_encoder", "_gathering_encoder", "_hook", "module")
        copied.__dict__ = self.__getstate__() | dict.fromkeys(parts)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_injected", "_features", "_entered", "_call")
        return self.__dict__ | dict.fromkeys(passing) | {"_recording": False}


def feature_dim(encoder: object, features: Tensor) -> int:
    """Which dimension of an encoder's output holds the features of a token.

    The last one of token sequences, the second of maps, unless the encoder says that its maps carry
    channels last (timm's ``output_fmt``) or its normalization layers are as wide as the last
    dimension and not as the second.
    """
    if features.ndim < 4:
        return -1
    declared = getattr(encoder, "output_fmt", None)
    if declared is not None:
        return -1 if str(getattr(declared, "value", declared)) == "NHWC" else 1
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    widths = {m.normalized_shape[-1] for m in modules if isinstance(m, nn.LayerNorm)}
    return -1 if features.shape[-1] in widths and features.shape[1] not in widths else 1


def _replace_image(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str, images: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(slot, int):
        return (*args[:slot], images, *args[slot + 1 :]), kwargs
    return args, kwargs | {slot: images}
