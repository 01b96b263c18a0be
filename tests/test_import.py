"""Published MAE weights as a starting point: names, pixel order, bit-equal round trips, refusals."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Time
from conftest import assert_same, normalised_images, tiny_mae
from test_export import small_simmim, trained_looking
from torch import Tensor

from aemim_algorithm.exchange.importing import import_checkpoint, load_start
from aemim_algorithm.export import export_encoder
from aemim_algorithm.models import MAE, MODELS

# The names of mae_pretrain_vit_base.pth, of a model with two blocks …
ENCODER = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"} | {
    "norm.weight", "norm.bias"
}  # fmt: skip
# … and what the files with a decoder have beside them.
DECODER = {"mask_token", "decoder_pos_embed"} | {
    f"decoder_{module}.{end}" for module in ("embed", "norm", "pred") for end in ("weight", "bias")
}
PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def blocks(prefix: str, count: int) -> set[str]:
    ends = ("weight", "bias")
    return {f"{prefix}.{i}.{part}.{end}" for i in range(count) for part in PARTS for end in ends}


def clean_state(model: MAE) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "adversarial" not in name}


def trained(**sizes: Any) -> MAE:
    return trained_looking(tiny_mae(**sizes)).eval()


@pytest.mark.parametrize("decoder", [False, True])
def test_the_names_are_those_of_the_published_files(decoder: bool, tmp_path: Path) -> None:
    exported = export_encoder(trained(), tmp_path / "mae.pth", format="mae", decoder=decoder)
    saved = torch.load(tmp_path / "mae.pth", weights_only=True)
    assert saved.keys() == {"model"}
    assert saved["model"].keys() == exported.keys()
    expected = ENCODER | blocks("blocks", 2)
    assert exported.keys() == (expected | DECODER | blocks("decoder_blocks", 1) if decoder else expected)


def test_the_decoder_predicts_pixels_channels_last(tmp_path: Path) -> None:
    """Its head, in NumPy, against our prediction; a patch there is (y, x, channel)."""
    model = trained()
    state = export_encoder(model, tmp_path / "mae.pth", format="mae", decoder=True)
    features: list[Tensor] = []
    model.decoder.head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    with torch.no_grad():
        prediction = model(normalised_images(3))["prediction"]
    weight, bias = state["decoder_pred.weight"].numpy(), state["decoder_pred.bias"].numpy()
    theirs = features[0].numpy() @ weight.T + bias
    for y in range(4):
        for x in range(4):
            for channel in range(3):
                ours = prediction[..., 16 * channel + 4 * y + x].numpy()
                assert np.allclose(theirs[..., 3 * (4 * y + x) + channel], ours, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"image_size": (16, 24), "patch_size": 8, "decoder_depth": 3}])
@pytest.mark.parametrize("decoder", [False, True])
def test_what_goes_out_comes_back_bit_by_bit(sizes: dict[str, Any], decoder: bool, tmp_path: Path) -> None:
    model, fresh = trained(**sizes), tiny_mae(seed=1, **sizes)
    export_encoder(model, tmp_path / "mae.pth", format="mae", decoder=decoder)
    import_checkpoint(tmp_path / "mae.pth", tmp_path / "start.pt", model=fresh)
    untouched = clean_state(tiny_mae(seed=1, **sizes))
    assert all(torch.equal(value, untouched[name]) for name, value in fresh.state_dict().items())

    assert load_start(fresh, tmp_path / "start.pt") == (["encoder", "decoder"] if decoder else ["encoder"])
    expected = clean_state(model)
    for name, value in fresh.state_dict().items():
        kept = name.startswith("decoder.") and not decoder
        assert torch.equal(value, untouched[name] if kept else expected[name]), name


@pytest.mark.parametrize("whole", [False, True])
def test_a_hugging_face_folder_comes_back_bit_by_bit(whole: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, fresh = trained(), tiny_mae(seed=1)
    export_encoder(model, tmp_path / "hf", format="huggingface", decoder=whole)
    state = import_checkpoint(tmp_path / "hf", tmp_path / "start.pt", model=fresh)
    expected = clean_state(model)
    assert state.keys() == {name for name in expected if whole or name.startswith("encoder.")}
    assert all(torch.equal(state[name], expected[name]) for name in state)

    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="num_attention_heads: got 4, expected 2"):
        import_checkpoint(tmp_path / "hf", tmp_path / "start.pt", model=fresh)


def composer_checkpoint(model: Any, path: Path) -> Path:
    """What Composer's file holds of a model, beside a timestamp that is no tensor."""
    torch.save({"state": {"model": model.state_dict(), "timestamp": Time(3, "ba")}, "rng": []}, path)
    return path


