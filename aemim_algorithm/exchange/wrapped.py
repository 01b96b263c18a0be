"""A Hugging Face model that Composer trained goes back to where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aemim_algorithm.exchange.files import require_folder_name, write_folder
from aemim_algorithm.exchange.trained import clean_part

__all__ = ["export_wrapped", "wrapped_model"]


def wrapped_model(model: nn.Module | None) -> Any:
    """The Hugging Face model inside Composer's ``HuggingFaceModel``; ``None`` for another model."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "save_pretrained") else None


def export_wrapped(state: Mapping[str, Tensor], inner: Any, out: Path, *, whole: bool) -> dict[str, Tensor]:
    """Write a Hugging Face model without adversarial copies, as ``from_pretrained`` of its class reads it.

    Args:
        state: State dict of the ``HuggingFaceModel``.
        inner: The model inside it; its own values do not count.
        out: The folder.
        whole: Whether it is written with its head or decoder, or its base model alone.

    Returns:
        What was written.

    Raises:
        ValueError: If ``out`` is something else, or the state is not that of such a model.
    """
    require_folder_name(out)
    base = inner if whole else inner.base_model
    # A model without a base of its own is its own base.
    part = "model" if base is inner else f"model.{inner.base_model_prefix}"
    written = clean_part(state, part)
    if not whole and not getattr(base.config, "use_mask_token", False):
        # The classes of encoders build this one for masked pre-training only.
        written.pop("embeddings.mask_token", None)
    write_folder(lambda folder: base.save_pretrained(folder, state_dict=written), out)
    return written
