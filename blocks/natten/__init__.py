"""NATTEN's names on foveate's operators: what was written for one of its releases from 0.14 to 0.21 runs again.

NATTEN dropped its unfused operators, the position bias and its CPU path; the same names changed meaning between
releases, so a release is always named. ``foveate.natten.release("0.15")`` is a namespace, ``foveate.natten.install()``
puts one where ``import natten`` finds it. Nothing is installed unless asked for. docs/coming_from_natten.md says what
differs.
"""

from .installation import install, uninstall
from .names import release

__all__ = ["install", "release", "uninstall"]
