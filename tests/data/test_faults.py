"""What a user sees of damaged data: one line, or an image; never a hang, a short epoch or silence.

Damage is done to real shards and files, and met by the real loaders and by `convert`.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.io import encode_jpeg

from aemim_algorithm.data.convert import ConversionError, convert, report_path
from aemim_algorithm.data.shards import COLUMNS
from aemim_algorithm.data.streaming import EvaluationImages, ImageStream, evaluation_data, train_data
from aemim_algorithm.data.transforms import decode

BATCH, SIDE = 4, 16


def pixels(height: int = 24, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    image, buffer = Image.fromarray(pixels()), io.BytesIO()
    if mode == "16 bit":
        image = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(side: int = 20_000) -> bytes:
    """A black one-bit PNG; 400 million pixels in 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + -(-side // 8))), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def small(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def animation() -> bytes:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    return encoded("GIF", save_all=True, append_images=frames[1:])


def large() -> bytes:
    """50 megapixels, smooth."""
    rows, columns = torch.arange(6144) // 24, torch.arange(8192) // 32
    return encode_jpeg(torch.stack([(rows[:, None] + columns) // 2] * 3).to(torch.uint8)).numpy().tobytes()


# What can be read; `test_transforms` compares the pixels with those that Pillow sees.
WORKS: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded("JPEG"),
    "PNG (named .jpg)": lambda: encoded("PNG"),
    "grey JPEG": lambda: encoded("JPEG", "L"),
    "grey PNG": lambda: encoded("PNG", "L"),
    "CMYK JPEG": lambda: encoded("JPEG", "CMYK"),
    "RGBA PNG": lambda: encoded("PNG", "RGBA"),
    "palette PNG": lambda: encoded("PNG", "P"),
    "16-bit PNG": lambda: encoded("PNG", "16 bit"),
    "JPEG of two pictures": lambda: encoded("MPO", save_all=True, append_images=[Image.fromarray(pixels())]),
    "still GIF": lambda: encoded("GIF", "P"),
    "8×8 pixels": lambda: small(8),
    "50 megapixels": large,
}
# What cannot, and the words that say so.
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG cut in half": (lambda: encoded("JPEG")[:800], r"bytes cannot be decoded \("),
    "PNG cut in half": (lambda: encoded("PNG")[:800], r"bytes cannot be decoded \("),
    "JPEG header only": (lambda: encoded("JPEG")[:3], "3 bytes cannot be decoded"),
    "no bytes": (lambda: b"", "got 0 bytes, expected a JPEG, PNG, WebP or GIF"),
    "text": (lambda: b"<html>404</html>", "16 bytes are no JPEG, PNG, WebP or GIF file"),
    "1×1 pixel": (lambda: small(1), "1×1 pixels, expected sides of at least 8"),
    "animation": (animation, "animation of 3 frames, expected one still"),
    "400 megapixels": (bomb, r"20000×20000 pixels, expected at most 100,000,000: resize it"),
}


def write(folder: Path, files: list[bytes], **options: Any) -> Path:
    writer = MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha1"], **options)
    for label, data in enumerate(files):
        writer.write({"image": data, "label": label})
    writer.finish()
    return folder


def training(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"image_size": SIDE, "batch_size": BATCH, "shuffle": False}
    defaults |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return train_data(folder, **(defaults | options)).dataloader


def evaluation(folder: Path) -> Any:
    return evaluation_data(folder, image_size=SIDE, batch_size=BATCH)


@pytest.mark.parametrize("kind", WORKS)
def test_images_that_work(kind: str, tmp_path: Path) -> None:
    data = WORKS[kind]()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/image.jpg").write_bytes(data)
    assert convert(tmp_path / "source", tmp_path / "converted", progress=False).samples == 1
    folder = write(tmp_path / "set", [data] * BATCH)
    (batch,) = list(training(folder))
    assert batch["image"].shape == (BATCH, 3, SIDE, SIDE)
    assert batch["image"].float().std() > 5
    assert next(iter(evaluation(folder)))[0].shape == (BATCH, 3, SIDE, SIDE)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BROKEN)
def test_images_that_do_not_work_while_training(kind: str, workers: int, tmp_path: Path) -> None:
    make, words = BROKEN[kind]
    folder = write(tmp_path / "set", [encoded("JPEG")] * 5 + [make()] + [encoded("JPEG")] * 2)
    for loader in (training(folder, workers=workers), evaluation(folder)):
        with pytest.raises(
            ValueError, match=rf"^{folder}, sample 5 \(shard\.00000\.mds\): .*{words}"
        ) as caught:
            list(loader)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_images_that_do_not_work_in_a_conversion(kind: str, tmp_path: Path) -> None:
    make, words = BROKEN[kind]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "good.jpg").write_bytes(encoded("JPEG"))
    (source / "bad.jpg").write_bytes(make())
    with pytest.raises(ConversionError, match=r"^1 of 2 files are not images, first 'bad\.jpg'"):
        convert(source, out, progress=False)
    assert not out.exists()
    (line,) = report_path(out).read_text(encoding="utf-8").splitlines()
    assert re.match(rf"bad\.jpg\timage: .*{words}", line)
    assert convert(source, out, skip_broken=True, progress=False).broken == ("bad.jpg",)


def test_four_hundred_megapixels_are_refused_without_decoding_them() -> None:
    data = bomb()
    before = time.process_time()
    with pytest.raises(ValueError, match="20000×20000"):
        decode(data)
    assert time.process_time() - before < 0.1  # to decode them takes seconds


# Shards that are damaged before the run.


def damage(kind: str, folder: Path) -> None:
    index, shard = folder / "index.json", folder / "shard.00001.mds"
    if kind == "missing shard":
        shard.unlink()
    elif kind == "truncated shard":
        os.truncate(shard, shard.stat().st_size - 100)
    elif kind == "zero-length shard":
        os.truncate(shard, 0)
    elif kind == "no index":
        index.unlink()
    elif kind == "empty index":
        index.write_bytes(b"")
    elif kind == "index without shards":
        index.write_text(json.dumps({"version": 2, "shards": []}))
    elif kind == "index that is no object":
        index.write_text("[1, 2]")
    elif kind == "cut index":
        os.truncate(index, 100)
    elif kind == "wrong column":
        index.write_text(index.read_text().replace('"image"', '"jpeg"'))
    elif kind == "no columns":
        index.write_text(index.read_text().replace('"column_names"', '"columns"'))
    elif kind == "no bytes":
        index.write_text(index.read_text().replace('"bytes": ', '"octets": '))
    elif kind == "no names":
        index.write_text(index.read_text().replace('"basename"', '"name"'))
    elif kind == "bytes that are no number":
        index.write_text(re.sub(r'"bytes": (\d+)', r'"bytes": "\1"', index.read_text()))
    elif kind == "another format":
        index.write_text(index.read_text().replace('"format": "mds"', '"format": "jsonl"'))
    elif kind == "another version":
        index.write_text(index.read_text().replace('"version": 2', '"version": 3'))
    elif kind == "decoded images":
        index.write_text(index.read_text().replace('"bytes", "int"', '"jpeg", "int"'))
    elif kind == "labels of text":
        index.write_text(index.read_text().replace('"bytes", "int"', '"bytes", "str"'))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing shard", r"shard\.00001\.mds is missing"),
        ("truncated shard", r"shard\.00001\.mds is missing or cut short"),
        ("zero-length shard", r"shard\.00001\.mds is missing or cut short"),
        ("no index", r"has no index\.json"),
        ("empty index", "no index of shards"),
        ("index without shards", "has no samples"),
        ("index that is no object", "no index of shards"),
        ("cut index", "no index of shards"),
        ("wrong column", r"columns \['jpeg', 'label'\], expected \['image', 'label'\]"),
        ("no columns", "no index of shards"),
        ("no bytes", "no index of shards"),
        ("no names", "no index of shards"),
        ("bytes that are no number", "no index of shards"),
        ("another format", r"format 'jsonl', expected 'mds'"),
        ("another version", r"no index of shards"),
        ("decoded images", r"column image as 'jpeg', expected 'bytes'"),
        ("labels of text", r"column label as 'str', expected 'int'"),
    ],
)
def test_shards_that_are_damaged_are_known_at_the_start(kind: str, words: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [encoded("JPEG")] * 24, size_limit=2**13)
    damage(kind, folder)
    for build in (training, evaluation):
        with pytest.raises(ValueError, match=words) as caught:
            build(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


# Shards that are damaged while the run reads them.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), r"has [\d,]+ bytes, expected [\d,]+"),
        (lambda path: os.truncate(path, 0), "has 0 bytes, expected"),
    ],
    ids=["unlinked", "truncated", "emptied"],
)
@pytest.mark.timeout(60)
def test_shards_that_are_damaged_in_mid_epoch_end_the_run(
    harm: Callable[[Path], None], words: str, workers: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "set", [encoded("JPEG")] * 160, size_limit=2**14)
    last = sorted(folder.glob("*.mds"))[-1]
    batches = iter(training(folder, workers=workers))
    next(batches)
    harm(last)
    with pytest.raises(ValueError, match=rf"{folder}/{last.name} {words}.*: get it again[^\n]*$"):
        list(batches)


