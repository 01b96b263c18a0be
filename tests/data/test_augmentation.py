"""Augmentation of fine-tuning: decided by seeds alone, nothing drawn from the global generators, timm's results."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from composer.core.data_spec import default_split_batch
from timm.data.mixup import Mixup
from torch import Tensor

from aemim_algorithm.data.augmentation import BatchMixing, RandAugment, seeded_globals
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.randomness import RngState

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
POLICY = "rand-m9-mstd0.5-inc1"


def images(count: int = 6, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).byte()


def batch(count: int = 6, seed: int = -5) -> dict[str, Any]:
    seeds = torch.arange(count) * 7919 + seed
    return {"image": images(count), "label": torch.arange(count) % 4, "seed": seeds}


def mixing(**options: float) -> BatchMixing:
    return BatchMixing(num_classes=4, normalize=Normalize(MEAN, STD), **options)  # type: ignore[arg-type]


def test_an_image_is_augmented_by_its_seed_alone() -> None:
    augment = RandAugment(POLICY, image_size=32, mean=MEAN)
    image = images(1, 32)[0]
    random.seed(3)
    np.random.seed(3)
    first = [augment(image, seed) for seed in range(20)]
    random.seed(4)
    np.random.seed(4)
    again = [augment(image, seed) for seed in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert {(one.shape, one.dtype) for one in first} == {(image.shape, torch.uint8)}
    assert sum(not torch.equal(one, image) for one in first) > 9  # a quarter gets no operation
    assert len({one.numpy().tobytes() for one in first}) > 9


def test_all_bits_of_a_seed_count() -> None:
    with seeded_globals(1):
        low = (random.random(), np.random.rand())
    with seeded_globals(1 + (1 << 40)):
        high = (random.random(), np.random.rand())
    assert low[0] != high[0]
    assert low[1] != high[1]


def test_global_generators_stay_where_they_were() -> None:
    augment, mix = RandAugment(POLICY, image_size=32, mean=MEAN), mixing(mixup=0.8, cutmix=1.0)
    before = RngState.capture()
    augment(images(1, 32)[0], 11)
    mix.mix(mix.pair(batch()))
    assert RngState.capture() == before


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-m9-wrong1", "m9"])
def test_another_policy_is_refused_in_one_line(policy: str) -> None:
    with pytest.raises(ValueError, match="randaugment=.*expected a policy of timm") as caught:
        RandAugment(policy, image_size=32, mean=MEAN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_batch_is_mixed_as_timm_mixes_it(options: dict[str, float]) -> None:
    """timm on the whole batch, normalised, under the same seed."""
    mix, given = mixing(**options, label_smoothing=0.1), batch()
    mixed = mix.mix(mix.pair(given))
    timm = Mixup(
        mixup_alpha=options.get("mixup", 0.0),
        cutmix_alpha=options.get("cutmix", 0.0),
        label_smoothing=0.1,
        num_classes=4,
    )
    with seeded_globals(int(given["seed"][0]) & (1 << 64) - 1):
        expected, targets = timm(Normalize(MEAN, STD)(given)["image"], given["label"])
    assert torch.equal(mixed["image"], expected)
    assert torch.equal(mixed["label"], targets)
    assert not torch.equal(mixed["image"], Normalize(MEAN, STD)(given)["image"])
    assert mixed["label"].sum(1).tolist() == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_the_size_of_a_micro_batch_changes_nothing(size: int) -> None:
    mix = mixing(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    whole = mix.mix(mix.pair(batch()))
    parts = [mix.mix(part) for part in mix.split(batch(), size)]
    assert len(parts) == -(-6 // size)
    for key in ("image", "label", "seed"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key]), key
    # The trap that this avoids: timm on each micro-batch pairs other samples.
    if size < 6:
        alone = [mix.mix(mix.pair(part)) for part in default_split_batch(batch(), size)]
        assert not torch.equal(torch.cat([part["image"] for part in alone]), whole["image"])


def test_batches_differ_and_ratios_fill_the_range() -> None:
    mix = mixing(mixup=0.8, cutmix=1.0)
    targets = [mix.mix(mix.pair(batch(seed=seed)))["label"][0].max().item() for seed in range(60)]
    assert len({round(target, 6) for target in targets}) > 40
    assert min(targets) < 0.6 < 0.9 < max(targets)


def test_without_mixing_labels_are_smoothed_or_left() -> None:
    smoothed = mixing(label_smoothing=0.1)
    got = smoothed.mix(smoothed.pair(batch()))
    assert got["label"][1].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])
    plain = mixing()
    got = plain.mix(plain.pair(batch()))
    assert torch.equal(got["label"], batch()["label"])
    assert torch.equal(got["image"], Normalize(MEAN, STD)(batch())["image"])


def test_an_odd_batch_is_mixed_too() -> None:
    mix = mixing(mixup=0.8)
    mixed = mix.mix(mix.pair(batch(5)))
    middle = Normalize(MEAN, STD)(batch(5))["image"][2]
    torch.testing.assert_close(mixed["image"][2], middle)  # its own partner


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"switch_prob": 1.5}, {"label_smoothing": -0.1}])
def test_impossible_arguments_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        mixing(**options)
