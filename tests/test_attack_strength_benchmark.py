from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import benchmark_script, normalised_images, perturb, tiny_mae
from small_runs import recipe_in, write_images

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.attack import linf_distance
from aemim_algorithm.models import MAE
from aemim_algorithm.models.masking import random_mask
from aemim_algorithm.plan import noise_of
from aemim_algorithm.recipes.pretrain import pretrain

EXACT = "T=2, μ=0.625ε"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("attack_strength", monkeypatch)


@pytest.fixture
def approximations(script: ModuleType) -> ModuleType:
    return sys.modules["approximations"]


@pytest.fixture
def targets(script: ModuleType) -> ModuleType:
    return sys.modules["targets"]


def adapted_mae(depth: int) -> tuple[MAE, AEMIM]:
    """A MAE whose adversarial norms differ from the clean ones, and its algorithm."""
    model, algorithm = tiny_mae(depth=depth).train(), AEMIM()
    algorithm.attach(model)
    perturb(model, scale=0.1)
    return model, algorithm


def target_for(targets: ModuleType, model: MAE, *, seeds: torch.Tensor | None = None) -> Any:
    images = normalised_images(4)
    mask = random_mask(4, model.num_patches, model.mask_ratio, seeds=seeds)
    noise = noise_of(seed=3, number=5, positions=torch.arange(4))(images)
    return targets.clean_pass(model, images, mask, noise, epsilon=2.0)


def test_the_exact_attack_is_the_algorithms(targets: ModuleType, approximations: ModuleType) -> None:
    model, algorithm = adapted_mae(2)
    seeds = torch.arange(4)
    target = target_for(targets, model, seeds=seeds)
    batch = {"images": target.images, "seed": seeds}
    _, adversarial = algorithm.attack(model, batch, step=5, seed=3)
    assert torch.equal(approximations.candidates(2)[EXACT].attack(target), adversarial.images)


def test_every_attack_stays_in_the_ball_and_leaves_the_model_as_it_was(
    targets: ModuleType, approximations: ModuleType
) -> None:
    model, _ = adapted_mae(12)
    target = target_for(targets, model)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    attacks = approximations.candidates(12)
    for name, candidate in attacks.items():
        adversarial = candidate.attack(target)
        distance = linf_distance(adversarial, target.images, AEMIM().std)
        assert (distance <= 2 + 1e-4).all(), name
        assert not adversarial.requires_grad, name
        assert adversarial.dtype == torch.float32, name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_only_whole_numbers_of_blocks_are_run(approximations: ModuleType) -> None:
    assert not any("of the blocks" in name for name in approximations.candidates(5))
    by_depth = {depth: set(approximations.candidates(depth)) for depth in (4, 6, 12)}
    assert by_depth[4] < by_depth[12]
    assert by_depth[6] < by_depth[12]
    assert "first 1/3 of the blocks, T=2, μ=2ε" in by_depth[6] - by_depth[4]


def test_a_pass_that_ends_early_is_the_blocks_by_hand(targets: ModuleType) -> None:
    model, _ = adapted_mae(4)
    target = target_for(targets, model)
    with adversarial_mode(model):
        early = targets.truncated(model.encoder, target.images, target.visible, 3)
        with targets.recorded(model.encoder) as layers:
            features = model.encoder(target.images, target.visible)
        tokens = layers[0]
        for block in model.encoder.blocks[:3]:
            tokens = block(tokens)
        assert torch.equal(early, tokens)
        assert torch.equal(features, model.encoder.norm(layers[-2]))
        assert torch.equal(features, layers[-1])
    # What was recorded of the clean pass is of the clean norms.
    assert torch.equal(target.layers[0], layers[0])
    assert not torch.equal(target.layers[3], early)
    assert torch.equal(model.encoder(target.images, target.visible), target.features)


