"""A classifier to fine-tune: a timm ViT or Swin under a new head, started from a pre-trained encoder.

As MAE's fine-tuning does (He et al. 2022, arXiv 2111.06377, Appendix A.1), a ViT averages its patch tokens
and normalises the average with a new norm, ``fc_norm``; the encoder's final norm is dropped. A Swin keeps its
norm and averages, and so do timm's ViTs without an ``fc_norm``, such as ``vit_medium_patch16_gap_240``. The
head of a pre-trained encoder starts near zero, with a standard deviation of 2e-5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import timm
from composer.models import ComposerModel
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from aemim_algorithm.exchange.files import require_fit
from aemim_algorithm.exchange.trained import Trained, resized, window_of
from aemim_algorithm.models.attention import use_our_attention

__all__ = [
    "Architecture",
    "ImageClassifier",
    "architecture_of",
    "build_network",
    "for_size",
    "layer_groups",
    "load_encoder",
    "stored_encoder",
]

Architecture = dict[str, Any]
StateDict = dict[str, Tensor]

_VIT, _SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"  # all their sizes are overridden
_HEAD_STD = 2e-5


class ImageClassifier(ComposerModel):
    """A network under cross-entropy, with top-1 and top-5 accuracy in evaluation.

    Args:
        network: Maps normalised images, shape (batch, 3, height, width), to logits, shape (batch, classes).
        num_classes: Number of classes.
    """

    def __init__(self, network: nn.Module, *, num_classes: int) -> None:
        super().__init__()
        self.network = network
        # Composer asks a model's children: one FSDP unit per block, and blocks are what is recomputed.
        for question in ("fsdp_wrap_fn", "activation_checkpointing_fn"):
            setattr(network, question, _is_block)
        self.scores: dict[str, Metric] = {}
        for k in (1, 5):
            if k < num_classes:
                options: dict[str, Any] = {"average": "micro", "top_k": k}
                self.scores[f"top{k}"] = MulticlassAccuracy(num_classes, validate_args=False, **options)

    def forward(self, batch: Any) -> Tensor:
        """Logits, shape (batch, classes), of ``{"image": ..., "label": ...}`` or ``(images, labels)``."""
        logits: Tensor = self.network(_parts(batch)[0])
        return logits

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Cross-entropy in float32, scalar; labels are classes, shape (batch,), or shares of each class."""
        labels = _parts(batch)[1]
        soft = labels.is_floating_point() and labels.ndim == 2
        return F.cross_entropy(outputs.float(), labels.float() if soft else labels.long())

    def eval_forward(self, batch: Any, outputs: Any = None) -> Tensor:
        """Logits in float32."""
        return self.forward(batch).float()

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """``top1``, and ``top5`` of more than five classes, as fractions; none in training."""
        return {} if is_train else self.scores

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        """Count a batch's hits."""
        metric.update(outputs, _parts(batch)[1])


def architecture_of(encoder: VisionTransformer | SwinTransformer) -> Architecture:
    """What timm builds the same encoder from.

    Args:
        encoder: An encoder of this package, or one of timm's with nothing but sizes changed.

    Returns:
        ``{"name": ..., "kwargs": ...}`` for ``timm.create_model``.
    """
    first = encoder.layers[0].blocks[0] if isinstance(encoder, SwinTransformer) else encoder.blocks[0]
    sizes: dict[str, Any] = {
        "img_size": list(encoder.patch_embed.img_size),
        "patch_size": encoder.patch_embed.patch_size[0],
        "embed_dim": encoder.embed_dim,
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
    }
    if isinstance(encoder, SwinTransformer):
        sizes["window_size"] = window_of(encoder)
        sizes["depths"] = [len(stage.blocks) for stage in encoder.layers]
        sizes["num_heads"] = [stage.blocks[0].attn.num_heads for stage in encoder.layers]
        return {"name": _SWIN, "kwargs": sizes}
    sizes |= {"depth": len(encoder.blocks), "num_heads": first.attn.num_heads}
    if (scale := getattr(first.ls1, "gamma", None)) is not None:
        sizes["init_values"] = float(scale[0])
    return {"name": _VIT, "kwargs": sizes}


def for_size(architecture: Architecture, image_size: int | None) -> Architecture:
    """The same architecture for square images of another size, in pixels; ``None``: as it is."""
    if image_size is None:
        return architecture
    return architecture | {"kwargs": architecture["kwargs"] | {"img_size": [image_size, image_size]}}


