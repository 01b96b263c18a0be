"""Composer callbacks: pictures of reconstructions, and a guard against losses that are not finite."""

from aemim_algorithm.callbacks.finite_loss import FiniteLoss
from aemim_algorithm.callbacks.pictures import ReconstructionPictures

__all__ = ["FiniteLoss", "ReconstructionPictures"]
