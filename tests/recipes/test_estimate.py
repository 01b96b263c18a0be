"""Counts against closed forms, the paper's cost ratios, and what a step must not leave behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from composer.models import ComposerModel
from torch.utils.flop_counter import FlopCounterMode

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes.estimate import attack_flops, estimate, matmul_rate, saved_bytes, step_flops

TINY = partial(
    MODELS["mae_vit_tiny_patch4"],
    image_size=16,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)


class Linear(ComposerModel):
    """A model of two matrices, whose cost is known."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(12, 5, bias=False)
        self.decoder = torch.nn.Linear(5, 7, bias=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(batch))

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.sum()


def test_flops_are_those_of_the_matrix_products() -> None:
    batch = torch.empty(3, 12)
    encoder, decoder = 2 * 3 * 12 * 5, 2 * 3 * 5 * 7
    # Forward, gradient of the weights, gradient of the input; the image needs none in training.
    clean = 2 * encoder + 3 * decoder
    assert step_flops(Linear(), batch) == clean
    model = Linear()
    assert attack_flops(model, batch, model.encoder) == 2 * encoder
    fast = AEMIM(steps=1, adversarial_ratio=0.25)
    assert step_flops(Linear(), batch, fast) == clean + 0.25 * (2 * encoder + clean)


def test_saved_bytes_count_activations_and_not_weights() -> None:
    batch = torch.empty(3, 12)
    # The input of each linear layer is kept for the gradient of its weights.
    assert saved_bytes(Linear(), batch) == 4 * (3 * 12 + 3 * 5)


@pytest.mark.parametrize(
    ("algorithm", "ratio"), [(AEMIM(), 2.60), (AEMIM(steps=1, adversarial_ratio=0.25), 1.33)]
)
def test_vit_base_costs_what_the_paper_says(algorithm: AEMIM, ratio: float) -> None:
    cost = estimate(MODELS["mae_vit_base_patch16"], image_size=224, algorithm=algorithm)
    assert cost.flops_ratio == pytest.approx(ratio, abs=0.01)
    assert cost.encoder == 85_798_656  # timm's vit_base_patch16_224 without its classifier


@pytest.mark.parametrize("adversarial_loss", ["l2", "reconstruction"])
def test_an_attack_step_is_counted_as_it_runs(adversarial_loss: str) -> None:
    with torch.device("meta"):
        model = TINY()
    model = model.to("meta")
    batch = (torch.empty(4, 3, 16, 16, device="meta"), torch.empty(4, device="meta"))
    one, two = (step_flops(model, batch, AEMIM(steps=n, adversarial_loss=adversarial_loss)) for n in (1, 2))
    forward = _forward_flops(lambda: model.loss(model(batch), batch))
    encoder = _forward_flops(
        lambda: model.encoder(batch[0], torch.zeros(4, 4, dtype=torch.int64, device="meta"))
    )
    whole = forward if adversarial_loss == "reconstruction" else encoder
    # Forward, and the half of a backward that goes to the inputs.
    assert two - one == pytest.approx(2 * whole, rel=0.05)


def _forward_flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


def test_the_estimate_agrees_with_the_real_model() -> None:
    cost = estimate(TINY, image_size=16, algorithm=AEMIM())
    model = TINY()
    encoder = model.get_submodule("encoder")
    assert cost.encoder == sum(value.numel() for value in encoder.parameters())
    assert cost.encoder + cost.other == sum(value.numel() for value in model.parameters())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert cost.state_bytes > 16 * trained  # weight, gradient, two moments: 4 bytes each
    # Four norms in the two encoder blocks, two in the decoder's, and the two final ones.
    assert cost.adversarial == 2 * (5 * 32 + 3 * 16)


def test_counting_leaves_no_gradients() -> None:
    model = TINY()
    batch = (torch.rand(2, 3, 16, 16), torch.zeros(2))
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    step_flops(model, batch, AEMIM())
    saved_bytes(model, batch)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert [value for value in model.parameters() if value.grad is not None] == [first]


def test_the_matmul_rate_is_measured() -> None:
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01, size=64)
    assert 1e6 < rate < 1e16
