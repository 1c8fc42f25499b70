"""Lengths of padded axes, and of those that an exported graph leaves open."""

import torch

from .backends import exporting


def is_open(*lengths: int) -> bool:
    """Return whether any of some lengths is known only when an exported graph is run."""
    return exporting() and any(isinstance(length, torch.SymInt) for length in lengths)


def padding_to(length: int, multiple: int) -> int:
    """Return by how much a length must grow to be the next multiple.

    Of a length that is known only when an exported graph is run, this sum is simplified to a multiple again, and so are
    the sizes of all maps that follow; of ``-length % multiple`` they are nested remainders, at which tracing takes
    minutes.
    """
    return (length + multiple - 1) // multiple * multiple - length
