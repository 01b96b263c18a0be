"""One process, two with DDP and two with FSDP2 train the same parameters, on the CPU with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_worker import CASES, untrained
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
    for name, value in one.items():
        difference = (two[name].double() - value.double()).norm()
        assert difference <= 1e-5 * value.double().norm().clamp(min=1e-3), name
    moved = {
        name for name, start in untrained(CASES[number]).named_parameters() if not start.equal(one[name])
    }
    copies = {name for name in one if "adversarial" in name}
    assert copies
    assert copies | {name.replace(".adversarial", "") for name in copies} <= moved
