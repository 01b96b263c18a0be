"""Masks that belong to the samples: neither ranks, micro-batches nor the other samples change them."""

from __future__ import annotations

import pytest
import torch
from settings import SETTINGS, Setting

from aemim_algorithm.models.masking import block_mask, images_in, random_mask, sample_seeds

OURS = [setting for setting in SETTINGS if not setting.needs_transformers][:5]


@pytest.mark.parametrize("setting", OURS, ids=lambda setting: setting.name)
def test_a_sample_has_the_mask_of_its_seed(setting: Setting) -> None:
    model, images = setting.build().eval(), images_in(setting.batch(0))
    seeds = torch.tensor([7, -3, 2**62, 0, 1, 2, 3, 4])
    with torch.no_grad():
        whole = model({"image": images, "seed": seeds})["mask"]
        torch.manual_seed(5)
        order = torch.tensor([6, 0, 3])
        part = model({"image": images[order], "seed": seeds[order]})["mask"]
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert drawn == torch.rand(1)  # nothing came from the global generator
        assert part.equal(whole[order])
        assert not model({"image": images, "seed": seeds + 1})["mask"].equal(whole)
        plain = [model({"image": images})["mask"] for _ in range(2)]
    assert not plain[0].equal(plain[1])


def test_seeded_masks_hide_every_patch_equally_often() -> None:
    """As often as masks from the global generator do."""
    torch.manual_seed(0)
    for make in (
        lambda seeds: random_mask(4000, 16, 0.75, seeds=seeds),
        lambda seeds: block_mask(4000, (4, 4), 6, min_patches=2, seeds=seeds),
    ):
        seeded, drawn = (make(seeds).double().mean(0) for seeds in (torch.arange(4000), None))
        deviation = (drawn * (1 - drawn) / 4000).sqrt()
        assert (seeded - drawn).abs().max() < 4 * 2**0.5 * deviation.max()


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 4, 4),
        (torch.zeros(2, 3, 4, 4), torch.arange(2)),
        {"image": torch.zeros(2, 3, 4, 4), "label": torch.arange(2)},
        {"seed": 3},
        {"seed": torch.zeros(2)},
        {"seed": torch.zeros(2, 1, dtype=torch.int64)},
    ],
)
def test_other_batches_have_no_seeds(batch: object) -> None:
    assert sample_seeds(batch) is None
