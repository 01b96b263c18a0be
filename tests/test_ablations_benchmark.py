"""The ablations: their settings are those of the paper, their table has its numbers, and every one trains."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import benchmark_script
from matplotlib.figure import Figure

from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.schema import load_recipe

PHOTOS = Path(__file__).parents[1] / "benchmarks" / "studies" / "photos"
RECIPE, MAE = str(PHOTOS / "aemim.yaml"), str(PHOTOS / "mae.yaml")

# Table 8 of the paper, ViT-S/16, top-1 on ImageNet-1K.
TABLE_8 = {
    "epsilon": {"1.0": 81.3, "2.0": 81.4, "4.0": 81.2},
    "steps": {"1": 81.2, "2": 81.4, "3": 81.4},
    "adapter": {"none": 81.2, "cls_token": 81.4, "norm": 81.4},
    "loss": {"reconstruction": 81.1, "kl": 81.3, "l2": 81.4},
}


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("ablations", monkeypatch)


def options_of(ablations: ModuleType, *words: str) -> Any:
    return ablations.parse([RECIPE, "--baseline", MAE, "--epochs", "1", *words])


def test_the_papers_numbers_are_those_of_its_table(ablations: ModuleType) -> None:
    assert {name: dict(ablations.GROUPS[name].paper) for name in TABLE_8} == TABLE_8
    assert ablations.PAPER == {"without AEMIM": 80.9, "AEMIM": 81.4}


def test_every_setting_changes_one_argument_and_can_run(ablations: ModuleType) -> None:
    """The default of a group is what the recipe has; all others differ from it in that alone."""
    default = load_recipe(RECIPE)
    for name, group in ablations.GROUPS.items():
        for value, overrides in group.overrides.items():
            recipe = load_recipe(RECIPE, [*overrides])
            prepare(recipe)
            before, after = default.algorithms["aemim"] or {}, recipe.algorithms["aemim"] or {}
            changed = {key for key in after if after[key] != before.get(key)}
            assert len(changed) == 1, (name, value)
            assert recipe.model == default.model
        if group.default in group.paper:
            (key,) = {
                override.partition("=")[0].rpartition(".")[2] for (override,) in group.overrides.values()
            }
            assert str(before[key]) == group.default, name


def test_what_groups_share_is_made_once(ablations: ModuleType) -> None:
    options = options_of(ablations, "--groups", "epsilon", "steps", "--seeds", "1", "2")
    jobs = ablations.jobs_of(options, {Path(RECIPE): 50, Path(MAE): 25})  # the baseline's batches are larger
    assert len(jobs) == len({job.name for job in jobs}) == 2 * (2 + 3 + 3)
    assert {job.batches for job in jobs if job.method != "without AEMIM"} == {50}
    assert {job.batches for job in jobs if job.method == "without AEMIM"} == {25}
    assert [job.method for job in jobs[:2]] == ["AEMIM", "without AEMIM"]
    assert str(jobs[1].recipe) == MAE


@pytest.mark.parametrize(
    ("recipe", "override", "said"),
    [
        ("fast.yaml", "data.workers=0", "algorithms.aemim.steps=1: expected 2, the default of steps"),
        ("aemim.yaml", "algorithms.aemim.epsilon=4", "algorithms.aemim.epsilon=4: expected 2.0"),
        ("aemim.yaml", "algorithms.aemim.adversarial_ratio=0.25", "adversarial_ratio=0.25: expected 1.0"),
        ("mae.yaml", "data.workers=0", "algorithms: expected aemim among them"),
    ],
)
def test_a_recipe_that_is_not_what_the_table_calls_it_is_refused(
    ablations: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    recipe: str,
    override: str,
    said: str,
) -> None:
    words = [str(PHOTOS / recipe), "--epochs", "1", "--runs", str(tmp_path / "runs"), override]
    assert ablations.main(words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_baseline_is_the_same_model_without_aemim(
    ablations: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"bases: [{MAE}]\nmodel: {{depth: 1}}\n")
    for baseline, said in (
        (RECIPE, "expected no aemim among them"),
        (other, f"expected the model of {RECIPE}"),
    ):
        words = ["--baseline", str(baseline), "--epochs", "1", "--runs", str(tmp_path / "runs")]
        assert ablations.main([RECIPE, *words]) == 2
        assert f"--baseline={baseline}: " in (error := capsys.readouterr().err)
        assert said in error
    assert not (tmp_path / "runs").exists()


def outcome(method: str, seed: int, finetuned: float) -> dict[str, Any]:
    losses = [
        {"batch": batch, "loss/train/clean": 1.0, "loss/train/adversarial": 1 / batch}
        for batch in range(1, 20)
    ]
    return {
        "method": method, "seed": seed, "batches": 20, "seconds": 3.0, "losses": losses,
        "probes": [{"batch": 20, "knn": 30.0, "linear": 40.0}],
        "scores": {"finetuned": finetuned, "corruptions": 30.0}, "corruptions": None,
    }  # fmt: skip


def test_the_table_has_a_row_for_each_setting_and_the_papers_number(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"AEMIM": (50.0, 52.0), "without AEMIM": (49.0, 49.0), "loss reconstruction": (48.0, 47.0)}

    def made(jobs: Any, recipes: Any, *, finished: bool) -> Any:
        assert not finished
        return [
            outcome(job.method, job.seed, found.get(job.method, (45, 46))[job.seed - 1]) for job in jobs
        ], True

    monkeypatch.setattr(ablations, "make_runs", made)
    monkeypatch.setattr(ablations, "batches_per_epoch", lambda *_: 20)
    out = tmp_path / "ablations.json"
    words = ["--groups", "loss", "loss_ratio", "--seeds", "1", "2", "--out", str(out)]
    assert ablations.main([RECIPE, "--baseline", MAE, "--epochs", "1", *words]) == 0
    rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("|")]
    by_setting = {(row[0], row[1]): row for row in cells[2:]}
    assert by_setting["", "AEMIM"][4] == "51.0 ± 1.4"
    assert by_setting["", "without AEMIM"][-1] == "80.9"
    assert by_setting["(d) adversarial loss", "reconstruction"][4:] == ["47.5 ± 0.7", "30.0 ± 0.0", "81.1"]
    assert by_setting["(d) adversarial loss", "l2"] == [
        "(d) adversarial loss",
        "l2",
        *by_setting["", "AEMIM"][2:],
    ]
    assert by_setting["Figure 4: λ", "0.5"][-1] == "–"
    assert (tmp_path / "ablations-losses.png").stat().st_size > 10_000
    assert (tmp_path / "ablations-loss-ratio.png").stat().st_size > 10_000
    written = json.loads(out.read_text())
    assert len(written["runs"]) == 2 * (2 + 2 + 4)
    assert {run["method"] for run in written["runs"] if "losses" in run} == {"AEMIM", "loss reconstruction"}

    figures: list[Figure] = []
    monkeypatch.setattr(ablations, "save_figure", lambda figure, out: figures.append(figure))
    ablations.draw_loss_ratio(written, out)
    finetuned = figures[0].axes[0]
    assert finetuned.lines[0].get_xydata().tolist() == [
        [0.1, 45.5], [0.3, 45.5], [0.5, 51.0], [0.7, 45.5], [0.9, 45.5], [1.0, 49.0],
    ]  # fmt: skip
    low, high = figures[0].axes[1].get_ylim()  # all are equal
    assert high - low >= 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([RECIPE, MAE, "--epochs", "1"], "got 2 recipes: expected one"),
        ([RECIPE, "--epochs", "-1"], "--epochs=-1.0: expected more than 0"),
        ([RECIPE, "--epochs", "1", "--baseline", "no.yaml"], "--baseline=no.yaml: no such file"),
        ([RECIPE, "--epochs", "1", "--groups", "depth"], "invalid choice: 'depth'"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    ablations: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        ablations.parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
