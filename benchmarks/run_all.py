"""Run all benchmarks that fit into some minutes, the most important first.

    python benchmarks/run_all.py --device cpu --minutes 60 --images imagenet/sample.tar --mae-repo mae

Each is a process of its own with a time limit, its output in `runs/benchmarks/`. What has finished under the
same command and version of the package is not repeated, so that the same line again goes on where it was
stopped; `--again NAME` does repeat. How long a benchmark takes is known after its first time, and estimated
before. Ends with exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from runner import FAILED, REPOSITORY, Benchmark, Outcome, Runner

HERE = Path(__file__).parent
NO_CUDA, NO_IMAGES, NO_CIFAR10 = "no CUDA device here", "needs --images", "needs --cifar10"
STUDIED = ("mae", "noise", "no_adapter", "fast", "aemim")
OTHER_MODELS = ("mae_vit_small_patch16", "simmim_swin_base_patch4_window6")


def benchmarks(options: argparse.Namespace, *, cuda: bool) -> list[Benchmark]:
    """All of them in order of importance.

    Args:
        options: The command line.
        cuda: Whether there is a CUDA device.
    """
    device = options.device
    on_cpu = device == "cpu"
    mae_repo = ["--mae-repo", str(options.mae_repo)] if options.mae_repo else []
    images = ["--images", str(options.images)] if options.images else []
    no_device = "" if on_cpu or cuda else NO_CUDA

    def made(
        name: str,
        minutes: float,
        *arguments: str,
        script: str = "",
        missing: str = no_device,
        prints_result: bool = False,
        result: str = "",
    ) -> Benchmark:
        file = (options.out / (result or f"{name.replace('_', '-')}-{device}.json")).absolute()
        out = () if prints_result else ("--out", str(file))
        command = (sys.executable, str(HERE / f"{script or name}.py"), *arguments, *out)
        return Benchmark(name, command, minutes, file, missing, prints_result)

    on_device = ("--device", device)
    base = "mae_vit_base_patch16"
    recipes = [str(HERE / "studies" / "cifar10_gpu" / f"{name}.yaml") for name in STUDIED]
    no_study = no_device if options.cifar10 else NO_CIFAR10
    study = [*recipes, "--epochs", "60", "--seeds", "1", "2", "3", "--shares", "0.65", "--at-shares", "fast"]
    study += ["--runs", str(options.runs.absolute() / device / "time_to_accuracy")]
    study += [f"data.source={options.cifar10}/train.tar", f"data.test_source={options.cifar10}/test.tar"]
    gpu_cost = (options.out / "cost-cuda.json").absolute()
    cost = made("cost", 6, *on_device, "--models", base)
    other_costs = made("cost_other_models", 12, *on_device, "--models", *OTHER_MODELS, script="cost")
    if not on_cpu:  # fast enough for one file, from which data.py takes what a GPU needs
        cost = made("cost", 15, *on_device, "--models", base, *OTHER_MODELS)
    return [
        cost,
        made("throughput", 15, *on_device, *mae_repo),
        made("attack_strength", 10 if on_cpu else 6, *on_device, result=f"attack-{device}.json"),
        made("data", 6, *images, "--cost", str(gpu_cost), missing="" if options.images else NO_IMAGES),
        made("end_to_end", 10, *images),
        *([other_costs] if on_cpu else []),
        made("detection", 12, *on_device),
        # On a CPU it takes hours.
        *([] if on_cpu else [made("time_to_accuracy", 25, *study, missing=no_study)]),
        made("faults", 4, "--kills", "20", missing="", result="faults.json"),
        made("scaling", 1, "--json", missing="", prints_result=True, result="scaling.json"),
        made("corruptions", 8, "--seeds", "2", missing="", result="corruptions.json"),
    ]


def summary(outcomes: Sequence[Outcome]) -> str:
    """Markdown: what became of each."""
    lines = ["| benchmark | | minutes | |", "|---|---|---|---|"]
    for outcome in outcomes:
        minutes = "" if outcome.minutes is None else f"{outcome.minutes:.1f}"
        lines.append(f"| {outcome.name} | {outcome.state} | {minutes} | {outcome.note} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", required=True, choices=["cpu", "cuda"])
    parser.add_argument("--minutes", required=True, type=float, help="for all of them together")
    parser.add_argument("--images", type=Path, help="folder of class folders, or a tar of one")
    parser.add_argument("--cifar10", type=Path, help="folder of train.tar and test.tar")
    parser.add_argument("--mae-repo", type=Path, help="clone of github.com/facebookresearch/mae")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="NAME", help="run although they have finished"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument(
        "--runs", type=Path, default=REPOSITORY / "runs" / "benchmarks", help="folder of progress and logs"
    )
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes={options.minutes}: expected more than 0")
    for name in ("images", "cifar10", "mae_repo"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name.replace('_', '-')}={path}: no such path")
        setattr(options, name, path and path.absolute())
    known = [benchmark.name for benchmark in benchmarks(options, cuda=True)]
    for name in options.again:
        if name not in known:
            parser.error(f"--again={name}: expected one of {', '.join(known)}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    planned = benchmarks(options, cuda=torch.cuda.is_available())
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    runner = Runner(options.runs / options.device, again=options.again, environment=hidden)
    try:
        runner.run(planned, options.minutes)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        print(summary(runner.outcomes))
    return 1 if any(outcome.state == FAILED for outcome in runner.outcomes) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the benchmark in progress, too
    sys.exit(main(sys.argv[1:]))