# Broken images that the run may replace.


def replaced(folder: Path, **options: Any) -> list[tuple[int, int, int]]:
    """Label, seed and what was replaced of each sample of an epoch."""
    keys = ("label", "seed", "replaced")
    return [
        sample
        for batch in training(folder, **options)
        for sample in zip(*(batch[key].tolist() for key in keys), strict=True)
    ]


def test_a_broken_image_is_replaced_by_the_next_one_always_alike(tmp_path: Path) -> None:
    bad = {2, 5, 6, 15}
    files = [b"no image" if i in bad else encoded("JPEG") for i in range(16)]
    folder = write(tmp_path / "set", files, size_limit=2**13)
    samples = replaced(folder, max_broken=4)
    assert [label for label, _, _ in samples] == [0, 1, 3, 3, 4, 7, 7, *range(7, 15), 0]
    assert [i for _, _, i in samples] == [i if i in bad else -1 for i in range(16)]
    assert len({seed for _, seed, _ in samples}) == 16
    assert replaced(folder, max_broken=4, workers=2) == samples
    assert "replaced" not in next(iter(training(write(tmp_path / "good", [encoded("JPEG")] * 4))))


@pytest.mark.parametrize("encoding", ["int", "uint8", "int64", "str_int"])
def test_a_label_may_be_any_integer(encoding: str, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"uint8": np.uint8, "int64": np.int64}
    writer = MDSWriter(out=str(tmp_path / "set"), columns={"image": "bytes", "label": encoding})
    for label in range(BATCH):
        writer.write({"image": encoded("JPEG"), "label": kinds.get(encoding, int)(label)})
    writer.finish()
    (batch,) = list(training(tmp_path / "set"))
    assert batch["label"].tolist() == list(range(BATCH))


