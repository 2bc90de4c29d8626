"""Rules of the house that no type checker sees: layers, names, sizes, and pages that stay true."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import hypothesis
import pytest

import hanok
from hanok import errors
from hanok.models.family import families

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hanok"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 600
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # One thread: several wait for one another where the tests share their cores with others.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def short(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def strings_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every string constant with its line; a string that is a statement is documentation."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in documentation:
            yield node.lineno, node.value


# Called by name from elsewhere than this package.
CALLED_BY_OTHERS = {
    "capture_signals": "uvicorn",
    "_apply": "torch, for .to and its like",
    "find_class": "pickle",
    "persistent_load": "pickle",
    "recorded_tokens": "tests, which ask what was recorded",
    "emulated_amx": "tests of tiles on processors without them",
}


def test_every_function_and_class_is_used() -> None:
    words: Counter[str] = Counter()
    for path in FILES:
        words.update(re.findall(r"\w+", path.read_text()))
    pages = (ROOT / "docs" / "api.md").read_text()
    unused = {
        node.name: f"{short(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and words[node.name] == 1
        and not re.fullmatch(r"__\w+__|visit_\w+", node.name)
        and not any(ast.unparse(item).startswith("command.command") for item in node.decorator_list)
        and not re.search(rf"\b{node.name}\b", pages)
    }
    assert unused.keys() == CALLED_BY_OTHERS.keys(), unused


def test_there_are_files_to_look_at() -> None:
    assert SOURCE / "__init__.py" in FILES
    assert len(FILES) > 30


def test_imports_keep_to_the_contracts() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    result = run(program, "--no-logo", "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


def test_the_map_is_current() -> None:
    result = run(sys.executable, ROOT / "scripts" / "update_map.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_page_of_models_is_current() -> None:
    result = run(sys.executable, ROOT / "scripts" / "update_models.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    page = (ROOT / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \|", page, flags=re.MULTILINE)
    assert set(families()) | {"model_type"} == {name for name, _ in listed}


def test_the_map_has_a_line_for_each_file() -> None:
    page = (ROOT / "docs" / "map.md").read_text()
    listed = dict(re.findall(r"^\| `(.+?\.py)` \| (.*) \|$", page, flags=re.MULTILINE))
    expected = {short(path) for path in FILES if path.name != "__init__.py"} | {"__init__.py"}
    assert set(listed) == expected
    assert [name for name, line in listed.items() if not line.strip()] == []


def test_model_types_are_named_by_their_families_alone() -> None:
    """What differs between families is data of the family; no other code asks which one it has.

    But for the cuts of byte-level vocabularies, a table of their own: a tokenizer comes without a model.
    """
    found = [
        f"{short(path)}:{line} {text!r}"
        for path in FILES
        if path.parent != SOURCE / "models" / "families"
        and path != SOURCE / "checkpoint" / "byte_level.py"
        for line, text in strings_of(ast.parse(path.read_text()))
        if text in families()
    ]
    assert found == []


def test_quoted_model_types_are_found_and_documentation_is_not() -> None:
    tree = ast.parse('"""llama"""\ndef f(x):\n    "llama"\n    return x == "llama"\n')
    assert list(strings_of(tree)) == [(4, "llama")]


def error_classes() -> list[type[Exception]]:
    return [
        item
        for item in vars(errors).values()
        if inspect.isclass(item)
        and issubclass(item, Exception)
        and item.__module__ == errors.__name__
    ]


def test_every_error_is_drawn_in_the_tree() -> None:
    """The tree of the module's documentation has each class once, under the root."""
    assert errors.__doc__ is not None
    drawn = re.findall(r"^[├└]── (\w+)  ", errors.__doc__, flags=re.MULTILINE)
    below = [item.__name__ for item in error_classes() if item is not errors.HanokError]
    assert sorted(drawn) == sorted(below)
    assert re.search(r"^HanokError$", errors.__doc__, flags=re.MULTILINE)
    assert all(item.__bases__ == (errors.HanokError,) for item in error_classes()[1:])


def test_every_error_has_an_exit_code_of_its_own() -> None:
    codes = [item.exit_code for item in error_classes()]  # type: ignore[attr-defined]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


def test_every_error_is_public() -> None:
    assert {item.__name__ for item in error_classes()} <= set(hanok.__all__)


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert names & VAGUE_NAMES == set()


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text))


