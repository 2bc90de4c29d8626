"""Compiles src/hanok/kernels while the package is built; without a compiler the build goes on.

The library is loaded by path, so a wheel that carries it is bound to its platform and to no Python.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/hanok/kernels")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=default"]


class KernelsBuildHook(BuildHookInterface[Any]):
    """Adds the compiled kernels to what is built."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile aside and rename, so that a library in use is never half written."""
        if self.target_name != "wheel":
            return
        library = Path(self.root) / FOLDER / "libhanok_kernels.so"
        if not compile_kernels(Path(self.root) / FOLDER / "kernels.cpp", library):
            return
        build_data["artifacts"].append(str(FOLDER / library.name))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def compile_kernels(source: Path, library: Path) -> bool:
    """Return whether the library was compiled; says why where it was not."""
    compiler = shlex.split(
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    )
    if not compiler:
        print("hanok: no C++ compiler, so its CPU kernels are not built", file=sys.stderr)
        return False
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [*compiler, *FLAGS, "-fopenmp", str(source), "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # CXX names no program
        print(f"hanok: its CPU kernels are not built: {error}", file=sys.stderr)
        return False
    if done.returncode != 0:
        print(f"hanok: its CPU kernels are not built: {done.stderr}", file=sys.stderr)
        return False
    unfinished.replace(library)
    return True
