"""Keyword arguments from a recipe, checked against the signature of what they are for."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aemim_algorithm.recipes.layers import RecipeError, merge_strictly

__all__ = ["check_options"]

Builder = Callable[..., Any]


def check_options(builder: Builder, options: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """Check keyword arguments against a signature.

    Args:
        builder: What they are for.
        options: Names and values from a recipe.
        key: Where they stand in the recipe, for the message.

    Returns:
        The options, converted to the annotated types where these are plain ones.

    Raises:
        RecipeError: For an unknown, mistyped or missing argument.
    """
    parameters = _named_parameters(builder)
    hints = _hints(builder)
    fields = [(name, _plain(hints.get(name, Any)), MISSING) for name in parameters]
    schema = OmegaConf.structured(make_dataclass("Options", fields))
    merged = merge_strictly(schema, OmegaConf.create(dict(options)), origin=key)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise RecipeError(f"{key}.{name} has no value: {_describe(builder)} needs one")
    values = cast(dict[str, Any], OmegaConf.to_container(merged, throw_on_missing=False))
    return {name: values[name] for name in options}


def _named_parameters(builder: Builder) -> dict[str, inspect.Parameter]:
    """The parameters that a keyword can name.

    A class with nothing but ``(**kwargs)`` swallows every misspelling: if it is a dataclass, its
    fields are taken for its parameters, else it has none.
    """
    named = {
        name: parameter
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if not named and hasattr(builder, "__dataclass_fields__"):
        keyword = inspect.Parameter.KEYWORD_ONLY
        return {
            name: inspect.Parameter(name, keyword, default=None)
            for name in builder.__dataclass_fields__
            if not name.startswith("_")
        }
    return named


def _hints(builder: Builder) -> dict[str, Any]:
    """Annotations of a builder's parameters; none where they cannot be evaluated."""
    target = getattr(builder, "func", builder)  # a partial has no annotations of its own
    target = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):
        return {}


def _plain(hint: Any) -> Any:
    """The hint itself if omegaconf can check it, else ``Any``."""
    try:
        OmegaConf.structured(make_dataclass("Probe", [("value", hint, MISSING)]))
    except (OmegaConfBaseException, TypeError, ValueError):
        return Any
    return hint


def _describe(builder: Builder) -> str:
    target = getattr(builder, "func", builder)
    return str(getattr(target, "__name__", target))
