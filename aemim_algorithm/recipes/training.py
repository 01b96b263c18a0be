"""What all training recipes share: processes, data, the Trainer, its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator, Event, State, Time
from composer.models import ComposerModel
from composer.optim import (
    ComposerScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    MultiStepScheduler,
    MultiStepWithWarmupScheduler,
)
from composer.utils import create_interval_scheduler, dist, get_device, reproducibility
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from aemim_algorithm.callbacks import AtomicCheckpoints, BrokenImages, FiniteCheck
from aemim_algorithm.callbacks.cpu_autocast import CpuAutocast
from aemim_algorithm.callbacks.history import History
from aemim_algorithm.callbacks.restored_randomness import RestoredRandomness
from aemim_algorithm.data.resident import resident_data
from aemim_algorithm.data.streaming import train_data
from aemim_algorithm.recipes.datasets import is_remote, test_shards, train_shards
from aemim_algorithm.recipes.folder_lock import hold_save_folder
from aemim_algorithm.recipes.preflight import device_of, on_gpu, precision_of
from aemim_algorithm.recipes.registry import Parts
from aemim_algorithm.recipes.resuming import resume_point
from aemim_algorithm.recipes.schema import TrainingRecipe, save_recipe

__all__ = [
    "before_the_end",
    "fit",
    "full_state",
    "joined",
    "learning_rate",
    "make_trainer",
    "microbatch_of",
    "running",
    "seeded",
    "train_loader",
]


@contextmanager
def joined(recipe: TrainingRecipe) -> Iterator[tuple[Path, Path | None]]:
    """Join the other processes, find the checkpoint to continue from, and the shards; keep other runs out.

    Args:
        recipe: A checked recipe.

    Yields:
        Folders of the training shards and of the test shards, if there are any; written if need be.

    Raises:
        ConversionError: If a source cannot be converted.
        ValueError: If another run is at work in the save folder, or the run has checkpoints, and all of them
            are damaged.
    """
    if dist.get_world_size() > 1:
        dist.initialize_dist(get_device(recipe.device), recipe.dist_timeout)
    folder = Path(recipe.save_folder)
    with hold_save_folder(folder):
        if recipe.autoresume:
            resume_point(folder)
        yield train_shards(recipe.data), test_shards(recipe.data)


def seeded(recipe: TrainingRecipe, build: Callable[[], ComposerModel]) -> ComposerModel:
    """Build a model from the run's seed."""
    reproducibility.seed_all(recipe.seed)
    return build()


def train_loader(recipe: TrainingRecipe, folder: Path, *, image_size: int, **options: Any) -> DataSpec:
    """The training data as the recipe describes it.

    Args:
        recipe: A checked recipe.
        folder: Folder of the shards.
        image_size: Side of the crops, in pixels.
        **options: Further arguments of :func:`~aemim_algorithm.data.streaming.train_data`, or of
            :func:`~aemim_algorithm.data.resident.resident_data` with ``data.resident``.

    Returns:
        Batches of this process.
    """
    data = recipe.data
    shared: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": recipe.global_batch_size // dist.get_world_size(),
        "mean": data.mean,
        "std": data.std,
        "seed": recipe.seed,
        "crop_scale": data.crop_scale,
        **options,
    }
    if data.resident:
        return resident_data(folder, device=device_of(recipe), **shared)
    return train_data(
        folder,
        remote=data.source if is_remote(data.source) else None,
        workers=data.workers,
        cache_limit=data.cache_limit,
        verify=data.verify,
        download_retries=data.download_retries,
        download_timeout=data.download_timeout,
        canonical_nodes=data.canonical_nodes,
        max_broken=data.max_broken,
        dist_timeout=recipe.dist_timeout,
        **shared,
    )


