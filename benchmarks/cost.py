"""What AEMIM costs: step time, peak memory and FLOPs of MAE, AEMIM and Fast AEMIM.

    python benchmarks/cost.py --model mae_vit_base_patch16 --micro-batch 24 --precision fp32

Each method is a fresh process, so that its peak memory is its own. The processes take turns, one
step each per round, so that a slow minute of the machine hits all of them; ratios to MAE are taken
within a round. A step is forward, loss, backward and AdamW on one micro-batch of random pixels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from record import environment, write_json
from training import BATCH_MULTIPLE, METHODS, Settings, Training, bound_flops, counted_flops

from aemim_algorithm.models import MODELS

WARM_UP_STEPS = 2


def timed_step(training: Training) -> float:
    """Seconds of one training step."""
    synchronize(training.settings.device)
    start = time.perf_counter()
    training.step()
    synchronize(training.settings.device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: CUDA's allocated maximum, or the process's peak resident set."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(connection: Connection, method: str, settings: Settings) -> None:
    """A worker: warm up, then one timed step per request; at the end its peak memory."""
    torch.set_num_threads(settings.threads)
    training = Training(method, settings)
    for _ in range(WARM_UP_STEPS):
        training.step()
    connection.send("ready")
    while connection.recv() == "step":
        connection.send(timed_step(training))
    connection.send(peak_memory(settings.device))


@contextmanager
def workers(settings: Settings) -> Iterator[dict[str, Connection]]:
    """One warmed-up process for each method; none is left after an error."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for method in METHODS:
            connections[method], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, method, settings), daemon=True)
            process.start()
            theirs.close()  # so that a worker that dies ends our recv with an error
            processes.append(process)
        for method, connection in connections.items():
            receive(connection, method)
        yield connections
        for process in processes:
            process.join()  # they were asked to end
    finally:
        for process in processes:
            process.kill()  # not terminate: Composer's SIGTERM handler raises in the midst of things
            process.join()


def receive(connection: Connection, method: str) -> Any:
    """A worker's next message."""
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit(
            f"the {method} process died (see above; out of memory?): try a smaller --micro-batch"
        ) from None


def measure(settings: Settings, repeats: int) -> dict[str, dict[str, Any]]:
    """Time the methods in turns.

    Returns:
        For each method ``seconds``, one per round, and ``peak_memory_bytes``.
    """
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    with workers(settings) as connections:
        for round_number in range(repeats):
            # Another method goes first in each round, so that none always follows the same one.
            first = round_number % len(METHODS)
            order = [*METHODS][first:] + [*METHODS][:first]
            for method in order:
                connections[method].send("step")
                seconds[method].append(receive(connections[method], method))
        for connection in connections.values():
            connection.send("end")
        peaks = {method: receive(connections[method], method) for method in METHODS}
    return {method: {"seconds": seconds[method], "peak_memory_bytes": peaks[method]} for method in METHODS}


def spread(values: Sequence[float]) -> str:
    """Median and range, as the table shows them."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def table(measured: dict[str, dict[str, dict[str, Any]]], flops: dict[str, Any]) -> str:
    """Markdown: a row for each precision and method."""
    lines = [
        "| precision | method | step, s | × MAE | FLOPs × MAE | bound | peak memory, GiB | × MAE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision, by_method in measured.items():
        base = by_method["MAE"]
        for method, row in by_method.items():
            ratios = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
            cells = [
                precision,
                method,
                spread(row["seconds"]),
                spread(ratios),
                f"{flops['counted'][method] / flops['counted']['MAE']:.3f}",
                f"{flops['bound'][method] / flops['bound']['MAE']:.3f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    naive = flops["bound"]["naive"] / flops["bound"]["MAE"]
    lines.append(f"\nMedian (min–max). Naive AEMIM, with an extra clean encoder pass: {naive:.3f}.")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Step time, memory and FLOPs of AEMIM.")
    parser.add_argument(
        "--model",
        default="mae_vit_base_patch16",
        choices=sorted(name for name in MODELS if name.startswith("mae_")),
    )
    parser.add_argument("--micro-batch", type=int, default=256 if device == "cuda" else 24)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    default_out = Path(__file__).parent / "results" / f"cost-{device}.json"
    parser.add_argument("--out", type=Path, default=default_out)
    options = parser.parse_args(arguments)
    if options.micro_batch < 1 or options.micro_batch % BATCH_MULTIPLE:
        parser.error(f"--micro-batch={options.micro_batch}: expected a multiple of {BATCH_MULTIPLE}")
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/cost.py", arguments)
    settings = Settings(
        model=options.model,
        micro_batch=options.micro_batch,
        precision="fp32",
        device=options.device,
        threads=options.threads,
        seed=options.seed,
    )
    # FLOPs are proportional to the batch: count the smallest that every method can take.
    smallest = replace(settings, micro_batch=BATCH_MULTIPLE)
    flops = {"counted": counted_flops(smallest), "bound": bound_flops(smallest)}
    measured = {
        precision: measure(replace(settings, precision=precision), options.repeats)
        for precision in options.precision
    }
    result |= {"settings": asdict(settings) | {"precision": options.precision}}
    result |= {"flops_per_image": flops, "measured": measured}
    write_json(result, options.out)
    print(table(measured, flops))


if __name__ == "__main__":
    main(sys.argv[1:])
