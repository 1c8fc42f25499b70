"""Object detection and instance segmentation as a task: what the engine trains, and what predicts."""

from .predict import Predictor
from .task import Detect

Task = Detect

__all__ = ["Detect", "Predictor", "Task"]
