"""Pre-training as a recipe says: shards, model, Trainer, checkpoints, encoder file, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist
from torch import Tensor, nn
from torch.optim import AdamW

from aemim_algorithm.callbacks import OnlineProbe
from aemim_algorithm.evaluation import evaluate_encoders
from aemim_algorithm.evaluation.frozen import training_labels
from aemim_algorithm.exchange.importing import load_start
from aemim_algorithm.export import export_encoder, native_format
from aemim_algorithm.recipes.data_preflight import check_data
from aemim_algorithm.recipes.preflight import continues, device_of, prepare
from aemim_algorithm.recipes.registry import Parts
from aemim_algorithm.recipes.schema import Recipe
from aemim_algorithm.recipes.training import (
    fit,
    full_state,
    joined,
    learning_rate,
    make_trainer,
    running,
    seeded,
    train_loader,
)

__all__ = ["Outputs", "build_trainer", "parameter_groups", "pretrain"]

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
        ValueError: If another run is at work in the save folder, or the run has checkpoints, and all of them
            are damaged.
    """
    parts = prepare(recipe)
    with joined(recipe) as (train_folder, test_folder):
        probes = [callback for callback in parts.callbacks if isinstance(callback, OnlineProbe)]
        scored = recipe.evaluate or bool(probes)
        check_data(recipe, train_folder, test_folder if scored else None)
        if scored and test_folder is not None:
            training_labels(train_folder, test_folder)  # refuses other classes now, not after training
        for probe in probes:
            probe.set_folders(train_folder, test_folder)
        trainer = build_trainer(recipe, parts, train_folder)
        with running(recipe, trainer) as folder:
            fit(trainer)
            state = full_state(trainer.state.model)
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
    model = seeded(recipe, parts.model)
    if recipe.init_from is not None and not continues(recipe):
        load_start(model, recipe.init_from)  # before AEMIM adds its copies, so that they start equal
    return make_trainer(
        recipe,
        parts,
        model,
        data=train_loader(recipe, train_folder, image_size=recipe.model["image_size"]),
        optimizer=_optimizer(recipe, model),
    )


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


def _optimizer(recipe: Recipe, model: nn.Module) -> AdamW:
    return AdamW(
        parameter_groups(model, weight_decay=recipe.optimizer.weight_decay),
        lr=learning_rate(recipe),
        betas=recipe.optimizer.betas,
    )


def _compare(
    recipe: Recipe,
    parts: Parts,
    exported: dict[str, Tensor],
    folders: tuple[Path, Path],
) -> Scores:
    """Scores of the trained encoder and of the random initialisation of the same seed."""
    device = device_of(recipe)
    encoders: dict[str, Any] = {name: seeded(recipe, parts.model).encoder for name in ("trained", "random")}
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
