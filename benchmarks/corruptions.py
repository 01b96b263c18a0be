"""How strong and how fast are the corruptions, beside the authors' code and beside a packaged port?

    python benchmarks/corruptions.py --official robustness --sheet corruptions.png

RMSE is the root of the mean squared distance to the clean image, in grey levels, over all photographs. The
port, imagecorruptions-imaug, is compared at 224 pixels only: it has no strengths for 32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from official_corruptions import OfficialCorruptions
from PIL import Image
from record import environment, write_json
from tqdm import tqdm

from aemim_algorithm.data.photos import load_photos
from aemim_algorithm.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

RESULT = Path(__file__).parent / "results" / "corruptions.json"
SIZES = {"cifar": 32, "imagenet": 224}
PHOTOS = ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left", "retina", "rocket", "coins")

Corrupt = Callable[[np.ndarray, str, int, int], np.ndarray]


def photographs(size: int) -> list[np.ndarray]:
    """The middle squares of eight photographs, shape (size, size, 3), uint8."""
    found = []
    for name, photo in load_photos().items():
        if name in PHOTOS:
            side = min(photo.shape[1:])
            top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
            square = photo[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
            found.append(np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((size, size))))
    return found


def implementations(table: str, official: Path | None) -> dict[str, Corrupt]:
    """What can be run: ours always, the authors' from a clone of theirs, the port where it is installed."""
    found: dict[str, Corrupt] = {
        "ours": lambda image, name, severity, seed: corrupt(image, name, severity, seed=seed, table=table)
    }
    if official is not None:
        theirs = OfficialCorruptions(official, table)
        found["official"] = lambda image, name, severity, seed: theirs(image, name, severity, seed=seed)
    if table == "imagenet" and (port := _port()) is not None:
        found["port"] = port
    return found


def _port() -> Corrupt | None:
    try:
        from imagecorruptions import corruptions as port
    except ImportError:
        return None

    def run(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
        np.random.seed(seed)
        seeded = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
        corrupted = getattr(port, name)(Image.fromarray(image), severity, **seeded)
        return np.asarray(corrupted).astype(np.uint8)

    return run


def measure(images: Sequence[np.ndarray], run: Corrupt, name: str, *, seeds: int) -> dict[str, Any]:
    """RMSE at each severity, and images per second over all of them.

    Args:
        images: The clean ones.
        run: The implementation.
        name: The corruption.
        seeds: Corruptions of each image and severity.
    """
    run(images[0], name, 1, 0)  # compiles, reads photographs, fills caches
    rmse, seconds = [], 0.0
    for severity in SEVERITIES:
        squares = []
        for number, image in enumerate(images):
            for seed in range(seeds):
                start = time.perf_counter()
                corrupted = run(image, name, severity, 1000 * number + seed)
                seconds += time.perf_counter() - start
                squares.append(np.square(corrupted.astype(float) - image).mean())
        rmse.append(round(float(np.sqrt(np.mean(squares))), 2))
    return {"rmse": rmse, "images_per_second": round(len(SEVERITIES) * len(images) * seeds / seconds, 1)}


def contact_sheet(path: Path, *, side: int = 112) -> None:
    """One photograph of 224 pixels: a column for each corruption, a row for each severity."""
    image = photographs(224)[0]
    sheet = Image.new("RGB", (side * len(CORRUPTIONS), side * len(SEVERITIES)))
    for column, name in enumerate(CORRUPTIONS):
        for row, severity in enumerate(SEVERITIES):
            tile = Image.fromarray(corrupt(image, name, severity, seed=0)).resize((side, side))
            sheet.paste(tile, (side * column, side * row))
    sheet.save(path)


def table_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table: of each corruption RMSE at the five severities and speed, by implementation."""
    names = list(next(iter(results.values())))
    lines = ["| corruption | " + " | ".join(f"{name}: RMSE, images/s" for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for corruption, by_name in results.items():
        cells = [f"{' '.join(map(str, r['rmse']))}, {r['images_per_second']:.0f}" for r in by_name.values()]
        lines.append(f"| {corruption} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, help="clone of github.com/hendrycks/robustness")
    parser.add_argument("--sheet", type=Path, help="PNG of all corruptions of one photograph to write")
    parser.add_argument("--seeds", type=int, default=2, help="corruptions of each image and severity")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.sheet is not None:
        contact_sheet(options.sheet)
    result = environment("benchmarks/corruptions.py", sys.argv[1:] if arguments is None else arguments)
    for table, size in SIZES.items():
        images, runs = photographs(size), implementations(table, options.official)
        result[table] = {
            name: {who: measure(images, run, name, seeds=options.seeds) for who, run in runs.items()}
            for name in tqdm(CORRUPTIONS, desc=f"{table}, {size} pixels")
        }
        print(f"\n{table}, {size} pixels, {len(images)} photographs, {options.seeds} seeds\n")
        print("\n".join(table_lines(result[table])))
    write_json(result, options.out)


if __name__ == "__main__":
    main()
