"""``steps=0``: noise of the attack's budget in the place of the attack, and all else as in AEMIM."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from conftest import (
    assert_same,
    clean_part,
    fit,
    loader,
    normalised_images,
    perturb,
    recorded_passes,
    tiny_mae,
)
from settings import BATCH_SIZE, SETTINGS, Setting, every_setting
from small_runs import recipe_in, write_images
from test_separate_backward import fitted
from test_settings_micro_batches import trained
from test_settings_passes import Frozen, pass_features_through
from test_settings_resume import end_of_run, require_equal
from test_settings_training import baseline, perturbed
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from aemim_algorithm import AEMIM, pgd_attack
from aemim_algorithm.branch import AdversarialPass
from aemim_algorithm.recipes.pretrain import pretrain

MEAN = np.array(IMAGENET_DEFAULT_MEAN)[:, None, None]
STD = np.array(IMAGENET_DEFAULT_STD)[:, None, None]

ratios = pytest.mark.parametrize("ratio", [1.0, 0.25])


def noise(**arguments: Any) -> AEMIM:
    """AEMIM without an attack."""
    return AEMIM(steps=0, **arguments)


def no_step(**arguments: Any) -> AEMIM:
    """AEMIM with an attack whose step is lost in rounding: it ends where it began."""
    return AEMIM(steps=1, step_size=1e-30, **arguments)


def step_of(aemim: AEMIM, model: ComposerModel, batch: Any) -> tuple[AdversarialPass, dict[str, Tensor]]:
    """The adversarial pass and the losses of one step, the copies perturbed."""
    perturbed(aemim, model)
    passes = recorded_passes(aemim)
    torch.manual_seed(1)
    losses = aemim.training_loss(model, batch, step=5, seed=3)
    return passes[0], losses


def test_the_images_are_clean_ones_with_noise_cut_to_the_pixel_range(images: Tensor) -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError("an attack's pass")

    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noised = pgd_attack(never, images, epsilon=6.0, steps=0, noise=start)
    pixels = images.double().numpy() * STD + MEAN
    expected = np.clip(pixels + 6 / 255 * start.double().numpy(), 0, 1)
    np.testing.assert_allclose(noised.double().numpy() * STD + MEAN, expected, atol=1e-6)


@every_setting
def test_a_step_is_that_of_an_attack_that_does_not_move(setting: Setting) -> None:
    """The same noise, mask, dropout and target: images, losses and gradients are equal bit by bit."""
    outcomes = []
    for aemim_of in (noise, no_step):
        model = setting.build()
        result, losses = step_of(aemim_of(**setting.arguments), model, setting.batch(0))
        losses["total"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append(gradients | losses | {"images": result.images, "distance": result.distances[-1]})
    assert_same(*outcomes)


@every_setting
def test_a_quarter_has_the_noise_of_the_attack_and_needs_no_second_clean_pass(setting: Setting) -> None:
    """The attack needs one where features depend on the batch or on what the model draws."""
    arguments = dict(setting.arguments) | {"adversarial_ratio": 0.25}
    expected, _ = step_of(no_step(**arguments), setting.build(), setting.batch(0))
    model, calls = setting.build(), list[Any]()
    pass_features_through(model, setting.encoder, lambda output: calls.append(output) or output)  # type: ignore[func-returns-value]
    result, losses = step_of(noise(**arguments), model, setting.batch(0))
    assert len(calls) == 2
    assert len(result.images) == BATCH_SIZE / 4
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.clean_images, expected.clean_images)
    assert losses["total"].isfinite()


@every_setting
def test_the_target_is_the_clean_image(setting: Setting) -> None:
    """With equal features only the target could make the losses differ."""
    model, aemim, frozen = setting.build(), noise(epsilon=8, adapter="none", **setting.arguments), Frozen()
    pass_features_through(model, setting.encoder, frozen)
    aemim.attach(model)
    losses = aemim.training_loss(model, setting.batch(0), step=0)
    assert frozen.calls == 2
    torch.testing.assert_close(losses["adversarial"], losses["clean"], rtol=1e-6, atol=0)


@every_setting
def test_with_loss_ratio_one_it_equals_the_baseline_bitwise(setting: Setting) -> None:
    aemim = noise(loss_ratio=1.0, adversarial_ratio=0.5, **setting.arguments)
    model = perturbed(aemim, setting.build())
    fit(model, aemim, train_dataloader=setting.loader())
    assert_same(clean_part(model.state_dict()), baseline(SETTINGS.index(setting)))


@pytest.mark.filterwarnings("ignore:.*AEMIM.*:UserWarning")
@every_setting
def test_it_trains_and_resumes_bitwise(setting: Setting, tmp_path: Path) -> None:
    aemim = noise(adversarial_ratio=0.5, **setting.arguments)
    saving = {"save_folder": str(tmp_path), "save_filename": "{batch}.pt", "save_interval": "2ba"}
    trainer = fit(setting.build(), aemim, duration="4ba", train_dataloader=setting.loader(), **saving)
    whole = end_of_run(trainer)
    start = setting.build().state_dict()
    assert any(not torch.equal(whole["model"][name], value) for name, value in start.items())
    resumed = fit(  # AEMIM comes from the checkpoint
        setting.build(seed=9),
        duration="4ba",
        train_dataloader=setting.loader(),
        load_path=str(tmp_path / "2.pt"),
    )
    require_equal(end_of_run(resumed), whole)


@ratios
def test_a_separate_backward_gives_the_same_parameters(ratio: float) -> None:
    setting = SETTINGS[0]
    joint, separate = (
        fitted(setting.build(), setting.loader(), noise(adversarial_ratio=ratio, separate_backward=way), 4)
        for way in (False, True)
    )
    assert_same(joint, separate, rtol=1e-5)


@ratios
def test_micro_batches_add_up_to_the_batch(ratio: float) -> None:
    whole, split = (trained(SETTINGS[0], noise(adversarial_ratio=ratio), micro) for micro in (8, 2))
    assert_same(whole, split, rtol=1e-5)


def logged(aemim: AEMIM, model: ComposerModel, **options: Any) -> dict[str, list[float]]:
    """What two batches log of AEMIM, by name."""
    logger = InMemoryLogger()
    fit(model, aemim, loggers=[logger], **options)
    entries = {name: data for name, data in logger.data.items() if name.startswith("aemim/")}
    return {name: [float(value) for _, value in data] for name, data in entries.items()}


@ratios
def test_it_logs_how_far_the_features_moved(ratio: float) -> None:
    """Under the name of the attack's last step: what the model is trained on; and less than with an attack."""
    values = logged(noise(adversarial_ratio=ratio), tiny_mae(), micro=4)
    attacked = logged(AEMIM(adversarial_ratio=ratio), tiny_mae(), micro=4)
    assert set(values) == {"aemim/feature_distance/last_step", "aemim/perturbation_linf"}
    distances = zip(*(v["aemim/feature_distance/last_step"] for v in (values, attacked)), strict=True)
    assert all(0 < small < large for small, large in distances)
    assert all(1.5 < linf < 2.0 + 1e-3 for linf in values["aemim/perturbation_linf"])


