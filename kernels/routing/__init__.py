"""Routed attention: every region of queries attends to the regions that a router chose for it."""

from .api import routed_attention, routing_backends

__all__ = ["routed_attention", "routing_backends"]
