"""Image classification as a task: what the engine trains, and what predicts."""

from .predict import Predictor
from .task import Classify, create_classifier

Task = Classify

__all__ = ["Classify", "Predictor", "Task", "create_classifier"]
