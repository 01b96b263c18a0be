"""Images that stay on the device: whole batches of their crops, the same however a run is cut or shared."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Logger, State
from conftest import assert_same, fit, tiny_mae
from small_runs import recipe_in, write_images
from timm.data.constants import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as STD
from torch import Tensor
from torchvision.io import encode_png

from aemim_algorithm.data.augmentation import BatchMixing
from aemim_algorithm.data.damage import BrokenSampleError
from aemim_algorithm.data.resident import ResidentImages, resident_data
from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.data.streaming import train_data
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.recipes.dry_run import dry_run
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import pretrain
from aemim_algorithm.recipes.schema import RecipeError, load_finetuning

SAMPLES, SIDE, BATCH = 42, 16, 8
BATCHES = SAMPLES // BATCH
OPTIONS: dict[str, Any] = {"image_size": SIDE, "batch_size": BATCH}
Batch = dict[str, Tensor]


def shaded() -> Tensor:
    """Image `i` is of level 4 * i on the left and 80 above that on the right; shape (42, 3, 20, 24), uint8."""
    images = torch.arange(SAMPLES)[:, None, None, None].expand(-1, 3, 20, 24) * 4
    return torch.cat([images[..., :12], images[..., 12:] + 80], dim=-1).to(torch.uint8)


def png(image: Tensor) -> bytes:
    return encode_png(image).numpy().tobytes()


def written(folder: Path, samples: Iterable[tuple[bytes, int]]) -> Path:
    write_shards(iter(samples), folder, classes=("a", "b"), made_from={})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 shaded images, each with its own label."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    return written(folder, [(png(image), label) for label, image in enumerate(shaded())])


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def test_an_epoch_gives_whole_batches_of_distinct_samples_with_their_labels(shards: Path) -> None:
    data = ResidentImages(shards, **OPTIONS)
    batches = list(data)
    assert len(batches) == len(data) == BATCHES
    labels = torch.cat([batch["label"] for batch in batches])
    assert len(labels.unique()) == len(labels)
    assert not labels.equal(labels.sort().values)
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (BATCH, 3, SIDE, SIDE)
        left, right = (batch["image"][:, 0, 0, column].int() - 4 * batch["label"] for column in (0, -1))
        # Each side is left's shade or right's; the kernel rings where a crop's border is near the middle.
        assert torch.minimum(left.abs(), (left - 80).abs()).max() <= 10
        assert torch.minimum(right.abs(), (right - 80).abs()).max() <= 10


def test_half_of_the_images_are_mirrored(shards: Path) -> None:
    data = ResidentImages(shards, **OPTIONS, crop_scale=(0.9, 1.0))
    brighter = [batch["image"][:, 0, 0, 0] > batch["image"][:, 0, 0, -1] for _ in range(40) for batch in data]
    assert 0.45 < torch.cat(brighter).float().mean() < 0.55


def test_seeds_and_crops_are_those_of_run_epoch_and_sample(shards: Path) -> None:
    data, again, other = (ResidentImages(shards, **OPTIONS, seed=seed) for seed in (3, 3, 4))
    first, second, foreign = list(data), list(data), list(other)
    assert same([*again, *again], first + second)
    seeds = torch.cat([batch["seed"] for batch in first + second + foreign])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == len(seeds)
    assert (seeds < 0).any()
    assert int(seeds.double().abs().max()) > 2**60
    for variant in (second, foreign):
        crops = {
            int(x): image
            for batch in variant
            for x, image in zip(batch["label"], batch["image"], strict=True)
        }
        common = [
            (image, crops[int(x)])
            for batch in first
            for x, image in zip(batch["label"], batch["image"], strict=True)
            if int(x) in crops
        ]
        assert sum(not one.equal(two) for one, two in common) > 0.6 * len(common)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_global_batches_of_one_process(
    shards: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    alone = list(ResidentImages(shards, **OPTIONS))
    monkeypatch.setattr("aemim_algorithm.data.resident.dist.get_world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("aemim_algorithm.data.resident.dist.get_global_rank", lambda rank=rank: rank)
        shares.append(list(ResidentImages(shards, image_size=SIDE, batch_size=BATCH // ranks)))
    joined = [
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, alone)


@pytest.mark.parametrize("given", [0, 2, BATCHES])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_gives_the_remaining_batches(shards: Path, epoch: int, given: int) -> None:
    data = ResidentImages(shards, **OPTIONS)
    for _ in range(epoch):
        list(data)
    iterator = iter(data) if given else iter([])
    for _ in range(given):
        next(iterator)
    state = data.state_dict(given * BATCH, True)  # as Composer saves it
    resumed = ResidentImages(shards, **OPTIONS, seed=5)
    resumed.load_state_dict(state)
    assert resumed.state_dict(0, True)["epoch"] == epoch
    remaining = list(iterator) if given else list(data)
    assert same(list(resumed), remaining)
    assert same(list(resumed), list(data))


class Recorder(Callback):
    """Keeps the batches that a run trains on, by their number; the run may die before one."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.batches: dict[int, Batch] = {}
        self.killed_at = killed_at

    def batch_start(self, state: State, logger: Logger) -> None:
        number = int(state.timestamp.batch)
        if number == self.killed_at:
            raise KeyboardInterrupt
        self.batches[number] = state.batch


