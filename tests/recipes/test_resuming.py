"""A run that is started again: from the newest whole checkpoint, or one line that says why not."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
from conftest import fit, loader, tiny_mae

from aemim_algorithm.callbacks import AtomicCheckpoints
from aemim_algorithm.callbacks.checkpoint_files import checkpoints_in
from aemim_algorithm.recipes.resuming import has_checkpoint, resume_point


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run with three checkpoints."""
    saver = AtomicCheckpoints(str(tmp_path), interval="1ba")
    fit(tiny_mae(), duration="3ba", callbacks=[saver], train_dataloader=loader(32))
    return tmp_path


def test_the_newest_one_is_taken(folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert has_checkpoint(folder)
    assert resume_point(folder) == folder / "ep0-ba3-rank0.pt"
    assert sorted(folder.iterdir()) == before


def test_a_run_without_checkpoints_starts(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert resume_point(folder) is None
        assert not has_checkpoint(folder)


@pytest.mark.parametrize("lost", ["missing", "old"])
def test_a_link_that_was_not_replaced_any_more_is_put_right(folder: Path, lost: str) -> None:
    latest = folder / "latest-rank0.pt"
    latest.unlink()
    if lost == "old":
        latest.symlink_to("ep0-ba2-rank0.pt")
    resume_point(folder)
    assert os.readlink(latest) == "ep0-ba3-rank0.pt"


def test_damaged_ones_are_set_aside_with_a_warning_that_names_both(folder: Path) -> None:
    newest, second, third = checkpoints_in(folder)
    newest.write_bytes(b"")
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert resume_point(folder) == third
    for warning, damaged in zip(caught, (newest, second), strict=True):
        assert f"{damaged.name} is damaged" in str(warning.message)
        assert f"continues from {third.name}" in str(warning.message)
    assert checkpoints_in(folder) == [third]
    assert (folder / "latest-rank0.pt").resolve() == third.resolve()
    assert (folder / f"damaged-{second.name}").stat().st_size == len(content) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume_point(folder) == third


def test_none_that_is_whole_is_an_error_that_touches_nothing(folder: Path) -> None:
    for checkpoint in checkpoints_in(folder):
        checkpoint.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of its 3 checkpoints.*ep0-ba3-rank0.pt: File is not"
    ) as error:
        resume_point(folder)
    assert "\n" not in str(error.value)
    assert len(checkpoints_in(folder)) == 3


def test_a_link_to_nothing_is_no_fresh_start(folder: Path) -> None:
    for checkpoint in checkpoints_in(folder):
        checkpoint.unlink()
    assert has_checkpoint(folder)
    with pytest.raises(ValueError, match=r"latest-rank0.pt links to nothing"):
        resume_point(folder)


def test_what_a_killed_run_had_not_finished_is_removed(folder: Path) -> None:
    (folder / ".checkpoint.partial").mkdir()
    (folder / ".checkpoint.partial" / "ep0-ba4-rank0.pt").write_bytes(b"cut")
    (folder / ".encoder.pt.77.partial").write_bytes(b"cut")
    (folder / ".latest-rank0.pt.partial").symlink_to("ep0-ba9-rank0.pt")
    (folder / "pictures").mkdir()
    (folder / "pictures" / ".batch0000004.png.partial").write_bytes(b"cut")
    resume_point(folder)
    assert not list(folder.rglob(".*"))


def test_one_that_is_damaged_a_second_time_is_set_aside_again(folder: Path) -> None:
    """A folder of sharded checkpoints, too, over what was set aside before."""
    aside = folder / "damaged-ep0-ba9"
    for place in (aside, folder / "ep0-ba9"):
        place.mkdir()
        (place / "__0_0.distcp").write_bytes(place.name.encode())
    with pytest.warns(UserWarning, match="ep0-ba9 is damaged"):
        assert resume_point(folder) == folder / "ep0-ba3-rank0.pt"
    assert (aside / "__0_0.distcp").read_bytes() == b"ep0-ba9"


def test_what_cannot_be_looked_at_is_one_line_and_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(checkpoint: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(checkpoint))

    monkeypatch.setattr("aemim_algorithm.recipes.resuming.damage", stale)
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="cannot be looked at .*Stale file handle"):
        resume_point(folder)
    assert sorted(folder.iterdir()) == before