def test_yopo_takes_the_exact_gradient_where_it_was_taken(
    targets: ModuleType, approximations: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both gradients asked for at one point, the frozen one is the exact one."""
    model, _ = adapted_mae(6)
    target = target_for(targets, model)
    point = target.images + 0.01 * torch.randn(target.images.shape)
    gradients = []

    def ask(target: Any, objectives: list[Any], *, step: float) -> torch.Tensor:
        for objective in objectives:
            images = point.clone().requires_grad_()
            gradients.append(torch.autograd.grad(objective(images), images)[0])
        return target.images

    monkeypatch.setattr(approximations, "_attack", ask)
    approximations.yopo(2)(target)
    approximations.exact(1, 2)(target)
    first, second, exact = gradients
    # The exact one may be scaled by a power of two: only its sign matters.
    assert torch.allclose(first / first.norm(), exact / exact.norm(), atol=1e-6)
    assert torch.allclose(second, first, rtol=1e-4, atol=1e-6 * float(first.abs().max()))


def test_the_gradients_of_the_clean_graph_can_be_taken_again(targets: ModuleType) -> None:
    model, _ = adapted_mae(2)
    target = target_for(targets, model)
    leaf = target.images.clone().requires_grad_()
    loss = model.loss(model((leaf,), target.mask), (target.images,))
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(target.loss_gradient, expected)
    for _ in range(2):
        torch.autograd.grad(target.output.sum(), target.leaf, retain_graph=True)


def test_costs_on_vit_base(script: ModuleType) -> None:
    """From passes by hand: a third of the blocks costs a third of an exact step, the clean graph a half."""
    shares = {
        "noise alone": 0,
        "gradient of the clean loss": 0,
        "T=1, μ=2ε": 1,
        "first 1/4 of the blocks, T=2, μ=2ε": 1 / 2,
        "first 1/3 of the blocks, T=2, μ=2ε": 2 / 3,
        "clean graph, random direction": 1 / 2,
        "exact, then first 1/3 of the blocks, μ=2ε": 4 / 3,
        "every other patch, then the rest, μ=2ε": 1,
    }
    costs = script.large_costs([EXACT, *shares])
    exact = (costs[EXACT] - 2) / 2
    assert exact == pytest.approx(0.3, abs=0.02)
    for name, share in shares.items():
        # Each pass embeds the patches, however many blocks follow.
        assert costs[name] - 2 == pytest.approx(share * exact, rel=0.05), name


def test_a_share_is_of_the_same_image(script: ModuleType) -> None:
    def row(distances: list[float], loss: float) -> dict[str, list[Any]]:
        return {
            "distance": [torch.tensor(distances[:2]), torch.tensor(distances[2:])],
            "loss": [loss, loss],
            "seconds": [1.0, 3.0],
        }

    raw = {
        EXACT: row([1.0, 10.0, 100.0], 0.5),
        "T=2, μ=2ε": row([2.0, 20.0, 200.0], 0.6),
        "other": row([0.5, 10.0, 300.0], 0.4),
    }
    summary = script.summary(raw, clean=0.3, norm=torch.tensor([1.0, 10.0, 100.0]))
    assert summary["other"]["share"] == pytest.approx((0.5 + 1 + 3) / 3)
    assert summary["other"]["share_median"] == 1
    assert summary["other"]["share_5_percent"] == pytest.approx(0.55)
    assert summary["other"]["share_of_strongest"] == pytest.approx(0.75)
    assert summary["other"]["loss_rise"] == pytest.approx(0.1)
    assert summary[EXACT]["share"] == summary[EXACT]["relative_distance"] == 1
    assert summary[EXACT]["seconds"] == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on images of noise."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "images" / "train", per_class=8)
    return pretrain(recipe_in(folder, folder / "images", "model.depth=2", "max_duration=1ep")).recipe.parent


def test_end_to_end(
    script: ModuleType, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LARGE", "mae_vit_tiny_patch4")  # counts in less time
    out = run / "results" / "attack.json"
    images = run.parent / "images" / "train"
    arguments = ["--checkpoint", str(run / "latest-rank0.pt"), "--images", str(images)]
    script.main([*arguments, "--batch", "4", "--batches", "2", "--seeds", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert f"| {EXACT} | AEMIM |" in printed
    assert set(result["attacks"]) == set(sys.modules["approximations"].candidates(2))
    for name, row in result["attacks"].items():
        assert f"| {name} |" in printed
        assert len(row["seeds"]) == 2
    # The seeds are of different images and noise; every row of one seed is of the same.
    assert len({seed["relative_distance"] for seed in result["attacks"][EXACT]["seeds"]}) == 2
    assert result["attacks"]["noise alone"]["seeds"][0]["share"] < 0.5
    assert result["settings"]["seeds"] == [0, 1]
    assert result["command"].startswith("python benchmarks/attack_strength.py --checkpoint")


def test_without_a_checkpoint_it_takes_the_quickstarts_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, recipes = sys.modules["attacked_models"], []

    def pretrain(recipe: Any) -> SimpleNamespace:
        recipes.append(recipe)
        return SimpleNamespace(checkpoint=Path(recipe.save_folder, "latest-rank0.pt"))

    monkeypatch.setattr(models, "pretrain", pretrain)
    assert models.quickstart(tmp_path) == tmp_path / "attack_strength" / "latest-rank0.pt"
    assert recipes[0].data.source == "photos"
    assert recipes[0].model["depth"] == 12
    assert not recipes[0].evaluate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch=0: expected at least 1"),
        (["--seeds", "1"], "--seeds=1: expected at least 2"),
        (["--epsilon", "0"], "--epsilon=0.0: expected more than 0"),
        (["--checkpoint", "nowhere.pt"], "--checkpoint=nowhere.pt: no such file"),
        (["--checkpoint", "RUN/encoder.pt"], "is no checkpoint of the mae_vit_tiny_patch4"),
        (["--checkpoint", "RUN/latest-rank0.pt"], "names no test images: give --images"),
        (["--checkpoint", "RUN/latest-rank0.pt", "--images", "RUN/../images/train"], "has 16 images"),
        (["--checkpoint", "RUN/../images/train/0/0.png"], "has no recipe beside it"),
    ],
)
def test_bad_arguments(
    script: ModuleType, arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("RUN", str(run)) for argument in arguments]
    out = run / "nothing.json"
    with pytest.raises(SystemExit, match="2"):
        script.main([*given, "--out", str(out)])
    assert message in capsys.readouterr().err
    assert not out.exists()
