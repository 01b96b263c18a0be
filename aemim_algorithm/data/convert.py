"""Turn an image folder, a tar of one, or CIFAR-10 into MDS shards.

Image files travel verbatim unless `resize` is given. Every file is decoded once with the decoder
that training uses, so a file that is not an image is found here and not at the thousandth step.

Workers are threads: decoding and resizing release Python's lock. To check 500 ImageNet photos two
threads need 54% of one thread's time and two forked processes 80% (with a resize 54% and 65%).
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from torchvision.io import encode_jpeg, encode_png
from tqdm import tqdm

from aemim_algorithm.data.abandoned import held
from aemim_algorithm.data.shards import (
    Conversion,
    ConversionError,
    check_space,
    existing,
    staged,
    write_shards,
)
from aemim_algorithm.data.sources import Source, describe_source, first_per_class, open_source
from aemim_algorithm.data.transforms import decode, resize_short_side
from aemim_algorithm.validation import require_choice, require_integer

__all__ = [
    "Conversion",
    "ConversionError",
    "Rejects",
    "convert",
    "ordered_map",
    "report_path",
    "write_shards",
]

JPEG_QUALITY = 95
_ORDER_SEED = 0
_PNG = b"\x89PNG"
_AHEAD = 16  # results per worker that may wait to be written

T = TypeVar("T")
R = TypeVar("R")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    resize: int | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    progress: bool = True,
    split: str = "train",
    per_class: int | None = None,
) -> Conversion:
    """Write the images of a source as MDS shards, all or none.

    Samples are written in one fixed random order, so that classes are mixed within a shard and
    the shards are the same whatever the number of workers.

    Args:
        source: An image folder (`<class>/<file>`; a flat folder is one class), a `.tar`,
            `.tar.gz` or `.tgz` of one, or a folder that holds `cifar-10-batches-py`.
        out: The folder to make. Where it already holds just this conversion, nothing is done.
        resize: Short side in pixels, bicubic. Larger images are re-encoded (JPEG quality 95,
            PNG stays PNG), smaller ones stay verbatim. None: all stay verbatim.
        workers: Threads that read, decode and resize; None: one per core.
        skip_broken: Leave out files that are not images, instead of failing.
        progress: Show a progress bar on stderr.
        split: "train" or "test": which part of CIFAR-10; other sources have no parts.
        per_class: Keep the first so many images of each class, by name; those of them that `skip_broken`
            leaves out are not replaced. None: keep all.

    Returns:
        Number of samples, the class names, and the names of files left out.

    Raises:
        ConversionError: Bad arguments or source, files that are not images (all named in
            `<out>.broken.txt`), something else at `out`, a full disk.
    """
    _check_arguments(split, resize=resize, workers=workers, per_class=per_class)
    source, out = Path(source), Path(out)
    made_from = {**describe_source(source, split=split), "resize": resize}
    if per_class is not None:  # no key else: shards of all images may be older than this argument
        made_from["per_class"] = per_class
    done = existing(out, made_from)
    if done is not None and (skip_broken or not done.broken):
        return done
    if done is not None:
        raise ConversionError(
            f"{out} was made without {len(done.broken)} broken files: remove it or pass skip_broken"
        )
    rejects = Rejects(report_path(out), tolerated=skip_broken)
    # The stage is the outer one: it also explains a disk that is full while a tar is unpacked.
    unpacked = partial(TemporaryDirectory, dir=out.parent, prefix=f".{out.name}.", suffix=".partial")
    with staged(out) as stage, unpacked() as scratch, held(Path(scratch)):
        listing = open_source(source, split=split, scratch=Path(scratch))
        if per_class is not None:
            listing = first_per_class(listing, per_class)
        check_space(out, listing.size if resize is None else 0)
        samples = _samples(listing, resize, workers or os.cpu_count() or 1, progress, rejects)
        return write_shards(
            samples,
            stage,
            classes=listing.classes,
            made_from=made_from,
            broken=rejects.names,
        )


class Rejects:
    """The files of a source that are not images, and the report that names them.

    Args:
        report: The file to write; one of an earlier conversion is removed.
        tolerated: Whether the conversion goes on without such files.
    """

    def __init__(self, report: Path, *, tolerated: bool) -> None:
        self.report, self.tolerated = report, tolerated
        self.names: list[str] = []
        self._lines: list[str] = []
        report.unlink(missing_ok=True)

    def add(self, name: str, reason: str) -> None:
        """Note one file."""
        self.names.append(name)
        self._lines.append(f"{' '.join(name.split())}\t{reason}\n")

    def finish(self, total: int) -> None:
        """Write the report, if there is anything in it.

        Args:
            total: Number of all files, broken or not.

        Raises:
            ConversionError: There are broken files and they are not tolerated, or nothing else.
        """
        if not self.names:
            return
        self.report.write_text("".join(self._lines), encoding="utf-8", errors="backslashreplace")
        if self.tolerated and len(self.names) < total:
            return
        remedy = (
            "there is nothing to convert"
            if self.tolerated
            else ("mend them, or leave them out with skip_broken=True (--skip-broken)")
        )
        raise ConversionError(
            f"{len(self.names)} of {total} files are not images, first {self.names[0]!r}; "
            f"all are named in {self.report}; nothing was written: {remedy}"
        )


def report_path(out: Path) -> Path:
    """Where files that are not images are named: one line each, name, tab, reason."""
    return out.with_name(f"{out.name}.broken.txt")


def _check_arguments(split: str, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None:
            require_integer(name, count, low=1)
    require_choice("split", split, ("train", "test"))


def _samples(
    source: Source, resize: int | None, workers: int, progress: bool, rejects: Rejects
) -> Iterator[tuple[bytes, int]]:
    """Read, check and resize in threads; give the samples in their fixed random order."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(source.names)).tolist()
    for name, reason in source.rejected:
        rejects.add(name, reason)

    def prepare(index: int) -> bytes | str:
        try:
            return _prepare(source.read(index), resize)
        except (ValueError, OSError) as error:
            return str(error)

    results = ordered_map(prepare, order, workers)
    bar = tqdm(results, "converting", len(order), unit="img", file=sys.stderr, disable=not progress)
    for index, result in zip(order, bar, strict=True):
        if isinstance(result, str):
            rejects.add(source.names[index], result)
        # Once the conversion has failed, go on to name every broken file, but write no more.
        elif rejects.tolerated or not rejects.names:
            yield result, source.labels[index]
    rejects.finish(len(order) + len(source.rejected))


def _prepare(data: bytes, resize: int | None) -> bytes:
    """Check that a file is an image, and make its short side `resize` if it is longer."""
    image = decode(data)
    if resize is None or min(image.shape[-2:]) <= resize:
        return data
    smaller = resize_short_side(image, resize)
    is_png = data.startswith(_PNG)
    encoded = encode_png(smaller) if is_png else encode_jpeg(smaller, quality=JPEG_QUALITY)
    return encoded.numpy().tobytes()


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map` in threads: in order, and with a bounded number of results waiting in memory."""
    waiting: deque[Future[R]] = deque()
    with _one_thread_per_operation(), ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Else each worker's resize would start a thread per core of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
