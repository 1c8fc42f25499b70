"""Builds the optional C libraries of the kernels; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an old setuptools, outside of pip's builds: it makes no wheel, but libraries in place
    bdist_wheel = object


class BuildLibrary(build_ext):
    """Builds a library for ctypes, under a name that Python does not take for a module."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file of an extension: one for every version of Python."""
        return str(Path(*fullname.split("."))) + ".c.so"

    def build_extension(self, ext: Extension) -> None:
        """Build an extension; MinGW's own libraries become part of it, since no user of the wheel has them."""
        if self.compiler.compiler_type == "mingw32":
            ext.extra_link_args = ["-static"]
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """Names the wheel for its platform alone: the libraries know no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its ABI and the platform."""
        return "py3", "none", super().get_tag()[2]


def library(name: str, source: str) -> Extension:
    """Return a library without which the install succeeds: where no compiler takes it, the plain torch path serves."""
    return Extension(
        name,
        [source],
        extra_compile_args=[
            "-std=gnu11",
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wno-psabi",
        ],
        libraries=["m", "pthread"],
        depends=["kernels/lanes.h"],
        optional=True,
    )


setup(
    script_name=__file__,  # or a build would take this file for a module of the package, whose folder is this one
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildLibrary},
    ext_modules=[
        library("foveate.kernels.neighborhood._native", "kernels/neighborhood/native.c"),
        library("foveate.kernels.quadtree._native", "kernels/quadtree/native.c"),
        library("foveate.kernels.routing._native", "kernels/routing/native.c"),
        library("foveate.kernels._deformable", "kernels/deformable.c"),
        library("foveate.kernels._aggregated", "kernels/aggregated.c"),
        library("foveate.kernels._point_attention", "kernels/point_attention.c"),
    ],
)
