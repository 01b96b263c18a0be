"""AEMIM under Composer's Trainer, and its step without one."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Algorithm, Event, State
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from conftest import (
    assert_same,
    clean_part,
    fit,
    loader,
    normalised_images,
    perturb,
    recorded_passes,
    tiny_mae,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import aemim_algorithm
from aemim_algorithm import AEMIM, adversarial_mode
from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.models import MAE


class Spy(Algorithm):
    """Runs after AEMIM's passes and keeps what they made."""

    def __init__(self, aemim: AEMIM) -> None:
        self.aemim = aemim
        self.results: list[Any] = []
        self.losses: list[dict[str, Tensor]] = []

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_LOSS, Event.BEFORE_BACKWARD)

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.BEFORE_LOSS:
            self.results.append((state.batch, state.outputs, self.aemim._get_step().result))
            assert all(p.grad is None for p in state.model.parameters())
        else:
            self.losses.append(state.loss)


def perturbed(aemim: AEMIM, model: MAE, scale: float = 0.3) -> MAE:
    """Attach and make the copies differ from the clean adapters."""
    aemim.attach(model)
    perturb(model, scale)
    return model


@pytest.mark.parametrize(
    "aemim", [AEMIM(loss_ratio=1.0), AEMIM.fast(loss_ratio=1.0), AEMIM(loss_ratio=1.0, adapter="none")]
)
@pytest.mark.parametrize("micro", [8, 4])
def test_with_loss_ratio_one_a_run_equals_the_baseline_bitwise(aemim: AEMIM, micro: int) -> None:
    """The attack runs, and leaves no trace: not in weights, not in the masks that come after."""
    baseline, attacked = tiny_mae(), perturbed(aemim, tiny_mae())
    for model in (baseline, attacked):  # dropout draws from the same generators as the masks
        model.encoder.blocks[0].mlp.drop1.p = 0.2
    fit(baseline, micro=micro, duration="4ba")
    fit(attacked, aemim, micro=micro, duration="4ba")
    stock, trained = baseline.state_dict(), clean_part(attacked.state_dict())
    assert list(stock) == list(trained)
    assert all(torch.equal(stock[name], trained[name]) for name in stock)


class NoMaskArgument(MAE):
    """Draws its mask in forward, where only a replay of the generators can repeat it."""

    def forward(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(batch)


@pytest.mark.parametrize("kind", [MAE, NoMaskArgument])
def test_without_budget_and_adapters_both_losses_are_equal(kind: type[MAE]) -> None:
    """Everything random must repeat: the mask, dropout in the encoder, dropout in the decoder."""
    aemim, model = AEMIM(epsilon=0, adapter="none", steps=1), tiny_mae(kind=kind)
    for block in (model.encoder.blocks[0], model.decoder.blocks[0]):
        block.mlp.drop1.p = 0.3
    spy = Spy(aemim)
    fit(model, aemim, spy)
    for (_, outputs, result), loss in zip(spy.results, spy.losses, strict=True):
        assert torch.equal(result.outputs["mask"], outputs["mask"])
        assert not any(distance.any() for distance in result.distances)
        assert torch.allclose(loss["clean"], loss["adversarial"], rtol=1e-6)
        assert torch.allclose(loss["total"], loss["clean"], rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.25])
@pytest.mark.parametrize("adversarial_loss", ["l2", "kl", "reconstruction"])
def test_invariants_of_a_step(ratio: float, adversarial_loss: str) -> None:
    aemim = AEMIM(adversarial_ratio=ratio, adversarial_loss=adversarial_loss)
    model = perturbed(aemim, tiny_mae())
    reference = copy.deepcopy(model)
    spy = Spy(aemim)
    fit(model, aemim, spy, duration="1ba")
    batch, outputs, result = spy.results[0]
    assert len(result.images) == 8 * ratio

    # The originals are samples of the clean batch, and the target is theirs.
    rows = [int((batch[0] == image).flatten(1).all(1).nonzero()) for image in result.clean_images]
    assert torch.equal(result.batch[0], batch[0][rows])
    assert torch.equal(result.batch[1], batch[1][rows])
    # Both passes have the same mask.
    assert torch.equal(result.outputs["mask"], outputs["mask"][rows])
    # The visible patches moved, inside the budget.
    assert result.perturbation.max() == pytest.approx(2.0, abs=1e-4)
    hidden = outputs["mask"][rows][:, :, None].expand(-1, -1, 48)
    moved = _patches(result.images - result.clean_images).abs()
    assert moved[~hidden].mean() > 1.2 * moved[hidden].mean() > 0
    # Each sample's distance exceeds the one after noise alone, and grows with the steps.
    noise, first, last = result.distances
    if adversarial_loss != "reconstruction":
        assert (noise < first).all()
        assert (first < last).all()

    # L_a by hand: the untrained model in adversarial mode, on x_a, against the clean target.
    with adversarial_mode(reference):
        prediction = reference.forward(result.images, mask=outputs["mask"][rows])
    expected = reference.loss(prediction, batch[0][rows])
    assert torch.allclose(spy.losses[0]["adversarial"], expected, rtol=1e-5)
    leaked = reference.loss(prediction, result.images)
    assert not torch.allclose(expected, leaked, rtol=1e-5)
    # L_c by hand, in clean mode.
    clean = reference.loss(reference.forward(batch, mask=outputs["mask"]), batch)
    assert torch.allclose(spy.losses[0]["clean"], clean, rtol=1e-5)


