"""cffi build of the C core, in API mode.

What Python may call is sliced out of the headers between the markers
`cdef-begin` and `cdef-end`, so declaration and use cannot drift apart: the
compiler checks the generated code against the very same headers.
"""

import re
from pathlib import Path

from cffi import FFI

# setuptools runs this file by exec, without __file__ of a package: paths are
# relative to the project's root, which is its working directory by contract.
CORE = Path("qpostcopy/core")
HEADERS = (
    "error.h",
    "wire.h",
    "map.h",
    "uffd.h",
    "lane.h",
    "trace.h",
    "handler.h",
    "source.h",
    "inject.h",
)
SOURCES = (
    "error.c",
    "wire.c",
    "map.c",
    "uffd.c",
    "lane.c",
    "trace.c",
    "handler.c",
    "session.c",
    "fault.c",
    "source.c",
    "push.c",
    "holes.c",
    "proc.c",
    "inject.c",
)
CFLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-fvisibility=hidden"]
# cffi's generated glue is not ours to keep clean.
GLUE_CFLAGS = ["-Wno-conversion", "-Wno-sign-conversion", "-Wno-unused-parameter"]

_SLICE = re.compile(r"/\* cdef-begin \*/(.*?)/\* cdef-end \*/", re.DOTALL)
_DEFINE = re.compile(r"^#define\s+(\w+)\s+.*$", re.MULTILINE)


def cdef_of(header: str) -> str:
    """The part of a header that cffi is to see; constants become `#define NAME ...`."""
    parts = _SLICE.findall((CORE / header).read_text())
    return _DEFINE.sub(r"#define \1 ...", "\n".join(parts))


def make_builder() -> FFI:
    builder = FFI()
    headers = [name for name in HEADERS if (CORE / name).exists()]
    for header in headers:
        builder.cdef(cdef_of(header))
    builder.set_source(
        "qpostcopy.core._core",
        "\n".join(f'#include "{name}"' for name in headers),
        sources=[str(CORE / name) for name in SOURCES if (CORE / name).exists()],
        include_dirs=[str(CORE)],
        depends=[str(CORE / name) for name in headers],
        extra_compile_args=CFLAGS + GLUE_CFLAGS,
        libraries=["pthread"],
    )
    return builder


ffibuilder = make_builder()
