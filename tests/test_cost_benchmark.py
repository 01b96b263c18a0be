from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import benchmark_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("cost", monkeypatch)


@pytest.fixture
def training(cost: ModuleType) -> ModuleType:
    return sys.modules["training"]


@pytest.fixture
def turns(cost: ModuleType) -> ModuleType:
    return sys.modules["turns"]


def test_vit_base_has_the_bounds_of_the_design(training: ModuleType) -> None:
    settings = training.Settings("mae_vit_base_patch16", 4, "fp32", "cpu", 1, 0)
    bound = training.bound_flops(settings)
    assert bound["AEMIM"] / bound["MAE"] == pytest.approx(2.60, abs=0.01)
    assert bound["Fast AEMIM"] / bound["MAE"] == pytest.approx(1.33, abs=0.01)
    # Without the patch embedding and biases, per token of width d: 24·d² and 4·d·tokens.
    encoder = 12 * 50 * (24 * 768**2 + 4 * 768 * 50)
    decoder = 8 * 197 * (24 * 512**2 + 4 * 512 * 197)
    assert bound["MAE"] == pytest.approx(3 * (encoder + decoder), rel=0.03)
    assert bound["naive"] - bound["AEMIM"] == pytest.approx(encoder, rel=0.03)


def test_a_step_does_no_pass_that_the_algorithm_does_not_need(training: ModuleType) -> None:
    settings = training.Settings("mae_vit_tiny_patch4", 4, "fp32", "cpu", 1, 0)
    bound = training.bound_flops(settings)
    bound.pop("naive")
    assert training.counted_flops(settings) == bound


def test_flops_are_those_of_a_product_done_by_hand(training: ModuleType) -> None:
    left, right = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
    assert training.flops_of(lambda: left @ right) == 2 * (2 * 3 * 5 * 7)
    image = torch.ones(4, 5, requires_grad=True)
    layer = torch.nn.Linear(5, 6)
    # Forward, and backward to the image: the weights' gradient is not asked for.
    attack = training.flops_of(lambda: torch.autograd.grad(layer(image).sum(), image))
    assert attack == 2 * (2 * 4 * 5 * 6)


def test_every_method_trains_every_parameter_but_the_positions(training: ModuleType) -> None:
    settings = training.Settings("mae_vit_tiny_patch4", 4, "fp32", "cpu", 1, 0)
    for method in training.METHODS:
        loop = training.Training(method, settings)
        before = {name: value.detach().clone() for name, value in loop.model.named_parameters()}
        loop.step()
        still = {name for name, value in loop.model.named_parameters() if torch.equal(value, before[name])}
        assert still == {"encoder.pos_embed", "decoder.pos_embed"}, method
        assert any("adversarial" in name for name in before) == (method != "MAE")


def test_peak_memory_sees_what_was_freed(turns: ModuleType) -> None:
    before = turns.peak_memory("cpu")
    # Larger than what the process may hold of earlier peaks.
    block = torch.ones(before // 4 + 2**26)
    del block
    assert turns.peak_memory("cpu") >= before + 2**27


def test_the_table_pairs_ratios_within_a_round(cost: ModuleType) -> None:
    def row(seconds: list[float], peak: int) -> dict[str, object]:
        return {"seconds": seconds, "peak_memory_bytes": peak * 2**30}

    measured = {
        "fp32": {"MAE": row([1.0, 10.0, 2.0], 2), "AEMIM": row([3.0, 20.0, 5.0], 3)},
    }
    flops = {
        "counted": {"MAE": 10.0, "AEMIM": 27.0},
        "bound": {"MAE": 10.0, "AEMIM": 26.0, "naive": 28.0},
    }
    lines = cost.table(measured, flops).splitlines()
    assert lines[2].startswith("| fp32 | MAE | 2.00 (1.00–10.00) | 1.00 (1.00–1.00) |")
    assert lines[3] == (
        "| fp32 | AEMIM | 5.00 (3.00–20.00) | 2.50 (2.00–3.00) | 2.700 | 2.600 | 3.00 | 1.50 |"
    )
    assert lines[-1].endswith("2.800.")


def test_end_to_end(
    cost: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process spends seconds on its imports: two of them show what three would.
    methods = ["MAE", "Fast AEMIM"]
    monkeypatch.setattr(cost, "METHODS", {name: cost.METHODS[name] for name in methods})
    out = tmp_path / "results" / "cost.json"
    arguments = ["--model", "mae_vit_tiny_patch4", "--micro-batch", "4", "--device", "cpu"]
    cost.main([*arguments, "--repeats", "2", "--threads", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert list(result["measured"]["fp32"]) == methods
    for method, row in result["measured"]["fp32"].items():
        assert f"| fp32 | {method} |" in printed
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["peak_memory_bytes"] > 2**27
    assert result["command"].startswith("python benchmarks/cost.py --model mae_vit_tiny_patch4")
    assert result["settings"]["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"cpu", "logical_cores", "memory_gib"} <= set(result["hardware"])
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_one_clear_line(turns: ModuleType) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SystemExit, match=r"the AEMIM process died .* smaller --micro-batch"):
        turns._receive(ours, "AEMIM")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "6"], "--micro-batch=6: expected a multiple of 4"),
        (["--repeats", "0"], "--repeats=0: expected at least 1"),
        (["--model", "resnet"], "invalid choice: 'resnet'"),
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
