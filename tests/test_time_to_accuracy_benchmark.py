"""The harness: what it plans, how it reads runs, that it goes on after a kill, and a whole study of seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script

from aemim_algorithm.recipes.layers import RecipeError
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import pretrain
from aemim_algorithm.recipes.schema import load_recipe
from aemim_algorithm.recipes.training import seeded

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PHOTOS = BENCHMARKS / "studies" / "photos"
SCORES = {"finetuned", "clean", "corruptions", "FGSM ε=1", "PGD ε=0.51"}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("time_to_accuracy", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("study_tables", monkeypatch)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("study", monkeypatch)


@pytest.fixture(autouse=True)
def own_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests do not wait for benchmarks that hold the machine's cores."""
    monkeypatch.setenv("AEMIM_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of studies


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("lanes", monkeypatch)


def options_of(harness: ModuleType, *words: str) -> Any:
    return harness.parse([str(PHOTOS / f"{name}.yaml") for name in ("mae", "fast", "aemim")] + [*words])


PLAN = {
    "batch_seconds": {"mae": [0.9, 1.0, 5.0], "fast": [1.3, 1.4, 1.5], "aemim": [2.6, 2.8, 2.5]},
    "batches_per_epoch": {"mae": 100, "fast": 100, "aemim": 100},
}


def test_the_baseline_is_trained_for_the_seconds_of_each_other_recipe(harness: ModuleType) -> None:
    options = options_of(harness, "--epochs", "2", "--seeds", "3", "--shares", "0.7", "--at-shares", "fast")
    jobs = [(job.method, job.batches) for job in harness.jobs_of(options, PLAN)]
    equal_epochs = [("mae", 200), ("fast", 200), ("aemim", 200)]
    equal_time = [("mae", 280), ("mae", 520)]  # 1.4 and 2.6 seconds a batch, against 1.0
    assert jobs == [*equal_epochs, *equal_time, ("fast", 100)]  # 0.7 of 200 s at 1.4 s


def test_equal_costs_are_one_run_and_cheaper_recipes_need_none(harness: ModuleType) -> None:
    plan = {**PLAN, "batch_seconds": {"mae": [1.0], "fast": [0.8], "aemim": [1.01]}}
    jobs = harness.jobs_of(options_of(harness, "--epochs", "1", "--seeds", "1"), plan)
    assert [(job.method, job.batches) for job in jobs] == [("mae", 100), ("fast", 100), ("aemim", 100)]


def test_the_first_of_two_recipes_of_one_cost_decides_whatever_comes_later(harness: ModuleType) -> None:
    plan = {**PLAN, "batch_seconds": {"mae": [1.0], "fast": [2.0], "aemim": [1.96]}}
    options = options_of(harness, "--epochs", "1", "--seeds", "1")
    jobs = [(job.method, job.batches) for job in harness.jobs_of(options, plan)]
    assert jobs[-1] == ("mae", 200)


@pytest.mark.parametrize(
    ("words", "lengths"), [([], []), (["aemim"], [260]), (["aemim", "fast"], [260, 140])]
)
def test_the_baseline_has_the_seconds_of_just_the_recipes_that_are_named(
    harness: ModuleType, words: list[str], lengths: list[int]
) -> None:
    options = options_of(harness, "--epochs", "1", "--seeds", "1", "--at-equal-time", *words)
    jobs = [(job.method, job.batches) for job in harness.jobs_of(options, PLAN)]
    assert jobs[3:] == [("mae", length) for length in lengths]


def test_from_scratch_is_fine_tuned_from_the_initialisation_of_the_same_seed(
    harness: ModuleType, study: ModuleType, tmp_path: Path
) -> None:
    words = ("--epochs", "1", "--seeds", "3", "--from-scratch", "--runs", str(tmp_path), "model.depth=1")
    options = options_of(harness, *words)
    *_, last = harness.jobs_of(options, PLAN)
    assert (last.method, last.seed) == ("mae", 3)
    arguments = study._arguments(last, options.recipes)["pretrain"]
    recipe = load_recipe(arguments[0], [*arguments[1:], f"data.cache={tmp_path}"])
    encoder = torch.load(pretrain(recipe).encoder, weights_only=True)
    initial = seeded(recipe, prepare(recipe).model).encoder.state_dict()
    assert max(float((encoder[name] - initial[name]).abs().max()) for name in encoder) < 1e-20


def test_seeds_come_one_after_the_other(harness: ModuleType) -> None:
    jobs = harness.jobs_of(options_of(harness, "--epochs", "1", "--seeds", "4", "2"), PLAN)
    assert [job.seed for job in jobs] == [4] * (len(jobs) // 2) + [2] * (len(jobs) // 2)
    assert len({job.name for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.yaml", "--epochs", "1"], "RECIPE=missing.yaml: no such file"),
        (["max_duration=1ep", "--epochs", "1"], "got no recipe"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "0"], "expected more than 0"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "--shares", "-1"], "expected more than 0"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "--seeds", "1", "1"], "expected different numbers"),
        ([str(PHOTOS / "mae.yaml")] * 2 + ["--epochs", "1"], "recipes of different names"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "--at-shares", "mae"], "--at-shares=mae"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "--at-equal-time", "x"], "--at-equal-time=x"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "seed=4"], "seed=4: the study sets that"),
        ([str(PHOTOS / "mae.yaml"), "--epochs", "1", "--finetune", "no.yaml"], "--finetune=no.yaml"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    harness: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        harness.parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_override_of_any_stage_is_found_before_anything_is_trained(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrongs = ("model.depht=1", "finetune.seeed=1", "evaluate.batch_sise=1", "schedule.warmup=1ep")
    for wrong in wrongs:
        arguments = [str(PHOTOS / "mae.yaml"), "--epochs", "1", "--runs", str(tmp_path / "runs"), wrong]
        assert harness.main(arguments) == 2
        assert wrong.partition("=")[0].rpartition(".")[2] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_data_are_named_once(study: ModuleType) -> None:
    told = study.split_overrides(
        [
            "data.source=a",
            "data.test_source=b",
            "model.depth=2",
            "finetune.data.source=c",
            "evaluate.workers=1",
        ]
    )
    assert told["pretrain"] == ["data.source=a", "data.test_source=b", "model.depth=2"]
    assert told["finetune"] == ["data.source=a", "data.test_source=b", "data.source=c"]
    assert told["evaluate"] == ["sets.clean=b", "workers=1"]


def planned(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str
) -> dict[str, Any]:
    """The plan of a study whose batches take a second of MAE, at the speed of the day."""

    def measured(options: Any, recipes: Any, methods: list[str]) -> dict[str, Any]:
        seconds = {"mae": 1.0, "fast": 1.5, "aemim": 3.0}
        speed = 1.0 + len(asked)
        asked.append(methods)
        return {
            "batch_seconds": {name: [speed * seconds[name]] * 3 for name in methods},
            "batches_per_epoch": dict.fromkeys(methods, 50),
            "environment": {name: {} for name in methods},
        }

    asked: list[list[str]] = []
    monkeypatch.setattr(harness, "_measured", measured)
    found: dict[str, Any] = {}
    for names in (["mae", "fast"], ["mae", "aemim"], ["mae", "fast", "aemim"]):
        paths = [str(PHOTOS / f"{name}.yaml") for name in names]
        options = harness.parse([*paths, "--epochs", "1", "--runs", str(folder), *words])
        found = harness.calibrate(options, options.recipes)
    assert asked == [["mae", "fast"], ["mae", "aemim"]]
    return found


def test_a_method_that_comes_later_is_timed_beside_the_baseline(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = planned(harness, monkeypatch, tmp_path)
    # The machine was half as fast the second time.
    assert found["batch_seconds"] == {"mae": [1.0] * 3, "fast": [1.5] * 3, "aemim": [3.0] * 3}
    later = {"batch_seconds": [6.0] * 3, "baseline": [2.0] * 3, "scaled_by": 0.5}
    assert found["as_measured"]["aemim"] == later
    assert found["as_measured"]["mae"]["scaled_by"] == 1.0


def test_what_is_finished_is_reported_without_timing_anything(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "_measured", pytest.fail)
    words = [str(PHOTOS / "mae.yaml"), "--epochs", "1", "--runs", str(tmp_path), "--finished"]
    assert harness.main(words) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/plan.json: mae was not timed, so nothing of it is finished there\n"
    )


def test_seconds_of_another_recipe_are_not_taken(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned(harness, monkeypatch, tmp_path)
    with pytest.raises(RecipeError, match="another recipe mae, or on other cores: choose another --runs"):
        planned(harness, monkeypatch, tmp_path, "global_batch_size=32")


def test_a_stage_is_not_continued_under_other_settings(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipes = study.Recipes(
        PHOTOS / "finetune.yaml", PHOTOS / "evaluate.yaml", study.split_overrides([]), tmp_path
    )
    other = study.Recipes(
        recipes.finetune, recipes.evaluate, study.split_overrides(["optimizer.weight_decay=0.3"]), tmp_path
    )
    job, made = study.Job("mae", PHOTOS / "mae.yaml", 10, 1), list[str]()

    def stopped(stage: str, *_: Any) -> None:
        made.append(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_run_stage", stopped)
    for again in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            study.run(job, recipes)
        assert made == ["pretrain"] * again
    with pytest.raises(study.StageError, match="another recipe of pretrain, or on another device: choose"):
        study.run(job, other)


def run_of(method: str, batches: int, seed: int, linear: list[float], seconds: float) -> dict[str, Any]:
    probes = [
        {"batch": (number + 1) * batches // len(linear), "knn": value - 10, "linear": value}
        for number, value in enumerate(linear)
    ]
    scores = {"finetuned": linear[-1] + 20}
    return {
        "method": method, "batches": batches, "seed": seed, "seconds": seconds, "probes": probes,
        "scores": scores, "measured_seconds": seconds + 20,
    }  # fmt: skip


RESULT = {
    "baseline": "mae",
    "epochs": 2,
    "batches_per_epoch": {"mae": 100, "fast": 100},
    "runs": [
        run_of("mae", 200, 1, [30, 40], 200),
        run_of("fast", 200, 1, [34, 46], 280),
        run_of("mae", 200, 2, [30, 44], 200),
        run_of("fast", 200, 2, [34, 42], 280),
        run_of("fast", 100, 1, [20, 40], 140),
    ],
}


def test_seconds_until_an_accuracy_are_those_of_a_line_between_probes(tables: ModuleType) -> None:
    run = run_of("fast", 200, 1, [34, 46], 280)
    assert tables.seconds_until(run, "linear", 40) == (pytest.approx(210), False)  # half way from 140 to 280
    assert tables.seconds_until(run, "linear", 34) == (pytest.approx(140), True)
    assert tables.seconds_until(run, "linear", 10) == (pytest.approx(140), True)  # or at any time before
    assert tables.seconds_until(run, "linear", 46.5) is None


def test_an_accuracy_that_is_lost_again_was_not_reached(tables: ModuleType) -> None:
    run = run_of("mae", 400, 1, [38, 44, 40, 42], 400)
    assert tables.seconds_until(run, "linear", 42) == (pytest.approx(400), False)
    assert tables.seconds_until(run, "linear", 41) == (pytest.approx(350), False)
    assert tables.seconds_until(run, "linear", 43) is None


def test_runs_of_different_lengths_are_never_one_row(tables: ModuleType) -> None:
    runs = [run_of("mae", batches, seed, [30], 1) for batches in (20, 21) for seed in (1, 2)]
    found = tables.groups({**RESULT, "runs": runs})
    assert [[run["batches"] for run in rows] for rows in found.values()] == [[20, 20], [21, 21]]


def test_a_table_without_the_baseline_has_no_comparison(tables: ModuleType) -> None:
    runs = [run_of("fast", 200, 1, [34, 46], 280)]
    assert "| fast | 2.0 | 1 | 280 | – | 300 |" in tables.table({**RESULT, "runs": runs})


def test_the_table_has_means_deviations_and_what_was_not_reached(tables: ModuleType) -> None:
    head, _, *rows = tables.table(RESULT).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows[:3]}
    names = [name.strip() for name in head.split("|")[2:-1]]
    mae, fast = (dict(zip(names, cells[name], strict=True)) for name in ("mae", "fast"))
    assert mae["linear"] == "42.0 ± 2.8"
    assert fast["× baseline"] == "1.40"
    assert fast["seeds"] == "2"
    # Seed 1 passes the baseline's 40 half way; seed 2 ends at 42, below the baseline's 44.
    assert fast["seconds until the baseline's linear"] == "210 (1 of 2 seeds)"
    short = dict(zip(names, cells["fast, 1.0 epochs"], strict=True))
    assert short["linear"] == "40.0"
    assert short["seconds until the baseline's linear"] == "140"
    early = tables.table({**RESULT, "runs": [*RESULT["runs"][:1], run_of("fast", 200, 1, [41, 46], 280)]})
    assert "| ≤ 140 |" in early.splitlines()[3]


def test_a_result_names_the_code_that_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = benchmark_script("record", monkeypatch)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.environment("x.py", ["--y"])["commit"] is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "record.py").write_text("one")
    git("init")
    git("add", "record.py")
    git("commit", "-m", "one")
    assert record.environment("x.py", ["--y"])["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "record.py").write_text("two")
    assert record.environment("x.py", ["--y"])["commit"] == git("rev-parse", "HEAD") + "-dirty"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds core 0 of the locks in a folder until it is told to end."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from lanes import reserved\n"
        "with reserved(['core 0'], Path(sys.argv[2])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(BENCHMARKS), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_needs_another_core_goes_on_and_who_needs_the_same_waits(
    lanes: ModuleType, holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lanes.reserved(["core 1"], tmp_path):
        assert capsys.readouterr().err == ""
    assert holder.stdin is not None
    holder.stdin.close()  # it ends, so the wait below does
    with lanes.reserved(["core 0"], tmp_path):
        pass


def test_a_waiting_process_says_for_whom_and_a_killed_one_holds_nothing(
    lanes: ModuleType, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from lanes import reserved\n"
        "with reserved(['core 0'], Path(sys.argv[2])): print('mine', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(BENCHMARKS), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stderr is not None
        assert f"core 0 is in use by another benchmark (process {holder.pid}): waiting" in (
            waiting.stderr.readline()
        )
        assert waiting.poll() is None
        holder.kill()
        out, _ = waiting.communicate(timeout=60)
    assert out == "mine\n"


def study_command(folder: Path, *words: str) -> list[str]:
    return [
        sys.executable, str(BENCHMARKS / "time_to_accuracy.py"), str(PHOTOS / "mae.yaml"),
        str(PHOTOS / "fast.yaml"), "--epochs", "0.2", "--rounds", "1", "--batches", "2",
        "--runs", str(folder / "runs"), "--out", str(folder / "study.json"), *words,
    ]  # fmt: skip


def run_study(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = study_command(folder, *words)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def test_a_study_goes_on_after_a_kill_and_reports_every_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        study_command(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as first:
        first_run = tmp_path / "runs" / "mae-12ba-seed1"
        for _ in range(6000):
            if (first_run / "pretrain" / "encoder.pt").exists() or first.poll() is not None:
                break
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        assert first.stderr is not None
        assert (first_run / "pretrain" / "encoder.pt").exists(), first.stderr.read().decode()
    trained = (first_run / "pretrain" / "encoder.pt").stat().st_mtime_ns
    assert not (tmp_path / "study.json").exists()

    done = run_study(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (first_run / "pretrain" / "encoder.pt").stat().st_mtime_ns == trained
    assert "mae-12ba-seed1: pretrain" not in done.stderr
    result = json.loads((tmp_path / "study.json").read_text())
    assert {(run["method"], run["seed"]) for run in result["runs"]} == {("mae", 1), ("fast", 1)}
    for run in result["runs"]:
        assert set(run["scores"]) == SCORES
        assert run["probes"][-1]["batch"] == run["batches"]
        assert run["seconds"] > 0 < run["measured_seconds"]
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert "| fast |" in done.stdout
    assert str(tmp_path) not in json.dumps(result["runs"])

    some = run_study(tmp_path, "--seeds", "1", "2", "--finished")
    assert some.returncode == 0, some.stderr
    assert "missing: mae-12ba-seed2, " in some.stderr
    assert some.stdout == done.stdout

    assert all(run["environment"]["cores"] for run in result["runs"])
    before = (first_run / "outcome.json").stat().st_mtime_ns
    again = run_study(tmp_path, "finetune.optimizer.weight_decay=0.1")
    assert again.returncode == 1, again.stderr
    assert "holds a run with another recipe of finetune, or on another device: choose" in again.stderr
    assert (first_run / "outcome.json").stat().st_mtime_ns == before
