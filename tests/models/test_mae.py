"""The MAE: what the encoder sees, what the loss measures, and how it starts."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_mae
from torch import Tensor, nn

from aemim_algorithm.models import MODELS
from aemim_algorithm.models.masking import (
    hidden_indices,
    images_in,
    mask_images,
    normalize_patches,
    patchify,
    random_mask,
    split_indices,
    unpatchify,
    visible_indices,
)
from aemim_algorithm.models.vit import sincos_position


def test_encoding_the_visible_patches_equals_encoding_all_and_attending_to_them(images: Tensor) -> None:
    """Gather before the embedding against timm's own embedding, cut afterwards."""
    encoder = tiny_mae().encoder
    mask = random_mask(8, 16, 0.75)
    visible = visible_indices(mask, 4)
    tokens = encoder._pos_embed(encoder.patch_embed(images))  # timm's
    kept = torch.cat([tokens[:, :1], tokens[:, 1:][~mask].view(8, 4, -1)], dim=1)
    expected = encoder.norm(encoder.blocks(kept))
    assert torch.allclose(encoder(images, visible), expected, atol=1e-5)
    assert torch.allclose(encoder(images), encoder.forward_features(images), atol=1e-5)


def test_hidden_patches_do_not_reach_the_encoder(images: Tensor) -> None:
    model = tiny_mae()
    mask = random_mask(8, 16, 0.75)
    other = torch.where(_pixels(mask), torch.randn_like(images), images)
    assert torch.equal(model(images, mask)["prediction"], model(other, mask)["prediction"])
    assert not torch.equal(model(images, mask.roll(1, 1))["prediction"], model(images, mask)["prediction"])


def _pixels(mask: Tensor) -> Tensor:
    return unpatchify(mask[:, :, None].expand(-1, -1, 48), 4, (4, 4))


def test_loss_is_the_mean_squared_error_of_normalised_hidden_patches(images: Tensor) -> None:
    model = tiny_mae()
    outputs = model((images, torch.zeros(8)))
    errors = []
    for i in range(8):
        for p in range(16):
            row, column = divmod(p, 4)
            patch = images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double().numpy().ravel()
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            if outputs["mask"][i, p]:
                predicted = outputs["prediction"][i, int(outputs["mask"][i, :p].sum())]
                errors.append((predicted.detach().numpy() - target) ** 2)
    assert len(errors) == 8 * 12
    assert model.loss(outputs, (images, None)).item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_the_hidden_patches_are_those_of_a_decoder_of_all(
    depth: int, norm_pixel_target: bool, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token in every block, then the hidden ones picked: equal predictions, loss and gradients."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # what the loss computes in
    model = tiny_mae(decoder_depth=depth, norm_pixel_target=norm_pixel_target).double()
    images = images.double().requires_grad_()
    outputs = model(images, random_mask(8, 16, 0.75))
    prediction, loss = _by_all_tokens(model, images, outputs["mask"])
    torch.testing.assert_close(outputs["prediction"], prediction, rtol=1e-12, atol=1e-12)
    found = model.loss(outputs, images)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    leaves = {"images": images} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for (name, _), got, value in zip(
        leaves.items(), torch.autograd.grad(found, list(leaves.values())), expected, strict=True
    ):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12, msg=name)


def _by_all_tokens(model: Any, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    decoder = model.decoder
    visible = visible_indices(mask, 4)
    tokens = decoder.embed(model.encoder(images, visible))
    patches = decoder.mask_token.expand(8, 16, -1)
    patches = patches.scatter(1, visible[:, :, None].expand(-1, -1, tokens.shape[-1]), tokens[:, 1:])
    tokens = torch.cat([tokens[:, :1], patches], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        tokens = block(tokens)
    every = decoder.head(decoder.norm(tokens))[:, 1:]
    target = patchify(images, 4)
    if model.norm_pixel_target:
        target = normalize_patches(target)[0]
    error = (every - target).square().mean(dim=-1)
    return every[mask].view(8, 12, -1), (error * mask).sum() / mask.sum()


def test_reconstructions_show_predictions_where_patches_are_hidden(images: Tensor) -> None:
    model = tiny_mae(norm_pixel_target=False)
    outputs = model(images)
    mask, shown = outputs["mask"], model.reconstruct(outputs, images)
    hidden = _pixels(mask)
    assert torch.equal(shown[~hidden], images[~hidden])
    assert torch.equal(patchify(shown, 4)[mask], outputs["prediction"].detach().flatten(0, 1))
    assert torch.equal(model.reconstruct(outputs, images, visible_from=images + 1)[hidden], shown[hidden])
    # A model that predicts each patch's own structure is given its colour and contrast.
    model.norm_pixel_target = True
    target = normalize_patches(patchify(images, 4))[0][mask].view(8, 12, -1)
    torch.testing.assert_close(model.reconstruct({"prediction": target, "mask": mask}, images), images)


def test_loss_reaches_every_trainable_parameter(images: Tensor) -> None:
    model = tiny_mae()
    model.loss(model(images), images).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert name.endswith("pos_embed") or parameter.grad.any(), name  # type: ignore[union-attr]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_mask_hides_the_same_number_at_random(ratio: float) -> None:
    mask = random_mask(400, 16, ratio, seeds=torch.arange(400))
    assert (mask.sum(1) == 16 - int(16 * (1 - ratio))).all()
    assert mask.float().mean(0).std() < 0.04
    visible = visible_indices(mask, 16 - int(mask[0].sum()))
    hidden = hidden_indices(mask, int(mask[0].sum()))
    assert (visible.diff(dim=1) > 0).all()
    assert (hidden.diff(dim=1) > 0).all()
    assert not mask.gather(1, visible).any()
    assert mask.gather(1, hidden).all()
    assert all(map(torch.equal, split_indices(mask, visible.shape[1]), (visible, hidden)))


def test_patches_round_trip_and_follow_the_convolution(images: Tensor) -> None:
    wide = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, (2, 3)), wide)
    convolution = nn.Conv2d(3, 5, 4, stride=4)
    expected = convolution(images).flatten(2).transpose(1, 2)
    weight = convolution.weight.flatten(1)
    assert torch.allclose(patchify(images, 4) @ weight.T + convolution.bias, expected, atol=1e-5)
    normalised, mean, std = normalize_patches(patchify(images, 4))
    assert torch.allclose(normalised * std + mean, patchify(images, 4), atol=1e-5)
    mask = random_mask(8, 16, 0.5)
    painted = mask_images(images, mask, 4, fill=9.0)
    assert torch.equal(painted == 9.0, _pixels(mask))


