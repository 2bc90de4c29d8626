"""Run the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/sanitize.py [PYTEST ARGUMENTS]

The library is compiled aside with both and tested in place of the package's own (`--kernels`). The
sanitizers have to be loaded before Python, which LD_PRELOAD does. Leaks are not looked for, since Python
itself ends with memory it never gives back.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = (
    *("tests/kernels", "--ignore-glob=tests/kernels/test_triton*"),
    *("tests/quant/kernels/test_panels.py", "tests/attention/test_native.py"),
)


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
        compile_kernels = runpy.run_path(str(ROOT / "hatch_build.py"))["compile_kernels"]
        compile_kernels(ROOT / "src/hanok/kernels/cpp", library, FLAGS)
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
