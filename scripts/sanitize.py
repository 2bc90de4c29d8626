"""Run the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/sanitize.py [PYTEST ARGUMENTS]

The library is compiled aside with both and tested in place of the package's own (`--kernels`). The
sanitizers have to be loaded before Python, which LD_PRELOAD does. Leaks are not looked for, since Python
itself ends with memory it never gives back.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = ("tests/kernels", "tests/quant/kernels/test_panels.py", "tests/attention/test_native.py")


def build_script() -> ModuleType:
    """Load hatch_build.py with a bare class in place of hatchling's, which only builds install."""
    plugin = "hatchling.builders.hooks.plugin.interface"
    interface = ModuleType(plugin)
    bare = type("BuildHookInterface", (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
    interface.BuildHookInterface = bare  # type: ignore[attr-defined]
    sys.modules[plugin] = interface
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("hatch_build.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preloaded() -> str:
    """Return the sanitizers' libraries, as the compiler names them."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return " ".join(found)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libhanok_kernels.so")
        build_script().compile_kernels(ROOT / "src/hanok/kernels/cpp", library, FLAGS)
        environment = os.environ | {
            "LD_PRELOAD": preloaded(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        tests = sys.argv[1:] or [*TESTS]
        command = [sys.executable, "-m", "pytest", "--kernels", str(library), *tests]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