def _patches(images: Tensor) -> Tensor:
    from aemim_algorithm.models.masking import patchify

    return patchify(images, 4)


def test_adversarial_parameters_are_trained_in_their_twins_group() -> None:
    aemim, model = AEMIM(), tiny_mae()
    trainer = fit(model, aemim)
    (group,) = trainer.state.optimizers[0].param_groups
    trained = {id(p) for p in group["params"]}
    fresh = dict(tiny_mae().named_parameters())
    for name, parameter in model.named_parameters():
        if "adversarial" in name:
            assert id(parameter) in trained
            assert not torch.equal(parameter, fresh[name.replace("adversarial.", "")]), f"{name} did not move"
    assert any(
        not torch.equal(clean, copied) for adapter in adapters_of(model) for clean, copied in adapter.twins()
    )


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_a_branch_never_touches_the_other_ones_adapters(branch: str) -> None:
    """Loss ratio 1 or 0: the other branch's adapters get a zero gradient, and stay (no decay here)."""
    aemim = AEMIM(loss_ratio=1.0 if branch == "clean" else 0.0)
    model = perturbed(aemim, tiny_mae())
    pairs = [pair for adapter in adapters_of(model) for pair in adapter.twins()]
    losses = aemim.training_loss(model, normalised_images(8), step=0)
    losses["total"].backward()
    own, other = (
        zip(*pairs, strict=True) if branch == "clean" else zip(*[p[::-1] for p in pairs], strict=True)
    )
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
    assert all(p.grad is None or not p.grad.any() for p in other)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("aemim", [AEMIM(), AEMIM.fast(), AEMIM(adversarial_ratio=0.3)])
def test_micro_batches_add_up_to_the_batch(aemim: AEMIM, micro: int) -> None:
    """The same samples, noise and weights whatever the split; masks are in the batch to be equal."""

    class Masked(MAE):
        def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
            return super().forward(batch, batch[1] if mask is None else mask)

    mask = torch.stack(
        [torch.randperm(16, generator=torch.Generator().manual_seed(i)) >= 4 for i in range(16)]
    )
    data = DataLoader(TensorDataset(normalised_images(16), mask), batch_size=8)
    states = []
    for size in (8, micro):
        torch.manual_seed(0)
        model = Masked(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2,
                       decoder_dim=16, decoder_depth=1, decoder_heads=2).double()  # fmt: skip
        batches = [(images.double(), masks) for images, masks in data]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model=model, train_dataloader=batches, optimizers=optimizer, algorithms=[aemim],
                          max_duration="2ba", device="cpu", device_train_microbatch_size=size,
                          progress_bar=False, seed=7)  # fmt: skip
        trainer.fit()
        trainer.close()
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-5, atol=1e-7), name


