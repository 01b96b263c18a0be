"""How strong are cheaper attacks? The feature distance that each reaches, beside what it costs.

    python benchmarks/attack_strength.py
    python benchmarks/attack_strength.py --checkpoint runs/NAME/latest-rank0.pt --images test.tar

Without a checkpoint it pre-trains the quickstart's model with 12 blocks on the embedded photographs first,
two minutes, and continues or finds that run when it is started again. Images should not be of the training.

For every image and attack: the distance (Eq. 7) between the features of the adversarial image, in float32
with the adversarial adapters, and the clean ones, over that of the exact attack (T=2, μ=0.625ε). All start
from the same noise and masks. Cost is counted: 2 MAE steps and the FLOPs of the attack, in MAE steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from approximations import candidates
from attacked_models import load_images, quickstart, recipe_of, test_images, trained_model
from flops import flops_of
from record import environment, write_json
from targets import Target, clean_pass, recorded
from torch import Tensor
from turns import ratios, synchronize

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.losses import l2_distance
from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.models.masking import random_mask
from aemim_algorithm.randomness import uniform_noise
from aemim_algorithm.recipes.estimate import step_flops

REFERENCE, STRONGEST = "T=2, μ=0.625ε", "T=2, μ=2ε"
LARGE = "mae_vit_base_patch16"


def target_of(model: MAE, images: Tensor, *, seed: int, number: int, epsilon: float) -> Target:
    """The clean pass of a batch, with noise and masks of a seed."""
    size = len(images)
    device = images.device
    positions = torch.arange(size, device=device)
    torch.manual_seed(seed * 1000 + number)
    mask = random_mask(size, model.num_patches, model.mask_ratio, device=device)
    noise = uniform_noise(images.shape, seed=seed, batch=number, positions=positions)
    return clean_pass(model, images, mask, noise, epsilon=epsilon)


def reached(target: Target, images: Tensor) -> tuple[Tensor, float]:
    """Feature distance of each image, by the exact encoder, and the reconstruction loss L_a."""
    model = target.model
    with torch.no_grad(), adversarial_mode(model), recorded(model.encoder) as layers:
        loss = model.loss(model((images,), target.mask), (target.images,))
    return l2_distance(layers[-1], target.features), float(loss)


def measure_seed(model: MAE, images: Tensor, *, batch: int, seed: int, epsilon: float) -> dict[str, Any]:
    """Run every attack on the same batches.

    Returns:
        For each attack the values that the table shows, over all images; see ``summary``.
    """
    attacks = candidates(len(model.encoder.blocks))
    raw: dict[str, dict[str, list[Any]]] = {
        name: {"distance": [], "loss": [], "seconds": []} for name in attacks
    }
    clean: list[float] = []
    norms: list[Tensor] = []
    for number, part in enumerate(images.split(batch)):
        target = target_of(model, part, seed=seed, number=number, epsilon=epsilon)
        clean.append(reached(target, target.images)[1])
        norms.append(target.features.square().flatten(1).sum(dim=1))
        for name, candidate in attacks.items():
            start = time.perf_counter()
            adversarial = candidate.attack(target)
            synchronize(part.device.type)
            raw[name]["seconds"].append(time.perf_counter() - start)
            distance, loss = reached(target, adversarial)
            raw[name]["distance"].append(distance)
            raw[name]["loss"].append(loss)
    return summary(raw, clean=statistics.mean(clean), norm=torch.cat(norms))


def summary(raw: dict[str, dict[str, list[Any]]], *, clean: float, norm: Tensor) -> dict[str, Any]:
    """What one seed says of each attack.

    Args:
        raw: By attack: the distances of each batch's images, its loss L_a, its seconds.
        clean: L_a of the clean images: what the adversarial branch makes of them.
        norm: Squared norm of each image's clean features.
    """
    distances = {name: torch.cat(values["distance"]) for name, values in raw.items()}
    losses = {name: statistics.mean(values["loss"]) for name, values in raw.items()}
    rows = {}
    for name, distance in distances.items():
        share = distance / distances[REFERENCE]
        rows[name] = {
            "share": float(share.mean()),
            "share_median": float(share.median()),
            "share_5_percent": float(share.quantile(0.05)),
            "share_of_strongest": float((distance / distances[STRONGEST]).mean()),
            "relative_distance": float((distance / norm).mean()),
            "loss_rise": losses[name] - clean,
            "seconds": statistics.median(raw[name]["seconds"]),
        }
    return rows


def costs(model: MAE, names: Iterable[str]) -> dict[str, float]:
    """FLOPs of a training step with each attack, over those of an MAE step; the model may be on meta."""
    height, width = model.encoder.patch_embed.img_size
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, height, width, device=device)
    mask = torch.arange(model.num_patches, device=device)[None] >= model.num_visible
    step = step_flops(model, (images, torch.zeros(1, dtype=torch.int64, device=device)))
    target = clean_pass(model, images, mask, torch.zeros_like(images), epsilon=2.0)
    attacks = candidates(len(model.encoder.blocks))
    return {name: 2 + flops_of(partial(attacks[name].attack, target)) / step for name in names}


def large_costs(names: Iterable[str]) -> dict[str, float]:
    """The costs on ViT-B/16, without computing anything."""
    with torch.device("meta"):
        model = MODELS[LARGE]()
    assert isinstance(model, MAE)
    AEMIM().attach(model)
    return costs(model, names)


def table(rows: dict[str, Any]) -> str:
    """Markdown: an attack a row."""
    lines = [
        "| attack | after | FLOPs × MAE | ViT-B/16 | share of the exact distance | median | lowest 5% | "
        f"share of {STRONGEST} | rise of L_a × 1000 | time × exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    exact = [seed["seconds"] for seed in rows[REFERENCE]["seeds"]]
    for name, row in rows.items():
        by_key = {key: [seed[key] for seed in row["seeds"]] for key in row["seeds"][0]}
        cells = [
            name,
            row["source"] or "–",
            f"{row['flops']:.2f}",
            f"{row['flops_vit_base']:.2f}",
            spread(by_key["share"]),
            spread(by_key["share_median"]),
            spread(by_key["share_5_percent"]),
            spread(by_key["share_of_strongest"]),
            spread([1000 * rise for rise in by_key["loss_rise"]]),
            spread(ratios(by_key["seconds"], exact)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\nMean ± standard deviation over the seeds.")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Strength and cost of approximate attacks.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="of a run of a mae_ model, its recipe.yaml beside it (a pickle: trust it); default: a new run",
    )
    parser.add_argument("--images", type=Path, help="class folders, a tar of them, or MDS shards")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the default run goes")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--batches", type=int, default=4, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3, help="each has images, masks and noise of its own")
    parser.add_argument("--epsilon", type=float, default=2.0, help="budget, in 1/255")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    default_out = Path(__file__).parent / "results" / f"attack-{device}.json"
    parser.add_argument("--out", type=Path, default=default_out)
    options = parser.parse_args(arguments)
    for name, low in (("batch", 1), ("batches", 1), ("seeds", 2)):
        if getattr(options, name) < low:
            parser.error(f"--{name}={getattr(options, name)}: expected at least {low}")
    if not 0 < options.epsilon <= 255:
        parser.error(f"--epsilon={options.epsilon}: expected more than 0 and at most 255")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        parser.error(f"--checkpoint={options.checkpoint}: no such file; expected a run's latest-rank0.pt")
    options.fail = parser.error
    return options


def measure(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """A row for each attack: what it costs, and what each seed says of it."""
    recipe = recipe_of(checkpoint)
    model = trained_model(checkpoint, recipe, options.device)
    source = options.images or test_images(recipe)
    count = options.batch * options.batches
    seeds = []
    for seed in range(options.seeds):
        images = load_images(source, model, recipe, count=count, seed=seed).to(options.device)
        seeds.append(measure_seed(model, images, batch=options.batch, seed=seed, epsilon=options.epsilon))
    attacks = candidates(len(model.encoder.blocks))
    flops, large = costs(model, attacks), large_costs(attacks)
    return {
        name: {
            "source": candidate.source,
            "flops": flops[name],
            "flops_vit_base": large[name],
            "seeds": [each[name] for each in seeds],
        }
        for name, candidate in attacks.items()
    }


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/attack_strength.py", arguments)
    checkpoint = options.checkpoint or quickstart(options.runs)
    try:
        rows = measure(options, checkpoint)
    except ValueError as error:
        options.fail(str(error))
    settings = {name: getattr(options, name) for name in ("batch", "batches", "epsilon", "device")}
    result |= {"settings": settings | {"seeds": [*range(options.seeds)]}, "attacks": rows}
    write_json(result, options.out)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
