"""Where does the same MAE train fastest: here, with Hugging Face's ViTMAE, or in the original code?

    python benchmarks/throughput.py --mae-repo mae      # a clone of github.com/facebookresearch/mae

The same model, batch and precision, with the batch in memory (`rivals.py`); the contenders take turns
(`turns.py`). Hugging Face's and the original code run as one writes it down: torch.optim.AdamW with its
defaults, autocast for bf16. Hugging Face's model has further rows, with eager attention and with fused AdamW;
`--compile` adds torch.compile for ours and theirs. Ratios are taken within a round. The bar is for ours over
the better of Hugging Face's and the original code's plain rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from original_mae import require_clone
from record import environment, write_json
from rivals import CONTENDERS, Contender, Loop, Setup, flops_per_image, trained_parameters, turns_of
from turns import measure, ratios, spread

from aemim_algorithm.models import MODELS

OURS, RIVALS = "ours", ("Hugging Face", "original MAE")
BARS = {("cpu", "fp32"): 1.15, ("cpu", "bf16"): 1.3, ("cuda", "fp32"): 1.3, ("cuda", "bf16"): 1.3}
MICRO_BATCHES = {"cpu": [8, 16], "cuda": [64, 256]}
STEPS = {"cpu": 1, "cuda": 10}  # of a turn: a GPU runs behind its program, and one step would wait for both


def chosen(options: argparse.Namespace) -> dict[str, Contender]:
    """The contenders that were asked for."""
    return {
        name: contender
        for name, contender in CONTENDERS.items()
        if (options.compile or not contender.compiled)
        and (options.mae_repo is not None or contender.code != "original")
    }


def parameters(contenders: Mapping[str, Contender], setup: Setup) -> int:
    """How many numbers all of them train.

    Raises:
        SystemExit: They do not train as many.
    """
    counts = {
        contender.code: trained_parameters(Loop(Contender(contender.code), setup).model)
        for contender in contenders.values()
    }
    if len({*counts.values()}) > 1:
        raise SystemExit(f"{setup.model}: the contenders train different numbers of parameters: {counts}")
    return counts[CONTENDERS[OURS].code]


def combination(model: str, precision: str, micro_batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One model, precision and batch: what all contenders took, or why it could not be measured."""
    contenders = chosen(options)
    setup = Setup(
        model, micro_batch, precision, options.device, options.seed, options.steps, options.mae_repo
    )
    codes = [*dict.fromkeys(contender.code for contender in contenders.values())]
    row: dict[str, Any] = {
        "model": model,
        "precision": precision,
        "micro_batch": micro_batch,
        "trained_parameters": parameters(contenders, Setup(model, 1, "fp32", "meta", 0, 1, options.mae_repo)),
        "flops_per_image": flops_per_image(model, codes, options.mae_repo),
    }
    with TemporaryDirectory() as folder:
        lock = Path(folder, "lock")
        makes = {name: partial(turns_of, contender, setup, lock) for name, contender in contenders.items()}
        try:
            measured = measure(makes, rounds=options.repeats, device=options.device, threads=options.threads)
        except SystemExit as ended:  # the next combination may fit
            if not isinstance(ended.code, str):  # Composer's handler of SIGTERM
                raise
            return row | {"failed": ended.code}
    row["contenders"] = {name: outcome(found) for name, found in measured.items()}
    return row | {"verdict": verdict(row, options.device)}


