from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor
from torchvision.io import encode_png

from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.data.streaming import (
    EvaluationImages,
    ImageStream,
    class_names,
    evaluation_data,
    train_data,
)

SAMPLES, SIDE, BATCH = 42, 12, 8
OPTIONS: dict[str, Any] = {"image_size": SIDE, "batch_size": BATCH}
Batches = list[tuple[Tensor, Tensor]]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES, 3, SIDE, SIDE)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 images, each with its own label."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    samples = ((encode_png(image).numpy().tobytes(), i) for i, image in enumerate(images()))
    write_shards(samples, folder, classes=("a", "b"), made_from={})
    return folder


def loader(local: Path, **options: Any) -> Any:
    options = {**OPTIONS, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, **options}
    return train_data(local, **options).dataloader


def read(batches: Iterable[dict[str, Tensor]]) -> Batches:
    return [(batch["image"], batch["label"]) for batch in batches]


def same(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_an_epoch_gives_whole_uint8_batches_of_distinct_samples(shards: Path) -> None:
    batches = read(loader(shards))
    assert len(batches) == SAMPLES // BATCH
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels.unique()) == len(labels) == SAMPLES // BATCH * BATCH
    assert not labels.equal(labels.sort().values)
    for batch, _ in batches:
        assert batch.dtype == torch.uint8
        assert batch.shape == (BATCH, 3, SIDE, SIDE)


def test_workers_change_nothing_over_two_epochs(shards: Path) -> None:
    alone, together = loader(shards), loader(shards, workers=2)
    for _ in range(2):
        assert same(read(alone), read(together))


def test_another_epoch_or_seed_has_other_crops_of_the_same_samples(shards: Path) -> None:
    options = {"shuffle": False}
    training, other = loader(shards, **options), loader(shards, seed=18, **options)
    first, second, seeded = read(training), read(training), read(other)
    for variant in (second, seeded):
        for (crops, labels), (other_crops, other_labels) in zip(first, variant, strict=True):
            assert labels.equal(other_labels)
            changed = (crops != other_crops).flatten(1).any(1)
            assert changed.float().mean() > 0.8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_resumed_in_mid_epoch_gives_the_remaining_batches(
    shards: Path, workers: int, epoch: int
) -> None:
    uninterrupted = loader(shards)
    for _ in range(epoch):
        read(uninterrupted)
    iterator = iter(uninterrupted)
    for _ in range(2):
        next(iterator)
    state = uninterrupted.dataset.state_dict(2 * BATCH, True)  # what Composer saves
    remaining, next_epoch = read(iterator), read(uninterrupted)
    resumed = loader(shards, workers=workers)
    resumed.dataset.load_state_dict(state)
    assert same(read(resumed), remaining)
    assert same(read(resumed), next_epoch)


