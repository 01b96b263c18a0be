"""Export to Hugging Face: strict loading, equal features, equal losses on the same mask."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import normalised_images, tiny_mae
from test_export import plain, small_simmim, trained_looking
from torch import nn

from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.exchange.files import write_folder
from aemim_algorithm.export import export_encoder

transformers = pytest.importorskip("transformers")


DECODER = {
    f"decoder_{key}": value
    for key, value in {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }.items()
}


def loaded(kind: str, folder: Path, **options: Any) -> Any:
    """What ``from_pretrained`` makes of a folder; nothing may be missing, left over or of another shape."""
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_a_mae_has_the_same_loss_there(norm_pixel_target: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"decoder_depth": 2, "decoder_heads": 4, "mask_ratio": 0.6}
    model = trained_looking(tiny_mae(norm_pixel_target=norm_pixel_target, **sizes)).eval()
    export_encoder(model, tmp_path / "mae", format="huggingface", decoder=True)
    theirs = loaded("ViTMAEForPreTraining", tmp_path / "mae")
    images = normalised_images(4)
    with torch.no_grad():
        outputs = model(images)
        # They keep the patches of the smallest noise.
        found = theirs(pixel_values=images, noise=outputs["mask"].float())
        with adversarial_mode(model):
            adversarial = model.loss(model(images, outputs["mask"]), images)
    assert torch.equal(found.mask.bool(), outputs["mask"])
    expected = model.loss(outputs, images)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert abs(adversarial - expected) > 1e-3
    # Their pixels of a patch are in the order (y, x, channel).
    pixels = outputs["prediction"].unflatten(-1, (3, 4, 4)).permute(0, 1, 3, 4, 2).flatten(2)
    hidden = found.logits[outputs["mask"]].view_as(pixels)
    torch.testing.assert_close(hidden, pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["norm", "cls_token"])
def test_the_encoder_of_a_mae_is_a_vit(adapter: str, tmp_path: Path) -> None:
    model = trained_looking(tiny_mae(image_size=(16, 24)), adapter).eval()
    export_encoder(model, tmp_path / "vit", format="huggingface")
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        found = loaded("ViTModel", tmp_path / "vit", add_pooling_layer=False)(images).last_hidden_state
        expected = model.encoder(images)
        with adversarial_mode(model):
            assert (model.encoder(images) - expected).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert (config["image_size"], config["layer_norm_eps"]) == ([16, 24], 1e-6)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_the_encoder_of_a_simmim_is_a_vit(layer_scale: float | None, tmp_path: Path) -> None:
    """Its factors of residual branches, which a ViT there has not, go into the layers before them."""
    model = small_simmim("vit")
    model.encoder = type(model.encoder)(
        image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, layer_scale=layer_scale
    )
    trained_looking(model).eval()
    export_encoder(model, tmp_path / "vit", format="huggingface")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = loaded("ViTModel", tmp_path / "vit", add_pooling_layer=False)(images).last_hidden_state
        torch.testing.assert_close(found, model.encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image_size", [32, 64, (64, 96)])
def test_the_encoder_of_a_simmim_is_a_swin(image_size: Any, tmp_path: Path) -> None:
    model = trained_looking(small_simmim("swin", image_size=image_size)).eval()
    export_encoder(model, tmp_path / "swin", format="huggingface")
    height, width = model.encoder.patch_embed.img_size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        found = loaded("SwinModel", tmp_path / "swin", add_pooling_layer=False)(images).last_hidden_state
        torch.testing.assert_close(found, model.encoder(images), rtol=1e-4, atol=1e-5)


def test_another_size_stands_in_the_config(tmp_path: Path) -> None:
    model = trained_looking(tiny_mae()).eval()
    export_encoder(model, tmp_path / "mae", format="huggingface", decoder=True, image_size=24)
    images = torch.randn(2, 3, 24, 24)
    assert loaded("ViTMAEForPreTraining", tmp_path / "mae")(images).loss.isfinite()
    swin = trained_looking(small_simmim("swin")).eval()
    export_encoder(swin, tmp_path / "swin", format="huggingface", image_size=(64, 32), window_size=2)
    loaded("SwinModel", tmp_path / "swin", add_pooling_layer=False)(torch.randn(1, 3, 64, 32))


def swin(**options: Any) -> nn.Module:
    """A model whose encoder is timm's own Swin: ours refuse windows that do not divide their patches."""
    return nn.ModuleDict({"encoder": plain("swin", **options)})


