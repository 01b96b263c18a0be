"""Finding the encoder of a model."""

from __future__ import annotations

import pytest
from conftest import tiny_mae
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.search import find_encoder, resolve_encoder


class Model(nn.Module):
    """Submodules by name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def conv(channels: int = 3) -> nn.Module:
    return nn.Conv2d(channels, 4, 3)


def network(channels: int = 3) -> nn.Module:
    return nn.Sequential(conv(channels), nn.Linear(4, 4))


def test_finds_the_encoder_in_wrappers_and_by_prefix() -> None:
    assert find_encoder(tiny_mae()) == "encoder"
    wrapper = nn.Module()
    wrapper.model = tiny_mae()  # type: ignore[assignment]
    assert find_encoder(wrapper) == "model.encoder"
    prefixed = nn.Module()
    prefixed.base_model_prefix = "vit"  # type: ignore[assignment]
    prefixed.vit = nn.Linear(1, 1)  # type: ignore[assignment]
    wrapper.model = prefixed  # type: ignore[assignment]
    assert find_encoder(wrapper) == "model.vit"


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Model(backbone=network(), head=nn.Linear(4, 2)), "backbone"),
        (Model(model=Model(trunk=network(), decoder=conv(4))), "model.trunk"),
        (Model(wrapped=Model(model=Model(trunk=network(), decoder=conv(4)))), "wrapped.model.trunk"),
        (Model(student=network(), teacher=network().requires_grad_(False), head=nn.Linear(4, 2)), "student"),
        (Model(video=nn.Sequential(nn.Conv3d(3, 4, 2), nn.Linear(4, 4)), head=nn.Linear(4, 2)), "video"),
    ],
)
def test_finds_the_one_submodule_that_images_can_enter(model: nn.Module, path: str) -> None:
    assert find_encoder(model) == path


def test_a_frozen_teacher_is_no_encoder_whatever_its_name() -> None:
    teacher = network().requires_grad_(False)
    assert find_encoder(Model(encoder=teacher, student=network(), head=nn.Linear(4, 2))) == "student"


def test_a_frozen_stem_belongs_to_its_trainable_encoder() -> None:
    """As MoCo v3 freezes the patch embedding; a convolution that polishes the output receives images, too."""
    backbone = network()
    backbone[0].requires_grad_(False)
    assert find_encoder(Model(backbone=backbone, decoder=nn.Linear(4, 2))) == "backbone"
    with pytest.raises(ValueError, match="images can enter several submodules"):
        find_encoder(Model(backbone=backbone, decoder=nn.Linear(4, 2), refine=conv()))


@pytest.mark.parametrize("name", ["stem", "patch_embed", "embeddings"])
def test_a_stem_of_several_layers_is_no_encoder(name: str) -> None:
    model = Model(**{name: nn.Sequential(conv(), conv(4))}, blocks=nn.Linear(4, 4), head=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=f"images enter at '{name}', which embeds patches only"):
        find_encoder(model)
    inside = Model(net=model)
    with pytest.raises(ValueError, match=f"images enter at 'net.{name}', which embeds patches only"):
        find_encoder(inside)


@pytest.mark.parametrize("name", ["encoder", "backbone"])
def test_timms_models_are_tapped_at_forward_features(name: str) -> None:
    """Their forward calls it, and many a model calls it directly."""
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    model = Model(**{name: vit}, head=nn.Linear(8, 2))
    assert find_encoder(model) == f"{name}.forward_features"
    apply_adapters(model, "both")
    assert find_encoder(model) == f"{name}.forward_features"


def test_tokens_beside_the_encoder_make_it_no_mere_wrapper() -> None:
    model = Model(outer=Model(backbone=network()))
    model.outer.register_parameter("mask_token", nn.Parameter(nn.Linear(1, 1).weight.detach()))
    assert find_encoder(model) == "outer.backbone"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(stem=conv(), head=nn.Linear(4, 2)), "images enter at 'stem', which embeds patches only"),
        (Model(one=network(), two=network()), r"can enter several submodules \(one, two\)"),
        (Model(net=nn.Linear(3, 4)), "no convolution takes images of 3 channels"),
        (Model(net=network(1), head=nn.Linear(4, 2)), "no convolution takes images of 3 channels"),
        (Model(net=conv()), "images enter at 'net', which is no encoder but a single layer"),
    ],
)
def test_a_model_without_encoder_is_told_what_was_searched(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=f"found no encoder in .*{reason}; pass AEMIM.encoder=") as error:
        find_encoder(model)
    assert "\n" not in str(error.value)


def test_grey_images_enter_elsewhere() -> None:
    assert find_encoder(Model(net=network(1), head=nn.Linear(4, 2)), channels=1) == "net"


def test_a_path_that_names_nothing_gets_candidates() -> None:
    class Monolith(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.blocks = conv(), nn.Linear(4, 4)

        def forward_encoder(self) -> None: ...

    with pytest.raises(ValueError, match=r"candidates: model.forward_encoder, model, model.patch_embed"):
        find_encoder(Model(model=Monolith()))
    with pytest.raises(ValueError, match="encoder='model.blocks.forwards' names nothing in Model: pass"):
        resolve_encoder(Model(model=Monolith()), "model.blocks.forwards")
    assert resolve_encoder(Model(model=Monolith()), "model.forward_encoder")[1] == "forward_encoder"
