"""A discrete image tokenizer: the encoder of DALL-E's dVAE (Ramesh et al. 2021, arXiv 2102.12092).

It turns each square of ``stride`` pixels into one code of a vocabulary, which BEiT predicts. Its published
weights are re-distributed in the layout of transformers' ``FlavaImageCodebook``; the parameters here have the
same names, so that such a folder or state dict loads as it is. :class:`~aemim_algorithm.models.DiscreteVAE`
trains one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["ResidualBlock", "VisualTokenizer", "save_tokenizer"]

# DALL-E keeps pixels away from 0 and 1, where the likelihood that it trains with is infinite.
_MARGIN = 0.1
_EXPECTED = (
    "expected a file of save_tokenizer, or the weights of a transformers FlavaImageCodebook "
    "(its folder, or its state dict as .safetensors or .pt)"
)


class VisualTokenizer(nn.Module):
    """Pixels to codes.

    Args:
        hidden_size: Width of the first group, a multiple of 4; each further group has twice the width.
        vocab_size: Number of codes.
        num_groups: Groups of residual blocks; between two of them the resolution is halved.
        blocks_per_group: Residual blocks in each group.

    Raises:
        ValueError: If a size cannot be built.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 256,
        vocab_size: int = 8192,
        num_groups: int = 4,
        blocks_per_group: int = 2,
    ) -> None:
        super().__init__()
        if hidden_size < 4 or hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size}: expected a positive multiple of 4")
        if min(vocab_size, num_groups, blocks_per_group) < 1:
            raise ValueError(
                f"got {vocab_size=}, {num_groups=}, {blocks_per_group=}: expected at least 1 each"
            )
        self.vocab_size = vocab_size
        self.stride = 2 ** (num_groups - 1)
        self.config = {
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "num_groups": num_groups,
            "blocks_per_group": blocks_per_group,
        }
        gain = 1 / (num_groups * blocks_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(3, hidden_size, 7, padding=3))
        width = hidden_size
        for number in range(num_groups):
            group = _group(width, hidden_size * 2**number, blocks_per_group, gain)
            if number < num_groups - 1:
                group.add_module("pool", nn.MaxPool2d(2))
            width = hidden_size * 2**number
            layers[f"group_{number + 1}"] = nn.Sequential(OrderedDict(group=group))
        output = OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(width, vocab_size, 1))
        self.blocks = nn.Sequential(layers | {"output": nn.Sequential(output)})

    def forward(self, pixels: Tensor) -> Tensor:
        """Score every code at every place.

        Args:
            pixels: Shape (batch, 3, height, width), in [0, 1]; sides are multiples of ``stride``.

        Returns:
            Logits, shape (batch, vocab_size, height / stride, width / stride).
        """
        return self.blocks(pixels * (1 - 2 * _MARGIN) + _MARGIN)

    @torch.no_grad()
    def codes(self, pixels: Tensor) -> Tensor:
        """The most probable code of every place, in float32 whatever precision the caller is in.

        Args:
            pixels: As in :meth:`forward`.

        Returns:
            Shape (batch, height / stride, width / stride), int64.
        """
        with _without_autocast(pixels.device.type):
            return self(pixels.float()).argmax(dim=1)

    @classmethod
    def from_file(cls, path: str | Path, *, vocab_size: int | None = None) -> VisualTokenizer:
        """Read a tokenizer; no code in the file is run, and no random number is drawn.

        Args:
            path: A file of :func:`save_tokenizer`; or weights in ``FlavaImageCodebook``'s layout: the
                folder that ``save_pretrained`` wrote, or a state dict as ``.safetensors`` or ``.pt``.
            vocab_size: Refuse a tokenizer with any other number of codes.

        Returns:
            The tokenizer on the CPU, float32, frozen and in evaluation mode.

        Raises:
            ValueError: If there is no such file, it holds no tokenizer, or one with another vocabulary.
        """
        path = Path(path)
        state, given = _read(path)
        config = _config_of(state, path)
        if wrong := [key for key in config if given.get(key, config[key]) != config[key]]:
            key = wrong[0]
            raise ValueError(
                f"tokenizer {path}: its config says {key}={given[key]}, its weights {config[key]}"
            )
        if vocab_size not in (None, config["vocab_size"]):
            raise ValueError(
                f"tokenizer {path} has {config['vocab_size']} codes, expected vocab_size={vocab_size}: "
                "pass another tokenizer or that vocab_size"
            )
        with torch.device("meta"):
            tokenizer = cls(**config)
        try:
            tokenizer.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tokenizer {path} does not fit its own sizes ({reason}); {_EXPECTED}"
            ) from error
        return tokenizer.eval().requires_grad_(False)

    def fingerprint(self) -> float:
        """A number in [0, 1) that another tokenizer hardly shares: a hash of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest()[:4], "big") / 2**32


class ResidualBlock(nn.Module):
    """Bottleneck block: the input, widened if it must be, plus a little of four convolutions of it.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output, a multiple of 4.
        gain: Factor on the convolutions' branch; DALL-E's is 1 / layers².
    """

    def __init__(self, width_in: int, width_out: int, *, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        width, inner = width_in, width_out // 4
        for number, (after, kernel) in enumerate([(inner, 3), (inner, 3), (inner, 3), (width_out, 1)], 1):
            path[f"relu_{number}"] = nn.ReLU()
            path[f"conv_{number}"] = nn.Conv2d(width, after, kernel, padding=kernel // 2)
            width = after
        self.res_path = nn.Sequential(OrderedDict(path=nn.Sequential(path)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, width_in, height, width) to (batch, width_out, height, width)."""
        return self.id_path(inputs) + self.gain * self.res_path(inputs)


