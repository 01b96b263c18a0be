"""Checkpoints: whole or not there, kept as many as asked, and damage that is seen."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.loggers import LoggerDestination
from composer.utils import FSDP2Config
from conftest import assert_same, fit, loader, small_files, tiny_mae

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks import AtomicCheckpoints
from aemim_algorithm.callbacks.checkpoint_files import checkpoints_in, damage, link, publish, remove_partial


def run(folder: Path, *, duration: str = "3ba", interval: str = "1ba", **arguments: Any) -> Any:
    """A run of batches that leaves a checkpoint after each."""
    keep = arguments.pop("keep", None)
    saver = AtomicCheckpoints(str(folder), interval=interval, keep=keep)
    data = loader(32)
    return fit(tiny_mae(), AEMIM(), duration=duration, callbacks=[saver], train_dataloader=data, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_there_after_a_run(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    assert names(tmp_path) == [*(f"ep0-ba{n}-rank0.pt" for n in (1, 2, 3)), "latest-rank0.pt"]
    assert os.readlink(tmp_path / "latest-rank0.pt") == "ep0-ba3-rank0.pt"
    newest = checkpoints_in(tmp_path)
    assert [path.name for path in newest] == [f"ep0-ba{n}-rank0.pt" for n in (3, 2, 1)]
    assert [damage(path) for path in newest] == [None] * 3
    assert trainer.saved_checkpoints == [str(path) for path in reversed(newest)]
    saved = torch.load(newest[0], weights_only=False)["state"]["model"]
    assert_same(saved, trainer.state.model.state_dict())


def test_composer_resumes_from_them(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", duration="4ba").state.model.state_dict()
    run(tmp_path / "cut", duration="2ba", run_name="cut")
    resumed = run(tmp_path / "cut", duration="4ba", run_name="cut", autoresume=True)
    assert_same(whole, resumed.state.model.state_dict())


def test_the_newest_are_kept_across_processes(tmp_path: Path) -> None:
    run(tmp_path, duration="2ba", keep=2, run_name="kept")
    run(tmp_path, duration="4ba", keep=2, run_name="kept", autoresume=True)
    assert len(names(tmp_path)) == 3
    assert [int(path.stem.split("-")[1][2:]) for path in checkpoints_in(tmp_path)] == [4, 3]
    with pytest.raises(ValueError, match="keep=1"):
        AtomicCheckpoints(str(tmp_path), keep=1)


def test_a_run_does_not_begin_below_another_ones_checkpoints(tmp_path: Path) -> None:
    """Its own would be taken for the older ones: removed, and not continued from."""
    run(tmp_path, duration="4ba", keep=2, run_name="first")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="holds ep0-ba4-rank0.pt, and this run begins at batch 0"):
        run(tmp_path, duration="2ba", keep=2, run_name="second")
    assert names(tmp_path) == before


def test_loggers_that_upload_get_them(tmp_path: Path) -> None:
    class Uploads(LoggerDestination):
        def __init__(self) -> None:
            self.files: dict[str, int] = {}

        def upload_file(self, state: Any, remote_file_name: str, file_path: Path, **options: Any) -> None:
            self.files[remote_file_name] = len(Path(file_path).read_bytes())

        def can_upload_files(self) -> bool:
            return True

    uploads = Uploads()
    run(tmp_path, duration="1ba", loggers=uploads)
    checkpoint = tmp_path / "ep0-ba1-rank0.pt"
    assert uploads.files[str(checkpoint)] == checkpoint.stat().st_size
    assert str(tmp_path / "latest-rank0.pt.symlink") in uploads.files


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_full_disk_is_one_line_and_leaves_no_cut_file(tmp_path: Path, share: float) -> None:
    run(tmp_path, duration="1ba", run_name="full")
    before = {path: path.read_bytes() for path in checkpoints_in(tmp_path)}
    size = len(next(iter(before.values())))
    with small_files(int(share * size)), pytest.raises(OSError, match="could not be written") as error:
        run(tmp_path, duration="2ba", run_name="full", autoresume=True)
    assert "\n" not in str(error.value)
    assert "File too large" in str(error.value)
    assert "the earlier ones are whole" in str(error.value)
    assert {path: path.read_bytes() for path in checkpoints_in(tmp_path)} == before
    assert names(tmp_path) == ["ep0-ba1-rank0.pt", "latest-rank0.pt"]
    run(tmp_path, duration="2ba", run_name="full", autoresume=True)
    assert len(checkpoints_in(tmp_path)) == 2


def kill_inside(folder: Path, moment: str) -> int:
    """In a fork, publish a new checkpoint and die at a moment.

    Returns:
        The signal that the fork died of.
    """
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    new = folder / ".checkpoint.partial" / "ep0-ba2-rank0.pt"
    new.parent.mkdir()
    new.write_bytes(b"new")
    if moment != "link":
        setattr(os, moment, die)
    checkpoint = publish(new, new.name)
    os.replace = die
    link(checkpoint, "latest-rank0.pt")
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["fsync", "replace", "link"])
def test_a_kill_at_any_moment_leaves_a_link_to_a_whole_checkpoint(tmp_path: Path, moment: str) -> None:
    old = tmp_path / "ep0-ba1-rank0.pt"
    old.write_bytes(b"old")
    link(old, "latest-rank0.pt")
    assert kill_inside(tmp_path, moment) == signal.SIGKILL
    assert (tmp_path / "latest-rank0.pt").read_bytes() == b"old"
    remove_partial(tmp_path)
    left = {"fsync": [], "replace": [], "link": ["ep0-ba2-rank0.pt"]}[moment]
    assert names(tmp_path) == ["ep0-ba1-rank0.pt", *left, "latest-rank0.pt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, duration="1ba")
    return folder / "ep0-ba1-rank0.pt"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_checkpoint_is_damaged(whole: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / whole.name
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    assert damage(cut)
    assert damage(tmp_path / "missing.pt")


def test_what_cannot_be_read_now_is_not_damaged(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(zipfile, "ZipFile", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        damage(whole)


def test_a_changed_byte_is_seen_or_harmless(whole: Path, tmp_path: Path) -> None:
    """torch itself loads changed weights without a word."""
    content, saved = whole.read_bytes(), torch.load(whole, weights_only=False)["state"]["model"]
    generator, seen = random.Random(0), 0
    changed = tmp_path / whole.name
    for _ in range(60):
        copied = bytearray(content)
        copied[generator.randrange(len(copied))] ^= 1 << generator.randrange(8)
        changed.write_bytes(copied)
        if damage(changed):
            seen += 1
            continue
        # It was in the padding between two parts, or in a date.
        assert_same(torch.load(changed, weights_only=False)["state"]["model"], saved)
    assert seen > 20


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("epochs.txt", "ep1-ba2-rank1.pt", "damaged-ep0-ba1-rank0.pt", "encoder.pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".encoder.pt.123.partial").write_bytes(b"")
    (tmp_path / ".checkpoint.partial").mkdir()
    assert checkpoints_in(tmp_path) == []
    remove_partial(tmp_path)
    assert names(tmp_path) == ["damaged-ep0-ba1-rank0.pt", "encoder.pt", "ep1-ba2-rank1.pt", "epochs.txt"]
    shutil.rmtree(tmp_path)
    assert checkpoints_in(tmp_path) == []


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of FSDP2, with two checkpoints of every rank's file, that ended as the disk was full."""
    folder = tmp_path_factory.mktemp("sharded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks
        child = os.fork()
    if child == 0:  # a process group, which one process needs as well, is not for the other tests
        try:
            warnings.simplefilter("ignore")
            arguments = {"interval": "2ba", "parallelism_config": {"fsdp": FSDP2Config()}}
            run(folder, duration="4ba", **arguments)
            size = max(path.stat().st_size for path in folder.rglob("*.distcp"))
            with small_files(size // 2):
                run(folder, duration="6ba", load_path=str(folder / "ep0-ba4"), **arguments)
        except OSError as error:
            (folder / "error.txt").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return folder


def test_a_sharded_checkpoint_appears_as_a_whole_folder(sharded: Path) -> None:
    newest, oldest = checkpoints_in(sharded)
    assert [newest.name, oldest.name] == ["ep0-ba4", "ep0-ba2"]
    assert names(newest) == [".metadata", "__0_0.distcp"]
    assert os.readlink(sharded / "latest-rank0.pt") == newest.name
    assert [damage(newest), damage(oldest)] == [None, None]


def test_a_full_disk_leaves_sharded_checkpoints_whole_too(sharded: Path) -> None:
    line = (sharded / "error.txt").read_text()
    assert "could not be written" in line
    assert "File too large" in line
    assert "\n" not in line
    assert names(sharded) == ["ep0-ba2", "ep0-ba4", "error.txt", "latest-rank0.pt"]


@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
def test_damage_of_a_sharded_checkpoint_is_seen(sharded: Path, tmp_path: Path, part: str) -> None:
    whole = (sharded / "ep0-ba4" / part).read_bytes()
    changed, middle = bytearray(whole), len(whole) // 2
    for position in range(middle, middle + 256):  # longer than the padding between two tensors
        changed[position] ^= 1
    contents: dict[str, bytes | None] = {
        "missing": None,
        "cut": whole[: len(whole) // 2],
        "changed": bytes(changed),
    }
    if part == ".metadata":
        del contents["changed"]  # it has no checksum
    for name, content in contents.items():
        copied = tmp_path / name / "ep0-ba4"
        shutil.copytree(sharded / "ep0-ba4", copied)
        assert damage(copied) is None
        if content is None:
            (copied / part).unlink()
        else:
            (copied / part).write_bytes(content)
        assert damage(copied), name
