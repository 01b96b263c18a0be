"""The history of a run: what a line holds, what a resumed and a killed run leave."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.optim import LinearWithWarmupScheduler
from conftest import fit, loader, tiny_mae
from torch import nn

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks.history import FILE_NAME, History, read_history


def test_a_line_holds_what_was_logged_for_its_batch(tmp_path: Path) -> None:
    memory, model, used = InMemoryLogger(), tiny_mae(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_pre_hook(lambda self, *_: used.append(self.param_groups[0]["lr"]))
    fit(
        model,
        AEMIM(),
        duration="4ba",
        loggers=[memory, History(tmp_path)],
        optimizers=optimizer,
        schedulers=LinearWithWarmupScheduler("2ba", t_max="4ba"),
    )
    lines = read_history(tmp_path)
    assert [line["batch"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1]
    assert [line["learning_rate"] for line in lines] == used
    assert len(set(used)) > 2  # it changes, and the line has the rate of its batch, not of the next one
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[-1]
    assert seconds == sorted(seconds)
    for name in ("loss/train/total", "loss/train/clean", "loss/train/adversarial", "aemim/perturbation_linf"):
        logged = [float(value) for _, value in memory.data[name]]
        assert [line[name] for line in lines] == logged
    for line in lines:
        mean = (line["loss/train/clean"] + line["loss/train/adversarial"]) / 2
        assert line["loss/train/total"] == pytest.approx(mean)


class Slow(nn.Module):
    """A classifier that takes its time when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            time.sleep(0.3)
        return self.head(images)


def test_an_evaluation_has_its_line_and_takes_no_training_time(tmp_path: Path) -> None:
    model = ComposerClassifier(Slow(), num_classes=16)
    fit(
        model,
        duration="2ep",
        loggers=[History(tmp_path)],
        eval_dataloader=loader(8),
        eval_interval="1ep",
    )
    lines = read_history(tmp_path)
    assert [("eval" in line, line["batch"]) for line in lines] == [
        (False, 1),
        (False, 2),
        (True, 2),
        (False, 3),
        (False, 4),
        (True, 4),
    ]
    assert {type(value) for line in lines for value in line.get("eval", {}).values()} == {float}
    assert "eval/MulticlassAccuracy" in lines[2]["eval"]
    assert lines[-1]["seconds"] < 0.3  # two evaluations slept 0.6


def test_a_later_evaluation_of_a_batch_replaces_the_earlier_one(tmp_path: Path) -> None:
    """Of its own scores: another evaluator's stay."""

    def scored(batch: int, **scores: float) -> None:
        history = History(tmp_path)
        state = SimpleNamespace(
            timestamp=SimpleNamespace(batch=batch, epoch=0, total_wct=timedelta(seconds=batch))
        )
        history.eval_start(state, None)
        history.log_metrics({f"metrics/{name}": value for name, value in scores.items()})
        history.eval_end(state, None)

    line = {"epoch": 0, "seconds": 0.5, "eval": {"top1": 0.25}}
    text = "".join(json.dumps({"batch": batch} | line) + "\n" for batch in range(1, 2001))
    (tmp_path / FILE_NAME).write_text(text)  # more than is looked at
    scored(2000, other=0.75)
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"batch": 2000, "ep')
    scored(2000, top1=0.5)
    lines = read_history(tmp_path)
    assert [line["batch"] for line in lines] == [*range(1, 2000), 2000, 2000]
    assert [line["eval"] for line in lines[-3:]] == [{"top1": 0.25}, {"other": 0.75}, {"top1": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def train(folder: Path, duration: str, load: Path | None = None) -> None:
    trainer = Trainer(
        model=tiny_mae(),
        train_dataloader=loader(),
        optimizers=None,
        max_duration=duration,
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


@pytest.mark.filterwarnings("ignore:No optimizer was specified:UserWarning")
def test_a_resumed_run_continues_the_history_of_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, "4ba")
    whole = read_history(tmp_path)
    path = tmp_path / FILE_NAME
    with open(path, "a") as file:
        file.write('{"batch": 5, "ep')  # of a process that was killed
    train(tmp_path, "6ba", load=tmp_path / "ba1.pt")
    lines = read_history(tmp_path)
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == whole[0]
    assert lines[1]["loss/train/total"] == whole[1]["loss/train/total"]
    assert lines[1]["seconds"] > lines[0]["seconds"]  # the clock goes on from the checkpoint
    train(tmp_path, "2ba")  # another run of that name, from the start
    assert [line["batch"] for line in read_history(tmp_path)] == [1, 2]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    line = {"batch": 1, "epoch": 0, "seconds": 0.5}
    text = json.dumps(line) + "\n"
    for end in range(len(text)):
        (tmp_path / FILE_NAME).write_text(text + text[:end])
        assert read_history(tmp_path) == [line]


def test_damage_and_absence_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no history.jsonl: the run has not trained"):
        read_history(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"batch": 1, "epoch": 0, "seconds": 0}\nrubbish\n')
    with pytest.raises(ValueError, match="line 2 is no line of a history"):
        read_history(tmp_path)


def test_a_killed_process_leaves_a_history_without_gaps(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        for batch in itertools.count(1):
            now = SimpleNamespace(batch=batch, epoch=0, total_wct=timedelta(seconds=batch))
            History(tmp_path).batch_end(SimpleNamespace(timestamp=now), None)
    try:
        time.sleep(0.3)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    batches = [line["batch"] for line in read_history(tmp_path)]
    assert len(batches) > 10
    assert batches == list(range(1, len(batches) + 1))
