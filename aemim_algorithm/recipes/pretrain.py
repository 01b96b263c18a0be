"""Pre-training as a recipe says: shards, model, Trainer, checkpoints, encoder file, evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import DataSpec, Time
from composer.models import ComposerModel
from composer.optim import (
    ComposerScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    MultiStepScheduler,
    MultiStepWithWarmupScheduler,
)
from composer.utils import dist, get_device, reproducibility
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import AdamW

from aemim_algorithm.callbacks import AtomicCheckpoints, BrokenImages, FiniteCheck
from aemim_algorithm.callbacks.restored_randomness import RestoredRandomness
from aemim_algorithm.data.streaming import train_data
from aemim_algorithm.evaluation import evaluate_encoders
from aemim_algorithm.exchange.importing import load_start
from aemim_algorithm.export import export_encoder, native_format
from aemim_algorithm.recipes.data_preflight import check_data
from aemim_algorithm.recipes.datasets import is_remote, test_shards, train_shards
from aemim_algorithm.recipes.preflight import continues, device_of, precision_of, prepare
from aemim_algorithm.recipes.registry import Parts
from aemim_algorithm.recipes.resuming import resume_point
from aemim_algorithm.recipes.schema import Recipe, save_recipe

__all__ = [
    "Outputs",
    "build_trainer",
    "learning_rate",
    "microbatch_of",
    "parameter_groups",
    "pretrain",
]

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Outputs:
    """What a run left.

    ``scores`` holds top-1 in percent, ``{"trained": {"knn": …, "linear": …}, "random": …}``, or
    nothing without a final evaluation and on ranks other than the first.
    """

    recipe: Path
    checkpoint: Path
    encoder: Path
    pictures: Path
    scores: Scores


def pretrain(recipe: Recipe) -> Outputs:
    """Run a recipe from its data to the encoder file; again with the same recipe, continue it.

    Args:
        recipe: A loaded recipe.

    Returns:
        The paths of what was written, and the scores.

    Raises:
        RecipeError: If the recipe cannot run here; before any data is read or a model is built.
        ConversionError: If the source of the data cannot be converted.
        FloatingPointError: If a loss or a gradient is not finite.
        OSError: If a checkpoint cannot be written; the earlier ones are whole.
        ValueError: If the run has checkpoints, and all of them are damaged.
    """
    parts = prepare(recipe)
    if dist.get_world_size() > 1:
        dist.initialize_dist(get_device(recipe.device), recipe.dist_timeout)
    if recipe.autoresume:
        resume_point(Path(recipe.save_folder))
    train_folder, test_folder = train_shards(recipe.data), test_shards(recipe.data)
    check_data(recipe, train_folder, test_folder)
    trainer = build_trainer(recipe, parts, train_folder)
    folder = Path(recipe.save_folder)
    if dist.get_global_rank() == 0:
        save_recipe(recipe, folder / "recipe.yaml")
    try:
        _fit(trainer)
        state = _full_state(trainer.state.model)
    except BaseException:
        # Not `trainer.close()`: its barrier waits for the processes that have not failed.
        trainer.engine.close()
        raise
    trainer.close()
    # The last barrier is behind: nobody waits for the first process, whatever it takes.
    encoder, scores = folder / "encoder.pt", Scores()
    if dist.get_global_rank() == 0:
        exported = export_encoder(state, encoder, format=native_format(state))
        if recipe.evaluate and test_folder is not None:
            scores = _compare(recipe, parts, exported, (train_folder, test_folder))
    return Outputs(
        recipe=folder / "recipe.yaml",
        checkpoint=folder / "latest-rank0.pt",
        encoder=encoder,
        pictures=folder / "pictures",
        scores=scores,
    )


def build_trainer(recipe: Recipe, parts: Parts, train_folder: Path) -> Trainer:
    """The Trainer of a recipe; AEMIM's adapters are in place when it returns.

    Args:
        recipe: A loaded recipe.
        parts: Its parts.
        train_folder: Folder of the training shards.

    Returns:
        A Trainer whose ``fit`` starts the run, or continues it from where ``latest-rank0.pt`` links to.
    """
    model = _seeded_model(recipe, parts)
    if recipe.init_from is not None and not continues(recipe):
        load_start(model, recipe.init_from)  # before AEMIM adds its copies, so that they start equal
    interactive = sys.stderr.isatty()
    randomness = RestoredRandomness()
    trainer = Trainer(
        model=model,
        train_dataloader=_data(recipe, train_folder),
        max_duration=recipe.max_duration,
        optimizers=_optimizer(recipe, model),
        schedulers=_scheduler(recipe),
        algorithms=parts.algorithms,
        callbacks=[
            FiniteCheck(on_nonfinite=recipe.on_nonfinite),
            randomness,
            BrokenImages(recipe.data.max_broken),
            *parts.callbacks,
            # Last, so that a checkpoint holds what the others have counted.
            AtomicCheckpoints(
                recipe.save_folder, interval=recipe.save_interval, keep=recipe.keep_checkpoints
            ),
        ],
        loggers=parts.loggers,
        run_name=recipe.run_name,
        seed=recipe.seed,
        device=recipe.device,
        precision=precision_of(recipe),
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


def learning_rate(recipe: Recipe) -> float:
    """The peak learning rate, by the linear rule: base rate · global batch / 256."""
    return recipe.optimizer.base_learning_rate * recipe.global_batch_size / 256


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and without.

    Args:
        model: Vectors (biases, norms) are not decayed, as MAE pre-trains, nor is what the model's
            ``no_weight_decay()`` names, if it has one.
        weight_decay: Of all other parameters.

    Returns:
        The groups, as an optimizer takes them.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    decays = [
        (value, value.ndim > 1 and name not in spared)
        for name, value in model.named_parameters()
        if value.requires_grad
    ]
    return [
        {"params": [value for value, decayed in decays if decayed], "weight_decay": weight_decay},
        {"params": [value for value, decayed in decays if not decayed], "weight_decay": 0.0},
    ]


def _seeded_model(recipe: Recipe, parts: Parts) -> ComposerModel:
    reproducibility.seed_all(recipe.seed)
    return parts.model()


def _data(recipe: Recipe, folder: Path) -> DataSpec:
    data = recipe.data
    return train_data(
        folder,
        image_size=recipe.model["image_size"],
        batch_size=recipe.global_batch_size // dist.get_world_size(),
        mean=data.mean,
        std=data.std,
        remote=data.source if is_remote(data.source) else None,
        seed=recipe.seed,
        workers=data.workers,
        crop_scale=data.crop_scale,
        cache_limit=data.cache_limit,
        verify=data.verify,
        download_retries=data.download_retries,
        download_timeout=data.download_timeout,
        canonical_nodes=data.canonical_nodes,
        max_broken=data.max_broken,
        dist_timeout=recipe.dist_timeout,
    )


def _optimizer(recipe: Recipe, model: nn.Module) -> AdamW:
    return AdamW(
        parameter_groups(model, weight_decay=recipe.optimizer.weight_decay),
        lr=learning_rate(recipe),
        betas=recipe.optimizer.betas,
    )


def _scheduler(recipe: Recipe) -> ComposerScheduler:
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


def microbatch_of(recipe: Recipe) -> int | str:
    """Images per forward pass and device, or ``auto``."""
    per_device = recipe.global_batch_size // dist.get_world_size()
    size = recipe.device_train_microbatch_size or per_device
    return size if isinstance(size, str) else min(size, per_device)


def _fit(trainer: Trainer) -> None:
    state = trainer.state
    # A finished run that is started again has nothing left to train; Composer calls that an error.
    if state.max_duration is not None and state.timestamp < state.max_duration:
        trainer.fit()


def _full_state(model: nn.Module) -> dict[str, Any]:
    """The whole state dict, gathered from all ranks; every rank must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _compare(
    recipe: Recipe,
    parts: Parts,
    exported: dict[str, Tensor],
    folders: tuple[Path, Path],
) -> Scores:
    """Scores of the trained encoder and of the random initialisation of the same seed."""
    device = device_of(recipe)
    encoders: dict[str, Any] = {name: _seeded_model(recipe, parts).encoder for name in ("trained", "random")}
    # What the export has dropped, a mask token, no probe needs; any name that is too many is an error.
    encoders["trained"].load_state_dict(encoders["trained"].state_dict() | exported)
    return evaluate_encoders(
        {name: encoder.to(device) for name, encoder in encoders.items()},
        *folders,
        image_size=recipe.model["image_size"],
        mean=recipe.data.mean,
        std=recipe.data.std,
        device=device,
    )
