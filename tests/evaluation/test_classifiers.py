"""Loading classifiers of every kind, with the preprocessing that is theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from aemim_algorithm.classifier import save_classifier
from aemim_algorithm.evaluation.classifiers import load_classifier
from aemim_algorithm.evaluation.huggingface_classifier import preprocessing_of
from aemim_algorithm.evaluation.imagenet_classes import imagenet_lemmas, imagenet_synsets
from aemim_algorithm.evaluation.view import EvaluationView

TIMM = "timm:test_vit"


def test_a_timm_classifier_has_timms_preprocessing_and_classes() -> None:
    classifier = load_classifier(TIMM, weights="random")
    config = timm.data.resolve_data_config(model=timm.create_model("test_vit"), use_test_size=True)
    assert (3, classifier.image_size, classifier.image_size) == config["input_size"]
    for name, key in (
        ("crop_fraction", "crop_pct"),
        *((same, same) for same in ("interpolation", "crop_mode", "mean", "std")),
    ):
        assert getattr(classifier, name) == config[key], name
    assert classifier.classes == imagenet_synsets()
    assert not classifier.model.training
    assert classifier.name == "timm:test_vit.r160_in1k with random weights"


def test_timm_classifiers_are_seen_at_their_test_size() -> None:
    """Its size is 224 pixels and its crop 0.875, in training."""
    classifier = load_classifier("timm:convnext_atto.d2_in1k", weights="random")
    assert (classifier.image_size, classifier.crop_fraction) == (288, 0.95)


def test_a_crop_that_is_larger_than_the_image_is_padded_as_in_timm() -> None:
    pixels = torch.randint(0, 256, (3, 60, 50), dtype=torch.uint8)
    view = EvaluationView(46, crop_fraction=1.15)
    transform = timm.data.create_transform(
        (3, 46, 46), crop_pct=1.15, interpolation="bicubic", normalize=False
    )
    assert torch.equal(view(pixels), transform(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
    assert int(view(pixels)[:, :, :3].max()) == 0  # 40 pixels in the middle of 46


def test_weights_from_a_file_are_the_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    before = torch.get_rng_state()
    classifier = load_classifier(TIMM, weights=tmp_path / "weights.pt")
    assert torch.equal(before, torch.get_rng_state())
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(classifier.model(images), model(images))


def test_random_weights_are_the_same_each_time() -> None:
    one, two = (load_classifier(TIMM, weights="random").model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_weights_of_another_architecture_are_one_line(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match="timm:test_vit cannot be loaded from .* is it of this architecture"
    ) as error:
        load_classifier(TIMM, weights=tmp_path / "weights.pt")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("spec", "weights", "says"),
    [
        ("timm:resnet05", "random", "timm has no model 'resnet05'; did you mean"),
        ("timm:test_vit", "none.pt", "weights=none.pt is no file"),
        ("test_vit", None, "'test_vit' does not exist: .*; did you mean timm:test_vit?"),
        ("nowhere/classifier.pt", None, "'nowhere/classifier.pt' does not exist: expected a classifier.pt"),
        ("nowhere", "random", "only a classifier timm:NAME takes them"),
    ],
)
def test_what_is_no_classifier_is_one_line(spec: str, weights: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_classifier(spec, weights=weights)


def test_our_own_file_or_its_folder(tmp_path: Path) -> None:
    kwargs = {"num_classes": 3, "img_size": 32}
    model = timm.create_model("test_vit", **kwargs)
    save_classifier(
        tmp_path / "classifier.pt",
        state=model.state_dict(),
        architecture={"name": "test_vit", "kwargs": kwargs},
        image_size=32,
        mean=(0.4,) * 3,
        std=(0.2,) * 3,
        classes=("a", "b", "c"),
        crop_fraction=1.0,
    )
    for spec in (tmp_path, tmp_path / "classifier.pt"):
        classifier = load_classifier(spec)
        assert classifier.classes == ("a", "b", "c")
        assert classifier.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A tiny ViT classifier of three classes with its processor."""
    transformers = pytest.importorskip("transformers")
    _save_vit(transformers, tmp_path, {0: "cat", 1: "dog", 2: "bird"})
    return tmp_path


