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

Then, on all cores: the loader with worker processes, and how many cores feed one GPU (`feeding.py`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from feeding import deliver, needs, report
from image_pipelines import PIL, STAGES, Pipeline, Seconds, build, grey_levels, timed, write_shards
from prediction import Machine
from record import environment, write_json
from scaled_decoding import scaled_decoding
from torchvision.datasets import ImageFolder
from turns import ratios, rotated, spread

RESULTS = Path(__file__).parent / "results"
GPU = "an H100 SXM"  # what `Machine` describes


def measure(pipelines: dict[str, Pipeline], rounds: int) -> dict[str, dict[str, Seconds]]:
    """Run every pipeline once a round, in turns; a first round, which fills the page cache, does not count.

    Returns:
        For each stage and pipeline the seconds per image: ``"cpu"`` and ``"wall"``, one value per round.
    """
    result: dict[str, dict[str, Seconds]] = {
        stage: {name: {"cpu": [], "wall": []} for name in pipelines} for stage in STAGES
    }
    for round_number in range(rounds + 1):
        for name in rotated([*pipelines], round_number):
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
                faster = ratios(base[clock], seconds[clock])
                cells += [spread([1 / value for value in seconds[clock]], 0), spread(faster)]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nMedian (min–max). Full size against PIL's pixels, same crop boxes: on average "
        f"{statistics.mean(differences):.3f} grey levels apart, {max(differences):.3f} in the worst image."
    )
    return "\n".join(lines)


def fed_cores(files: Sequence[str], shards: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader's workers, and look up or predict what a GPU needs."""
    delivered = deliver(
        shards,
        options.workers,
        images=len(files),
        batch=options.batch,
        seed=options.seed,
        rounds=options.rounds,
    )
    with one_core():
        scaled = scaled_decoding(files, options.seed, options.rounds)
    flops = Machine().flops
    found = needs(options.cost, flops=flops, utilization=options.utilization)
    return {
        "seconds_per_image": delivered,
        "scaled_decoding": scaled,
        "device": f"{GPU} (predicted: {options.utilization:.0%} of {flops / 1e12:.0f} TFLOP/s)",
        "needs": [asdict(need) for need in found],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders, or a tar of one")
    parser.add_argument("--rounds", type=int, default=7, help="timed epochs of each pipeline and stage")
    parser.add_argument("--batch", type=int, default=50, help="images of a batch")
    parser.add_argument(
        "--workers", nargs="+", type=int, help="numbers to try; default: 1, 2, 4, ... and all cores"
    )
    parser.add_argument(
        "--cost",
        type=Path,
        default=RESULTS / "cost-cuda.json",
        help="result of cost.py on a GPU; predictions stand in for what it does not have",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=Machine().utilization,
        help="of the GPU's peak rate, in predictions",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "data-cpu.json")
    options = parser.parse_args(arguments)
    options.workers = options.workers or up_to(os.cpu_count() or 1)
    for name in ("rounds", "batch", "workers"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                parser.error(f"--{name}={value}: expected at least 1")
    if not 0 < options.utilization <= 1:
        parser.error(f"--utilization={options.utilization}: expected more than 0, at most 1")
    if not options.images.exists():
        parser.error(f"--images={options.images}: expected a folder of images or a tar of one (no such path)")
    return options


def up_to(cores: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    return sorted({1 << power for power in range(cores.bit_length())} | {cores})


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
        shards = write_shards(folder, scratch)
        with one_core():
            measured = measure(build(folder, shards, options.batch, options.seed), options.rounds)
            differences = grey_levels(files, options.seed)
        feeding = fed_cores(files, shards, options)
    result |= {
        "settings": {
            "images": len(files),
            "mean_file_kib": round(size / len(files) / 1024, 1),
            "batch": options.batch,
            "rounds": options.rounds,
            "workers": options.workers,
            "seed": options.seed,
        },
        "seconds_per_image": measured,
        "grey_levels": {"mean": statistics.mean(differences), "worst": max(differences)},
        "feeding": feeding,
    }
    write_json(result, options.out)
    print(table(measured, differences))
    on_core = {
        kind: (measured["batches"][kind]["cpu"], measured["normalised batches"][kind]["cpu"])
        for kind in shards
    }
    print(f"\n{report(feeding, on_core)}")


if __name__ == "__main__":
    main(sys.argv[1:])
