"""What `kill -9` leaves in shared memory is removed; what a living run uses is not."""

# ruff: noqa: F401, F811 (pytest finds the fixtures of `bucket` by their names)

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from bucket import BATCH, SIDE, shards
from filelock import FileLock

from aemim_algorithm.data.image_stream import ImageStream
from aemim_algorithm.data.leftovers import _is_alive, clean_leftovers, take_lease

WORKER = Path(__file__).with_name("leftovers_worker.py")
MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="nothing is removed without /proc"
)


class Runs:
    """Starts runs that read shards, and kills them."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.running: set[int] = set()

    def start(self, *arguments: Path) -> tuple[int, str]:
        """Start one; returns its process group and what it says: a batch, or an error."""
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        print(*arguments, file=self.parent.stdin, flush=True)
        group, _, said = self.parent.stdout.readline().partition(" ")
        self.running.add(int(group))
        return int(group), said

    def kill(self, group: int) -> None:
        self.running.discard(group)
        with suppress(ProcessLookupError):  # it ended with an error
            os.killpg(group, signal.SIGKILL)
        self.wait(group)

    def wait(self, group: int) -> None:
        """Until its last process is gone."""
        for _ in range(6000):
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)
        raise AssertionError(f"{group} is still there")

    def close(self) -> None:
        for group in list(self.running):
            self.kill(group)
        self.parent.kill()
        self.parent.communicate()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lock files in a folder of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def runs(own_folder: Path) -> Iterator[Runs]:
    started = Runs()
    try:
        yield started
    finally:
        started.close()
        clean_leftovers()


def memory_of(folder: Path) -> list[Path]:
    """The shared memory of the data sets that read or fill a folder."""
    numbers = {
        file.name.partition("_")[0]
        for file in MEMORY.glob("*_locals")
        if str(folder).encode() in file.read_bytes()
    }
    return sorted(file for number in numbers for file in MEMORY.glob(f"{number}_*"))


def test_a_dead_run_is_cleaned_up_beside_a_living_one(shards: Path, runs: Runs, own_folder: Path) -> None:
    killed, said = runs.start(own_folder / "dead", shards)
    assert said.startswith("[")
    running, said = runs.start(own_folder / "living", shards)
    assert said.startswith("[")
    dead, living = memory_of(own_folder / "dead"), memory_of(own_folder / "living")
    assert len(dead) >= 7
    assert len(living) >= 7
    runs.kill(killed)
    locks = sorted(own_folder.glob("*_filelock"))
    assert len(locks) == 4

    removed = clean_leftovers()

    assert not [file for file in dead if file.exists()]
    assert not set(removed) & {file.name for file in living}
    assert memory_of(own_folder / "living") == living
    assert sorted(own_folder.glob("*_filelock")) == locks[2:]
    assert runs.start(own_folder / "dead", shards)[1].startswith("[")
    os.killpg(running, 0)  # it is still there


def test_a_run_that_cannot_be_seen_is_known_by_its_lease() -> None:
    file = MEMORY / f"{900000 + os.getpid() % 99999}_failure"
    file.write_bytes(b"\0")
    try:
        assert not _is_alive([file], set())
        lease = take_lease(file.name)
        assert lease is not None
        assert _is_alive([file], set())
        os.close(lease)
        assert not _is_alive([file], set())
    finally:
        file.unlink()


def test_two_runs_that_start_together_share_a_cache(shards: Path, runs: Runs, own_folder: Path) -> None:
    assert runs.parent.stdin is not None
    for _ in range(2):
        print(own_folder / "cache", shards, file=runs.parent.stdin, flush=True)
    third, said = runs.start(own_folder / "cache", shards)
    assert runs.parent.stdout is not None
    first, second = (runs.parent.stdout.readline().split(" ", 1) for _ in range(2))
    runs.running |= {int(first[0]), int(second[0])}
    assert {said, first[1], second[1]} == {said}
    assert said.startswith("[")
    for group in (third, int(first[0]), int(second[0])):
        os.killpg(group, 0)


def test_cleaning_does_not_wait_for_a_run_that_hangs(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aemim_algorithm.data.leftovers._WAIT", 0.2)
    with FileLock(own_folder / f"aemim_numbers_{os.getuid()}.lock"):
        assert clean_leftovers() == []


def open_failures() -> int:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("_failure" in link for link in links)


def test_a_data_set_leaves_its_lease_open_and_no_more(shards: Path) -> None:
    """Streaming keeps its own memory until the process ends, and the lease protects its number."""
    gc.collect()  # what other tests have left
    before = open_failures()
    ImageStream(local=shards, image_size=SIDE, batch_size=BATCH)
    gc.collect()
    assert open_failures() == before + 1


def test_cleaning_is_quick(own_folder: Path) -> None:
    start_time = time.monotonic()
    clean_leftovers()
    assert time.monotonic() - start_time < 5


def test_without_proc_nothing_is_removed(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aemim_algorithm.data.leftovers._PROCESSES", own_folder / "none")
    name = f"{800000 + os.getpid() % 99999}_locals"
    (MEMORY / name).touch()
    try:
        assert clean_leftovers() == []
        assert (MEMORY / name).exists()
    finally:
        (MEMORY / name).unlink()