def test_more_broken_images_in_a_row_than_the_run_may_meet_end_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [encoded("JPEG")] * 2 + [b"no image"] * 3 + [encoded("JPEG")] * 3)
    with pytest.raises(
        ValueError, match=r"sample 2 .*: image: 8 bytes .*, and as many .* max_broken=2 allows"
    ):
        list(training(folder, max_broken=2))
    assert len(replaced(folder, max_broken=3)) == 8


def test_a_damaged_shard_is_no_broken_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [encoded("JPEG")] * 16, size_limit=2**13)
    loader = training(folder, max_broken=16)
    os.truncate(folder / "shard.00000.mds", 1000)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has 1,000 bytes, expected"):
        list(loader)


# Bytes that change while the size stays.


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_any_flipped_byte_gives_an_image_or_an_error_that_names_the_shard(
    format: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "set", [encoded(format)] * BATCH)
    shard = folder / "shard.00000.mds"
    stream = ImageStream(local=folder, image_size=SIDE, batch_size=BATCH)
    still = EvaluationImages(folder, image_size=SIDE)
    whole, draw = shard.read_bytes(), np.random.default_rng(0)
    errors: list[str] = []
    # Every byte of the offsets and of the first sample's head, and some of the rest.
    places = [*range(64), *range(140, 180), *draw.integers(0, len(whole), 150).tolist()]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= int(draw.integers(1, 256))
        shard.write_bytes(flipped)
        for index in range(BATCH):
            try:
                images = stream[index]["image"], still[index][0]
            except ValueError as error:
                errors.append(str(error))
            else:
                assert {image.shape for image in images} == {(3, SIDE, SIDE)}
    assert len(errors) > 20
    named = rf"{folder}, sample \d \(shard\.00000\.mds\): [^\n]+"
    assert [error for error in errors if not re.fullmatch(named, error)] == []
