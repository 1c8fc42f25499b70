"""Builds the optional C libraries of the kernels; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Builds a library for ctypes, under a name that Python does not take for a module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file of an extension: one for every version of Python."""
        return str(Path(*fullname.split("."))) + ".c.so"


def library(name: str, source: str) -> Extension:
    """Return a library without which the install succeeds: where no compiler takes it, the plain torch path serves."""
    return Extension(
        name,
        [source],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wno-psabi",
        ],
        libraries=["m", "pthread"],
        optional=True,
    )


setup(
    script_name=__file__,  # or a build would take this file for a module of the package, whose folder is this one
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        library("foveate.kernels.neighborhood._native", "kernels/neighborhood/native.c"),
        library("foveate.kernels._deformable", "kernels/deformable.c"),
    ],
)
