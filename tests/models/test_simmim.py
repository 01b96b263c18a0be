"""SimMIM: its mask, its loss against NumPy and against transformers' Swin, and the published sizes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from transformers import SwinConfig, SwinForMaskedImageModeling

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_mode, adversarial_parameters
from aemim_algorithm.callbacks.pictures import draw_pictures
from aemim_algorithm.models import MODELS, SimMIM
from aemim_algorithm.models.masking import random_mask
from aemim_algorithm.models.simmim import simmim_swin, simmim_vit

VIT = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
}
KINDS = ["vit", "swin"]


def build(kind: str, **overrides: Any) -> SimMIM:
    """SimMIM of two small stages or one block on 16×16 images, in mask patches of 8×8."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"mask_patch_size": 8} | (VIT if kind == "vit" else SWIN) | overrides
    return simmim_vit(**options) if kind == "vit" else simmim_swin(**options)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def pixels(mask: Tensor) -> Tensor:
    """A mask of 2×2 patches at every pixel of 16×16, shape (batch, 3, 16, 16)."""
    grid = mask.view(-1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return grid.expand(-1, 3, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels(kind: str, images: Tensor) -> None:
    model = build(kind)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    outputs = model((images, torch.zeros(4)), mask)
    prediction, target = (value.detach().double().numpy() for value in (outputs["prediction"], images))
    hidden = pixels(mask).numpy()
    expected = np.abs(prediction - target)[hidden].mean()
    assert model.loss(outputs, (images, None)).item() == pytest.approx(expected, rel=1e-6)
    assert 0 < hidden.mean() < 1
    assert model.loss(model(images, torch.zeros_like(mask)), images).item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_taken_in_float32(kind: str, images: Tensor) -> None:
    model = build(kind)
    outputs = model(images)
    rounded = outputs | {"prediction": outputs["prediction"].bfloat16()}
    loss = model.loss(rounded, images)
    assert loss.dtype == torch.float32
    widened = rounded | {"prediction": rounded["prediction"].float()}
    assert torch.equal(loss, model.loss(widened, images))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_hidden_pixels(kind: str, images: Tensor) -> None:
    model = build(kind).eval()
    outputs = model(images)
    mask = outputs["mask"]
    other = torch.where(pixels(mask), torch.randn_like(images), images)
    assert torch.equal(model(other, mask)["prediction"], outputs["prediction"])
    assert not torch.equal(model(images, mask.roll(1, 1))["prediction"], outputs["prediction"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_feature_predicts_the_pixels_that_it_covers(kind: str, images: Tensor) -> None:
    """A head of one 1×1 convolution, in loops."""
    model = build(kind).eval()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    features = model.encoder(images, torch.zeros(4, 16, dtype=torch.bool))[:, -16:]
    predicted = model(images, mask)["prediction"]
    weight, bias = model.decoder.weight, model.decoder.bias
    for row, column in ((0, 0), (1, 3), (3, 2)):
        patch = (features[:, 4 * row + column] @ weight.T + bias).view(4, 3, 4, 4)
        found = predicted[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.allclose(found, patch, atol=1e-6)


def test_a_hidden_patch_hides_all_patches_of_the_vit_in_it(images: Tensor) -> None:
    model = build("vit")
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    mask = model(images)["mask"]
    blocks = seen[0].view(4, 2, 2, 2, 2)  # sample, block row, row in it, block column, column in it
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(blocks[:, :, row, :, column], mask.view(4, 2, 2))


@pytest.mark.parametrize(("name", "hidden", "of"), [
    ("simmim_vit_base_patch16", 30, 49), ("simmim_swin_base_patch4_window6", 22, 36),
    ("simmim_vit_tiny_patch4", 10, 16), ("simmim_swin_tiny_patch2_window4", 10, 16),
])  # fmt: skip
def test_masks_hide_six_tenths_rounded_up(name: str, hidden: int, of: int) -> None:
    with torch.device("meta"):
        model: Any = MODELS[name]()
    assert model.num_patches == of
    size = model.mask_patch_size * model.mask_grid[0]
    mask = model.to("meta")(torch.empty(2, 3, size, size, device="meta"))["mask"]
    assert mask.shape == (2, of)
    drawn = random_mask(50, of, model.mask_ratio, seeds=torch.arange(50))
    assert drawn.sum(1).unique().tolist() == [hidden]
    assert drawn.any(0).all()


def test_named_sizes_are_the_published_ones() -> None:
    """timm's own ViT-B/16 and Swin-B, without a classifier, and a mask token."""
    swin_options = {"img_size": 192, "window_size": 6, "num_classes": 0}
    with torch.device("meta"):
        vit: Any = MODELS["simmim_vit_base_patch16"]()
        swin: Any = MODELS["simmim_swin_base_patch4_window6"]()
        stock_vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        stock_swin = timm.create_model("swin_base_patch4_window7_224", **swin_options)
    for model, stock in ((vit, stock_vit), (swin, stock_swin)):
        shapes = {name: value.shape for name, value in model.encoder.state_dict().items()}
        del shapes["mask_token"]
        assert shapes == {name: value.shape for name, value in stock.state_dict().items()}
    assert vit.decoder.weight.shape == (3 * 16**2, 768)
    assert swin.decoder.weight.shape == (3 * 32**2, 1024)
    assert swin.mask_patch_size == vit.mask_patch_size == 32


def huggingface_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a SimMIM on Swin under the names of transformers' SwinForMaskedImageModeling."""
    renamed: dict[str, Tensor] = {}
    rules: list[tuple[str, Any]] = [
        (r"^encoder\.mask_token", "swin.embeddings.mask_token"),
        (r"^encoder\.patch_embed\.proj", "swin.embeddings.patch_embeddings.projection"),
        (r"^encoder\.patch_embed\.norm", "swin.embeddings.norm"),
        (r"^encoder\.norm", "swin.layernorm"),
        # timm merges patches on the way into a stage, transformers on the way out.
        (r"^encoder\.layers\.(\d)\.downsample", lambda m: f"swin.encoder.layers.{int(m[1]) - 1}.downsample"),
        (r"^encoder\.layers", "swin.encoder.layers"),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"attn\.proj", "attention.output.dense"),
        (r"attn\.relative", "attention.self.relative"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"^decoder", "decoder.0"),
    ]
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.self.{part}")] = piece
        else:
            renamed[name] = value[:, :, None, None] if name == "decoder.0.weight" else value
    return renamed


def test_swin_agrees_with_transformers(images: Tensor) -> None:
    model = build("swin", mask_patch_size=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        encoder_stride=4,
        drop_path_rate=0.0,
    )
    reference = SwinForMaskedImageModeling(config).eval()
    missing = reference.load_state_dict(huggingface_names(model.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("relative_position_index") for key in missing.missing_keys)
    outputs = model(images)
    # transformers takes the mask of the first stage's patches, two of which make a side of a feature.
    fine = outputs["mask"].view(4, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    expected = reference(images, bool_masked_pos=fine)
    assert torch.allclose(outputs["prediction"], expected.reconstruction, atol=1e-5)
    assert model.loss(outputs, images).item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructions_keep_visible_pixels(kind: str, images: Tensor) -> None:
    model = build(kind)
    outputs = model(images)
    hidden = pixels(outputs["mask"])
    shown = model.reconstruct(outputs, images)
    assert torch.equal(shown[~hidden], images[~hidden])
    assert torch.equal(shown[hidden], outputs["prediction"].detach()[hidden])
    attacked = model.reconstruct(outputs, images, visible_from=images + 1)
    assert torch.equal(attacked[~hidden], images[~hidden] + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_aemim_attacks_and_trains_every_parameter(kind: str, images: Tensor) -> None:
    model = build(kind)
    aemim = AEMIM(steps=1, mean=(0.0, 0.0, 0.0), std=(0.1, 0.1, 0.1))
    aemim.attach(model)
    with torch.no_grad():
        for parameter in adversarial_parameters(model):
            parameter.add_(0.1 * torch.rand_like(parameter))
    images = images.clamp(0, 10)  # [0, 1] pixels at this mean and deviation
    outputs, attacked = aemim.attack(model, images, step=0)
    assert torch.equal(attacked.outputs["mask"], outputs["mask"])
    assert attacked.perturbation.max() == pytest.approx(2.0, abs=1e-3)
    with adversarial_mode(model):
        again = model(attacked.images, outputs["mask"])["prediction"]
    assert torch.allclose(again, attacked.outputs["prediction"], atol=1e-5)
    aemim.training_loss(model, images, step=0)["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_follow_the_mask_and_not_the_encoders_patches(kind: str, images: Tensor) -> None:
    model = build(kind)
    aemim = AEMIM(steps=1)
    aemim.attach(model)
    pictures = draw_pictures(model, images, aemim, seed=1)
    hidden = pictures.masked != images
    assert hidden.sum().item() == 4 * 3 * 3 * 8 * 8  # samples, channels, three of four patches of 8×8
    assert torch.equal(pictures.reconstruction[~hidden], images[~hidden])
    assert not pictures.perturbation[hidden].any()  # type: ignore[index]
    # Pixels at the edge of the pixel range may stay where they are.
    assert (pictures.perturbation[~hidden] != 0).float().mean() > 0.7  # type: ignore[index]


def test_non_square_images() -> None:
    model = build("swin", image_size=(16, 24))
    images = torch.randn(2, 3, 16, 24)
    outputs = model(images)
    assert (outputs["prediction"].shape, outputs["mask"].shape) == (images.shape, (2, 6))
    assert model.loss(outputs, images).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_cannot_work_are_refused(kind: str, images: Tensor) -> None:
    for size in (0, 6, 12, 32):
        with pytest.raises(
            ValueError, match=f"mask_patch_size={size} does not fit: expected a multiple of the 4"
        ):
            build(kind, mask_patch_size=size)
    for ratio in (0.0, 0.9, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio={ratio} leaves"):
            build(kind, mask_ratio=ratio)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 16\), expected \(4, 4\)"):
        build(kind)(images, torch.ones(4, 16, dtype=torch.bool))
