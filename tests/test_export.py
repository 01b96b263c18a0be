from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from composer import Trainer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aemim_algorithm.adapters import adversarial_mode, apply_adapters
from aemim_algorithm.export import encoder_state, export_encoder, native_format
from aemim_algorithm.models import MAE, MODELS


def build(name: str, **overrides: Any) -> MAE:
    torch.manual_seed(0)
    model = MODELS[name](**overrides)
    assert isinstance(model, MAE)
    return model


def trained_looking(model: Any, adapter: str = "norm") -> Any:
    """Adapters on, and no parameter at a value that a fresh timm model also has."""
    apply_adapters(model, adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.add_(noise * 0.1)
    return model


def small_mae() -> MAE:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1}
    return build("mae_vit_tiny_patch4", **sizes, decoder_heads=2)


@pytest.mark.parametrize(
    ("name", "timm_name", "through_checkpoint"),
    [
        ("mae_vit_small_patch16", "vit_small_patch16_224", True),
        ("mae_vit_base_patch16", "vit_base_patch16_224", False),
    ],
)
def test_timm_loads_it_strictly_and_sees_the_same_features(
    name: str, timm_name: str, through_checkpoint: bool, tmp_path: Path
) -> None:
    # The decoder is dropped anyway; a small one makes the test quick.
    model = trained_looking(build(name, decoder_dim=64, decoder_depth=1, decoder_heads=4))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model.eval().encoder(images)
        with adversarial_mode(model):
            adversarial = model.encoder(images)
    assert (adversarial - expected).abs().max() > 0.1  # else the wrong branch would pass unseen

    out = tmp_path / "encoder.pt"
    export_encoder(checkpoint_of(model, tmp_path) if through_checkpoint else model, out)
    plain: Any = timm.create_model(timm_name, num_classes=0, global_pool="").eval()
    plain.load_state_dict(torch.load(out, weights_only=True), strict=True)
    with torch.no_grad():
        found = plain.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.pos_embed, model.state_dict()["encoder.pos_embed"])


def checkpoint_of(model: MAE, folder: Path) -> Path:
    """A checkpoint that Composer's Trainer wrote."""
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model=model, optimizers=optimizer, run_name="test", progress_bar=False)
    written = trainer.save_checkpoint(str(folder / "checkpoint.pt"))
    trainer.close()
    assert written is not None
    return Path(written)


def small_simmim(kind: str, **overrides: Any) -> Any:
    """SimMIM on 32×32 images: a ViT in 8×8 patches, or a Swin of two stages with windows of 4 patches."""
    torch.manual_seed(0)
    sizes: dict[str, Any]
    if kind == "vit":
        sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return MODELS["simmim_vit_tiny_patch4"](**(sizes | overrides))
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "patch_size": 4}
    return MODELS["simmim_swin_tiny_patch2_window4"](**(sizes | overrides))


def plain(kind: str, **overrides: Any) -> Any:
    """timm's own model of the sizes of :func:`small_simmim`."""
    common = {"img_size": 32, "num_classes": 0, "global_pool": ""}
    sizes: dict[str, Any]
    if kind == "vit":
        sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return VisionTransformer(**(common | sizes | overrides)).eval()
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "patch_size": 4, "window_size": 4}
    return SwinTransformer(**(common | sizes | overrides)).eval()


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("image_size", [32, (32, 64)])
def test_timm_loads_an_encoder_with_mask_tokens_strictly(kind: str, image_size: Any, tmp_path: Path) -> None:
    model = trained_looking(small_simmim(kind, image_size=image_size)).eval()
    export_encoder(model, tmp_path / "encoder.pt")
    timms = plain(kind, img_size=image_size)
    timms.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)
    height, width = timms.patch_embed.img_size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected, found = model.encoder(images), timms.forward_features(images)
        with adversarial_mode(model):
            assert (model.encoder(images) - expected).abs().max() > 0.02
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    # The mask token stays in what pre-training goes on with.
    assert "mask_token" in encoder_state(model.state_dict())


@pytest.mark.parametrize("adapter", ["norm", "cls_token", "none"])
def test_what_is_written_is_the_clean_encoder_and_nothing_else(adapter: str, tmp_path: Path) -> None:
    stock = small_mae().encoder.state_dict()
    model = trained_looking(small_mae(), adapter)
    exported = export_encoder(model, tmp_path / "new" / "encoder.pt")
    saved = torch.load(tmp_path / "new" / "encoder.pt", weights_only=True)
    assert list(saved) == list(exported)
    assert set(saved) == set(stock)
    for key, value in model.encoder.state_dict().items():
        if "adversarial" not in key:
            assert torch.equal(saved[key], value)
            assert not torch.equal(saved[key], stock[key])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["encoder.pt"]