def test_a_mask_drawn_inside_the_encoder_is_the_same_in_both_passes() -> None:
    """No argument and no output carries the mask: the generators must be replayed."""

    class Inside(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = DrawsItsMask()
            self.decoder = nn.Linear(8, 768)

        def forward(self, batch: Any) -> Tensor:
            return self.decoder(self.encoder(batch[0]))

        def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            return (outputs - batch[0].flatten(1)).square().mean()

    class DrawsItsMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(768, 8), nn.LayerNorm(8)
            self.masks: list[Tensor] = []

        def forward(self, images: Tensor) -> Tensor:
            keep = torch.rand(len(images), 768) < 0.5
            self.masks.append(keep)
            return self.norm(self.layer(images.flatten(1) * keep))

    for ratio in (1.0, 0.25):
        torch.manual_seed(0)
        aemim, model = AEMIM(adversarial_ratio=ratio), Inside()
        spy = Spy(aemim)
        fit(model, aemim, spy, duration="1ba")
        masks = model.encoder.masks
        chosen = int(8 * ratio)
        # clean pass, a clean reference if the batch shrank, two attack steps, the adversarial pass
        assert [len(m) for m in masks] == [8] + [chosen] * (3 if ratio == 1 else 4)
        assert all(torch.equal(m, masks[-1]) for m in masks[1:])
        assert ratio < 1 or torch.equal(masks[0], masks[1])
        result = spy.results[0][2]
        assert result.distances[-1].mean() > 1.5 * result.distances[0].mean()


class ConvolutionalMIM(ComposerModel):
    """Batch normalization, and a mask that is drawn inside the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MaskedConvolution()
        self.decoder = nn.Conv2d(6, 3, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.decoder(self.encoder(batch[0]))

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - batch[0]).square().mean()


class MaskedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layer(images * (torch.rand(len(images), 1, 16, 16) < 0.5)))


@pytest.mark.parametrize("adapter", ["norm", "none"])
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_running_statistics_see_one_batch_a_step(adapter: str, ratio: float) -> None:
    """Clean ones the clean batch, adversarial ones x_a: no attack step, no reference pass."""
    torch.manual_seed(0)
    model, baseline = ConvolutionalMIM(), ConvolutionalMIM()
    baseline.load_state_dict(model.state_dict())
    fit(model, AEMIM(adapter=adapter, adversarial_ratio=ratio, loss_ratio=1.0))
    fit(baseline)
    norm, stock = model.encoder.norm, baseline.encoder.norm
    assert norm.num_batches_tracked == 2
    assert torch.equal(norm.running_mean, stock.running_mean)
    assert torch.equal(norm.running_var, stock.running_var)
    if adapter == "norm":
        assert norm.adversarial.num_batches_tracked == 2
        assert not torch.allclose(norm.adversarial.running_var, stock.running_var, rtol=1e-4)


def test_the_reference_of_a_share_has_the_statistics_of_that_share() -> None:
    """Batch normalization makes features depend on their batch: that is no adversarial distance."""

    class Masked(ConvolutionalMIM):
        def forward(self, batch: Any, mask: Tensor | None = None) -> Any:
            images, mask = batch[0], torch.ones(len(batch[0]), 1, 16, 16) if mask is None else mask
            return {"prediction": self.decoder(self.encoder(images * mask)), "mask": mask}

        def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            return super().loss(outputs["prediction"], batch)

    torch.manual_seed(0)
    model, aemim = Masked(), AEMIM(adversarial_ratio=0.25, epsilon=0, adapter="none")
    model.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    spy = Spy(aemim)
    fit(model, aemim, spy, duration="1ba")
    assert not any(distance.any() for distance in spy.results[0][2].distances)
    assert model.encoder[1].num_batches_tracked == 1  # of the clean pass alone


class HeadInLoss(MAE):
    """A normalization layer, a running centre and dropout that act in ``loss``."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.head = nn.Sequential(nn.Linear(48, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.register_buffer("center", torch.zeros(4))

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        projected = self.head(outputs["prediction"].flatten(0, 1))
        self.center.mul_(0.9).add_(projected.detach().mean(0), alpha=0.1)
        return super().loss(outputs, batch) + (projected - self.center).square().mean()


def test_the_loss_of_a_branch_uses_its_adapters_and_leaves_the_other_ones_buffers() -> None:
    aemim = AEMIM(loss_ratio=1.0)
    baseline, attacked = tiny_mae(kind=HeadInLoss), perturbed(aemim, tiny_mae(kind=HeadInLoss))
    fit(baseline)
    fit(attacked, aemim)
    assert_same(clean_part(attacked.state_dict()), baseline.state_dict())
    aemim = AEMIM(loss_ratio=0.0)
    model = perturbed(aemim, tiny_mae(kind=HeadInLoss))
    model.train()
    aemim.training_loss(model, normalised_images(8), step=0)["total"].backward()
    norm = model.head[1]
    assert norm.weight.grad is None or not norm.weight.grad.any()
    assert norm.adversarial.weight.grad.any()


def test_what_a_loss_draws_is_the_same_for_both_branches() -> None:
    aemim, model = AEMIM(epsilon=0, adapter="none"), tiny_mae(kind=HeadInLoss)
    model.loss = lambda outputs, batch: F.dropout(outputs["prediction"], 0.5).square().mean()  # type: ignore[method-assign]
    spy = Spy(aemim)
    fit(model, aemim, spy)
    for losses in [*spy.losses, aemim.training_loss(model, normalised_images(8), step=0)]:
        assert torch.allclose(losses["adversarial"], losses["clean"], rtol=1e-6)


def test_logs_losses_distances_and_perturbation() -> None:
    logger = InMemoryLogger()
    fit(tiny_mae(), AEMIM(), loggers=[logger], micro=4)
    for name in ("loss/train/clean", "loss/train/adversarial", "loss/train/total"):
        assert len(logger.data[name]) == 2
    value = {name: [float(v) for _, v in entries] for name, entries in logger.data.items()
             if name.startswith(("aemim", "loss"))}  # fmt: skip
    first, last = value["aemim/feature_distance/first_step"], value["aemim/feature_distance/last_step"]
    assert all(0 < f < x for f, x in zip(first, last, strict=True))
    assert value["aemim/perturbation_linf"] == pytest.approx([2.0, 2.0], abs=1e-4)
    mixed = [
        0.5 * c + 0.5 * a
        for c, a in zip(value["loss/train/clean"], value["loss/train/adversarial"], strict=True)
    ]
    assert value["loss/train/total"] == pytest.approx(mixed, rel=1e-5)


def test_evaluation_and_prediction_are_not_its_business() -> None:
    aemim = AEMIM()
    assert {event for event in Event if aemim.match(event, None)} == {  # type: ignore[arg-type]
        Event.INIT, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH, Event.EPOCH_CHECKPOINT,
    }  # fmt: skip


def test_resuming_is_bitwise_and_readds_the_algorithm(tmp_path: Any) -> None:
    whole = tiny_mae()
    fit(whole, AEMIM.fast(), duration="4ba", train_dataloader=loader(32))
    arguments = dict(save_folder=str(tmp_path), save_interval="1ba", save_filename="{batch}.pt")  # noqa: C408
    fit(tiny_mae(), AEMIM.fast(), duration="2ba", train_dataloader=loader(32), **arguments)
    resumed = tiny_mae(seed=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(resumed, duration="4ba", train_dataloader=loader(32), load_path=str(tmp_path / "2.pt"))
    assert any("AEMIM(epsilon=2.0, steps=1" in str(w.message) for w in caught)
    assert list(whole.state_dict()) == list(resumed.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("poisoned", ["clean", "adversarial"])
def test_a_nan_stops_the_run_before_the_step_and_names_batch_and_branch(poisoned: str) -> None:
    aemim = AEMIM()
    model = perturbed(aemim, tiny_mae())
    twins = next(adapter for adapter in adapters_of(model.decoder)).twins()
    clean, adversarial = next(iter(twins))
    bad = clean if poisoned == "clean" else adversarial
    with torch.no_grad():
        bad[0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=f"batch 0: the {poisoned} loss is NaN") as error:
        fit(model, aemim)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[n]) or v.isnan().any() for n, v in model.state_dict().items())


def test_samples_are_chosen_among_the_images_not_the_first_tensor() -> None:
    model, aemim = tiny_mae(), AEMIM(adversarial_ratio=0.5)
    aemim.attach(model)
    result = recorded_passes(aemim)
    aemim.training_loss(model, {"anchor": torch.ones(3), "image": normalised_images(8)}, step=0)
    assert len(result[0].images) == 4


def test_any_buffer_is_left_to_the_clean_pass() -> None:
    """Not only batch normalization's: a teacher's centre, a codebook, a counter."""

    class Counting(MAE):
        def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
            self.count.add_(1)
            return super().forward(batch, mask)

    for ratio in (1.0, 0.25):
        model = tiny_mae(kind=Counting)
        model.register_buffer("count", torch.zeros(()))
        fit(model, AEMIM(adversarial_ratio=ratio, adversarial_loss="reconstruction"))
        assert model.count == 2


def test_named_parts_of_the_clean_loss_are_kept() -> None:
    class Parts(MAE):
        def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            pixels = super().loss(outputs, batch)
            return {"pixels": pixels, "total": 2 * pixels}

    logger = InMemoryLogger()
    fit(tiny_mae(kind=Parts), AEMIM(epsilon=0, adapter="none"), loggers=[logger])
    pixels, total = (logger.data[f"loss/train/{name}"][0][1] for name in ("pixels", "total"))
    assert total == pytest.approx(2 * pixels)


def test_images_outside_the_pixel_range_warn_once() -> None:
    aemim = AEMIM(mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    aemim.attach(model := tiny_mae())
    with pytest.warns(UserWarning, match=r"leave the pixel range .*pass AEMIM\(mean") as caught:
        for step in range(4):  # the first batch looks well
            aemim.training_loss(model, (0.1 if step == 0 else 3) * normalised_images(4), step=step)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [("epsilon", -1.0, r"\[0, 255\]"), ("epsilon", "2", r"\[0, 255\]"), ("steps", -1, "integer >= 0"),
     ("steps", 2.0, "integer >= 0"), ("step_size", 0.0, r"\(0, inf\)"), ("adversarial_ratio", 0.0, r"\(0, 1\]"),
     ("adversarial_ratio", 1.5, r"\(0, 1\]"), ("loss_ratio", 1.01, r"\[0, 1\]"), ("loss_ratio", float("nan"), r"\[0, 1\]"),
     ("adversarial_loss", "l1", "'kl', 'l2', 'reconstruction'"), ("adapter", "layer", "'both', 'cls_token', 'none', 'norm'"),
     ("mean", 0.5, "for each channel"), ("std", (1, 1, 0), r"\(0, 1\] for each"), ("mean", (123, 116, 103), r"\[0, 1\] for each"), ("encoder", 3, "dotted path")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(argument: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=.*{allowed}"):
        AEMIM(**{argument: value})  # type: ignore[arg-type]


def test_fast_is_the_papers_fast_variant() -> None:
    assert AEMIM.fast() == AEMIM(steps=1, adversarial_ratio=0.25)
    assert AEMIM.fast(steps=3, epsilon=4) == AEMIM(steps=3, adversarial_ratio=0.25, epsilon=4)


def test_repr_rebuilds_it_and_copies_are_unattached() -> None:
    aemim = AEMIM(epsilon=1.5, encoder="encoder", adapter="cls_token")
    aemim.attach(tiny_mae())
    for twin in (eval(repr(aemim)), copy.deepcopy(aemim), pickle.loads(pickle.dumps(aemim))):
        assert twin == aemim
        assert hash(twin) == hash(aemim)
        assert twin._step is None
    assert aemim != AEMIM()
    assert aemim_algorithm.AEMIM is __import__("composer.algorithms").algorithms.AEMIM


class Classifier(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1] % 2)


def test_other_adapters_than_the_models_own_are_refused() -> None:
    model = tiny_mae()
    AEMIM().attach(model)
    AEMIM(epsilon=1.0).attach(model)
    for adapter in ("none", "cls_token", "both"):
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=f"adapter='{adapter}'.* has adapters of another kind"):
            AEMIM(adapter=adapter).attach(model)
        assert list(model.state_dict()) == before


class TwoViews(MAE):
    """Its encoder is called twice in a forward: for a target, and for the prediction."""

    target_first = True

    def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        if self.target_first:
            self.target(batch)
        outputs = super().forward(batch, mask)
        if not self.target_first:
            self.target(batch)
        return outputs

    def target(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self.encoder(batch[0])


@pytest.mark.parametrize("target_first", [True, False])
def test_an_encoder_that_is_called_twice_is_refused(target_first: bool) -> None:
    """The attack would hit the target, or the target would come from the adversarial adapters."""
    model = tiny_mae(kind=TwoViews)
    model.target_first = target_first
    with pytest.raises(ValueError, match="the encoder 'encoder' was called 2 times in one forward pass"):
        fit(model, AEMIM())


def test_bad_models_get_one_clear_line_at_init() -> None:
    with pytest.raises(ValueError, match="found no encoder in Classifier") as error:
        fit(Classifier(), AEMIM())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="adapter='norm' found nothing to adapt: Classifier") as error:
        fit(Classifier(), AEMIM(encoder="net"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="encoder='net.head' names nothing in Classifier"):
        fit(Classifier(), AEMIM(encoder="net.head"))
