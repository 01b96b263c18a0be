"""Kills training runs with ``kill -9`` and starts them again: do they end where an undisturbed run ends?

    python benchmarks/faults.py --kills 20

A small recipe, from an image folder to the encoder file, runs undisturbed once. Then, for each kill, it runs
in a folder of its own, its whole process group is killed at a moment (every second one inside of something
that must not be torn, the others at random, by a seed), and the same command is started again. Weights,
optimizer and encoder file must equal the undisturbed run's bit for bit, and nothing half-written may be left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fork_server import Launch, in_child, kill, start, wait
from moments import MOMENTS
from record import environment, write_json
from torchvision.io import write_png

RECIPE = """
model:
  name: mae_vit_tiny_patch4
  image_size: 16
  embed_dim: 32
  depth: 1
  num_heads: 2
  decoder_dim: 16
  decoder_depth: 1
  decoder_heads: 2
data: {source: ../images, cache: cache, crop_scale: [0.5, 1.0]}
algorithms: {aemim: }
callbacks: {reconstruction_pictures: {interval: 18ba, num_images: 2}}
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 2ba, min_learning_rate: 0.0}
max_duration: 6ep
global_batch_size: 8
save_interval: 5ba
device: cpu
"""
IMAGES = 96  # twelve batches an epoch, so that checkpoints fall within and between epochs
LIMIT = 240.0  # seconds for one start: what lasts longer hangs


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        moment: Where it was to be killed: a name of ``MOMENTS``, or seconds after its start.
        killed: Whether it was killed before it ended.
        found: What lay in its save folder after the kill.
        seconds: Of the start that ended it.
        problem: What was wrong at the end; empty if it survived.
    """

    moment: str
    killed: bool = False
    found: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""


def write_images(folder: Path) -> None:
    """An image folder of noise in two classes."""
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        path = folder / str(number % 2) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.randint(0, 256, (3, 20, 20), generator=generator).byte(), str(path))


def command(options: argparse.Namespace) -> list[str]:
    """The recipe's command line, the same for every start."""
    return ["pretrain", "../recipe.yaml", f"data.workers={options.workers}", "save_folder=run"]


def differences(folder: Path, reference: Path) -> str:
    """How the end of a run differs from the undisturbed one's; empty if it does not."""
    folder, reference = folder / "run", reference / "run"
    for name in ("latest-rank0.pt", "encoder.pt"):
        if not (folder / name).exists():
            return f"no {name}"
    saved, expected = (
        [torch.load(run / name, weights_only=False) for name in ("latest-rank0.pt", "encoder.pt")]
        for run in (folder, reference)
    )
    for part in ("model", "optimizers"):
        if where := unequal(saved[0]["state"][part], expected[0]["state"][part], part):
            return f"{where} differs"
    if where := unequal(saved[1], expected[1], "encoder"):
        return f"{where} differs"
    # Neither what was being written nor a checkpoint that had to be set aside.
    left = {path.name for path in folder.rglob("*")} ^ {path.name for path in reference.rglob("*")}
    hidden = {path.name for path in folder.parent.rglob(".*.partial")}
    return f"other files: {sorted(left | hidden)}" if left | hidden else ""


