"""The classifier over an encoder: what it computes, what it starts from, at which rate each layer learns."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aemim_algorithm.export import encoder_state
from aemim_algorithm.models.classifier import (
    Architecture,
    ImageClassifier,
    architecture_of,
    build_network,
    for_size,
    layer_groups,
    load_encoder,
)
from aemim_algorithm.models.mae import MAE
from aemim_algorithm.models.simmim import simmim_swin, simmim_vit

MODELS: dict[str, Any] = {
    "mae": lambda: MAE(
        image_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    ),
    "vit": lambda: simmim_vit(
        image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, layer_scale=0.1, mask_patch_size=4
    ),
    "swin": lambda: simmim_swin(
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 2),
        num_heads=(1, 2),
        mask_patch_size=4,
    ),
}


def trained(name: str) -> tuple[Any, dict[str, Tensor], Architecture]:
    """A model, its encoder as exported, and its architecture; no parameter has its initial value."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {key: value for key, value in encoder_state(model.state_dict()).items() if key != "mask_token"}
    return model.eval(), state, architecture_of(model.encoder)


def started(name: str, *, image_size: int | None = None, classes: int = 3) -> tuple[Any, Any]:
    model, state, architecture = trained(name)
    size = image_size or model.encoder.patch_embed.img_size[0]
    network = build_network(for_size(architecture, size), num_classes=classes, global_pool="avg")
    load_encoder(network, state, architecture, image_size=size, whose="it")
    return model, network.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_sees_what_the_encoder_saw(name: str) -> None:
    """Oracle: the encoder's own features, averaged over patches; a ViT's before its final norm."""
    model, network = started(name)
    if not isinstance(network, VisionTransformer):
        assert torch.equal(network.norm.weight, model.encoder.norm.weight)
    size = model.encoder.patch_embed.img_size[0]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    with torch.no_grad():
        if isinstance(network, VisionTransformer):
            model.encoder.blocks.register_forward_hook(lambda _, __, output: seen.append(output))
            model.encoder(images)
            average = seen[0][:, 1:].mean(1)
            expected = nn.functional.layer_norm(average, average.shape[-1:], eps=1e-6)
        else:
            expected = model.encoder(images)
            expected = expected.mean((1, 2)) if expected.ndim == 4 else expected.mean(1)
        got = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_starts_near_zero(name: str) -> None:
    _, network = started(name, classes=500)
    weight = network.get_classifier().weight
    assert 1e-5 < float(weight.std()) < 3e-5
    assert float(network.get_classifier().bias.abs().max()) == 0


def test_the_vits_own_norm_is_new_and_the_encoders_is_dropped() -> None:
    _, network = started("mae")
    assert isinstance(network.norm, nn.Identity)
    assert torch.equal(network.fc_norm.weight, torch.ones(24))


def test_a_vit_that_averages_after_its_norm_keeps_the_norm() -> None:
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    architecture: Architecture = {"name": "vit_medium_patch16_gap_240", "kwargs": sizes}
    state = build_network(architecture, num_classes=0, global_pool="").state_dict()
    state["norm.weight"] = torch.linspace(1, 2, 24)
    network = build_network(architecture, num_classes=3, global_pool="avg")
    load_encoder(network, state, architecture, image_size=32, whose="it")
    assert torch.equal(network.norm.weight, state["norm.weight"])


def test_positions_are_interpolated_to_another_size() -> None:
    model, network = started("mae", image_size=24)
    assert network.pos_embed.shape == (1, 37, 24)
    assert torch.equal(network.pos_embed[:, 0], model.encoder.pos_embed[:, 0])
    back = nn.functional.interpolate(
        network.pos_embed[:, 1:].detach().reshape(1, 6, 6, 24).permute(0, 3, 1, 2), size=(4, 4), mode="area"
    )
    old = model.encoder.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    correlation = torch.corrcoef(torch.stack([back.flatten(), old.detach().flatten()]))[0, 1]
    assert correlation > 0.7
    assert network(torch.randn(1, 3, 24, 24)).shape == (1, 3)


def test_an_export_at_another_size_is_taken_as_it_is() -> None:
    """The recipe beside it still says 16 pixels; its positions say 24."""
    _, state, architecture = trained("mae")
    _, larger = started("mae", image_size=24)
    state["pos_embed"] = larger.pos_embed.detach()
    network = build_network(for_size(architecture, 24), num_classes=3, global_pool="avg")
    load_encoder(network, state, architecture, image_size=24, whose="it")
    assert torch.equal(network.pos_embed, larger.pos_embed)