def make_trainer(
    recipe: TrainingRecipe,
    parts: Parts,
    model: ComposerModel,
    *,
    data: DataSpec,
    optimizer: Optimizer,
    evaluators: Sequence[Evaluator] = (),
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """The Trainer of a recipe.

    Args:
        recipe: A checked recipe.
        parts: What it names; its model is not looked at.
        model: The model, with the weights that the run starts from.
        data: Training data.
        optimizer: Over the model's parameters, with their peak learning rates.
        evaluators: What the run is scored on while it trains.
        callbacks: Beside those of the recipe.

    Returns:
        A Trainer whose ``fit`` starts the run, or continues it from where ``latest-rank0.pt`` links to.
    """
    interactive = sys.stderr.isatty()
    randomness = RestoredRandomness()
    precision, on_cpu = precision_of(recipe), not on_gpu(recipe)
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        eval_dataloader=[*evaluators] or None,
        max_duration=recipe.max_duration,
        optimizers=optimizer,
        schedulers=_scheduler(recipe),
        algorithms=parts.algorithms,
        callbacks=[
            FiniteCheck(on_nonfinite=recipe.on_nonfinite),
            randomness,
            BrokenImages(recipe.data.max_broken),
            *([CpuAutocast()] if on_cpu and precision == "amp_bf16" else []),
            *callbacks,
            *parts.callbacks,
            # Last, so that a checkpoint holds what the others have counted.
            AtomicCheckpoints(
                recipe.save_folder, interval=recipe.save_interval, keep=recipe.keep_checkpoints
            ),
        ],
        loggers=[*parts.loggers, History(recipe.save_folder)],
        run_name=recipe.run_name,
        seed=recipe.seed,
        device=recipe.device,
        precision="fp32" if on_cpu else precision,
        device_train_microbatch_size=microbatch_of(recipe),
        parallelism_config=parts.parallelism,
        compile_config={} if recipe.compile else None,
        dist_timeout=recipe.dist_timeout,
        autoresume=recipe.autoresume,
        progress_bar=interactive,
        log_to_console=not interactive,
        console_log_interval="1ep",
    )
    randomness.take_over(trainer)
    return trainer


@contextmanager
def running(recipe: TrainingRecipe, trainer: Trainer) -> Iterator[Path]:
    """Save the resolved recipe, and close the Trainer at the end, whatever happens.

    Yields:
        The save folder.
    """
    folder = Path(recipe.save_folder)
    if dist.get_global_rank() == 0:
        save_recipe(recipe, folder / "recipe.yaml")
    try:
        yield folder
    except BaseException:
        # Not `trainer.close()`: its barrier waits for the processes that have not failed.
        trainer.engine.close()
        raise
    trainer.close()


def fit(trainer: Trainer) -> None:
    """Train to the end; a finished run that is started again has nothing left to train."""
    state = trainer.state
    # Composer calls that an error.
    if state.max_duration is not None and state.timestamp < state.max_duration:
        trainer.fit()


def full_state(model: nn.Module) -> dict[str, Any]:
    """The whole state dict, gathered from all ranks; every rank must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def learning_rate(recipe: TrainingRecipe) -> float:
    """The peak learning rate, by the linear rule: base rate · global batch / 256."""
    return recipe.optimizer.base_learning_rate * recipe.global_batch_size / 256


def microbatch_of(recipe: TrainingRecipe) -> int | str:
    """Images per forward pass and device, or ``auto``."""
    per_device = recipe.global_batch_size // dist.get_world_size()
    size = recipe.device_train_microbatch_size or per_device
    return size if isinstance(size, str) else min(size, per_device)


def before_the_end(interval: str) -> Callable[[State, Event], bool]:
    """When to evaluate: every so often, except at the end of training: what counts is scored there anyway.

    Args:
        interval: Such as ``8ep``.

    Returns:
        What an `Evaluator` takes as its interval.
    """
    due = create_interval_scheduler(interval, include_end_of_training=False, checkpoint_events=False)

    def check(state: State, event: Event) -> bool:
        elapsed = state.get_elapsed_duration()
        return due(state, event) and elapsed is not None and elapsed < 1

    return check


def _scheduler(recipe: TrainingRecipe) -> ComposerScheduler:
    schedule, warmup = recipe.schedule, recipe.schedule.warmup
    at_once = not warmup.endswith("dur") and int(warmup[:-2]) == 0
    if schedule.milestones:
        times: list[str | Time[int]] = [*schedule.milestones]
        if at_once:
            return MultiStepScheduler(milestones=times, gamma=schedule.step_factor)
        return MultiStepWithWarmupScheduler(warmup, milestones=times, gamma=schedule.step_factor)
    final = schedule.min_learning_rate / learning_rate(recipe)
    if at_once:
        return CosineAnnealingScheduler(alpha_f=final)
    return CosineAnnealingWithWarmupScheduler(t_warmup=warmup, alpha_f=final)
