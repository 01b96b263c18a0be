"""How many training images one core prepares: the original MAE's PIL pipeline, and ours from shards.

    python benchmarks/data.py --images imagenet/sample.tar

Four steps make a training image: read, decode, crop at random to 224 pixels, mirror; then batches of them are
normalised. The original MAE does this with PIL on an image folder. Ours runs from shards of the files as they
are, and from shards of `aemim data --resize 256`. All in one process on one core, in turns: each round runs
every pipeline once, so that a slow minute of the machine hits all of them, and ratios to PIL are taken within
a round. Images per second of processor time are what a core can do; on an idle machine the wall clock agrees.

Three stages: `images` indexes the data set at random; `batches` iterates its loader, with no workers: PIL's
are normalised, ours are left to the device for that; `normalised batches` does it on this core. The clock
starts when the first batch is there: the start of an epoch costs the same whatever its length, and 500 images
are a short one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from image_pipelines import PIL, STAGES, Pipeline, build, grey_levels
from record import environment, write_json
from torchvision.datasets import ImageFolder

Seconds = dict[str, list[float]]  # "cpu" and "wall", one of each round, per image


def timed(work: Iterator[int]) -> dict[str, float]:
    """Seconds per image of processor and wall time, after the first piece of work."""
    next(work)
    cpu, wall = time.process_time(), time.perf_counter()
    images = sum(work)
    return {
        "cpu": (time.process_time() - cpu) / images,
        "wall": (time.perf_counter() - wall) / images,
    }


def measure(pipelines: dict[str, Pipeline], rounds: int) -> dict[str, dict[str, Seconds]]:
    """Run every pipeline once a round, in turns; a first round, which fills the page cache, does not count.

    Returns:
        For each stage and pipeline the seconds per image: ``"cpu"`` and ``"wall"``, one value per round.
    """
    result: dict[str, dict[str, Seconds]] = {
        stage: {name: {"cpu": [], "wall": []} for name in pipelines} for stage in STAGES
    }
    for round_number in range(rounds + 1):
        # Another pipeline goes first in each round, so that none always follows the same one.
        first = round_number % len(pipelines)
        for name in [*pipelines][first:] + [*pipelines][:first]:
            for stage in STAGES:
                seconds = timed(pipelines[name].run(stage))
                for clock, value in seconds.items() if round_number else ():
                    result[stage][name][clock].append(value)
    return result


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core, and torch on one thread."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    try:
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


@contextmanager
def unpacked(images: Path) -> Iterator[tuple[Path, Path]]:
    """The image folder, unpacked if it is a tar, and a scratch folder."""
    with TemporaryDirectory() as scratch:
        folder = images
        if images.is_file():
            folder = Path(scratch, "images")
            with tarfile.open(images) as archive:
                archive.extractall(folder, filter="data")
        yield folder, Path(scratch)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range, as the table shows them."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(measured: dict[str, dict[str, Seconds]], differences: Sequence[float]) -> str:
    """Markdown: a row for each stage and pipeline."""
    lines = [
        "| stage | pipeline | images per core second | × PIL | images per wall second | × PIL |",
        "|---|---|---|---|---|---|",
    ]
    for stage, by_pipeline in measured.items():
        base = by_pipeline[PIL]
        for name, seconds in by_pipeline.items():
            cells = [stage, name]
            for clock in ("cpu", "wall"):
                ratios = [a / b for a, b in zip(base[clock], seconds[clock], strict=True)]
                cells += [spread([1 / value for value in seconds[clock]], 0), spread(ratios, 2)]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nMedian (min–max). Full size against PIL's pixels, same crop boxes: on average "
        f"{statistics.mean(differences):.3f} grey levels apart, {max(differences):.3f} in the worst image."
    )
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders, or a tar of one")
    parser.add_argument("--rounds", type=int, default=7, help="timed epochs of each pipeline and stage")
    parser.add_argument("--batch", type=int, default=50, help="images of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data-cpu.json")
    options = parser.parse_args(arguments)
    for name in ("rounds", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    if not options.images.exists():
        parser.error(f"--images={options.images}: expected a folder of images or a tar of one (no such path)")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/data.py", arguments)
    torch.manual_seed(options.seed)
    with unpacked(options.images) as (folder, scratch):
        files = [file for file, _ in ImageFolder(str(folder)).samples]
        if len(files) < 2 * options.batch:
            raise SystemExit(
                f"--batch={options.batch}: expected at most half of the {len(files)} images; lower it"
            )
        size = sum(Path(file).stat().st_size for file in files)
        with one_core():
            pipelines = build(folder, scratch, options.batch, options.seed)
            measured = measure(pipelines, options.rounds)
            differences = grey_levels(files, options.seed)
    result |= {
        "settings": {
            "images": len(files),
            "mean_file_kib": round(size / len(files) / 1024, 1),
            "batch": options.batch,
            "rounds": options.rounds,
            "seed": options.seed,
        },
        "seconds_per_image": measured,
        "grey_levels": {"mean": statistics.mean(differences), "worst": max(differences)},
    }
    write_json(result, options.out)
    print(table(measured, differences))


if __name__ == "__main__":
    main(sys.argv[1:])
