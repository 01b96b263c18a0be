"""Starts the command ``aemim`` in forks of this process, which has imported everything once.

A start takes the time of a run instead of that of its imports, and a kill at a random moment falls into the
run. Every start is a session, and process group, of its own; nothing here has used a thread or a generator
before a fork.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from moments import MOMENTS

from aemim_algorithm import cli
from aemim_algorithm.recipes import pretrain  # noqa: F401 - its imports are what takes the time

__all__ = ["Launch", "in_child", "kill", "start", "wait"]


@dataclass(frozen=True)
class Launch:
    """How to start a run: arguments of ``aemim``, the folder to be in, processes."""

    command: list[str]
    folder: Path
    processes: int


def start(launch: Launch, moment: str | None = None) -> int:
    """Start the run in a process group of its own.

    Args:
        launch: What to start.
        moment: Where it kills its process group: a name of ``MOMENTS``.

    Returns:
        The group's number, which is its first process's.
    """
    port = _free_port()
    leader = os.fork()
    if leader:
        return leader
    try:
        os.setsid()
        _redirect(launch.folder / "log.txt")
        os.chdir(launch.folder)
        os._exit(_lead(launch, moment, port))
    finally:
        os._exit(70)


def wait(leader: int, seconds: float) -> int | None:
    """Wait for a run to end.

    Returns:
        Its exit code, negative for a signal; ``None`` if it has not ended in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(leader, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill(leader: int) -> None:
    """Kill whatever is left of a run's process group, and wait for its end."""
    try:
        os.killpg(leader, signal.SIGKILL)
        os.waitpid(leader, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # nothing was left


def in_child(function: Callable[[], str]) -> str:
    """What a function returns, computed in a fork: the process that forks runs must not start threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = function()
        except Exception:
            text = traceback.format_exc()
        os.write(writing, text.encode()[:4096])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def _lead(launch: Launch, moment: str | None, port: int) -> int:
    """The first process: one rank itself, or the parent of the ranks, as Composer's launcher is."""
    if launch.processes == 1:
        return _run(launch, moment)
    ranks = {}
    for rank in range(launch.processes):
        child = os.fork()
        if child == 0:
            os.environ.update(_rank_variables(rank, launch.processes, port))
            os._exit(_run(launch, moment))
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        del ranks[child]
        if code := os.waitstatus_to_exitcode(status):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return abs(code)
    return 0


def _run(launch: Launch, moment: str | None) -> int:
    """The command, to its exit code; nothing of the process that forked is run after it."""
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    sys.argv = ["aemim", *launch.command]
    code = 1
    try:
        if moment is not None:
            MOMENTS[moment]()
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _redirect(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
