"""Compiles src/hanok/kernels/cpp while the package is built; without a compiler the build goes on.

The kernels are compiled once for each instruction set and chosen at run time. The library is loaded by
path, so a wheel that carries it is bound to its platform and to no Python.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/hanok/kernels")
# Products are fused into sums; nothing else may change what the sources say.
FLAGS = [
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8"]
AMX_PRODUCTS = {"amx": AMX, "emulated_amx": [*AVX512, "-DHANOK_EMULATES_TILES"]}


def instruction_sets() -> dict[str, tuple[str, list[str]]]:
    """Return for each table of kernels the name that users see, and the flags that compile it."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {
            "portable": ("portable", []),
            "avx2": ("AVX2", AVX2),
            "avxvnni": ("AVX-VNNI", [*AVX2, "-mavxvnni"]),
            "avx512": ("AVX-512 VNNI", AVX512),
        }
    if platform.machine() in ("aarch64", "arm64"):
        return {
            "portable": ("NEON", []),
            "dotprod": ("NEON dot product", ["-march=armv8.2-a+dotprod"]),
        }
    return {"portable": ("portable", [])}


class KernelsBuildHook(BuildHookInterface[Any]):
    """Adds the compiled kernels to what is built."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile aside and rename, so that a library in use is never half written."""
        if self.target_name != "wheel":
            return
        library = Path(self.root) / FOLDER / "libhanok_kernels.so"
        try:
            compile_kernels(Path(self.root) / FOLDER / "cpp", library)
        except CompileError as error:
            print(f"hanok: its CPU kernels are not built: {error}", file=sys.stderr)
            return
        build_data["artifacts"].append(str(FOLDER / library.name))
        build_data["pure_python"] = False
        name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{name}"


class CompileError(Exception):
    """Why there is no library."""


def compile_kernels(sources: Path, library: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the library, every instruction set by itself and as many at once as there are cores."""
    given = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    compiler = [*shlex.split(given), *FLAGS, *extra_flags]
    if not given:
        raise CompileError("there is no C++ compiler (g++, c++ or CXX)")
    tables = {
        table: known
        for table, known in instruction_sets().items()
        if table == "portable" or _knows(compiler, known[1])
    }
    has_amx = "avx512" in tables and _knows(compiler, AMX)
    are_there = [f"-DHANOK_HAS_{table.upper()}" for table in (*tables, *["amx"] * has_amx)]
    with tempfile.TemporaryDirectory() as folder:
        commands, objects = [], []
        for name in ("library", "pool"):
            objects.append(str(Path(folder, f"{name}.o")))
            source = str(sources / f"{name}.cpp")
            commands.append([*compiler, *are_there, "-c", source, "-o", objects[-1]])
        for table, (name, flags) in tables.items():
            objects.append(str(Path(folder, f"{table}.o")))
            names = [f"-DHANOK_KERNELS=hanok_{table}_kernels"]
            names += [f'-DHANOK_KEY="{table}"', f'-DHANOK_NAME="{name}"']
            source = str(sources / "instruction_set.cpp")
            commands.append([*compiler, *flags, *names, "-c", source, "-o", objects[-1]])
        for name, flags in AMX_PRODUCTS.items() if has_amx else ():
            objects.append(str(Path(folder, f"{name}.o")))
            source = str(sources / "amx.cpp")
            wanted = [*flags, f"-DHANOK_PRODUCT=hanok_{name}_product"]
            commands.append([*compiler, *wanted, "-c", source, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        unfinished = library.with_suffix(f".{os.getpid()}")
        _run([*compiler, "-shared", *objects, "-o", str(unfinished)])
    unfinished.replace(library)


def _knows(compiler: list[str], flags: list[str]) -> bool:
    """Return whether a compiler has these flags; one of 2019 knows no AVX-VNNI."""
    try:
        _run([*compiler, *flags, "-E", "-x", "c++", os.devnull, "-o", os.devnull])
    except CompileError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # CXX names no program
        raise CompileError(str(error)) from error
    if done.returncode != 0:
        raise CompileError(done.stderr)
