"""Segmentation as a task: what the engine trains, and what predicts."""

from .predict import Predictor
from .task import Segment

Task = Segment

__all__ = ["Predictor", "Segment", "Task"]
