from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType

import psutil
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
def feeding(bench: ModuleType) -> ModuleType:
    return sys.modules["feeding"]


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
    built = pipelines.build(images, pipelines.write_shards(images, tmp_path), 4, 0)
    assert list(built) == [pipelines.PIL, pipelines.FULL, pipelines.RESIZED]
    for pipeline in built.values():
        assert sum(pipeline.run(stage)) == 12
        batch = next(iter(pipeline.batches))
        pixels = pipeline.normalize(batch)["image"] if pipeline.normalize else batch[0]
        assert pixels.shape == (4, 3, 224, 224)
        assert pixels.dtype == torch.float32
        assert 0.3 < pixels.std() < 2


def test_the_clock_starts_with_the_second_piece_of_work(pipelines: ModuleType) -> None:
    def work() -> Iterator[int]:
        time.sleep(0.5)
        yield 100
        time.sleep(0.1)
        yield 2

    seconds = pipelines.timed(work())
    assert 0.05 <= seconds["wall"] < 0.25
    assert seconds["cpu"] < 0.025


def test_the_processor_time_of_workers_counts(pipelines: ModuleType) -> None:
    def work() -> Iterator[int]:
        yield 1
        while psutil.Process(worker.pid).cpu_times().user < 0.3:
            time.sleep(0.02)
        yield 1

    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert pipelines.timed(work())["cpu"] > 0.2
    finally:
        worker.kill()
        worker.wait()


def test_each_worker_has_made_a_batch_before_the_clock_starts(feeding: ModuleType) -> None:
    def epoch(workers: int) -> Iterator[int]:
        for _ in range(workers):
            time.sleep(0.1)
            yield 1000
        for _ in range(2):
            time.sleep(0.05)
            yield 10

    epochs = {kind: {workers: partial(epoch, workers) for workers in (1, 3)} for kind in "ab"}
    seconds = feeding.delivery(epochs, rounds=2)
    for kind in "ab":
        assert list(seconds[kind]) == ["1", "3"]
        for clocks in seconds[kind].values():
            assert len(clocks["wall"]) == len(clocks["cpu"]) == 2
            assert min(clocks["wall"]) >= 0.005  # 0.1 s for 20 images; with what came before 1,000 times less


