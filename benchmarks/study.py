"""One run of a study, from pre-training to the evaluated classifier, by the commands that a user would type.

Each stage is a process of `aemim` that goes on where it was stopped; a run that has finished is read and not
made again. The cores and GPUs of this process are held while a stage runs (`lanes.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lanes import reserved
from processes import execute, last_line
from record import environment, write_json
from study_outcomes import outcome_of

from aemim_algorithm.environment import write_text
from aemim_algorithm.recipes.datasets import train_shards
from aemim_algorithm.recipes.dry_run import count_images
from aemim_algorithm.recipes.evaluate_schema import load_evaluate_recipe
from aemim_algorithm.recipes.layers import RecipeError
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.schema import load_finetuning, load_recipe

__all__ = [
    "PROBES",
    "Job",
    "Recipes",
    "StageError",
    "batches_per_epoch",
    "check",
    "make_runs",
    "run",
    "settings_of",
    "split_overrides",
]

OUTCOME = "outcome.json"
PROBES = 4
"""Online probes of a run, evenly spread; the last one at its end."""

_SHARED = ("data.source", "data.test_source", "data.cache", "data.workers")
_STAGES = ("pretrain", "finetune", "evaluate")
_OURS = ("max_duration", "seed", "run_name", "save_folder", "callbacks.online_probe.interval")


class StageError(RuntimeError):
    """A stage that failed, in one line."""


@dataclass(frozen=True)
class Recipes:
    """What all runs of a study share.

    Attributes:
        finetune: Recipe of `aemim finetune`.
        evaluate: Recipe of `aemim evaluate`.
        overrides: Of each stage, by its name.
        folder: Where the runs are.
    """

    finetune: Path
    evaluate: Path
    overrides: Mapping[str, Sequence[str]]
    folder: Path


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        method: What tables and plots call its method.
        recipe: Recipe of `aemim pretrain`.
        batches: Length of the pre-training.
        seed: Of pre-training and fine-tuning.
        overrides: Of the recipe, after those of the study.
    """

    method: str
    recipe: Path
    batches: int
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        method = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in self.method)
        return f"{method}-{self.batches}ba-seed{self.seed}"


def split_overrides(overrides: Sequence[str]) -> dict[str, list[str]]:
    """What each stage is told: ``finetune.`` and ``evaluate.`` name theirs, all else is of pre-training.

    The data are named once: fine-tuning takes them from pre-training, evaluation the test images.

    Raises:
        ValueError: If pre-training is told what the study decides.
    """
    if fixed := [override for override in overrides if override.partition("=")[0] in _OURS]:
        raise ValueError(f"{fixed[0]}: the study sets that of pre-training")
    stages: dict[str, list[str]] = {stage: [] for stage in _STAGES}
    for override in overrides:
        stage, dot, rest = override.partition(".")
        named = dot and stage in _STAGES
        stages[stage if named else "pretrain"].append(rest if named else override)
    shared = [override for override in stages["pretrain"] if override.partition("=")[0] in _SHARED]
    stages["finetune"] = [*shared, *stages["finetune"]]
    for override in shared:
        key, _, value = override.partition("=")
        if key == "data.test_source":
            stages["evaluate"].insert(0, f"sets.clean={value}")
    return stages


def check(job: Job, recipes: Recipes) -> None:
    """Read all that a run is told, and find what cannot be before anything is trained.

    Raises:
        RecipeError: If a recipe or an override is wrong.
    """
    loaded = {
        stage: _LOADERS[stage](words[0], words[1:]) for stage, words in _arguments(job, recipes).items()
    }
    recipe = loaded["pretrain"]
    if not recipe.schedule.warmup.endswith("dur") or recipe.schedule.milestones:
        raise RecipeError(
            f"{job.recipe}: schedule.warmup={recipe.schedule.warmup}, "
            f"milestones={recipe.schedule.milestones}: expected a share such as 0.05dur and no milestones: "
            "runs of a study differ in length"
        )
    prepare(recipe)


def batches_per_epoch(recipe: Path, overrides: Sequence[str]) -> int:
    """Full batches of an epoch of a recipe, whose images are converted if need be.

    Raises:
        RecipeError: If the recipe cannot run here.
        ConversionError: If the images cannot be converted.
    """
    loaded = load_recipe(recipe, [*overrides, "save_folder=runs/counted"])
    prepare(loaded)
    return (count_images(str(train_shards(loaded.data))) or 0) // loaded.global_batch_size


