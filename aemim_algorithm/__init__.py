"""AEMIM: adversarial examples for masked image modeling, as a MosaicML Composer algorithm."""

import composer.algorithms

from aemim_algorithm.adapters import adversarial_mode, apply_adapters, remove_adapters
from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.attack import pgd_attack

__all__ = ["AEMIM", "adversarial_mode", "apply_adapters", "pgd_attack", "remove_adapters"]

# Composer looks algorithms up here when a checkpoint was trained with one that is not passed again.
composer.algorithms.AEMIM = AEMIM  # type: ignore[attr-defined]
