"""A script: for each line `LOCAL [REMOTE]` that it reads, a run of its own that reads shards until it is killed.

Each run is a process group, and says `PID BATCH` or `PID ERROR` in one line. The runs are forked, so that the
libraries are imported once.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from aemim_algorithm.data.streaming import train_data

HALF = (0.5, 0.5, 0.5)


def run(local: str, remote: str | None = None) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options = {"image_size": 16, "batch_size": 8, "mean": HALF, "std": HALF, "workers": 2}
    try:
        batches = iter(train_data(local, remote=remote, **options).dataloader)  # type: ignore[arg-type]
        print(os.getpid(), next(batches)["label"].tolist(), flush=True)
        time.sleep(600)  # until it is killed
    except ValueError as error:
        print(os.getpid(), error, flush=True)
        os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: a run that has ended is gone
    for line in sys.stdin:
        if os.fork() == 0:
            run(*line.split())
