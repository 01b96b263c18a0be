from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import LocalDataset, MDSWriter

from aemim_algorithm.data.convert import ConversionError, convert, report_path
from aemim_algorithm.data.streaming import class_names
from aemim_algorithm.data.transforms import decode

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def picture(seed: int, height: int = 20, width: int = 30, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 3, 4 and 5 images, one of them nested."""
    for label, name in enumerate(("cat", "dog", "more/eel")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3 + label):
            path = tmp_path / "images" / name / f"{index}.jpg"
            path.write_bytes(picture(10 * label + index, format="PNG" if index else "JPEG"))
    return tmp_path / "images"


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w:gz" if tar.suffix != ".tar" else "w") as archive:
        archive.add(folder, arcname=".")
    return tar


def contents(out: Path) -> list[tuple[bytes, int]]:
    return [(sample["image"], int(sample["label"])) for sample in LocalDataset(str(out))[:]]


def expected_contents(folder: Path) -> set[tuple[bytes, int]]:
    names = ("cat", "dog", "more/eel")
    return {(f.read_bytes(), i) for i, name in enumerate(names) for f in (folder / name).iterdir()}


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz", ".tgz"])
def test_every_kind_of_source_gives_the_files_verbatim(folder: Path, tmp_path: Path, suffix: str) -> None:
    source = pack(folder, tmp_path / f"set{suffix}") if suffix else folder
    conversion = convert(source, tmp_path / "out", progress=False)
    assert conversion.classes == ("cat", "dog", "more/eel")
    assert (conversion.samples, conversion.broken) == (12, ())
    assert len(contents(tmp_path / "out")) == 12
    assert set(contents(tmp_path / "out")) == expected_contents(folder)
    assert class_names(tmp_path / "out") == list(conversion.classes)
    assert {p.name for p in tmp_path.iterdir()} == {"images", "out"} | {f"set{suffix}"} - {"set"}


def test_shards_do_not_depend_on_workers_and_mix_the_classes(folder: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        convert(folder, tmp_path / str(workers), workers=workers, progress=False)
    one, three = (tmp_path / name / "shard.00000.mds" for name in ("1", "3"))
    assert one.read_bytes() == three.read_bytes()
    labels = [label for _, label in contents(tmp_path / "1")]
    assert labels != sorted(labels)


def test_a_flat_folder_is_one_class(folder: Path, tmp_path: Path) -> None:
    conversion = convert(folder / "cat", tmp_path / "out", progress=False)
    assert conversion.classes == ("cat",)
    assert {label for _, label in contents(tmp_path / "out")} == {0}


def test_linked_class_folders_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset/cat").symlink_to(folder / "cat")
    (tmp_path / "subset/loop").symlink_to(tmp_path / "subset")
    conversion = convert(tmp_path / "subset", tmp_path / "out", progress=False)
    assert (conversion.samples, conversion.classes) == (3, ("cat",))


def test_resize_shortens_the_short_side_and_never_enlarges(tmp_path: Path) -> None:
    source = tmp_path / "flat"
    source.mkdir()
    sizes = {"wide": (20, 30), "tall": (30, 20), "exact": (10, 40), "small": (8, 9)}
    files = {}
    for format in ("PNG", "JPEG"):
        for name, (height, width) in sizes.items():
            files[name, format] = picture(0, height, width, format)
            (source / f"{name}.{format}").write_bytes(files[name, format])
    convert(source, tmp_path / "out", resize=10, progress=False)
    written = [data for data, _ in contents(tmp_path / "out")]
    shapes = sorted(tuple(decode(data).shape[1:]) for data in written)
    assert shapes == sorted(2 * [(10, 15), (15, 10), (10, 40), (8, 9)])
    assert sum(data.startswith(b"\x89PNG") for data in written) == 4
    for key in (("exact", "PNG"), ("exact", "JPEG"), ("small", "PNG"), ("small", "JPEG")):
        assert files[key] in written


def test_torch_keeps_its_number_of_threads(folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        convert(folder, tmp_path / "out", resize=8, workers=2, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def damage(folder: Path) -> set[str]:
    (folder / "cat/notes.txt").write_text("no image")
    (folder / "dog/1.jpg").write_bytes(picture(5)[:200])
    (folder / "dog/gone.jpg").symlink_to(folder / "nowhere")
    (folder / "README").write_text("beside the classes")
    return {"cat/notes.txt", "dog/1.jpg", "dog/gone.jpg", "README"}


def test_broken_files_fail_the_conversion_and_are_all_reported(folder: Path, tmp_path: Path) -> None:
    broken, before = damage(folder), {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ConversionError) as caught:
        convert(folder, tmp_path / "out", progress=False)
    report = report_path(tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert "4 of 15 files" in message
    assert str(report) in message
    assert "skip_broken" in message
    assert {line.split("\t")[0] for line in report.read_text().splitlines()} == broken
    assert all(line.split("\t")[1] for line in report.read_text().splitlines())
    assert {path.name for path in tmp_path.iterdir()} == before | {report.name}


def test_broken_files_can_be_left_out_and_still_are_reported(folder: Path, tmp_path: Path) -> None:
    broken = damage(folder)
    conversion = convert(folder, tmp_path / "out", skip_broken=True, progress=False)
    assert set(conversion.broken) == broken
    assert conversion.samples == 11 == len(contents(tmp_path / "out"))
    assert conversion.classes == ("cat", "dog", "more/eel")
    assert len(report_path(tmp_path / "out").read_text().splitlines()) == 4
    assert convert(folder, tmp_path / "out", skip_broken=True) == conversion
    with pytest.raises(ConversionError, match="without 4 broken files"):
        convert(folder, tmp_path / "out", progress=False)


def test_a_good_conversion_removes_an_earlier_report(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/notes.txt").write_text("no image")
    with pytest.raises(ConversionError):
        convert(folder, tmp_path / "out", progress=False)
    (folder / "cat/notes.txt").unlink()
    convert(folder, tmp_path / "out", progress=False)
    assert not report_path(tmp_path / "out").exists()


def test_nothing_but_broken_files_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.jpg").write_bytes(b"no image")
    with pytest.raises(ConversionError, match="nothing to convert"):
        convert(tmp_path / "flat", tmp_path / "out", skip_broken=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_converting_again_does_nothing_and_anything_else_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(folder, out, progress=False)
    stamp = (out / "index.json").stat().st_mtime_ns
    assert convert(folder, out) == first
    assert (out / "index.json").stat().st_mtime_ns == stamp
    assert str(tmp_path) not in (out / "conversion.json").read_text()
    with pytest.raises(ConversionError, match="remove it"):
        convert(folder, out, resize=8)
    (folder / "cat/new.jpg").write_bytes(picture(77))
    with pytest.raises(ConversionError, match="remove it"):
        convert(folder, out)
    (out / "index.json").unlink()
    with pytest.raises(ConversionError, match="remove it"):
        convert(folder, out)


@pytest.mark.parametrize("occupied_by", ["file", "folder"])
def test_a_target_that_is_something_else_is_left_alone(
    folder: Path, tmp_path: Path, occupied_by: str
) -> None:
    out = tmp_path / "out"
    kept = out
    if occupied_by == "folder":
        out.mkdir()
        kept = out / "precious"
    kept.write_text("precious")
    with pytest.raises(ConversionError, match="choose another"):
        convert(folder, out, progress=False)
    assert kept.read_text() == "precious"


def test_an_empty_folder_may_be_the_target(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert convert(folder, tmp_path / "out", progress=False).samples == 12


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "full"), ConversionError, r"^disk full while .* MiB free, [^\n]*$"),
        (OSError(errno.EIO, "broken disk"), OSError, "broken disk"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_full_disk_or_an_interruption_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
    message: str,
) -> None:
    before, flush = set(tmp_path.iterdir()), MDSWriter.flush_shard

    def flush_then_fail(writer: MDSWriter) -> None:
        flush(writer)
        raise error

    monkeypatch.setattr(MDSWriter, "flush_shard", flush_then_fail)
    threads = threading.active_count()
    with pytest.raises(expected, match=message):
        convert(folder, tmp_path / "out", progress=False)
    assert set(tmp_path.iterdir()) == before
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # the writer does not wait for its own threads
    assert threading.active_count() <= threads


def test_a_disk_that_is_too_small_is_known_beforehand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(free=2048))
    with pytest.raises(ConversionError, match=r"0\.0 MiB free, at least"):
        convert(folder, tmp_path / "out", progress=False)
    assert set(tmp_path.iterdir()) == before


class _Usage:
    def __init__(self, *, free: int) -> None:
        self.free = free


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.9])
def test_a_cut_tar_is_an_error(folder: Path, tmp_path: Path, suffix: str, part: float) -> None:
    tar = pack(folder, tmp_path / f"set{suffix}")
    size = tar.stat().st_size - (10 * 1024 if suffix == ".tar" else 0)  # the padding may go
    tar.write_bytes(tar.read_bytes()[: int(part * size)])
    with pytest.raises(ConversionError, match="damaged"):
        convert(tar, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_tar_that_is_cut_between_members_damaged_or_doubled_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    tar = pack(folder, tmp_path / "set.tar")
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[6]
    whole = tar.read_bytes()
    for data in (
        whole[: member.offset],
        whole[: member.offset] + b"x" * 512 + whole[member.offset + 512 :],
        whole + whole,
    ):
        tar.write_bytes(data)
        with pytest.raises(ConversionError, match="damaged"):
            convert(tar, tmp_path / "out", progress=False)


def test_links_in_a_tar_are_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/link.jpg").symlink_to("0.jpg")
    tar = pack(folder, tmp_path / "set.tar")
    conversion = convert(tar, tmp_path / "out", skip_broken=True, progress=False)
    assert conversion.broken == ("cat/link.jpg",)


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "does not exist"), ("text.txt", "expected a folder"), ("empty", "no files")],
)
def test_a_source_of_another_kind_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / name, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "empty"}


@pytest.mark.parametrize("suffix", ["", ".tar"])
def test_the_first_images_of_each_class_by_name_can_be_kept(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    source = pack(folder, tmp_path / f"set{suffix}") if suffix else folder
    conversion = convert(source, tmp_path / "out", per_class=2, progress=False)
    assert conversion.classes == ("cat", "dog", "more/eel")
    kept = {(folder / name / f"{i}.jpg").read_bytes() for name in conversion.classes for i in (0, 1)}
    assert conversion.samples == 6
    assert set(contents(tmp_path / "out")) == {x for x in expected_contents(folder) if x[0] in kept}


def test_another_number_per_class_is_another_conversion(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(folder, out, per_class=3, progress=False)
    assert convert(folder, out, per_class=3) == first
    for other in (2, None):
        with pytest.raises(ConversionError, match="remove it"):
            convert(folder, out, per_class=other)


def test_a_class_with_fewer_images_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"^the class 'cat' has 3 images, .*per_class=4: lower it$"):
        convert(folder, tmp_path / "out", per_class=4, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"resize": 0}, {"workers": 0}, {"per_class": 0}, {"split": "validation"}], ids=str
)
def test_arguments_out_of_range_are_named(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        convert(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_read_with_torchvision_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    root = tmp_path / "cifar"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    generator, pixels = np.random.default_rng(0), {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels[name] = generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        batch = {"data": pixels[name].reshape(2, -1), "labels": [1, 2]}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": ["plane", "car", "bird"]}
    (root / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps(meta))
    conversion = convert(root, tmp_path / "out", split=split, progress=False)
    chosen = [v for k, v in pixels.items() if (k == "test_batch") == (split == "test")]
    expected = {(image.tobytes(), 1 + i) for batch in chosen for i, image in enumerate(batch)}
    got = {(decode(data).numpy().tobytes(), label) for data, label in contents(tmp_path / "out")}
    assert got == expected
    assert conversion.classes == ("plane", "car", "bird")
    other = "test" if split == "train" else "train"
    with pytest.raises(ConversionError, match="remove it"):
        convert(root, tmp_path / "out", split=other, progress=False)


def test_a_damaged_cifar10_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ConversionError, match="incomplete or damaged"):
        convert(tmp_path, tmp_path / "out", progress=False)


def test_the_progress_bar_goes_to_stderr(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(folder, tmp_path / "out")
    printed = capsys.readouterr()
    assert "12/12" in printed.err
    assert printed.out == ""


def test_real_photographs_of_imagenet_convert_with_their_grey_ones(tmp_path: Path) -> None:
    tar = SHARED / "imagenet_sample" / "images.tar"
    if not tar.is_file():
        pytest.skip("needs ../shared/data/imagenet_sample/images.tar, which is not here")
    conversion = convert(tar, tmp_path / "out", resize=64, progress=False)
    assert (conversion.samples, len(conversion.classes)) == (500, 500)
    note = json.loads((tmp_path / "out/conversion.json").read_text())
    assert note["made_from"]["source"] == "images.tar"
    assert all(min(decode(data).shape[1:]) == 64 for data, _ in contents(tmp_path / "out")[:50])
