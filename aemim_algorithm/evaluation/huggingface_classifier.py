"""Image classifiers in Hugging Face's format, with the resize and crop that their processor does."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Resampling
from torch import Tensor, nn

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.imagenet_classes import imagenet_lemmas, imagenet_synsets

__all__ = ["PROCESSORS", "Preprocessing", "huggingface_classifier", "preprocessing_of"]

PROCESSORS = (
    "BeitImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
    "ConvNextImageProcessor",
    "DeiTImageProcessor",
    "MobileNetV1ImageProcessor",
    "MobileNetV2ImageProcessor",
    "PvtImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)
"""Classes that do nothing else than resize, crop and normalise; each is compared with by a test.

Others differ without a sign of it in their settings: LeViT resizes to 256/224 of the size, PoolFormer and
EfficientNet divide by their own crop, MobileViT swaps the channels.
"""

_KNOWN_RESCALE = 1 / 255


class _Logits(nn.Module):
    """Maps images to logits, as a plain model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@dataclass(frozen=True)
class Preprocessing:
    """What a processor does, in `EvaluationView`'s terms."""

    image_size: int
    crop_fraction: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def huggingface_classifier(folder: str) -> Classifier:
    """Load an image classifier.

    Args:
        folder: A folder that `save_pretrained` wrote, or a name on the hub, which is downloaded.

    Returns:
        The classifier. Its classes are its config's labels; ImageNet's synsets where those are ImageNet's
        names in ImageNet's order.

    Raises:
        ValueError: transformers is missing; there is no such classifier; weights are missing; or its
            preprocessing is not a resize, a centre crop and a normalization.
    """
    try:
        from transformers import AutoModelForImageClassification
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise ValueError("a Hugging Face classifier needs `pip install transformers`") from error
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of many libraries: the hub, safetensors, torch
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{folder} is no Hugging Face image classifier ({reason})") from error
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} weights are missing or of another shape, first {absent[0]}: it is no "
            "trained classifier of this architecture"
        )
    steps = preprocessing_of(config, where=folder)
    labels = {int(number): str(label) for number, label in model.config.id2label.items()}
    return Classifier(
        model=_Logits(model).eval(),
        image_size=steps.image_size,
        mean=steps.mean,
        std=steps.std,
        classes=_classes(labels, where=folder),
        crop_fraction=steps.crop_fraction,
        interpolation=steps.interpolation,
        crop_mode=steps.crop_mode,
        name=f"hf:{folder}",
    )


def preprocessing_of(config: Mapping[str, Any], *, where: str) -> Preprocessing:
    """Read a `preprocessor_config.json`.

    Args:
        config: Its content; what is missing is the default of its processor's class.
        where: What a message calls it.

    Returns:
        The steps.

    Raises:
        ValueError: Its processor is another than those of `PROCESSORS`, or it asks for something that is not
            a resize, a centre crop and a normalization.
    """
    config = _complete(config, where)
    if config.get("do_rescale", True) and (
        abs(config.get("rescale_factor", _KNOWN_RESCALE) - _KNOWN_RESCALE) > 1e-9
        or config.get("rescale_offset", False)
    ):
        raise ValueError(f"{where}: it does not rescale pixels to [0, 1], which is all that is supported")
    if not config.get("do_resize", True):
        raise ValueError(f"{where}: it does not resize images, so they would be of different sizes")
    image_size, fraction, mode = _geometry(config, where)
    normalizes = config.get("do_normalize", True)
    mean, std = (
        _per_channel(config[key]) if normalizes else default
        for key, default in (("image_mean", (0.0,) * 3), ("image_std", (1.0,) * 3))
    )
    return Preprocessing(
        image_size=image_size,
        crop_fraction=fraction,
        crop_mode=mode,
        interpolation=Resampling(config["resample"]).name.lower(),
        mean=mean,
        std=std,
    )


def _per_channel(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _geometry(config: Mapping[str, Any], where: str) -> tuple[int, float, str]:
    """Size of the result, its share of the resized image, and which sides are resized."""
    size = config["size"]
    if "shortest_edge" in size:
        edge, mode = int(size["shortest_edge"]), "center-floor"
    elif size.get("height") == size.get("width") and "height" in size:
        edge, mode = int(size["height"]), "squash-floor"
    else:
        raise ValueError(f"{where}: size={dict(size)}: expected one shortest_edge, or a square")
    crop = config.get("crop_pct")
    if (
        crop and mode == "center-floor"
    ):  # as of ConvNeXt: the size is that of the crop; from 384 on it is squashed
        return (edge, 1.0, "squash-floor") if edge >= 384 else (edge, float(crop), mode)
    if not config.get("do_center_crop", False):
        if mode == "center-floor":
            raise ValueError(
                f"{where}: it resizes the short side and does not crop, so images are not square"
            )
        return edge, 1.0, mode
    side, width = (int(config["crop_size"][key]) for key in ("height", "width"))
    if side != width or side > edge:
        raise ValueError(
            f"{where}: it crops {side if side == width else f'{side} x {width}'} pixels of {edge}: expected "
            "a square within the image"
        )
    return side, _fraction(side, edge), mode


def _fraction(side: int, edge: int) -> float:
    """A share from which floor(side / share) is the edge: 299 / (299 / 400) is just below 400."""
    fraction = side / edge
    while math.floor(side / fraction) < edge:
        fraction = math.nextafter(fraction, 0)
    return fraction


def _complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings with the defaults of the processor's class, as its own file may leave them out."""
    import transformers

    # Older files name the same class "...FeatureExtractor", newer ones its variant on tensors.
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    name = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise ValueError(
            f"{where}: its processor {kind} is not among those whose preprocessing is reproduced: "
            f"{', '.join(PROCESSORS)}"
        )
    make = getattr(transformers, name)
    known = inspect.signature(make.__init__).parameters  # other keys are kept by the class, and not used
    processor = make(**{key: value for key, value in config.items() if key in known})
    return {key: value for key, value in processor.to_dict().items() if value is not None}


def _classes(labels: Mapping[int, str], *, where: str) -> tuple[str, ...]:
    """Class names by position; ImageNet's as synsets."""
    names = tuple(labels[position] for position in sorted(labels))
    synsets = imagenet_synsets()
    if len(names) != len(synsets) or set(names) == set(synsets):
        return names
    unnamed = all(name == f"LABEL_{position}" for position, name in enumerate(names))
    first = [lemma.split(",")[0].strip().lower() for lemma in imagenet_lemmas()]
    same = sum(a == b.split(",")[0].strip().lower() for a, b in zip(first, names, strict=True))
    # A few names differ between lists (crane, maillot); another order would leave hardly any in place.
    if unnamed or same >= 0.9 * len(names):
        return synsets
    raise ValueError(
        f"{where}: of its 1,000 class names only {same} are ImageNet's in ImageNet's order: it is another "
        "data set's classifier, or in another order"
    )
