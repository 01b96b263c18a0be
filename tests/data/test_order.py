from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import order_worker
import pytest
import torch
from numpy.typing import NDArray
from ranks import run_script
from streaming import MDSWriter
from torch import Tensor
from torchvision.io import encode_png

from aemim_algorithm.data.order import deal, global_batches
from aemim_algorithm.data.shards import COLUMNS
from aemim_algorithm.data.streaming import ImageStream

WORLDS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]  # machines, processes on each
CASES = list(itertools.product((24, 95, 100, 101), (1, 2, 3, 4), (12, 24)))


def epoch(samples: int) -> NDArray[np.int64]:
    return np.random.default_rng(samples).permutation(samples)


@pytest.mark.parametrize(("samples", "canonical", "size"), CASES)
def test_every_sample_at_most_once_and_less_than_a_batch_dropped(
    samples: int, canonical: int, size: int
) -> None:
    batches = global_batches(epoch(samples), canonical_nodes=canonical, global_batch_size=size)
    assert batches.shape == (samples // size, size)
    assert len(np.unique(batches)) == batches.size
    assert set(batches.ravel()) <= set(range(samples))


@pytest.mark.parametrize(("samples", "canonical", "size"), CASES)
def test_an_epoch_resumed_at_any_batch_is_its_tail(samples: int, canonical: int, size: int) -> None:
    options: dict[str, int] = {"canonical_nodes": canonical}
    whole = global_batches(epoch(samples), global_batch_size=size, **options)
    for done in range(len(whole) + 1):
        rest = global_batches(epoch(samples), global_batch_size=size, drop_first=done * size, **options)
        assert np.array_equal(rest, whole[done:])


def test_an_epoch_goes_on_with_batches_of_another_size_without_repeats_or_gaps() -> None:
    options: dict[str, int] = {"canonical_nodes": 2}
    before = global_batches(epoch(96), global_batch_size=12, **options)[:4]
    after = global_batches(epoch(96), global_batch_size=24, drop_first=48, **options)
    assert sorted([*before.ravel(), *after.ravel()]) == list(range(96))


def as_loaded(dealt: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the loaders of all ranks give: of each rank, a batch from each worker in turn, without the -1."""
    nodes, ranks, workers, _, batch_size = dealt.shape
    by_rank = []
    for node, rank in itertools.product(range(nodes), range(ranks)):
        samples = [dealt[node, rank, worker].ravel() for worker in range(workers)]
        queues = [s[s != -1].reshape(-1, batch_size) for s in samples]
        turns = itertools.zip_longest(*queues)
        by_rank.append(np.stack([batch for turn in turns for batch in turn if batch is not None]))
    return np.concatenate(by_rank, axis=1)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_the_global_batches_do_not_depend_on_machines_processes_and_workers(
    world: tuple[int, int], workers: int
) -> None:
    batches = global_batches(epoch(101), canonical_nodes=2, global_batch_size=8)
    dealt = deal(batches, nodes=world[0], ranks_per_node=world[1], workers=workers)
    assert dealt.dtype == np.int64
    assert np.array_equal(as_loaded(dealt), batches)


def test_an_epoch_at_its_end_is_empty() -> None:
    batches = global_batches(epoch(24), canonical_nodes=2, global_batch_size=8, drop_first=24)
    assert deal(batches, nodes=2, ranks_per_node=2, workers=3).shape == (2, 2, 3, 0, 2)


@pytest.mark.parametrize(("nodes", "canonical"), [(1, 4), (2, 4), (4, 4), (2, 2)])
def test_a_machine_reads_the_shares_of_its_own_canonical_nodes_only(nodes: int, canonical: int) -> None:
    samples = 96
    batches = global_batches(np.arange(samples), canonical_nodes=canonical, global_batch_size=16)
    dealt = deal(batches, nodes=nodes, ranks_per_node=2, workers=2)
    for node in range(nodes):
        read = dealt[node][dealt[node] != -1]
        assert set(read) == set(range(samples * node // nodes, samples * (node + 1) // nodes))


@pytest.mark.parametrize(
    ("size", "done", "name"), [(9, 0, "global batch size 9"), (8, 6, "sample in the epoch 6")]
)
def test_numbers_that_canonical_nodes_cannot_share_are_one_line(size: int, done: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} with canonical_nodes=4: expected a multiple[^\n]*$"):
        global_batches(epoch(100), canonical_nodes=4, global_batch_size=size, drop_first=done)


# Real processes, each with its own loader.

SAMPLES, GLOBAL = 203, order_worker.GLOBAL


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 images in several shards, each with its own label."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (SAMPLES, 3, 12, 12), generator=generator, dtype=torch.uint8)
    folder = tmp_path_factory.mktemp("order") / "set"
    writer = MDSWriter(out=str(folder), columns=COLUMNS, size_limit=2**15)
    for label, image in enumerate(images):
        writer.write({"image": encode_png(image).numpy().tobytes(), "label": label})
    writer.finish()
    assert len(list(folder.glob("*.mds"))) > 3
    return folder


def read_in_processes(shards: Path, out: Path, cases: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Of each number of processes, each case's global batches."""
    run_script(Path(order_worker.__file__), shards, out, json.dumps(cases))
    return {
        ranks: [*zip(*(torch.load(out / f"{ranks}-{rank}.pt") for rank in range(ranks)), strict=True)]
        for ranks in (1, 2, 4)
    }


def global_batches_of(by_rank: tuple[list[dict[str, Tensor]], ...]) -> list[dict[str, Tensor]]:
    return [
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*by_rank, strict=True)
    ]


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def cases() -> list[dict[str, Any]]:
    plain = [{"workers": 0}, {"workers": 2}]
    epochs = [{"workers": 2, "epochs": 2, "canonical_nodes": 2}]
    resumed = [{"workers": w, "canonical_nodes": 2, "resume": 5} for w in (0, 2)]
    again = [{"workers": 2, "canonical_nodes": 2, "resume": 5, "again_after": 4}]
    return plain + epochs + resumed + again


def test_one_two_and_four_processes_train_on_the_same_batches(shards: Path, tmp_path: Path) -> None:
    read = read_in_processes(shards, tmp_path, cases())
    alone, *several = ([global_batches_of(case) for case in read[ranks]] for ranks in (1, 2, 4))
    batches = SAMPLES // GLOBAL
    assert [len(case) for case in alone] == [batches, batches, 2 * batches, *[batches - 5] * 2, batches - 9]
    assert equal(alone[0], alone[1])
    one_epoch = alone[2][:batches]
    assert equal(alone[3], one_epoch[5:])
    assert equal(alone[4], one_epoch[5:])
    assert equal(alone[5], one_epoch[9:])
    labels = torch.cat([batch["label"] for batch in one_epoch])
    assert len(labels.unique()) == batches * GLOBAL
    for others in several:
        assert [equal(a, b) for a, b in zip(alone, others, strict=True)] == [True] * len(alone)


def test_a_batch_that_canonical_nodes_cannot_share_is_refused_before_training(shards: Path) -> None:
    options: dict[str, Any] = {"local": shards, "image_size": 8}
    with pytest.raises(ValueError, match=r"global batch size 9 with canonical_nodes=2"):
        ImageStream(batch_size=9, canonical_nodes=2, **options)
    stream = ImageStream(batch_size=9, **options)
    state = {"epoch": 0, "num_canonical_nodes": 2, "shuffle_seed": 1, "initial_physical_nodes": 1}
    with pytest.raises(ValueError, match=r"global batch size 9 with canonical_nodes=2"):
        stream.load_state_dict({**state, "sample_in_epoch": 18})
