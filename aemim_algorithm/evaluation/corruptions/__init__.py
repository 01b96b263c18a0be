"""The 15 corruptions of ImageNet-C, made on the fly with the official definitions.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv 1903.12261. The official JPEGs of ImageNet-C are what published mCE values stand for: they are
compressed once more (quality 85) and their random numbers were drawn once. Use those where they are at
hand (`aemim_algorithm.evaluation.imagenet_c`), and these for any other data set.
"""

from aemim_algorithm.evaluation.corruptions.apply import Corrupted, corrupt, corrupted_sets
from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES, TABLES

__all__ = ["CORRUPTIONS", "SEVERITIES", "TABLES", "Corrupted", "corrupt", "corrupted_sets"]
