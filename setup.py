"""Builds the optional C libraries of the kernels; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an old setuptools, outside of pip's builds: it makes no wheel, but libraries in place
    bdist_wheel = object


# A library is compiled once more for each, as functions whose names end in it, of which the loader takes the best.
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}


class BuildLibrary(build_ext):
    """Builds libraries for ctypes beside each other, under names that Python does not take for modules."""

    def finalize_options(self) -> None:
        """Take all cores, unless told otherwise."""
        super().finalize_options()
        self.parallel = self.parallel or True

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file of an extension: one for every version of Python."""
        return str(Path(*fullname.split("."))) + ".c.so"

    def build_extension(self, ext: Extension) -> None:
        """Build an extension; MinGW's own libraries become part of it, since no user of the wheel has them."""
        if self.compiler.compiler_type == "mingw32":
            ext.extra_link_args = ["-static"]
        # What includes no header of ours includes itself for each set.
        if ext.depends and self.plat_name.endswith(("x86_64", "amd64")):
            ext.extra_objects = [file for isa in INSTRUCTION_SETS for file in self.compile_for(ext, isa)]
        super().build_extension(ext)

    def compile_for(self, ext: Extension, isa: str) -> list[str]:
        """Return the object files of an extension for an instruction set; none where the compiler doesn't know it."""
        try:
            return self.compiler.compile(
                ext.sources,
                output_dir=str(Path(self.build_temp, isa)),
                macros=[("ISA", isa)],
                extra_postargs=[*ext.extra_compile_args, *INSTRUCTION_SETS[isa]],
                depends=ext.depends,
            )
        except CompileError:
            return []


class PlatformWheel(bdist_wheel):
    """Names the wheel for its platform alone: the libraries know no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its ABI and the platform."""
        return "py3", "none", super().get_tag()[2]


def library(
    name: str,
    source: str,
    depends: tuple[str, ...] = ("kernels/lanes.h", "kernels/query_lanes.h", "kernels/shared_keys.h"),
) -> Extension:
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
        depends=list(depends),
        optional=True,
    )


setup(
    script_name=__file__,  # or a build would take this file for a module of the package, whose folder is this one
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildLibrary},
    ext_modules=[
        library("foveate.kernels.neighborhood._native", "kernels/neighborhood/native.c", depends=()),
        library("foveate.kernels.quadtree._native", "kernels/quadtree/native.c"),
        library("foveate.kernels.routing._native", "kernels/routing/native.c"),
        library("foveate.kernels._deformable", "kernels/deformable.c"),
        library("foveate.kernels._depthwise", "kernels/depthwise.c"),
        library("foveate.kernels._aggregated", "kernels/aggregated.c"),
        library("foveate.kernels._point_attention", "kernels/point_attention.c"),
        library("foveate.kernels._token_attention", "kernels/token_attention.c"),
    ],
)