def seeds(data: Any) -> dict[int, int]:
    """Of each sample of an epoch, by its label."""
    return {
        int(label): int(seed)
        for batch in data
        for label, seed in zip(batch["label"], batch["seed"], strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_has_a_seed_of_its_own_in_each_epoch_and_run(shards: Path, workers: int) -> None:
    options: dict[str, Any] = {"shuffle": False, "workers": workers}
    data, other = loader(shards, **options), loader(shards, seed=18, **options)
    first, second, other_run = seeds(data), seeds(data), seeds(other)
    shuffled = seeds(loader(shards))
    assert next(iter(data))["seed"].dtype == torch.int64
    everything = [*first.values(), *second.values(), *other_run.values()]
    assert len(set(everything)) == 3 * (SAMPLES // BATCH * BATCH)
    assert any(seed < 0 for seed in everything)
    assert max(abs(seed) for seed in everything) > 2**60
    common = first.keys() & shuffled.keys()
    assert {i: first[i] for i in common} == {i: shuffled[i] for i in common}


def test_the_length_is_that_of_an_epoch_where_samples_do_not_divide(tmp_path: Path) -> None:
    samples = [(encode_png(image).numpy().tobytes(), 0) for image in images()[:23]]
    write_shards(iter(samples), tmp_path / "set", classes=("a",), made_from={})
    data = loader(tmp_path / "set")
    assert len(data) == len(read(data)) == 2
    assert len(data.dataset) == 16


def test_a_checkpoint_brings_its_seed(shards: Path) -> None:
    first = loader(shards, seed=3)
    iterator = iter(first)
    next(iterator)
    state, remaining = first.dataset.state_dict(BATCH, True), read(iterator)
    resumed = loader(shards, seed=4)
    resumed.dataset.load_state_dict(state)
    assert same(read(resumed), remaining)


def test_indexing_gives_the_crop_of_the_current_epoch(shards: Path) -> None:
    stream = ImageStream(local=shards, shuffle=False, **OPTIONS)
    iterated = list(stream)
    assert [sample["label"] for sample in iterated] == list(range(SAMPLES // BATCH * BATCH))
    for index in (0, 7, 39):
        assert stream[index]["image"].equal(iterated[index]["image"])
        assert stream[index]["seed"] == iterated[index]["seed"]
    assert [sample["label"] for sample in stream[3:5]] == [3, 4]


def test_training_leaves_the_global_generators_alone(shards: Path) -> None:
    data = loader(shards)
    read(data)
    # A DataLoader draws its workers' base seed; the samples themselves must draw nothing.
    before = [torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())]
    list(data.dataset)
    assert [torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())] == before


def test_workers_of_a_collected_loader_end_at_once(shards: Path) -> None:
    spec = train_data(shards, mean=IMAGENET_MEAN, std=IMAGENET_STD, workers=2, **OPTIONS)
    data: Any = spec.dataloader
    read(data)
    workers, cycle = data._iterator._workers, [spec, data]
    cycle.append(cycle)
    start = time.monotonic()
    del spec, data, cycle
    gc.collect()
    assert time.monotonic() - start < 4  # a worker that was not told to stop is waited for 5 s
    assert not any(worker.is_alive() for worker in workers)


def test_two_streams_on_one_folder_do_not_disturb_each_other(shards: Path) -> None:
    expected = read(loader(shards))
    one, other = loader(shards), loader(shards)
    pairs = list(zip(one, other, strict=True))
    assert same(read(pair[0] for pair in pairs), expected)
    assert same(read(pair[1] for pair in pairs), expected)


def test_shards_are_downloaded_from_a_remote(shards: Path, tmp_path: Path) -> None:
    expected = read(loader(shards))
    assert same(read(loader(tmp_path / "cache", remote=str(shards))), expected)
    assert (tmp_path / "cache" / "index.json").is_file()


def test_composer_gets_a_normalising_data_spec(shards: Path) -> None:
    spec = train_data(shards, mean=IMAGENET_MEAN, std=IMAGENET_STD, **OPTIONS)
    batch = next(iter(spec.dataloader))
    assert spec.get_num_samples_in_batch(batch) == BATCH
    halves = spec.split_batch(batch, BATCH // 2)
    normalized = spec.microbatch_transforms(halves[1])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    restored = (normalized["image"] * std + mean) * 255
    torch.testing.assert_close(restored.round().to(torch.uint8), batch["image"][BATCH // 2 :])
    assert normalized["label"].equal(batch["label"][BATCH // 2 :])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_once_in_order(shards: Path, workers: int) -> None:
    batches = list(evaluation_data(shards, image_size=SIDE, batch_size=16, workers=workers))
    assert [len(labels) for _, labels in batches] == [16, 16, 10]
    assert torch.cat([image for image, _ in batches]).equal(images())
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(range(SAMPLES))
    smaller, _ = EvaluationImages(shards, image_size=8)[0]
    assert smaller.shape == (3, 8, 8)


def write_folder(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]]) -> None:
    writer = MDSWriter(out=str(folder), columns=columns)
    for sample in samples:
        writer.write(sample)
    writer.finish()


def bad_folder(kind: str, shards: Path, folder: Path) -> None:
    if kind == "no index":
        folder.mkdir()
    elif kind == "empty":
        write_folder(folder, {"image": "bytes", "label": "int"}, [])
    elif kind == "columns":
        write_folder(folder, {"picture": "bytes"}, [{"picture": b"x"}] * BATCH)
    else:
        shutil.copytree(shards, folder)
        shard = folder / "shard.00000.mds"
        if kind == "missing shard":
            shard.unlink()
        elif kind == "cut shard":
            shard.write_bytes(shard.read_bytes()[:-100])
        elif kind == "index":
            (folder / "index.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no index", r"no index\.json"),
        ("missing", r"no index\.json"),
        ("empty", "no samples"),
        ("columns", r"columns \['picture'\], expected \['image', 'label'\]"),
        ("missing shard", r"shard\.00000\.mds is missing"),
        ("cut shard", r"shard\.00000\.mds is missing or cut"),
        ("index", "no index of shards"),
    ],
)
def test_folders_that_cannot_be_read_are_one_line(
    shards: Path, tmp_path: Path, kind: str, message: str
) -> None:
    folder = tmp_path / "folder"
    if kind != "missing":
        bad_folder(kind, shards, folder)
    for build in (loader, lambda local: evaluation_data(local, **OPTIONS)):
        with pytest.raises(ValueError, match=message) as caught:
            build(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def test_wrong_columns_at_a_remote_are_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "far", {"picture": "bytes"}, [{"picture": b"x"}] * BATCH)
    with pytest.raises(ValueError, match=r"columns \['picture'\]"):
        loader(tmp_path / "near", remote=str(tmp_path / "far"))


def test_fewer_samples_than_a_batch_are_one_line(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"has 42 samples, .*fewer than batch_size=43"):
        loader(shards, batch_size=43)
    assert len(read(loader(shards, batch_size=42))) == 1


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    broken = [{"image": b"no image", "label": 0}] * BATCH
    write_folder(tmp_path / "set", {"image": "bytes", "label": "int"}, broken)
    with pytest.raises(ValueError, match=r"set, sample \d \(shard\.00000\.mds\): image: 8 bytes"):
        read(loader(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"set, sample 0 \(shard\.00000\.mds\): image: 8 bytes"):
        list(evaluation_data(tmp_path / "set", **OPTIONS))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("image_size", 0),
        ("workers", -1),
        ("seed", -1),
        ("canonical_nodes", 0),
        ("max_broken", -1),
        ("crop_scale", (0.0, 1.0)),
        ("mean", (0.5,)),
        ("std", (0.0, 0.5, 0.5)),
    ],
)
def test_arguments_out_of_range_are_named(shards: Path, option: str, value: Any) -> None:
    name = "scale" if option == "crop_scale" else option
    with pytest.raises(ValueError, match=name):
        loader(shards, **{option: value})


def test_class_names_are_those_of_the_conversion(shards: Path, tmp_path: Path) -> None:
    assert class_names(shards) == ["a", "b"]
    for text in (None, "{}", "no json"):
        if text is not None:
            (tmp_path / "conversion.json").write_text(text)
        with pytest.raises(ValueError, match=r"no readable conversion\.json"):
            class_names(tmp_path)
