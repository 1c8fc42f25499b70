"""The examples in the docstrings of every block and kernel run and print what they say."""

import doctest
import importlib
import pkgutil

import foveate.blocks
import foveate.kernels
import pytest
import torch


def modules():
    for package in (foveate.blocks, foveate.kernels):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.rsplit(".", 1)[-1].startswith(("triton", "_native")):
                yield module.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