@pytest.mark.parametrize("adapter", ["norm", "cls_token"])
def test_a_run_that_composer_saved_is_a_start_without_its_copies(adapter: str, tmp_path: Path) -> None:
    model, fresh = trained_looking(tiny_mae(), adapter), tiny_mae(seed=1)
    source = composer_checkpoint(model, tmp_path / "ep1-rank0.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors .*--trust"):
        import_checkpoint(source, tmp_path / "start.pt", model=fresh)
    state = import_checkpoint(source, tmp_path / "start.pt", model=fresh, trust=True)
    expected = clean_state(model)
    assert_same(state, expected)
    assert len(model.state_dict()) > len(expected)  # else no copy would have been there to drop
    assert load_start(fresh, tmp_path / "start.pt") == ["encoder", "decoder"]
    assert_same(fresh.state_dict(), expected)
    with pytest.raises(ValueError, match="fit MaskedViT: blocks.2.norm1.weight: got nothing"):
        import_checkpoint(source, tmp_path / "o.pt", model=tiny_mae(depth=3), trust=True)


def test_a_start_of_another_method_comes_from_composer_as_well(tmp_path: Path) -> None:
    model = trained_looking(small_simmim("swin"))
    source = composer_checkpoint(model, tmp_path / "ep1-rank0.pt")
    import_checkpoint(source, tmp_path / "start.pt", trust=True)
    fresh = small_simmim("swin")
    load_start(fresh, tmp_path / "start.pt")
    assert_same(fresh.state_dict(), clean_state(model))
    with pytest.raises(ValueError, match="fit MaskedViT: cls_token: got nothing"):
        import_checkpoint(source, tmp_path / "o.pt", model=tiny_mae(), trust=True)


def test_a_checkpoint_is_no_start_before_it_is_imported(tmp_path: Path) -> None:
    source = composer_checkpoint(tiny_mae(), tmp_path / "latest-rank0.pt")
    with pytest.raises(ValueError, match="cannot start from .*run `aemim import` first") as caught:
        load_start(tiny_mae(), source)
    assert "trust" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["simmim_vit_tiny_patch4", "dvae_tiny_patch4"])
def test_weights_of_a_mae_are_refused_for_another_method(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export_encoder(trained(), tmp_path / "hf", format="huggingface", decoder=True)
    with pytest.raises(ValueError, match="cannot import .*hf: its encoder does not fit") as caught:
        import_checkpoint(tmp_path / "hf", tmp_path / "start.pt", model=MODELS[name]())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "start.pt").exists()


def test_adapters_added_afterwards_start_equal(tmp_path: Path) -> None:
    from aemim_algorithm.adapters import adversarial_mode, apply_adapters

    model, fresh = trained(), tiny_mae(seed=1).eval()
    export_encoder(model, tmp_path / "mae.pth", format="mae", decoder=True)
    import_checkpoint(tmp_path / "mae.pth", tmp_path / "start.pt")
    load_start(fresh, tmp_path / "start.pt")
    apply_adapters(fresh)
    images = normalised_images(2)
    with torch.no_grad():
        outputs = fresh(images)
        assert torch.equal(outputs["prediction"], model(images, outputs["mask"])["prediction"])
        with adversarial_mode(fresh):
            assert torch.equal(outputs["prediction"], fresh(images, outputs["mask"])["prediction"])


