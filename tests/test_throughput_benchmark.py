from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script

from aemim_algorithm.exchange.importing import import_checkpoint, load_start
from aemim_algorithm.models import MODELS

# Stands in for a clone of the original code: it asks today's timm, numpy and import system for the same things.
CLONE = {
    "models_mae.py": """
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from util.pos_embed import positions

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, norm_pix_loss, mlp_ratio,
                 norm_layer, decoder_embed_dim, decoder_depth, decoder_num_heads):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.blocks = torch.nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)
            for _ in range(depth))
        self.pos_embed = torch.nn.Parameter(torch.from_numpy(positions(embed_dim)), requires_grad=False)

    def forward(self, images, mask_ratio=0.75):
        tokens = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.square().mean(), tokens, None
""",
    "util/pos_embed.py": """
import numpy as np

def positions(dim):
    return np.arange(dim, dtype=np.float).astype(np.float32)
""",
}


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("throughput", monkeypatch)


@pytest.fixture
def rivals(throughput: ModuleType) -> ModuleType:
    return sys.modules["rivals"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name, text in CLONE.items():
        file = tmp_path / "mae" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "mae"


def setup(rivals: ModuleType, **changes: Any) -> Any:
    options = {"model": "mae_vit_tiny_patch4", "micro_batch": 4, "precision": "fp32", "device": "cpu"}
    return rivals.Setup(**(options | {"seed": 0, "steps": 1, "mae_repo": None} | changes))


def test_all_train_the_same_model(rivals: ModuleType, tmp_path: Path) -> None:
    """With the same weights and masks the losses agree: no contender computes less than the others."""
    ours, theirs = (rivals.Loop(rivals.CONTENDERS[name], setup(rivals)) for name in ("ours", "Hugging Face"))
    torch.save(theirs.model.state_dict(), tmp_path / "theirs.pt")
    import_checkpoint(tmp_path / "theirs.pt", tmp_path / "start.pt")
    assert load_start(ours.model, tmp_path / "start.pt") == ["encoder", "decoder"]
    losses = []
    for loop in (ours, theirs):
        torch.manual_seed(5)
        losses.append(float(loop.loss()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert rivals.trained_parameters(ours.model) == rivals.trained_parameters(theirs.model)


@pytest.mark.parametrize("name", ["mae_vit_small_patch16", "mae_vit_base_patch16"])
def test_parameters_agree_at_the_measured_sizes(rivals: ModuleType, name: str) -> None:
    contenders = (rivals.CONTENDERS[code] for code in ("ours", "Hugging Face"))
    loops = [rivals.Loop(contender, setup(rivals, model=name, device="meta")) for contender in contenders]
    counts = {rivals.trained_parameters(loop.model) for loop in loops}
    assert len(counts) == 1
    assert counts.pop() > 4e7


def test_every_contender_trains(rivals: ModuleType) -> None:
    for name, contender in rivals.CONTENDERS.items():
        if contender.compiled or contender.code == "original":
            continue
        loop = rivals.Loop(contender, setup(rivals))
        before = {key: value.detach().clone() for key, value in loop.model.named_parameters()}
        loop.step()
        for key, value in loop.model.named_parameters():
            assert torch.equal(value, before[key]) is not value.requires_grad, f"{name}: {key}"
        assert all(value.grad is None for value in loop.model.parameters())


def test_attention_and_optimizer_are_what_the_row_says(rivals: ModuleType) -> None:
    loops = {
        name: rivals.Loop(rivals.CONTENDERS[name], setup(rivals))
        for name in ("Hugging Face", "Hugging Face, eager attention", "Hugging Face, fused AdamW")
    }
    attention = [loop.model.config._attn_implementation for loop in loops.values()]
    assert attention == ["sdpa", "eager", "sdpa"]
    assert [loop.optimizer.defaults["fused"] for loop in loops.values()] == [None, None, True]


def test_a_turn_takes_its_steps(rivals: ModuleType, tmp_path: Path) -> None:
    turn = rivals.turns_of(rivals.CONTENDERS["ours"], setup(rivals, steps=3), tmp_path / "lock")
    assert turn().keys() == {"step"}
    assert turn()["step"] > 0


def test_flops_are_counted_of_each(rivals: ModuleType) -> None:
    flops = rivals.flops_per_image("mae_vit_small_patch16", ["ours", "huggingface"], None)
    # Theirs embeds the hidden patches, too, which is one of the two dozen products of a block for a quarter.
    assert 1 < flops["huggingface"] / flops["ours"] < 1.2
    encoder = 12 * 50 * (24 * 384**2 + 4 * 384 * 50)
    decoder = 8 * 197 * (24 * 512**2 + 4 * 512 * 197)
    assert flops["huggingface"] == pytest.approx(3 * (encoder + decoder), rel=0.03)


def test_the_original_code_runs_from_its_clone(rivals: ModuleType, clone: Path) -> None:
    loop = rivals.Loop(rivals.CONTENDERS["original MAE"], setup(rivals, mae_repo=clone))
    loop.step()
    assert len(loop.model.blocks) == 12
    assert loop.model.pos_embed.shape == (192,)
    assert not [name for name in sys.modules if name.partition(".")[0] in ("util", "models_mae")]
    import numpy as np
    from timm.models import vision_transformer

    assert not hasattr(np, "float")
    assert vision_transformer.Block.__module__ == "timm.models.vision_transformer"


@pytest.mark.parametrize("missing", CLONE)
def test_no_clone_is_one_clear_line(
    throughput: ModuleType, clone: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (clone / missing).unlink()
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--mae-repo", str(clone), "--out", str(clone / "out.json")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--mae-repo={clone}: expected a clone of github.com/facebookresearch/mae" in error
    assert missing in error


def test_another_model_in_the_clone_is_refused(throughput: ModuleType, clone: Path) -> None:
    arguments = ["--models", "mae_vit_tiny_patch4", "--micro-batch", "4", "--precision", "fp32"]
    with pytest.raises(SystemExit, match=r"mae_vit_tiny_patch4: the contenders train .* parameters"):
        throughput.main([*arguments, "--mae-repo", str(clone), "--out", str(clone / "out.json")])
    assert not (clone / "out.json").exists()


def row(seconds: list[float], peak: int) -> dict[str, object]:
    return {"seconds": seconds, "peak_memory_bytes": peak * 2**30}


def combination(precision: str, **contenders: dict[str, object]) -> dict[str, Any]:
    names = {
        "ours": "ours",
        "hf": "Hugging Face",
        "original": "original MAE",
        "eager": "Hugging Face, eager attention",
    }
    return {
        "model": "mae_vit_small_patch16",
        "precision": precision,
        "micro_batch": 8,
        "flops_per_image": {"ours": 10.0, "huggingface": 11.0, "original": 12.0},
        "contenders": {names[key]: value for key, value in contenders.items()},
    }


def test_the_verdict_is_over_the_better_rival_within_rounds(throughput: ModuleType) -> None:
    ours, hf = row([1.0, 10.0, 1.0], 2), row([1.4, 15.0, 1.2], 3)
    original, eager = row([1.2, 11.0, 2.0], 3), row([0.1, 0.1, 0.1], 3)
    found = throughput.verdict(combination("fp32", ours=ours, hf=hf, original=original, eager=eager), "cpu")
    # In the median Hugging Face takes 1.4 s and the original 2.0 s; the rows beside them do not count.
    assert found["rival"] == "Hugging Face"
    assert found["ratios"] == pytest.approx([1.4, 1.5, 1.2])
    assert (found["bar"], found["met"]) == (1.15, True)
    assert throughput.verdict(combination("bf16", ours=ours, hf=hf), "cpu")["bar"] == 1.3
    slower = throughput.verdict(combination("fp32", ours=hf, hf=hf), "cuda")
    assert (slower["bar"], slower["met"]) == (1.3, False)


def test_one_that_finds_no_memory_leaves_the_others_their_rows(
    throughput: ModuleType, rivals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(loop: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rivals.Loop, "turn", full)
    turn = rivals.turns_of(rivals.CONTENDERS["ours"], setup(rivals), tmp_path / "lock")
    found = throughput.outcome({"parts": [turn(), turn()], "seconds": [0.1, 0.1], "peak_memory_bytes": 1})
    assert found == {"failed": "out of memory"}
    fine = row([1.0, 2.0], 2)
    without_ours = combination("fp32", ours=found, hf=fine)
    assert throughput.verdict(without_ours, "cuda") is None
    assert throughput.verdict(combination("fp32", ours=fine, hf=found, original=fine), "cuda")["met"] is False
    lines = throughput.table([without_ours]).splitlines()
    assert lines[2].endswith("| ours | out of memory |  |  | 1.000 |  |  |")
    assert lines[3].endswith("| Hugging Face | 1.500 (1.000–2.000) | 6.0 (4.0–8.0) |  | 1.100 | 2.00 |  |")


def test_the_table(throughput: ModuleType) -> None:
    measured = combination("fp32", ours=row([1.0, 10.0, 2.0], 2), hf=row([1.5, 11.0, 2.0], 3))
    measured["verdict"] = throughput.verdict(measured, "cpu")
    failed = combination("bf16") | {"failed": "the ours process died"}
    lines = throughput.table([measured, failed]).splitlines()
    assert lines[2] == (
        "| mae_vit_small_patch16 | fp32 | 8 | ours | 2.000 (1.000–10.000) | 4.0 (0.8–8.0) "
        "| 1.00 (1.00–1.00) | 1.000 | 2.00 | 1.00 |"
    )
    assert (
        "| Hugging Face | 2.000 (1.500–11.000) | 4.0 (0.7–5.3) | 1.10 (1.00–1.50) | 1.100 | 3.00 | 1.50 |"
        in lines[3]
    )
    assert lines[4].startswith("| mae_vit_small_patch16 | bf16 | 8 | the ours process died |")
    assert lines[-1] == (
        "- mae_vit_small_patch16, fp32, 8 images: 1.10 (1.00–1.50) times the images/s of Hugging Face; "
        "bar 1.15: not met"
    )


def test_end_to_end(
    throughput: ModuleType,
    rivals: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process spends seconds on its imports: two of them show what five would.
    names = ["ours", "Hugging Face"]
    monkeypatch.setattr(throughput, "CONTENDERS", {name: rivals.CONTENDERS[name] for name in names})
    out = tmp_path / "results" / "throughput.json"
    arguments = ["--models", "mae_vit_tiny_patch4", "--micro-batch", "4", "--precision", "bf16"]
    arguments += ["--device", "cpu", "--repeats", "2", "--threads", "1", "--out", str(out)]
    assert throughput.main(arguments) == 0
    result = json.loads(out.read_text())
    (measured,) = result["measured"]
    assert list(measured["contenders"]) == names
    for found in measured["contenders"].values():
        assert len(found["seconds"]) == 2
        assert min(found["seconds"]) > 0
        assert found["peak_memory_bytes"] > 2**27
    assert measured["trained_parameters"] == sum(
        value.numel() for value in MODELS["mae_vit_tiny_patch4"]().parameters() if value.requires_grad
    )
    assert measured["verdict"]["rival"] == "Hugging Face"
    assert "mae_vit_tiny_patch4, bf16, 4 images" in capsys.readouterr().out
    assert result["versions"]["transformers"] != "not installed"
    assert not multiprocessing.active_children()


def test_one_combination_fails_and_the_next_is_tried(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, ends = [], ["the ours process died", "the ours process died", 143]

    def measure(*arguments: object, **options: object) -> None:
        tried.append(None)
        raise SystemExit(ends[len(tried) - 1])

    monkeypatch.setattr(throughput, "measure", measure)
    out = tmp_path / "throughput.json"
    arguments = [
        "--models",
        "mae_vit_tiny_patch4",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert throughput.main([*arguments, "--micro-batch", "4", "8"]) == 1
    failed = [row["failed"] for row in json.loads(out.read_text())["measured"]]
    assert failed == ["the ours process died"] * 2
    with pytest.raises(SystemExit, match="143"):  # the whole benchmark was told to end
        throughput.main([*arguments, "--micro-batch", "4", "8"])
    assert len(tried) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "0"], "--micro-batch=0: expected at least 1"),
        (["--repeats", "0"], "--repeats=0: expected at least 1"),
        (["--models", "resnet"], "invalid choice: 'resnet'"),
    ],
)
def test_bad_arguments(
    throughput: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert message in capsys.readouterr().err
