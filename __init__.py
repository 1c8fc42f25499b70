"""Foveate: a zoo of vision attention models, registered as timm models.

Importing the package registers every backbone, so that ``timm.create_model("nat_tiny")`` works. The import stays
light: torch and timm, nothing else; no network.
"""

from importlib.metadata import version

from .zoo import create_backbone, list_models

__all__ = ["__version__", "create_backbone", "list_models"]
__version__ = version("foveate")
