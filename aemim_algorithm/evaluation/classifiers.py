"""Classifiers to evaluate: a run's own, any of timm's, or one of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from aemim_algorithm.classifier import Classifier, read_classifier
from aemim_algorithm.evaluation.imagenet_classes import imagenet_synsets
from aemim_algorithm.validation import nearest

__all__ = ["RANDOM", "load_classifier", "timm_classifier"]

RANDOM = "random"
_TIMM, _HUGGING_FACE = "timm:", "hf:"


def load_classifier(spec: str | Path, *, weights: str | Path | None = None) -> Classifier:
    """Load a classifier with the preprocessing that belongs to it.

    Args:
        spec: `classifier.pt` of `aemim finetune` or the folder it is in; `timm:NAME`, such as
            `timm:vit_base_patch16_224.augreg_in1k`; a folder that holds a Hugging Face image classifier
            (`config.json`, `model.safetensors`, `preprocessor_config.json`), or `hf:NAME` on its hub.
        weights: For timm only: a file of weights, or "random"; None: timm's own, which it downloads.

    Returns:
        The classifier, in eval mode, on the CPU.

    Raises:
        ValueError: There is no such classifier, its file is damaged or of another architecture, or its
            preprocessing is one that cannot be reproduced; one line.
    """
    name, path = str(spec), Path(spec)
    if name.startswith(_TIMM):
        return timm_classifier(name.removeprefix(_TIMM), weights=weights)
    if weights is not None:
        raise ValueError(f"weights={weights}: only a classifier timm:NAME takes them; {name} has its own")
    if name.startswith(_HUGGING_FACE) or Path(path, "config.json").is_file():
        from aemim_algorithm.evaluation.huggingface_classifier import huggingface_classifier

        return huggingface_classifier(name.removeprefix(_HUGGING_FACE))
    file = path / "classifier.pt" if path.is_dir() else path
    if file.is_file():
        return read_classifier(file)
    hint = f"; did you mean {_TIMM}{name}?" if timm.is_model(name) else ""
    raise ValueError(
        f"classifier {name!r} does not exist: expected a classifier.pt, {_TIMM}NAME, {_HUGGING_FACE}NAME or "
        f"a Hugging Face folder{hint}"
    )


def timm_classifier(name: str, *, weights: str | Path | None = None) -> Classifier:
    """Load one of timm's classifiers, preprocessed as timm validates it: at its test size and crop.

    Args:
        name: timm's name; its tag, as in `resnet50.a1_in1k`, decides the weights and the preprocessing.
        weights: A file of weights, "random", or None: timm's own, from its cache or downloaded.

    Returns:
        The classifier; with 1,000 outputs its classes are ImageNet's, else they are not known.

    Raises:
        ValueError: The name is unknown, the weights are missing or of another architecture, or the model
            takes images that are not square or not of three channels.
    """
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        close = nearest(bare, timm.list_models())
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {close!r}?" if close else ""))
    if weights not in (None, RANDOM) and not Path(str(weights)).is_file():
        raise ValueError(f"weights={weights} is no file: give a file of weights, or {RANDOM!r}")
    model = _build(name, weights).eval()
    config: dict[str, Any] = resolve_model_data_config(model, use_test_size=True)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(
            f"timm:{name} takes images of {config['input_size']}: expected three channels, square"
        )
    count = int(model.num_classes)
    return Classifier(
        model=model,
        image_size=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        classes=imagenet_synsets() if count == len(imagenet_synsets()) else None,
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        crop_mode=config["crop_mode"],
        name=f"timm:{_tagged(model, name)}" + (" with random weights" if weights == RANDOM else ""),
    )


def _build(name: str, weights: str | Path | None) -> Any:
    options: dict[str, Any] = {}
    if weights not in (None, RANDOM):
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        # A model draws its initial values from the global generator, which is to stay as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model(name, pretrained=weights != RANDOM, **options)
    except Exception as error:  # of many libraries: pickle, safetensors, the hub, torch
        what = "timm's own weights" if weights is None else str(weights)
        remedy = (
            f"give weights=FILE, or weights={RANDOM}" if weights is None else "is it of this architecture?"
        )
        raise ValueError(f"timm:{name} cannot be loaded from {what} ({_reason(error)}): {remedy}") from error


def _reason(error: Exception) -> str:
    """An error in one line; torch lists each tensor that does not fit in a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]).rstrip(".:")
    return text if len(text) <= 200 else f"{text[:200]}…"


def _tagged(model: Any, name: str) -> str:
    """The name with its tag, which timm's list of published numbers is by."""
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    return name if "." in name or not tag else f"{name}.{tag}"