# Composer wonders that an epoch has no batch left after a checkpoint at its last one.
@pytest.mark.filterwarnings("ignore:No batches were trained")
@pytest.mark.parametrize(
    ("interval", "killed_at"),
    [("4ba", 9), ("5ba", 6), ("1ep", 6)],
    ids=["in mid-epoch", "at an epoch's last batch", "between epochs"],
)
def test_a_killed_run_trains_on_as_if_it_had_not_been(
    shards: Path, tmp_path: Path, interval: str, killed_at: int
) -> None:
    def run(recorder: Recorder, folder: Path) -> dict[str, Tensor]:
        trainer = fit(
            tiny_mae(),
            train_dataloader=resident_data(shards, mean=MEAN, std=STD, **OPTIONS),
            duration="3ep",
            callbacks=[recorder],
            save_folder=str(folder),
            save_interval=interval,
            run_name="run",
            autoresume=True,
        )
        return trainer.state.model.state_dict()

    whole, killed, rest = Recorder(), Recorder(killed_at), Recorder()
    final = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "cut")
    resumed = run(rest, tmp_path / "cut")
    assert len(whole.batches) == 3 * BATCHES
    assert 0 < min(rest.batches) <= killed_at
    assert same([*rest.batches.values()], [whole.batches[number] for number in rest.batches])
    assert_same(resumed, final)


def test_the_global_generators_are_left_alone(shards: Path) -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    before = states()
    batches: Any = resident_data(shards, mean=MEAN, std=STD, **OPTIONS).dataloader
    assert len(list(batches)) == len(batches) == BATCHES
    assert states() == before


def test_the_trainer_gets_normalised_images_as_from_streaming(shards: Path) -> None:
    resident, streamed = (make(shards, mean=MEAN, std=STD, **OPTIONS) for make in (resident_data, train_data))
    mine, theirs = (spec.microbatch_transforms(next(iter(spec.dataloader))) for spec in (resident, streamed))
    assert {key: (value.dtype, value.shape) for key, value in mine.items()} == {
        key: (value.dtype, value.shape) for key, value in theirs.items()
    }
    assert resident.num_samples == BATCHES * BATCH
    assert resident.get_num_samples_in_batch(mine) == BATCH


def test_batches_can_be_mixed(shards: Path) -> None:
    mixing = BatchMixing(num_classes=SAMPLES, normalize=Normalize(MEAN, STD), mixup=0.8)
    spec = resident_data(shards, mean=MEAN, std=STD, mixing=mixing, **OPTIONS)
    batch = next(iter(spec.dataloader))
    parts = [spec.microbatch_transforms(part) for part in spec.split_batch(batch, 4)]
    assert [part["label"].shape for part in parts] == [(4, SAMPLES)] * 2
    assert parts[0]["image"].is_floating_point()


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", [(png(image), 0) for image in (shaded()[0], shaded()[1][:, :9])])
    refused(
        folder, r"sample 1 \(shard.00000.mds\) has 24×9 pixels and sample 0 24×20: .*resident", batch_size=1
    )


def test_a_sample_that_is_no_image_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", [(png(shaded()[0]), 0), (b"no image", 0)])
    refused(folder, r"sample 1 \(shard.00000.mds\): image: ", BrokenSampleError, batch_size=1)


def test_what_the_memory_cannot_hold_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = SAMPLES * 3 * 20 * 24
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * needed - 2))
    refused(shards, "take 59.1 KiB decoded, more than half of the 118.1 KiB .*data.resident=false")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * needed))
    assert len(ResidentImages(shards, **OPTIONS)) == BATCHES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 43}, "42 samples, fewer than the 43 .*lower batch_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"crop_scale": (0.5, 0.2)}, "scale="),
        ({"num_classes": 41}, "has the label 41, expected one from 0 to 40"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(shards: Path, options: dict[str, Any], message: str) -> None:
    refused(shards, message, **options)


def refused(folder: Path, message: str, kind: type[ValueError] = ValueError, **options: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        ResidentImages(folder, **(OPTIONS | options))
    assert "\n" not in str(caught.value)


def test_the_checkpoint_of_a_streamed_run_is_refused(shards: Path) -> None:
    streamed: Any = train_data(shards, mean=MEAN, std=STD, **OPTIONS).dataloader
    state = streamed.dataset.state_dict(0, True)
    with pytest.raises(ValueError, match="data.resident=false"):
        ResidentImages(shards, **OPTIONS).load_state_dict(state)


def test_augmentation_image_by_image_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="expected None"):
        resident_data(shards, mean=MEAN, std=STD, augment=lambda image, seed: image, **OPTIONS)


@pytest.mark.parametrize(
    "override", ["data.source=s3://bucket/folder", "data.max_broken=1"], ids=["remote", "broken images"]
)
def test_a_recipe_that_contradicts_itself_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=rf"{re.escape(override)}: .* with data.resident=true"):
        recipe_in(tmp_path, tmp_path, "data.resident=true", override)


def test_randaugment_is_refused() -> None:
    path = Path(__file__).parents[2] / "yamls/finetune/photos.yaml"
    overrides = ["data.source=.", "data.test_source=.", "model.encoder=random", "data.resident=true"]
    with pytest.raises(RecipeError, match=r"augmentation.randaugment=rand.*: expected null"):
        load_finetuning(path, [*overrides, "augmentation.randaugment=rand-m9-mstd0.5-inc1"])


def test_a_recipe_trains_on_them_and_goes_on_with_them_only(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=8)
    recipe = recipe_in(tmp_path, tmp_path, "data.resident=true")
    assert "data: to be converted" in dry_run(recipe)
    assert pretrain(recipe).encoder.is_file()
    assert "data: 16 images" in dry_run(recipe)
    with pytest.raises(RecipeError, match="^data.resident: .* started with another value"):
        prepare(recipe_in(tmp_path, tmp_path))