def outcome(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a contender's turns."""
    if not all(found["parts"]):
        return {"failed": "out of memory"}
    return {
        "seconds": [parts["step"] for parts in found["parts"]],
        "peak_memory_bytes": found["peak_memory_bytes"],
    }


def verdict(row: Mapping[str, Any], device: str) -> dict[str, Any] | None:
    """Ours over the better of the plain rivals: ratios of images/s, one a round, and whether the bar is met.

    Returns:
        ``rival``, ``ratios``, ``bar`` and ``met``; nothing without ours and one of them.
    """
    seconds = {name: row["contenders"].get(name, {}).get("seconds") for name in (OURS, *RIVALS)}
    rivals = [name for name in RIVALS if seconds[name]]
    if not seconds[OURS] or not rivals:
        return None
    rival = min(rivals, key=lambda name: statistics.median(seconds[name]))
    faster = ratios(seconds[rival], seconds[OURS])
    bar = BARS[device, row["precision"]]
    return {"rival": rival, "ratios": faster, "bar": bar, "met": statistics.median(faster) >= bar}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each contender, and below a line for each verdict."""
    lines = [
        "| model | precision | micro-batch | contender | step, s | images/s | ours is faster, × "
        "| FLOPs × ours | peak memory, GiB | × ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['model']} | {row['precision']} | {row['micro_batch']} | "
        if "failed" in row:
            lines.append(f"{start}{row['failed']} |  |  |  |  |  |  |")
            continue
        lines += [f"{start}{cells(row, name)} |" for name in row["contenders"]]
    lines.append("\nMedian (min–max).\n")
    lines += [sentence(row) for row in rows if row.get("verdict")]
    return "\n".join(lines)


def cells(row: Mapping[str, Any], name: str) -> str:
    """One contender's part of its line."""
    found, ours = row["contenders"][name], row["contenders"][OURS]
    flops = row["flops_per_image"]
    work = f"{flops[CONTENDERS[name].code] / flops[CONTENDERS[OURS].code]:.3f}"
    if "failed" in found:
        return f"{name} | {found['failed']} |  |  | {work} |  | "
    images = [row["micro_batch"] / seconds for seconds in found["seconds"]]
    faster = more = ""
    if "failed" not in ours:
        faster = spread(ratios(found["seconds"], ours["seconds"]))
        more = f"{found['peak_memory_bytes'] / ours['peak_memory_bytes']:.2f}"
    memory = f"{found['peak_memory_bytes'] / 2**30:.2f}"
    return " | ".join([name, spread(found["seconds"], 3), spread(images, 1), faster, work, memory, more])


def sentence(row: Mapping[str, Any]) -> str:
    """Whether the bar is met."""
    found = row["verdict"]
    return (
        f"- {row['model']}, {row['precision']}, {row['micro_batch']} images: {spread(found['ratios'])} times "
        f"the images/s of {found['rival']}; bar {found['bar']}: {'met' if found['met'] else 'not met'}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    names = sorted(name for name in MODELS if name.startswith("mae_"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["mae_vit_small_patch16", "mae_vit_base_patch16"], choices=names
    )
    parser.add_argument(
        "--micro-batch", nargs="+", type=int, help="images of a step; default: 8 16, CUDA 64 256"
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--mae-repo", type=Path, help="clone of github.com/facebookresearch/mae to measure, too"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also ours and Hugging Face's under torch.compile"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each contender")
    parser.add_argument("--steps", type=int, help="training steps of a turn; default: 1, CUDA 10")
    parser.add_argument("--device", default=default_device, choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: results/throughput-<device>.json")
    options = parser.parse_args(arguments)
    options.micro_batch = options.micro_batch or MICRO_BATCHES[options.device]
    options.steps = STEPS[options.device] if options.steps is None else options.steps
    options.out = options.out or Path(__file__).parent / "results" / f"throughput-{options.device}.json"
    for name, values in (
        ("micro-batch", options.micro_batch),
        ("repeats", [options.repeats]),
        ("steps", [options.steps]),
        ("threads", [options.threads]),
    ):
        for value in values:
            if value < 1:
                parser.error(f"--{name}={value}: expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: no CUDA device is there")
    if find_spec("transformers") is None:
        parser.error("Hugging Face's transformers is not installed: pip install transformers")
    if options.mae_repo is not None:
        try:
            require_clone(options.mae_repo)
        except ValueError as error:
            parser.error(f"--mae-repo={options.mae_repo}: {error}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    result = environment("benchmarks/throughput.py", arguments)
    result["settings"] = {name: getattr(options, name) for name in ("device", "threads", "seed", "steps")}
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for precision in options.precision:
            for micro_batch in options.micro_batch:
                rows.append(combination(model, precision, micro_batch, options))
                # What has been measured survives the end of the rest.
                write_json(result | {"measured": rows}, options.out)
    print(table(rows))
    return 0 if any("contenders" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
