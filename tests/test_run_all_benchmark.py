from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from conftest import benchmark_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# A benchmark: notes that it ran, sleeps, fails or writes its result.
FAKE = """
import pathlib, subprocess, sys, time
name, folder, seconds, code = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
with (folder / "ran").open("a") as ran:
    ran.write(name + "\\n")
if seconds > 1:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "worker").write_text(str(worker.pid))
time.sleep(seconds)
if code:
    raise SystemExit(f"{name}: no luck\\n")
(folder / f"{name}.json").write_text("{}")
"""

Fake = Callable[..., Any]


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("run_all", monkeypatch)


@pytest.fixture
def runner(run_all: ModuleType) -> ModuleType:
    return sys.modules["runner"]


@pytest.fixture
def fake(runner: ModuleType, tmp_path: Path) -> Fake:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def build(name: str, minutes: float = 0.1, *, seconds: float = 0, code: int = 0, **more: Any) -> Any:
        command = (sys.executable, str(script), name, str(tmp_path), str(seconds), str(code))
        return runner.Benchmark(name, command, minutes, tmp_path / f"{name}.json", **more)

    return build


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


def outcomes(
    runner: ModuleType, folder: Path, benchmarks: list[Any], minutes: float, **more: Any
) -> list[Any]:
    started = runner.Runner(folder, **more)
    started.run(benchmarks, minutes)
    assert [outcome.name for outcome in started.outcomes] == [benchmark.name for benchmark in benchmarks]
    return started.outcomes


def run(
    runner: ModuleType, folder: Path, benchmarks: list[Any], minutes: float = 10, **more: Any
) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes(runner, folder, benchmarks, minutes, **more)}


