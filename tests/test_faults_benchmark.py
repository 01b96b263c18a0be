"""The short form of ``benchmarks/faults.py``: a kill inside of a checkpoint, and one at a random moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("faults", monkeypatch)


def test_killed_runs_end_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "faults.py"), "--kills", "2", "--seed", "5", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived 2 of 2 kills" in done.stdout
    result = json.loads(out.read_text())
    inside, at_random = result["outcomes"]
    assert inside["moment"] == "half a checkpoint"
    assert ".checkpoint.partial/ep1-ba15-rank0.pt" in inside["found"]
    assert at_random["moment"].endswith(" s")
    assert (result["killed"], result["survived"], result["settings"]["processes"]) == (2, 2, 1)
    assert not list(tmp_path.glob("*/*"))  # but for an empty folder that Composer makes in each process


def test_a_first_start_that_ends_by_itself_does_not_count_as_killed(tmp_path: Path) -> None:
    """A patch that does not fit any more would else survive every kill."""
    # In a process of its own: a run is a fork that does, at its end, what its parent has registered.
    code = """
import sys
from pathlib import Path
import faults
wrong = faults.Launch(["pretrain", "no-such-recipe.yaml"], Path(sys.argv[1], "wrong"), 1)
outcome = faults.survive(wrong, Path(sys.argv[1]), "half a checkpoint")
print(outcome.killed, outcome.problem)
"""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "False the first start was not killed, it ended with code 2\n", done.stderr


def test_moments_are_all_used_and_repeat_with_the_seed(faults: ModuleType) -> None:
    twenty = faults.moments(20, 8.0, seed=0)
    assert twenty == faults.moments(20, 8.0, seed=0) != faults.moments(20, 8.0, seed=1)
    assert set(twenty[::2]) == set(faults.MOMENTS)
    assert all(0 < moment < 8 for moment in twenty[1::2])
    assert len(faults.moments(3, 8.0, seed=0)) == 3


def run_in(folder: Path, **changes: Any) -> Path:
    """What a run leaves, in the least that is looked at."""
    state: dict[str, Any] = {"model": {"weight": torch.ones(2)}, "optimizers": {"AdamW": {"step": 3}}}
    (folder / "run").mkdir(parents=True)
    torch.save({"state": state | changes}, folder / "run" / "latest-rank0.pt")
    torch.save({"weight": torch.ones(2)}, folder / "run" / "encoder.pt")
    return folder


@pytest.mark.parametrize(("changes", "named"), [
    ({"model": {"weight": torch.tensor([1.0, 1.0 + 2**-23])}}, "model.weight differs"),
    ({"optimizers": {"AdamW": {"step": 4}}}, "optimizers.AdamW.step differs"),
    ({}, ""),
])  # fmt: skip
def test_a_difference_of_one_bit_is_seen(
    faults: ModuleType, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    reference, other = run_in(tmp_path / "undisturbed"), run_in(tmp_path / "killed", **changes)
    assert faults.differences(other, reference) == named


@pytest.mark.parametrize("name", ["run/damaged-ep0-ba1-rank0.pt", "cache/.images.7.partial"])
def test_what_is_left_over_is_seen(faults: ModuleType, tmp_path: Path, name: str) -> None:
    reference, other = run_in(tmp_path / "undisturbed"), run_in(tmp_path / "killed")
    (other / name).parent.mkdir(exist_ok=True)
    (other / name).touch()
    assert Path(name).name in faults.differences(other, reference)
    (other / "run" / "encoder.pt").unlink()
    assert faults.differences(other, reference) == "no encoder.pt"


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--processes", "3"], ["--workers", "-1"]])
def test_bad_arguments(faults: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        faults.main(arguments)
    assert arguments[0] in capsys.readouterr().err
