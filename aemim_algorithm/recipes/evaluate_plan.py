"""What an evaluation will run: everything opened and checked before the first image is classified."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.corruption_baseline import check_baseline
from aemim_algorithm.evaluation.corruptions.apply import corrupted_sets
from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS
from aemim_algorithm.evaluation.detection import read_detection
from aemim_algorithm.evaluation.image_ids import read_ids
from aemim_algorithm.evaluation.image_sets import ImageSet
from aemim_algorithm.evaluation.imagenet import open_set, require_imagenet
from aemim_algorithm.evaluation.imagenet_c import check_classes, find_imagenet_c
from aemim_algorithm.evaluation.published import published_numbers
from aemim_algorithm.evaluation.robustness import Attack, fgsm, pgd
from aemim_algorithm.evaluation.suite import OpenSets, open_sets, skipped_sets
from aemim_algorithm.recipes.evaluate_schema import AttacksRecipe, CorruptionsRecipe, EvaluateRecipe
from aemim_algorithm.recipes.layers import RecipeError

__all__ = ["Plan", "corruption_settings", "plan_evaluation"]


@dataclass(frozen=True)
class Plan:
    """What will be run.

    Attributes:
        sets: The sets, and the classifier with the names of its classes.
        skipped: Why each part that was left out is.
        base: The set that is corrupted and attacked; None: there is none.
        imagenet_c: The folder of ImageNet-C, or None.
        attacked: The images that are attacked, or None.
        attacks: On them.
        baseline: The corruptions of another classifier's report, or None.
        published: timm's numbers, or None.
        detection: The results of a detector, or None.
    """

    sets: OpenSets
    skipped: dict[str, str]
    base: str | None
    imagenet_c: str | None
    attacked: ImageSet | None
    attacks: list[Attack]
    baseline: dict[str, Any] | None
    published: dict[str, dict[str, float]] | None
    detection: dict[str, Any] | None


def plan_evaluation(recipe: EvaluateRecipe, classifier: Classifier) -> Plan:
    """Open all sets and look at everything that can be looked at without classifying.

    Args:
        recipe: What to evaluate.
        classifier: On the CPU.

    Returns:
        The plan.

    Raises:
        RecipeError: None of the recipe's sets is there, or its folder cannot be written to.
        ValueError: A set, a list of images, or another run's results do not fit; one line.
    """
    sources: dict[str, str | None] = asdict(recipe.sets)
    skipped = skipped_sets(sources)
    _require_a_set(sources, skipped)
    _require_writable(Path(recipe.out))
    opened = open_sets(
        classifier,
        {name: None if name in skipped else path for name, path in sources.items()},
        only=read_ids(recipe.images) if recipe.images else None,
    )
    base = next((name for name in ("imagenet", "clean") if name in opened.images), None)
    imagenet_c = None if "c" in skipped else sources["c"]
    if imagenet_c is not None:
        require_imagenet(classifier, "c")
        check_classes(find_imagenet_c(imagenet_c), classes=classifier.classes or ())
    wanted = [name for name in ("corruptions", "attacks") if getattr(recipe, name) is not None]
    return Plan(
        sets=opened,
        skipped=skipped | {name: "needs sets.imagenet or sets.clean" for name in wanted if base is None},
        base=base,
        imagenet_c=imagenet_c,
        attacked=_attacked(recipe, opened, base),
        attacks=_attacks(recipe.attacks),
        baseline=_baseline(recipe, opened, base),
        published=_published(recipe, classifier),
        detection=_detection(recipe),
    )


def corruption_settings(corruptions: CorruptionsRecipe) -> dict[str, Any]:
    """The arguments of `evaluate_corruptions` that a recipe decides."""
    return {
        "table": corruptions.table,
        "seed": corruptions.seed,
        "severities": corruptions.severities,
        "corruptions": corruptions.corruptions or CORRUPTIONS,
    }


def _require_a_set(sources: Mapping[str, str | None], skipped: Mapping[str, str]) -> None:
    if len(skipped) < len(sources):
        return
    given = [f"sets.{name}: {skipped[name]}" for name, path in sources.items() if path is not None]
    raise RecipeError(
        f"there is nothing to evaluate on: {given[0] if given else 'no set is given'}; "
        f"expected the path of one of {', '.join(f'sets.{name}' for name in sources)}"
    )


def _require_writable(out: Path) -> None:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RecipeError(f"out={out}: {there} is no folder that can be written to")


def _attacked(recipe: EvaluateRecipe, opened: OpenSets, base: str | None) -> ImageSet | None:
    if recipe.attacks is None or base is None:
        return None
    if recipe.attacks.images is None:
        return opened.images[base]
    source = str(getattr(recipe.sets, base))
    return open_set(base, source, opened.classifier, only=read_ids(recipe.attacks.images))


def _attacks(settings: AttacksRecipe | None) -> list[Attack]:
    if settings is None:
        return []
    attacks = [fgsm(epsilon) for epsilon in settings.fgsm]
    if settings.pgd is not None:
        options = {key: value for key, value in asdict(settings.pgd).items() if key != "epsilons"}
        attacks += [pgd(epsilon, **options) for epsilon in settings.pgd.epsilons]
    return attacks


def _baseline(recipe: EvaluateRecipe, opened: OpenSets, base: str | None) -> dict[str, Any] | None:
    """The report of the baseline; it has to be of just the images that will be corrupted here."""
    if recipe.corruptions is None or base is None:
        return None
    settings = corruption_settings(recipe.corruptions)
    corrupted_sets(opened.images[base], **settings)  # that frost's photographs are missing is known now
    path = recipe.corruptions.relative_to
    if path is None:
        return None
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))["corruptions"]
        other = found["set"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"corruptions.relative_to={path}: expected the results.json of an evaluation with corruptions"
        ) from error
    if other != base:
        raise ValueError(
            f"corruptions.relative_to={path}: it is of sets.{other}, expected sets.{base} as here"
        )
    try:
        check_baseline(found, opened.classifier, opened.images[base], precision=recipe.precision, **settings)
    except ValueError as error:
        reason = str(error).removeprefix("baseline: ")
        raise ValueError(f"corruptions.relative_to={path}: {reason}") from error
    return found


def _detection(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    try:
        return None if recipe.detection is None else read_detection(recipe.detection)
    except ValueError as error:
        raise ValueError(f"detection={error}") from error


def _published(recipe: EvaluateRecipe, classifier: Classifier) -> dict[str, dict[str, float]] | None:
    if recipe.published is None:
        return None
    return published_numbers(
        recipe.published,
        classifier.name.removeprefix("timm:"),
        image_size=classifier.image_size,
        crop_fraction=classifier.crop_fraction,
    )
