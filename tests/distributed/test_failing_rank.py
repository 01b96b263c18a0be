"""An exception on one of two ranks ends both, soon, with its message in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_worker import FAILING
from torchvision.io import write_png

WORKER = Path(__file__).with_name("failing_worker.py")
RECIPE = """
model: {name: mae_vit_tiny_patch4, image_size: 16, embed_dim: 16, depth: 1, num_heads: 2, decoder_dim: 16,
        decoder_depth: 1, decoder_heads: 2}
data: {source: images, cache: cache, crop_scale: [0.5, 1.0], workers: 0}
algorithms: {aemim: }
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 2ba, min_learning_rate: 0.0}
max_duration: 2ep
global_batch_size: 8
device: cpu
"""
SAID = {
    "loss": "the loss of rank 1 is at fault",
    "loader": "aemim: the loader of rank 1 is at fault",
    "memory": "aemim: out of memory; lower device_train_microbatch_size",
    "disk": "aemim: a checkpoint could not be written to disk (No space left on device",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    generator = torch.Generator().manual_seed(0)
    for number in range(32):
        path = folder / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.randint(0, 256, (3, 20, 20), generator=generator).byte(), str(path))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def ends(folder: Path) -> list[dict[str, Any]]:
    """How the ranks ended, nobody ending one for the other's sake."""
    done = run(folder, str(WORKER), "tiny.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", SAID)
def test_both_ranks_end_by_themselves(ends: list[dict[str, Any]], case: str) -> None:
    waiting, failing = sorted(
        (end for end in ends if end["case"] == case), key=lambda end: end["rank"] == FAILING[case]
    )
    assert failing["code"] == 1, failing["said"]
    assert SAID[case] in failing["said"]
    assert waiting["code"] not in (None, 0), "it hung, or ended as if nothing had been"


def test_nobody_waits_for_what_the_first_rank_does_at_the_end(ends: list[dict[str, Any]]) -> None:
    """Exporting and evaluating may take longer than the processes wait for one another."""
    assert [(end["code"], end["said"]) for end in ends if end["case"] == "slow end" and end["code"]] == []


def test_the_launcher_shows_the_message(folder: Path) -> None:
    done = run(folder, "-m", "composer.cli.launcher", "-n", "2", str(WORKER), "tiny.yaml", "loader")
    assert done.returncode != 0
    assert SAID["loader"] in done.stdout + done.stderr
