"""Writes the tables of docs/models.md from the registry of families and from what their files say.

python scripts/update_models.py [--check]
"""

import ast
import json
import sys
from pathlib import Path

from hanok.models.family import families
from hanok.registry import discover

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
FAMILIES = ROOT / "src" / "hanok" / "models" / "families"
MARKS = {
    name: (f"<!-- {name} -->", f"<!-- end of {name} -->")
    for name in ("models", "refused", "left out")
}


def summary(tree: ast.Module) -> str:
    text = " ".join((ast.get_docstring(tree) or "").split())
    return text.replace("|", "\\|")


def demands(tree: ast.Module) -> dict[str, tuple[object, ...]]:
    """Return each key whose value a family demands, and the values that it takes."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "keys.demand":
            name, *values = (ast.literal_eval(argument) for argument in node.args)
            found[name] = tuple(values)
    return found


def models() -> list[str]:
    rows = ["| `model_type` | published models | what sets the family apart | file |"]
    rows.append("|---|---|---|---|")
    files = {
        model_type: name
        for name, family in discover("hanok.models.families", "FAMILY").items()
        for model_type in family.model_types
    }
    for model_type in sorted(files):
        file = f"{files[model_type]}.py"
        tree = ast.parse((FAMILIES / file).read_text())
        opens = families()[model_type].model_types[model_type]
        link = f"[{file}](../src/hanok/models/families/{file})"
        rows.append(f"| `{model_type}` | {opens} | {summary(tree)} | {link} |")
    return rows


def refused() -> list[str]:
    rows = ["| file | key | the only values |", "|---|---|---|"]
    for path in sorted(FAMILIES.glob("*.py")):
        for name, values in demands(ast.parse(path.read_text())).items():
            shown = ", ".join(f"`{json.dumps(value)}`" for value in values)
            rows.append(f"| {path.name} | `{name}` | {shown} |")
    return rows


def left_out() -> list[str]:
    rows = ["| `model_type` | weights that are left out |", "|---|---|"]
    for model_type, family in sorted(families().items()):
        if family.left_out:
            rows.append(f"| `{model_type}` | {', '.join(family.left_out)} |")
    return rows


def updated(page: str) -> str:
    for name, rows in (("models", models()), ("refused", refused()), ("left out", left_out())):
        begin, end = MARKS[name]
        before, rest = page.split(begin)
        page = before + begin + "\n" + "\n".join(rows) + "\n" + end + rest.split(end)[1]
    return page


def main() -> int:
    page = PAGE.read_text()
    if "--check" in sys.argv:
        if updated(page) != page:
            print("docs/models.md is not up to date; run python scripts/update_models.py")
            return 1
        return 0
    PAGE.write_text(updated(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
