"""`aemim evaluate`: from a recipe to `results.json`, `results.md` and plots.

All that can be wrong with sets, lists of images and other runs' results is looked at before the first image
is classified; broken images, and folders of ImageNet-C with another number of images than the first, are
found when they are read. What has been measured is saved after each set, after ImageNet-C, after the
corruptions and after the attacks, and is marked as incomplete until the end.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.environment import environment, write_json, write_text
from aemim_algorithm.evaluation.classifiers import load_classifier
from aemim_algorithm.evaluation.corruption_suite import evaluate_corruptions, evaluate_imagenet_c
from aemim_algorithm.evaluation.drawing import draw
from aemim_algorithm.evaluation.predict import Clock
from aemim_algorithm.evaluation.published import compare_with_published
from aemim_algorithm.evaluation.robustness import robust_accuracy
from aemim_algorithm.evaluation.suite import Timing, evaluate_sets
from aemim_algorithm.evaluation.tables import markdown
from aemim_algorithm.recipes.evaluate_plan import Plan, corruption_settings, plan_evaluation
from aemim_algorithm.recipes.evaluate_schema import EvaluateRecipe
from aemim_algorithm.recipes.layers import RecipeError

__all__ = ["JSON_NAME", "TABLE_NAME", "evaluate"]

JSON_NAME, TABLE_NAME = "results.json", "results.md"
_DEVICES = {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}


def evaluate(recipe: EvaluateRecipe, *, command: Sequence[str] = ("aemim", "evaluate")) -> dict[str, Any]:
    """Evaluate a classifier as a recipe says, and write what came out.

    Args:
        recipe: What `load_evaluate_recipe` returned.
        command: The command line, for the record.

    Returns:
        What `results.json` holds. Each file in the recipe's `out` is written whole or not at all, for the
        first time when the first set is through; until the end ``complete`` is false and ``unfinished``
        names what is to come, so an interruption leaves what was measured before it.

    Raises:
        RecipeError: None of the recipe's sets is there.
        ValueError: The classifier, a set, an image or a list of images is bad; one line.
    """
    device = _device(recipe)
    plan = plan_evaluation(recipe, load_classifier(recipe.classifier, weights=recipe.weights))
    plan.sets.classifier.model.to(device)
    run = _Run(recipe, plan, device)
    run.report |= {
        "classifier": _described(recipe, plan.sets.classifier),
        "preprocessing": _preprocessing(plan.sets.classifier),
        "skipped": plan.skipped,
        **environment(command),
        "device": str(device),
        "precision": recipe.precision,
        "seeds": _seeds(recipe),
    }
    if plan.detection is not None:
        run.report["detection"] = plan.detection
    return run.all()


class _Run:
    """Measures part by part, and saves after each."""

    def __init__(self, recipe: EvaluateRecipe, plan: Plan, device: torch.device) -> None:
        self.recipe, self.plan, self.out = recipe, plan, Path(recipe.out)
        self.options: dict[str, Any] = {
            "batch_size": recipe.batch_size,
            "workers": recipe.workers,
            "device": device,
        }
        self.precise = self.options | {"precision": recipe.precision}
        self.report: dict[str, Any] = {"complete": False, "results": [], "timing": {}}
        self.report["unfinished"] = list(plan.sets.images)

    def all(self) -> dict[str, Any]:
        """Run everything; the report."""
        parts = {}
        if self.plan.imagenet_c is not None:
            parts["imagenet_c"] = self._imagenet_c
        if self.recipe.corruptions is not None and self.plan.base is not None:
            parts["corruptions"] = self._corruptions
        if self.plan.attacked is not None:
            parts["attacks"] = self._attacks
        self.report["unfinished"] += parts
        if parts and {"clean", "imagenet"} <= set(self.plan.sets.images):
            _say("corruptions and attacks are of sets.imagenet, not of sets.clean")
        if self.plan.sets.images:
            self._sets(*evaluate_sets(self.plan.sets, progress=True, finished=self._sets, **self.precise))
        for name, part in parts.items():
            self.report["results"] += part()
            self._finish(name)
        return self.report

    def _sets(self, rows: list[dict[str, Any]], timings: dict[str, Timing]) -> None:
        self.report["results"] = list(rows)
        self.report["timing"] = {name: asdict(timing) for name, timing in timings.items()}
        self._finish(*(row["set"] for row in rows))

    def _finish(self, *names: str) -> None:
        """Save, with what is still to come."""
        report = self.report
        report["unfinished"] = [name for name in report["unfinished"] if name not in names]
        report["complete"] = not report["unfinished"]
        if self.plan.published is not None:
            report["published"] = compare_with_published(report["results"], self.plan.published)
        write_json(report, self.out / JSON_NAME)
        write_text(markdown(report), self.out / TABLE_NAME)
        draw(report, self.out)

    def _imagenet_c(self) -> list[dict[str, Any]]:
        classifier, root = self.plan.sets.classifier, str(self.plan.imagenet_c)
        found = evaluate_imagenet_c(
            classifier, root, classes=classifier.classes, progress=_say, **self.precise
        )
        self.report["timing"]["imagenet_c"] = found.pop("timing")
        self.report["imagenet_c"] = found
        return _error_rows("c", found)

    def _corruptions(self) -> list[dict[str, Any]]:
        assert self.recipe.corruptions is not None
        found = evaluate_corruptions(
            self.plan.sets.classifier,
            self.plan.sets.images[str(self.plan.base)],
            baseline=self.plan.baseline,
            progress=_say,
            **corruption_settings(self.recipe.corruptions),
            **self.precise,
        )
        self.report["timing"]["corruptions"] = found.pop("timing")
        self.report["corruptions"] = {"set": self.plan.base, **found}
        return _error_rows(str(self.plan.base), found)

    def _attacks(self) -> list[dict[str, Any]]:
        attacked, clock = self.plan.attacked, Clock()
        assert attacked is not None
        assert self.recipe.attacks is not None
        _say(f"attacking {len(attacked)} images at {len(self.plan.attacks)} budgets")
        found = robust_accuracy(
            self.plan.sets.classifier,
            attacked,
            self.plan.attacks,
            seed=self.recipe.attacks.seed,
            clock=clock,
            progress=True,
            **self.options,
        )
        self.report["timing"]["attacks"] = clock.as_dict()
        self.report["attacks"] = {
            "set": self.plan.base,
            "images": _which(self.recipe, len(attacked)),
            "precision": "fp32",
        }
        return [
            {"set": self.plan.base, "metric": "top1", "correct": one.correct, **one.as_dict()}
            for one in found
        ]


def _error_rows(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of mCE and the unnormalised mean error: n is the images of each of the folders."""
    counts = [cell["n"] for row in result["accuracy"].values() for cell in row.values()]
    numbers = {
        "mCE": ("mCE", result["mCE"]),
        "unnormalised corruption error": ("unnormalised_error", result["unnormalised_error"]),
    }
    rows = []
    for metric, (key, value) in numbers.items():
        if value is not None:
            low, high = result["intervals"][key]
            row = {"set": name, "metric": metric, "value": value, "n": min(counts), "folders": len(counts)}
            rows.append(row | {"low": low, "high": high, "official_n": result.get("official_n")})
    return rows


