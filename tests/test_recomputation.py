"""Activation checkpointing changes no gradient: what is recomputed sees the adapters and buffers that the forward saw."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from composer.core import Algorithm, Event, State
from composer.models import ComposerModel
from conftest import fit, perturb, tiny_mae
from settings import Setting, every_setting
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, noop_context_fn

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.adapters import Adapter
from aemim_algorithm.recomputation import repeat_what_forward_saw
from aemim_algorithm.search import resolve_encoder


def wrap_blocks(model: nn.Module, keep: nn.Module | None = None, **options: Any) -> int:
    """Wrap what stands in a sequence and holds a normalization layer, but for the encoder."""
    wrapped = 0
    for parent in list(model.modules()):
        if not isinstance(parent, nn.Sequential | nn.ModuleList) or isinstance(parent, CheckpointWrapper):
            continue
        for name, child in list(parent.named_children()):
            inside = list(child.modules())
            holds = any(isinstance(module, Adapter) for module in inside) and len(inside) > 1
            if holds and keep not in inside and not any(isinstance(m, CheckpointWrapper) for m in inside):
                setattr(parent, name, checkpoint_wrapper(child, **options))
                wrapped += 1
    return wrapped


def gradients(model: ComposerModel, aemim: AEMIM, batch: Any) -> dict[str, Tensor]:
    """Gradients of one step, by stock names."""
    aemim.attach(model)
    torch.manual_seed(3)
    aemim.training_loss(model, batch, step=1)["total"].backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): value.grad
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def prepared(setting: Setting) -> ComposerModel:
    """The model with adapters whose copies differ."""
    model = setting.build()
    apply_adapters(model)
    perturb(model)
    return model


@every_setting
@pytest.mark.parametrize(
    "options",
    [{}, {"adversarial_ratio": 0.25, "steps": 1, "adversarial_loss": "reconstruction"}],
    ids=["l2", "reconstruction"],
)
def test_gradients_are_those_without_checkpointing(setting: Setting, options: dict[str, Any]) -> None:
    """Of every model in the table; dropout and batch statistics included."""
    make = partial(AEMIM, **setting.arguments, **options)
    expected = gradients(prepared(setting), make(), setting.batch(0))
    model = prepared(setting)
    owner, _, encoder = resolve_encoder(model, setting.encoder)
    if setting.needs_transformers:
        for module in model.children():
            module.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        wrap_blocks(model, keep=encoder if isinstance(encoder, nn.Module) else owner)
    calls = count_recomputations(model)
    got = gradients(model, make(), setting.batch(0))
    assert calls, "nothing was checkpointed"
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def count_recomputations(model: nn.Module) -> list[None]:
    """Grows whenever a block is recomputed."""
    calls: list[None] = []

    def contexts() -> tuple[Any, Any]:
        forward, recomputation = noop_context_fn()
        calls.append(None)
        return forward, recomputation

    for module in model.modules():
        for attribute in ("checkpoint_fn", "_gradient_checkpointing_func"):
            if isinstance(function := getattr(module, attribute, None), partial):
                setattr(module, attribute, partial(function, context_fn=contexts))
    return calls


def test_running_statistics_of_the_clean_branch_see_clean_images_only() -> None:
    """A recomputation in backward would update them with adversarial ones where there are no copies."""

    class Normed(nn.Module):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.stem, self.block = nn.Conv2d(3, 3, 1), checkpoint_wrapper(block) if wrap else block

        def forward(self, images: Tensor) -> Tensor:
            return self.block(self.stem(images))

    class Model(ComposerModel):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = Normed(wrap)
            self.token = nn.Parameter(torch.zeros(1))

        def forward(self, batch: Any) -> Tensor:
            return self.encoder(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return (outputs.mean(1, keepdim=True) - batch[0]).square().mean()

    batch = (torch.rand(4, 3, 8, 8),)
    statistics = []
    for loss_ratio in (0.5, 1.0):
        model = Model(wrap=True)
        aemim = AEMIM(adapter="none", loss_ratio=loss_ratio)
        gradients(model, aemim, batch)
        statistics.append(model.encoder.block[1].running_mean.clone())
    plain = Model(wrap=True)
    plain.loss(plain(batch), batch).backward()
    expected = plain.encoder.block[1].running_mean
    assert [mean.tolist() for mean in statistics] == [expected.tolist()] * 2


def test_blocks_that_composer_wraps_after_init_are_served() -> None:
    """As its FSDP does."""

    class Wrap(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event == Event.FIT_START

        def apply(self, event: Event, state: State, logger: Any) -> None:
            assert wrap_blocks(state.model) == 3

    models = []
    for others in ((), (Wrap(),)):
        model = tiny_mae()
        apply_adapters(model)
        perturb(model)
        fit(model, AEMIM(), *others)
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, msg=name)


def test_twice_is_once() -> None:
    model = tiny_mae()
    apply_adapters(model)
    count = wrap_blocks(model)
    assert repeat_what_forward_saw(model, model.encoder) == count
    functions = [m.checkpoint_fn for m in model.modules() if isinstance(m, CheckpointWrapper)]
    assert repeat_what_forward_saw(model, model.encoder) == count
    assert functions == [m.checkpoint_fn for m in model.modules() if isinstance(m, CheckpointWrapper)]


def timm_flag(model: ComposerModel) -> None:
    model.encoder.set_grad_checkpointing(True)


def reentrant(model: ComposerModel) -> None:
    model.decoder.blocks[0] = checkpoint_wrapper(
        model.decoder.blocks[0], checkpoint_impl=CheckpointImpl.REENTRANT
    )


def own_function(model: ComposerModel) -> None:
    def halve(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    model.decoder.blocks[0] = checkpoint_wrapper(model.decoder.blocks[0], checkpoint_fn=halve)


def whole_encoder(model: ComposerModel) -> None:
    model.encoder = checkpoint_wrapper(model.encoder)


def unknown_flag(model: ComposerModel) -> None:
    model.decoder.gradient_checkpointing = True


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (timm_flag, "'encoder' uses timm's own activation checkpointing.*set_grad_checkpointing.False."),
        (reentrant, "'decoder.blocks.0' is checkpointed with reentrance.*NO_REENTRANT"),
        (own_function, "'decoder.blocks.0' is checkpointed by 'halve'.*leave out checkpoint_fn"),
        (whole_encoder, "'encoder' checkpoints the encoder as a whole.*blocks instead"),
        (unknown_flag, "'decoder' sets gradient_checkpointing.*turn it off"),
    ],
)
def test_what_cannot_be_right_is_refused(change: Callable[[ComposerModel], None], said: str) -> None:
    model = tiny_mae()
    change(model)
    with pytest.raises(ValueError, match=said) as error:
        AEMIM(encoder="encoder").attach(model)
    assert "\n" not in str(error.value)


def test_recomputation_inside_compiled_code_is_refused() -> None:
    model = tiny_mae()
    apply_adapters(model)
    wrap_blocks(model)
    with pytest.raises(ValueError, match="activation checkpointing in a compiled model.*leave out"):
        fit(model, AEMIM(), compile_config={"backend": "eager"})