def test_the_encoder_of_a_discrete_vae_is_a_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = MODELS["dvae_tiny_patch4"](image_size=16, hidden_size=16, vocab_size=12)
    assert native_format(model.state_dict()) == "tokenizer"
    assert native_format(small_mae().state_dict()) == "timm"
    export_encoder(model, tmp_path / "tokenizer.pt", format="tokenizer")
    found = type(model.encoder).from_file(tmp_path / "tokenizer.pt")
    pixels = torch.rand(2, 3, 16, 16)
    assert found.codes(pixels).unique().numel() > 1
    assert torch.equal(found.codes(pixels), model.encoder.codes(pixels))
    with pytest.raises(ValueError, match="lacks blocks.input.weight, .* expected that of a DiscreteVAE"):
        export_encoder(small_mae(), tmp_path / "no.pt", format="tokenizer")
    with pytest.raises(ValueError, match="lacks patch_embed.proj.weight"):
        export_encoder(model, tmp_path / "no.pt")


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    model = trained_looking(small_mae())
    sources: list[Any] = [model, model.state_dict(), checkpoint_of(model, tmp_path)]
    first, *others = [export_encoder(source, tmp_path / "encoder.pt") for source in sources]
    for other in others:
        assert list(other) == list(first)
        assert all(torch.equal(other[key], first[key]) for key in first)


def test_training_on_does_not_change_what_was_exported(tmp_path: Path) -> None:
    model = small_mae()
    exported = export_encoder(model, tmp_path / "encoder.pt")
    before = exported["norm.bias"].clone()
    with torch.no_grad():
        model.encoder.get_parameter("norm.bias").add_(1)
    assert torch.equal(exported["norm.bias"], before)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "does not read as a checkpoint"),
        (lambda: b"PK\x03\x04" + bytes(50), "does not read as a checkpoint"),
        (lambda: "just some text, für alle\n".encode() * 9, "does not read as a checkpoint"),
        (lambda: saved(small_mae().state_dict())[:-5000], "does not read as a checkpoint"),
        (lambda: saved(torch.zeros(3)), r"holds no model under \['state'\]\['model'\]"),
        (lambda: saved({"state": {"model": {}}}), "found no encoder among 0 parameters"),
        (
            lambda: saved({"state": {"model": {"head.weight": torch.zeros(1)}}}),
            r"found no encoder among 1 parameters \(head.weight\)",
        ),
        (
            lambda: saved({"state": {"model": {"encoder.layer.0.weight": torch.zeros(1)}}}),
            "the encoder lacks patch_embed.proj.weight",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    content: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out" / "encoder.pt"
    source.write_bytes(content())
    with pytest.raises(ValueError, match=message) as caught:
        export_encoder(source, out)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists()


def test_paths_and_formats_that_do_not_exist(tmp_path: Path) -> None:
    out = tmp_path / "encoder.pt"
    with pytest.raises(ValueError, match=r"missing.pt: no such file"):
        export_encoder(tmp_path / "missing.pt", out)
    with pytest.raises(ValueError, match="a folder"):
        export_encoder(tmp_path, out)
    with pytest.raises(
        ValueError, match="got format='onnx'; expected one of huggingface, mae, timm, tokenizer"
    ):
        export_encoder(small_mae(), out, format="onnx")
    for format in ("timm", "mae"):
        with pytest.raises(ValueError, match="got a folder as output"):
            export_encoder(small_mae(), tmp_path, format=format)
    with pytest.raises(ValueError, match="timm has no decoder"):
        export_encoder(small_mae(), out, decoder=True)
    assert not list(tmp_path.iterdir())


def test_shards_are_refused(tmp_path: Path) -> None:
    class Shard:
        def full_tensor(self) -> Tensor:
            raise AssertionError("would hang without the other ranks")

    state: dict[str, Any] = {"encoder.norm.weight": Shard()}
    with pytest.raises(ValueError, match=r"sharded encoder \(norm.weight\).*state_dict_type"):
        export_encoder(state, tmp_path / "encoder.pt")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "encoder.pt"
    export_encoder(small_mae(), out)
    before = out.read_bytes()

    def fails_halfway(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails_halfway)
    with pytest.raises(OSError, match="No space left"):
        export_encoder(nn.Module.state_dict(trained_looking(small_mae())), out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt"]