def test_positions_are_those_of_the_published_checkpoints() -> None:
    """Column first, then row; sines, then cosines; against plain loops."""
    table = sincos_position((2, 3), 8)[0]
    assert table.shape == (7, 8)
    assert not table[0].any()
    for row in range(2):
        for column in range(3):
            waves = []
            for position in (column, row):
                angles = [position / 10000 ** (k / 2) for k in range(2)]
                waves += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            assert np.allclose(table[1 + 3 * row + column], waves, atol=1e-6)


def test_starts_from_xavier_uniform() -> None:
    model = tiny_mae(embed_dim=48)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach().flatten(1)
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any()
    assert 0.01 < model.encoder.cls_token.std() < 0.03


class OwnBatch(UserDict):
    pass


@pytest.mark.parametrize("wrap", [
    lambda x: x, lambda x: (x, torch.zeros(8)), lambda x: [torch.arange(8), x],
    lambda x: {"label": torch.zeros(8), "image": x}, lambda x: OwnBatch(pixel_values=x), lambda x: ({"a": (x,)},),
])  # fmt: skip
def test_images_are_found_in_any_batch(images: Tensor, wrap: Any) -> None:
    assert images_in(wrap(images)) is images


@pytest.mark.parametrize(
    "batch", [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8),), {"x": torch.zeros(2, 3)}, "text", 3]
)
def test_a_batch_without_images_is_one_clear_line(batch: Any) -> None:
    with pytest.raises(ValueError, match="holds no images: expected a floating-point tensor of shape"):
        images_in(batch)


def test_sizes_that_cannot_work_are_refused(images: Tensor) -> None:
    for ratio in (0.0, 0.99, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio={ratio} leaves"):
            tiny_mae(mask_ratio=ratio)
    with pytest.raises(ValueError, match="decoder_dim=16 must be a multiple of decoder_heads=3"):
        tiny_mae(decoder_heads=3)
    with pytest.raises(ValueError, match=r"images are \(8, 8\) pixels, the encoder was built for \(16, 16\)"):
        tiny_mae()(images[:, :, :8, :8])
    with pytest.raises(ValueError, match=r"mask has shape \(8, 15\), expected \(8, 16\)"):
        tiny_mae()(images, torch.ones(8, 15, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="leaves 4 of 16"):
        tiny_mae()(images, torch.ones(8, 16, dtype=torch.bool))


def test_named_sizes_are_the_papers() -> None:
    with torch.device("meta"):
        small, base, tiny = (
            MODELS[f"mae_vit_{size}"]() for size in ("small_patch16", "base_patch16", "tiny_patch4")
        )
    count = [sum(p.numel() for p in model.encoder.parameters()) / 1e6 for model in (small, base, tiny)]
    assert count == pytest.approx([21.67, 85.80, 5.36], abs=0.01)
    for model in (small, base):
        assert (len(model.decoder.blocks), model.decoder.norm.weight.numel()) == (8, 512)
        assert model.decoder.blocks[0].attn.num_heads == 16
        assert (model.num_patches, model.num_visible) == (196, 49)


def test_non_square_images() -> None:
    model = tiny_mae(image_size=(16, 24))
    images = torch.randn(2, 3, 16, 24)
    outputs = model(images)
    assert outputs["prediction"].shape == (2, 18, 48)
    assert model.loss(outputs, images).isfinite()
