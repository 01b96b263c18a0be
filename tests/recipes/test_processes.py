"""A recipe trains on the same samples with the same crops, masks, choices and noise at any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes_worker import CASES, losses
from ranks import run_script
from small_runs import recipe_in, write_images

WORKER = Path(__file__).with_name("processes_worker.py")
AEMIM = "algorithms={aemim: {steps: 2, adversarial_ratio: 0.25}}"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_do_not_depend_on_processes_and_micro_batches(tmp_path: Path) -> None:
    """At four processes of two samples some have nothing to attack: two of eight are chosen."""
    write_images(tmp_path / "images/train", per_class=16)
    recipe_in(tmp_path, tmp_path / "images")  # writes the file
    shared = [f"data.source={tmp_path}/images/train", f"data.cache={tmp_path}/cache", AEMIM]
    # Adam turns a gradient that is only rounding into a whole step; a large epsilon is not ours to set.
    shared += ["optimizer.base_learning_rate=1e-3", "max_duration=2ep"]
    one = losses(tmp_path / "tiny.yaml", [*shared, f"save_folder={tmp_path}/one"])
    other = losses(tmp_path / "tiny.yaml", [*shared, f"save_folder={tmp_path}/other", "seed=18"])
    assert one.keys() == {"total", "clean", "adversarial"}
    assert len(one["total"]) == 8
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(one["total"], other["total"], strict=True))
    run_script(WORKER, tmp_path / "tiny.yaml", tmp_path, *shared)
    for processes, micro, _ in CASES:
        name = f"{processes}-{micro}"
        got = json.loads((tmp_path / f"{name}.json").read_text())
        for kind, values in one.items():
            assert got[kind] == pytest.approx(values, rel=2e-4), (name, kind)
