"""What happened in a run, one line a batch: `history.jsonl` in its save folder.

`aemim report` draws from it. A line of a batch has "batch" (how many are done), "epoch" (whole epochs
before it), "seconds" of training so far, "learning_rate" (the largest of the parameter groups) and the losses
and attack measurements that were logged, by their names in Composer. A line of an evaluation has "batch",
"epoch", "seconds" and "eval", scores by name; so has one of `callbacks.online_probe`. Seconds are Composer's
clock: it stands still while the run evaluates or probes, and goes on from the checkpoint when a run is
resumed; writing a checkpoint counts.

Cost: one short write a batch. No line is held back, so a killed process loses none that it has finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ["FILE_NAME", "History", "read_history"]

FILE_NAME = "history.jsonl"

Line = dict[str, Any]

_TAIL = 2**16  # bytes at the end of the file in which the lines of the last batch are
_KEPT = ("loss/train/", "aemim/")
_EVALUATED, _TRAINED, _PROBED = "metrics/", "metrics/train/", "metrics/probe/"


class History(LoggerDestination):
    """Append a line for each batch and each evaluation to ``history.jsonl``; only the first rank writes.

    A run that is resumed cuts the file back to the batch that it goes on from, and an evaluation takes the
    place of an earlier one of the same batch, so no batch is there twice.

    Args:
        folder: The run's save folder.

    Raises:
        OSError: While training, if a line cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder, FILE_NAME)
        self._writes = dist.get_global_rank() == 0
        self._rate = 0.0
        self._logged: Line = {}
        self._scores: Line = {}
        self._probed: Line = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep what the next line is to hold; nothing here waits for a device."""
        for name, value in metrics.items():
            if name.startswith(_KEPT):
                self._logged[name] = value
            elif name.startswith(_PROBED):
                self._probed[name.removeprefix(_EVALUATED)] = value
            elif name.startswith(_EVALUATED) and not name.startswith(_TRAINED):
                self._scores[name.removeprefix(_EVALUATED)] = value

    def fit_start(self, state: State, logger: Logger) -> None:
        """Forget the batches that are trained again."""
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut(self.path, int(state.timestamp.batch))
        self._write_scores(state, self._probed)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the rate of this batch: at its end the schedulers have gone on to the next one's."""
        self._logged = {}
        self._rate = max(group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the batch's line, then what a probe of its end has found."""
        self._append(state, {"learning_rate": self._rate} | self._logged)
        self._logged = {}
        self._write_scores(state, self._probed)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Write what a probe of the epoch's end has found, before a checkpoint says that it was reached."""
        self._write_scores(state, self._probed)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Forget the scores of another evaluation."""
        self._scores = {}

    def eval_end(self, state: State, logger: Logger) -> None:
        """Write the scores of an evaluation."""
        self._write_scores(state, self._scores)

    def _write_scores(self, state: State, scores: Line) -> None:
        """Write scores in the place of earlier ones of this batch, and forget them."""
        if scores:
            if self._writes:
                _forget(self.path, int(state.timestamp.batch), scores.keys())
            self._append(state, {"eval": {name: float(value) for name, value in scores.items()}})
        scores.clear()

    def _append(self, state: State, values: Line) -> None:
        if not self._writes:
            return
        time = state.timestamp
        seconds = round(time.total_wct.total_seconds(), 3)
        line = {"batch": int(time.batch), "epoch": int(time.epoch), "seconds": seconds} | values
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def read_history(folder: str | Path) -> list[Line]:
    """The lines of a run's history; one that a killed process has not finished is left out.

    Args:
        folder: The run's save folder.

    Returns:
        The lines in the order of training.

    Raises:
        ValueError: If there is none, or a finished line is damaged.
    """
    path = Path(folder, FILE_NAME)
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE_NAME}: the run has not trained, or an older version trained it")
    return [line for line, _ in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[Line, int]]:
    """Each finished line, and the number of bytes up to its end."""
    end = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return  # torn: only the last line can be
            end += len(text)
            try:
                line = json.loads(text)
                line["batch"], line["epoch"], line["seconds"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: line {number} is no line of a history: delete it, or move the file away"
                ) from error
            yield line, end


def _cut(path: Path, batch: int) -> None:
    """Keep the lines up to a batch; what follows the first later one is of a run that went on from before.

    A run that begins keeps none: one of batch 0 is of a run that is begun again.
    """
    if not path.is_file():
        return
    keep = 0
    for line, end in _lines(path):
        if line["batch"] > batch or batch == 0:
            break
        keep = end
    os.truncate(path, keep)


def _forget(path: Path, batch: int, names: Set[str]) -> None:
    """Take out what an earlier evaluation of the same batch wrote under these names, and a torn line."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL)
        file.seek(start)
        if start:
            start += len(file.readline())  # it may begin in mid-line
        lines = file.readlines()
    kept = [line for line in lines if line.endswith(b"\n") and not _is_score(line, batch, names)]
    if kept != lines:
        _rewrite(path, start, b"".join(kept))


def _is_score(text: bytes, batch: int, names: Set[str]) -> bool:
    try:
        line = json.loads(text)
        return line["batch"] == batch and not names.isdisjoint(line.get("eval", ()))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # a damaged line is for the reader to report


def _rewrite(path: Path, start: int, tail: bytes) -> None:
    """Replace all after the first ``start`` bytes; the file is the old or the new one at any time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(path, partial)
        with open(partial, "r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(tail)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
