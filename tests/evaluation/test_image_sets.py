"""Opening sets: pixels as timm's, labels by name, and one clear line for what is wrong."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import write_grey
from PIL import Image
from timm.data import create_transform

from aemim_algorithm.data.convert import convert
from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.evaluation.image_ids import read_ids, select
from aemim_algorithm.evaluation.image_sets import ImageSet, Sample, open_images
from aemim_algorithm.evaluation.view import EvaluationView


def _photo(height: int = 61, width: int = 83) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def _items(images: ImageSet) -> list[Sample]:
    return [images[position] for position in range(len(images))]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("fraction", "interpolation"), [(1.0, "bicubic"), (0.875, "bilinear")])
def test_pixels_are_those_of_timm(
    crop_mode: str, fraction: float, interpolation: str, tmp_path: Path
) -> None:
    """JPEGs of any size: not one grey level apart from timm's transform of Pillow's image."""
    for name, size in {"wide.JPEG": (61, 83), "tall.JPEG": (97, 40), "small.JPEG": (9, 11)}.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        _photo(*size).save(tmp_path / "a" / name, format="JPEG")
    options = {"crop_mode": crop_mode, "interpolation": interpolation, "mean": (0.2, 0.5, 0.9)}
    images = open_images(tmp_path, image_size=32, crop_fraction=fraction, **options)
    timm = create_transform((3, 32, 32), crop_pct=fraction, normalize=False, **options)
    for image, _, index in _items(images):
        expected = timm(Image.open(tmp_path / images.ids[index]).convert("RGB"))
        assert torch.equal(image, expected), images.ids[index]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8


def test_grey_cmyk_transparent_and_odd_images_become_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    photo = _photo()
    photo.convert("L").save(folder / "grey.JPEG")
    photo.convert("CMYK").save(folder / "cmyk.JPEG")
    photo.convert("RGBA").save(folder / "transparent.png")
    photo.save(folder / "png.JPEG", format="PNG")
    images = open_images(tmp_path, image_size=16)
    found = {images.ids[index]: image.float() for image, _, index in _items(images)}
    grey = found["a/grey.JPEG"]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[1], grey[2])
    for name in ("a/cmyk.JPEG", "a/transparent.png"):  # a lossy format, but the same picture
        assert (found[name] - found["a/png.JPEG"]).abs().mean() < 6, name


def test_images_of_just_the_size_can_stay_as_they_are() -> None:
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).remainder(256).to(torch.uint8)
    resized = EvaluationView(32, crop_fraction=0.875)(image)
    assert not torch.equal(resized, image)
    assert torch.equal(EvaluationView(32, crop_fraction=0.875, already_sized=True)(image), image)
    larger = torch.nn.functional.pad(image, (0, 1))
    assert EvaluationView(32, already_sized=True)(larger).shape == (3, 32, 32)


def test_labels_follow_the_classifiers_order_not_the_folders(tmp_path: Path) -> None:
    write_grey(tmp_path / "set", {"cat/1.png": 1, "dog/2.png": 2, "bird/3.png": 3})
    convert(tmp_path / "set", tmp_path / "shards", progress=False)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", arcname=".")
    order = ("dog", "horse", "bird", "cat")
    for source in ("set", "shards", "set.tar"):
        images = open_images(tmp_path / source, image_size=8, classes=order)
        label_of_level = {int(image[0, 0, 0]): label for image, label, _ in _items(images)}
        assert label_of_level == {1: 3, 2: 0, 3: 2}, source
        assert images.classes == order


def test_a_readme_beside_the_class_folders_is_no_image(tmp_path: Path) -> None:
    """As ImageNet-A and -R are handed out; but what is lost within a class is an error."""
    write_grey(tmp_path / "set", {"a/1.png": 1, "b/1.png": 2})
    (tmp_path / "set" / "README.txt").write_text("about the set")
    assert list(open_images(tmp_path / "set", image_size=8).ids) == ["a/1.png", "b/1.png"]
    (tmp_path / "set" / "a" / "2.png").symlink_to("1.png")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", arcname=".")
    with pytest.raises(ValueError, match=r"1 entries cannot be images, first a/2.png \(a link"):
        open_images(tmp_path / "set.tar", image_size=8)


def test_without_a_classifiers_order_classes_are_sorted(tmp_path: Path) -> None:
    write_grey(tmp_path, {"b/1.png": 1, "a/2.png": 2})
    images = open_images(tmp_path, image_size=8)
    assert images.classes == ("a", "b")
    assert [images[i][1:] for i in range(2)] == [(0, 0), (1, 1)]
    assert list(images.ids) == ["a/2.png", "b/1.png"]


def test_only_some_images_keep_their_names_and_order(tmp_path: Path) -> None:
    write_grey(tmp_path / "set", {"a/1.png": 1, "a/2.png": 2, "b/1.png": 3, "b/4.png": 4})
    (tmp_path / "ids.txt").write_text("# a list\nb/4.png 1\n\na/1.png 0\n2.png\n")
    images = open_images(tmp_path / "set", image_size=8, only=read_ids(tmp_path / "ids.txt"))
    assert list(images.ids) == ["a/1.png", "a/2.png", "b/4.png"]
    assert [int(image[0, 0, 0]) for image, _, _ in _items(images)] == [1, 2, 4]
    assert [number for _, _, number in _items(images)] == [0, 1, 3]  # as in the whole set
    assert images.name_of(3) == "b/4.png"


@pytest.mark.parametrize(
    ("only", "says"),
    [
        (["a/1.png", "a/9.png"], "1 of 2 named images, first 'a/9.png': is not there"),
        (["1.png"], "is the name of several images: give its path"),
        (["a/1.png", "a/1.png"], "'a/1.png' is named twice"),
    ],
)
def test_a_list_of_images_that_does_not_fit_is_refused(only: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        select(["a/1.png", "b/1.png"], only, where="set")
    assert "\n" not in str(error.value)


def test_an_empty_list_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no images: expected one a line"):
        read_ids(tmp_path / "ids.txt")
    with pytest.raises(ValueError, match="not readable as a list of image names"):
        read_ids(tmp_path / "none.txt")


def test_unknown_class_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    write_grey(tmp_path, {"aeroplane/1.png": 1, "cat/1.png": 1})
    says = (
        r"1 of its 2 class names are none of the classifier's 2, first 'aeroplane'; did you mean 'airplane'"
    )
    with pytest.raises(ValueError, match=says):
        open_images(tmp_path, image_size=8, classes=("airplane", "cat"))


def test_a_label_outside_of_the_classes_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    write_shards([(buffer.getvalue(), 1), (buffer.getvalue(), 2)], tmp_path, classes=("a", "b"), made_from={})
    (tmp_path / "conversion.json").unlink()  # as of shards that another tool wrote
    images = open_images(tmp_path, image_size=8, classes=("a", "b"))
    assert images[0][1] == 1
    with pytest.raises(
        ValueError, match="sample 1 has label 2, expected 0 to 1: the set is of other classes"
    ):
        images[1]
    with pytest.raises(ValueError, match="names of its classes are unknown"):
        open_images(tmp_path, image_size=8)


def test_what_is_no_set_or_no_image_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_images(tmp_path / "none", image_size=8)
    (tmp_path / "set.tgz").touch()
    with pytest.raises(ValueError, match="is compressed: unpack it"):
        open_images(tmp_path / "set.tgz", image_size=8)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "broken.JPEG").write_bytes(b"\xff\xd8\xff not a picture")
    images = open_images(tmp_path / "set", image_size=8)
    with pytest.raises(ValueError, match=r"a/broken.JPEG: image: .* cannot be decoded") as error:
        images[0]
    assert "\n" not in str(error.value)
