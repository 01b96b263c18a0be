"""How the cost of pre-training an MAE with AEMIM grows from 1 to 1,024 GPUs; everything here is predicted.

    python benchmarks/scaling.py --model vit_base --steps 2 --strategy ddp fsdp2 hsdp --gpus 1 8 64 1024

The formulas are those of `prediction.py`, the bytes those of `communication.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from communication import STRATEGIES
from prediction import MODELS, Job, Machine, named_workload, predict

_GIB = 2**30
_MARK = re.compile(r"(<!-- scaling (.*?) -->\n).*?(<!-- /scaling -->)", re.DOTALL)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each strategy and number of GPUs."""
    lines = [
        "| strategy | GPUs | images per GPU | compute, ms | gathered, GiB (calls) "
        "| reduce-scattered, GiB (calls) | all-reduced, GiB | communication, ms | step, ms | images/s "
        "| data per node, MB/s | state per GPU, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gather, scatter, reduce = (
            row["traffic"][name] for name in ("all_gather", "reduce_scatter", "all_reduce")
        )
        cells = [
            row["strategy"],
            f"{row['gpus']:,}",
            f"{row['images']:g}" + (f" in {row['micro_batches']}" if row["micro_batches"] > 1 else ""),
            f"{1e3 * row['compute']:.1f}",
            f"{gather['payload'] / _GIB:.2f} ({gather['calls']})",
            f"{scatter['payload'] / _GIB:.2f} ({scatter['calls']})",
            f"{reduce['payload'] / _GIB:.2f}",
            f"{1e3 * row['communication']:.1f}",
            "–".join(dict.fromkeys(f"{1e3 * value:.1f}" for value in row["step"])),
            "–".join(dict.fromkeys(f"{value:,.0f}" for value in row["images_per_second"])),
            f"{row['node_data'] / 1e6:,.0f}",
            f"{row['state'] / _GIB:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"A checkpoint: {rows[0]['checkpoint'] / _GIB:.2f} GiB."])


def bytes_per_image(shards: Path) -> float:
    """Mean size of a sample in a folder of MDS shards, read from its index."""
    index = json.loads((shards / "index.json").read_text(encoding="utf-8"))["shards"]
    return sum(shard["raw_data"]["bytes"] for shard in index) / sum(shard["samples"] for shard in index)


def update(document: Path) -> None:
    """Write the tables of a Markdown file anew; each is preceded by the arguments that make it."""

    def made(mark: re.Match[str]) -> str:
        return f"{mark[1]}{report(parse(shlex.split(mark[2])))}\n{mark[3]}"

    document.write_text(_MARK.sub(made, document.read_text(encoding="utf-8")), encoding="utf-8")


def report(options: argparse.Namespace) -> str:
    """What the script prints."""
    machine = Machine(**{name: getattr(options, name) for name in asdict(Machine())} | {"gpus": options.node})
    load = named_workload(options.model, options.steps)
    image_bytes = bytes_per_image(options.shards) if options.shards else options.image_bytes
    jobs = [
        Job(strategy, gpus, options.steps, options.batch, options.micro_batch, image_bytes)
        for strategy in options.strategy
        for gpus in options.gpus
    ]
    rows = [predict(load, job, machine) for job in jobs]
    return json.dumps(rows, indent=2) if options.json else table(rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    machine = Machine()
    parser.add_argument("--model", choices=MODELS, default="vit_base")
    parser.add_argument("--steps", type=int, default=2, help="attack steps T; 0: without AEMIM")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=[*STRATEGIES])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64, 1024])
    parser.add_argument("--batch", type=int, default=4096, help="images of a step, over all GPUs")
    parser.add_argument("--micro-batch", type=int, default=256, help="images of a forward pass per GPU")
    parser.add_argument("--image-bytes", type=float, default=110e3, help="of an image in the shards")
    parser.add_argument("--shards", type=Path, help="a folder of MDS shards, to take --image-bytes from")
    parser.add_argument("--node", type=int, default=machine.gpus, help="GPUs of a node")
    for name in ("flops", "utilization", "link", "network", "latency"):
        parser.add_argument(f"--{name}", type=float, default=getattr(machine, name))
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--update", type=Path, help="write the tables of this Markdown file anew")
    options = parser.parse_args(arguments)
    for name in ("batch", "micro_batch", "image_bytes", "node", "flops", "utilization", "link", "network"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}={getattr(options, name)}: expected more than 0")
    if options.steps < 0:
        parser.error(f"--steps={options.steps}: expected at least 0")
    for gpus in options.gpus:
        if gpus < 1 or options.batch % gpus or (gpus > options.node and gpus % options.node):
            parser.error(
                f"--gpus={gpus}: expected a divisor of --batch={options.batch}, "
                f"and whole nodes of {options.node}"
            )
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.update:
        update(options.update)
    else:
        print(report(options))


if __name__ == "__main__":
    main(sys.argv[1:])
