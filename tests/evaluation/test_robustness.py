"""FGSM and PGD: a closed form in float64, an independent library, the ball, and what must stay untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.robustness import (
    FGSM_EPSILONS,
    Attack,
    attack_pixels,
    fgsm,
    pgd,
    robust_accuracy,
    starting_noise,
)
from aemim_algorithm.evaluation.scores import wilson_interval

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.1)
SIZE = 8


class Images(Dataset[tuple[Tensor, int, int]]):
    """Items of an ImageSet."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], int(self.labels[index]), index


def classifier_of(model: nn.Module) -> Classifier:
    return Classifier(model=model, image_size=SIZE, mean=MEAN, std=STD, classes=None, name="a test's")


def random_images(count: int, seed: int = 0) -> Tensor:
    """All of the range, its ends often, where the image is cut."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-60, 316, (count, 3, SIZE, SIZE), generator=generator)
    return values.clamp(0, 255).to(torch.uint8)


def network(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(288, classes),
    )


def labelled(model: nn.Module, images: Tensor) -> Images:
    """Labels that the model gets right, except for every fifth."""
    model.eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        labels = model((images / 255 - mean) / std).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 5
    return Images(images, labels)


def closed_form(images: Tensor, labels: Tensor, model: nn.Linear, epsilon: float) -> int:
    """Of a linear classifier of two classes, in float64: the pixels that may move do, against the label.

    The cross-entropy of two classes falls with the difference of the logits, whose gradient is a constant:
    all signs are known, whatever the image. Pixels stop at 0 and 1.
    """
    weight = model.weight.detach().double().numpy().reshape(2, 3, SIZE, SIZE)
    bias = model.bias.detach().double().numpy()
    pixels = images.numpy().astype(np.float64) / 255
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    right = 0
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        away = (weight[1 - label] - weight[label]) / std
        moved = np.clip(pixel + epsilon / 255 * np.sign(away), 0, 1)
        before, after = (
            float(
                ((x - mean) / std * (weight[label] - weight[1 - label])).sum() + bias[label] - bias[1 - label]
            )
            for x in (pixel, moved)
        )
        right += before > 0 and after > 0
    return right


def test_a_linear_classifier_has_the_accuracy_that_its_margins_give() -> None:
    torch.manual_seed(3)
    head = nn.Linear(3 * SIZE * SIZE, 2)
    nn.init.normal_(head.weight, std=0.02)
    images = random_images(300)
    chosen = Images(images, torch.randint(0, 2, (300,)))
    expected = [closed_form(images, chosen.labels, head, epsilon) for epsilon in FGSM_EPSILONS]
    assert expected[0] > expected[1] > expected[2] > expected[3] > expected[4] > 0  # each budget counts
    classifier = classifier_of(nn.Sequential(nn.Flatten(), head))
    for make in (fgsm, pgd):  # the best attack on a linear classifier is one of its steps, and PGD's end
        results = robust_accuracy(
            classifier, chosen, [make(epsilon) for epsilon in FGSM_EPSILONS], batch_size=64
        )
        assert [result.correct for result in results] == expected
    assert results[2].interval == wilson_interval(expected[2], 300)
    assert results[2].value == pytest.approx(expected[2] / 3)


@pytest.mark.parametrize("attack", [fgsm(2), pgd(0.51), pgd(8, steps=3)])
def test_images_stay_in_the_ball_and_the_range(attack: Attack) -> None:
    model = network().eval()
    chosen = labelled(model, random_images(16))
    pixels = chosen.images.float() / 255
    adversarial = attack_pixels(classifier_of(model), pixels, chosen.labels, attack)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    moved = (adversarial.double() - pixels.double()).abs().max() * 255
    assert attack.epsilon * 0.99 < moved <= attack.epsilon + 255 * 2**-24  # of rounding near 1


def test_nothing_is_left_in_the_model_or_the_generators() -> None:
    model = network()
    chosen = labelled(model, random_images(8))
    model.train()
    model[1].eval()  # frozen by the user
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    robust_accuracy(classifier_of(model), chosen, [fgsm(1), pgd(1, steps=2)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [child.training for child in model.children()] == [True, False, True, True, True, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_neither_batches_nor_order_change_a_sample_s_attack() -> None:
    model = network().double().eval()
    chosen = labelled(network(), random_images(24))
    pixels = chosen.images.double() / 255

    def attacked(indices: Tensor, seed: int) -> Tensor:
        noise = starting_noise(pixels[indices].shape, indices, seed=seed).double()
        assert -1 <= noise.min() < -0.99
        assert 0.99 < noise.max() < 1
        classifier = classifier_of(model)
        return attack_pixels(
            classifier, pixels[indices], chosen.labels[indices], pgd(2, steps=3), noise=noise
        )

    whole = attacked(torch.arange(24), seed=1)
    some = torch.tensor([7, 20, 3])
    assert torch.equal(attacked(some, seed=1), whole[some])
    assert not torch.equal(attacked(some, seed=2), whole[some])
    alone = starting_noise(torch.Size((2, 3, 4, 4)), torch.tensor([0, 1]), seed=1)
    assert (alone[0] - alone[1]).abs().mean() > 0.3  # each sample has its own


def test_results_do_not_depend_on_the_batch_size() -> None:
    model = network()
    chosen = labelled(model, random_images(60))
    attacks = [fgsm(0), fgsm(2), pgd(1, steps=5), pgd(3, steps=5)]
    per_size = [
        [r.correct for r in robust_accuracy(classifier_of(model), chosen, attacks, batch_size=size)]
        for size in (1, 7, 60)
    ]
    assert per_size[0] == per_size[1] == per_size[2]
    assert per_size[0][0] == 48  # every fifth is wrong to begin with
    assert 0 < per_size[0][1] < 48


def test_an_image_that_was_wrong_counts_as_wrong() -> None:
    """Whatever the attack makes of it: here it would push every image over to its label."""

    class Contrary(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            bright = images.flatten(1).mean(dim=1)
            # Its gradient says to move away from the border, which is a step over it.
            return torch.stack([bright.sin() * 0, (bright * 1000).sin()], dim=1)

    images, labels = random_images(40), torch.zeros(40, dtype=torch.int64)
    classifier = classifier_of(Contrary())
    pixels = images.float() / 255
    wrong = Contrary()(normalised(pixels)).argmax(dim=1) != labels
    assert 0 < wrong.sum() < 40
    pushed = attack_pixels(classifier, pixels[wrong], labels[wrong], fgsm(8))
    assert (Contrary()(normalised(pushed)).argmax(dim=1) == 0).any()
    (attacked,) = robust_accuracy(classifier, Images(images[wrong], labels[wrong]), [fgsm(8)])
    assert (attacked.correct, attacked.n) == (0, int(wrong.sum()))


@pytest.mark.parametrize("epsilon", FGSM_EPSILONS)
def test_fgsm_is_that_of_torchattack(epsilon: float) -> None:
    torchattack = pytest.importorskip("torchattack")
    model, chosen = network().double(), labelled(network(), random_images(64))
    pixels = chosen.images.double() / 255
    theirs = torchattack.FGSM(model.eval(), normalised, torch.device("cpu"), eps=epsilon / 255)
    expected = theirs(pixels, chosen.labels).detach()
    assert_same_images(model, pixels, chosen, fgsm(epsilon), None, expected)


@pytest.mark.parametrize(("epsilon", "step_size"), [(0.51, None), (2.0, None), (8.0, 1.0)])
def test_pgd_is_that_of_torchattack(epsilon: float, step_size: float | None) -> None:
    torchattack = pytest.importorskip("torchattack")
    model, chosen = network().double(), labelled(network(), random_images(64))
    pixels = chosen.images.double() / 255
    attack = pgd(epsilon, step_size=step_size)
    options = {"eps": epsilon / 255, "alpha": attack.step_size / 255, "steps": 20}
    theirs = torchattack.PGD(model.eval(), normalised, torch.device("cpu"), **options)
    torch.manual_seed(4)
    expected = theirs(pixels, chosen.labels).detach()
    torch.manual_seed(4)
    noise = torch.empty_like(pixels).uniform_(-epsilon / 255, epsilon / 255) / (epsilon / 255)
    assert_same_images(model, pixels, chosen, attack, noise, expected)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=pixels.dtype)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def assert_same_images(
    model: nn.Module, pixels: Tensor, chosen: Images, attack: Attack, noise: Any, expected: Tensor
) -> None:
    ours = attack_pixels(classifier_of(model), pixels, chosen.labels, attack, noise=noise)
    assert (ours - expected).abs().max() < 1e-12
    after = [model(normalised(images)).argmax(dim=1) == chosen.labels for images in (ours, expected)]
    assert torch.equal(*after)
    if attack.epsilon:
        assert (ours - pixels).abs().max() > 0


def test_bad_arguments_are_one_line() -> None:
    with pytest.raises(ValueError, match="epsilon=-1 is out of range"):
        fgsm(-1)
    with pytest.raises(ValueError, match="steps=0"):
        pgd(1, steps=0)
    model = network()
    images = random_images(4)
    with pytest.raises(ValueError, match="labels from 5 to 5; expected those of the 5 classes of a test's"):
        robust_accuracy(classifier_of(model), Images(images, torch.full((4,), 5)), [fgsm(1)])
    with pytest.raises(ValueError, match="0 attacks and 4 images"):
        robust_accuracy(classifier_of(model), Images(images, torch.zeros(4)), [])
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        robust_accuracy(classifier_of(model), Images(images, torch.zeros(4)), [fgsm(1)])