def only(feeding: ModuleType, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Counting the large models takes seconds each."""
    monkeypatch.setattr(feeding, "SIZES", {name: feeding.SIZES[name] for name in names})


def test_the_need_of_a_gpu_is_its_rate_over_the_flops_of_a_step(
    feeding: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(feeding.SIZES) == ["ViT-S", "ViT-B", "ViT-L", "Swin-B"]
    only(feeding, monkeypatch, "ViT-S", "ViT-B")
    needs = {(need.model, need.method): need for need in feeding.needs(None, flops=1e15, utilization=0.5)}
    assert len(needs) == 2 * 3
    assert not any(need.measured for need in needs.values())
    base = needs["ViT-B", "plain"]
    # Per token of width d: 24·d² and 4·d·tokens; the last block of the decoder may do less.
    encoder = 12 * 50 * (24 * 768**2 + 4 * 768 * 50)
    decoder = 8 * 197 * (24 * 512**2 + 4 * 512 * 197)
    assert base.images_per_second == pytest.approx(0.5e15 / (3 * (encoder + decoder)), rel=0.1)
    assert base.images_per_second / needs["ViT-B", "AEMIM"].images_per_second == pytest.approx(2.6, abs=0.05)
    assert base.images_per_second / needs["ViT-B", "Fast AEMIM"].images_per_second == pytest.approx(
        1.33, abs=0.02
    )
    assert needs["ViT-S", "AEMIM"].images_per_second > 1.5 * needs["ViT-B", "AEMIM"].images_per_second


def test_what_was_measured_on_a_gpu_comes_first(
    feeding: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(feeding, monkeypatch, "ViT-B")

    def row(method: str, precision: str, size: int, *seconds: float, **more: object) -> dict[str, object]:
        place = {"model": "mae_vit_base_patch16", "precision": precision, "micro_batch": size}
        return place | {"method": method, "seconds": seconds} | more

    rows = [
        row("AEMIM", "bf16", 100, 0.1, 0.2, 0.9),
        row("AEMIM", "bf16", 50, 1.0),
        row("AEMIM", "fp32", 100, 0.001),
        row("AEMIM T=1", "bf16", 100, 0.001),
        {"model": "mae_vit_base_patch16", "precision": "bf16", "micro_batch": 512, "method": "AEMIM"}
        | {"failed": "out of memory"},
    ]
    file = tmp_path / "cost-cuda.json"
    file.write_text(json.dumps({"hardware": {"gpu": "H100"}, "measured": rows}))
    needs = feeding.needs(file, flops=1e15, utilization=0.5)
    measured = {(need.model, need.method): need.images_per_second for need in needs if need.measured}
    assert measured == {("ViT-B", "AEMIM"): pytest.approx(500)}


@pytest.mark.parametrize(
    "strange", ["{", "[]", '{"measured": {"AEMIM": 3}}', '{"measured": [3, {"model": 5}]}']
)
def test_a_strange_file_of_costs_counts_as_none(feeding: ModuleType, tmp_path: Path, strange: str) -> None:
    file = tmp_path / "cost-cuda.json"
    assert feeding.measured_needs(file) == {}
    file.write_text(strange)
    assert feeding.measured_needs(file) == {}


def test_the_report_divides_need_by_rate(feeding: ModuleType) -> None:
    seconds = {
        kind: {
            "1": {"wall": [each, each], "cpu": [each, each]},
            "2": {"wall": [each / 1.6, each / 1.6], "cpu": [1.1 * each, 1.1 * each]},
        }
        for kind, each in (("shards, full size", 1 / 500), ("shards, resize 256", 1 / 1000))
    }
    need = {"model": "ViT-B", "method": "AEMIM", "images_per_second": 4000.0, "measured": False}
    result = {
        "seconds_per_image": seconds,
        "needs": [need],
        "scaled_decoding": {"share": 0.04, "ratios": [1.01, 0.99]},
        "device": "an H100",
    }
    text = feeding.report(result, {"shards, full size": ([1.0, 1.0], [1.2, 1.2])})
    assert "| shards, full size | 2 | 800 (800–800) | 1.60 (1.60–1.60) | 455 (455–455) |" in text
    # 455 and 909 images per core second with two workers.
    assert "| ViT-B | AEMIM | 4000 | predicted | 8.8 | 4.4 |" in text
    assert "1.20" in text
    assert "4%" in text


def test_decoding_at_half_size_gives_the_same_picture(bench: ModuleType) -> None:
    crops = sys.modules["scaled_decoding"].crops
    photo = Image.fromarray(photographs.coffee()).resize((1200, 800), Image.Resampling.LANCZOS)
    file = BytesIO()
    photo.save(file, "JPEG", quality=92)
    boxes = [(0, 0, 800, 1200), (100, 200, 500, 640), (0, 0, 300, 300)]
    for box in boxes:
        exact, scaled = crops(file.getvalue(), box)
        assert exact.shape == scaled.shape == (3, 224, 224)
        assert (exact.float() - scaled.float()).abs().mean() < 2
    assert torch.equal(*crops(file.getvalue(), boxes[2]))  # too small a crop to scale


def test_numbers_of_workers(bench: ModuleType) -> None:
    assert [bench.up_to(cores) for cores in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


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
    bench: ModuleType,
    feeding: ModuleType,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(feeding, monkeypatch, "ViT-S")
    out = tmp_path / "results" / "data.json"
    arguments = ["--images", str(images), "--rounds", "2", "--batch", "4", "--workers", "1"]
    bench.main([*arguments, "--cost", str(tmp_path / "none.json"), "--out", str(out)])
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
    for by_workers in result["feeding"]["seconds_per_image"].values():
        assert list(by_workers) == ["1"]
        assert len(by_workers["1"]["wall"]) == 2
    assert len(result["feeding"]["needs"]) == 3
    assert "| ViT-S | AEMIM |" in printed
    assert result["versions"]["pillow"] != "not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "--images=nowhere: expected a folder of images"),
        (["--images", ".", "--workers", "2", "0"], "--workers=0: expected at least 1"),
        (["--images", ".", "--utilization", "1.5"], "--utilization=1.5: expected more than 0, at most 1"),
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
