"""Builds the optional C extension; everything else is in pyproject.toml."""

from setuptools import Extension, setup

# Without a compiler that takes it, the install succeeds and the plain torch path serves.
setup(
    ext_modules=[
        Extension(
            "foveate.kernels.neighborhood._native",
            ["kernels/neighborhood/native.c"],
            depends=["kernels/neighborhood/native.c"],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"],
            libraries=["m", "pthread"],
            optional=True,
        )
    ]
)
