"""One process, two with DDP or FSDP2 and four with HSDP train the same parameters, on the CPU with gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity_worker import CASES, HYBRID_CASES, untrained
from ranks import run_script
from settings import transformers_installed
from torch import Tensor

WORKER = Path(__file__).with_name("parity_worker.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parameters of every case and kind."""
    folder = tmp_path_factory.mktemp("parity")
    try:
        run_script(WORKER, folder, timeout=1200)
    finally:
        if (error := folder / "error.txt").exists():
            print(error.read_text())
    return folder


KINDS = [
    (kind, number)
    for kind in ("ddp", "fsdp2")
    for number, case in enumerate(CASES)
    if kind != case.reference and not (kind == "fsdp2" and case.strategy)
]
KINDS += [("hybrid", number) for number in HYBRID_CASES]


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("kind", "number"), KINDS, ids=[f"{kind}-{CASES[number]}" for kind, number in KINDS])
def test_parameters_do_not_depend_on_the_processes(kind: str, number: int, trained: Path) -> None:
    case = CASES[number]
    one = torch.load(trained / f"{case.reference}-{number}.pt", weights_only=True)
    other = torch.load(trained / f"{kind}-{number}.pt", weights_only=True)
    assert one.keys() == other.keys()
    assert_close(one, other)
    moved = {name for name, start in untrained(case).named_parameters() if not start.equal(one[name])}
    copies = {name for name in one if "adversarial" in name}
    assert copies
    assert copies | {name.replace(".adversarial", "") for name in copies} <= moved


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
def test_algorithms_that_leave_parameters_unused_need_forced_sync(trained: Path) -> None:
    """Every rank refuses DDP's own exchange alike; with forced_sync two processes train one's parameters."""
    states = []
    for rank in (0, 1):
        said, state = torch.load(trained / f"unused-{rank}.pt", weights_only=True)
        assert len(said) == 1
        assert "ddp_sync_strategy='forced_sync'" in said[0]
        states.append(state)
    expected = torch.load(trained / "one-unused.pt", weights_only=True)
    assert_close(expected, states[0])
    assert_close(states[0], states[1])


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
def test_attacked_images_stay_in_the_ball_in_bfloat16(trained: Path) -> None:
    """FSDP casts what a unit is called with; an image rounded to bfloat16 would leave the ball of 2/255."""
    distances = json.loads((trained / "bfloat16.json").read_text())
    assert len(distances) == 3
    assert all(1.9 < distance <= 2 + 1e-4 for distance in distances.values()), distances


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
def test_an_attack_that_ends_early_is_refused_under_fsdp(trained: Path) -> None:
    for rank in (0, 1):
        assert "under FSDP" in (trained / f"layer-{rank}.txt").read_text()


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        difference = (other[name].double() - value.double()).norm()
        assert difference <= 1e-5 * value.double().norm().clamp(min=1e-3), name
