"""Fixtures of the kernels' tests."""

import re
from typing import NamedTuple

import pytest


class Resources(NamedTuple):
    """What a compiled kernel takes: registers of a thread, bytes spilled from them, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int


@pytest.fixture
def resources_of(monkeypatch, capfd):
    """Return the `Resources` of the kernel that a function compiles, as the assembler reports them to triton."""
    from triton import knobs

    def read(compile_kernel, *args) -> Resources:
        with monkeypatch.context() as patch:
            patch.setattr(knobs.compilation, "always_compile", True)
            patch.setattr(knobs.nvidia, "dump_ptxas_log", True)
            capfd.readouterr()
            compiled = compile_kernel(*args)
        report = capfd.readouterr().out
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
        assert spills, report
        return Resources(registers, sum(spills), compiled.metadata.shared)

    return read
