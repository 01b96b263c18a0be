"""Writes the README's tables of what AEMIM is tested with: ``python tests/works_with.py``.

Each cell of the models' table is measured on the model itself; the other one is the list that the tests of
combinations run over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from combinations import ELSEWHERE, IN_ANY_ORDER
from settings import SETTINGS, Setting, without_randomness
from torch import Tensor, nn

from aemim_algorithm import AEMIM
from aemim_algorithm.search import find_encoder, resolve_encoder

__all__ = ["COMMAND", "README", "TABLES", "between_markers", "measured_row", "updated"]

README = Path(__file__).parents[1] / "README.md"
COMMAND = "python tests/works_with.py"
_HEADER = (
    "| model | encoder | the image enters as | class token | α < 1 costs one more forward |\n"
    "|---|---|---|---|---|\n"
)
# Clean, one attack step, adversarial: what a step with T=1 needs without a reference of its own.
_PASSES = 3


def table_of_models() -> str:
    """The models, in Markdown."""
    return _HEADER + "".join(measured_row(setting) for setting in SETTINGS)


def table_of_combinations() -> str:
    """What AEMIM is combined with, in Markdown."""
    equal = "before or after it; equal numbers"
    rows = [(each.name, "; ".join(filter(None, [equal, each.verdict]))) for each in IN_ANY_ORDER]
    rows += [(each.name, each.verdict) for each in ELSEWHERE]
    return "| with | verdict |\n|---|---|\n" + "".join(f"| {name} | {verdict} |\n" for name, verdict in rows)


def measured_row(setting: Setting) -> str:
    """One model's row."""
    model = without_randomness(setting.build())
    path = setting.arguments.get("encoder") or find_encoder(model)
    found = f"`{path}`" + (", passed as `encoder=`" if "encoder" in setting.arguments else "")
    calls, argument = _watched(model, path)
    aemim = AEMIM(adversarial_ratio=0.25, steps=1, **setting.arguments)
    aemim.attach(model)
    aemim.training_loss(model, setting.batch(0), step=0)
    extra = {_PASSES: "no", _PASSES + 1: "yes"}[len(calls)]
    has_token = any(name.split(".")[-1] == "cls_token" for name, _ in model.named_parameters())
    cells = (setting.name, found, f"`{argument()}`", "yes" if has_token else "no", extra)
    return f"| {' | '.join(cells)} |\n"


def _watched(model: nn.Module, path: str) -> tuple[list[Any], Callable[[], str]]:
    """Record the encoder's calls; the function names the argument of the first that is the image."""
    owner, name, encoder = resolve_encoder(model, path)
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder)

    def record(*args: Any, **kwargs: Any) -> None:
        calls.append(dict(signature.bind(*args, **kwargs).arguments))

    def recorded(*args: Any, **kwargs: Any) -> Any:
        record(*args, **kwargs)
        return encoder(*args, **kwargs)

    if isinstance(encoder, nn.Module):
        encoder.register_forward_pre_hook(lambda _, args, kwargs: record(*args, **kwargs), with_kwargs=True)
    else:
        setattr(owner, name, recorded)
    return calls, lambda: next(k for k, v in calls[0].items() if isinstance(v, Tensor) and v.ndim >= 4)


TABLES: dict[str, Callable[[], str]] = {
    "works-with": table_of_models,
    "composes-with": table_of_combinations,
}
"""The tables by the name of their markers."""


def between_markers(text: str, name: str) -> str:
    """What stands between two markers of the README."""
    begin, end = _markers(name)
    return text.split(begin)[1].split(end)[0]


def updated(text: str, name: str, content: str) -> str:
    """The README with other content between two markers."""
    begin, end = _markers(name)
    before, rest = text.split(begin)
    return before + begin + content + end + rest.split(end)[1]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"


if __name__ == "__main__":
    written = README.read_text(encoding="utf-8")
    for marker, table in TABLES.items():
        written = updated(written, marker, table())
    README.write_text(written, encoding="utf-8")
    print(f"wrote {len(TABLES)} tables into {README.name}")
