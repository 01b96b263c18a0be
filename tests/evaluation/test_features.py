from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aemim_algorithm.evaluation import extract_features


class Tokens(nn.Module):
    """Turns an image into one token per pixel column, behind a class token of huge values."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.num_prefix_tokens = prefix
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.dropout(self.scale * images.mean(dim=2).transpose(1, 2))
        prefix = torch.full((len(images), self.num_prefix_tokens, tokens.shape[2]), 1e6)
        return torch.cat([prefix, tokens], dim=1)


class Tripled(Tokens):
    def forward(self, images: Tensor) -> Tensor:
        return 3 * super().forward(images)


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8, generator=generator) for n in sizes]
    labels = torch.arange(sum(sizes)).split(sizes)
    return list(zip(images, labels, strict=True))


def normalize(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return images.float() / 255, labels


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_features_are_the_average_of_the_patch_tokens_in_order(prefix: int) -> None:
    data = batches([3, 2])
    encoder = Tokens(prefix).train()  # its dropout would show if it stayed active
    both = {"one": encoder, "tripled": Tripled(prefix)}
    found, labels = extract_features(both, data, normalize=normalize, device="cpu")
    features = found["one"]
    torch.testing.assert_close(found["tripled"], 3 * features)
    expected = 2 * torch.cat([images for images, _ in data]).double().mean(dim=(2, 3)) / 255
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features.double(), expected, rtol=1e-6, atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_every_submodule_gets_its_mode_back_even_after_an_error() -> None:
    encoder = Tokens()
    before = [module.training for module in encoder.modules()]
    assert True in before
    assert False in before
    extract_features({"one": encoder}, batches([2]), normalize=normalize, device="cpu")
    assert [module.training for module in encoder.modules()] == before
    with pytest.raises(RuntimeError, match="boom"):
        extract_features({"one": encoder}, batches([2]), normalize=_boom, device="cpu")
    assert [module.training for module in encoder.modules()] == before


def _boom(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    raise RuntimeError("boom")


def test_half_precision_tokens_are_averaged_in_float32() -> None:
    class Half(Tokens):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).bfloat16()

    data = batches([4])
    found, _ = extract_features({"half": Half()}, data, normalize=normalize, device="cpu")
    tokens = Half().eval()(normalize(data[0])[0])[:, 1:]
    torch.testing.assert_close(found["half"], tokens.float().mean(dim=1))


def test_bad_input_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="without batches"):
        extract_features({"one": Tokens()}, [], normalize=normalize, device="cpu")
    with pytest.raises(ValueError, match=r"expected it on 'meta'"):
        extract_features({"one": Tokens()}, batches([2]), normalize=normalize, device="meta")
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5\) from the encoder"):
        extract_features({"one": nn.Identity()}, batches([2]), normalize=normalize, device="cpu")