def test_examples_are_the_same_in_every_run() -> None:
    """One profile decides it for all tests, so no test file repeats or overrules it."""
    current = hypothesis.settings()
    assert (current.derandomize, current.deadline) == (True, None)
    found = [
        f"{path.relative_to(ROOT)}:{node.value.lineno} {node.arg}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "settings"
        for node in call.keywords
        if node.arg in {"derandomize", "deadline", "database"}
    ]
    assert found == []


def test_public_names_are_sorted_and_exist() -> None:
    assert hanok.__all__ == sorted(hanok.__all__)
    assert len(set(hanok.__all__)) == len(hanok.__all__)
    for name in hanok.__all__:
        assert getattr(hanok, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hanok.nothing  # noqa: B018


def test_public_lazy_names_come_from_where_they_are_defined() -> None:
    for name, module_name in hanok._LAZY.items():
        assert getattr(hanok, name).__module__ == module_name


@pytest.mark.parametrize(
    "module", ["hanok", "hanok.cli.main", "hanok.engine.params", "hanok.models.family"]
)
def test_importing_what_needs_no_torch_imports_none(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {{'torch', 'numpy'}}))"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def readme_programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_the_programs_of_the_readme_run(tmp_path: Path) -> None:
    programs = readme_programs()
    assert programs
    for index, program in enumerate(programs):
        assert "path/to/checkpoint" in program
        code = program.replace("path/to/checkpoint", str(hanok.BUNDLED))
        code = code.replace("path/to/copy", str(tmp_path / f"copy{index}"))
        assert "path/to" not in code
        result = run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
        copy = tmp_path / f"copy{index}"
        assert "path/to/copy" not in program or (copy / "model.safetensors").is_file()


def test_files_that_the_readme_links_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_names_every_family() -> None:
    text = (ROOT / "README.md").read_text()
    section = text[text.index("**Model families**") :].split("\n\n")[0]
    names = set(re.findall(r"[a-z][a-z0-9_]+", section))
    assert set(families()) <= names


def imports_of(path: Path, modules: Collection[str]) -> set[str]:
    """Every module of the package that a file names, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{item.name}" for item in node.names}
            found |= (names & set(modules)) or {node.module}
    return found & set(modules)


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in FILES}
    left = {name: imports_of(path, files) - {name} for name, path in files.items()}
    while leaves := {name for name, needed in left.items() if not needed}:
        left = {name: needed - leaves for name, needed in left.items() if name not in leaves}
    used = set().union(*left.values()) if left else set()
    assert not {name: sorted(needed & used) for name, needed in left.items() if name in used}


def test_no_file_comes_in_by_the_package_itself() -> None:
    """`from hanok import …` would hide from the layers' contract what a file really imports."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_root = isinstance(node, ast.ImportFrom) and node.module == "hanok" and not node.level
            is_root |= isinstance(node, ast.Import) and any(i.name == "hanok" for i in node.names)
            if is_root:
                found.append(short(path))
    assert not found


PLUGINS = {
    "attention": "BACKENDS",
    "cli.bench": "COMMAND",
    "cli.verbs": "COMMAND",
    "models.families": "FAMILY",
    "models.mixers": "MODULES",
    "quant": "METHOD",
    "quant.kernels": "LAYOUT",
    "server.routes": "ROUTES",
}
ALLOWED = {
    # Answers as the routes that it stands for.
    "server.routes.operations": {
        "server.routes.chat",
        "server.routes.openai",
        "server.routes.tgi",
    },
}


def test_nobody_imports_a_plugin_by_name() -> None:
    files = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in FILES}
    plugins = {
        name
        for name, path in files.items()
        if (constant := PLUGINS.get(name.rpartition(".")[0]))
        and re.search(rf"^{constant}\b", path.read_text(), flags=re.MULTILINE)
    }
    assert {name.rpartition(".")[0] for name in plugins} == set(PLUGINS)
    modules = {f"hanok.{name}" for name in files}
    found = {}
    for name, path in files.items():
        used = {item.removeprefix("hanok.") for item in imports_of(path, modules)}
        if wrong := (used & plugins) - ALLOWED.get(name, set()) - {name}:
            found[name] = sorted(wrong)
    assert not found
