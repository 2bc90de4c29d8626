"""Rewrites the table of files in docs/map.md from the first sentence of each module.

python scripts/update_map.py [--check]
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "map.md"
BEGIN, END = "<!-- files -->", "<!-- end of files -->"


def first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    line = " ".join(text.split("\n\n")[0].split())
    return line.replace("|", "\\|")


def table() -> str:
    rows = ["| file | what it is |", "|---|---|"]
    for path in sorted((ROOT / "src" / "hanok").rglob("*.py")):
        if path.name != "__init__.py" or path.parent.name == "hanok":
            rows.append(
                f"| `{path.relative_to(ROOT / 'src' / 'hanok')}` | {first_sentence(path)} |"
            )
    return "\n".join(rows)


def updated(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> int:
    page = PAGE.read_text()
    if "--check" in sys.argv:
        if updated(page) != page:
            print("docs/map.md is not up to date; run python scripts/update_map.py")
            return 1
        return 0
    PAGE.write_text(updated(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
