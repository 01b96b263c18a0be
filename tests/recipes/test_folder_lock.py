"""A save folder and several runs: one is at work, and any other is refused in one line that says who is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import run_script
from small_runs import recipe_in, write_images

from aemim_algorithm.recipes.folder_lock import hold_save_folder
from aemim_algorithm.recipes.pretrain import pretrain

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@contextmanager
def another_run(folder: Path, *, with_loader: bool = False) -> Iterator[int]:
    """A process that holds a save folder until it is killed; ``with_loader``: and has one of its own."""
    held, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        with hold_save_folder(folder):
            if with_loader and os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            os.write(tell, b".")
            time.sleep(60)
        os._exit(0)
    os.close(tell)
    with open(held, "rb") as told:
        assert told.read(1) == b"."
    yield holder
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


def test_a_second_run_is_told_who_is_at_work(tmp_path: Path) -> None:
    with another_run(tmp_path / "run") as holder:
        expected = rf"^save_folder={tmp_path}/run: process {holder} on \S+ is at work [^\n]*run_name$"
        for _ in range(2):  # being refused takes nothing away from the first one
            with pytest.raises(ValueError, match=expected), hold_save_folder(tmp_path / "run"):
                pass


def test_a_killed_run_gives_its_folder_back_before_its_loaders_end(tmp_path: Path) -> None:
    with another_run(tmp_path, with_loader=True):
        pass
    with hold_save_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".at_work").read_text()


def test_a_run_that_has_ended_or_failed_gives_its_folder_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with pytest.raises(FloatingPointError), hold_save_folder(folder):
        raise FloatingPointError
    assert not (tmp_path / "new").exists()
    with hold_save_folder(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with another_run(folder):
        pass


def times_in(folder: Path) -> dict[str, int]:
    """When each file was last written, but for the lock."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".at_work"}


def test_training_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", per_class=8)
    recipe = recipe_in(tmp_path, tmp_path / "images")
    done = pretrain(recipe)
    left = times_in(tmp_path / "run")
    with another_run(tmp_path / "run"), pytest.raises(ValueError, match="at work"):
        pretrain(recipe)
    assert times_in(tmp_path / "run") == left
    assert pretrain(recipe).encoder == done.encoder


def test_every_rank_is_told(tmp_path: Path) -> None:
    with another_run(tmp_path / "run") as holder:
        run_script(Path(__file__).with_name("folder_lock_worker.py"), tmp_path / "run", tmp_path)
    for rank in (0, 1):
        assert f"process {holder} " in (tmp_path / f"refusal-{rank}.txt").read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    with pytest.raises(ValueError, match=f"save_folder={place}: cannot"), hold_save_folder(place):
        pass


def test_without_locks_in_the_file_system_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with another_run(tmp_path):
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        with hold_save_folder(tmp_path):
            pass
