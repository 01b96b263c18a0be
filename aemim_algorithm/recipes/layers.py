"""The layers of a recipe: YAML files over their ``bases``, ``key=value`` overrides, a strict merge.

Knows nothing of what a recipe means: any omegaconf structured config can be the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from aemim_algorithm.validation import nearest

__all__ = [
    "RecipeError",
    "file_layers",
    "first_line",
    "known_names",
    "load_onto",
    "merge_strictly",
    "override_layers",
    "recipe_values",
]


T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot run; its message is one line."""


def load_onto(
    schema: type[T],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    check: Callable[[T], None] | None = None,
) -> T:
    """Read a recipe onto a schema: its bases in order, then the file itself, then the overrides.

    Args:
        schema: Dataclass of the recipe's keys. A key ``run_name`` without a value gets the file's name.
        path: YAML file. Its key ``bases`` lists further files, relative to itself. ``None``: there is none.
        overrides: ``key=value`` each, where a dotted key reaches into a section.
        check: Called with the recipe; raises `RecipeError` for values that cannot work.

    Returns:
        The recipe with every value resolved.

    Raises:
        RecipeError: For a missing file, a cycle of bases, an unknown key, a wrong type, a missing
            or impossible value; one line.
    """
    merged = OmegaConf.structured(schema)
    files = file_layers(Path(path)) if path is not None else ()
    for origin, layer in [*files, *override_layers(overrides)]:
        merged = merge_strictly(merged, layer, origin=origin)
    if path is not None and OmegaConf.is_missing(merged, "run_name"):
        merged.run_name = Path(path).stem
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise RecipeError(f"{missing[0]} has no value: set it in the file or as {missing[0]}=…")
        recipe = cast(T, OmegaConf.to_object(merged))
        if check is not None:
            check(recipe)
    except (RecipeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path or 'command line'}: {first_line(error)}") from error
    return recipe


def merge_strictly(schema: DictConfig, layer: DictConfig, *, origin: str) -> DictConfig:
    """Merge values onto a typed config.

    Args:
        schema: Structured config.
        layer: The values to set.
        origin: Where they come from, for the message.

    Returns:
        A new config.

    Raises:
        RecipeError: For an unknown key, naming the nearest known one, or a value of a wrong type.
    """
    try:
        return cast(DictConfig, OmegaConf.merge(schema, layer))
    except ConfigKeyError as error:
        message = _unknown_key(schema, str(error.full_key))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or _offending_key(schema, layer)
        message = f"{key}: {first_line(error)}"
    raise RecipeError(f"{origin}: {message}")


def known_names(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known) or 'none'}"


def _unknown_key(schema: DictConfig, full_key: str) -> str:
    parent, _, name = full_key.rpartition(".")
    section = OmegaConf.select(schema, parent) if parent else schema
    return f"unknown key {full_key!r}; {known_names(name, map(str, section))}"


def _offending_key(schema: DictConfig, layer: DictConfig) -> str:
    """The first top-level key or entry of a section that fails on its own."""
    for key, value in _entries(layer):
        try:
            OmegaConf.merge(schema, _nested(key, value))
        except (OmegaConfBaseException, ValueError, TypeError):
            return key
    return "recipe"


def _entries(layer: DictConfig) -> Iterator[tuple[str, Any]]:
    for key, value in cast(dict[str, Any], OmegaConf.to_container(layer)).items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield str(key), value


def _nested(key: str, value: Any) -> DictConfig:
    section, _, name = key.partition(".")
    return OmegaConf.create({section: {name: value} if name else value})


def file_layers(path: Path, chain: tuple[Path, ...] = ()) -> Iterator[tuple[str, DictConfig]]:
    """The layers of a file, its bases first, each with its origin for messages.

    Args:
        path: YAML file; its key ``bases`` lists further files, relative to itself.
        chain: The files that asked for this one.

    Yields:
        Origin and layer, in the order in which they are to be merged.

    Raises:
        RecipeError: For a missing or unreadable file, or a cycle of bases.
    """
    named_by = f" (a base of {chain[-1]})" if chain else ""
    if path.resolve() in [file.resolve() for file in chain]:
        raise RecipeError(f"{path}: bases form a cycle: {' -> '.join(map(str, [*chain, path]))}")
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file{named_by}")
    layer = _read(path)
    bases = layer.pop("bases", None) or []
    if isinstance(bases, str):
        raise RecipeError(f"{path}: bases: expected a list of files, got {bases!r}")
    for base in bases:
        yield from file_layers(path.parent / str(base), (*chain, path))
    yield str(path), layer


def recipe_values(path: Path) -> dict[str, Any]:
    """What a recipe's file and its bases say, whatever kind of recipe it is; defaults are not in it.

    Args:
        path: YAML file.

    Returns:
        Its sections and values.

    Raises:
        RecipeError: As :func:`file_layers`.
    """
    merged = OmegaConf.merge(*(layer for _, layer in file_layers(path)))
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def _read(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(layer, DictConfig):
        raise RecipeError(f"{path}: expected `key: value` lines, got a list")
    return layer


def override_layers(overrides: Sequence[str]) -> Iterator[tuple[str, DictConfig]]:
    """The layers of ``key=value`` overrides, each with its origin for messages."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not (key and equals):
            raise RecipeError(f"override {override!r}: expected key=value")
        try:
            yield f"override {override!r}", OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise RecipeError(f"override {override!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without its further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]
