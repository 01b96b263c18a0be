"""What a run finds out before it trains: about its data, its disks and its save folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import RECIPE
from streaming import MDSWriter
from torchvision.io import encode_png

from aemim_algorithm.data.shards import COLUMNS, HASH, write_shards
from aemim_algorithm.recipes import data_preflight
from aemim_algorithm.recipes.data_preflight import check_data, inspect_data
from aemim_algorithm.recipes.dry_run import dry_run
from aemim_algorithm.recipes.preflight import checkpoints_kept, prepare
from aemim_algorithm.recipes.pretrain import pretrain
from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe

SAMPLES, SIDE = 32, 16


def write_set(folder: Path, samples: int = SAMPLES, hashes: tuple[str, ...] = (HASH,)) -> Path:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=8000, hashes=list(hashes)) as writer:
        for label, image in enumerate(images):
            writer.write({"image": encode_png(image).numpy().tobytes(), "label": label})
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def recipe_of(folder: Path, source: Path | str, *overrides: str) -> Recipe:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    places = [f"data.source={source}", f"data.cache={folder / 'cache'}", f"save_folder={folder / 'run'}"]
    short = ["max_duration=1ep", "schedule.warmup=1ba"]
    return load_recipe(path, [*places, *short, *overrides])


def test_hashes_are_written_and_found_right(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_shards([(b"one", 0), (b"other", 1)], folder, classes=("a", "b"), made_from={})
    index = json.loads((folder / "index.json").read_text())
    assert [list(shard["raw_data"]["hashes"]) for shard in index["shards"]] == [["xxh64"]]
    found = inspect_data(recipe_of(tmp_path, folder, "data.verify=true", "global_batch_size=2"), folder)
    assert (found.samples, found.shards, found.present, found.verified) == (2, 1, 1, 1)


def test_what_is_there_is_said_in_a_dry_run(tmp_path: Path, shards: Path) -> None:
    count = len(list(shards.glob("*.mds")))
    size = sum(file.stat().st_size for file in shards.glob("*.mds"))
    text = dry_run(recipe_of(tmp_path, shards, "data.verify=true"), seconds=0.01)
    assert f"data: 32 images in {count} shards, {size / 1024:.1f} KiB, all present, {count} verified" in text
    assert "for 4 checkpoints of" in text
    assert not (tmp_path / "run").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SECOND = "shard.00001.mds"


@pytest.mark.parametrize(
    ("damage", "overrides", "words"),
    [
        (lambda folder: (folder / SECOND).unlink(), [], [SECOND, "missing or cut short", "found nothing"]),
        (lambda folder: os.truncate(folder / SECOND, 100), [], [SECOND, "found 100 bytes", "get it again"]),
        (lambda folder: os.truncate(folder / SECOND, 0), [], [SECOND, "found 0 bytes"]),
        (
            lambda folder: flip(folder / SECOND),
            ["data.verify=true"],
            ["1 of", SECOND, "not what was written"],
        ),
        (lambda folder: (folder / "index.json").write_text('{"shards": []}'), [], ["no samples"]),
        (
            lambda folder: (folder / "index.json").write_text('{"shards": [{"samples": 3}]}'),
            [],
            ["is no index of shards"],
        ),
        (lambda folder: (folder / "index.json").write_text("[1]"), [], ["is no index of shards"]),
        (lambda folder: (folder / "index.json").write_text('{"sha'), [], ["is no index of shards"]),
        (lambda folder: None, ["global_batch_size=64"], ["global_batch_size=64", "at most 32"]),
        (
            lambda folder: None,
            ["global_batch_size=33", "data.canonical_nodes=3"],
            ["global_batch_size=33", "at most 30"],
        ),
    ],
)
def test_damaged_data_is_one_line_before_training(
    tmp_path: Path, shards: Path, damage: Any, overrides: list[str], words: list[str]
) -> None:
    recipe = recipe_of(tmp_path, shards, *overrides)
    damage(shards)
    with pytest.raises(ValueError, match=words[0]) as caught:
        check_data(recipe, shards)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_flipped_bytes_are_seen_only_on_request(tmp_path: Path, shards: Path) -> None:
    flip(shards / SECOND)
    check_data(recipe_of(tmp_path, shards), shards)


def test_shards_without_hashes_cannot_be_verified(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", hashes=())
    with pytest.raises(ValueError, match=r"no hash of shard\.00000\.mds: write the shards with"):
        check_data(recipe_of(tmp_path, folder, "data.verify=true"), folder)


def test_damaged_test_images_are_found_before_training(tmp_path: Path, shards: Path) -> None:
    test = write_set(tmp_path / "test")
    (test / SECOND).unlink()
    recipe = recipe_of(tmp_path, shards, "evaluate=true", f"data.test_source={test}")
    with pytest.raises(ValueError, match=f"test: {SECOND} is missing"):
        check_data(recipe, shards, test)


def test_other_columns_are_one_line(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "set"), columns={"text": "str"}) as writer:
        writer.write({"text": "no image"})
    with pytest.raises(ValueError, match=r"has the columns \['text'\]"):
        check_data(recipe_of(tmp_path, tmp_path / "set", "global_batch_size=1"), tmp_path / "set")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": "jpeg", "label": "int"}, "the column image as 'jpeg', expected 'bytes'"),
        ({"image": "bytes", "label": "str"}, "the column label as 'str', expected 'int'"),
        (
            {"image": "bytes", "label": "int", "more": "pkl"},
            "the column more as 'pkl', which can run any code",
        ),
    ],
)
def test_columns_of_other_kinds_are_one_line(tmp_path: Path, columns: dict[str, str], words: str) -> None:
    samples: dict[str, Any] = {"bytes": b"", "jpeg": Image.new("RGB", (16, 16)), "int": 1, "str": "cat"}
    with MDSWriter(out=str(tmp_path / "set"), columns=columns) as writer:
        writer.write({name: samples.get(encoding) for name, encoding in columns.items()})
    with pytest.raises(ValueError, match=words) as caught:
        pretrain(recipe_of(tmp_path, tmp_path / "set", "global_batch_size=1"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["shard.00000.mds", "shard.00000.mds.zstd"])
def test_shards_without_an_index_are_no_image_folder(tmp_path: Path, shards: Path, name: str) -> None:
    (shards / "index.json").unlink()
    (shards / "shard.00000.mds").rename(shards / name)
    with pytest.raises(RecipeError, match=r"^data\.source=.*set: has no index\.json: get it again"):
        prepare(recipe_of(tmp_path, shards))


class TestDisks:
    """Disks that are too small, as the library that asks the system for them would say."""

    @pytest.fixture(autouse=True)
    def nearly_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
        monkeypatch.setattr("aemim_algorithm.data.space.shutil.disk_usage", lambda path: usage)

    def test_checkpoints_need_space(self, tmp_path: Path, shards: Path) -> None:
        with pytest.raises(
            RecipeError, match=r"run: 4\.9 KiB free, .* needed for 4 checkpoints of .* KiB: free"
        ):
            prepare(recipe_of(tmp_path, shards))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 4),
        (["keep_checkpoints=2"], 3),
        (["keep_checkpoints=null", "max_duration=10ep", "save_interval=3ep"], 4),
        (["keep_checkpoints=null", "save_interval=0.2dur"], 5),
        (["keep_checkpoints=null", "max_duration=10ep", "save_interval=3ba"], 2),
    ],
)
def test_checkpoints_are_counted(tmp_path: Path, shards: Path, overrides: list[str], count: int) -> None:
    assert checkpoints_kept(recipe_of(tmp_path, shards, *overrides)) == count


@pytest.mark.skipif(os.getuid() == 0 and sys.platform == "linux", reason="root writes everywhere")
def test_a_save_folder_that_cannot_be_written_is_one_line(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    recipe = recipe_of(tmp_path, shards, f"save_folder={tmp_path}/closed/run")
    with pytest.raises(RecipeError, match=r"save_folder=.*closed/run: expected a folder that can be written"):
        prepare(recipe)


def test_a_save_folder_in_a_file_is_one_line(tmp_path: Path, shards: Path) -> None:
    recipe = recipe_of(tmp_path, shards, f"save_folder={tmp_path}/tiny.yaml/run")
    with pytest.raises(RecipeError, match=r"tiny\.yaml/run: expected a folder that can be written"):
        prepare(recipe)


@pytest.mark.parametrize("key", ["source", "test_source"])
def test_data_that_is_not_there_is_one_line(tmp_path: Path, shards: Path, key: str) -> None:
    recipe = recipe_of(tmp_path, shards, f"data.{key}=no/such/folder")
    with pytest.raises(
        RecipeError, match=rf"^data\.{key}=no/such/folder: expected photos, an existing .*no such"
    ):
        prepare(recipe)


@pytest.fixture
def finished(tmp_path: Path, shards: Path) -> Recipe:
    recipe = recipe_of(tmp_path, shards)
    pretrain(recipe)
    return recipe


def test_a_run_goes_on_where_its_data_moved_and_not_with_others(
    tmp_path: Path, shards: Path, finished: Recipe
) -> None:
    estimate = checkpoint_estimate(finished)
    written = (tmp_path / "run/latest-rank0.pt").resolve().stat().st_size
    assert 0.8 * estimate < written < estimate + 200_000  # names, settings, random states
    moved = shards.rename(tmp_path / "moved")
    pretrain(recipe_of(tmp_path, moved, "max_duration=1ep"))
    others = write_set(tmp_path / "others", samples=SAMPLES + 8)
    with pytest.raises(
        RecipeError, match=r"others: 40 images in .* are not the 32 in .* choose another run_name"
    ):
        pretrain(recipe_of(tmp_path, others, "max_duration=1ep"))
    with pytest.raises(RecipeError, match=r"data\.canonical_nodes: the run in .* another value \(1, now 2\)"):
        pretrain(recipe_of(tmp_path, moved, "data.canonical_nodes=2"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"samples": 3', '{"fingerprint": 3}'])
def test_a_damaged_note_about_the_data_is_written_again(
    tmp_path: Path, shards: Path, finished: Recipe, text: str
) -> None:
    note = tmp_path / "run/data.json"
    written = note.read_text()
    note.write_text(text)
    with pytest.warns(UserWarning, match=r"^[^\n]*run/data\.json cannot be read[^\n]*$"):
        check_data(finished, shards)
    assert note.read_text() == written
    assert not list(note.parent.glob("*.partial"))
    check_data(finished, shards)


def checkpoint_estimate(recipe: Recipe) -> int:
    from aemim_algorithm.adapters import apply_adapters
    from aemim_algorithm.recipes.preflight import checkpoint_bytes

    model = prepare(recipe).model()
    apply_adapters(model, "norm")
    return checkpoint_bytes(model)


def test_ten_thousand_shards_take_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_shards([(b"one", 0)], folder, classes=("a",), made_from={})
    index = json.loads((folder / "index.json").read_text())
    (shard,) = index["shards"]
    for number in range(10_000):
        name = f"shard.{number:05}.mds"
        index["shards"].append(
            {
                **shard,
                "samples": 128,
                "raw_data": {**shard["raw_data"], "basename": name, "bytes": number % 7},
            }
        )
        (folder / name).write_bytes(b"0" * (number % 7))
    index["shards"].pop(0)
    (folder / "index.json").write_text(json.dumps(index))
    recipe = recipe_of(tmp_path, folder)
    start = time.perf_counter()
    found = data_preflight.inspect_data(recipe, folder)
    print(f"{time.perf_counter() - start:.2f} s")
    assert (found.shards, found.samples) == (10_000, 1_280_000)
