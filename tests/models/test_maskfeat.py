"""MaskFeat: what it predicts, of which patches, and that AEMIM's target is the clean image's HOG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import fit, loader, perturb
from torch import Tensor, nn

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.callbacks import ReconstructionPictures
from aemim_algorithm.models import MODELS, MaskFeat
from aemim_algorithm.models.hog import hog
from aemim_algorithm.models.masking import block_mask, unpatchify


def tiny(**overrides: Any) -> MaskFeat:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return MaskFeat(**(sizes | {"cell_size": 2, "min_block": 2} | overrides))


def test_loss_is_the_mean_squared_error_of_the_hidden_patches_histograms(images: Tensor) -> None:
    model = tiny()
    outputs = model((images, torch.zeros(8)))
    histograms, errors = hog(images, cell_size=2), []
    for image, mask in enumerate(outputs["mask"]):
        for number, patch in enumerate(mask.nonzero().flatten().tolist()):
            row, column = divmod(patch, 4)
            cells = histograms[image, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            errors.append((outputs["prediction"][image, number] - cells.flatten()).square().mean())
    assert len(errors) == 8 * 6
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(model.loss(outputs, (images, None)), expected)


def test_hidden_patches_do_not_reach_the_encoder(images: Tensor) -> None:
    model = tiny()
    mask = block_mask(8, (4, 4), 6)
    pixels = unpatchify(mask[:, :, None].expand(-1, -1, 48), 4, (4, 4))
    other = torch.where(pixels, torch.randn_like(images), images)
    assert torch.equal(model(images, mask)["prediction"], model(other, mask)["prediction"])
    assert not torch.equal(model(other, mask.roll(1, 1))["prediction"], model(images, mask)["prediction"])


def test_predicts_the_hidden_patches_in_raster_order(images: Tensor) -> None:
    model, mask = tiny(), block_mask(8, (4, 4), 6)
    everywhere = model.decoder(model.encoder(images, mask)[:, 1:])
    prediction = model(images, mask)["prediction"]
    assert prediction.shape == (8, 6, 3 * 9 * 4)
    assert torch.equal(prediction, everywhere[mask].view(8, 6, -1))


def test_loss_reaches_every_trainable_parameter(images: Tensor) -> None:
    model = tiny()
    model.loss(model(images), images).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_no_image_receives_a_gradient_from_its_target(images: Tensor) -> None:
    outputs = {"prediction": torch.zeros(8, 6, 108, requires_grad=True), "mask": block_mask(8, (4, 4), 6)}
    images.requires_grad_()
    tiny().loss(outputs, images).backward()
    assert images.grad is None
    assert outputs["prediction"].grad is not None


def test_sizes_that_cannot_work_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="cell_size=3: expected a divisor of patch_size=4"):
        tiny(cell_size=3)
    for ratio, hidden in ((0.05, 0), (1.0, 16)):
        with pytest.raises(ValueError, match=f"mask_ratio={ratio} hides {hidden} of 16"):
            tiny(mask_ratio=ratio)
    with pytest.raises(ValueError, match=r"mask has shape \(8, 15\), expected \(8, 16\)"):
        tiny()(images, torch.ones(8, 15, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="must hide 6 patches"):
        tiny()(images, torch.ones(8, 16, dtype=torch.bool))


def test_named_sizes_are_the_papers() -> None:
    with torch.device("meta"):
        model, small = MODELS["maskfeat_vit_base_patch16"](), MODELS["maskfeat_vit_tiny_patch4"]()
        outputs = model(torch.empty(2, 3, 224, 224))
        assert model.loss(outputs, torch.empty(2, 3, 224, 224)).shape == ()
    assert outputs["prediction"].shape == (2, 78, 108)
    assert isinstance(model.decoder, nn.Linear)
    assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656 + 768  # timm's, and a mask token
    assert (small.decoder.out_features, small.num_hidden) == (27, 25)
    assert model.min_block == model.num_hidden // 5 == 15


def test_every_parameter_starts_and_decays_as_published() -> None:
    """ZERO_DECAY_POS_CLS and SCALE_INIT_BY_DEPTH are off: tokens and positions decay, no layer starts smaller."""
    model = tiny(embed_dim=96, depth=3)
    assert not hasattr(model, "no_weight_decay")
    for block in model.encoder.blocks:
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_aemims_target_is_the_clean_images_histogram(images: Tensor) -> None:
    aemim, model = AEMIM(), tiny()
    aemim.attach(model)
    perturb(model, 0.3)
    torch.manual_seed(1)
    outputs, result = aemim.attack(model, images, step=0)
    torch.manual_seed(1)
    loss = aemim.training_loss(model, images, step=0)
    assert torch.equal(result.outputs["mask"], outputs["mask"])
    assert outputs["mask"].sum(1).eq(6).all()
    assert result.perturbation.max() == pytest.approx(2.0, abs=1e-4)
    with adversarial_mode(model):
        prediction = model(result.images, outputs["mask"])
    torch.testing.assert_close(loss["adversarial"], model.loss(prediction, images))
    assert not torch.allclose(loss["adversarial"], model.loss(prediction, result.images), rtol=1e-5)
    torch.testing.assert_close(loss["clean"], model.loss(model(images, outputs["mask"]), images))


@pytest.mark.parametrize("aemim", [AEMIM(), AEMIM.fast()], ids=["standard", "fast"])
def test_trains_with_aemim(aemim: AEMIM) -> None:
    model = tiny(drop_path=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, aemim, micro=4)
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    clean, adversarial = after["encoder.norm.bias"], after["encoder.norm.adversarial.bias"]
    assert not torch.equal(clean, adversarial)


def test_has_no_picture_to_draw() -> None:
    with pytest.raises(ValueError, match="ReconstructionPictures cannot draw MaskFeat"):
        fit(tiny(), callbacks=[ReconstructionPictures()])


def test_learns(images: Tensor) -> None:
    model = tiny(embed_dim=48)
    mask = block_mask(8, (4, 4), 6)
    with torch.no_grad():
        before = model.loss(model(images, mask), images)
    fit(model, duration="30ba", train_dataloader=loader(8))
    with torch.no_grad():
        assert model.loss(model(images, mask), images) < 0.8 * before
