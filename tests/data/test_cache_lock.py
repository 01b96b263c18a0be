"""One cache and several runs: those that may share it do, and any other is refused in one line."""

# ruff: noqa: F401, F811 (pytest finds the fixtures of `bucket` by their names)

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from bucket import BATCH, SAMPLES, SIDE, Bucket, address, bucket, shards

from aemim_algorithm.data import cache_lock
from aemim_algorithm.data.cache_lock import hold_cache
from aemim_algorithm.data.damage import read_sample
from aemim_algorithm.data.failures import ShardError
from aemim_algorithm.data.remote import fetch_index
from aemim_algorithm.data.streaming import ImageStream
from aemim_algorithm.recipes.data_preflight import check_data, inspect_data
from aemim_algorithm.recipes.schema import Recipe, load_recipe

PARTIAL = f"shard.00001.mds.{'0' * 32}.partial"
LIMIT = 200_000


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_lock, "_PATIENCE", 0.2)


def stream(cache: Path, remote: Path, **options: Any) -> ImageStream:
    return ImageStream(local=cache, remote=str(remote), image_size=SIDE, batch_size=BATCH, **options)


@pytest.mark.usefixtures("impatient")
def test_a_cache_has_many_runs_without_a_limit_or_one_with_it(tmp_path: Path) -> None:
    first, second = hold_cache(tmp_path, alone=False), hold_cache(tmp_path, alone=False)
    with pytest.raises(ShardError, match=rf"^{tmp_path}: .* its own data\.cache[^\n]*$"):
        hold_cache(tmp_path, alone=True)
    for handle in (first, second):
        assert handle is not None
        os.close(handle)
    alone = hold_cache(tmp_path, alone=True)
    for wish in (True, False):
        with pytest.raises(ShardError, match=r"cache_limit"):
            hold_cache(tmp_path, alone=wish)
    assert alone is not None
    os.close(alone)


def test_what_a_killed_run_fetched_in_part_is_removed_unless_another_may_be_fetching_it(
    tmp_path: Path,
) -> None:
    names = [PARTIAL, f"{PARTIAL}.1aB2c3D4", "shard.00000.mds.tmp", "index.json.0a1b2c3d"]
    first = hold_cache(tmp_path, alone=False)
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "shard.00000.mds").touch()
    second = hold_cache(tmp_path, alone=False)
    assert all((tmp_path / name).exists() for name in names)
    for handle in (first, second):
        assert handle is not None
        os.close(handle)
    third = hold_cache(tmp_path, alone=False)
    assert third is not None
    os.close(third)
    assert not [name for name in names if (tmp_path / name).exists()]
    assert (tmp_path / "shard.00000.mds").exists()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_run_gives_its_cache_back_with_its_last_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader processes of a killed run go some seconds later."""
    monkeypatch.setattr(cache_lock, "_PATIENCE", 5.0)
    child = os.fork()
    if child == 0:
        hold_cache(tmp_path, alone=True)
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    start = time.monotonic()
    handle = hold_cache(tmp_path, alone=True)
    assert 0.3 < time.monotonic() - start < 4
    assert handle is not None
    os.close(handle)


def test_two_living_runs_without_a_limit_share_a_cache(shards: Path, tmp_path: Path) -> None:
    first, second = (stream(tmp_path / "cache", shards) for _ in range(2))
    started = iter(first), iter(second)
    for samples in started:
        assert len(list(samples)) == SAMPLES


@pytest.mark.usefixtures("impatient")
def test_two_living_runs_with_a_limit_do_not_share_a_cache(shards: Path, tmp_path: Path) -> None:
    first = stream(tmp_path / "cache", shards, cache_limit=LIMIT)
    for limit in (LIMIT, None):
        with pytest.raises(ShardError, match="used by") as caught:
            stream(tmp_path / "cache", shards, cache_limit=limit)
        assert "\n" not in str(caught.value)
        del caught
    assert len(list(first)) == SAMPLES
    del first
    gc.collect()
    assert len(list(stream(tmp_path / "cache", shards))) == SAMPLES


def test_a_limit_that_is_refused_holds_nothing(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache limit") as caught:
        stream(tmp_path / "cache", shards, cache_limit=100)
    assert len(stream(tmp_path / "cache", shards, cache_limit=LIMIT)) == SAMPLES, caught


def test_a_shard_that_another_run_cut_is_not_to_be_got_again_by_hand(shards: Path, tmp_path: Path) -> None:
    dataset = stream(tmp_path / "cache", shards)
    assert len(list(dataset)) == SAMPLES
    path = tmp_path / "cache/shard.00000.mds"
    os.truncate(path, 100)
    with pytest.raises(ShardError, match=r"has 100 bytes, expected [\d,]+: start again: it is fetched again"):
        read_sample(dataset, 0, lambda _: {"image": b"", "label": 0})
    path.unlink()
    with pytest.raises(ShardError, match=r"is missing: start again: it is fetched again"):
        read_sample(dataset, 0, lambda _: {"image": b"", "label": 0})


RECIPE = """
model: {name: mae_vit_tiny_patch4, image_size: 16, embed_dim: 24, depth: 1, num_heads: 2, decoder_dim: 16,
  decoder_depth: 1, decoder_heads: 2}
data: {source: "s3://bucket/set", workers: 0, crop_scale: [0.5, 1.0], download_retries: 0}
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 1ba, min_learning_rate: 0.0}
max_duration: 1ep
global_batch_size: 16
device: cpu
"""


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    (folder / "tiny.yaml").write_text(RECIPE)
    return load_recipe(folder / "tiny.yaml", [f"save_folder={folder / 'run'}", *overrides])


@pytest.mark.usefixtures("bucket", "impatient")
def test_a_cache_in_use_is_known_before_training(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    handle = hold_cache(cache, alone=False)
    assert inspect_data(recipe_in(tmp_path), cache).present == 0
    limited = recipe_in(tmp_path, f"data.cache_limit={LIMIT}")
    with pytest.raises(ShardError, match=r"its own data\.cache"):
        check_data(limited, cache)
    assert not (tmp_path / "run").exists()
    assert handle is not None
    os.close(handle)
    check_data(limited, cache)
    check_data(limited, cache)  # it is not held once it has been looked at


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_damage_in_a_remote_cache_is_fetched_again(
    shards: Path, bucket: Bucket, tmp_path: Path, harm: str
) -> None:
    cache, name = tmp_path / "cache", "shard.00001.mds"
    cache.mkdir()
    fetch_index(bucket.url, cache)
    whole = (shards / name).read_bytes()
    damaged = whole[:100] if harm == "cut" else bytes([*whole[:200], whole[200] ^ 1, *whole[201:]])
    (cache / name).write_bytes(damaged)
    (cache / "shard.00002.mds").write_bytes((shards / "shard.00002.mds").read_bytes())
    recipe = recipe_in(tmp_path, "data.verify=true")
    found = inspect_data(recipe, cache, keep_index=False)
    assert (found.present, found.verified) == ({"cut": 1, "flipped": 2}[harm], 1)
    assert (cache / name).exists()  # a dry run changes nothing
    check_data(recipe, cache)
    assert not (cache / name).exists()
    assert (cache / "shard.00002.mds").exists()
    dataset = ImageStream(local=cache, remote=bucket.url, image_size=SIDE, batch_size=BATCH)
    assert len(list(dataset)) == SAMPLES
    assert (cache / name).read_bytes() == whole
