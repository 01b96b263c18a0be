"""Which modules Composer gives an FSDP unit of their own."""

from __future__ import annotations

import copy

import pytest
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.models import ComposerModel
from settings import SETTINGS, Setting, every_setting
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block

from aemim_algorithm import AEMIM
from aemim_algorithm.search import resolve_encoder


def units(model: ComposerModel) -> set[str]:
    """Names of the modules that become units."""
    chosen = generate_composer_model_policy(model)._lambda_fn
    return {name for name, module in model.named_modules() if chosen(module)}


@pytest.mark.parametrize("setting", SETTINGS[:5], ids=lambda setting: setting.name)
def test_our_models_have_one_unit_a_block(setting: Setting) -> None:
    """Composer asks the children of a ComposerModel, not the model itself."""
    model = setting.build()
    AEMIM().attach(model)
    blocks = {n for n, m in model.named_modules() if isinstance(m, Block | SwinTransformerBlock)}
    assert blocks
    assert units(model) == blocks | {"encoder", "decoder"}


@every_setting
def test_a_foreign_encoder_gets_a_unit_of_its_own(setting: Setting) -> None:
    """AEMIM calls it outside of the model's forward, when the units around it have let their parameters go."""
    model = setting.build()
    stock = units(model)
    AEMIM(**setting.arguments).attach(model)
    owner, _, encoder = resolve_encoder(model, setting.encoder)
    module = encoder if setting.encoder in dict(model.named_modules()) else owner
    (name,) = (name for name, other in model.named_modules() if other is module)
    assert units(model) == stock | {name}
    assert units(copy.deepcopy(model)) == stock | {name}
