"""Builds the optional C library of the neighborhood kernels; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Builds a library for ctypes, under a name that Python does not take for a module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file of an extension: one for every version of Python."""
        return str(Path(*fullname.split("."))) + ".c.so"


# Without a compiler that takes it, the install succeeds and the plain torch path serves.
setup(
    script_name=__file__,  # or a build would take this file for a module of the package, whose folder is this one
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "foveate.kernels.neighborhood._native",
            ["kernels/neighborhood/native.c"],
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
    ],
)
