"""Writes docs/api.md from the docstrings of `hanok.__all__` and of the classes that these return.

python scripts/update_api.py [--check]
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import hanok
from hanok import errors

MAX_WIDTH = 100
PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# The Python interface

Written by `scripts/update_api.py` from the docstrings. `import hanok` gives every name of the first two
parts; the third has the classes that these return or hold. Names that begin with an underscore, and
modules below `hanok`, are not public.
"""
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_of(name: str) -> str:
    return hanok._LAZY.get(name, "hanok.errors")


def tree_of(module: str) -> ast.Module:
    return ast.parse(Path(inspect.getfile(import_module(module))).read_text())


def definition(module: str, name: str) -> Definition | None:
    for node in tree_of(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
    return None


def text_of(node: Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str = "") -> str:
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args  # a copy
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not name else ""
    parts: list[str] = []
    for part in ast.unparse(arguments).split(", "):
        # A comma within brackets separates no arguments.
        if parts and any(parts[-1].count(a) != parts[-1].count(b) for a, b in ("[]", "()")):
            parts[-1] += ", " + part
        else:
            parts.append(part)
    parts = [re.sub(r"^(\w+: .+?)=(?!=)", r"\1 = ", part) for part in parts]
    line = f"{name or node.name}({', '.join(parts)}){returns}"
    if len(line) > MAX_WIDTH:
        listed = "".join(f"    {part},\n" for part in parts)
        line = f"{name or node.name}(\n{listed}){returns}"
    return line.replace("'", '"')


def fields(node: ast.ClassDef) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Yield each public field, those that `__init__` annotates too, with the text after it."""
    bodies = [node.body, *(item.body for item in node.body if is_named(item, "__init__"))]
    for body in bodies:
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                is_text = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                text = flat(str(following.value.value)) if is_text else ""
                if not name_of(statement).startswith("_"):
                    yield statement, text


def is_named(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def name_of(field: ast.AnnAssign) -> str:
    return ast.unparse(field.target).removeprefix("self.")


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield each public method once, of an overloaded one that with the text."""
    for item in node.body:
        is_method = isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_method and not item.name.startswith("_") and text_of(item):
            yield item


def is_property(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(item).endswith("property") for item in method.decorator_list)


def field_line(field: ast.AnnAssign, text: str) -> str:
    is_class_field = not ast.unparse(field.target).startswith("self.")
    value = f" = {ast.unparse(field.value)}" if field.value and is_class_field else ""
    line = f"- `{name_of(field)}: {ast.unparse(field.annotation)}{value}`".replace("'", '"')
    return f"{line}: {text}" if text else line


def section(name: str, node: Definition) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"### {name}\n\n```python\n{signature(node)}\n```\n\n{text_of(node)}\n"
    made = [item for item in node.body if is_named(item, "__init__") and name in hanok.__all__]
    parts = [f"### {name}", *(f"```python\n{signature(item, name)}\n```" for item in made)]
    parts += [text_of(node)]
    lines = [field_line(*field) for field in fields(node)]
    lines += [
        f"- `{item.name}: {ast.unparse(item.returns)}`: {flat(text_of(item))}"
        for item in methods(node)
        if is_property(item)
    ]
    parts += ["\n".join(lines)] if lines else []
    for item in methods(node):
        if not is_property(item):
            parts += [f"```python\n{signature(item)}\n```", text_of(item)]
    return "\n\n".join(parts) + "\n"


def flat(text: str) -> str:
    return " ".join(text.split())


def returned(module: str, node: Definition) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what the annotations of public results and fields name."""
    if isinstance(node, ast.ClassDef):
        annotations = [field.annotation for field, _ in fields(node)]
        annotations += [item.returns for item in methods(node)]
    else:
        annotations = [node.returns]
    imported = {
        alias.name: item.module
        for item in ast.walk(tree_of(module))
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("hanok.")
        for alias in item.names
    }
    for annotation in filter(None, annotations):
        for word in re.findall(r"[A-Za-z]\w*", ast.unparse(annotation)):
            yield imported.get(word, module), word


def page() -> str:
    names = [name for name in hanok.__all__ if not name.startswith("_") and name != "BUNDLED"]
    raised = [name for name in names if module_of(name) == "hanok.errors"]
    found = {name: definition(module_of(name), name) for name in names if name not in raised}
    others: dict[str, Definition] = {}
    for name, node in found.items():
        for module, other in returned(module_of(name), node):
            target = definition(module, other) if other not in names else None
            if isinstance(target, ast.ClassDef) and text_of(target):
                others[other] = target
    order = sorted(found, key=lambda name: (name[0].isupper(), name))  # functions first
    parts = [HEAD, f"`hanok.BUNDLED`: {flat(bundled())}\n", "## Functions and classes\n"]
    parts += [section(name, found[name]) for name in order]
    parts += ["## Errors\n", "```text\n" + inspect.cleandoc(errors.__doc__ or "") + "\n```\n"]
    parts += ["## What they return\n"]
    parts += [section(name, others[name]) for name in sorted(others)]
    return "\n".join(parts)


def bundled() -> str:
    body = tree_of("hanok").body
    for statement, following in pairwise(body):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "BUNDLED":
            return following.value.value
    return ""


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != text:
            print("docs/api.md is not up to date; run python scripts/update_api.py")
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