def published(folder: Path, **changes: Any) -> Path:
    """A file with the original names; a change of ``None`` leaves a name out."""
    state: dict[str, Any] = export_encoder(trained(), folder / "mae.pth", format="mae", decoder=True)
    state = {name: value for name, value in (state | changes).items() if value is not None}
    torch.save({"model": state}, folder / "mae.pth")
    return folder / "mae.pth"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.bias": None}, "norm.bias: got no such parameter"),
        ({"blocks.1.attn.qkv.weight": None}, "blocks.1.attn.qkv.weight: got no such parameter"),
        ({"blocks.1.norm1.weight": None}, r"blocks.1.norm1.bias: got a parameter that a MAE"),
        ({"decoder_pred.weight": None}, "decoder_pred.weight: got no such parameter"),
        ({"head.weight": torch.zeros(5, 24)}, r"head.weight: got a parameter .*fine-tuned"),
        ({"pos_embed": torch.zeros(1, 5, 24)}, r"pos_embed: got \(1, 5, 24\), expected \(1, 17, 24\)"),
        ({"decoder_pred.bias": torch.zeros(47)}, "predicts 47 values"),
        ({"decoder_embed.bias": torch.zeros(9)}, r"embed.bias: got \(9,\), expected \(16,\)"),
    ],
)
def test_a_wrong_name_or_shape_is_one_line(changes: Any, message: str, tmp_path: Path) -> None:
    source = published(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(source, tmp_path / "out" / "start.pt", model=tiny_mae())
    assert str(caught.value).startswith(f"cannot import {source}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused_on_import_and_at_the_start(tmp_path: Path) -> None:
    source, start = published(tmp_path), tmp_path / "start.pt"
    state = import_checkpoint(source, start)
    message = r"fit MaskedViT: blocks.2.norm1.weight: got nothing, expected \(24,\)"
    for refuse in (
        lambda: import_checkpoint(source, tmp_path / "other.pt", model=tiny_mae(depth=3)),
        lambda: load_start(tiny_mae(depth=3), start),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
    with pytest.raises(
        ValueError, match="cannot start from .*mae.pth: .*'encoder.…' and 'decoder.…', as aemim"
    ):
        load_start(tiny_mae(), source)
    # The decoder does not fit, so the encoder is not loaded either.
    model = tiny_mae(decoder_depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="fit MAEDecoder: blocks.1.norm1.weight: got nothing"):
        load_start(model, start)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="fit MaskTokenViT: mask_token: got nothing"):
        load_start(small_simmim("vit", image_size=16, patch_size=4, embed_dim=24), start)
    assert set(torch.load(start, weights_only=True)) == set(state)


class Harmful:
    """A pickle that runs something when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, ("harm",)


def test_reading_runs_nothing_unless_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = published(tmp_path)
    content = torch.load(source, weights_only=True)
    torch.save(content | {"args": Harmful()}, source)
    with pytest.raises(ValueError, match=r"holds more than tensors \((posix|os).mkdir\).*--trust") as caught:
        import_checkpoint(source, "start.pt")
    assert "\n" not in str(caught.value)
    assert not Path("harm").exists()
    import_checkpoint(source, "start.pt", trust=True)
    assert Path("harm").exists()


def test_the_arguments_of_a_training_script_need_no_trust(tmp_path: Path) -> None:
    source = published(tmp_path)
    content = torch.load(source, weights_only=True)
    arguments = argparse.Namespace(model="mae_vit_base_patch16", lr=1e-4, distributed=True)
    torch.save(content | {"optimizer": {"state": {}}, "epoch": 3, "args": arguments}, source)
    assert import_checkpoint(source, tmp_path / "start.pt", model=tiny_mae())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not read as weights"),
        (b"no weights, f\xc3\xbcr alle\n" * 9, "does not read as weights"),
        (pickle.dumps([1, 2]), "cannot import"),
    ],
)
def test_what_is_no_file_of_weights_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(tmp_path / "w.pth", tmp_path / "start.pt")
    assert "\n" not in str(caught.value)


def test_sources_and_targets_that_are_none(tmp_path: Path) -> None:
    torch.save({"model": [torch.zeros(1)]}, tmp_path / "list.pth")
    for name, message in (
        ("gone.pth", "no such file; expected weights"),
        ("", "a folder without model.safetensors or pytorch_model.bin"),
        ("list.pth", "holds no state dict"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path / name, tmp_path / "start.pt")
    with pytest.raises(ValueError, match="got a folder as output"):
        import_checkpoint(published(tmp_path), tmp_path)
