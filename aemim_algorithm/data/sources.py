"""Where images come from: a folder, a tar, or torchvision's CIFAR-10.

Each is listed first and read image by image later, from any thread. The class of a file is its
parent path; labels count the class names in sorted order, as in torchvision's `ImageFolder`.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torchvision.io import encode_png

from aemim_algorithm.data.shards import ConversionError

__all__ = ["CIFAR10_FOLDER", "Source", "describe_source", "first_per_class", "open_source"]

CIFAR10_FOLDER = "cifar-10-batches-py"
_TAR_BLOCK = 512


@dataclass(frozen=True)
class Source:
    """A listing of images that can be read one by one.

    Attributes:
        names: A name per image, for reports.
        labels: The label of each image.
        classes: Class names by label.
        size: Bytes of all images together; 0 if unknown.
        read: Gives the file bytes of the image at a position; thread-safe.
        rejected: Name and reason of entries that cannot be images.
    """

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    size: int
    read: Callable[[int], bytes]
    rejected: list[tuple[str, str]]


def describe_source(source: Path, *, split: str) -> dict[str, Any]:
    """What tells a source from another one; its name and not its path, for shards travel.

    Args:
        source: As for `open_source`.
        split: As for `open_source`.

    Returns:
        Name, number of files and their bytes; of CIFAR-10, name and split.
    """
    description: dict[str, Any] = {"source": source.resolve().name}
    if (source / CIFAR10_FOLDER).is_dir():
        return {**description, "split": split}
    files = list(_walk(source)) if source.is_dir() else [source]
    size = sum(file.stat().st_size for file in files if file.exists())
    return {**description, "files": len(files), "bytes": size}


def open_source(source: Path, *, split: str, scratch: Path) -> Source:
    """List a source.

    Args:
        source: A folder, a folder that holds CIFAR-10 as torchvision keeps it, or a tar.
        split: "train" or "test", of CIFAR-10.
        scratch: A folder in which a compressed tar is unpacked; the caller removes it.

    Returns:
        The listing.

    Raises:
        ConversionError: There is no such source, it is damaged, or it holds no files.
    """
    if source.is_dir():
        is_cifar10 = (source / CIFAR10_FOLDER).is_dir()
        listing = _open_cifar10(source, split) if is_cifar10 else _open_folder(source)
    elif source.is_file() and source.name.lower().endswith((".tar.gz", ".tgz")):
        listing = _open_tar(_unpack(source, scratch / "source.tar"), source)
    elif source.is_file() and source.name.lower().endswith(".tar"):
        listing = _open_tar(source, source)
    elif source.exists():
        raise ConversionError(f"{source}: got a file, expected a folder, .tar, .tar.gz or .tgz")
    else:
        raise ConversionError(f"{source} does not exist: give an image folder or a tar of one")
    if not listing.names and not listing.rejected:
        raise ConversionError(f"{source} holds no files: expected <class>/<file>")
    return listing


def first_per_class(source: Source, count: int) -> Source:
    """The first images of each class by name, for training with few labels.

    Args:
        source: A listing.
        count: Images of each class.

    Returns:
        A listing of these, of all classes and of what was rejected.

    Raises:
        ConversionError: A class has fewer.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(source.names)), key=source.names.__getitem__):
        members[source.labels[index]].append(index)
    for label, name in enumerate(source.classes):
        if (found := len(members[label])) < count:
            raise ConversionError(
                f"the class {name!r} has {found} images, expected at least per_class={count}: lower it"
            )
    kept = sorted(index for label in members.values() for index in label[:count])
    return replace(
        source,
        names=[source.names[index] for index in kept],
        labels=[source.labels[index] for index in kept],
        size=0,
        read=lambda index: source.read(kept[index]),
    )


def _open_folder(source: Path) -> Source:
    paths = sorted(_walk(source))
    names = [path.relative_to(source).as_posix() for path in paths]
    # A dangling link has no size; reading it will name it in the report.
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
    extents = [(path, 0, size) for path, size in zip(paths, sizes, strict=True)]
    return _classify(names, extents, [], source.resolve().name)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file under a folder, following links (a subset of ImageNet is often made of them)."""

    def fail(error: OSError) -> None:
        raise ConversionError(f"{error.filename} cannot be read ({error.strerror})") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        here = Path(parent).resolve()
        # A link to a folder around itself would never end.
        ancestors = {here, *here.parents}
        folders[:] = [name for name in folders if (here / name).resolve() not in ancestors]
        yield from (Path(parent) / name for name in files)


def _open_tar(tar: Path, source: Path) -> Source:
    names, extents, rejected = [], [], []
    try:
        with tarfile.open(tar, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).as_posix()
                if member.isreg() and not member.issparse():
                    names.append(name)
                    extents.append((tar, member.offset_data, member.size))
                elif not member.isdir():
                    rejected.append((name, "a link or special entry of the tar"))
            _check_tar_end(tar, archive.offset)
    except tarfile.TarError as error:
        raise ConversionError(f"{source} is damaged ({error}): get it again") from error
    return _classify(names, extents, rejected, source.name.split(".")[0])


def _check_tar_end(tar: Path, offset: int) -> None:
    """Reject a tar that is cut, damaged or concatenated: `tarfile` ends silently at all three."""
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(_TAR_BLOCK)
        if not block:
            raise tarfile.ReadError("it ends without an end mark")
        while block:
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"unreadable after byte {offset}")
            block = file.read(2**20)


def _unpack(source: Path, tar: Path) -> Path:
    """Decompress, because samples are read in another order than they are stored."""
    try:
        with gzip.open(source) as compressed, tar.open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 2**20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConversionError(f"{source} is damaged ({error}): get it again") from error
    return tar


def _classify(
    names: list[str],
    extents: list[tuple[Path, int, int]],
    rejected: list[tuple[str, str]],
    title: str,
) -> Source:
    """Derive classes from parent paths; a flat source is one class called `title`."""
    parents = [str(PurePosixPath(name).parent) for name in names]
    classes = sorted(set(parents))
    if classes == ["."]:
        classes, parents = [title], [title] * len(names)
    elif "." in classes:
        reason = "stands beside the class folders, so in no class"
        outside = [name for name, parent in zip(names, parents, strict=True) if parent == "."]
        rejected = [*rejected, *((name, reason) for name in outside)]
        classes.remove(".")
    labels = {name: label for label, name in enumerate(classes)}
    kept = [i for i, parent in enumerate(parents) if parent in labels]
    files = [extents[i] for i in kept]

    def read(index: int) -> bytes:
        path, offset, size = files[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return Source(
        names=[names[i] for i in kept],
        labels=[labels[parents[i]] for i in kept],
        classes=tuple(classes),
        size=sum(size for _, _, size in files),
        read=read,
        rejected=rejected,
    )


def _open_cifar10(root: Path, split: str) -> Source:
    """CIFAR-10 as torchvision keeps it; its raw pixels become PNGs, which lose nothing."""
    from torchvision.datasets import CIFAR10

    try:
        dataset: Any = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise ConversionError(
            f"{root / CIFAR10_FOLDER} is incomplete or damaged: get it again with "
            f"torchvision.datasets.CIFAR10(root, download=True)"
        ) from error

    def read(index: int) -> bytes:
        pixels = torch.from_numpy(dataset.data[index]).permute(2, 0, 1)
        return encode_png(pixels).numpy().tobytes()

    return Source(
        names=[f"{split}/{index:05}" for index in range(len(dataset))],
        labels=[int(label) for label in dataset.targets],
        classes=tuple(dataset.classes),
        size=0,
        read=read,
        rejected=[],
    )
