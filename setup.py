"""Builds saefast._native from csrc/: plain C++ everywhere, plus csrc/*.cu where nvcc is. Needs neither torch nor nvcc.

SAEFAST_CUDA=0 leaves the CUDA half out, =1 fails the build without it; unset (auto), it is best effort.
Without a C++ compiler the install succeeds and saefast runs on its torch path. A new csrc/x.cpp is picked up by itself.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

CUDA_MODE = os.environ.get("SAEFAST_CUDA", "auto")
if CUDA_MODE not in ("0", "1", "auto"):
    raise SystemExit(f"SAEFAST_CUDA is {CUDA_MODE!r}; it may be 0, 1 or auto")

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cu"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.hpp"))
# no-math-errno: std::sqrt becomes one vector instruction instead of a call that may set errno.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra"]
# No -march=native: wheels run on other machines. Hot loops use SAEFAST_CLONES (csrc/threads.hpp) instead.
NVCC_FLAGS = ["-O3", "-std=c++17", "-arch=all-major", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise FileNotFoundError("nvcc not found on PATH or in CUDA_HOME")
    return nvcc


def library_flags(nvcc: str) -> list[str]:
    """The -L flags nvcc itself links with, which hold for wrappers, conda and system toolkits alike."""
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    line = next((line for line in dryrun.splitlines() if "LIBRARIES=" in line), "")
    return shlex.split(line.partition("=")[2])


class BuildExt(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        if CUDA_MODE != "0":
            self.try_cuda(ext)
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, PlatformError, OSError) as error:
            if CUDA_MODE == "1":
                raise
            # setuptools would otherwise look for the file it was promised.
            ext.optional = True
            reason = str(error).partition(" '-")[0]
            self.warn(f"saefast is installed without its C++ extension ({reason}); it will run on torch alone")

    def try_cuda(self, ext: Pybind11Extension) -> None:
        try:
            self.add_cuda(ext)
        except (ExecError, CompileError, OSError) as error:
            if CUDA_MODE == "1":
                raise
            if not isinstance(error, FileNotFoundError):
                self.warn(f"building saefast without CUDA: {error}")

    def add_cuda(self, ext: Pybind11Extension) -> None:
        nvcc = find_nvcc()
        objects = []
        for source in CUDA_SOURCES:
            obj = Path(self.build_temp, source).with_suffix(".cu.o")
            obj.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *NVCC_FLAGS, "-c", source, "-o", str(obj)])
            objects.append(str(obj))
        ext.extra_objects += objects
        ext.define_macros.append(("SAEFAST_CUDA", "1"))
        ext.extra_link_args += library_flags(nvcc)
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]


# One compiler per core; SAEFAST_BUILD_JOBS sets another number.
ParallelCompile("SAEFAST_BUILD_JOBS", default=0).install()

setup(
    packages=[*find_packages(include=["saefast", "saefast.*"]), "saefast.kernels"],
    ext_modules=[
        Pybind11Extension(
            "saefast._native",
            SOURCES,
            depends=[*HEADERS, *CUDA_SOURCES],
            cxx_std=17,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
