"""The tap on the encoder: what it records, what it swaps, and what it refuses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from conftest import tiny_mae
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from aemim_algorithm.injection import EncoderTap, feature_dim
from aemim_algorithm.samples import first_tensor


class Monolith(nn.Module):
    """A model whose encoder is a method, as in the original MAE code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward_encoder(self, images: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return self.layer(images * scale).flatten(2), "extra"

    def forward(self, images: Tensor) -> Tensor:
        latent, _ = self.forward_encoder(images, scale=2.0)
        return latent + images.mean()


def test_records_arguments_features_and_generators(images: Tensor) -> None:
    model = tiny_mae()
    tap = EncoderTap(model, "encoder")
    tap.start()
    outputs = model((images, None))
    call = tap.stop()
    assert call.slot == 0
    assert torch.equal(call.images, images)
    assert call.deterministic
    assert not call.features.requires_grad
    visible = call.args[1]
    assert torch.equal(call.features, model.encoder(images, visible))
    assert not outputs["mask"].gather(1, visible).any()


def test_encode_repeats_the_call_with_other_images_and_the_same_randomness(images: Tensor) -> None:
    model = tiny_mae()
    model.encoder.pos_drop.p = 0.0
    model.encoder.blocks[0].mlp.drop1.p = 0.5  # dropout inside the encoder must replay
    model.encoder.train()
    tap = EncoderTap(model, "encoder")
    tap.start()
    model(images)
    call = tap.stop()
    assert not call.deterministic
    assert torch.equal(tap.encode(call, images), call.features)
    assert not torch.equal(tap.encode(call, images + 0.1), call.features)


def test_injects_at_the_encoder_while_the_model_sees_its_own_batch(images: Tensor) -> None:
    model = Monolith()
    tap = EncoderTap(model, "forward_encoder")
    tap.start()
    clean = model(images)
    call = tap.stop()
    other = images + 1
    with tap.inject(other, call.rng) as features:
        injected = model(images)
        seen = features()
    assert torch.allclose(seen, model.layer(other * 2).flatten(2))
    assert torch.allclose(injected, seen + images.mean())
    assert torch.equal(model(images), clean)  # idle again


@pytest.mark.parametrize("path", ["encoder", "encoder.forward_features"])
def test_a_module_and_a_method_can_be_tapped(images: Tensor, path: str) -> None:
    model = nn.Module()
    model.encoder = tiny_mae().encoder  # type: ignore[assignment]
    tap = EncoderTap(model, path)
    tap.start()
    target = model.get_submodule("encoder")
    output = target(images) if path == "encoder" else target.forward_features(images)  # type: ignore[operator]
    assert torch.equal(tap.stop().features, output)


def test_a_copied_model_has_an_idle_tap_of_its_own(images: Tensor) -> None:
    for model, path in ((tiny_mae(), "encoder"), (Monolith(), "forward_encoder")):
        tap = EncoderTap(model, path)
        tap.start()
        model(images)
        twin = copy.deepcopy(model)
        twin(images + 1)
        assert torch.equal(tap.stop().images, images)


def test_first_tensor_of_outputs() -> None:
    features = torch.zeros(2, 3)
    integers = torch.zeros(2, dtype=torch.int64)
    for output in (features, (integers, features), OrderedDict(a=None, b=features), [[features], None]):
        assert first_tensor(output) is features
    assert first_tensor(("text", integers)) is None
    assert first_tensor(None) is None


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any) -> Any:
        return self.value


def test_an_encoder_without_features_or_image_is_named(images: Tensor) -> None:
    model = nn.ModuleDict({"encoder": Returns("text")})
    tap = EncoderTap(model, "encoder")
    tap.start()
    with pytest.raises(ValueError, match="encoder 'encoder' returned str, which holds no"):
        model["encoder"](images)
    with pytest.raises(ValueError, match=r"received no image, only \(Tensor, int\)"):
        tap.start()
        model["encoder"](torch.zeros(2, 3), 1)
    tap.start()
    with pytest.raises(ValueError, match="was not called with an image"):
        tap.stop()


def test_the_dimension_of_the_features() -> None:
    """Tokens carry them last, maps second, unless timm or the width of the norms says otherwise."""
    swin = SwinTransformer(
        img_size=32, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=0
    )
    output = swin.forward_features(torch.zeros(1, 3, 32, 32))
    assert output.shape == (1, 4, 4, 24)
    assert feature_dim(swin, output) == -1
    assert feature_dim(nn.Sequential(swin), output) == -1  # by the width of its norms
    assert feature_dim(nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2d(8)), torch.zeros(1, 8, 4, 4)) == 1
    assert feature_dim(nn.Conv2d(3, 8, 1), torch.zeros(1, 8, 4, 4)) == 1
    assert feature_dim(nn.Linear(1, 1), torch.zeros(1, 5, 7)) == -1


@pytest.mark.parametrize("times", [1, 2])
def test_a_method_answers_for_its_owner(times: int, images: Tensor) -> None:
    """Its maps are those of its module, and so are its batch statistics; however often it was tapped."""
    swin = SwinTransformer(
        img_size=16, window_size=2, patch_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    )
    swin.bn = nn.BatchNorm2d(1)
    model = nn.ModuleDict({"net": swin})
    taps = [EncoderTap(model, "net.forward_features") for _ in range(times)]
    for tap in taps:
        tap.start()
        swin(images)
        assert tap.stop().feature_dim == -1
        assert tap.sees_the_batch()
    swin.eval()
    assert not taps[-1].sees_the_batch()
