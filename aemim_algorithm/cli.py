"""The command ``aemim``: pretrain, finetune, detect, data, export, import, evaluate, probe, report.

Here are pretrain, data, export and import; detect is in `aemim_algorithm.cli_detect` and the others are in
`aemim_algorithm.cli_scores`.

A user's error is one line on stderr. Exit code 2: the recipe or the command line is wrong; 1: the
run failed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from aemim_algorithm.cli_detect import detect
from aemim_algorithm.cli_scores import evaluate, finetune, print_paths, probe, report
from aemim_algorithm.recipes.layers import RecipeError

if TYPE_CHECKING:
    from aemim_algorithm.recipes.pretrain import Outputs

__all__ = ["app", "main"]

# The libraries behind the commands take seconds to import, so each command imports its own.


class _TwoWords(TyperGroup):
    """Lets a command have a name of two words, beside one whose name is the first of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (two := " ".join(args[:2])) in self.commands:
            args = [two, *args[2:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_TwoWords,
    help="Adversarial examples for masked image modeling, on MosaicML Composer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as max_duration=2ep")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the recipe and estimate its cost only")
    ] = False,
) -> None:
    """Pre-train as a recipe says; again, to continue."""
    from aemim_algorithm.recipes.schema import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    try:
        if dry_run:
            from aemim_algorithm.recipes.dry_run import dry_run as report

            print(report(loaded))
        else:
            from aemim_algorithm.recipes.pretrain import pretrain as run

            _print_outputs(run(loaded))
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error}") from error


app.command()(finetune)


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="photos, an image folder, or a tar of one")],
    out: Annotated[Path, typer.Argument(help="folder for the MDS shards")],
    resize: Annotated[
        int | None, typer.Option(min=1, help="short side in pixels; default: files as they are")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="threads; default: one per core")] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="the first images of each class, by name; default: all")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="go on without the files that are no images")
    ] = False,
) -> None:
    """Turn images into MDS shards for streaming; COCO's: see `aemim data coco --help`."""
    if source == "photos":
        if (resize, workers, per_class, skip_broken) != (None, None, None, False):
            raise typer.BadParameter("photos takes no --resize, --workers, --per-class or --skip-broken")
        from aemim_algorithm.data.photos import write_photos

        train, test = write_photos(out)
        print(f"wrote {out}: {train.samples} training and {test.samples} test images")
    else:
        from aemim_algorithm.data.convert import convert, report_path

        done = convert(
            source, out, resize=resize, workers=workers, per_class=per_class, skip_broken=skip_broken
        )
        print(f"wrote {out}: {done.samples} images of {len(done.classes)} classes")
        if done.broken:
            print(f"left out {len(done.broken)} files that are not images, named in {report_path(out)}")


