"""Probes during training: what they score, what they must not change, and whose time they take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import State
from composer.models import ComposerClassifier
from conftest import assert_same, clean_part, fit, loader, perturb, tiny_mae
from matplotlib.figure import Figure
from ranks import run_script
from small_runs import recipe_in, write_images
from torch import Tensor, nn
from torchvision.io import write_png

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks import OnlineProbe, online_probe
from aemim_algorithm.callbacks.history import History, read_history
from aemim_algorithm.callbacks.online_probe import spread
from aemim_algorithm.data.convert import convert
from aemim_algorithm.evaluation import evaluate_encoders, report_plots
from aemim_algorithm.evaluation.frozen import encode
from aemim_algorithm.evaluation.report_plots import plot_accuracy_over_time
from aemim_algorithm.evaluation.runs import Run, read_run
from aemim_algorithm.randomness import RngState
from aemim_algorithm.recipes.pretrain import pretrain
from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import RecipeError

SIZE = 16
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SLEEP = 0.5  # seconds of a slow probe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and test shards of three classes that look alike, so that scores are neither 0 nor 100."""
    folder, generator = tmp_path_factory.mktemp("shards"), torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 12)):
        for name in "abc":
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator).byte()
                write_png(noise, str(folder / "images" / split / name / f"{number:02}.png"))
        convert(folder / "images" / split, folder / split, progress=False)
    return folder


def probe_of(shards: Path, kind: type[OnlineProbe] = OnlineProbe, **options: Any) -> OnlineProbe:
    given: dict[str, Any] = {"image_size": SIZE, "mean": MEAN, "std": STD, "interval": "1ba"}
    folders = {"train": shards / "train", "test": shards / "test"}
    return kind(**(given | folders | options))


class SlowProbe(OnlineProbe):
    """Takes its time, and finds what the clock says it should not count."""

    def scores(self, state: State) -> dict[str, float]:
        time.sleep(SLEEP)
        return {"knn": float(state.timestamp.batch), "linear": 50.0}


def evaluations(folder: Path) -> list[tuple[int, int]]:
    return [(line["batch"], line["epoch"]) for line in read_history(folder) if "eval" in line]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_exported_clean_encoder_is_scored_in_float32(
    shards: Path, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    probe, model = probe_of(shards, train_images=None, test_images=None, batch_size=7), tiny_mae()
    trainer = fit(model, AEMIM(), callbacks=[probe])
    perturb(model)
    assert any("adversarial" in name for name in model.state_dict())
    seen: list[tuple[Tensor, ...]] = []
    knn = online_probe.knn_accuracy

    def recorded(*data: Tensor, **options: Any) -> float:
        seen.append(data)
        return knn(*data, **options)

    monkeypatch.setattr(online_probe, "knn_accuracy", recorded)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = probe.scores(trainer.state)
    exported = tiny_mae(seed=1)
    exported.load_state_dict(clean_part(model.state_dict()))
    view: dict[str, Any] = {"image_size": SIZE, "mean": MEAN, "std": STD, "batch_size": 7}
    encoders = {"encoder": exported.encoder}
    for place, split in ((0, "train"), (2, "test")):
        features, labels = encode(encoders, shards / split, **view)
        assert torch.equal(seen[0][place], features["encoder"])
        assert torch.equal(seen[0][place + 1], labels)
    expected = evaluate_encoders(encoders, shards / "train", shards / "test", **view)["encoder"]
    assert scores == expected
    assert 0 < scores["knn"] < 100


class Careless(OnlineProbe):
    """Draws from every generator while it probes."""

    def _features(self, state: Any, split: Any) -> Any:
        torch.rand(3)
        return super()._features(state, split)


def test_a_run_with_probes_equals_one_without_bitwise(shards: Path) -> None:
    def run(*callbacks: OnlineProbe) -> tuple[Trainer, RngState, list[bool]]:
        model = tiny_mae()
        model.encoder.blocks[0].eval()  # a layer that the user has frozen
        trainer = fit(model, AEMIM.fast(), duration="3ba", callbacks=[*callbacks])
        return trainer, RngState.capture(), [module.training for module in model.modules()]

    (plain, rng, modes) = run()
    (probed, probed_rng, probed_modes) = run(probe_of(shards, Careless, at_start=True, interval="1ba"))
    assert_same(probed.state.model.state_dict(), plain.state.model.state_dict())
    for one, other in zip(
        probed.state.optimizers[0].state.values(), plain.state.optimizers[0].state.values(), strict=True
    ):
        assert_same(one, other)
    assert probed_rng == rng
    assert probed_modes == modes
    counts = [
        {name: value for name, value in trainer.state.timestamp.state_dict().items() if "wct" not in name}
        for trainer in (probed, plain)
    ]
    assert counts[0] == counts[1]
    gradients = [
        {name: value.grad for name, value in trainer.state.model.named_parameters() if value.grad is not None}
        for trainer in (probed, plain)
    ]
    assert_same(*gradients)


@pytest.mark.parametrize(
    ("interval", "duration", "expected"),
    [
        ("1ep", "4ba", [2, 4]),
        ("1ep", "2ep", [2, 4]),
        ("1ep", "3ba", [2, 3]),
        ("3ba", "2ep", [3, 4]),
        ("2ba", "4ba", [2, 4]),
        (2, "2ep", [4]),
    ],
)
def test_probes_are_at_the_interval_and_once_at_the_end(
    shards: Path, tmp_path: Path, interval: str | int, duration: str, expected: list[int]
) -> None:
    """Epochs of two batches."""
    probe = probe_of(shards, interval=interval, train_images=30, at_start=True)
    probe.scores = lambda state: {"knn": 1.0}  # type: ignore[method-assign]
    fit(tiny_mae(), duration=duration, callbacks=[probe], loggers=[History(tmp_path)])
    assert [batch for batch, _ in evaluations(tmp_path)] == [0, *expected]


def test_a_line_has_the_scores_of_its_batch_after_the_line_of_the_batch(shards: Path, tmp_path: Path) -> None:
    fit(tiny_mae(), duration="2ba", callbacks=[probe_of(shards)], loggers=[History(tmp_path)])
    lines = read_history(tmp_path)
    assert [(line["batch"], "eval" in line) for line in lines] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]
    for trained, probed in (lines[:2], lines[2:]):
        assert probed["seconds"] == trained["seconds"]
        assert probed["eval"].keys() == {"probe/knn", "probe/linear"}


