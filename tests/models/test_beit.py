"""BEiT: its codes, its loss, AEMIM's clean target, and where the tokenizer is and is not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from conftest import fit, loader, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.models import MODELS, BEiT, VisualTokenizer, save_tokenizer
from aemim_algorithm.models.masking import block_mask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_tokenizer(path: Path, *, seed: int = 0, num_groups: int = 3, vocab_size: int = 16) -> Path:
    """A tokenizer whose random weights tell images apart."""
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(
        hidden_size=8, vocab_size=vocab_size, num_groups=num_groups, blocks_per_group=1
    )
    with torch.no_grad():
        logits = tokenizer(torch.rand(8, 3, 16, 16)).movedim(1, -1).flatten(0, 2)
        std, mean = torch.std_mean(logits, dim=0)
        output: Any = tokenizer.blocks.get_submodule("output.conv")
        output.bias.copy_((output.bias - mean) / std)
        output.weight.div_(std[:, None, None, None])
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.pt")


def tiny(tokenizer: Path, **overrides: Any) -> BEiT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    options = {"min_block": 2, "layer_scale": 0.1, "mask_ratio": 0.4}
    return BEiT(tokenizer=str(tokenizer), **(sizes | options | overrides))


def test_loss_is_the_cross_entropy_of_the_hidden_patches_codes(tokenizer: Path, images: Tensor) -> None:
    model = tiny(tokenizer)
    outputs = model((images, torch.zeros(8)))
    assert outputs["prediction"].shape == (8, 6, 16)
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    codes = VisualTokenizer.from_file(tokenizer).codes(pixels.clamp(0, 1)).flatten(1)
    assert len(codes.unique()) > 6
    losses = []
    for image, mask in enumerate(outputs["mask"]):
        for number, patch in enumerate(mask.nonzero().flatten().tolist()):
            probability = outputs["prediction"][image, number].double().softmax(0)
            losses.append(-probability[codes[image, patch]].log())
    assert len(losses) == 8 * 6
    loss = model.loss(outputs, (images, None))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_images_come_to_the_tokenizer_in_its_own_resolution(tmp_path: Path, images: Tensor) -> None:
    """A stride of 2 for patches of 4 pixels: the image is halved, as BEiT halves 224 pixels to 112."""
    path = write_tokenizer(tmp_path / "tokenizer.pt", num_groups=2)
    model = tiny(path)
    codes = model.codes(images)
    assert codes.shape == (8, 16)
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    halved = F.interpolate(pixels, size=(8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(codes, VisualTokenizer.from_file(path).codes(halved).flatten(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.codes(images), codes)
    other = tiny(path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert torch.equal(other.codes((pixels - 0.5) / 0.5), codes)


def test_the_tokenizer_is_no_part_of_the_model(tokenizer: Path) -> None:
    model = tiny(tokenizer)
    assert not [name for name in model.state_dict() if "blocks.input" in name]
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained == sum(p.numel() for p in [*model.encoder.parameters(), *model.decoder.parameters()])
    assert all(parameter.requires_grad for parameter in model.parameters())
    copied = copy.deepcopy(model)
    assert copied._frozen is model._frozen
    assert not any(isinstance(module, VisualTokenizer) for module in model.modules())


def test_no_image_receives_a_gradient_from_its_codes(tokenizer: Path, images: Tensor) -> None:
    model, mask = tiny(tokenizer), block_mask(8, (4, 4), 6)
    outputs = {"prediction": torch.zeros(8, 6, 16, requires_grad=True), "mask": mask}
    images.requires_grad_()
    model.loss(outputs, images).backward()
    assert images.grad is None
    assert outputs["prediction"].grad is not None


def test_loss_reaches_every_trainable_parameter(tokenizer: Path, images: Tensor) -> None:
    model = tiny(tokenizer)
    model.loss(model(images), images).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    undecayed = {name for name, value in model.named_parameters() if value.ndim > 1} & model.no_weight_decay()
    assert undecayed == {f"encoder.{name}" for name in ("pos_embed", "cls_token", "mask_token")}


def test_aemims_target_are_the_clean_images_codes(tokenizer: Path, images: Tensor) -> None:
    aemim, model = AEMIM(epsilon=16.0), tiny(tokenizer)
    aemim.attach(model)
    perturb(model, 0.3)
    torch.manual_seed(1)
    outputs, result = aemim.attack(model, images, step=0)
    torch.manual_seed(1)
    loss = aemim.training_loss(model, images, step=0)
    assert torch.equal(result.outputs["mask"], outputs["mask"])
    # The attack is so strong that the adversarial images have other codes.
    assert not torch.equal(model.codes(result.images), model.codes(images))
    with adversarial_mode(model):
        prediction = model(result.images, outputs["mask"])
    torch.testing.assert_close(loss["adversarial"], model.loss(prediction, images))
    assert not torch.allclose(loss["adversarial"], model.loss(prediction, result.images), rtol=1e-5)
    torch.testing.assert_close(loss["clean"], model.loss(model(images, outputs["mask"]), images))


@pytest.mark.parametrize("aemim", [AEMIM(), AEMIM.fast()], ids=["standard", "fast"])
def test_trains_with_aemim(aemim: AEMIM, tokenizer: Path) -> None:
    model = tiny(tokenizer, drop_path=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = {name: value.clone() for name, value in model._frozen.tokenizer.state_dict().items()}
    fit(model, aemim, micro=4)
    after = model.state_dict()
    same = [name for name, value in before.items() if torch.equal(after[name], value)]
    assert same == ["tokenizer_print"]
    clean, adversarial = after["encoder.norm.bias"], after["encoder.norm.adversarial.bias"]
    assert not torch.equal(clean, adversarial)
    kept = model._frozen.tokenizer.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in codes.items())


def count_tokenized(model: BEiT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of images of every call of the tokenizer."""
    counts: list[int] = []
    codes = VisualTokenizer.codes

    def counting(tokenizer: VisualTokenizer, pixels: Tensor) -> Tensor:
        counts.append(len(pixels))
        return codes(tokenizer, pixels)

    monkeypatch.setattr(VisualTokenizer, "codes", counting)
    return counts


