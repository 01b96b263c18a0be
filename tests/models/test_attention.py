"""Our attention against timm's: values, gradients, rounding, and who computes what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_mae
from test_export import small_simmim
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm.models.attention import Attention, TailBlock, use_our_attention
from aemim_algorithm.models.classifier import build_network

TOKENS, DIM, HEADS = 21, 24, 3


def pair(**options: Any) -> tuple[TimmAttention, Attention]:
    """timm's layer, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = TimmAttention(DIM, num_heads=HEADS, **({"qkv_bias": True} | options))
    ours = nn.Sequential(copy.deepcopy(theirs))
    assert use_our_attention(ours) == 1
    assert isinstance(ours[0], Attention)
    return theirs, ours[0]


def tokens(count: int = TOKENS, dim: int = DIM, **options: Any) -> Tensor:
    return torch.randn(4, count, dim, generator=torch.Generator().manual_seed(1)).to(**options)


def results(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients of a sum with fixed weights, at the input and at every parameter."""
    x = x.clone().requires_grad_()
    out = module(x, **options)
    weight = torch.randn(4, TOKENS, out.shape[-1], generator=torch.Generator().manual_seed(2)).to(x.dtype)
    leaves = {"input": x} | dict(module.named_parameters())
    found = torch.autograd.grad((out * weight[:, -out.shape[1] :]).sum(), list(leaves.values()))
    return {"output": out.detach()} | dict(zip(leaves, found, strict=True))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_values_and_gradients_are_timms(fused: bool, qkv_bias: bool) -> None:
    theirs, ours = (module.double() for module in pair(qkv_bias=qkv_bias))
    ours.fused_attn = fused
    assert_close(results(ours, tokens().double()), results(theirs, tokens().double()))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("gain", [2, 4])
def test_bfloat16_rounds_about_as_the_fused_kernel(heads: int, gain: float) -> None:
    """Where scores have a deviation of about 1, and of about 5."""
    theirs, ours = pair()
    for module in (theirs, ours):
        module.num_heads, module.head_dim, module.scale = heads, DIM // heads, (DIM // heads) ** -0.5
        with torch.no_grad():
            module.qkv.weight[: 2 * DIM] *= gain
    exact = results(copy.deepcopy(theirs).double(), tokens().double())
    with torch.autocast("cpu", torch.bfloat16):
        fused, explicit = results(theirs, tokens()), results(ours, tokens())
    for name, value in exact.items():
        errors = [float((found[name] - value).norm() / value.norm()) for found in (explicit, fused)]
        assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.parametrize("count", [1, 8, TOKENS])
@pytest.mark.parametrize(("fused", "dtype"), [(True, "double"), (False, "double"), (True, "bfloat16")])
def test_the_last_tokens_are_those_of_all(count: int, fused: bool, dtype: str) -> None:
    _, ours = pair()
    ours.fused_attn = fused
    kind = getattr(torch, dtype)
    ours.to(kind)
    whole = ours(tokens(dtype=kind))[:, -count:]
    rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == "bfloat16" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours(tokens(dtype=kind), last=count), whole, **rounding)
    if dtype == "double":
        block = TailBlock(DIM, HEADS, qkv_bias=True, init_values=0.1).double()
        some = results(Called(block, lambda x: block(x, last=count)), tokens().double())
        cut = results(Called(block, lambda x: block(x)[:, -count:]), tokens().double())
        assert_close(some, cut)


class Called(nn.Module):
    """A module that is called in another way."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        ({}, {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()}),
        ({"attn_drop": 0.5}, {}),
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, {}),
        ({"scale_norm": True, "norm_layer": nn.LayerNorm}, {}),
        ({"proj_drop": 0.5}, {}),
    ],
    ids=["mask", "dropout", "normalised keys", "normalised values", "dropout of the result"],
)
def test_what_our_models_do_not_use_is_as_in_timm(layer: dict[str, Any], call: dict[str, Any]) -> None:
    theirs, ours = pair(**layer)
    torch.manual_seed(3)
    expected = theirs(tokens(), **call)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(tokens(), **call), expected)
    if not layer.get("proj_drop"):  # which draws as many numbers as there are tokens
        torch.manual_seed(3)
        torch.testing.assert_close(ours(tokens(), last=5, **call), expected[:, -5:])


@pytest.mark.parametrize(
    ("device", "dtype", "fused", "calls"),
    [
        ("cpu", torch.bfloat16, True, 0),
        ("cpu", torch.float32, True, 1),
        ("cpu", torch.float32, False, 0),
        ("meta", torch.bfloat16, True, 1),  # in the place of any device but the CPU
        ("meta", torch.bfloat16, False, 0),
    ],
)
def test_the_fused_kernel_runs_where_it_is_fast(
    device: str, dtype: torch.dtype, fused: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, seen = F.scaled_dot_product_attention, []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(None)
        return kernel(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    _, ours = pair()
    ours.fused_attn = fused
    ours.to(device, dtype)
    ours(tokens(device=device, dtype=dtype))
    ours(tokens(device=device, dtype=dtype), last=3)
    assert len(seen) == 2 * calls


def test_our_vits_have_it_and_others_keep_theirs() -> None:
    classifier = build_network({"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32}})
    for model in (tiny_mae(), small_simmim("vit"), classifier):
        layers = [module for module in model.modules() if isinstance(module, TimmAttention)]
        assert layers
        assert all(type(layer) is Attention for layer in layers)
        assert use_our_attention(model) == 0  # twice is once

    class Special(TimmAttention):
        """A layer that computes something else."""

    others = nn.ModuleList([small_simmim("swin"), Special(DIM)])
    assert use_our_attention(others) == 0


def test_state_dicts_keep_their_names() -> None:
    ours, theirs = (kind(DIM, HEADS, qkv_bias=True) for kind in (TailBlock, Block))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(copy.deepcopy(ours)(x), theirs(x))


def test_a_projection_with_weights_of_its_own_is_called() -> None:
    """As low-rank adapters and Composer's Factorize put in its place, whose `weight` is not all."""

    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    block = TailBlock(16, 2, qkv_bias=True).double()
    block.attn.qkv = Shifted(16, 48).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x, last=3), block(x)[:, -3:], rtol=1e-12, atol=1e-12)
    called: list[Tensor] = []
    block.attn.qkv = nn.Linear(16, 48).double()
    block.attn.qkv.register_forward_hook(lambda *given: called.append(given[-1]))
    block(x, last=3)
    assert len(called) == 1
