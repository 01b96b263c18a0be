"""The sweep over methods, models and micro-batches, and its tables."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script
from test_cost_steps_benchmark import MODEL, tiny


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("cost", monkeypatch)


@pytest.fixture
def part(cost: ModuleType) -> Callable[[str], ModuleType]:
    """A module that the benchmark is made of."""
    return lambda name: sys.modules[name]


@pytest.fixture
def training(cost: ModuleType) -> ModuleType:
    return sys.modules["training"]


def test_peak_memory_sees_what_was_freed(part: Any) -> None:
    turns = part("turns")
    before = turns.peak_memory("cpu")
    # Larger than what the process may hold of earlier peaks.
    block = torch.ones(before // 4 + 2**26)
    del block
    assert turns.peak_memory("cpu") >= before + 2**27


def fake_measure(deaths: set[str], retries: set[str]) -> Callable[..., dict[str, Any]]:
    """What `turns.measure` would say of contenders that are run in this process."""

    def measure(contenders: Any, *, rounds: int, device: str, threads: int) -> dict[str, Any]:
        if deaths & set(contenders):
            raise SystemExit("died")
        rows: dict[str, Any] = {}
        for name, make in contenders.items():
            step = make()
            parts = dict([step() or {} for _ in range(rounds)][-1])
            if name in retries and len(contenders) > 1:
                parts["allocation_retries"] = 3.0
            rows[name] = {"seconds": [1.0] * rounds, "parts": [parts] * rounds, "peak_memory_bytes": 2**30}
        return rows

    return measure


def out_of_memory(message: str = "CUDA out of memory. Tried to allocate") -> Any:
    raise torch.OutOfMemoryError(message)


def cpu_allocator() -> Any:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 10 bytes")


def a_bug() -> Any:
    raise RuntimeError("shapes do not match")


def nothing() -> None:
    pass


def test_out_of_memory_is_recorded_and_the_rest_goes_on(
    part: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enduring = part("enduring")
    monkeypatch.setattr(enduring, "measure", fake_measure(set(), retries={"crowded"}))
    contenders = {
        "plain": lambda: nothing,
        "crowded": lambda: nothing,
        "no room for the model": out_of_memory,
        "no room for a step": lambda: cpu_allocator,
    }
    measured = enduring.measure_enduring(contenders, rounds=2, device="cpu", threads=1)
    assert measured["no room for the model"] == {"failed": "out of memory", "alone": True}
    assert measured["no room for a step"] == {"failed": "out of memory", "alone": True}
    assert measured["plain"]["seconds"] == [1.0, 1.0]
    assert measured["plain"]["built_memory_bytes"] > 2**20
    assert [measured[name]["alone"] for name in ("plain", "crowded")] == [False, True]
    assert "CUDA out of memory. Tried" in capsys.readouterr().err


def test_a_contender_that_dies_does_not_end_the_others(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    enduring = part("enduring")
    monkeypatch.setattr(enduring, "measure", fake_measure({"killed"}, set()))
    contenders = {"plain": lambda: nothing, "killed": lambda: nothing}
    measured = enduring.measure_enduring(contenders, rounds=1, device="cpu", threads=1)
    assert measured["killed"] == {"failed": "died", "alone": True}
    assert measured["plain"]["seconds"] == [1.0]


def test_an_error_that_is_not_of_memory_is_not_hidden(part: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        part("enduring").endured(lambda: a_bug, "cpu")()


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    place = {"model": "m", "precision": "fp32", "micro_batch": 4, "alone": False}
    flops = {
        "counted": {"plain": 10.0, "AEMIM": 27.0},
        "bound": {"plain": 10.0, "AEMIM": 26.0, "naive": 28.0},
    }
    return {
        "measured": [place | row for row in rows],
        "flops_per_image": {"m": flops},
        "breakdown": [],
        "overhead": [],
    }


def row(method: str, seconds: list[float], peak: int) -> dict[str, Any]:
    memory = {"peak_memory_bytes": peak * 2**30, "built_memory_bytes": 2**30}
    return {"method": method, "seconds": seconds} | memory


def test_the_table_pairs_ratios_within_a_round(part: Any) -> None:
    rows = [row("plain", [1.0, 10.0, 2.0], 2), row("AEMIM", [3.0, 20.0, 5.0], 3)]
    lines = part("cost_tables").tables(result_of(rows)).splitlines()
    assert lines[2].startswith("| m | fp32 | 4 | plain | 2.000 (1.000–10.000) | 1.00 (1.00–1.00) |")
    assert lines[3] == (
        "| m | fp32 | 4 | AEMIM | 5.000 (3.000–20.000) | 2.50 (2.00–3.00) | 2.700 | 2.600 | 0.8 "
        "| 3.00 | 1.50 | 2.00 | 2.00 |"
    )
    assert lines[-1].endswith("2.800 × plain.")


def test_the_table_says_what_ran_out_of_memory(part: Any) -> None:
    failed = {"method": "plain", "failed": "out of memory", "alone": True}
    lines = part("cost_tables").tables(result_of([failed, row("AEMIM", [3.0], 3)])).splitlines()
    assert lines[2].startswith("| m | fp32 | 4 | plain | out of memory | – | 1.000 | 1.000 | – |")
    assert "| AEMIM | 3.000 (3.000–3.000) | – | 2.700 |" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_passes_by_hand_are_compared_within_rounds(part: Any) -> None:
    rows = [row("plain", [1.0, 1.0], 2), row("AEMIM", [3.0, 5.0], 3), row("AEMIM, bare", [2.0, 5.0], 3)]
    text = part("cost_tables").tables(result_of(rows))
    assert "| m | fp32 | 4 | AEMIM | 1.250 (1.000–1.500) |" in text


def test_a_sweep_from_the_command_line(
    cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "cost.json"
    # A process spends seconds on its imports: two of them show what all would.
    arguments = ["--models", MODEL, "--micro-batch", "4", "--device", "cpu", "--methods", "Fast AEMIM"]
    arguments += ["--skip", "breakdown", "overhead"]
    cost.main([*arguments, "--repeats", "2", "--threads", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [one["method"] for one in result["measured"]] == ["plain", "Fast AEMIM"]
    for one in result["measured"]:
        assert f"| {MODEL} | fp32 | 4 | {one['method']} |" in printed
        assert len(one["seconds"]) == 2
        assert min(one["seconds"]) > 0
        assert one["peak_memory_bytes"] > one["built_memory_bytes"] > 2**27
        assert not one["alone"]
    assert result["command"].startswith(f"python benchmarks/cost.py --models {MODEL}")
    assert result["settings"]["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"cpu", "logical_cores", "memory_gib"} <= set(result["hardware"])
    assert not multiprocessing.active_children()


def test_a_result_has_parts_and_overhead(
    cost: ModuleType, part: Any, training: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the command line has it, except that all contenders run in this process."""
    measure = fake_measure(set(), set())
    for module in ("enduring", "overhead"):
        monkeypatch.setattr(part(module), "measure", measure)
    monkeypatch.setattr(part("breakdown"), "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    methods = ["--methods", "Fast AEMIM", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    options = cost.parse([*methods, "--micro-batch", "4", "--out", str(tmp_path / "cost.json")])
    result: dict[str, Any] = {"flops_per_image": {}, "measured": [], "breakdown": [], "overhead": []}
    cost.measure_all(options, result, [tiny(training)])
    assert result == json.loads((tmp_path / "cost.json").read_text())
    assert list(result["breakdown"][0]["seconds"]) == ["plain", "Fast AEMIM"]
    assert [one["method"] for one in result["overhead"]] == ["Fast AEMIM"]
    assert len(result["overhead"][0]["seconds"]) == part("overhead").ROUNDS
    text = part("cost_tables").tables(result)
    assert f"| {MODEL} | fp32 | 4 | Fast AEMIM | 0.0 (0.0–0.0) | 0.00% |" in text
    assert "| clean forward | attack | adversarial forward |" in text


def test_parts_and_overhead_are_measured_once_a_model(
    cost: ModuleType, part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts on the largest micro-batch at which nothing failed, the overhead on the smallest."""

    def sweep(settings: Any, methods: list[str], repeats: int) -> list[dict[str, Any]]:
        place = {"model": settings.model, "precision": "fp32", "micro_batch": settings.micro_batch}
        failed = {"failed": "out of memory", "alone": True} if settings.micro_batch == 12 else {}
        return [
            place | row("plain", [1.0], 1),
            place | row("AEMIM", [1.0], 1) | failed,
        ]

    calls: list[tuple[str, int]] = []

    def note(name: str, result: Any) -> Callable[..., Any]:
        def noted(*args: Any, **_: Any) -> Any:
            calls.append((name, next(one.micro_batch for one in args if hasattr(one, "micro_batch"))))
            return result

        return noted

    monkeypatch.setattr(cost, "sweep", sweep)
    monkeypatch.setattr(cost, "flops_of_methods", note("flops", {}))
    monkeypatch.setattr(cost, "breakdowns", note("breakdown", {}))
    monkeypatch.setattr(cost, "overhead", note("overhead", []))
    options = cost.parse(["--micro-batch", "8", "4", "12", "--device", "cpu", "--out", str(tmp_path / "o")])
    result = {"flops_per_image": {}, "measured": [], "breakdown": [], "overhead": []}
    Settings = part("training").Settings  # noqa: N806
    cost.measure_all(options, result, [Settings(MODEL, n, "fp32", "cpu", 1, 0) for n in (8, 4, 12)])
    assert calls == [("flops", 8), ("breakdown", 8), ("overhead", 4)]
    assert len(result["measured"]) == 6


def test_methods_that_are_not_asked_for_depend_on_model_and_device(cost: ModuleType) -> None:
    options = argparse.Namespace(methods=None, device="cuda")
    assert cost.methods_for("simmim_swin_base_patch4_window6", options) == ["plain", "AEMIM T=1", "AEMIM"]
    everything = cost.methods_for("mae_vit_base_patch16", options)
    assert {"plain", "AEMIM T=3", "AEMIM, separate", "Fast AEMIM, bare"} < set(everything)
    options.methods = ["AEMIM", "plain"]
    assert cost.methods_for("mae_vit_base_patch16", options) == ["plain", "AEMIM"]


def test_a_worker_that_dies_is_one_clear_line(part: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SystemExit, match=r"the AEMIM process died .* smaller --micro-batch"):
        part("turns")._receive(ours, "AEMIM")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "4", "6"], "--micro-batch=6: expected a multiple of 4"),
        (["--repeats", "0"], "--repeats=0: expected at least 1"),
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--methods", "FGSM"], "invalid choice: 'FGSM'"),
    ],
)
def test_bad_arguments(
    cost: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cost.main([*arguments, "--out", str(tmp_path / "cost.json")])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
