"""Composer callbacks: pictures, probes, whole checkpoints, counted broken images, a guard against NaN."""

from aemim_algorithm.callbacks.atomic_checkpoints import AtomicCheckpoints
from aemim_algorithm.callbacks.broken_images import BrokenImages
from aemim_algorithm.callbacks.online_probe import OnlineProbe
from aemim_algorithm.callbacks.pictures import ReconstructionPictures
from aemim_algorithm.finite import FiniteCheck

__all__ = ["AtomicCheckpoints", "BrokenImages", "FiniteCheck", "OnlineProbe", "ReconstructionPictures"]
