from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from composer.core import Callback
from conftest import benchmark_script, fit, loader, tiny_mae

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of

TINY = [
    "model.embed_dim=24",
    "model.depth=1",
    "model.num_heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
]
SMALL = ["--recipe", "cifar10_tiny", "--batch", "8", "--batches", "3", "--repeats", "2", "--workers", "0"]


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("end_to_end", monkeypatch)


def in_this_process(contenders: Any, *, rounds: int, device: str, threads: int) -> dict[str, Any]:
    """What `turns.measure` returns, without starting processes."""
    steps = {name: make() for name, make in contenders.items()}
    parts = [{name: step() for name, step in steps.items()} for _ in range(rounds)]
    return {name: {"parts": [one[name] for one in parts], "peak_memory_bytes": 2**30} for name in steps}


def test_every_method_trains_from_shards(
    end_to_end: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(end_to_end, "measure", in_this_process)
    out, cache = tmp_path / "results" / "end.json", tmp_path / "cache"
    end_to_end.main([*SMALL, "--cache", str(cache), "--out", str(out), *TINY])
    printed, result = capsys.readouterr(), json.loads(out.read_text())
    assert list(result["measured"]) == ["plain", "Fast AEMIM", "AEMIM"]
    for method, row in result["measured"].items():
        assert f"| {method} |" in printed.out
        assert len(row["batch_seconds"]) == len(row["waiting_seconds"]) == 2
        assert all(
            0 < waiting < batch
            for waiting, batch in zip(row["waiting_seconds"], row["batch_seconds"], strict=True)
        )
    assert printed.err == ""
    assert result["settings"]["overrides"] == TINY
    assert (cache / "photos" / "train" / "index.json").exists()
    assert not list(tmp_path.rglob("*.pt"))


def test_a_turn_is_the_trainer_of_the_recipe(end_to_end: ModuleType, tmp_path: Path) -> None:
    options = end_to_end.parse([*SMALL, "--cache", str(tmp_path), *TINY, "global_batch_size=16"])
    overrides = [*end_to_end.overrides_of(options, "photos", tmp_path), f"save_folder={tmp_path / 'run'}"]
    path = end_to_end.recipes_of("cifar10_tiny")["Fast AEMIM"]
    recipe = end_to_end.load_recipe(path, overrides)
    trainer = end_to_end.trainer_of(recipe, end_to_end.BatchClock(3, "cpu"))
    (algorithm,) = (one for one in trainer.state.algorithms if isinstance(one, AEMIM))
    assert (algorithm.steps, algorithm.present("adversarial_ratio")) == (1, 0.25)
    assert adapters_of(trainer.state.model)
    for _ in range(2):  # a second time from the first batch, and nothing is skipped
        trainer.fit(duration="3ba", reset_time=True)
        assert trainer.state.timestamp.batch == 3
        assert trainer.state.timestamp.sample == 3 * 16
    trainer.close()


class Pace(Callback):
    """Sets the clock forward by what loading and training of each batch is to take."""

    def __init__(self, seconds: dict[int, tuple[float, float]]) -> None:
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self) -> float:
        return self.now

    def before_dataloader(self, state: Any, logger: Any) -> None:
        self.now += self.seconds[int(state.timestamp.batch)][0]

    def before_forward(self, state: Any, logger: Any) -> None:
        self.now += self.seconds[int(state.timestamp.batch)][1]


def test_the_clock_leaves_out_the_first_batch_and_tells_waiting_from_training(
    end_to_end: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace({0: (50.0, 20.0), 1: (1.0, 10.0), 2: (3.0, 12.0)})
    monkeypatch.setattr(sys.modules["batch_clock"], "time", pace)
    clock = end_to_end.BatchClock(3, "cpu")
    # The clock comes first, so that what the other one adds lies between its two events.
    fit(tiny_mae(), callbacks=[clock, pace], train_dataloader=loader(count=24), duration="3ba")
    assert clock.seconds() == {"batch": 13.0, "waiting": 2.0}


def test_the_table_pairs_ratios_within_a_round(end_to_end: ModuleType) -> None:
    def row(batch: list[float], waiting: list[float]) -> dict[str, Any]:
        return {"batch_seconds": batch, "waiting_seconds": waiting, "peak_memory_bytes": 2**31}

    measured = {"plain": row([1.0, 10.0], [0.5, 1.0]), "AEMIM": row([2.0, 30.0], [0.2, 3.0])}
    lines = end_to_end.table(measured, batch=8).splitlines()
    assert lines[2] == (
        "| plain | 5.500 (1.000–10.000) | 1.00 (1.00–1.00) | 0.750 (0.500–1.000) | 30.0% | 1.5 | 2.00 |"
    )
    assert "| 2.50 (2.00–3.00) | 1.600 (0.200–3.000) | 10.0% |" in lines[3]


def test_recipes_come_with_and_without_aemim(end_to_end: ModuleType) -> None:
    names = end_to_end.known_recipes()
    assert {"imagenet_vit_base_300ep", "imagenet_simmim_swin_base_100ep", "cifar10_tiny"} < set(names)
    assert list(end_to_end.recipes_of("imagenet_simmim_swin_base_100ep")) == ["plain", "AEMIM"]
    for name in names:
        assert "plain" in end_to_end.recipes_of(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "resnet"], "invalid choice: 'resnet'"),
        (["--batches", "1"], "--batches=1: expected at least 2"),
        (["--micro-batch", "9", "--batch", "8"], "--micro-batch=9: expected 1 to --batch=8"),
        (["--images", "/nowhere"], "data.source=/nowhere: expected photos, an existing image folder"),
        ([*SMALL, "--batches", "1000", *TINY], "--batches=1000: expected at most 475, as there are 3800"),
        ([*SMALL, "optimiser.lr=1"], "optimiser"),
    ],
)
def test_bad_arguments(
    end_to_end: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main([*arguments, "--out", str(tmp_path / "end.json")])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
