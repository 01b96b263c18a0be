"""The commands of ``aemim`` that ask how good an encoder is: finetune, evaluate, probe, report.

`aemim_algorithm.cli` puts them beside the others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aemim_algorithm.recipes.layers import RecipeError

if TYPE_CHECKING:
    from aemim_algorithm.recipes.finetune import FineTuned

__all__ = ["evaluate", "finetune", "print_paths", "probe", "report"]


def finetune(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as model.encoder=encoder.pt")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the recipe and estimate its cost only")
    ] = False,
) -> None:
    """Train a classifier from an encoder, as a recipe says; again, to continue."""
    from aemim_algorithm.recipes.schema import load_finetuning

    loaded = load_finetuning(recipe, overrides or [])
    try:
        if dry_run:
            from aemim_algorithm.recipes.dry_run import dry_run as report

            print(report(loaded))
        else:
            from aemim_algorithm.recipes.finetune import finetune as run

            _print_classifier(run(loaded))
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error}") from error


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as sets.a=imagenet-a")
    ] = None,
) -> None:
    """Score a classifier on test sets, corruptions and attacks, as the paper's tables."""
    from aemim_algorithm.recipes.evaluate import JSON_NAME, TABLE_NAME
    from aemim_algorithm.recipes.evaluate import evaluate as run
    from aemim_algorithm.recipes.evaluate_schema import load_evaluate_recipe

    loaded = load_evaluate_recipe(recipe, overrides or [])
    try:
        run(loaded, command=["aemim", *sys.argv[1:]])
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    print(Path(loaded.out, TABLE_NAME).read_text(encoding="utf-8"))
    print(f"wrote {loaded.out}: {JSON_NAME}, {TABLE_NAME}")


def probe(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="such as encoder=runs/quickstart/encoder.pt"),
    ],
) -> None:
    """Score a frozen encoder: k-NN and linear probes, on features that are kept beside it."""
    from aemim_algorithm.recipes.probe import run_probe
    from aemim_algorithm.recipes.probe_schema import load_probe

    named = "=" not in arguments[0]
    recipe = load_probe(arguments[0] if named else None, arguments[1:] if named else arguments)
    outputs = run_probe(recipe, command=["aemim", "probe", *arguments])
    print(f"{'top-1, %':<12}{'value':>8}{'95% interval':>18}{'n':>10}")
    for row in outputs.results:
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        print(f"{row['metric']:<12}{row['value']:>8.2f}{interval:>18}{row['n']:>10,}")
    kept = "kept from before" if outputs.cached else "computed"
    print(f"features {kept}, {outputs.seconds:.1f} s; {recipe.pooling} pooling, no augmentation")
    print(f"results     {outputs.out}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="save folders of runs")],
    out: Annotated[Path, typer.Option(help="folder for report.md and its plots")] = Path("report"),
) -> None:
    """Put runs side by side: settings, losses, scores; detectors beside the paper's Table 7."""
    from aemim_algorithm.evaluation.report import write_report

    for path in write_report(runs, out):
        print(path)


def _print_classifier(done: FineTuned) -> None:
    """The accuracy and the paths of what a run wrote; from the first process only."""
    from composer.utils import dist

    if dist.get_global_rank() == 0:
        print(done.accuracy)
        print_paths(done, ("recipe", "checkpoint", "classifier", "history"))


def print_paths(outputs: object, names: tuple[str, ...]) -> None:
    """Print what a run wrote.

    Args:
        outputs: Has a path by each of the names.
        names: Of what to print; what is not there is left out.
    """
    for name in names:
        path = getattr(outputs, name)
        if path.exists():
            print(f"{name:<12}{path}")
