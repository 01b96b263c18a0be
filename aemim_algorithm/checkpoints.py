"""Checkpoints and adapters: what happens when a run loads what another run saved."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from torch import Tensor, nn

from aemim_algorithm.adapters import DualNorm, adapters_of

__all__ = ["adapt_state_dict", "argument_differences"]

# What wrappers put into module names and not into state-dict keys.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.?|_checkpoint_wrapped_module\.?|_orig_mod\.?")


def adapt_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a model with adapters loads a state dict (a pre-hook of ``load_state_dict``).

    A checkpoint that was trained without AEMIM gives its clean parameters to the copies, with a
    warning; one with other adapters is refused.

    Raises:
        ValueError: If the state has adversarial copies of other parameters than the model.
    """
    # Of what the state holds: it may be that of a part, such as an encoder.
    copies = {key: twin for key, twin in _copies(module).items() if prefix + twin in state}
    saved = {key.removeprefix(prefix) for key in state if key.startswith(prefix) and _is_copy(key)}
    if copies and not saved:
        warnings.warn(
            "AEMIM: the checkpoint was trained without it, so the adversarial copies start from its "
            "clean parameters",
            stacklevel=2,
        )
        state.update({prefix + key: _clone(state[prefix + twin]) for key, twin in copies.items()})
    elif saved != copies.keys():
        raise ValueError(
            f"the checkpoint has adversarial copies of {_kinds(saved)}, the model of "
            f"{_kinds(set(copies))}: pass AEMIM(adapter=...) as in the run that saved it"
        )


def argument_differences(
    saved: str, current: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[str]:
    """How the arguments of a saved algorithm differ from those of now.

    Args:
        saved: ``repr`` of the saved algorithm.
        current: Arguments of the present one.
        defaults: What an argument was that an earlier version did not have.

    Returns:
        One ``name=saved, now value`` for each difference; nothing if ``saved`` cannot be read.
    """
    try:
        call = ast.parse(saved, mode="eval").body
        keywords = call.keywords if isinstance(call, ast.Call) else []
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError):
        return []
    values = {**(defaults or {}), **values}
    return [
        f"{name}={values[name]!r}, now {value!r}"
        for name, value in current.items()
        if name in values and values[name] != value
    ]


def _copies(model: nn.Module) -> dict[str, str]:
    """State-dict key of each adversarial copy, with the key of its twin."""
    names = {module: _WRAPPERS.sub("", name) for name, module in model.named_modules()}
    copies: dict[str, str] = {}
    for adapter in adapters_of(model):
        prefix = names[adapter] + "." if names[adapter] else ""
        if isinstance(adapter, DualNorm):
            copies |= {f"{prefix}adversarial.{key}": prefix + key for key in adapter.adversarial.state_dict()}
        else:
            copies[f"{prefix}adversarial_cls_token"] = f"{prefix}cls_token"
    return copies


def _is_copy(key: str) -> bool:
    return ".adversarial." in f".{key}" or key.endswith("adversarial_cls_token")


def _kinds(keys: set[str]) -> str:
    tokens = sum(key.endswith("adversarial_cls_token") for key in keys)
    return f"{len(keys) - tokens} parameters and buffers of norms and {tokens} class tokens"


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
