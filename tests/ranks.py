"""Processes of one run as forks of one that has imported everything: importing is what takes the time."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor

__all__ = ["average_with_gloo", "join_world", "run_ranks", "run_script"]


def run_script(script: Path, *arguments: str | Path, timeout: float = 300.0) -> None:
    """Run a script that calls :func:`run_ranks`, with the modules of this folder; what hangs is ended with it."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    with subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as started:
        try:
            _, errors = started.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, errors.decode()[-3000:]


def join_world() -> None:
    """Meet the other ranks, on the CPU."""
    torch.set_num_threads(1)
    dist.initialize_dist("cpu", timeout=60)


def run_ranks(
    count: int, function: Callable[[int], object], *, limit: float = 240.0, together: bool = True
) -> list[int | None]:
    """Call a function in as many processes, each with the environment that a launcher would give it.

    Args:
        count: Number of processes.
        function: Gets the rank.
        limit: Seconds that they may take.
        together: Whether the others are killed, as a launcher does it, once one has failed.

    Returns:
        The exit code of each rank; ``None`` if it had to be killed.

    Raises:
        TimeoutError: If they take longer, ``together``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {_fork(rank, count, port, function): rank for rank in range(count)}
    ends: list[int | None] = [None] * count
    deadline = time.monotonic() + limit
    while children and time.monotonic() < deadline and not (together and any(ends)):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[children.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if together and children and not any(ends):
        raise TimeoutError(f"{len(children)} of {count} ranks were not done after {limit:.0f} s")
    return ends


def _fork(rank: int, count: int, port: int, function: Callable[[int], object]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    code = 1
    try:
        function(rank)
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # frees what streaming shares
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def average_with_gloo() -> None:
    """gloo sums where FSDP2 asks it to average (pytorch#162338), and a CPU has no events for HSDP to wait for."""
    torch.cpu.Stream.record_event = lambda self: torch.cpu.Event()
    for name in ("reduce_scatter_tensor", "all_reduce"):
        setattr(torch.distributed, name, averaging(getattr(torch.distributed, name)))


def averaging(collective: Any) -> Any:
    """A collective that averages where it is asked to."""

    def average(output: Tensor, *args: Any, op: Any = torch.distributed.ReduceOp.SUM, **options: Any) -> Any:
        if op != torch.distributed.ReduceOp.AVG:
            return collective(output, *args, op=op, **options)
        done = collective(output, *args, op=torch.distributed.ReduceOp.SUM, **options)
        if done is not None:
            done.wait()
        output.div_(torch.distributed.get_world_size(options.get("group")))
        return done

    return average
