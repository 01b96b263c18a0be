"""Shards in a bucket, behind a real S3 API on loopback: what arrives, what is kept, and every failure."""

# ruff: noqa: F401, F811 (pytest finds the fixtures of `bucket` by their names)

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import pytest
from bucket import BATCH, SAMPLES, SIDE, Bucket, address, bucket, shards, write_set
from streaming import LocalDataset, MDSWriter
from streaming.base.dataset import _ShardState
from timm.data.constants import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as STD

from aemim_algorithm.data.bounded import within
from aemim_algorithm.data.failures import ShardError
from aemim_algorithm.data.remote import _has_bucket, fetch_index
from aemim_algorithm.data.shards import COLUMNS
from aemim_algorithm.data.streaming import ImageStream, train_data


def loader(local: Path, remote: str | None, **options: Any) -> Any:
    given = {"image_size": SIDE, "batch_size": BATCH, "mean": MEAN, "std": STD, "download_retries": 0}
    return train_data(local, remote=remote, **{**given, **options}).dataloader


def labels_of(batches: Any) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_what_the_folder_gives(
    shards: Path, bucket: Bucket, tmp_path: Path, workers: int
) -> None:
    near, far = loader(shards, None), loader(tmp_path / "cache", bucket.url, workers=workers, verify=True)
    for _ in range(2):
        for one, other in zip(near, far, strict=True):
            assert one["label"].equal(other["label"])
            assert one["image"].equal(other["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_stays_below_its_limit_and_evicted_shards_come_again(
    shards: Path, bucket: Bucket, tmp_path: Path, workers: int
) -> None:
    sizes = {file.name: file.stat().st_size for file in shards.glob("*.mds")}
    index, largest = (shards / "index.json").stat().st_size, max(sizes.values())
    limit = index + 7 * largest
    most, gone, done, cache = [0], set[str](), Event(), tmp_path / "cache"

    def look() -> None:
        seen: set[str] = set()
        while not done.wait(0.001):
            files = {file.name: size_of(file) for file in cache.glob("*")}
            most[0] = max(most[0], sum(files.values()))
            gone.update(seen - set(files))
            seen |= set(files)

    watcher = Thread(target=look)
    watcher.start()
    try:
        training = loader(cache, bucket.url, workers=workers, cache_limit=limit)
        epochs = [labels_of(training) for _ in range(3)]
    finally:
        done.set()
        watcher.join()
    assert [sorted(labels) for labels in epochs] == [list(range(SAMPLES))] * 3
    assert gone & set(sizes)
    assert 4 * largest < most[0] <= limit, (most[0] - index) / largest


def test_a_shard_that_is_evicted_before_it_was_seen_is_fetched_again(bucket: Bucket, tmp_path: Path) -> None:
    """Another process fetched it and threw it away: nobody else will fetch it for this one."""
    training = loader(tmp_path / "cache", bucket.url, workers=0)
    dataset: Any = training.dataset
    fetch, evicted = dataset.prepare_shard, Event()

    def first_by_another(shard: int, blocking: bool = True) -> None:
        if not evicted.is_set():
            dataset._shard_states[shard] = _ShardState.PREPARING
            Timer(0.3, evict, (shard,)).start()
        else:
            fetch(shard, blocking)

    def evict(shard: int) -> None:
        evicted.set()
        dataset._shard_states[shard] = _ShardState.REMOTE

    dataset.prepare_shard = first_by_another
    found: list[list[int]] = []
    reading = Thread(target=lambda: found.append(labels_of(training)), daemon=True)
    reading.start()
    reading.join(30)
    assert [sorted(labels) for labels in found] == [list(range(SAMPLES))]


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")


def no_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "127.0.0.1:9")


@pytest.mark.parametrize(
    ("remote", "arrange", "fault", "words"),
    [
        ("s3://bucket/set", no_credentials, "", ["no credentials", "AWS_ACCESS_KEY_ID"]),
        ("s3://other-bucket/set", None, "", ["no such bucket", "other-bucket"]),
        ("s3://bucket/other", None, "", ["s3://bucket/other/index.json", "check the folder"]),
        ("s3://bucket/set", nobody_there, "", ["no connection", "S3_ENDPOINT_URL"]),
        ("s3://bucket/set", no_scheme, "", ["S3_ENDPOINT_URL=127.0.0.1:9", "https://"]),
        ("s3://bucket/set", None, "refused", ["access refused", "credentials"]),
        ("s3://bucket/set", None, "500", ["answered 500", "again later"]),
        ("nowhere://bucket/set", None, "", ["nowhere://bucket/set"]),
        ("sftp://127.0.0.1:9/set", None, "", ["sftp://127.0.0.1:9/set"]),
    ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remote: str,
    arrange: Callable[[pytest.MonkeyPatch], None] | None,
    fault: str,
    words: list[str],
) -> None:
    if arrange is not None:
        arrange(monkeypatch)
    bucket.fail(fault)
    with pytest.raises(ShardError) as caught:
        loader(tmp_path / "cache", remote)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("*.mds"))


