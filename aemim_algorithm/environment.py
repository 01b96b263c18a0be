"""What a result has to carry: hardware, versions, command, date; and files that are whole or not there."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["environment", "write_json", "write_text"]

_PACKAGES = (
    "aemim-algorithm",
    "mosaicml",
    "mosaicml-streaming",
    "numpy",
    "pillow",
    "pycocotools",
    "scikit-image",
    "scipy",
    "timm",
    "torch",
    "torchmetrics",
    "torchvision",
    "transformers",
)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Where, when and how a result came about.

    Args:
        command: The command line, word by word.

    Returns:
        ``command``, ``date`` (UTC), ``hardware`` and ``versions``. The load average is that of the
        start: above 0 on a machine that is not doing anything else, the times are not to be trusted.
    """
    return {
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def write_json(result: Mapping[str, Any], out: Path) -> None:
    """Write a result; the file appears whole or not at all.

    Raises:
        ValueError: A number in it is NaN or infinite, which JSON cannot hold.
    """
    write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", out)


def write_text(text: str, out: Path) -> None:
    """Write a file; it appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
