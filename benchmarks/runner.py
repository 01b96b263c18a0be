"""Run commands one after the other, as many as fit into some minutes, and go on from there the next time.

What has finished stands in a small JSON file, written atomically after each command: kill -9 loses only the
command in progress, which ends with this process.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from processes import execute, last_line
from record import write_json

__all__ = ["FAILED", "REPOSITORY", "Benchmark", "Outcome", "Runner"]

DONE, FAILED, SKIPPED, NO_TIME = "done", "failed", "skipped", "not enough time"
PROGRESS = "progress.json"
PATIENCE = 3  # times what it should take, before it counts as hanging
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Benchmark:
    """A command to run.

    Attributes:
        name: Unique.
        command: The words; it runs in the root of the repository.
        minutes: About what it takes.
        result: The file it writes.
        missing: What it needs and is not there; empty: nothing.
        prints_result: Whether the result is what it prints, and does not write itself.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    result: Path
    missing: str = ""
    prints_result: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a benchmark: minutes are those of this time, if it ran."""

    name: str
    state: str
    note: str
    minutes: float | None = None


class Runner:
    """Runs benchmarks and remembers what has finished; ``outcomes`` is what became of each so far.

    Args:
        folder: Of the note of progress and of ``logs``.
        again: Benchmarks to run although they have finished.
        environment: Variables for the commands, beside those of this process.
        version: Of the package that is measured; what finished under another one is run again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        again: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        version: str = "",
    ) -> None:
        self._folder, self._again = folder, again
        self._environment = os.environ | (environment or {})
        self._version = version or version_of("aemim-algorithm")
        self._progress = _read(folder / PROGRESS)
        self.outcomes: list[Outcome] = []

    def run(self, benchmarks: Sequence[Benchmark], minutes: float) -> None:
        """Run in order what fits into the time that is left; ``outcomes`` grows by one for each.

        Args:
            benchmarks: The most important first.
            minutes: For all of them.
        """
        end = time.monotonic() + 60 * minutes
        for benchmark in benchmarks:
            self.outcomes.append(self._one(benchmark, (end - time.monotonic()) / 60))

    def _one(self, benchmark: Benchmark, left: float) -> Outcome:
        if benchmark.missing:
            return Outcome(benchmark.name, SKIPPED, benchmark.missing)
        known = self._known(benchmark)
        finished = known.get("state") == DONE and benchmark.result.exists()
        if finished and benchmark.name not in self._again:
            return Outcome(benchmark.name, SKIPPED, f"done before, in {known['minutes']:.1f} minutes")
        expected = float(known.get("minutes", benchmark.minutes))
        if expected > left:
            return Outcome(benchmark.name, NO_TIME, f"takes about {expected:.0f} minutes")
        print(f"{benchmark.name}: about {expected:.0f} minutes", file=sys.stderr, flush=True)
        return self._run(benchmark, expected, left)

    def _known(self, benchmark: Benchmark) -> dict[str, Any]:
        """What is noted of the same command under the same version."""
        known = self._progress.get(benchmark.name)
        same = {"command": shlex.join(benchmark.command), "version": self._version}
        return known if isinstance(known, dict) and known.items() >= same.items() else {}

    def _run(self, benchmark: Benchmark, expected: float, left: float) -> Outcome:
        log = self._folder / "logs" / f"{benchmark.name}.log"
        before = _written(benchmark.result)
        start = time.monotonic()
        code = _execute(benchmark, log, 60 * min(left, PATIENCE * expected), self._environment)
        minutes = (time.monotonic() - start) / 60
        if code is None and left < PATIENCE * expected:
            # It takes longer than that, and at least as long as was thought.
            self._note(benchmark, NO_TIME, max(minutes, expected, 1.5 * left))
            return Outcome(benchmark.name, NO_TIME, f"ended after {minutes:.1f} minutes", minutes)
        note = benchmark.result.name
        if code is None:
            note = f"ended after {minutes:.1f} minutes: {PATIENCE} times what it should take"
        elif code:
            note = last_line(log) or f"exit code {code}"
        elif _written(benchmark.result) == before:
            note = f"ended without writing {benchmark.result.name}"
        else:
            self._note(benchmark, DONE, minutes)
            return Outcome(benchmark.name, DONE, note, minutes)
        self._note(benchmark, FAILED, expected)
        return Outcome(benchmark.name, FAILED, note, minutes)

    def _note(self, benchmark: Benchmark, state: str, minutes: float) -> None:
        self._progress[benchmark.name] = {
            "command": shlex.join(benchmark.command),
            "version": self._version,
            "state": state,
            "minutes": round(minutes, 3),
        }
        write_json(self._progress, self._folder / PROGRESS)


def _read(file: Path) -> dict[str, Any]:
    """The note of progress."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{file} cannot be read ({error}): everything is run again", stacklevel=2)
        return {}


def _execute(benchmark: Benchmark, log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Run a command; its exit code, or nothing if the time was up."""
    log.parent.mkdir(parents=True, exist_ok=True)
    printed = benchmark.result.with_name(f".{benchmark.result.name}.partial")
    printed.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors, (printed if benchmark.prints_result else log).open("ab") as output:
        output.truncate(0)
        code = execute(
            benchmark.command,
            output=output,
            errors=errors,
            folder=REPOSITORY,
            environment=environment,
            seconds=seconds,
        )
    if benchmark.prints_result and code == 0:
        os.replace(printed, benchmark.result)
    elif benchmark.prints_result:
        printed.unlink()
    return code


def _written(file: Path) -> int | None:
    """When a file was written last, if ever."""
    return file.stat().st_mtime_ns if file.exists() else None
