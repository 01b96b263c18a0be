"""One process of a run whose parameters must not depend on how many there are: see test_parity.py.

``python parity_worker.py FOLDER``: trains every case, and the first process writes the full parameters after three
optimizer steps to ``<kind>-<number of the case>.pt``.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer.distributed.prepare_distributed
import composer.trainer.trainer
import torch
from composer import Trainer
from composer.algorithms import LayerFreezing
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from composer.utils import FSDP2Config, dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import normalised_images, perturb
from ranks import average_with_gloo, join_world, run_ranks
from settings import BATCH_SIZE, SETTINGS, Setting, with_mask_of_batch, without_randomness
from test_recomputation import wrap_blocks

import aemim_algorithm.algorithm
from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.recipes.parallel import HybridFSDP2Config
from aemim_algorithm.samples import take_samples
from aemim_algorithm.search import resolve_encoder

STEPS = 3
MAE, SWIN, HF_SWIN = "`MAE`", "`SimMIM` on a Swin Transformer", "Hugging Face `SwinForMaskedImageModeling`"
MONOLITH = "a monolith like the original MAE code"


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: Name of a model in the table.
        steps: Attack steps T.
        ratio: Share α.
        micro_batches: Of each process.
        checkpointing: Whether blocks are recomputed in backward.
        compiled: Whether Composer compiles the model.
        seeded: Whether masks are drawn from the seeds of the samples, and not given.
        separate: Whether the clean backward runs before the attack; one process is the reference without.
        strategy: When DDP exchanges gradients, as Composer names it.
    """

    model: str
    steps: int = 1
    ratio: float = 1.0
    micro_batches: int = 1
    checkpointing: bool = False
    compiled: bool = False
    seeded: bool = False
    separate: bool = False
    strategy: str | None = None

    @property
    def reference(self) -> str:
        """The kind that others are compared with; a monolith draws its masks, other ones in each process."""
        return "ddp" if self.model == MONOLITH else "one"


CASES = [
    Case(model, **options)  # type: ignore[arg-type]
    for model in (MAE, SWIN, HF_SWIN)
    for options in (
        {},
        {"steps": 2, "ratio": 0.25, "micro_batches": 2},
        {"steps": 2, "micro_batches": 2, "checkpointing": True},
        {"steps": 2, "ratio": 0.25, "checkpointing": True},
    )
] + [
    Case(MAE, seeded=True),
    Case(SWIN, steps=2, ratio=0.25, seeded=True),
    Case(MAE, steps=2, ratio=0.125, micro_batches=2),  # one rank has nothing to attack
    Case(MAE, steps=2, ratio=0.25, compiled=True),
    Case(SWIN, steps=2, compiled=True),
    Case(MONOLITH, steps=2, ratio=0.25, micro_batches=2),
    Case(MONOLITH, checkpointing=True),
    Case(MAE, separate=True),
    Case(SWIN, steps=2, ratio=0.25, micro_batches=2, checkpointing=True, separate=True),
    Case(HF_SWIN, steps=2, ratio=0.125, micro_batches=2, separate=True),
    Case(MAE, steps=2, ratio=0.25, compiled=True, separate=True),
    Case(MAE, micro_batches=2, separate=True, strategy="multi_auto_sync"),
    Case(MAE, micro_batches=2, separate=True, strategy="forced_sync"),
]

HYBRID_CASES = [
    CASES.index(Case(MAE)),
    CASES.index(Case(SWIN, steps=2, ratio=0.25, micro_batches=2)),
    CASES.index(Case(MAE, separate=True)),
]


def setting_of(case: Case) -> Setting:
    """The case's row of the table."""
    (setting,) = (setting for setting in SETTINGS if setting.name == case.model)
    return setting


def batch_of(case: Case, number: int) -> Any:
    """A global batch."""
    if not case.seeded:
        return setting_of(case).batch(number)
    seeds = torch.arange(BATCH_SIZE) * 10**15 + number
    return {"image": normalised_images(BATCH_SIZE, seed=number), "seed": seeds}


