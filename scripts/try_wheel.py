"""Generate with the package that is installed in the current folder: `make wheel` runs it.

Raises AssertionError where something else was imported, or where kernels or the model were left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

import hanok
from hanok.kernels import native


def main() -> None:
    assert Path(hanok.__file__).is_relative_to(Path.cwd()), hanok.__file__
    assert native.native() is not None, native.why_not()
    tokens = hanok.load(hanok.BUNDLED).generate("Once upon a time", max_new_tokens=3).token_ids
    assert len(tokens) == 3, tokens
    print(f"hanok {hanok.__version__} from a wheel generates, with {native.LIBRARY.name}")


if __name__ == "__main__":
    main()
