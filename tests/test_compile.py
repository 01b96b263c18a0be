"""``Trainer(compile_config=...)``: the numbers are those of eager training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from composer.models import ComposerModel
from conftest import assert_same, fit, perturb, tiny_mae
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.models.masking import patchify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class DrawsItsMask(ComposerModel):
    """As few kernels as can be; its mask and its dropout can be repeated by the generators only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Masked(), nn.Linear(48, 8), nn.LayerNorm(8), nn.Dropout(0.2))
        self.decoder = nn.Linear(8, 48)

    def forward(self, batch: Any) -> Tensor:
        return self.decoder(self.encoder(batch[0]))

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return F.mse_loss(outputs, patchify(batch[0], 4))


class Masked(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        patches = patchify(images, 4)
        return patches * (torch.rand_like(patches[..., :1]) < 0.5)


def drawing() -> DrawsItsMask:
    torch.manual_seed(0)
    return DrawsItsMask()


def train(build: Callable[[], ComposerModel], aemim: AEMIM, **options: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = build()
    apply_adapters(model)
    perturb(model)
    fit(model, aemim, optimizers=torch.optim.SGD(model.parameters(), lr=0.05), **options)
    return model.state_dict()


@pytest.fixture
def default_inductor() -> Iterator[None]:
    with torch._inductor.config.patch(fallback_random=False):
        yield


EAGER_BACKEND = {"backend": "aot_eager"}  # dynamo and autograd as they are, no code to build


@pytest.mark.usefixtures("default_inductor")
@pytest.mark.parametrize(
    ("build", "config", "aemim"),
    [
        (lambda: tiny_mae(depth=1), EAGER_BACKEND, AEMIM.fast()),
        (drawing, EAGER_BACKEND, AEMIM.fast()),
        (drawing, {}, AEMIM()),  # inductor, which has generators of its own
    ],
    ids=["MAE", "mask drawn inside", "inductor"],
)
def test_compiled_training_equals_eager_training(
    build: Callable[[], ComposerModel], config: dict[str, Any], aemim: AEMIM
) -> None:
    eager = train(build, aemim)
    compiled = train(build, aemim, compile_config=config)
    assert_same(compiled, eager, rtol=1e-4)
