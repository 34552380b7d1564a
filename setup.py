"""The library in C for CPUs, compiled where there is a compiler; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = "pixtral_cli/model/kernels/native"

setup(
    ext_modules=[
        Extension(
            "pixtral_cli.model.kernels._native",
            sources=sorted(str(path.relative_to(HERE)) for path in (HERE / SOURCES).glob("*.c")),
            depends=sorted(str(path.relative_to(HERE)) for path in (HERE / SOURCES).glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            py_limited_api=True,
            optional=True,  # without it torch computes, more slowly
        )
    ],
    exclude_package_data={"": ["*.c", "*.h"]},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