def unequal(one: Any, other: Any, where: str) -> str:
    """Name of the first value that is not bitwise the same."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return "" if same else where
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return where
        return next((found for key in one if (found := unequal(one[key], other[key], f"{where}.{key}"))), "")
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return next((found for pair in pairs if (found := unequal(*pair, where))), "")
    return "" if one == other else where


def survive(launch: Launch, reference: Path, moment: str | float) -> Outcome:
    """Run, kill, and start again until it ends."""
    outcome = Outcome(moment if isinstance(moment, str) else f"{moment:.2f} s")
    launch.folder.mkdir()
    first = start(launch, moment if isinstance(moment, str) else None)
    ended = wait(first, moment if isinstance(moment, float) else LIMIT)
    if ended is None:
        kill(first)
    # At a moment inside of something a run kills its own process group.
    outcome.killed = ended in (None, -signal.SIGKILL)
    run = launch.folder / "run"
    outcome.found = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    if ended is None and isinstance(moment, str):
        outcome.problem = f"never came to {moment}, or hung"
        return outcome
    if ended not in ((-signal.SIGKILL,) if isinstance(moment, str) else (None, 0)):
        outcome.problem = f"the first start was not killed, it ended with code {ended}"
        return outcome
    began = time.perf_counter()
    second = start(launch)
    code = wait(second, LIMIT)
    kill(second)
    outcome.seconds = time.perf_counter() - began
    if code != 0:
        lines = (launch.folder / "log.txt").read_text(errors="replace").strip().splitlines()
        outcome.problem = f"the second start {'hung' if code is None else 'failed'}: {' '.join(lines[-1:])}"
    else:
        outcome.problem = in_child(lambda: differences(launch.folder, reference))
    return outcome


def undisturbed(launch: Launch) -> float:
    """Seconds of a run that nothing happens to."""
    launch.folder.mkdir()
    began = time.perf_counter()
    code = wait(start(launch), LIMIT)
    if code != 0:
        raise SystemExit(f"the undisturbed run failed:\n{(launch.folder / 'log.txt').read_text()[-3000:]}")
    return time.perf_counter() - began


def moments(kills: int, seconds: float, seed: int) -> list[str | float]:
    """Every second one has a name, all names in turn; the others are spread over a run by a seed."""
    generator, names = random.Random(seed), list(MOMENTS)
    named = [names[number // 2 % len(names)] for number in range(0, kills, 2)]
    times = [generator.uniform(0, seconds) for _ in range(kills // 2)]
    both: list[str | float] = [*named, *times]
    both[::2], both[1::2] = named, times
    return both


def measure(options: argparse.Namespace, folder: Path) -> tuple[float, list[Outcome]]:
    """Run everything; progress goes to stderr."""
    write_images(folder / "images")
    (folder / "recipe.yaml").write_text(RECIPE)
    launch = Launch(command(options), folder / "undisturbed", options.processes)
    seconds = undisturbed(launch)
    print(f"undisturbed: {seconds:.1f} s", file=sys.stderr)
    outcomes = []
    for number, moment in enumerate(moments(options.kills, seconds, options.seed)):
        again = Launch(launch.command, folder / f"kill{number:02d}", options.processes)
        outcomes.append(survive(again, launch.folder, moment))
        print(f"{number + 1}: {line(outcomes[-1])}", file=sys.stderr)
    return seconds, outcomes


def line(outcome: Outcome) -> str:
    """One run, as a row of the table."""
    saved = sum(name.endswith("-rank0.pt") and name.startswith("ep") for name in outcome.found)
    partial = sum(".partial" in name for name in outcome.found)
    state = "killed" if outcome.killed else "ended before"
    end = outcome.problem or "equal"
    return f"| {outcome.moment} | {state} | {saved} | {partial} | {outcome.seconds:.1f} | {end} |"


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each kill, and how many survived."""
    head = "| moment | first start | checkpoints found | half-written | second start, s | end |"
    survived = [outcome for outcome in outcomes if outcome.killed and not outcome.problem]
    killed = [outcome for outcome in outcomes if outcome.killed]
    typical = statistics.median(outcome.seconds for outcome in outcomes)
    rows = [head, "|---|---|---|---|---|---|", *map(line, outcomes)]
    total = f"survived {len(survived)} of {len(killed)} kills; median second start {typical:.1f} s"
    return "\n".join([*rows, f"\n{total}"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description="Survived kill -9, of how many?")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="2: DDP with gloo")
    parser.add_argument("--workers", type=int, default=0, help="of the data loader, each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default: none is written")
    options = parser.parse_args(arguments)
    for name, low in (("kills", 1), ("workers", 0)):
        if getattr(options, name) < low:
            parser.error(f"--{name}={getattr(options, name)}: expected at least {low}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    result = environment("benchmarks/faults.py", arguments)
    folder = tempfile.mkdtemp()  # not TemporaryDirectory: every fork that ends would remove it
    try:
        seconds, outcomes = measure(options, Path(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.problem]
    killed = sum(outcome.killed for outcome in outcomes)
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("kills", "processes", "workers", "seed")}
        result |= {"settings": settings, "undisturbed_seconds": seconds, "killed": killed}
        result |= {"survived": sum(outcome.killed and not outcome.problem for outcome in outcomes)}
        write_json(result | {"outcomes": [asdict(outcome) for outcome in outcomes]}, options.out)
    return 1 if failed or not killed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
