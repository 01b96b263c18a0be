"""The command ``aemim detect``; `aemim_algorithm.cli` puts it beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aemim_algorithm.cli_scores import print_paths
from aemim_algorithm.recipes.layers import RecipeError

if TYPE_CHECKING:
    from aemim_algorithm.recipes.detect import Detected

__all__ = ["detect"]


def detect(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as model.encoder=encoder.pt")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the recipe and the data, and say how much there is to do")
    ] = False,
) -> None:
    """Train Mask R-CNN on an encoder, as a recipe says, and score it; again, to continue."""
    from aemim_algorithm.recipes.detect_schema import load_detection

    loaded = load_detection(recipe, overrides or [])
    try:
        if dry_run:
            from aemim_algorithm.recipes.detect_dry_run import dry_run_detection

            print(dry_run_detection(loaded))
        else:
            from aemim_algorithm.recipes.detect import detect as run

            _print_detector(run(loaded))
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error}") from error


def _print_detector(done: Detected) -> None:
    """Average precision and the paths of what a run wrote; from the first process only."""
    from composer.utils import dist

    if dist.get_global_rank() != 0:
        return
    print(f"{'AP, %':<8}" + "".join(f"{name:>8}" for name in done.box))
    for kind, values in (("boxes", done.box), ("masks", done.mask)):
        cells = ("–" if value is None else f"{value:.1f}" for value in values.values())
        print(f"{kind:<8}" + "".join(f"{cell:>8}" for cell in cells))
    print_paths(done, ("recipe", "checkpoint", "detector", "history", "results", "table"))
