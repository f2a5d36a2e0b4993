"""Metadata is in pyproject.toml; this builds the CPU kernels where a C compiler is at hand, and does without where not."""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_path = Path(__file__).parent / "sab_hf" / "kernels" / "cpu" / "build.py"
_spec = importlib.util.spec_from_file_location("sab_kernels_build", _path)
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """Build the plain shared library that `sab_hf.kernels.cpu.library` loads; it is no Python module."""

    def build_extension(self, ext):
        try:
            kernels.build(Path(self.get_ext_fullpath(ext.name)))
        except kernels.BuildError as error:
            sys.stderr.write(f"warning: sab_hf is installed without CPU kernels and will be slow on CPUs: {error}\n")

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + kernels.LIBRARY.suffix


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3: the library knows no Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"sab_hf.kernels.cpu.{kernels.LIBRARY.stem}", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