def own_rows(batch: Any) -> Any:
    """This process's samples of a global batch."""
    size = BATCH_SIZE // dist.get_world_size()
    index = torch.arange(size) + dist.get_global_rank() * size
    return take_samples(batch, index, BATCH_SIZE)


def untrained(case: Case) -> ComposerModel:
    """The model that every process starts from; its copies differ from the clean parameters."""
    model = without_randomness(setting_of(case).build())
    if not case.seeded:
        model = with_mask_of_batch(model)
    apply_adapters(model)
    perturb(model)
    return model


def checkpoint_blocks(model: ComposerModel, setting: Setting) -> None:
    """As Composer, or Hugging Face, does it."""
    if setting.needs_transformers:
        for module in model.children():
            module.gradient_checkpointing_enable({"use_reentrant": False})
        return
    owner, _, encoder = resolve_encoder(model, setting.encoder)
    assert wrap_blocks(model, keep=encoder if isinstance(encoder, torch.nn.Module) else owner)


def run(case: Case, kind: str) -> dict[str, Tensor]:
    """Train, and gather the full parameters."""
    setting, model = setting_of(case), untrained(case)
    by_composer = case.checkpointing and kind == "fsdp2" and case.model in (MAE, SWIN)
    if case.checkpointing and not by_composer:
        checkpoint_blocks(model, setting)
    trainer = Trainer(
        model=model,
        train_dataloader=[own_rows(batch_of(case, number)) for number in range(STEPS)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[
            AEMIM(
                steps=case.steps,
                adversarial_ratio=case.ratio,
                separate_backward=case.separate and kind != "one",
                **setting.arguments,
            )
        ],
        max_duration=f"{STEPS}ba",
        device="cpu",
        seed=7,
        device_train_microbatch_size=BATCH_SIZE // dist.get_world_size() // case.micro_batches,
        parallelism_config=parallelism(kind, by_composer),
        ddp_sync_strategy=case.strategy if kind == "ddp" else None,
        compile_config={"backend": "aot_eager"} if case.compiled else None,
        progress_bar=False,
    )
    trainer.fit()
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.state.model.parameters()]
    assert any(sharded) == (kind in ("fsdp2", "hybrid"))
    wrapped = any(isinstance(module, CheckpointWrapper) for module in trainer.state.model.modules())
    assert wrapped == (case.checkpointing and not setting.needs_transformers)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(trainer.state.model, options=options)
    trainer.close()
    torch._dynamo.reset()
    return {name.removeprefix("module."): value for name, value in state.items()}


def parallelism(kind: str, checkpointing: bool) -> dict[str, Any] | None:
    """What the Trainer takes."""
    if kind == "fsdp2":
        return {"fsdp": FSDP2Config(activation_checkpointing=checkpointing)}
    return {"fsdp": HybridFSDP2Config(data_parallel_replicate_degree=2)} if kind == "hybrid" else None


def run_with_unused_parameters(folder: Path) -> None:
    """LayerFreezing makes DDP look for unused parameters: refused on every rank, or right with forced_sync."""
    case = Case(MAE, micro_batches=2)
    world = dist.get_world_size()
    said, state = [], {}
    for strategy in (None, "forced_sync") if world > 1 else (None,):
        model = untrained(case)
        trainer = Trainer(
            model=model,
            train_dataloader=[own_rows(batch_of(case, number)) for number in range(STEPS)],
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            algorithms=[LayerFreezing(freeze_start=1.0), AEMIM(steps=1)],
            max_duration=f"{STEPS}ba",
            device="cpu",
            seed=7,
            device_train_microbatch_size=BATCH_SIZE // world // case.micro_batches,
            ddp_sync_strategy=strategy,
            progress_bar=False,
        )
        try:
            trainer.fit()
        except ValueError as error:
            said.append(str(error))
        state = {name.removeprefix("module."): v for name, v in trainer.state.model.state_dict().items()}
        trainer.close()
    name = "one-unused.pt" if world == 1 else f"unused-{dist.get_global_rank()}.pt"
    torch.save(state if world == 1 else (said, state), folder / name)


