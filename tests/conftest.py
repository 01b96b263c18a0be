"""Fixtures that several tests share."""

from __future__ import annotations

import importlib
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Algorithm
from composer.models import ComposerModel
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_parameters
from aemim_algorithm.branch import AdversarialPass
from aemim_algorithm.models import MAE

torch.set_num_threads(1)  # the models of the tests are too small to share
# Streaming keeps the shared memory of each data set open until the process ends.
_hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))


def normalised_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Images that fill the pixel range, normalised; shape (count, 3, size, size)."""
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0.0, 1.0
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def tiny_mae(seed: int = 0, kind: type[MAE] = MAE, **overrides: object) -> MAE:
    """A MAE of two small blocks on 16×16 images in 4×4 patches."""
    torch.manual_seed(seed)
    sizes: dict[str, object] = dict(  # noqa: C408
        image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2
    )
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return kind(**(sizes | decoder | overrides))  # type: ignore[arg-type]


def loader(count: int = 16, batch_size: int = 8) -> DataLoader:
    """Batches of (images, labels)."""
    data = TensorDataset(normalised_images(count), torch.arange(count))
    return DataLoader(data, batch_size=batch_size)


def perturb(model: nn.Module, scale: float = 0.3) -> None:
    """Make the adversarial copies of a model differ from the clean parameters: they start equal."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adversarial_parameters(model):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], rtol: float = 0.0) -> None:
    """State dicts with the same names and values: bitwise, unless there is a tolerance."""
    assert list(one) == list(other)
    differing = {
        name: float((value.double() - other[name].double()).abs().max())
        for name, value in one.items()
        if not torch.allclose(value, other[name], rtol=rtol, atol=rtol / 10, equal_nan=True)
    }
    assert not differing, differing


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond a number of bytes, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def clean_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adversarial copies."""
    return {name: value for name, value in state.items() if "adversarial" not in name}


def fit(
    model: ComposerModel,
    *algorithms: Algorithm,
    micro: int = 8,
    seed: int = 7,
    duration: str = "2ba",
    **kwargs: Any,
) -> Trainer:
    """Train for a moment on the CPU."""
    trainer = Trainer(
        model=model,
        train_dataloader=kwargs.pop("train_dataloader", loader()),
        optimizers=kwargs.pop("optimizers", None) or torch.optim.AdamW(model.parameters(), lr=1e-2),
        algorithms=list(algorithms),
        max_duration=duration,
        device="cpu",
        seed=seed,
        device_train_microbatch_size=micro,
        progress_bar=False,
        **kwargs,
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def benchmark_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the benchmarks as a module; it imports its siblings as it does when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def images() -> Tensor:
    return normalised_images(8)


def recorded_passes(aemim: AEMIM) -> list[AdversarialPass]:
    """A list that every adversarial pass of an attached AEMIM joins from now on."""
    branch, passes = aemim._get_step().branch, list[AdversarialPass]()
    finish = branch.finish

    def kept(*args: Any, **kwargs: Any) -> AdversarialPass:
        passes.append(finish(*args, **kwargs))
        return passes[-1]

    branch.finish = kept  # type: ignore[method-assign]
    return passes