def test_it_logs_no_distance_that_would_cost_a_clean_pass() -> None:
    """Batch statistics of a share of the batch are others than those of the clean pass."""
    (setting,) = (one for one in SETTINGS if one.name == "convolutions with `BatchNorm2d`")
    for ratio, known in ((1.0, True), (0.5, False)):
        aemim = noise(adversarial_ratio=ratio, **setting.arguments)
        values = logged(aemim, setting.build(), train_dataloader=setting.loader())
        assert ("aemim/feature_distance/last_step" in values) == known
        assert len(values["aemim/perturbation_linf"]) == 2


def test_the_budget_follows_its_schedule() -> None:
    aemim = noise(epsilon="linear 0→8 over 4ba")
    values = logged(aemim, tiny_mae(), train_dataloader=loader(32), duration="4ba")
    assert values["aemim/epsilon"] == pytest.approx([0, 2, 4, 6])
    assert values["aemim/perturbation_linf"] == pytest.approx([0, 2, 4, 6], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("separate", [False, True])
def test_half_precision_trains_every_parameter(dtype: torch.dtype, separate: bool) -> None:
    model, aemim = tiny_mae(), noise(separate_backward=separate, adversarial_ratio=0.5)
    aemim.attach(model)
    perturb(model)
    passes = recorded_passes(aemim)
    with torch.autocast("cpu", dtype=dtype):
        losses = aemim.training_loss(model, normalised_images(8), step=0)
        losses["total"].backward()
    assert losses["total"].isfinite()
    assert passes[0].images.dtype == torch.float32
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_loading_warns_of_another_number_of_steps(tmp_path: Path) -> None:
    saving = {"save_folder": str(tmp_path), "save_filename": "{batch}.pt", "save_interval": "2ba"}
    fit(tiny_mae(), AEMIM(), duration="2ba", **saving)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            tiny_mae(), noise(), duration="3ba", train_dataloader=loader(32), load_path=str(tmp_path / "2.pt")
        )
    assert any("other arguments: steps=2, now 0" in str(warning.message) for warning in caught)


def test_it_rebuilds_itself() -> None:
    assert eval(repr(noise())) == copy.deepcopy(noise()) == noise() != AEMIM()


def test_a_layer_to_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="attack_layer with steps=0") as error:
        noise(attack_layer="encoder.blocks.0")
    assert "\n" not in str(error.value)


def test_a_recipe_trains_with_it(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", per_class=8)
    recipe = recipe_in(tmp_path, tmp_path / "images", "algorithms.aemim.steps=0", "max_duration=4ba")
    assert pretrain(recipe).encoder.is_file()
