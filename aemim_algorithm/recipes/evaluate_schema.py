"""What a recipe of `aemim evaluate` can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

from omegaconf import MISSING

from aemim_algorithm.recipes.layers import RecipeError, known_names, load_onto
from aemim_algorithm.validation import require_choice, require_integer, require_number

__all__ = [
    "AttacksRecipe",
    "CorruptionsRecipe",
    "EvaluateRecipe",
    "PgdRecipe",
    "SetsRecipe",
    "load_evaluate_recipe",
]


@dataclass
class SetsRecipe:
    """Where each set is: class folders, a tar of them, or MDS shards; ``null``: left out, which is said.

    ``clean`` is the test set of any data set, by the classifier's own class names. The others are
    ImageNet's: the validation set (class folders are synsets), ``real`` (the same images, in any folders;
    skipped where they are MDS shards, which hold no file names),
    ``v2`` (folders are class numbers or synsets), ``a``, ``r``, ``sketch``, and ``c``, the folder that the
    official archives of ImageNet-C were unpacked in.
    """

    clean: str | None = None
    imagenet: str | None = None
    real: str | None = None
    v2: str | None = None
    a: str | None = None
    r: str | None = None
    sketch: str | None = None
    c: str | None = None


@dataclass
class CorruptionsRecipe:
    """Corruptions made on the fly, of ``imagenet``, or of ``clean`` where that is not given.

    ``table``: strengths for 224-pixel (``imagenet``) or 32-pixel images (``cifar``). ``corruptions``: names;
    ``null`` is all 15. ``relative_to``: the ``results.json`` of another classifier on the same images with
    the same corruptions, seed, size and precision, for errors relative to its.
    """

    table: Literal["imagenet", "cifar"] = MISSING
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    corruptions: list[str] | None = None
    seed: int = 17
    relative_to: str | None = None


@dataclass
class PgdRecipe:
    """PGD at several budgets; ``epsilons`` and ``step_size`` in 1/255 of the pixel range.

    ``step_size: null`` is 2.5 * epsilon / steps.
    """

    steps: int = 20
    epsilons: list[float] = MISSING
    step_size: float | None = None
    random_start: bool = True


@dataclass
class AttacksRecipe:
    """Attacks on ``imagenet``, or on ``clean`` where that is not given.

    ``fgsm``: budgets in 1/255 of the pixel range, each once, as those of ``pgd``. ``images``: a file
    that names the images to attack, one a line (``null``: all of the set).
    """

    fgsm: list[float] = field(default_factory=list)
    pgd: Optional[PgdRecipe] = None  # noqa: UP045 - omegaconf
    images: str | None = None
    seed: int = 17


@dataclass
class EvaluateRecipe:
    """One evaluation.

    ``classifier``: a ``classifier.pt``, ``timm:NAME``, ``hf:NAME`` or a Hugging Face folder. ``weights``: of
    a classifier ``timm:NAME``, a file or ``random`` (``null``: timm's own). ``images``: a file that names the
    images to use of ``clean``, ``imagenet`` and ``real``, one a line. ``published``: a clone of
    pytorch-image-models, to compare with its results. ``detection``: the ``results.json`` of an `aemim
    detect` from the same encoder, for Table 7. ``workers`` are processes that decode. ``precision``
    is that of the sets and their corruptions; attacks are float32. ``results.json``, ``results.md`` and the
    plots are written into ``out``, what is there so far after each set and each other part.
    """

    run_name: str = MISSING
    classifier: str = MISSING
    weights: str | None = None
    sets: SetsRecipe = field(default_factory=SetsRecipe)
    images: str | None = None
    corruptions: Optional[CorruptionsRecipe] = None  # noqa: UP045
    attacks: Optional[AttacksRecipe] = None  # noqa: UP045
    published: str | None = None
    detection: str | None = None
    batch_size: int = 64
    workers: int = 2
    device: Literal["cpu", "gpu", "mps"] | None = None
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    out: str = "evaluations/${run_name}"


def load_evaluate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateRecipe:
    """Read a recipe: its bases in order, then the file itself, then the overrides.

    Args:
        path: YAML file.
        overrides: ``key=value`` each, where a dotted key reaches into a section.

    Returns:
        The recipe with every value resolved.

    Raises:
        RecipeError: It cannot be read, or a value is missing or impossible; one line.
    """
    return load_onto(EvaluateRecipe, path, overrides, check=_check)


def _check(recipe: EvaluateRecipe) -> None:
    try:
        require_integer("batch_size", recipe.batch_size, low=1)
        require_integer("workers", recipe.workers, low=0)
        if recipe.corruptions is not None:
            _check_corruptions(recipe.corruptions)
        if recipe.attacks is not None:
            _check_attacks(recipe.attacks)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_corruptions(corruptions: CorruptionsRecipe) -> None:
    from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS

    require_integer("corruptions.seed", corruptions.seed, low=0)
    if not corruptions.severities or len(set(corruptions.severities)) < len(corruptions.severities):
        raise RecipeError(
            f"corruptions.severities={corruptions.severities}: expected some of 1 to 5, each once"
        )
    for severity in corruptions.severities:
        require_choice("corruptions.severities", str(severity), "12345")
    for name in corruptions.corruptions or ():
        if name not in CORRUPTIONS:
            raise RecipeError(
                f"corruptions.corruptions: {name!r} is unknown; {known_names(name, CORRUPTIONS)}"
            )


def _check_attacks(attacks: AttacksRecipe) -> None:
    unit = " (1/255 of the pixel range)"
    require_integer("attacks.seed", attacks.seed, low=0)
    if attacks.seed >= 2**31:
        raise RecipeError(f"attacks.seed={attacks.seed} is out of range: expected an integer below 2**31")
    _require_once("attacks.fgsm", attacks.fgsm)
    for epsilon in attacks.fgsm:
        require_number("attacks.fgsm", epsilon, low=0, high=255, unit=unit)
    pgd = attacks.pgd
    if pgd is None and not attacks.fgsm:
        raise RecipeError("attacks: expected budgets as fgsm: [0, 1, 2] or pgd: {epsilons: [0, 1, 2]}")
    if pgd is not None:
        require_integer("attacks.pgd.steps", pgd.steps, low=1)
        if pgd.step_size is not None:
            require_number("attacks.pgd.step_size", pgd.step_size, low=0, low_open=True, unit=unit)
        if not pgd.epsilons:
            raise RecipeError("attacks.pgd.epsilons=[]: expected budgets, such as [0, 1, 2]")
        _require_once("attacks.pgd.epsilons", pgd.epsilons)
        for epsilon in pgd.epsilons:
            require_number("attacks.pgd.epsilons", epsilon, low=0, high=255, unit=unit)


def _require_once(name: str, budgets: Sequence[float]) -> None:
    if len(set(budgets)) < len(budgets):
        raise RecipeError(f"{name}={list(budgets)}: expected each budget once")
