"""Fine-tuning as a recipe says: encoder, classifier, Trainer, test accuracy, ``classifier.pt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Evaluator
from composer.utils import dist
from torch.optim import AdamW

from aemim_algorithm.callbacks.history import FILE_NAME as HISTORY
from aemim_algorithm.classifier import FILE_NAME, save_classifier
from aemim_algorithm.data.augmentation import BatchMixing, RandAugment
from aemim_algorithm.data.streaming import scoring_data
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.image_sets import ImageSet, open_images
from aemim_algorithm.models.classifier import ImageClassifier, layer_groups, load_encoder
from aemim_algorithm.recipes.data_preflight import check_data
from aemim_algorithm.recipes.encoder import keep_architecture
from aemim_algorithm.recipes.final_accuracy import Accuracy, final_accuracy
from aemim_algorithm.recipes.finetune_preflight import Plan, classes_of, prepare_finetuning
from aemim_algorithm.recipes.preflight import continues
from aemim_algorithm.recipes.schema import FineTuneRecipe
from aemim_algorithm.recipes.training import (
    before_the_end,
    fit,
    full_state,
    joined,
    learning_rate,
    make_trainer,
    microbatch_of,
    running,
    seeded,
    train_loader,
)

__all__ = ["FineTuned", "build_finetuning", "finetune", "test_images"]

_INTERPOLATION = "bicubic"
_BATCH = 64  # test images of a forward pass where "auto" says nothing of a size


@dataclass(frozen=True)
class FineTuned:
    """What a run left."""

    recipe: Path
    checkpoint: Path
    classifier: Path
    history: Path
    accuracy: Accuracy


def finetune(recipe: FineTuneRecipe) -> FineTuned:
    """Run a recipe from its encoder and data to the tested classifier; again, to continue it.

    Args:
        recipe: A loaded recipe.

    Returns:
        The paths of what was written, and the accuracy on all test images, on every rank.

    Raises:
        RecipeError: If the recipe cannot run here; before any data is read.
        ConversionError: If a source of the data cannot be converted.
        FloatingPointError: If a loss or a gradient is not finite.
        OSError: If a checkpoint cannot be written; the earlier ones are whole.
        ValueError: If the encoder is that of another architecture, the test images are of other classes,
            another run is at work in the save folder, or the run has checkpoints and all of them are damaged.
    """
    plan = prepare_finetuning(recipe)
    with joined(recipe) as (train_folder, test_folder):
        assert test_folder is not None  # a recipe without test images does not load
        check_data(recipe, train_folder, test_folder)
        names, count = classes_of(recipe, train_folder, test_folder)
        tests = test_images(recipe, plan, test_folder, names, count)
        trainer = build_finetuning(recipe, plan, train_folder, tests, num_classes=count)
        with running(recipe, trainer) as folder:
            if dist.get_global_rank() == 0:
                keep_architecture(recipe, plan.encoder)
            fit(trainer)
            accuracy = final_accuracy(trainer, recipe, len(tests))
            state = full_state(trainer.state.model)
        if dist.get_global_rank() == 0:
            save_classifier(
                folder / FILE_NAME,
                state={name.removeprefix("network."): value for name, value in state.items()},
                architecture=plan.classifier(count),
                image_size=plan.image_size,
                mean=recipe.data.mean,
                std=recipe.data.std,
                classes=names,
                crop_fraction=recipe.evaluation_crop,
                interpolation=_INTERPOLATION,
            )
    return FineTuned(
        recipe=folder / "recipe.yaml",
        checkpoint=folder / "latest-rank0.pt",
        classifier=folder / FILE_NAME,
        history=folder / HISTORY,
        accuracy=accuracy,
    )


def build_finetuning(
    recipe: FineTuneRecipe, plan: Plan, train_folder: Path, tests: ImageSet, *, num_classes: int
) -> Trainer:
    """The Trainer of a recipe, its model started from the encoder.

    Args:
        recipe: A loaded recipe.
        plan: Of `prepare_finetuning`.
        train_folder: Folder of the training shards.
        tests: The test images.
        num_classes: Number of classes.

    Returns:
        A Trainer whose ``fit`` starts the run, or continues it from where ``latest-rank0.pt`` links to.
    """
    model = seeded(recipe, lambda: plan.model(num_classes))
    assert isinstance(model, ImageClassifier)
    if plan.start is not None and not continues(recipe):
        load_encoder(
            model.network,
            plan.start,
            plan.encoder,
            image_size=plan.image_size,
            whose=f"the encoder {recipe.model.encoder}",
        )
    optimizer = recipe.optimizer
    groups = layer_groups(
        model.network,
        learning_rate=learning_rate(recipe),
        weight_decay=optimizer.weight_decay,
        layer_decay=optimizer.layer_decay,
    )
    normalize = Normalize(recipe.data.mean, recipe.data.std)
    augmentation: dict[str, Any] = {
        "augment": _augment(recipe, plan.image_size),
        "num_classes": num_classes,
        "mixing": _mixing(recipe, normalize, num_classes),
    }
    return make_trainer(
        recipe,
        plan.parts,
        model,
        data=train_loader(recipe, train_folder, image_size=plan.image_size, **augmentation),
        optimizer=AdamW(groups, lr=learning_rate(recipe), betas=optimizer.betas),
        evaluators=[_evaluator(recipe, tests, normalize)],
    )


def test_images(
    recipe: FineTuneRecipe, plan: Plan, folder: Path, names: tuple[str, ...] | None, count: int
) -> ImageSet:
    """The test images as ``aemim evaluate`` sees them, labelled by the training data's classes.

    Args:
        recipe: A loaded recipe.
        plan: Of `prepare_finetuning`.
        folder: Folder of the shards.
        names: Class names of the training data, if they are known.
        count: Number of classes.

    Returns:
        The images.

    Raises:
        ValueError: They are of other classes.
    """
    return open_images(
        folder,
        image_size=plan.image_size,
        crop_fraction=recipe.evaluation_crop,
        interpolation=_INTERPOLATION,
        classes=names if names is not None else [str(label) for label in range(count)],
    )


test_images.__test__ = False  # type: ignore[attr-defined]  # pytest takes the name for a test's


def _augment(recipe: FineTuneRecipe, image_size: int) -> RandAugment | None:
    policy = recipe.augmentation.randaugment
    return RandAugment(policy, image_size=image_size, mean=recipe.data.mean) if policy else None


def _mixing(recipe: FineTuneRecipe, normalize: Normalize, num_classes: int) -> BatchMixing:
    augmentation = recipe.augmentation
    return BatchMixing(
        num_classes=num_classes,
        normalize=normalize,
        mixup=augmentation.mixup,
        cutmix=augmentation.cutmix,
        switch_prob=augmentation.switch_prob,
        label_smoothing=augmentation.label_smoothing,
    )


def _evaluator(recipe: FineTuneRecipe, tests: ImageSet, normalize: Normalize) -> Evaluator:
    micro = microbatch_of(recipe)
    batch_size = min(micro if isinstance(micro, int) else _BATCH, len(tests))
    data = scoring_data(tests, batch_size=batch_size, workers=recipe.data.workers, normalize=normalize)
    return Evaluator(label="eval", dataloader=data, eval_interval=before_the_end(recipe.eval_interval))