FIRST = "shard.00000.mds"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", ["answered 500"]),
        ("cut", ["no connection"]),
        ("stall", ["did not arrive within 2 s", "data.download_timeout"]),
        ("missing", [FIRST, "check the folder"]),
        ("short", [FIRST, "bytes arrived, expected"]),
        ("flipped", [FIRST, "xxh64"]),
    ],
)
def test_a_failure_in_mid_epoch_is_one_line_in_a_bounded_time(
    shards: Path, bucket: Bucket, tmp_path: Path, fault: str, words: list[str], workers: int
) -> None:
    options = {"download_timeout": 2.0}
    training = loader(tmp_path / "cache", bucket.url, workers=workers, **options)
    whole = bytearray((shards / FIRST).read_bytes())
    whole[200] ^= 1
    if fault == "missing":
        bucket.client.delete_object(Bucket="bucket", Key=f"set/{FIRST}")
    elif fault in ("short", "flipped"):
        bucket.put(FIRST, bytes(whole[:-100] if fault == "short" else whole))
    else:
        bucket.fail(fault)
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        for _ in training:
            pass
    assert time.monotonic() - start < 8
    line = str(caught.value)
    assert "\n" not in line
    assert "s3://bucket/set/shard.000" in line
    assert all(word in line for word in words), line
    del training, caught
    if fault == "short":  # what arrived is not taken for a shard by the next run
        bucket.put(FIRST, (shards / FIRST).read_bytes())
        assert len(labels_of(loader(tmp_path / "other", bucket.url))) == SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_that_passes_costs_nothing_but_time(
    shards: Path, bucket: Bucket, tmp_path: Path, workers: int
) -> None:
    expected = labels_of(loader(shards, None))
    training = loader(tmp_path / "cache", bucket.url, workers=workers, download_retries=3)
    bucket.fail("cut")
    healer = Timer(1.5, lambda: bucket.fail(""))
    healer.start()
    assert labels_of(training) == expected
    healer.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_local_shard_that_vanishes_in_mid_epoch_is_an_error(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "set"))
    training = loader(folder, None, workers=workers)
    (folder / FIRST).unlink()
    with pytest.raises(ShardError, match=r"shard\.00000\.mds is missing"):
        labels_of(training)


def test_half_a_shard_of_a_killed_run_is_fetched_again(shards: Path, bucket: Bucket, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / FIRST).write_bytes((shards / FIRST).read_bytes()[:100])
    (cache / "index.json.tmp").write_text("half")
    assert sorted(labels_of(loader(cache, bucket.url))) == list(range(SAMPLES))
    assert (cache / FIRST).read_bytes() == (shards / FIRST).read_bytes()


def test_a_bucket_is_asked_for_in_a_bounded_time(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert _has_bucket("bucket", 0.5)
        assert time.monotonic() - start < 10  # botocore's own limit is minutes


def test_hashes_are_required_compared_where_there_are_some_or_left_out(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "set"))
    flipped = bytearray((folder / FIRST).read_bytes())
    flipped[200] ^= 1
    (folder / FIRST).write_bytes(flipped)
    for number, verify in enumerate((None, True)):
        with pytest.raises(ShardError, match="xxh64"):
            labels_of(loader(tmp_path / f"cache{number}", str(folder), verify=verify))
    stream = ImageStream(
        local=tmp_path / "cache2", remote=str(folder), image_size=SIDE, batch_size=BATCH, verify=False
    )
    stream.prepare_shard(0)
    assert (tmp_path / "cache2" / FIRST).read_bytes() == flipped
    bare = write_set(tmp_path / "bare", hashes=())
    assert len(labels_of(loader(tmp_path / "cache3", str(bare)))) == SAMPLES
    with pytest.raises(ShardError, match="no hash"):
        loader(tmp_path / "cache4", str(bare), verify=True)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # LocalDataset's
