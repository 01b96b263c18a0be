"""The tokenizer against transformers' codebook, its files, and the dVAE that trains it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fit
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from aemim_algorithm.data.photos import load_photos
from aemim_algorithm.models import DiscreteVAE, VisualTokenizer, save_tokenizer
from aemim_algorithm.models.masking import pixels_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def codebook(hidden_size: int = 8, vocab_size: int = 32, **sizes: int) -> Any:
    """Transformers' model with weights that use many codes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.FlavaImageCodebookConfig(hidden_size=hidden_size, vocab_size=vocab_size, **sizes)
    model = transformers.FlavaImageCodebook(config)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) * (2 / fan_in) ** 0.5)
        output = model.blocks.output.conv  # every code's logit has the same mean and spread
        logits = model.blocks(torch.rand(8, 3, 32, 32)).movedim(1, -1).flatten(0, 2)
        std, mean = torch.std_mean(logits, dim=0)
        output.bias.copy_((output.bias - mean) / std)
        output.weight.div_(std[:, None, None, None])
    return model


def tiny(**sizes: int) -> VisualTokenizer:
    torch.manual_seed(0)
    defaults = {"hidden_size": 8, "vocab_size": 32, "num_groups": 3, "blocks_per_group": 1}
    return VisualTokenizer(**(defaults | sizes))


def saved(tokenizer: VisualTokenizer, folder: Path) -> Path:
    save_tokenizer(tokenizer, folder / "tokenizer.pt")
    return folder / "tokenizer.pt"


@pytest.mark.parametrize("form", ["folder", "bin", "safetensors", "state_dict"])
def test_has_the_codes_of_transformers_codebook(form: str, tmp_path: Path) -> None:
    reference = codebook(num_blocks_per_group=1 if form == "folder" else 2)
    path = tmp_path / "codebook"
    if form == "state_dict":
        path = tmp_path / "codebook.pt"
        torch.save(reference.state_dict(), path)
    else:
        reference.save_pretrained(path, safe_serialization=form != "bin")
        path = path / "model.safetensors" if form == "safetensors" else path
    pixels = torch.rand(4, 3, 32, 48)
    expected = reference.get_codebook_indices(0.8 * pixels + 0.1)  # what its image processor does to pixels
    before = torch.get_rng_state()
    found = VisualTokenizer.from_file(path)
    assert torch.equal(torch.get_rng_state(), before)  # a model's own initialisation must not depend on it
    assert torch.equal(found.codes(pixels), expected)
    assert expected.shape == (4, 4, 6)
    assert len(expected.unique()) > 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found.codes(pixels), expected)
    torch.testing.assert_close(found(pixels), reference.blocks(0.8 * pixels + 0.1))


def test_default_sizes_are_dall_es() -> None:
    with torch.device("meta"):
        tokenizer = VisualTokenizer()
        assert tokenizer(torch.empty(1, 3, 112, 112)).shape == (1, 8192, 14, 14)
    assert sum(p.numel() for p in tokenizer.parameters()) == 53_786_240
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        reference = transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig())
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in tokenizer.state_dict().items()} == shapes


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_a_file_brings_the_tokenizer_back_frozen(groups: int, tmp_path: Path) -> None:
    tokenizer = tiny(num_groups=groups, blocks_per_group=2)
    path = saved(tokenizer, tmp_path / "new")
    found = VisualTokenizer.from_file(path, vocab_size=32)
    pixels = torch.rand(2, 3, 16, 16)
    assert found.stride == 2 ** (groups - 1)
    assert torch.equal(found(pixels), tokenizer(pixels))
    assert found.config == tokenizer.config
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.fingerprint() == tokenizer.fingerprint()
    assert tiny(vocab_size=33).fingerprint() != tokenizer.fingerprint()
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.pt"]
    assert set(torch.load(path, weights_only=True)) == {"config", "state"}
    with torch.device("meta"):  # as a dry run builds models
        assert torch.equal(VisualTokenizer.from_file(path)(pixels), tokenizer(pixels))


def _text(path: Path) -> None:
    path.write_text("no weights")


