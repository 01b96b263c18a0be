"""The generators of a run that goes on with another number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composer import Trainer
from conftest import fit, loader, tiny_mae

from aemim_algorithm.callbacks import AtomicCheckpoints
from aemim_algorithm.callbacks.restored_randomness import RestoredRandomness


def resumed(path: Path) -> torch.Tensor:
    """The first numbers that a resumed run would draw."""
    randomness, model = RestoredRandomness(), tiny_mae()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters()),
        train_dataloader=loader(32),
        max_duration="4ba",
        seed=7,
        device="cpu",
        callbacks=[randomness],
        load_path=str(path),
        progress_bar=False,
    )
    randomness.take_over(trainer)
    trainer.close()
    return torch.rand(4)


def test_with_other_processes_it_draws_what_neither_the_run_nor_another_batch_drew(tmp_path: Path) -> None:
    callbacks = [RestoredRandomness(), AtomicCheckpoints(str(tmp_path), interval="1ba")]
    fit(tiny_mae(), duration="3ba", train_dataloader=loader(32), callbacks=callbacks)
    drawn = []
    for batch in (2, 3):
        path = tmp_path / f"ep0-ba{batch}-rank0.pt"
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["rng"] *= 2  # as if two processes had saved it
        torch.save(checkpoint, path)
        with pytest.warns(UserWarning, match="saved by 2 processes and 1 go on") as caught:
            drawn.append(resumed(path))
        assert len(caught) == 1
    torch.manual_seed(7)
    drawn.append(torch.rand(4))
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 3