def test_compressed_shards_arrive(shards: Path, tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "set"), columns=COLUMNS, compression="zstd") as writer:
        for sample in LocalDataset(str(shards))[:]:
            writer.write(sample)
    labels = labels_of(loader(tmp_path / "cache", str(tmp_path / "set"), workers=2))
    assert sorted(labels) == list(range(SAMPLES))
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert names == {"index.json", ".in_use", "shard.00000.mds"}


def test_a_file_that_vanishes_while_the_cache_is_looked_through_is_no_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may share the cache."""
    cache = Path(shutil.copytree(shards, tmp_path / "cache"))
    listed = Path.rglob

    def rglob(self: Path, pattern: str) -> list[Path]:
        found = list(listed(self, pattern))
        (cache / FIRST).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "rglob", rglob)
    assert len(labels_of(loader(cache, str(shards)))) == SAMPLES


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_the_index_may_be_fetched_by_several_processes_at_once(shards: Path, tmp_path: Path) -> None:
    start = time.time() + 0.2
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                time.sleep(max(0, start - time.time()))
                for trial in range(40):
                    fetch_index(str(shards), tmp_path / f"cache{trial}")
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert not list(tmp_path.rglob("index.json.*"))


def test_local_shards_have_no_cache_limit(shards: Path) -> None:
    before = sorted(os.listdir(shards))
    with pytest.raises(ValueError, match="cache_limit=40kb: expected None"):
        ImageStream(local=shards, image_size=SIDE, batch_size=BATCH, cache_limit="40kb")
    assert sorted(os.listdir(shards)) == before


def test_what_takes_too_long_is_left_behind() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        within(0.1, lambda: time.sleep(2))
    assert time.monotonic() - start < 1


def test_a_cache_that_is_too_small_for_its_workers_is_one_line(
    shards: Path, bucket: Bucket, tmp_path: Path
) -> None:
    limit = 5 * max(file.stat().st_size for file in shards.glob("*.mds"))
    training = loader(tmp_path / "cache", bucket.url, workers=2, cache_limit=limit)
    with pytest.raises(ValueError, match=rf"^cache_limit={limit}: expected at least \d+ bytes for 2 loader"):
        labels_of(training)


RECIPE = """
model:
  {name: mae_vit_tiny_patch4, image_size: 16, embed_dim: 24, depth: 1, num_heads: 2, decoder_dim: 16,
   decoder_depth: 1, decoder_heads: 2}
data:
  {source: "s3://bucket/set", cache: cache, workers: 2, crop_scale: [0.5, 1.0], verify: true,
   download_retries: 1, download_timeout: 2}
algorithms: {aemim: }
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 1ba, min_learning_rate: 0.0}
max_duration: 2000ep
keep_checkpoints: 50
global_batch_size: 16
device: cpu
"""


def test_two_ranks_train_from_a_bucket_until_its_connection_is_cut(
    shards: Path, bucket: Bucket, tmp_path: Path
) -> None:
    """Two epochs of two ranks with two workers each, in a cache that is too small for all shards."""
    index, largest = shards / "index.json", max(file.stat().st_size for file in shards.glob("*.mds"))
    limit = index.stat().st_size + 13 * largest
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", "-m", "aemim_algorithm"]
    command += ["pretrain", "tiny.yaml", f"data.cache_limit={limit}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True, env=environment
        )
    try:
        wait_until(lambda: bool(list(tmp_path.glob("runs/tiny/ep2-*.pt"))) or run.poll() is not None, 120)
        (cache,) = (tmp_path / "cache").iterdir()
        assert sum(map(size_of, cache.iterdir())) <= limit
        bucket.fail("cut")
        start = time.monotonic()
        code = run.wait(timeout=90)
        print(f"both ranks ended after {time.monotonic() - start:.1f} s")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    said = (tmp_path / "log").read_text()
    assert list(tmp_path.glob("runs/tiny/ep2-*.pt")), said[-3000:]
    assert code != 0  # that of the rank that failed, or of the one that was ended
    assert re.search(r"^aemim: s3://bucket/set/shard\.\d+\.mds: no connection: check the network", said, re.M)
    assert not (tmp_path / "runs/tiny/encoder.pt").exists()


def wait_until(done: Callable[[], bool], limit: float) -> None:
    end = time.monotonic() + limit
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
