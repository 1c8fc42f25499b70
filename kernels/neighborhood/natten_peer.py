"""Neighborhood attention by an installed NATTEN, on request: calls without bias, from 0.20 on, in its own layout."""

import importlib
import importlib.metadata
import importlib.util
import inspect
from types import ModuleType

import torch
from torch import Tensor

from ..backends import export_obstacle
from .problem import Problem


def _installed() -> tuple[ModuleType | None, str | None]:
    """Return NATTEN, or None and why it is not there."""
    spec = importlib.util.find_spec("natten")
    if spec is None:
        return None, "natten is not installed"
    if spec.origin == "foveate.natten":
        return None, "the natten of this process is foveate.natten, which calls these operators itself"
    try:
        return importlib.import_module("natten"), None
    except Exception as error:  # a build for another torch or driver may raise anything
        return None, f"natten does not import: {type(error).__name__}: {error}"


def obstacle(problem: Problem) -> str | None:
    """Return why an installed NATTEN cannot take a call, or None if it may."""
    if problem.rpb is not None:
        return "NATTEN has no relative position bias"
    if problem.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"NATTEN takes float32, float16 and bfloat16; got {problem.query.dtype}"
    natten, reason = _installed()
    if natten is None:
        return reason
    operator = getattr(natten, f"na{len(problem.axes)}d", None)
    parameters = inspect.signature(operator).parameters if callable(operator) else ()
    if "stride" not in parameters:
        return f"natten {_version(natten)} is older than 0.20"
    if problem.with_lse and "return_lse" not in parameters:
        return f"natten {_version(natten)} returns no log-sum-exp"
    return export_obstacle()


def _version(natten: ModuleType) -> str:
    return getattr(natten, "__version__", "of unknown version")


def neighborhood_natten(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention by NATTEN; see `api.na2d` for the arguments.

    Raises:
        ValueError: If NATTEN itself refuses the call; the message is its own.
    """
    natten, _ = _installed()
    axes = problem.axes
    operator = getattr(natten, f"na{len(axes)}d")
    with_lse = {"return_lse": True} if problem.with_lse else {}
    try:
        out = operator(
            problem.query,
            problem.key,
            problem.value,
            kernel_size=tuple(axis.kernel_size for axis in axes),
            stride=tuple(axis.stride for axis in axes),
            dilation=tuple(axis.dilation for axis in axes),
            is_causal=tuple(axis.is_causal for axis in axes),
            scale=problem.scale,
            additional_keys=problem.additional_keys,
            additional_values=problem.additional_values,
            **with_lse,
        )
    except (NotImplementedError, ValueError) as error:
        version = _version(natten)
        raise ValueError(f"na{len(axes)}d's backend 'natten' cannot run here: {version} says: {error}") from error
    return out if problem.with_lse else (out, None)