def test_order_and_results(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    states = run(runner, tmp_path, [fake("b"), fake("a"), fake("c", code=3), fake("d", missing="no CUDA")])
    assert states == {"b": "done", "a": "done", "c": "failed", "d": "skipped"}
    assert ran(tmp_path) == ["b", "a", "c"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a.log", "b.log", "c.log"]


def test_what_has_finished_is_not_repeated(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    first = [fake("a"), fake("b", code=1), fake("c")]
    run(runner, tmp_path, first)
    assert run(runner, tmp_path, first) == {"a": "skipped", "b": "failed", "c": "skipped"}
    assert ran(tmp_path) == ["a", "b", "c", "b"]
    run(runner, tmp_path, first, again=["c"])
    assert ran(tmp_path)[4:] == ["b", "c"]
    # Another command, another version, a result that is gone.
    assert run(runner, tmp_path, [fake("a", seconds=0.01)]) == {"a": "done"}
    assert run(runner, tmp_path, [fake("a", seconds=0.01)], version="0.0") == {"a": "done"}
    (tmp_path / "c.json").unlink()
    assert run(runner, tmp_path, [fake("c")], version="0.0") == {"c": "done"}


def test_only_what_fits_is_run(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    benchmarks = [fake("long", 20), fake("short", 1), fake("longer", 11), fake("last", 9)]
    states = run(runner, tmp_path, benchmarks, minutes=10)
    assert states == {"long": "not enough time", "short": "done", "longer": "not enough time", "last": "done"}


def test_an_earlier_run_tells_how_long_it_takes(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    run(runner, tmp_path, [fake("a", 20)], minutes=30)
    assert run(runner, tmp_path, [fake("a", 20)], minutes=1, again=["a"]) == {"a": "done"}


def test_one_that_hangs_ends_with_its_workers(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    began = time.monotonic()
    states = run(runner, tmp_path, [fake("hangs", 0.03, seconds=600), fake("next")])
    assert states == {"hangs": "failed", "next": "done"}
    assert time.monotonic() - began < 30
    worker = int((tmp_path / "worker").read_text())
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    # The time of all was up, not its own: the next run knows that it takes longer.
    assert run(runner, tmp_path, [fake("slow", 0.01, seconds=600)], 0.015) == {"slow": "not enough time"}
    assert run(runner, tmp_path, [fake("slow", 0.01, seconds=600)], 0.012) == {"slow": "not enough time"}
    assert ran(tmp_path).count("slow") == 1


def test_the_error_is_the_last_line(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("")
    silent = runner.Benchmark(
        "silent", (sys.executable, str(tmp_path / "silent.py")), 1, tmp_path / "none.json"
    )
    failed, empty = outcomes(runner, tmp_path, [fake("a", code=1), silent], 10)
    assert failed.note == "a: no luck"
    assert empty.note == "ended without writing none.json"


def test_what_is_printed_can_be_the_result(runner: ModuleType, tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; print('[1]'); print('noise', file=sys.stderr)")
    benchmark = runner.Benchmark("prints", command, 1, tmp_path / "prints.json", prints_result=True)
    assert run(runner, tmp_path, [benchmark]) == {"prints": "done"}
    assert json.loads((tmp_path / "prints.json").read_text()) == [1]
    assert (tmp_path / "logs" / "prints.log").read_text().endswith("noise\n")


def test_a_broken_note_of_progress_is_set_aside(runner: ModuleType, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"a": ')
    with pytest.warns(UserWarning, match=r"progress\.json cannot be read"):
        assert run(runner, tmp_path, [fake("a")]) == {"a": "done"}
    assert run(runner, tmp_path, [fake("a")]) == {"a": "skipped"}


DRIVER = """
import sys
from pathlib import Path
from runner import Benchmark, Runner

folder = Path(sys.argv[1])

def fake(name, seconds):
    command = (sys.executable, str(folder / "fake.py"), name, str(folder), seconds, "0")
    return Benchmark(name, command, 10, folder / f"{name}.json")

Runner(folder).run([fake("a", "0"), fake("b", "1"), fake("c", "0")], 100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_only_what_was_in_progress(
    runner: ModuleType, fake: Fake, tmp_path: Path, number: signal.Signals
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    with subprocess.Popen(
        [sys.executable, str(driver), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    ) as first:
        while ran(tmp_path) != ["a", "b"]:
            assert first.poll() is None
            time.sleep(0.01)
        (child,) = psutil.Process(first.pid).children()
        first.send_signal(number)
    child.wait(20)
    assert not (tmp_path / "b.json").exists()
    states = run(runner, tmp_path, [fake("a"), fake("b", seconds=1), fake("c")])
    assert states == {"a": "skipped", "b": "done", "c": "done"}
    assert ran(tmp_path) == ["a", "b", "b", "c"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_of_benchmarks(run_all: ModuleType, device: str, tmp_path: Path) -> None:
    arguments = ["--device", device, "--minutes", "30", "--out", str(tmp_path)]
    bare = run_all.benchmarks(run_all.parse(arguments), cuda=False)
    names = [benchmark.name for benchmark in bare]
    expected = [
        "cost",
        "throughput",
        "attack_strength",
        "data",
        "end_to_end",
        "detection",
        "faults",
        "scaling",
        "corruptions",
    ]
    assert [name for name in names if name in expected] == expected
    missing = {benchmark.name: benchmark.missing for benchmark in bare}
    assert "--images" in missing["data"]
    assert ("CUDA" in missing["cost"]) is (device == "cuda")
    assert not missing["faults"]
    (tmp_path / "mae").mkdir()
    more = ["--images", str(tmp_path), "--cifar10", str(tmp_path), "--mae-repo", str(tmp_path / "mae")]
    full = run_all.benchmarks(run_all.parse([*arguments, *more]), cuda=True)
    assert not any(benchmark.missing for benchmark in full)
    assert len({benchmark.result for benchmark in full}) == len(full)
    assert str(tmp_path / "mae") in {each.name: each for each in full}["throughput"].command


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_scripts_take_these_options(
    run_all: ModuleType, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that a script has given another name would be seen only after hours."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    (tmp_path / "util").mkdir()
    for name in ("models_mae.py", "util/pos_embed.py"):
        (tmp_path / name).touch()
    more = ["--images", str(tmp_path), "--cifar10", str(tmp_path), "--mae-repo", str(tmp_path)]
    more += ["--out", str(tmp_path)]
    options = run_all.parse(["--device", device, "--minutes", "30", *more])
    for benchmark in run_all.benchmarks(options, cuda=True):
        script = benchmark_script(Path(benchmark.command[1]).stem, monkeypatch)
        if not hasattr(script, "parse"):
            continue  # it reads its command line in main
        parsed = script.parse(list(benchmark.command[2:]))
        assert benchmark.prints_result or parsed.out == benchmark.result


def test_the_summary_and_the_exit_code(
    run_all: ModuleType,
    fake: Fake,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = [fake("good"), fake("bad", code=1), fake("long", 99)]
    monkeypatch.setattr(run_all, "benchmarks", lambda options, cuda: planned)
    arguments = ["--device", "cpu", "--minutes", "10", "--runs", str(tmp_path / "runs")]
    assert run_all.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| good | done | 0.0 | good.json |") for line in lines)
    assert any(line.startswith("| bad | failed | 0.0 | bad: no luck |") for line in lines)
    assert any(line.startswith("| long | not enough time |  | takes about 99 minutes |") for line in lines)
    planned[1:] = []
    assert run_all.main(arguments) == 0
    assert "| good | skipped |  | done before, in 0.0 minutes |" in capsys.readouterr().out
    planned[:] = [fake("good"), fake("bad", code=1)]
    assert run_all.main([*arguments, "--again", "good"]) == 1
    assert ran(tmp_path).count("good") == 2


def test_ctrl_c_is_no_traceback(
    run_all: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all.Runner, "run", interrupted)
    assert run_all.main(["--device", "cpu", "--minutes", "1", "--runs", str(tmp_path)]) == 130
    assert "goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes=0.0: expected more than 0"),
        (["--minutes", "5", "--images", "nowhere"], "--images=nowhere: no such path"),
        (["--minutes", "5", "--mae-repo", "nowhere"], "--mae-repo=nowhere: no such path"),
        (["--minutes", "5", "--again", "coffee"], "--again=coffee: expected one of cost, throughput"),
    ],
)
def test_bad_arguments(
    run_all: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_all.main(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
