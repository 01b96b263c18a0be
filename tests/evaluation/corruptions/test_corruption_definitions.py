"""Each corruption against a closed form, or against a plain implementation of the same definition."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from corruption_photos import FROST_LEVELS, FROST_SIDE, frost_files, photo  # noqa: F401
from PIL import Image
from scipy.ndimage import correlate1d, gaussian_filter, zoom
from skimage.util import random_noise

from aemim_algorithm.evaluation.corruptions import TABLES, blur, corrupt, digital, filters
from aemim_algorithm.evaluation.corruptions.plasma import plasma


def grey(level: int, side: int = 128) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


@pytest.mark.parametrize(("table", "deviation"), [("imagenet", 0.08), ("cifar", 0.04)])
def test_gaussian_noise_has_its_deviation(table: str, deviation: float) -> None:
    noise = corrupt(grey(127), "gaussian_noise", 1, seed=2, table=table) - 127.0
    assert noise.std() == pytest.approx(255 * deviation, rel=0.02)
    assert noise.mean() == pytest.approx(-0.5, abs=0.3)  # fractions are cut off
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("level", [30, 120])
def test_shot_noise_has_the_variance_of_a_count(level: int) -> None:
    counts = corrupt(grey(level), "shot_noise", 1, seed=2) / 255
    assert counts.var() == pytest.approx(level / 255 / 60, rel=0.05)
    assert counts.mean() == pytest.approx(level / 255, abs=0.005)


@pytest.mark.parametrize("table", TABLES)
def test_impulse_noise_is_the_salt_and_pepper_of_scikit_image(table: str) -> None:
    image = photo()
    for severity, share in enumerate(TABLES[table]["impulse_noise"], start=1):
        expected = random_noise(image / 255, "s&p", rng=severity, amount=share)
        ours = corrupt(image, "impulse_noise", severity, seed=severity, table=table)
        assert np.array_equal(ours, (expected * 255).astype(np.uint8))


def test_defocus_blur_spreads_a_point_over_a_disk() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[30, 20] = 255
    blurred = corrupt(image, "defocus_blur", 1, seed=0)  # radius 3, rim hardly softened
    rows, columns = np.nonzero(blurred[..., 0])
    assert len(rows) == 29, "points of the grid with x² + y² <= 9"
    assert ((rows - 30) ** 2 + (columns - 20) ** 2 <= 9).all()
    assert set(blurred[rows, columns, 1]) == {255 // 29}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "pixelate", "contrast"]
)
def test_blurs_keep_an_even_image(name: str, table: str) -> None:
    # The official disk of severity 4, radius 8, touches its frame, and sums to a little more than 1; glass
    # cuts fractions off twice.
    allowed = {"defocus_blur": 3 if table == "imagenet" else 1, "glass_blur": 2}.get(name, 1)
    for severity in (1, 2, 3, 4, 5):
        difference = corrupt(grey(100, 40), name, severity, seed=1, table=table).astype(int) - 100
        assert np.abs(difference).max() <= allowed


@pytest.mark.parametrize("reach", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_glass_moves_pixels_as_the_sequential_loop_does(reach: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = 23, 31
    pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
    steps = generator.integers(-reach, reach, (2, height - 2 * reach, width - 2 * reach))
    expected = pixels.copy()
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            down, right = steps[:, row - reach - 1, column - reach - 1]
            # Views, as the official script has them: the second assignment changes nothing.
            one, other = expected[row, column], expected[row + down, column + right]
            one[:], other[:] = other, one
    moved = blur.take_along_chains(pixels, steps, reach=reach)
    assert np.array_equal(moved, expected)
    assert not np.array_equal(moved, pixels)


def test_smear_to_the_right_is_half_a_gaussian() -> None:
    image = photo(height=40, width=50)[..., 0].astype(float)
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 2.5**2))
    expected = correlate1d(image, np.r_[np.zeros(12), weights / weights.sum()], axis=1, mode="nearest")
    assert filters.smear(image, radius=6, sigma=2.5, degrees=0) == pytest.approx(expected, abs=1e-3)
    down = filters.smear(image.T, radius=6, sigma=2.5, degrees=90)
    assert down == pytest.approx(expected.T, abs=1e-3)


@pytest.mark.parametrize("degrees", [-45, 20, -100])
def test_smear_lays_a_point_along_its_line(degrees: float) -> None:
    image = np.zeros((65, 65))
    image[32, 32] = 1
    smeared = filters.smear(image, radius=10, sigma=4, degrees=degrees)
    rows, columns = np.nonzero(smeared)
    assert smeared.sum() == pytest.approx(1, abs=1e-5)
    # A pixel sees what lies ahead of it, so that the point is spread backwards.
    along = -(np.cos(np.radians(degrees)) * (columns - 32) + np.sin(np.radians(degrees)) * (rows - 32))
    across = np.sin(np.radians(degrees)) * (columns - 32) - np.cos(np.radians(degrees)) * (rows - 32)
    assert (along > -0.75).all()
    assert along.max() > 19
    assert np.abs(across).max() <= 0.75


@pytest.mark.parametrize("side", [32, 67])
def test_zoom_into_the_middle_is_that_of_scipy(side: int) -> None:
    image = photo(height=side, width=side) / 255
    for factor in (1, 1.01, 1.11, 1.15, 1.3, 2.25, 4.5):
        crop = int(np.ceil(side / factor))
        top = (side - crop) // 2
        large = zoom(image[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
        trim = (large.shape[0] - side) // 2
        expected = large[trim : trim + side, trim : trim + side]
        assert filters.zoom_into_middle(image, factor) == pytest.approx(expected, abs=1e-9)


def test_snow_on_black_falls_on_a_whitened_scene() -> None:
    snowy = corrupt(np.zeros((64, 64, 3), np.uint8), "snow", 1, seed=0) / 255
    assert snowy.min() == pytest.approx(0.2 * 0.5, abs=1 / 255)
    assert np.array_equal(snowy, snowy[::-1, ::-1]), "flakes fall in both directions alike"
    assert snowy.max() > 0.3


@pytest.mark.usefixtures("frost_files")
@pytest.mark.parametrize(("table", "weights"), [("imagenet", (0.7, 0.7)), ("cifar", (0.9, 0.4))])
@pytest.mark.parametrize("side", [48, 336])
def test_frost_is_a_weighted_sum_with_one_of_five_photographs(
    table: str, weights: tuple[float, float], side: int
) -> None:
    sums = {int(min(255, weights[0] * 100 + weights[1] * level)) for level in FROST_LEVELS}
    seen = set()
    for seed in range(25):
        (level,) = np.unique(corrupt(grey(100, side), "frost", 3, seed=seed, table=table))
        seen.add(int(level))
    assert all(min(abs(level - expected) for expected in sums) <= 1 for level in seen)
    assert len(seen) == len(sums)


def test_small_frost_takes_each_fifth_pixel(frost_files: Path) -> None:  # noqa: F811
    grid = np.zeros((FROST_SIDE, FROST_SIDE), np.uint8)
    grid[2::5, 2::5] = 200
    for file in frost_files.iterdir():
        Image.fromarray(grid).save(file, format="PNG")
    assert np.unique(corrupt(grey(0, 32), "frost", 5, seed=0, table="cifar")).tolist() == [90]
    assert corrupt(grey(0, 32), "frost", 5, seed=0).mean() == pytest.approx(150 / 25, rel=0.2)


def test_plasma_reaches_from_0_to_1_and_is_smoother_the_faster_it_decays() -> None:
    smooth, rough = (plasma(64, decay, np.random.default_rng(0)) for decay in (3, 1.4))
    assert (smooth.min(), smooth.max()) == (0, 1)
    assert (rough.min(), rough.max()) == (0, 1)
    steps = [np.abs(np.diff(clouds, axis=axis)).mean() for clouds in (smooth, rough) for axis in (0, 1)]
    assert max(steps[:2]) * 2 < min(steps[2:])
    edge = np.abs(smooth[0] - smooth[-1]).mean()
    assert edge < 3 * max(steps[:2]), "wraps around"


def test_fog_keeps_the_brightest_value() -> None:
    foggy = corrupt(grey(200, 64), "fog", 3, seed=0)
    lowest = 200 * (200 / 255) / (200 / 255 + 2.5)
    assert abs(int(foggy.max()) - 200) <= 1
    assert abs(int(foggy.min()) - lowest) <= 1


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_scales_a_colour_until_its_largest_value_is_raised(severity: int) -> None:
    image = photo()
    value = image.max(axis=2, keepdims=True) / 255
    raised = np.minimum(value + [0.1, 0.2, 0.3, 0.4, 0.5][severity - 1], 1)
    expected = np.where(value > 0, image / np.maximum(value, 1 / 255) * raised, 255 * raised)
    assert np.abs(corrupt(image, "brightness", severity, seed=0) - expected).max() <= 1 + 1e-6


@pytest.mark.parametrize(("table", "share"), [("imagenet", 0.2), ("cifar", 0.4)])
def test_contrast_shrinks_deviations_and_keeps_means(table: str, share: float) -> None:
    image = photo().astype(float)
    means = image.mean(axis=(0, 1))
    flat = corrupt(photo(), "contrast", 3, seed=0, table=table)
    assert np.abs(flat - (means + share * (image - means))).max() <= 1 + 1e-6


def test_elastic_transform_of_a_ramp_shows_the_affine_map() -> None:
    """Severity 1 of the small images displaces nothing: the map alone, which keeps a ramp a ramp."""
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[:, None, None] * 7, 32, axis=1).repeat(3, axis=2)
    image = digital.elastic_transform(ramp / 255, (0, 0, 2.56), np.random.default_rng(4))[8:24, 8:24, 0]
    down, right = np.diff(image, axis=0), np.diff(image, axis=1)
    assert np.ptp(down) < 1e-9
    assert np.ptp(right) < 1e-9
    assert abs(down.mean() - 7 / 255) < 0.5 * 7 / 255
    assert abs(right.mean()) > 1e-4, "sheared"


def test_elastic_displacement_is_blurred_noise() -> None:
    generator = np.random.default_rng(0)
    ours = digital._displacement(40, 50, 12.2, 2.44, generator)
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 40, 50))
    expected = [12.2 * gaussian_filter(noise[axis], 2.44, mode="reflect", truncate=3) for axis in (1, 0)]
    assert ours == pytest.approx(np.stack(expected), abs=1e-9)


def test_elastic_transform_moves_pixels_as_far_as_its_forces_say() -> None:
    """Three points move by a uniform step of at most 2.44 pixels each, then each pixel by about 0.5 more."""
    columns = np.tile(np.linspace(0, 1, 224)[None, :, None], (224, 1, 3))
    force = TABLES["imagenet"]["elastic_transform"][2]
    moved = [digital.elastic_transform(columns, force, np.random.default_rng(seed)) for seed in range(6)]
    shift = np.abs(np.stack(moved) - columns)[:, 60:160, 60:160].mean() * 223
    assert 0.5 < shift < 2.5


@pytest.mark.parametrize(("table", "scale"), [("imagenet", 0.25), ("cifar", 0.65)])
def test_pixelate_is_two_box_resizes(table: str, scale: float) -> None:
    picture = Image.fromarray(photo(height=40, width=64))
    small = picture.resize((int(64 * scale), int(40 * scale)), Image.Resampling.BOX)
    expected = np.asarray(small.resize((64, 40), Image.Resampling.BOX))
    assert np.array_equal(corrupt(np.asarray(picture), "pixelate", 5, seed=0, table=table), expected)


@pytest.mark.parametrize(("table", "quality"), [("imagenet", 7), ("cifar", 40)])
def test_jpeg_compression_is_that_of_pillow(table: str, quality: int) -> None:
    file = BytesIO()
    Image.fromarray(photo()).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file))
    assert np.array_equal(corrupt(photo(), "jpeg_compression", 5, seed=0, table=table), expected)
