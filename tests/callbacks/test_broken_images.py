from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from conftest import fit, loader, tiny_mae
from ranks import run_script
from torchvision.io import encode_png

from aemim_algorithm.callbacks.broken_images import BrokenImages
from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.data.streaming import train_data

BROKEN = (1, 6, 15)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples, of which three are not images."""
    images = torch.randint(
        256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = [b"no image" if i in BROKEN else encode_png(x).numpy().tobytes() for i, x in enumerate(images)]
    folder = tmp_path_factory.mktemp("broken") / "set"
    write_shards(((d, i) for i, d in enumerate(data)), folder, classes=("a",), made_from={})
    return folder


def train(
    shards: Path, max_broken: int, *, duration: str = "1ep", **options: Any
) -> tuple[Trainer, Any, Any]:
    data = train_data(
        shards,
        image_size=16,
        batch_size=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        shuffle=False,
        max_broken=max_broken,
    )
    callback, logger = BrokenImages(max_broken), InMemoryLogger()
    arguments: Any = {"train_dataloader": data, "callbacks": [callback], "loggers": [logger], **options}
    return fit(tiny_mae(), duration=duration, micro=4, **arguments), callback, logger


def test_broken_images_are_named_once_and_counted_over_epochs(shards: Path) -> None:
    with pytest.warns(UserWarning, match="was replaced") as caught:
        _, callback, logger = train(shards, 3, duration="2ep")
    told = [str(warning.message) for warning in caught if "was replaced" in str(warning.message)]
    assert [line.split(" (")[0] for line in told] == [f"{shards}, sample {i}" for i in BROKEN]
    assert told[1].endswith("(shard.00000.mds) is no image and was replaced: 2 of at most 3")
    assert [value for _, value in logger.data["data/broken_images"]] == [1, 2, 3]
    assert callback.state_dict() == {"known": [1, 6, 15]}


@pytest.mark.filterwarnings("ignore:.*was replaced")
def test_one_too_many_ends_the_run_before_its_batch(shards: Path) -> None:
    with pytest.raises(
        ValueError, match=r"set, sample 15 \(shard\.00000\.mds\) is no image, nor are 2 others"
    ):
        train(shards, 2)


@pytest.mark.filterwarnings("ignore:.*was replaced")
def test_a_resumed_run_goes_on_counting(shards: Path, tmp_path: Path) -> None:
    saving: Any = {"save_folder": str(tmp_path), "save_filename": "{batch}.pt", "save_interval": "1ba"}
    train(shards, 2, duration="3ba", **saving)
    with pytest.raises(ValueError, match=r"sample 15 .* nor are 2 others"):
        train(shards, 2, load_path=str(tmp_path / "3.pt"))


def test_batches_that_do_not_tell_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"^BrokenImages: expected batches with the key 'replaced'[^\n]*$"):
        fit(tiny_mae(), callbacks=[BrokenImages(1)], train_dataloader=loader(16))
    fit(tiny_mae(), callbacks=[BrokenImages(0)], train_dataloader=loader(16))
    with pytest.raises(ValueError, match="max_broken=-1"):
        BrokenImages(-1)


def test_two_processes_count_and_stop_alike(shards: Path, tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("broken_images_worker.py"), shards, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [case["known"] for case in first] == [[1, 6, 15], [1, 6, 15]] == [case["known"] for case in second]
    assert [case["error"] for case in first] == [case["error"] for case in second]
    assert [case["batch"] for case in first] == [6, 3] == [case["batch"] for case in second]
    assert first[0]["error"] == ""
    assert "sample 15" in first[1]["error"]
    assert len(first[0]["warnings"]) == 3
    assert not second[0]["warnings"]
