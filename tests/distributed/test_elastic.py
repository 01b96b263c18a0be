"""A run that two processes saved goes on with one, two or four: the same state, samples and, nearly, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from elastic_worker import END, GLOBAL_BATCH, KINDS, SAVED_AT
from ranks import run_script
from torchvision.io import encode_png

from aemim_algorithm.data.shards import write_shards

WORKER = Path(__file__).with_name("elastic_worker.py")
IMAGES = 40  # five batches an epoch: the run is saved in the first and ends in the second


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the runs left."""
    folder = tmp_path_factory.mktemp("elastic")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 20, 20), generator=generator).byte()
    samples = [(encode_png(image).numpy().tobytes(), label) for label, image in enumerate(images)]
    write_shards(samples, folder / "shards", classes=tuple(map(str, range(IMAGES))), made_from={})
    run_script(WORKER, folder)
    return folder


def result(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def global_batches(batches: list[list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
    """What the processes got together, in the order of their ranks."""
    return [{name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]} for ranks in batches]


every_kind = pytest.mark.parametrize("kind", KINDS)
every_number = pytest.mark.parametrize("processes", [1, 2, 4])


@every_kind
@every_number
def test_what_is_loaded_is_what_was_saved(ended: Path, kind: str, processes: int) -> None:
    saved, loaded = result(ended, f"{kind}-whole")["saved"], result(ended, f"{kind}-{processes}")["loaded"]
    assert any("adversarial" in name and "exp_avg" in name for name in saved)
    assert all(
        value.abs().sum() > 0
        for name, value in saved.items()
        if "exp_avg" in name and "pos_embed" not in name
    )
    assert_same(
        {name: saved[name] for name in sorted(saved)}, {name: loaded[name] for name in sorted(loaded)}
    )


@every_kind
@every_number
def test_samples_go_on_without_repeats_or_gaps(ended: Path, kind: str, processes: int) -> None:
    """The same images, crops and seeds, in the same places of the global batch."""
    whole = global_batches(result(ended, f"{kind}-whole")["batches"])
    resumed = result(ended, f"{kind}-{processes}")
    rest = global_batches(resumed["batches"])
    assert len(whole) == END
    assert sorted(torch.cat([batch["label"] for batch in whole[:5]]).tolist()) == list(range(IMAGES))
    assert len(rest) == END - SAVED_AT
    for one, other in zip(whole[SAVED_AT:], rest, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert resumed["timestamp"] == END * GLOBAL_BATCH


@every_kind
@every_number
def test_the_end_is_the_same(ended: Path, kind: str, processes: int) -> None:
    """Bit for bit with as many processes, to rounding with others."""
    whole, resumed = result(ended, f"{kind}-whole"), result(ended, f"{kind}-{processes}")["end"]
    names = sorted(whole["end"])
    assert names == sorted(resumed)
    moved = [name for name in names if not torch.equal(whole["end"][name], whole["saved"][name])]
    assert len(moved) > 0.8 * len(names)
    if processes == 2:
        assert_same({name: whole["end"][name] for name in names}, {name: resumed[name] for name in names})
    for name in names:
        difference = (resumed[name].double() - whole["end"][name].double()).norm()
        assert difference <= 1e-5 * whole["end"][name].double().norm().clamp(min=1e-3), name


def test_aemim_comes_back_by_itself_under_ddp(ended: Path) -> None:
    whole, without = result(ended, "ddp-whole")["end"], result(ended, "ddp-2-without")["end"]
    parameters = [name for name in whole if ":" not in name]
    assert_same({name: whole[name] for name in parameters}, {name: without[name] for name in parameters})


def test_under_fsdp_it_has_to_be_passed_and_every_rank_says_so(ended: Path) -> None:
    for rank in (0, 1):
        line = (ended / f"refused{rank}.txt").read_text()
        assert "pass AEMIM to the Trainer" in line
        assert "\n" not in line
