"""The calculator says what real processes send, real checkpoints hold and real shards weigh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scaling_worker
import torch
from composer import Trainer
from conftest import benchmark_script, loader
from skimage import data as photographs
from torchvision.io import write_jpeg

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.data.convert import convert
from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.recipes.estimate import estimate

ROOT = Path(__file__).parents[1]
CASES = [(world, number) for world, cases in scaling_worker.CASES.items() for number in range(len(cases))]
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("scaling", monkeypatch)


@pytest.fixture
def prediction(scaling: ModuleType) -> ModuleType:
    return sys.modules["prediction"]


@pytest.fixture
def communication(scaling: ModuleType) -> ModuleType:
    return sys.modules["communication"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, int]]]:
    """Calls and bytes of a step of every case, by number of processes."""
    folder = tmp_path_factory.mktemp("scaling")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "scaling_worker.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in scaling_worker.CASES}


def predicted(communication: ModuleType, world: int, case: scaling_worker.Case) -> dict[str, int]:
    strategy, steps, micro_batches, forward = case
    model = scaling_worker.model()
    if steps:
        apply_adapters(model)
    units = communication.units_of(model)
    if strategy == "ddp":
        traffic = communication.ddp_traffic(units, processes=world)
    else:
        traffic = communication.fsdp2_traffic(
            units,
            processes=world,
            replicas=2 if strategy == "hsdp" else 1,
            steps=steps,
            micro_batches=micro_batches,
            forward_bytes=2 if forward == "bf16" else 4,
        )
    parts = {kind: getattr(traffic, kind) for kind in COLLECTIVES}
    calls = {f"{kind} calls": part.calls for kind, part in parts.items() if part.calls}
    return calls | {f"{kind} bytes": part.payload for kind, part in parts.items() if part.calls}


@pytest.mark.parametrize(("world", "number"), CASES, ids=lambda value: str(value))
def test_processes_send_what_is_predicted(
    communication: ModuleType, counted: dict[int, list[dict[str, int]]], world: int, number: int
) -> None:
    assert counted[world][number] == predicted(communication, world, scaling_worker.CASES[world][number])


def test_an_attack_step_gathers_the_encoder_twice_and_reduces_nothing(communication: ModuleType) -> None:
    model = scaling_worker.model()
    apply_adapters(model)
    units = communication.units_of(model)
    one, two = (communication.fsdp2_traffic(units, processes=8, steps=steps) for steps in (1, 2))
    assert two.reduce_scatter == one.reduce_scatter
    blocks = [unit.elements(8) for unit in units if unit.name.startswith("encoder.blocks")]
    (rest,) = (unit.elements(8) for unit in units if unit.name == "encoder")
    assert two.all_gather.payload - one.all_gather.payload == 2 * (2 * sum(blocks) + rest)


def test_every_parameter_is_in_one_unit(communication: ModuleType) -> None:
    model = scaling_worker.model()
    apply_adapters(model)
    units = communication.units_of(model)
    assert sum(unit.elements(1) for unit in units) == sum(value.numel() for value in model.parameters())
    assert {unit.name for unit in units if unit.outermost} == {"encoder", "decoder"}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_flops_and_state_are_those_of_a_dry_run(prediction: ModuleType, steps: int) -> None:
    algorithm = AEMIM(steps=steps) if steps else None
    build: Any = MODELS["mae_vit_base_patch16"]
    cost = estimate(build, image_size=224, algorithm=algorithm)
    load = prediction.named_workload("vit_base", steps)
    assert load.flops == cost.flops
    assert load.state_bytes == cost.state_bytes
    assert load.trained + load.fixed == cost.encoder + cost.other + cost.adversarial * bool(steps)


def test_the_sizes_are_the_published_ones(prediction: ModuleType) -> None:
    """Encoders of 86, 303 and 631 million parameters (MAE, Section 4; ViT-H has patches of 14 pixels)."""
    with torch.device("meta"):
        encoders = [MAE(image_size=224, **sizes).encoder for sizes in prediction.MODELS.values()]
    millions = [sum(value.numel() for value in encoder.parameters()) / 1e6 for encoder in encoders]
    assert millions == pytest.approx([86, 303, 631], rel=0.01)


def test_a_checkpoint_is_as_large_as_predicted(prediction: ModuleType, tmp_path: Path) -> None:
    build: Any = MODELS["mae_vit_tiny_patch4"]
    model = build(image_size=16)
    trainer = Trainer(
        model=model,
        train_dataloader=loader(4, 4),
        optimizers=torch.optim.AdamW(model.parameters()),
        algorithms=[AEMIM(steps=1)],
        max_duration="1ba",
        device="cpu",
        save_folder=str(tmp_path),
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    size = (tmp_path / "ep0-ba1-rank0.pt").stat().st_size
    load = prediction.workload(lambda: build(image_size=16), 1)
    assert load.checkpoint_bytes <= size < 1.01 * load.checkpoint_bytes


def test_images_weigh_what_their_files_do(scaling: ModuleType, tmp_path: Path) -> None:
    """A sample of a shard is the file, its label and its place in the shard."""
    for number in range(6):
        pixels = torch.from_numpy(photographs.chelsea()).permute(2, 0, 1)[:, number * 10 :]
        file = tmp_path / "images" / str(number % 2) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(pixels.contiguous(), str(file))
    convert(tmp_path / "images", tmp_path / "shards", progress=False)
    files = sum(file.stat().st_size for file in (tmp_path / "images").rglob("*.jpg"))
    shards = sum(file.stat().st_size for file in (tmp_path / "shards").rglob("*.mds"))
    mean = scaling.bytes_per_image(tmp_path / "shards")
    assert mean == shards / 6
    assert 0 < mean - files / 6 < 200


def test_the_formulas(communication: ModuleType, prediction: ModuleType) -> None:
    machine = prediction.Machine(
        gpus=4, flops=100.0, utilization=0.5, link=1000.0, network=800.0, latency=0.01
    )
    ring = lambda *values: prediction.ring_seconds(communication.Collective(*values), machine)  # noqa: E731
    assert ring(3, 4000, 4) == pytest.approx(3 / 4 * 4000 / 1000 + 3 * 0.01)
    assert ring(3, 4000, 8) == pytest.approx(7 / 8 * 4000 / 800 + 3 * 2 * 0.01)
    assert ring(0, 0, 1) == 0
    reduce = communication.Collective(3, 4000, 8)
    tree = prediction.all_reduce_seconds(reduce, machine, between_nodes=False)
    assert tree == pytest.approx(2 * 7 / 8 * 4000 / 800 + 3 * 4 * 0.01)
    likes = prediction.all_reduce_seconds(reduce, machine, between_nodes=True)  # 8 nodes, 4 of these at once
    assert likes == pytest.approx(2 * 7 / 8 * 4000 / 200 + 3 * 8 * 0.01)


def test_a_prediction_adds_up(communication: ModuleType, prediction: ModuleType) -> None:
    machine = prediction.Machine()
    load = prediction.named_workload("vit_base", 2)
    rows = {}
    for strategy in communication.STRATEGIES:
        for gpus in (1, 8, 64):
            job = prediction.Job(strategy, gpus, 2, batch=4096, micro_batch=256, image_bytes=1e5)
            rows[strategy, gpus] = prediction.predict(load, job, machine)
    one, node, many = (rows["ddp", gpus] for gpus in (1, 8, 64))
    assert one["communication"] == 0
    assert one["compute"] == pytest.approx(4096 * load.flops / (machine.flops * machine.utilization))
    assert (one["micro_batches"], node["micro_batches"], many["micro_batches"]) == (16, 2, 1)
    assert one["compute"] == pytest.approx(8 * node["compute"]) == pytest.approx(64 * many["compute"])
    assert node["step"] == [node["compute"], node["compute"] + node["communication"]]
    assert node["node_data"] == pytest.approx(node["images_per_second"][1] * 1e5)
    assert many["node_data"] == pytest.approx(many["images_per_second"][1] / 8 * 1e5)
    assert rows["fsdp2", 64]["state"] == pytest.approx(one["state"] / 64)
    assert rows["hsdp", 64]["state"] == pytest.approx(one["state"] / 8)
    assert rows["hsdp", 8] == rows["fsdp2", 8] | {"strategy": "hsdp"}


def test_the_document_is_up_to_date(scaling: ModuleType, tmp_path: Path) -> None:
    document = ROOT / "docs" / "scaling.md"
    copy = tmp_path / "scaling.md"
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- scaling ") == text.count("<!-- /scaling -->") >= 4
    copy.write_text(text.replace("| ddp | 8 |", "| ddp | 9 |"), encoding="utf-8")
    scaling.main(["--update", str(copy)])
    assert copy.read_text(encoding="utf-8") == text, (
        "run: python benchmarks/scaling.py --update docs/scaling.md"
    )


def test_it_prints_a_table_or_json(
    scaling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "vit_base", "--strategy", "fsdp2", "--gpus", "8", "64"]
    scaling.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["8", "64"]
    (tmp_path / "index.json").write_text('{"shards": [{"samples": 4, "raw_data": {"bytes": 4000}}]}')
    scaling.main([*arguments, "--json", "--shards", str(tmp_path)])
    rows = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in rows] == [8, 64]
    assert rows[0]["node_data"] == pytest.approx(1000 * rows[0]["images_per_second"][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12"], "--gpus=12: expected a divisor of --batch=4096, and whole nodes of 8"),
        (["--gpus", "0"], "--gpus=0: expected a divisor"),
        (["--steps", "-1"], "--steps=-1: expected at least 0"),
        (["--micro-batch", "0"], "--micro-batch=0: expected more than 0"),
        (["--model", "resnet"], "invalid choice: 'resnet'"),
    ],
)
def test_bad_arguments(
    scaling: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(arguments)
    assert message in capsys.readouterr().err
