"""A run as `aemim report` reads it: recipe, history and scores, as they lie in its save folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aemim_algorithm.callbacks.history import FILE_NAME as HISTORY
from aemim_algorithm.callbacks.history import read_history
from aemim_algorithm.evaluation.plots import Point

__all__ = ["PRETRAINING", "RESULT_FILES", "Run", "differing_settings", "read_run", "read_runs"]

RESULT_FILES = ("results.json", "probe.json")
"""What `aemim evaluate` or `aemim detect`, and `aemim probe`, leave, in the order in which it is shown."""

PRETRAINING = "pretraining."
"""How the settings begin that a fine-tuning run has from the recipe beside its encoder."""

_RANDOM = "random"  # the encoder of a fine-tuning run from scratch
# Where a run lies and what it is called, not how it was trained.
_OF_THE_PLACE = ("run_name", "save_folder", "data.cache", "loggers")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What the report calls it.
        folder: Its save folder.
        settings: The resolved recipe, flat: ``optimizer.betas`` and so on.
        history: Lines of `callbacks.history`.
        results: Rows of its result files: ``set``, ``metric``, ``value``, mostly ``n``, ``low``, ``high``.
        seconds_before: Training time of the encoder that it started from, 0 without one; ``None`` where no
            history beside the encoder tells it.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    seconds_before: float | None = 0.0

    @property
    def batches(self) -> list[Mapping[str, Any]]:
        """Lines of the history that are of a batch."""
        return [line for line in self.history if "eval" not in line]

    @property
    def seconds(self) -> float:
        """Training time of this run alone, in seconds."""
        return _seconds(self.history)

    @property
    def loss_ratio(self) -> float | None:
        """The weight λ of the clean loss, of a fine-tuning run that of its pre-training.

        ``None`` without AEMIM, or where it is a schedule.
        """
        for prefix in ("", PRETRAINING):
            section = f"{prefix}algorithms.aemim"
            if any(key.startswith(section) for key in self.settings):
                value = self.settings.get(f"{section}.loss_ratio", 0.5)
                return float(value) if isinstance(value, int | float) else None
        return None

    def scores(self) -> dict[str, Point]:
        """Each score, with ``at=0``, by its name, such as ``clean top1`` or ``clean top1, FGSM ε=2``."""
        found: dict[str, Point] = {}
        for row in self.results:
            if isinstance(row["value"], int | float):
                found.setdefault(_name(row), Point(0.0, float(row["value"]), row.get("low"), row.get("high")))
        return found

    def under_attack(self, attack: str) -> list[Point]:
        """Accuracies under ``"fgsm"`` or ``"pgd"``; ``at`` is the budget, in 1/255 of the pixel range."""
        return [
            Point(float(row["epsilon"]), float(row["value"]), row.get("low"), row.get("high"))
            for row in self.results
            if row.get("attack") == attack
        ]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs; two of one name are told apart by their folders.

    Args:
        folders: Save folders.

    Returns:
        The runs, in that order.

    Raises:
        ValueError: If there is none, one is named twice, or one cannot be read; see :func:`read_run`.
    """
    if not folders or len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"got runs {', '.join(map(str, folders)) or 'none'}; expected different folders of runs"
        )
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [
        read_run(folder, name=name if unique else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, *, name: str) -> Run:
    """Read a run.

    Args:
        folder: Its save folder.
        name: What to call it.

    Returns:
        The run; without results where nothing has been evaluated.

    Raises:
        ValueError: If the folder has no recipe or no history, or a file in it is damaged.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise ValueError(f"{folder}: no recipe.yaml; expected the save folder of a run")
    settings = _settings(recipe)
    encoder = settings.get("model.encoder")
    before = _folder_of(encoder)
    if before is not None and (before / "recipe.yaml").is_file():
        pretraining = _settings(before / "recipe.yaml")
        settings |= {f"{PRETRAINING}{key}": value for key, value in pretraining.items()}
    return Run(
        name=name,
        folder=folder,
        settings=settings,
        history=read_history(folder),
        results=[row for file in RESULT_FILES for row in _rows(folder / file)],
        seconds_before=0.0 if encoder in (None, _RANDOM) else _seconds_in(before),
    )


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which runs differ, in the order of the recipes; where a run lies is no setting.

    Args:
        runs: The runs.

    Returns:
        By the setting's name, its value in each run; ``None`` where a run has none.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {
        key: found
        for key, found in values.items()
        if any(value != found[0] for value in found[1:])
        and not any(f"{key.removeprefix(PRETRAINING)}.".startswith(f"{place}.") for place in _OF_THE_PLACE)
    }


def _folder_of(encoder: object) -> Path | None:
    """Where the run lies that an encoder is of, if the encoder is still there."""
    path = None if encoder in (None, _RANDOM) else Path(str(encoder))
    return path.parent if path is not None and path.exists() else None


def _seconds_in(folder: Path | None) -> float | None:
    if folder is None or not (folder / HISTORY).is_file():
        return None
    return _seconds(read_history(folder))


def _seconds(history: Sequence[Mapping[str, Any]]) -> float:
    return float(history[-1]["seconds"]) if history else 0.0


def _name(row: Mapping[str, Any]) -> str:
    name = f"{row['set']} {row['metric']}"
    if "attack" not in row:
        return name
    steps = f"-{row['steps']}" if row["attack"] == "pgd" else ""
    return f"{name}, {row['attack'].upper()}{steps} ε={row['epsilon']:g}"


def _settings(recipe: Path) -> dict[str, Any]:
    try:
        return _flat(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe}: not readable as a recipe: {' '.join(str(error).split())}") from error


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        for row in rows:
            _name(row), row["value"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no results of `aemim evaluate`, `aemim probe` or `aemim detect`: make them again"
        ) from error
    return list(rows)
