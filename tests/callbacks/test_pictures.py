"""The pictures: what they show, what they must not change, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer.models import ComposerClassifier
from conftest import fit, normalised_images, tiny_mae
from PIL import Image
from torch import nn

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks import ReconstructionPictures
from aemim_algorithm.callbacks.pictures import draw_pictures
from aemim_algorithm.models.masking import mask_images, unpatchify


@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_hidden_patches_are_predicted_and_visible_ones_shown_as_they_are(norm_pixel_target: bool) -> None:
    model, images = tiny_mae(norm_pixel_target=norm_pixel_target), normalised_images(4)
    aemim = AEMIM()
    aemim.attach(model)
    pictures = draw_pictures(model, images, aemim)
    hidden = pictures.masked != images
    assert 0.7 < hidden.float().mean() < 0.8
    assert torch.equal(pictures.reconstruction[~hidden], images[~hidden])
    adversarial, again = pictures.adversarial, pictures.adversarial_reconstruction
    assert torch.equal(again[~hidden], adversarial[~hidden])  # type: ignore[index]
    assert not pictures.perturbation[hidden].any()  # type: ignore[index]
    assert pictures.perturbation[~hidden].abs().mean() > 0  # type: ignore[index]
    assert (pictures.reconstruction[hidden] != images[hidden]).float().mean() > 0.99


def test_reconstruction_leaks_only_the_statistics_that_the_caption_names() -> None:
    """Two targets whose hidden patches share mean and deviation give the same picture there."""
    model, images = tiny_mae(), normalised_images(2)
    outputs = model(images)
    mask = outputs["mask"]
    flipped = unpatchify(_flipped_patches(images), 4, (4, 4))
    other = mask_images(images, mask, 4, fill=flipped)
    assert not torch.equal(other, images)
    assert torch.allclose(model.reconstruct(outputs, images), model.reconstruct(outputs, other), atol=1e-5)
    brighter = mask_images(images, mask, 4, fill=images + 1)
    assert not torch.allclose(
        model.reconstruct(outputs, brighter), model.reconstruct(outputs, images), atol=0.1
    )


def _flipped_patches(images: torch.Tensor) -> torch.Tensor:
    from aemim_algorithm.models.masking import patchify

    return patchify(images, 4).flip(-1)


def test_a_run_with_pictures_equals_one_without_bitwise(tmp_path: Path) -> None:
    plain, drawn = tiny_mae(), tiny_mae()
    fit(plain, AEMIM.fast(), duration="3ba")
    pictures = ReconstructionPictures(str(tmp_path), interval="1ba", num_images=3)
    fit(drawn, AEMIM.fast(), duration="3ba", callbacks=[pictures])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[name]), name
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == [f"batch000000{i}.png" for i in (1, 2, 3)]
    with Image.open(written[0]) as image:
        assert image.width > image.height > 300


@pytest.mark.parametrize("aemim", [True, False])
def test_same_images_and_masks_every_time(aemim: bool) -> None:
    model, images = tiny_mae(), normalised_images(2)
    algorithm = AEMIM() if aemim else None
    if algorithm:
        algorithm.attach(model)
    state = torch.get_rng_state()
    first, second = draw_pictures(model, images, algorithm), draw_pictures(model, images, algorithm)
    assert torch.equal(first.reconstruction, second.reconstruction)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert (first.adversarial is not None) == aemim


def test_a_model_that_cannot_be_drawn_is_refused_at_init(tmp_path: Path) -> None:
    model = ComposerClassifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 16)), num_classes=16)
    with pytest.raises(ValueError, match="cannot draw ComposerClassifier: the model needs a method"):
        fit(model, callbacks=[ReconstructionPictures(str(tmp_path))])
    with pytest.raises(ValueError, match="num_images=0 is out of range"):
        ReconstructionPictures(str(tmp_path), num_images=0)