@pytest.mark.parametrize("broken", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_in_one_line(broken: str) -> None:
    _, state, architecture = trained("mae")
    if broken == "missing":
        del state["blocks.1.attn.qkv.weight"]
    elif broken == "extra":
        state["blocks.3.attn.qkv.weight"] = torch.zeros(1)
    else:
        state["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    network = build_network(architecture, num_classes=3, global_pool="avg")
    with pytest.raises(ValueError, match=r"the encoder x does not fit .*blocks\.\d.*expected") as caught:
        load_encoder(network, state, architecture, image_size=16, whose="the encoder x")
    assert "\n" not in str(caught.value)


def rates(network: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by its name."""
    found = {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return {name: found.pop(id(value)) for name, value in network.named_parameters()}


def histogram(found: dict[str, tuple[float, float]]) -> dict[float, int]:
    values = [round(rate, 12) for rate, _ in found.values()]
    return {rate: values.count(rate) for rate in sorted(set(values))}


def vit_layer(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("fc_norm", "head")) else 0


def test_the_rates_of_a_vits_layers_are_those_of_the_formula() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool="avg")
    groups = layer_groups(network, learning_rate=8e-3, weight_decay=0.05, layer_decay=0.65)
    found = rates(network, groups)
    for rate, count in histogram(found).items():
        print(f"{rate:.3e} {'#' * count}")
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(8e-3 * 0.65 ** (13 - vit_layer(name, 12))), name
        spared = name in ("cls_token", "pos_embed") or dict(network.named_parameters())[name].ndim == 1
        assert decay == (0.0 if spared else 0.05), name
    # 4 of the embedding, 12 in each of 12 blocks, 4 of norm and head: one rate for each of 14 layers.
    assert [*histogram(found).values()] == [4, *[12] * 12, 4]
    assert not any("lr_scale" in group for group in groups)


def test_the_rates_of_a_swins_blocks_rise_through_its_stages() -> None:
    _, network = started("swin")
    found = rates(network, layer_groups(network, learning_rate=1.0, weight_decay=0.05, layer_decay=0.5))
    layers = ["patch_embed", "layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1", "head"]
    for position, layer in enumerate(layers):
        expected = 0.5 ** (len(layers) - 1 - position)
        assert {rate for name, (rate, _) in found.items() if name.startswith(layer)} == {expected}, layer
    assert found["layers.1.downsample.reduction.weight"][0] == 0.25
    assert found["norm.weight"][0] == 0.5
    assert found["layers.0.blocks.0.attn.relative_position_bias_table"] == (0.125, 0.0)


def test_accuracies_are_those_of_the_logits() -> None:
    logits = torch.eye(7)[torch.tensor([0, 1, 2, 3, 4, 5])] + 0.1 * torch.arange(7)
    labels = torch.tensor([0, 1, 2, 6, 0, 1])  # three right; of the others, 6 is second, 0 and 1 are last
    model = ImageClassifier(nn.Identity(), num_classes=7)
    for name, expected in (("top1", 3 / 6), ("top5", 4 / 6)):
        metric = model.get_metrics(is_train=False)[name]
        for part in (slice(0, 4), slice(4, 6)):
            model.update_metric({"image": logits, "label": labels[part]}, logits[part], metric)
        assert float(metric.compute()) == pytest.approx(expected)
    assert ImageClassifier(nn.Identity(), num_classes=5).get_metrics().keys() == {"top1"}


def test_soft_and_hard_labels_give_the_same_loss() -> None:
    model = ImageClassifier(nn.Identity(), num_classes=3)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    soft = nn.functional.one_hot(labels, 3).float()
    images = torch.zeros(4, 1)
    hard_loss = model.loss(logits, {"image": images, "label": labels})
    torch.testing.assert_close(model.loss(logits, (images, soft)), hard_loss)


@pytest.mark.parametrize(
    ("name", "message"), [("resnet18", "expected a ViT or a Swin"), ("vitt", "cannot build")]
)
def test_what_is_no_vit_or_swin_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network({"name": name, "kwargs": {}})