def run(job: Job, recipes: Recipes) -> dict[str, Any]:
    """Make a run, or go on with it, or read what it left.

    Returns:
        ``method``, ``batches``, ``seed``, ``environment`` and what :func:`outcome_of` says.

    Raises:
        StageError: If a stage fails, or the folder holds a run with other settings.
    """
    folder = recipes.folder / job.name
    arguments = _arguments(job, recipes)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may have the same run
        for stage in _STAGES:
            _require_same(stage, arguments[stage], folder)
        if not (folder / OUTCOME).exists():
            machine = environment(str(job.recipe), ())
            for stage in _STAGES:
                if not _is_done(stage, folder):
                    _run_stage(stage, arguments[stage], folder)
            write_json(_outcome(job, folder, machine), folder / OUTCOME)
    found: dict[str, Any] = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    return found


def _outcome(job: Job, folder: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = outcome_of(folder)
    except (ValueError, LookupError, OSError) as error:
        raise StageError(f"{folder} cannot be read ({error}): delete it") from error
    known = {key: machine[key] for key in ("date", "commit", "hardware", "versions")}
    identity = {"method": job.method, "batches": job.batches, "seed": job.seed}
    return identity | found | {"environment": known | {"cores": len(os.sched_getaffinity(0))}}


def make_runs(
    jobs: Sequence[Job], recipes: Recipes, *, finished: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """Make runs one after the other; one that fails is named and left out.

    Args:
        jobs: The runs.
        recipes: What they share.
        finished: Make none: read those that have finished, and name the others.

    Returns:
        See :func:`run`, of each that there is; and whether none has failed.
    """
    outcomes, missing, whole = [], [], True
    for job in jobs:
        try:
            if finished and not (recipes.folder / job.name / OUTCOME).exists():
                missing.append(job.name)
            else:
                outcomes.append(run(job, recipes))
        except StageError as error:
            print(error, file=sys.stderr)
            whole = False
    if missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    return outcomes, whole


def _arguments(job: Job, recipes: Recipes) -> dict[str, list[str]]:
    """Recipe and overrides of each stage."""
    folder, told = recipes.folder / job.name, recipes.overrides
    pretrain = [
        *told["pretrain"],
        *job.overrides,
        f"max_duration={job.batches}ba",
        f"seed={job.seed}",
        f"callbacks.online_probe.interval={-(-job.batches // PROBES)}ba",
        f"run_name={job.name}",
        f"save_folder={folder / 'pretrain'}",
    ]
    finetune = [
        *told["finetune"],
        f"model.encoder={folder / 'pretrain' / 'encoder.pt'}",
        f"seed={job.seed}",
        f"run_name={job.name}-finetuned",
        f"save_folder={folder / 'finetune'}",
    ]
    evaluate = [
        *told["evaluate"],
        f"classifier={folder / 'finetune' / 'classifier.pt'}",
        f"run_name={job.name}",
        f"out={folder / 'evaluate'}",
    ]
    return {
        "pretrain": [str(job.recipe), *pretrain],
        "finetune": [str(recipes.finetune), *finetune],
        "evaluate": [str(recipes.evaluate), *evaluate],
    }


_LOADERS: dict[str, Any] = {
    "pretrain": load_recipe,
    "finetune": load_finetuning,
    "evaluate": load_evaluate_recipe,
}


def settings_of(stage: str, words: Sequence[str]) -> str:
    """The resolved recipe of a stage."""
    return repr(_LOADERS[stage](words[0], words[1:]))


def _require_same(stage: str, words: Sequence[str], folder: Path) -> None:
    """Note what a stage is told, and where, before it starts; refuse to go on with anything else."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    file, settings = folder / f"{stage}.settings", f"{device}: {settings_of(stage, words)}"
    if not file.exists():
        write_text(settings, file)
    elif file.read_text(encoding="utf-8") != settings:
        raise StageError(
            f"{folder} holds a run with another recipe of {stage}, or on another device: choose another "
            "--runs"
        )


def _is_done(stage: str, folder: Path) -> bool:
    if stage == "evaluate":
        file = folder / "evaluate" / "results.json"
        return file.exists() and bool(json.loads(file.read_text(encoding="utf-8"))["complete"])
    return (folder / stage / {"pretrain": "encoder.pt", "finetune": "classifier.pt"}[stage]).exists()


def _run_stage(stage: str, words: Sequence[str], folder: Path) -> None:
    log = folder / f"{stage}.log"
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-m", "aemim_algorithm", stage, *words]
    with reserved(), log.open("ab") as lines:
        print(f"{folder.name}: {stage}", file=sys.stderr, flush=True)
        code = execute(
            command, output=lines, errors=lines, folder=Path.cwd(), environment=os.environ | threads
        )
    if code:
        raise StageError(f"{stage} of {folder.name} failed: {last_line(log)} ({log})")