@app.command("data coco")
def data_coco(
    annotations: Annotated[Path, typer.Argument(help="such as annotations/instances_train2017.json")],
    images: Annotated[Path, typer.Argument(help="the folder of its images, such as train2017")],
    out: Annotated[Path, typer.Argument(help="folder for the MDS shards")],
    workers: Annotated[int | None, typer.Option(min=1, help="threads; default: one per core")] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="go on without broken images and annotations")
    ] = False,
    keep_empty: Annotated[
        bool,
        typer.Option("--keep-empty/--drop-empty", help="also images without objects; evaluation needs them"),
    ] = True,
) -> None:
    """Turn COCO's images and annotations into MDS shards.

    A folder that is called coco is ./coco to `aemim data`.
    """
    from aemim_algorithm.data.coco import convert_coco
    from aemim_algorithm.data.convert import report_path

    done = convert_coco(
        annotations, images, out, skip_broken=skip_broken, keep_empty=keep_empty, workers=workers
    )
    objects = f"{done.annotations - done.crowds} objects and {done.crowds} crowds"
    print(f"wrote {out}: {done.samples} images, {objects} of {len(done.classes)} categories")
    print(f"images without objects: {done.empty} kept, {done.dropped} left out")
    if done.broken:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in done.faults.items())
        print(f"left out {len(done.broken)} that are broken ({kinds}), named in {report_path(out)}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Composer checkpoint that you trust")],
    out: Annotated[Path, typer.Argument(help="file to write; a folder for huggingface")],
    format: Annotated[
        Literal["timm", "huggingface", "mae", "tokenizer"],
        typer.Option(help="who is to load it; tokenizer: a BEiT, from a DiscreteVAE"),
    ] = "timm",
    decoder: Annotated[
        bool, typer.Option("--decoder", help="with a MAE's decoder: huggingface (ViTMAEForPreTraining), mae")
    ] = False,
    image_size: Annotated[
        str | None,
        typer.Option(help="another input size, 384 or 384x224 (height x width); default: as trained"),
    ] = None,
    window_size: Annotated[
        int | None, typer.Option(min=1, help="another window of a Swin, in patches; default: as trained")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="recipe or name of the model; default: the recipe.yaml beside the checkpoint"),
    ] = None,
) -> None:
    """Write a checkpoint's clean encoder for another library."""
    from aemim_algorithm.export import export_encoder

    size = _image_size(image_size)
    like = None
    # Other exports need no more than the checkpoint.
    if format == "huggingface" or size or window_size or model:
        from aemim_algorithm.exchange.architecture import architecture

        like = architecture(model, checkpoint)
    exported = export_encoder(
        checkpoint,
        out,
        format=format,
        decoder=decoder,
        image_size=size,
        window_size=window_size,
        model=like,
    )
    print(f"wrote {out}: {len(exported)} tensors")


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="published MAE weights, file or Hugging Face folder; or a Composer checkpoint"),
    ],
    out: Annotated[Path, typer.Argument(help="file to write, for init_from= of a recipe")],
    model: Annotated[
        str | None, typer.Option(help="recipe or name of the model that is to start from them, to check them")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="read a pickle of more than tensors (as Composer's), which can run code"
        ),
    ] = False,
) -> None:
    """Turn published MAE weights, or an earlier run's, into a starting point for pre-training."""
    from aemim_algorithm.exchange.architecture import architecture
    from aemim_algorithm.exchange.importing import import_checkpoint

    state = import_checkpoint(checkpoint, out, model=architecture(model), trust=trust)
    print(f"wrote {out}: {len(state)} tensors")
    if not any(name.startswith("decoder.") for name in state):
        print("there is no decoder in it: a model that starts from it keeps its decoder's initialisation")


for _command in (detect, evaluate, probe, report):
    app.command()(_command)


def _image_size(text: str | None) -> tuple[int, int] | None:
    """``384`` or ``384x224`` as (height, width) in pixels."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise typer.BadParameter(f"--image-size {text}: expected pixels, such as 384 or 384x224")
    return int(sides[0]), int(sides[-1])


def main() -> None:
    """Run the command line; what a user can put right ends in one line, not in a traceback."""
    try:
        app()  # ends in SystemExit; typer itself reports a wrong command line, with code 2
    except Exception as error:
        if os.environ.get("AEMIM_TRACEBACK") == "1" or not _is_expected(error):
            raise
        print(f"aemim: {_one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)


def _is_expected(error: Exception) -> bool:
    """Whether an error is the user's or the machine's rather than a fault of the program."""
    # torch's writer of checkpoints raises a RuntimeError where the disk is full.
    if type(error).__name__ == "OutOfMemoryError" or "inline_container" in str(error):
        return True
    return isinstance(error, ValueError | OSError | FloatingPointError)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecipeError):
        return text
    if type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory; lower device_train_microbatch_size ({text.partition('. ')[0]})"
    if "inline_container" in text:
        text = f"a checkpoint could not be written or read: is the disk full, or the file cut? ({text[:120]})"
    return f"{text} (AEMIM_TRACEBACK=1 shows where)"


def _print_outputs(outputs: Outputs) -> None:
    """The paths of what a run wrote, and its scores; from the first process only."""
    from composer.utils import dist

    if dist.get_global_rank() != 0:
        return
    if outputs.scores:
        print(f"{'top-1, %':<16}{'k-NN':>8}{'linear probe':>15}")
        for name, score in outputs.scores.items():
            print(f"{name + ' encoder':<16}{score['knn']:>8.1f}{score['linear']:>15.1f}")
    print_paths(outputs, ("recipe", "checkpoint", "encoder", "pictures"))