@pytest.mark.parametrize("objective", ["l2", "reconstruction"])
def test_aemim_has_a_batch_tokenized_once(
    objective: str, tokenizer: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, aemim = tiny(tokenizer), AEMIM(adversarial_loss=objective)
    aemim.attach(model)
    counts = count_tokenized(model, monkeypatch)
    for step in range(3):
        aemim.training_loss(model, (images.roll(step, 0), None), step=step)
    assert counts == [8, 8, 8]


def test_codes_are_remembered_of_these_very_images_only(
    tokenizer: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tokenizer)
    outputs = model(images)
    counts = count_tokenized(model, monkeypatch)
    first = model.loss(outputs, images)
    assert torch.equal(model.loss(outputs, images), first)
    assert len(counts) == 1
    other = images.flip(0).clone()
    assert not torch.equal(model.loss(outputs, other), first)
    images.copy_(other)  # the same tensor, changed in place
    assert torch.equal(model.loss(outputs, images), model.loss(outputs, other))
    with torch.inference_mode():  # its tensors do not tell whether they changed
        frozen = images.clone()
        before = model.loss(outputs, frozen)
        frozen.copy_(images.flip(0))
        assert not torch.equal(model.loss(outputs, frozen), before)


def test_remembered_codes_outlive_no_images_and_leave_no_trace(tokenizer: Path, images: Tensor) -> None:
    model = tiny(tokenizer)
    names, batch = list(model.state_dict()), images.clone()
    outputs = model(batch)
    loss = model.loss(outputs, batch)
    assert list(model.state_dict()) == names
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(copied.loss(outputs, batch), loss)
        assert torch.equal(copied.loss(outputs, images), loss)
    seen = weakref.ref(batch)
    del batch, outputs, loss, copied  # their graphs hold it, too
    gc.collect()
    assert seen() is None


def test_learns_the_codes(tokenizer: Path, images: Tensor) -> None:
    model, mask = tiny(tokenizer, embed_dim=48), block_mask(8, (4, 4), 6)
    with torch.no_grad():
        before = model.loss(model(images, mask), images)
    fit(model, duration="30ba", train_dataloader=loader(8))
    with torch.no_grad():
        assert model.loss(model(images, mask), images) < 0.8 * before


def test_resumes_bitwise_and_only_with_its_own_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    def run(model: BEiT, duration: str, **options: Any) -> Trainer:
        return fit(model, AEMIM(), duration=duration, train_dataloader=loader(32), **options)

    whole, half, rest = (tiny(tokenizer) for _ in range(3))
    run(whole, "4ba")
    run(half, "2ba", save_folder=str(tmp_path / "run"), save_interval="2ba")
    run(rest, "4ba", load_path=str(tmp_path / "run" / "latest-rank0.pt"))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rest.state_dict().items())
    saved = torch.load(tmp_path / "run" / "latest-rank0.pt", weights_only=False)["state"]["model"]
    assert list(saved) == list(expected)

    other = tiny(write_tokenizer(tmp_path / "other.pt", seed=1))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        run(other, "4ba", load_path=str(tmp_path / "run" / "latest-rank0.pt"))


def test_what_cannot_work_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        tiny(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="has 16 codes, expected vocab_size=8192"):
        tiny(tokenizer, vocab_size=8192)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.01 hides 0 of 16"):
        tiny(tokenizer, mask_ratio=0.01)


def test_named_sizes_are_the_papers(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.pt", num_groups=4)
    with torch.device("meta"):  # as a dry run builds it
        model = MODELS["beit_vit_base_patch16"](tokenizer=str(path)).to("meta")
        outputs = model(torch.empty(2, 3, 224, 224))
        assert model.loss(outputs, torch.empty(2, 3, 224, 224)).shape == ()
        small = MODELS["beit_vit_tiny_patch4"](tokenizer=str(path))
    assert outputs["prediction"].shape == (2, 75, 16)
    assert isinstance(model.decoder, nn.Linear)
    assert small.num_hidden == 24
