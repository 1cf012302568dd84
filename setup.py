"""Builds the C core; everything else is in pyproject.toml.

setuptools takes cffi modules only from here. A missing compiler or missing
Python headers must be an instruction, not a page of compiler output.
"""

import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

PACKAGES = "gcc libc6-dev linux-libc-dev python3-dev"


class BuildCore(build_ext):
    """build_ext that says what to install before the compiler can fail."""

    def run(self) -> None:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        if not any(shutil.which(name) for name in (compiler, "cc", "gcc", "clang")):
            raise SystemExit(
                f"qpostcopy: no C compiler found (looked for {compiler}, cc, gcc, clang). "
                f"Install one, on Debian: apt-get install {PACKAGES}"
            )
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not headers.exists():
            raise SystemExit(
                f"qpostcopy: Python's C headers are missing ({headers}). "
                f"On Debian: apt-get install {PACKAGES}"
            )
        super().run()


setup(cffi_modules=["qpostcopy/core/build.py:ffibuilder"], cmdclass={"build_ext": BuildCore})
