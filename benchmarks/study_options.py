"""Options that all studies have, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from study import Recipes, split_overrides

from aemim_algorithm.data.shards import ConversionError
from aemim_algorithm.recipes.layers import RecipeError

__all__ = ["add_stage_options", "ended", "read_stage_options"]


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--finetune", type=Path, help="default: finetune.yaml beside the first recipe")
    parser.add_argument("--evaluate", type=Path, help="default: evaluate.yaml beside the first recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--finished", action="store_true", help="train nothing, report what is there")


def read_stage_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, words: Sequence[str]
) -> list[Path]:
    """Check those options, and tell the recipes from the overrides; ends with code 2 if they make no sense.

    Returns:
        The recipes; ``options.overrides`` has the rest, ``options.recipes`` what all runs share.
    """
    options.overrides = [word for word in words if "=" in word]
    paths = [Path(word) for word in words if "=" not in word]
    if not paths or len({path.stem for path in paths}) < len(paths):
        parser.error(f"got {', '.join(map(str, paths)) or 'no recipe'}: expected recipes of different names")
    finetune = options.finetune or paths[0].with_name("finetune.yaml")
    evaluate = options.evaluate or paths[0].with_name("evaluate.yaml")
    named = [("RECIPE", path) for path in paths] + [("--finetune", finetune), ("--evaluate", evaluate)]
    for name, path in named:
        if not path.is_file():
            parser.error(f"{name}={path}: no such file")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        parser.error(f"--seeds={options.seeds}: expected different numbers from 0")
    try:
        options.recipes = Recipes(finetune, evaluate, split_overrides(options.overrides), options.runs)
    except ValueError as error:
        parser.error(str(error))
    return paths


def ended(study: Callable[[], int]) -> int:
    """Run a study; its exit code, 2 for wrong input, which is one line, and 130 if it was stopped."""
    try:
        return study()
    except (RecipeError, ConversionError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