def _which(recipe: EvaluateRecipe, count: int) -> str:
    listed = recipe.attacks.images if recipe.attacks and recipe.attacks.images else recipe.images
    return f"{count:,} images" + (f" that {Path(listed).name} names" if listed else ", the whole set")


def _described(recipe: EvaluateRecipe, classifier: Classifier) -> dict[str, Any]:
    return {
        "name": classifier.name,
        "given_as": recipe.classifier,
        "weights": recipe.weights,
        "sha256": _digest(recipe),
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "classes": len(classifier.classes or ()),
    }


def _digest(recipe: EvaluateRecipe) -> str | None:
    """SHA-256 of the file that holds the weights; None: they are random, or in a library's cache."""
    given = Path(recipe.weights or recipe.classifier)
    places = (given, given / "classifier.pt", given / "model.safetensors")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _preprocessing(classifier: Classifier) -> dict[str, Any]:
    names = ("image_size", "crop_fraction", "crop_mode", "interpolation", "mean", "std")
    return {"resize": "Pillow, as timm's"} | {name: getattr(classifier, name) for name in names}


def _seeds(recipe: EvaluateRecipe) -> dict[str, int]:
    parts = {"corruptions": recipe.corruptions, "attacks": recipe.attacks}
    return {name: part.seed for name, part in parts.items() if part is not None}


def _device(recipe: EvaluateRecipe) -> torch.device:
    if recipe.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.device == "gpu" and not torch.cuda.is_available():
        raise RecipeError("device=gpu: there is none here; expected cpu")
    return torch.device(_DEVICES[recipe.device])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