def run_with_attack_layer(folder: Path) -> None:
    """Passes that end early are refused under FSDP2 on every rank."""
    case = Case(MAE)
    trainer = Trainer(
        model=untrained(case),
        train_dataloader=[own_rows(batch_of(case, 0))],
        algorithms=[AEMIM(attack_layer="encoder.blocks.0")],
        max_duration="1ba",
        device="cpu",
        device_train_microbatch_size=BATCH_SIZE // 2,
        parallelism_config={"fsdp": FSDP2Config()},
        progress_bar=False,
    )
    try:
        trainer.fit()
    except ValueError as error:
        (folder / f"layer-{dist.get_global_rank()}.txt").write_text(str(error))
    trainer.close()


def run_in_bfloat16(folder: Path) -> None:
    """Notes how far FSDP2's attacked images are from the clean ones, parameters and inputs being bfloat16."""
    # Composer lets no CPU train in it, though autocast and FSDP2 can.
    for module in (composer.trainer.trainer, composer.distributed.prepare_distributed):
        vars(module)["_validate_precision"] = lambda *_: None
    for module in (composer.trainer.trainer, aemim_algorithm.algorithm):
        vars(module)["get_precision_context"] = lambda *_, **__: torch.autocast("cpu", torch.bfloat16)
    distances = {}
    for name in (MAE, HF_SWIN, MONOLITH):
        case, log = Case(name), InMemoryLogger()
        trainer = Trainer(
            model=untrained(case),
            train_dataloader=[own_rows(batch_of(case, 0))],
            algorithms=[AEMIM(**setting_of(case).arguments)],
            max_duration="1ba",
            device="cpu",
            precision="amp_bf16",
            device_train_microbatch_size=BATCH_SIZE // 2,
            parallelism_config={"fsdp": FSDP2Config()},
            loggers=log,
            progress_bar=False,
        )
        trainer.fit()
        assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}  # gathered in bfloat16
        distances[name] = float(log.data["aemim/perturbation_linf"][0][1])
        trainer.close()
    (folder / "bfloat16.json").write_text(json.dumps(distances))


@contextmanager
def noted(folder: Path, what: str) -> Iterator[None]:
    """An error goes to a file, which the test shows."""
    try:
        yield
    except Exception:
        (folder / "error.txt").write_text(f"{what}\n{traceback.format_exc()}")
        raise


def main(folder: Path) -> None:
    """Run every case of every kind that this number of processes has, as one of them."""
    warnings.simplefilter("ignore")
    average_with_gloo()
    join_world()
    world = dist.get_world_size()
    kinds = {1: ("one",), 2: ("ddp", "fsdp2"), 4: ("hybrid",)}[world]
    for kind in kinds:
        for number in HYBRID_CASES if kind == "hybrid" else range(len(CASES)):
            if kind == "fsdp2" and CASES[number].strategy:
                continue  # those are DDP's
            with noted(folder, f"{kind}, {CASES[number]}"):
                state = run(CASES[number], kind)
            if dist.get_global_rank() == 0:
                torch.save(state, folder / f"{kind}-{number}.pt")
    if world < 4:
        with noted(folder, "unused parameters"):
            run_with_unused_parameters(folder)
    if world == 2:
        with noted(folder, "attack layer"):
            run_with_attack_layer(folder)
        with noted(folder, "bfloat16"):
            run_in_bfloat16(folder)  # last: it changes what precision is for this process


if __name__ == "__main__":
    for count in (1, 2, 4):
        if any(run_ranks(count, lambda rank: main(Path(sys.argv[1])), limit=900)):
            sys.exit(1)
