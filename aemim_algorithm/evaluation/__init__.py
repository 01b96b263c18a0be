"""How good are the features of a frozen encoder: k-NN and linear probe."""

from aemim_algorithm.evaluation.features import extract_features
from aemim_algorithm.evaluation.frozen import evaluate_encoders
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import (
    fit_logistic_regression,
    linear_probe_accuracy,
)

__all__ = [
    "evaluate_encoders",
    "extract_features",
    "fit_logistic_regression",
    "knn_accuracy",
    "linear_probe_accuracy",
]