@pytest.mark.parametrize(
    ("model", "decoder", "message"),
    [
        (tiny_mae(image_size=(16, 24)), True, "MAE of 4x6 patches; .* square images only: leave out --decoder"),
        (small_simmim("swin"), True, "the decoder lacks mask_token, pos_embed, .* expected that of a MAE"),
        (small_simmim("swin", window_size=8), False, r"stage of 4x4 patches and windows of 8; SwinModel pads"),
        (swin(img_size=56), False, "stage of 14x14 patches and windows of 4; .* or to timm"),
        (swin(img_size=64, window_size=3), False, "stage of 16x16 patches and windows of 3"),
        (swin(window_size=(4, 2)), False, "window of 4x2 .* SwinModel has one square"),
        (small_simmim("swin", image_size=(32, 64)), False, r"shift \(0, 2\)"),
        (nn.ModuleDict({"encoder": nn.Linear(2, 2)}), False, "got Linear as the encoder of ModuleDict"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_there_is_refused(
    model: nn.Module, decoder: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export_encoder(model, tmp_path / "out", format="huggingface", decoder=decoder)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_window_that_does_not_fit_another_size_is_refused(tmp_path: Path) -> None:
    model, options = small_simmim("swin"), {"format": "huggingface", "image_size": 48}
    with pytest.raises(ValueError, match="stage of 6x6 patches and windows of 4; .* --window-size"):
        export_encoder(model, tmp_path / "out", **options)
    export_encoder(model, tmp_path / "out", window_size=3, **options)


def test_the_decoder_of_another_model_is_refused(tmp_path: Path) -> None:
    mae, named = tiny_mae(), small_simmim("vit", image_size=16, patch_size=4)
    with pytest.raises(ValueError, match="got SimMIM, whose decoder has no blocks; expected a MAE") as caught:
        export_encoder(mae.state_dict(), tmp_path / "out", format="huggingface", decoder=True, model=named)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the package transformers, .* pip install"):
        export_encoder(tiny_mae(), tmp_path / "out", format="huggingface")
    assert not list(tmp_path.iterdir())


def test_training_does_not_notice_an_export(tmp_path: Path) -> None:
    model = tiny_mae()
    before = torch.get_rng_state()
    export_encoder(model, tmp_path / "out", format="huggingface", decoder=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "vit"
    export_encoder(tiny_mae(), out, format="huggingface")
    before = (out / "model.safetensors").read_bytes()

    def fails_halfway(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(fails_halfway, out)
    assert (out / "model.safetensors").read_bytes() == before
    export_encoder(trained_looking(tiny_mae()), out, format="huggingface")
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in out.parent.iterdir()] == ["vit"]


def test_a_folder_or_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("x")
    for name, message in (
        ("photos", "a folder with other things"),
        ("photos/one.png", "got a file as output"),
    ):
        with pytest.raises(ValueError, match=message):
            export_encoder(tiny_mae(), tmp_path / name, format="huggingface")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.png"]


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        ("ViTMAEForPreTraining", "ViTMAEModel", {"norm_pix_loss": True} | DECODER),
        ("ViTForMaskedImageModeling", "ViTModel", {}),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_of_theirs_becomes_what_it_was(
    kind: str, base: str, options: dict[str, Any], whole: bool, tmp_path: Path
) -> None:
    from composer.models import HuggingFaceModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    pixels = {"image_size": 16, "patch_size": 4, "encoder_stride": 4} | options
    config_class = getattr(transformers, kind).config_class
    theirs = getattr(transformers, kind)(config_class(**sizes, **pixels))
    model = trained_looking(HuggingFaceModel(theirs, use_logits=False)).eval()
    export_encoder(model, tmp_path / "out", format="huggingface", decoder=whole)
    pooling = {"add_pooling_layer": False} if base == "ViTModel" and not whole else {}
    again = loaded(kind if whole else base, tmp_path / "out", **pooling)
    stock = {k: v for k, v in model.state_dict().items() if "adversarial" not in k}
    prefix = "model." if whole else "model.vit."
    for name, value in again.state_dict().items():
        assert torch.equal(value, stock[prefix + name]), name
    assert not any("adversarial" in name for name in again.state_dict())
