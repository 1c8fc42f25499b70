"""Pytest plugin that points timm's own ``tests/test_models.py`` at this package's models and at nothing else.

Loaded with ``-p`` before timm's tests are collected. It hides timm's models from the lists that the tests select from,
and offers no pretrained ones: those tests would need the network.
"""

import os

import timm
import timm.models

MARKERS = (
    *("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript"),
    *("features", "fxforward", "fxbackward", "timeout"),
)
_before = set(timm.models.list_models())
import foveate  # noqa: E402, F401

_ours = set(timm.models.list_models()) - _before
_chosen = set(filter(None, os.environ.get("FOVEATE_CONTRACT_MODELS", "").split(","))) or _ours
_list_models = timm.models.list_models


def _list_ours(*args, module="", pretrained=False, **kwargs):
    if pretrained:
        return []
    return [name for name in _list_models(*args, **kwargs) if name.split(".")[0] in _chosen]


timm.list_models = _list_ours
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    keep = [item for item in items if _model_of(item) in _chosen]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


def _model_of(item):
    name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
    return name.split(".")[0] if isinstance(name, str) else None
