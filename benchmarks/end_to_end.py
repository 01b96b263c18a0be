"""What AEMIM costs where data is read from shards: seconds per batch of the Trainer of `aemim pretrain`.

    python benchmarks/end_to_end.py --images imagenet/train.tar --recipe imagenet_vit_base_300ep --batch 256

The recipes of MAE, Fast AEMIM and AEMIM take turns (`turns.py`); a turn is a `fit` of some batches. Reported
is the time between the end of its first batch and of its last, and how much of it the Trainer waits for the
loader: the paper's 2.3 and 1.3 times MAE are such numbers. `cost.py` has the step alone, on data in memory.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from batch_clock import BatchClock
from composer import Trainer
from record import environment, write_json
from training import PLAIN
from turns import Step, measure, ratios, spread

from aemim_algorithm.callbacks import AtomicCheckpoints, OnlineProbe
from aemim_algorithm.data.shards import ConversionError
from aemim_algorithm.recipes.data_preflight import check_data
from aemim_algorithm.recipes.datasets import PHOTOS, train_shards
from aemim_algorithm.recipes.dry_run import count_images
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import build_trainer
from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe

RECIPES = Path(__file__).parents[1] / "yamls" / "pretrain"
_METHODS = {"mae": PLAIN, "simmim": PLAIN, "aemim_fast": "Fast AEMIM", "aemim": "AEMIM"}


def recipes_of(name: str) -> dict[str, Path]:
    """The recipe of each method, by the part of their names that they share."""
    paths = [(method, RECIPES / f"{name}_{end}.yaml") for end, method in _METHODS.items()]
    return {method: path for method, path in paths if path.exists()}


def known_recipes() -> list[str]:
    """The names that :func:`recipes_of` takes: those with AEMIM and without."""
    names = {path.stem.removesuffix("_aemim") for path in RECIPES.glob("*_aemim.yaml")}
    return sorted(name for name in names if PLAIN in recipes_of(name))


def turn(path: Path, overrides: Sequence[str], batches: int, device: str) -> Step:
    """What one method does in its turn: train on some batches, from the first of an epoch."""
    recipe, clock = load_recipe(path, overrides), BatchClock(batches, device)
    with redirect_stderr(io.StringIO()):  # the Trainer logs its progress
        trainer = trainer_of(recipe, clock)

    def fit() -> Mapping[str, float]:
        with redirect_stderr(io.StringIO()):
            trainer.fit(duration=f"{batches}ba", reset_time=True)
        return clock.seconds()

    return fit


def trainer_of(recipe: Recipe, clock: BatchClock) -> Trainer:
    """The Trainer of a recipe as `aemim pretrain` has it, but it saves no checkpoints and probes nothing."""
    parts = prepare(recipe)
    callbacks = [callback for callback in parts.callbacks if not isinstance(callback, OnlineProbe)]
    parts = replace(parts, callbacks=[*callbacks, clock])
    trainer = build_trainer(recipe, parts, train_shards(recipe.data))
    # Real runs save once in thousands of batches.
    trainer.state.callbacks = [
        callback for callback in trainer.state.callbacks if not isinstance(callback, AtomicCheckpoints)
    ]
    return trainer


def table(measured: Mapping[str, Mapping[str, Any]], batch: int) -> str:
    """Markdown: a row for each method."""
    lines = [
        "| method | batch, s | × plain | waiting for data, s | of the batch | images/s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    base = measured[PLAIN]["batch_seconds"]
    for method, row in measured.items():
        seconds, waiting = row["batch_seconds"], row["waiting_seconds"]
        cells = [
            method,
            spread(seconds, 3),
            spread(ratios(seconds, base)),
            spread(waiting, 3),
            f"{statistics.median(ratios(waiting, seconds)):.1%}",
            f"{batch / statistics.median(seconds):.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "\nMedian (min–max)."])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--images", default=PHOTOS, help=f"MDS shards, an image folder, a tar of one, or {PHOTOS!r} (default)"
    )
    parser.add_argument("--recipe", default="imagenet_vit_base_300ep", choices=known_recipes())
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8, help="images of an optimizer step")
    parser.add_argument("--micro-batch", type=int, help="images of a forward pass; default: all of the batch")
    parser.add_argument(
        "--batches", type=int, default=20 if on_gpu else 4, help="of a turn; one is not timed"
    )
    parser.add_argument("--repeats", type=int, default=5 if on_gpu else 3, help="timed turns of each method")
    parser.add_argument(
        "--workers", type=int, default=min(8, (os.cpu_count() or 1) - 1), help="of the loader"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="keep the shards that are made of --images here")
    parser.add_argument("--seed", type=int, default=17)
    default_out = Path(__file__).parent / "results" / f"end-to-end-{'cuda' if on_gpu else 'cpu'}.json"
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the recipes, such as data.resize=256"
    )
    options = parser.parse_args(arguments)
    options.device = "cuda" if on_gpu else "cpu"
    for name, low in (("batch", 1), ("batches", 2), ("repeats", 1), ("workers", 0), ("threads", 1)):
        if getattr(options, name) < low:
            parser.error(f"--{name}={getattr(options, name)}: expected at least {low}")
    options.micro_batch = options.batch if options.micro_batch is None else options.micro_batch
    if not 1 <= options.micro_batch <= options.batch:
        parser.error(f"--micro-batch={options.micro_batch}: expected 1 to --batch={options.batch}")
    return options


def overrides_of(options: argparse.Namespace, source: str, scratch: Path) -> list[str]:
    """What differs from the recipe for all methods."""
    return [
        f"data.source={source}",
        f"data.cache={options.cache or scratch / 'cache'}",
        f"data.workers={options.workers}",
        f"global_batch_size={options.batch}",
        f"device_train_microbatch_size={options.micro_batch}",
        f"max_duration={options.batches}ba",
        "schedule.warmup=0ba",
        "schedule.milestones=[]",
        "evaluate=false",
        f"seed={options.seed}",
        *options.overrides,
    ]


def shards_for(options: argparse.Namespace, scratch: Path) -> Path:
    """The shards of ``--images``, made once for all methods.

    Raises:
        RecipeError: If a recipe cannot run here, or the images are too few for a turn.
        ConversionError: If the images cannot be converted.
    """
    overrides = overrides_of(options, options.images, scratch)
    for method, path in recipes_of(options.recipe).items():
        recipe = load_recipe(path, [*overrides, f"save_folder={scratch / method}"])
        prepare(recipe)
    folder = train_shards(recipe.data)
    check_data(recipe, folder, None)
    images = count_images(str(folder)) or 0
    if images < options.batches * options.batch:
        raise RecipeError(
            f"--batches={options.batches}: expected at most {images // options.batch}, as there are {images} "
            f"images and --batch={options.batch}"
        )
    return folder


def run(options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Measure every method; seconds per batch and of waiting, one entry a round."""
    overrides = overrides_of(options, str(shards_for(options, scratch)), scratch)
    contenders = {
        method: partial(
            turn, path, [*overrides, f"save_folder={scratch / method}"], options.batches, options.device
        )
        for method, path in recipes_of(options.recipe).items()
    }
    measured = measure(contenders, rounds=options.repeats, device=options.device, threads=options.threads)
    return {
        method: {
            "batch_seconds": [parts["batch"] for parts in row["parts"]],
            "waiting_seconds": [parts["waiting"] for parts in row["parts"]],
            "peak_memory_bytes": row["peak_memory_bytes"],
        }
        for method, row in measured.items()
    }


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/end_to_end.py", arguments)
    try:
        with TemporaryDirectory() as scratch:
            measured = run(options, Path(scratch))
    except (RecipeError, ConversionError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    names = ("images", "recipe", "batch", "micro_batch", "batches", "repeats", "workers", "threads", "seed")
    result["settings"] = {name: getattr(options, name) for name in (*names, "device", "overrides")}
    result["measured"] = measured
    write_json(result, options.out)
    print(table(measured, options.batch))


if __name__ == "__main__":
    main(sys.argv[1:])
