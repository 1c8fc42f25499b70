"""Attention operators as functions, each with a plain-torch reference beside its fast paths."""

from .neighborhood import na2d

__all__ = ["na2d"]
