from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import benchmark_script
from PIL import Image
from skimage import data as photographs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("data", monkeypatch)


@pytest.fixture
def pipelines(bench: ModuleType) -> ModuleType:
    return sys.modules["image_pipelines"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve photographs in two classes."""
    for number in range(12):
        pixels = (photographs.chelsea, photographs.coffee)[number % 2]()
        file = tmp_path / "images" / str(number % 2) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=92)
    return tmp_path / "images"


def files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*.jpg"))


def test_both_pipelines_give_the_same_pixels(pipelines: ModuleType, images: Path) -> None:
    differences = pipelines.grey_levels(files(images), seed=0)
    assert len(differences) == 12
    assert 0 < max(differences) < 2


def test_other_crops_are_seen(pipelines: ModuleType, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pipelines.random_crop_box

    def shifted(*arguments: object) -> tuple[int, int, int, int]:
        top, left, height, width = right(*arguments)
        return top, left, height - 8, width - 8

    monkeypatch.setattr(pipelines, "random_crop_box", shifted)
    assert min(pipelines.grey_levels(files(images), seed=0)) > 2


@pytest.mark.parametrize("stage", ["images", "batches", "normalised batches"])
def test_every_pipeline_ends_in_the_same_kind_of_batch(
    pipelines: ModuleType, images: Path, tmp_path: Path, stage: str
) -> None:
    built = pipelines.build(images, tmp_path, 4, 0)
    assert list(built) == [pipelines.PIL, pipelines.FULL, pipelines.RESIZED]
    for pipeline in built.values():
        assert sum(pipeline.run(stage)) == 12
        batch = next(iter(pipeline.batches))
        pixels = pipeline.normalize(batch)["image"] if pipeline.normalize else batch[0]
        assert pixels.shape == (4, 3, 224, 224)
        assert pixels.dtype == torch.float32
        assert 0.3 < pixels.std() < 2


def test_the_clock_starts_with_the_second_piece_of_work(bench: ModuleType) -> None:
    def work() -> Iterator[int]:
        time.sleep(0.5)
        yield 100
        time.sleep(0.1)
        yield 2

    seconds = bench.timed(work())
    assert 0.05 <= seconds["wall"] < 0.25
    assert seconds["cpu"] < 0.025


def test_the_process_gets_its_cores_back(bench: ModuleType) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), bench.one_core():
        assert len(os.sched_getaffinity(0)) == 1
        raise KeyError
    assert os.sched_getaffinity(0) == before


def test_the_table_pairs_ratios_within_a_round(bench: ModuleType, pipelines: ModuleType) -> None:
    def seconds(*values: float) -> dict[str, list[float]]:
        return {"cpu": list(values), "wall": [2 * value for value in values]}

    measured = {"batches": {pipelines.PIL: seconds(0.1, 0.2, 0.4), pipelines.FULL: seconds(0.05, 0.05, 0.1)}}
    lines = bench.table(measured, [0.5, 1.5]).splitlines()
    assert lines[2].startswith("| batches | PIL image folder | 5 (2–10) | 1.00 (1.00–1.00) | 2 (1–5) |")
    assert lines[3] == (
        "| batches | shards, full size | 20 (10–20) | 4.00 (2.00–4.00) | 10 (5–10) | 4.00 (2.00–4.00) |"
    )
    assert "on average 1.000 grey levels apart, 1.500 in the worst" in lines[-1]


def test_end_to_end(
    bench: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "data.json"
    bench.main(["--images", str(images), "--rounds", "2", "--batch", "4", "--out", str(out)])
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for stage in ("images", "batches", "normalised batches"):
        for name, seconds in result["seconds_per_image"][stage].items():
            assert f"| {stage} | {name} |" in printed
            assert len(seconds["cpu"]) == len(seconds["wall"]) == 2
            assert min(seconds["cpu"]) > 0
    assert result["grey_levels"]["mean"] < 2
    assert result["settings"]["images"] == 12
    assert result["settings"]["mean_file_kib"] > 10
    assert result["versions"]["pillow"] != "not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "--images=nowhere: expected a folder of images"),
        (["--images", ".", "--rounds", "0"], "--rounds=0: expected at least 1"),
    ],
)
def test_bad_arguments(
    bench: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_too_few_images_are_one_clear_line(bench: ModuleType, images: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--batch=7: expected at most half of the 12 images"):
        bench.main(["--images", str(images), "--batch", "7", "--out", str(tmp_path / "data.json")])
    assert not (tmp_path / "data.json").exists()
