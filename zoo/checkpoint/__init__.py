"""Checkpoints: opened once and safely, taken out of their wrappers, fitted to a model completely or not at all.

All that loads weights does it here: families, backbones, detectors, segmenters, runs that go on, and the commands.
`open_checkpoint` reads a file; a `Checkpoint` may be given wherever a file may, and is not read again. A family renames
its entries, `fit` compares them with the model's, and a `LoadReport` tells what became of each.
"""

from .fitting import LoadReport, absent_counters, check_classes, faults_of, filter_for, fit, load
from .reading import Checkpoint, CheckpointError, backbone_of, open_checkpoint, state_of

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "absent_counters",
    "backbone_of",
    "check_classes",
    "faults_of",
    "filter_for",
    "fit",
    "load",
    "open_checkpoint",
    "state_of",
]
