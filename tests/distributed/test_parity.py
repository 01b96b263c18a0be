"""One process, two with DDP and two with FSDP2 train the same parameters, on the CPU with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_worker import CASES, Case, setting_of
from settings import transformers_installed

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parameters of every case and kind."""
    folder = tmp_path_factory.mktemp("parity")
    launchers = [[], ["-m", "composer.cli.launcher", "-n", "2"]]
    for launcher in launchers:
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        error = folder / "error.txt"
        assert done.returncode == 0, error.read_text() if error.exists() else done.stderr[-2000:]
    return folder


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_parameters_do_not_depend_on_the_processes(kind: str, number: int, trained: Path) -> None:
    one = torch.load(trained / f"one-{number}.pt", weights_only=True)
    two = torch.load(trained / f"{kind}-{number}.pt", weights_only=True)
    assert one.keys() == two.keys()
    start = setting_of(CASES[number]).build().state_dict()
    for name, value in one.items():
        difference = (two[name].double() - value.double()).norm()
        assert difference <= 1e-5 * value.double().norm().clamp(min=1e-3), name
    assert any(
        not torch.allclose(value, start[name], rtol=1e-3) for name, value in one.items() if name in start
    )


def test_the_cases_are_those_that_can_differ() -> None:
    assert {case.ratio for case in CASES} == {1.0, 0.25}
    assert {case.micro_batches for case in CASES} == {1, 2}
    assert all(isinstance(case, Case) for case in CASES)
