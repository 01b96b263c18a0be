"""Algorithm 1 in plain NumPy and float64, without autograd, against one AEMIM step.

The toy: an encoder of one linear layer and a layer norm, a decoder of one linear layer. Every derivative
below is written by hand; the noise is recomputed with Python integers.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from composer.models import ComposerModel
from conftest import normalised_images
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of

SIZE, DIM, BATCH, SEED, STEP, RATE = 4, 6, 8, 11, 3, 0.5
PIXELS = 3 * SIZE * SIZE
MASK64 = 2**64 - 1


class ToyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(PIXELS, DIM), nn.LayerNorm(DIM)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.linear(images.flatten(1) * ~mask))


class Toy(ComposerModel):
    """Hides half of the pixels and reconstructs them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ToyEncoder(), nn.Linear(DIM, PIXELS)
        self.double()

    def forward(self, batch: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.rand(len(batch), PIXELS) < 0.5 if mask is None else mask
        return {"prediction": self.decoder(self.encoder(batch, mask)), "mask": mask}

    def loss(self, outputs: Any, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        error = (outputs["prediction"] - batch.flatten(1)).square() * outputs["mask"]
        return (error.sum(1) / outputs["mask"].sum(1)).mean()


# --- the oracle -------------------------------------------------------------------------------


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK64
    return word ^ word >> 31


def hashed(value: int, *key: int) -> int:
    for number in key:
        value = mix((value * 0x9E3779B97F4A7C15 + number) & MASK64)
    return value


def noise(position: int) -> np.ndarray:
    """SplitMix64 from a key for each sample; every word gives four signed 16-bit numbers."""
    key, numbers = hashed(position, 1, SEED, STEP), []
    for word in range(-(-PIXELS // 4)):
        bits = mix((word * 0x9E3779B97F4A7C15 + key) & MASK64)
        numbers += [(bits >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]
    signed = [n - 65536 if n >= 32768 else n for n in numbers[:PIXELS]]
    return np.array(signed) / 32768


def chosen_positions(ratio: float) -> list[int]:
    count = max(1, round(ratio * BATCH))
    starts = [k * BATCH // count for k in range(count + 1)]
    return [
        start + ((hashed(start, 2, SEED, STEP) & 0xFFFFFFFF) * (end - start) >> 32)
        for start, end in itertools.pairwise(starts)
    ]


def encode(x: np.ndarray, hidden: np.ndarray, w: dict[str, np.ndarray], branch: str) -> dict[str, np.ndarray]:
    z = (x * ~hidden) @ w["W"].T + w["b"]
    centered = z - z.mean()
    deviation = np.sqrt((centered**2).mean() + 1e-5)
    unit = centered / deviation
    return {"unit": unit, "deviation": deviation, "out": unit * w[f"gain_{branch}"] + w[f"bias_{branch}"]}


def back_through_norm(grad: np.ndarray, encoded: dict[str, np.ndarray], gain: np.ndarray) -> np.ndarray:
    g, unit = grad * gain, encoded["unit"]
    return (g - g.mean() - unit * (g * unit).mean()) / encoded["deviation"]


def attack(
    x: np.ndarray, hidden: np.ndarray, w: Any, start: np.ndarray, eps: float, steps: int
) -> np.ndarray:
    mean, std = (np.repeat(v, SIZE * SIZE) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    unit = 1 / 255 / std
    low = np.maximum(x - eps * unit, (0 - mean) / std)
    high = np.minimum(x + eps * unit, (1 - mean) / std)
    reference = encode(x, hidden, w, "clean")["out"]
    x_a = np.clip(x + eps * unit * start, low, high)
    for _ in range(steps):
        encoded = encode(x_a, hidden, w, "adversarial")
        grad_z = back_through_norm(2 * (encoded["out"] - reference), encoded, w["gain_adversarial"])
        grad_x = (grad_z @ w["W"]) * ~hidden
        x_a = np.clip(x_a + 1.25 * eps / steps * unit * np.sign(grad_x), low, high)
    return x_a


def add_gradient(x_in: np.ndarray, target: np.ndarray, hidden: np.ndarray, w: Any, branch: str,
                 weight: float, gradient: dict[str, np.ndarray]) -> float:  # fmt: skip
    encoded = encode(x_in, hidden, w, branch)
    error = (encoded["out"] @ w["V"].T + w["c"] - target) * hidden
    grad_y = weight * 2 * error / hidden.sum()
    gradient["V"] += np.outer(grad_y, encoded["out"])
    gradient["c"] += grad_y
    grad_f = grad_y @ w["V"]
    gradient[f"gain_{branch}"] += grad_f * encoded["unit"]
    gradient[f"bias_{branch}"] += grad_f
    grad_z = back_through_norm(grad_f, encoded, w[f"gain_{branch}"])
    gradient["W"] += np.outer(grad_z, x_in * ~hidden)
    gradient["b"] += grad_z
    return weight * (error**2).sum() / hidden.sum()


def oracle_step(x: np.ndarray, hidden: np.ndarray, w: Any, *, eps: float, steps: int, ratio: float,
                loss_ratio: float) -> tuple[dict[str, np.ndarray], float]:  # fmt: skip
    gradient = {name: np.zeros_like(value) for name, value in w.items()}
    loss, chosen = 0.0, chosen_positions(ratio)
    for i in range(BATCH):
        loss += add_gradient(x[i], x[i], hidden[i], w, "clean", loss_ratio / BATCH, gradient)
    for i in chosen:
        x_a = attack(x[i], hidden[i], w, noise(i), eps, steps)
        share = (1 - loss_ratio) / len(chosen)
        loss += add_gradient(x_a, x[i], hidden[i], w, "adversarial", share, gradient)
    return {name: w[name] - RATE * gradient[name] for name in w}, loss


# --- the comparison ---------------------------------------------------------------------------


def weights(model: Toy) -> dict[str, np.ndarray]:
    norm = model.encoder.norm
    tensors = {
        "W": model.encoder.linear.weight, "b": model.encoder.linear.bias,
        "gain_clean": norm.weight, "bias_clean": norm.bias,
        "gain_adversarial": norm.adversarial.weight, "bias_adversarial": norm.adversarial.bias,
        "V": model.decoder.weight, "c": model.decoder.bias,
    }  # fmt: skip
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("steps", "ratio", "loss_ratio", "epsilon"),
    [(1, 1.0, 0.5, 2.0), (2, 1.0, 0.5, 2.0), (3, 0.25, 0.3, 8.0), (1, 0.5, 0.9, 4.0)],
)
def test_one_step_agrees_with_the_oracle(steps: int, ratio: float, loss_ratio: float, epsilon: float) -> None:
    torch.manual_seed(0)
    model = Toy()
    images = normalised_images(BATCH, SIZE).double()
    algorithm = AEMIM(steps=steps, adversarial_ratio=ratio, loss_ratio=loss_ratio, epsilon=epsilon)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    algorithm.attach(model, optimizer)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in [p for pair in adapter.twins() for p in pair]:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    before = weights(model)

    torch.manual_seed(5)
    hidden = (torch.rand(BATCH, PIXELS) < 0.5).numpy()
    torch.manual_seed(5)
    losses = algorithm.training_loss(model, images, step=STEP, seed=SEED)
    losses["total"].backward()
    optimizer.step()

    expected, loss = oracle_step(images.flatten(1).numpy(), hidden, before, eps=epsilon, steps=steps,
                                 ratio=ratio, loss_ratio=loss_ratio)  # fmt: skip
    assert losses["total"].item() == pytest.approx(loss, rel=1e-12)
    for name, value in weights(model).items():
        assert not np.array_equal(value, before[name]), name
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
