"""Image classification."""

from .data import Digits, InputRule, build_datasets
from .predict import Predictor
from .task import Classify, create_classifier

Task = Classify

__all__ = ["Classify", "Digits", "InputRule", "Predictor", "Task", "build_datasets", "create_classifier"]