def _other_weights(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def _pickle(path: Path) -> None:
    torch.save({"state": {"model": {}}, "code": Path}, path)


def _lacking(path: Path) -> None:
    state = tiny().state_dict()
    del state["blocks.group_2.group.block_1.id_path.weight"]
    torch.save(state, path)


def _lying(path: Path) -> None:
    tokenizer = tiny()
    torch.save({"config": tokenizer.config | {"vocab_size": 8192}, "state": tokenizer.state_dict()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file or folder; expected a file of save_tokenizer"),
        (Path.mkdir, r"holds neither model.safetensors nor pytorch_model.bin"),
        (_text, "does not read as weights"),
        (_pickle, "does not read as weights"),
        (lambda path: torch.save(torch.zeros(3), path), "holds no state dict"),
        (_other_weights, r"holds other weights \(weight, bias"),
        (_lacking, r"does not fit its own sizes .*blocks\.group_2\.group\.block_1\.id_path\.weight"),
        (_lying, "its config says vocab_size=8192, its weights 32"),
        (lambda path: save_tokenizer(tiny(), path), "has 32 codes, expected vocab_size=64"),
    ],
)
def test_what_is_no_tokenizer_is_one_clear_line(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        VisualTokenizer.from_file(path, vocab_size=64 if "64" in message else None)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_codebook_of_other_groups_is_refused(tmp_path: Path) -> None:
    """Transformers builds four groups whatever its config says, but scales them by it."""
    codebook(num_groups=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its config says num_groups=3, its weights 4"):
        VisualTokenizer.from_file(tmp_path)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size=6: expected a positive multiple of 4"):
        tiny(hidden_size=6)
    with pytest.raises(ValueError, match="num_groups=0"):
        tiny(num_groups=0)
    with pytest.raises(ValueError, match="image_size=18: expected a multiple of 4 pixels"):
        tiny_dvae(image_size=18)
    for size in (0, -4, 16.0):
        with pytest.raises(ValueError, match=f"image_size={size} is out of range"):
            tiny_dvae(image_size=size)
    for temperature in (0.0, float("inf"), "1"):
        with pytest.raises(ValueError, match=f"temperature={temperature!r} is out of range"):
            tiny_dvae(temperature=temperature)
    for weight in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"kl_weight={weight} is out of range"):
            tiny_dvae(kl_weight=weight)
    with pytest.raises(ValueError, match="code_dim=0 is out of range: expected an integer >= 1"):
        tiny_dvae(code_dim=0)
    with pytest.raises(ValueError, match=r"images are \(8, 8\) pixels"):
        tiny_dvae()(torch.zeros(1, 3, 8, 8))


def tiny_dvae(**overrides: Any) -> DiscreteVAE:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_size": 8, "vocab_size": 32, "num_groups": 3, "blocks_per_group": 1}
    return DiscreteVAE(**(sizes | {"code_dim": 16} | overrides))


def crops(count: int) -> Tensor:
    """Pieces of photographs, normalised; shape (count, 3, 16, 16)."""
    photos, generator = list(load_photos().values()), torch.Generator().manual_seed(0)
    pieces = []
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (int(torch.randint(0, side - 48, (), generator=generator)) for side in photo.shape[1:])
        pieces.append(F.avg_pool2d(photo[None, :, top : top + 48, left : left + 48] / 255, 3)[0])
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return (torch.stack(pieces) - mean) / std


def test_loss_is_the_pixels_error_and_the_divergence_of_the_shares() -> None:
    model, images = tiny_dvae(kl_weight=0.3), crops(4)
    with torch.no_grad():
        model.encoder.blocks.output.conv.weight.mul_(100)  # far from even
        outputs = model.eval()(images)
    loss = model.loss(outputs, (images, None))
    pixels = images.double() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    error = (outputs["pixels"].double() - pixels).square().mean().item()
    logits = outputs["logits"].double()
    share = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean((0, 2, 3))
    kl = sum(p * math.log(p * 32) for p in share.tolist())
    assert kl > 0.05
    assert loss["reconstruction"].item() == pytest.approx(error, rel=1e-4)
    assert loss["kl"].item() == pytest.approx(kl, rel=1e-3)
    assert loss["total"].item() == pytest.approx(error + 0.3 * kl, rel=1e-3)


def test_the_decoder_sees_whole_codes_and_the_tokenizer_gets_a_gradient() -> None:
    model, images = tiny_dvae(kl_weight=0.0), crops(4)
    seen: list[Tensor] = []
    model.decoder[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs = model(images)
    model.loss(outputs, images)["total"].backward()
    torch.testing.assert_close(seen[0].amax(1), torch.ones(4, 4, 4))
    torch.testing.assert_close(seen[0].sum(1), torch.ones(4, 4, 4))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not torch.equal(model(images)["pixels"], outputs["pixels"])  # drawn anew
    model.eval()
    assert torch.equal(model(images)["pixels"], model(images)["pixels"])
    assert torch.equal(seen[-1].argmax(1), model.encoder.codes(pixels_of(images, MEAN, STD)))


def test_training_teaches_many_codes(tmp_path: Path) -> None:
    """Under Composer, then through a file: what BEiT will see."""
    model, images = tiny_dvae(), crops(384)
    data = DataLoader(TensorDataset(images, torch.zeros(384)), batch_size=16, shuffle=True)
    fit(model, duration="60ba", micro=16, train_dataloader=data)
    model.eval()
    pixels = pixels_of(images, MEAN, STD)
    with torch.no_grad():
        error = F.mse_loss(model(images)["pixels"], pixels)
    variance = (pixels - pixels.mean((0, 2, 3), keepdim=True)).square().mean()
    assert error < 0.85 * variance  # a decoder that ignores the codes cannot get below 1
    codes = VisualTokenizer.from_file(saved(model.encoder, tmp_path)).codes(pixels)
    share = codes.flatten().bincount(minlength=32) / codes.numel()
    assert (share > 0.005).sum() >= 8
    assert share.max() < 0.4