def slow_run(folder: Path, probe: OnlineProbe | None, *, load: Path | None = None) -> Trainer:
    model = tiny_mae()
    trainer = Trainer(
        model=model,
        train_dataloader=loader(),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        max_duration="5ba",
        callbacks=[probe] if probe else [],
        loggers=[History(folder)],
        device="cpu",
        seed=7,
        save_folder=str(folder),
        save_filename="ba{batch}.pt",
        save_interval="1ba",
        save_overwrite=True,
        load_path=str(load) if load else None,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return trainer


def test_probes_take_no_training_time_also_when_resumed(shards: Path, tmp_path: Path) -> None:
    """Five batches of some milliseconds, and probes that sleep 0.5 s before each of them."""
    trainer = slow_run(tmp_path, probe_of(shards, SlowProbe, at_start=True))
    now = trainer.state.timestamp
    assert 0 < now.total_wct.total_seconds() < 2 * SLEEP  # four of the probes would have counted
    whole = read_history(tmp_path)
    seconds = [line["seconds"] for line in whole]
    assert seconds == sorted(seconds)
    for batch in (2, 3):
        saved = torch.load(tmp_path / f"ba{batch}.pt", weights_only=False)["state"]["timestamp"]["Timestamp"]
        clock = {name: saved[name].total_seconds() for name in ("total_wct", "epoch_wct", "batch_wct")}
        (line,) = [line for line in whole if line["batch"] == batch and "eval" in line]
        assert round(clock["total_wct"], 3) == line["seconds"]
        assert 0 <= clock["batch_wct"] < SLEEP
        assert 0 <= clock["epoch_wct"] < 2 * SLEEP

    resumed = slow_run(tmp_path, probe_of(shards, SlowProbe, at_start=True), load=tmp_path / "ba3.pt")
    lines = read_history(tmp_path)
    assert [(line["batch"], "eval" in line) for line in lines] == [
        (line["batch"], "eval" in line) for line in whole
    ]
    assert [line["batch"] for line in lines if "eval" in line] == [0, 1, 2, 3, 4, 5]
    assert lines[:7] == whole[:7]  # up to the checkpoint
    times = [line["seconds"] for line in lines]
    assert times == sorted(times)
    assert times[7] > times[6]  # none is lost either: a batch takes time
    assert resumed.state.timestamp.total_wct.total_seconds() < 2 * SLEEP


def test_a_second_fit_does_not_pay_for_the_first_ones_last_probe(shards: Path) -> None:
    probe = probe_of(shards, SlowProbe, interval="2ba")
    model = tiny_mae()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(
        model=model,
        train_dataloader=loader(),
        optimizers=optimizer,
        max_duration="2ba",
        callbacks=[probe],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    before = trainer.state.timestamp.total_wct
    trainer.fit(duration="1ba")
    trainer.close()
    assert before < trainer.state.timestamp.total_wct


def of_two_processes(shards: Path, out: Path, kind: str) -> list[Any]:
    """What each of them has noted."""
    script = Path(__file__).with_name("online_probe_worker.py")
    run_script(script, shards / "train", out, kind, timeout=60)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_agree_on_the_clock(shards: Path, tmp_path: Path) -> None:
    clocks = of_two_processes(shards, tmp_path, "slow")
    assert clocks[0] == clocks[1] < 2 * SLEEP  # three of the probes would have counted
    assert [batch for batch, _ in evaluations(tmp_path)] == [1, 2, 3, 4]


def test_a_probe_that_fails_ends_both_processes(shards: Path, tmp_path: Path) -> None:
    first, second = of_two_processes(shards, tmp_path, "failing")
    assert first == "FloatingPointError: features of batch 2"
    assert second == "ValueError: features of batch 2"


@pytest.mark.parametrize(("size", "count"), [(10, 10), (10, 99), (100, 7), (1000, 30), (3, 2)])
def test_a_subset_is_spread_evenly(size: int, count: int) -> None:
    chosen = spread(size, count)
    assert len(set(chosen)) == min(size, count)
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < size
    assert spread(size, count) == chosen


@pytest.mark.parametrize("label", [lambda i: i // 100, lambda i: i % 10], ids=["sorted", "alternating"])
def test_a_subset_has_every_class_about_equally_often(label: Callable[[int], int]) -> None:
    labels = torch.tensor([label(position) for position in spread(1000, 200)])
    assert labels.bincount(minlength=10).sub(20).abs().max() <= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": "0ep"}, "interval='0ep' is out of range"),
        ({"interval": "often"}, "interval='often' is out of range"),
        ({"train_images": 0}, "train_images=0 is out of range"),
        ({"test_images": -1}, "test_images=-1"),
        ({"train_images": 10}, "k=20 is out of range: expected at most train_images=10"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"image_size": None}, "image_size=None"),
        ({"std": (0.0, 1.0, 1.0)}, "std="),
    ],
)
def test_bad_arguments_are_refused_in_one_line(shards: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        probe_of(shards, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_probed_is_refused_at_init(shards: Path, tmp_path: Path) -> None:
    def start(model: Any, fsdp: object = None, **options: Any) -> None:
        probe_of(shards, **options).init(SimpleNamespace(model=model, fsdp_config=fsdp), None)  # type: ignore[arg-type]

    start(tiny_mae())
    with pytest.raises(ValueError, match="cannot probe ComposerClassifier: the model needs an encoder"):
        start(ComposerClassifier(nn.Linear(2, 2), num_classes=2))
    with pytest.raises(ValueError, match="FSDP shards.*`aemim probe` afterwards"):
        start(tiny_mae(), fsdp=object())
    with pytest.raises(ValueError, match="test=None; expected a folder"):
        start(tiny_mae(), test=None)
    with pytest.raises(ValueError, match="nowhere"):
        start(tiny_mae(), test=tmp_path / "nowhere")


def test_images_that_cannot_be_probed_are_refused_before_the_first_batch(
    shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="k=61; expected at most 60, the training images"):
        fit(tiny_mae(), callbacks=[probe_of(shards, k=61)])
    one = tmp_path / "images" / "a"
    one.parent.mkdir()
    one.symlink_to(shards / "images" / "train" / "a")
    convert(tmp_path / "images", tmp_path / "one", progress=False)
    with pytest.raises(ValueError, match="images of one class only"):
        fit(tiny_mae(), callbacks=[probe_of(shards, train=tmp_path / "one", test=tmp_path / "one", k=5)])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", per_class=8)
    write_images(folder / "test", per_class=4)
    return folder


PROBE = "callbacks={speed_monitor: {window_size: 1}, online_probe: {train_images: 12, k: 3}}"


def test_a_recipe_probes_its_own_data_and_the_report_draws_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, images, "evaluate=false", f"data.test_source={images / 'test'}", PROBE)
    first, _ = build_parts(recipe).callbacks
    assert isinstance(first, OnlineProbe)  # it sets the clock right that others read
    pretrain(recipe)
    assert evaluations(tmp_path / "run") == [(2, 1), (4, 2)]
    run = read_run(tmp_path / "run", name="run")
    assert len(run.batches) == 4
    drawn = curves(run, monkeypatch)
    assert drawn.keys() == {"probe/knn", "probe/linear"}
    for name, values in drawn.items():
        scores = [line["eval"][name] for line in run.history if "eval" in line]
        assert values == scores
        assert max(values) > 50  # dark against bright images: percent, neither fractions nor times 100


def curves(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The points of the figure of accuracy over time, by panel."""
    figures: list[Figure] = []
    monkeypatch.setattr(report_plots, "save_figure", lambda figure, out: figures.append(figure))
    assert plot_accuracy_over_time([run], Path("unused.png"))
    return {
        axis.get_title(): [float(value) for line in axis.lines for value in line.get_ydata()]  # type: ignore[union-attr]
        for axis in figures[0].axes
        if axis.get_title()
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([PROBE], "online_probe: needs test images: set data.test_source"),
        (
            ["data.source=s3://bucket/shards", "callbacks={online_probe: {test: here}}"],
            "not on this machine: name a folder as train",
        ),
        (["callbacks={online_probe: {test: here}}", "parallelism={fsdp2: null}"], "FSDP shards the weights"),
        (["callbacks={online_probe: {image_size: 8}}"], "online_probe.image_size: set model.image_size"),
        (["callbacks={online_probe: {std: [1, 1, 1]}}"], "online_probe.std: set data.std"),
        (["callbacks={online_probe: {interval: never}}"], "interval='never' is out of range"),
        (["callbacks={online_probe: {intervall: 1ep}}"], "interval"),
    ],
)
def test_a_wrong_recipe_is_refused_before_data_is_read(
    images: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build_parts(recipe_in(tmp_path, images, "evaluate=false", *overrides))
    assert "\n" not in str(caught.value)