def save_tokenizer(tokenizer: VisualTokenizer, out: str | Path) -> None:
    """Write a tokenizer as a file that :meth:`VisualTokenizer.from_file` reads.

    It holds sizes and weights only, loads with ``weights_only=True``, and appears whole or not at all.

    Args:
        tokenizer: The tokenizer, such as the ``encoder`` of a trained ``DiscreteVAE``.
        out: The file to write; its folder is made if missing.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone() for key, value in tokenizer.state_dict().items()}
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        torch.save({"config": tokenizer.config, "state": state}, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device_type)  # not on the meta device
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _group(width_in: int, width_out: int, blocks: int, gain: float) -> nn.Sequential:
    widths = [width_in] + [width_out] * blocks
    named = {f"block_{n + 1}": ResidualBlock(widths[n], widths[n + 1], gain=gain) for n in range(blocks)}
    return nn.Sequential(OrderedDict(named))


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The weights of a file or folder, and what its configuration says of the sizes."""
    if not path.exists():
        raise ValueError(f"tokenizer {path}: no such file or folder; {_EXPECTED}")
    given: dict[str, Any] = {}
    file = path
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((path / name for name in names if (path / name).is_file()), path)
        if file is path:
            raise ValueError(f"tokenizer {path} holds neither {' nor '.join(names)}; {_EXPECTED}")
        if (path / "config.json").is_file():
            given = json.loads((path / "config.json").read_text(encoding="utf-8"))
            given["blocks_per_group"] = given.get("num_blocks_per_group", 2)
    content = _load(file)
    if isinstance(content, Mapping) and {"config", "state"} <= set(content):
        content, given = content["state"], dict(content["config"])
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"tokenizer {path} holds no state dict; {_EXPECTED}")
    return content, given


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file, device="cpu")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none can make the readers raise anything
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise ValueError(
            f"tokenizer {file} does not read as weights ({reason[:160]}); {_EXPECTED}"
        ) from error


def _config_of(state: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """The sizes that the weights have."""
    groups = _numbers(state, r"blocks\.group_(\d+)\.")
    blocks = _numbers(state, r"blocks\.group_1\.group\.block_(\d+)")
    first, last = (state.get(f"blocks.{name}.weight") for name in ("input", "output.conv"))
    if first is None or last is None or not groups or not blocks:
        few = ", ".join(list(state)[:3]) or "nothing"
        raise ValueError(f"tokenizer {path} holds other weights ({few}, …); {_EXPECTED}")
    return {
        "hidden_size": len(first),
        "vocab_size": len(last),
        "num_groups": max(groups),
        "blocks_per_group": max(blocks),
    }


def _numbers(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return [int(found[1]) for key in state if (found := re.match(pattern, key))]
