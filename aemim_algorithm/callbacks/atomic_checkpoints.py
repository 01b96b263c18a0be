"""Checkpoints that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composer.callbacks import CheckpointSaver
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import create_symlink_file, dist, format_name_with_dist
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from aemim_algorithm.callbacks.checkpoint_files import (
    FILE_NAME,
    LATEST_NAME,
    batch_of,
    checkpoints_in,
    link,
    publish,
    remove,
)
from aemim_algorithm.validation import require_integer

__all__ = ["AtomicCheckpoints"]

_PARTIAL = ".checkpoint.partial"


class AtomicCheckpoints(CheckpointSaver):
    """Composer's saver, except that a killed process or a full disk leaves no cut checkpoint.

    Composer writes in place, and for a moment there is no link to the latest one. Here a checkpoint is
    written beside its place and renamed once it is on the disk; the link is replaced, too. Loggers that
    upload files upload it, as Composer's saver makes them.

    Args:
        folder: Where checkpoints go; a local one, the same for all ranks.
        interval: Time between two checkpoints, e.g. ``"1ep"`` or ``"500ba"``; also saved at the end.
        keep: Number of checkpoints to keep, at least 2, so that there is one to fall back to; ``None``: all.
            While one is written there is one more.

    Raises:
        ValueError: If ``keep`` is out of range; at the start of training if the folder has later checkpoints.
        OSError: While training if a checkpoint cannot be written; nothing of it is left.
    """

    def __init__(self, folder: str, *, interval: str = "1ep", keep: int | None = None) -> None:
        if keep is not None:
            require_integer("keep", keep, low=2)
        super().__init__(
            folder=folder,
            filename=FILE_NAME,
            latest_filename=LATEST_NAME,
            remote_file_name=f"{folder}/{FILE_NAME}",
            latest_remote_file_name=f"{folder}/{LATEST_NAME}",
            save_interval=interval,
            overwrite=True,
        )
        self.keep = keep

    def fit_start(self, state: State, logger: Logger) -> None:
        """Make the folder; every rank must call this.

        Raises:
            ValueError: If the folder has checkpoints that are later than where this run begins.
        """
        super().fit_start(state, logger)
        folder = Path(format_name_with_dist(self.folder, state.run_name))
        newest = next(iter(checkpoints_in(folder)), None)
        if newest is not None and batch_of(newest) > state.timestamp.batch:
            raise ValueError(
                f"{folder} holds {newest.name}, and this run begins at batch {int(state.timestamp.batch)}: "
                "continue from that one, move it away, or choose another folder"
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time."""
        self._save_if_due(state, logger, Event.BATCH_CHECKPOINT)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time."""
        self._save_if_due(state, logger, Event.EPOCH_CHECKPOINT)

    def iteration_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time."""
        self._save_if_due(state, logger, Event.ITERATION_CHECKPOINT)

    def save(self, state: State, logger: Logger) -> None:
        """Save now; every rank must call this.

        Raises:
            OSError: If it cannot be written.
        """
        folder = Path(format_name_with_dist(self.folder, state.run_name))
        with _removed_afterwards(folder / _PARTIAL):
            written = save_checkpoint(state, str(folder / _PARTIAL / FILE_NAME))
            dist.barrier()  # each rank has looked for its file, which the first one now takes away
            if dist.get_global_rank() != 0:
                return
            assert written is not None  # the first rank always writes
            sharded = state.fsdp_sharded_state_dict_enabled
            partial = Path(written).parent if sharded else Path(written)
            checkpoint = publish(partial, partial.name)
            link(checkpoint, LATEST_NAME.format(rank=0))
        self.saved_checkpoints.append(str(checkpoint))
        self._upload(checkpoint, logger)
        for old in self._superfluous(checkpoint):
            remove(old)

    def _superfluous(self, newest: Path) -> list[Path]:
        """Checkpoints that need not be kept; never what was just written, nor what is newer than that."""
        found = checkpoints_in(newest.parent)
        return found[found.index(newest) + self.keep :] if self.keep else []

    def _save_if_due(self, state: State, logger: Logger, event: Event) -> None:
        if self.save_interval(state, event) and self.last_checkpoint_batch != state.timestamp.batch:
            self.last_checkpoint_batch = state.timestamp.batch
            self.save(state, logger)

    def _upload(self, checkpoint: Path, logger: Logger) -> None:
        """Hand the checkpoint and a note of which is the latest to the loggers that upload files."""
        if not logger.has_file_upload_destination():
            return
        files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
        for file in files:
            logger.upload_file(remote_file_name=str(file), file_path=file, overwrite=True)
        note = Path(self.tmp_dir_for_symlink.name, f"latest.{checkpoint.name}.symlink")
        create_symlink_file(str(checkpoint), note)
        name = checkpoint.with_name(f"{LATEST_NAME.format(rank=0)}.symlink")
        logger.upload_file(remote_file_name=str(name), file_path=note, overwrite=True)


@contextmanager
def _removed_afterwards(partial: Path) -> Iterator[None]:
    """Leave nothing of a hidden folder, and say in one line what went wrong on the disk.

    Raises:
        OSError: For whatever torch made of one.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if (reason := _reason(error)) is None:
            raise
        free = shutil.disk_usage(partial.parent).free / 2**20
        raise OSError(
            f"a checkpoint could not be written to {partial.parent} ({reason}; {free:,.1f} MiB free); the "
            "earlier ones are whole: make room and start the run again, and it continues"
        ) from error
    finally:
        if dist.get_global_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _reason(error: BaseException | None) -> str | None:
    """What the disk said, if it is that: torch wraps it, or loses it, on the way up."""
    torchs = False
    while error is not None:
        # What the network said is not the disk's.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            return error.strerror or str(error)
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
            continue
        torchs |= "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
        error = error.__cause__ or error.__context__
    return "it could not be written whole" if torchs else None