def _save_vit(transformers: Any, folder: Path, labels: dict[int, str]) -> None:
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=32,
        patch_size=16,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_a_hugging_face_folder(hugging_face: Path) -> None:
    transformers = pytest.importorskip("transformers")
    classifier = load_classifier(hugging_face)
    assert classifier.classes == ("cat", "dog", "bird")
    assert (classifier.image_size, classifier.crop_mode, classifier.interpolation) == (
        32,
        "squash-floor",
        "bilinear",
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = transformers.ViTForImageClassification.from_pretrained(hugging_face).eval()
    with torch.no_grad():
        assert torch.equal(classifier.model(images), model(images).logits)


_SMALL = {"height": 24, "width": 24}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {"size": _SMALL}),
        ("DeiTImageProcessor", {"size": {"height": 31, "width": 31}, "crop_size": _SMALL}),
        ("BeitImageProcessor", {"size": {"height": 31, "width": 31}, "crop_size": _SMALL}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 28}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 27}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 35}, "crop_size": 28}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 491}, "crop_size": 448}),
        ("BitImageProcessor", {"size": {"shortest_edge": 400}, "crop_size": 299}),
        ("MobileNetV1ImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": _SMALL}),
        ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 450}, "crop_size": 384}),
        ("PvtImageProcessor", {"size": _SMALL}),
        ("SiglipImageProcessor", {"size": _SMALL}),
    ],
)
def test_pixels_are_those_of_the_hugging_face_processor(kind: str, options: dict[str, Any]) -> None:
    """Its file lists only what was chosen: what is missing is the default of that processor's class."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, kind)(**options)
    steps = preprocessing_of(options | {"image_processor_type": kind}, where=kind)
    assert preprocessing_of(json.loads(processor.to_json_string()), where=kind) == steps
    view = EvaluationView(
        steps.image_size,
        crop_fraction=steps.crop_fraction,
        interpolation=steps.interpolation,
        crop_mode=steps.crop_mode,
    )
    for height, width in ((41, 57), (58, 41), (33, 90)):  # even and odd lengths to cut off
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        image = view(torch.from_numpy(pixels).permute(2, 0, 1))
        mean, std = (torch.tensor(values)[:, None, None] for values in (steps.mean, steps.std))
        torch.testing.assert_close((image / 255 - mean) / std, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        "LevitImageProcessor",
        "PoolFormerImageProcessor",
        "EfficientNetImageProcessor",
        "MobileViTImageProcessor",
        None,
    ],
)
def test_processors_that_are_not_known_are_refused(kind: str | None) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=f"{kind}.* is not among those .* ViTImageProcessor"):
        preprocessing_of({"size": _SMALL, "image_processor_type": kind}, where="folder")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rescale_factor": 1 / 127.5}, "does not rescale pixels to"),
        ({"do_resize": False}, "does not resize"),
        ({"size": {"height": 24, "width": 32}}, "expected one shortest_edge, or a square"),
        ({"size": {"shortest_edge": 24}, "do_center_crop": False}, "images are not square"),
        ({"size": {"shortest_edge": 24}, "crop_size": 28}, "crops 28 pixels of 24"),
    ],
)
def test_other_preprocessing_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        preprocessing_of(
            {"size": _SMALL, "image_processor_type": "CLIPImageProcessor"} | change, where="folder"
        )


def test_a_hugging_face_encoder_without_head_is_refused(tmp_path: Path) -> None:
    """`from_pretrained` would make up a head, and its accuracy would look like one."""
    transformers = pytest.importorskip("transformers")
    _save_vit(transformers, tmp_path, {0: "cat", 1: "dog"})
    transformers.ViTForImageClassification.from_pretrained(tmp_path).vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 weights are missing or of another shape, first classifier.bias"):
        load_classifier(tmp_path)


def test_imagenets_names_become_synsets_only_in_its_order(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lemmas = list(imagenet_lemmas())
    _save_vit(transformers, tmp_path / "right", dict(enumerate(lemmas)))
    assert load_classifier(tmp_path / "right").classes == imagenet_synsets()
    _save_vit(transformers, tmp_path / "wrong", dict(enumerate(lemmas[1:] + lemmas[:1])))
    with pytest.raises(
        ValueError, match="of its 1,000 class names only .* are ImageNet's in ImageNet's order"
    ):
        load_classifier(tmp_path / "wrong")