def build_network(architecture: Architecture, **options: Any) -> VisionTransformer | SwinTransformer:
    """Build a network with random weights.

    Args:
        architecture: As of `architecture_of`, or ``{"name": timm's name, "kwargs": {}}``.
        **options: Further arguments of ``timm.create_model``.

    Returns:
        The network.

    Raises:
        ValueError: timm knows no such model, cannot build it, or it is neither a ViT nor a Swin.
    """
    name = architecture["name"]
    try:
        network = timm.create_model(name, **architecture["kwargs"], **options)
    except (RuntimeError, TypeError, AssertionError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: timm cannot build it ({reason})") from error
    if not isinstance(network, VisionTransformer | SwinTransformer):
        raise ValueError(f"{name}: got a {type(network).__name__} of timm, expected a ViT or a Swin")
    use_our_attention(network)
    return network


def load_encoder(
    network: VisionTransformer | SwinTransformer,
    state: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    image_size: int,
    whose: str,
) -> None:
    """Start a network from an encoder's weights, strictly; the head starts near zero.

    Args:
        network: What `build_network` made of ``for_size(architecture, image_size)``.
        state: The encoder's state dict in timm's names.
        architecture: The encoder's, as it was trained.
        image_size: Side of the network's images, in pixels; positions are interpolated to it.
        whose: What the state is called in a message.

    Raises:
        ValueError: The state is that of another architecture; the line names what does not fit.
    """
    encoder = stored_encoder(architecture, state, whose)
    if tuple(encoder.patch_embed.img_size) != (image_size, image_size):
        holder = nn.Module()
        holder.encoder = encoder
        size = (image_size, image_size)
        state = resized(Trained(dict(state), model=holder), image_size=size, window_size=None).encoder
    dropped = isinstance(network.norm, nn.Identity)  # of the ViTs that norm the average instead
    kept = {name: value for name, value in state.items() if not (dropped and name.startswith("norm."))}
    own = {k: v for k, v in network.state_dict().items() if k.startswith(("head.", "fc_norm."))}
    require_fit(network, kept | own, whose=whose)
    network.load_state_dict(kept | own)
    nn.init.trunc_normal_(_head(network).weight, std=_HEAD_STD)


def layer_groups(
    network: nn.Module, *, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer in which the learning rate falls with the distance to the head (BEiT, A.4).

    With ``n`` blocks, block ``i`` of 1 to ``n`` has learning_rate * layer_decay^(n + 1 - i), the embedding
    with tokens and positions is block 0, the head and the norm before it have all of the rate. A Swin's
    blocks count through all of its stages, a merging of patches belongs to the block after it, and the final
    norm to the last block. The rates are timm's; they stand in each group's ``lr``, as Composer's schedulers
    multiply that and look at no ``lr_scale``.

    Args:
        network: A ViT or Swin of timm.
        learning_rate: Of the head.
        weight_decay: Of matrices; vectors, tokens and position embeddings have none.
        layer_decay: Factor from a block to the one before it, in (0, 1].

    Returns:
        The groups, each with ``params``, ``lr``, ``weight_decay``.
    """
    spared: set[str] = getattr(network, "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        network, weight_decay=weight_decay, no_weight_decay_list=tuple(spared), layer_decay=layer_decay
    )
    return [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": learning_rate * group["lr_scale"],
        }
        for group in groups
    ]


def stored_encoder(
    architecture: Architecture, state: Mapping[str, Tensor], whose: str
) -> VisionTransformer | SwinTransformer:
    """The bare encoder at the image size that its weights are for: an export may have changed that."""
    encoder = build_network(architecture, num_classes=0, global_pool="")
    position = state.get("pos_embed")
    if isinstance(encoder, VisionTransformer) and position is not None and encoder.pos_embed is not None:
        side = math.isqrt(position.shape[1] - encoder.num_prefix_tokens)
        square = side * side == position.shape[1] - encoder.num_prefix_tokens
        if square and position.shape[1] != encoder.pos_embed.shape[1]:
            encoder.set_input_size(img_size=[side * cell for cell in encoder.patch_embed.patch_size])
    require_fit(encoder, state, whose=whose)
    return encoder


def _head(network: VisionTransformer | SwinTransformer) -> nn.Linear:
    head = network.head.fc if isinstance(network, SwinTransformer) else network.head
    assert isinstance(head, nn.Linear)
    return head


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__ in ("Block", "SwinTransformerBlock")


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        return batch["image"], batch["label"]
    return batch[0], batch[1]
