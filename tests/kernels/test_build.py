"""The build hook: the library it compiles, and a machine that cannot compile it."""

import ctypes
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build script, loaded anew so that a test may replace what it holds."""
    monkeypatch.delenv("CXX", raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sources(folder: Path, library: str, table: str) -> Path:
    """Return a folder with small programs in place of the kernels."""
    made = folder / "cpp"
    made.mkdir()
    (made / "library.cpp").write_text(library)
    (made / "pool.cpp").write_text("")
    (made / "amx.cpp").write_text("int HANOK_PRODUCT;")
    (made / "instruction_set.cpp").write_text(table)
    return made


def test_without_a_compiler_the_error_says_what_is_missing(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    library = tmp_path / "lib.so"
    with pytest.raises(build.CompileError, match=r"no C\+\+ compiler \(g\+\+, c\+\+ or CXX\)"):
        build.compile_kernels(tmp_path, library)
    assert not library.exists()


def needs_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip(
            "compiles a program, and there is no g++ here: hanok has to work without one too"
        )


def test_what_does_not_compile_is_said_and_leaves_nothing(
    build: ModuleType, tmp_path: Path
) -> None:
    needs_compiler()
    made = sources(tmp_path, "this is no program", "int HANOK_KERNELS;")
    with pytest.raises(build.CompileError, match=r"library\.cpp"):
        build.compile_kernels(made, tmp_path / "lib.so")
    assert list(tmp_path.iterdir()) == [made]


def test_a_compiler_named_by_the_user_that_is_not_there_is_an_error_of_the_same_kind(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(build.CompileError, match="no-such-compiler"):
        build.compile_kernels(tmp_path, tmp_path / "lib.so")


def test_each_instruction_set_is_compiled_into_one_library(
    build: ModuleType, tmp_path: Path
) -> None:
    needs_compiler()
    tables = build.instruction_sets()
    declared = "".join(f"extern const char hanok_{name}_kernels[];\n" for name in tables)
    listed = ", ".join(f"hanok_{name}_kernels" for name in tables)
    face = (
        f"{declared}const char* names[] = {{{listed}}};\n"
        'extern "C" __attribute__((visibility("default"))) const char* name(int i)'
        " { return names[i]; }\n"
    )
    table = "extern const char HANOK_KERNELS[]; const char HANOK_KERNELS[] = HANOK_NAME EXTRA;\n"
    library = tmp_path / "lib.so"
    library.write_text("an older one")
    build.compile_kernels(sources(tmp_path, face, table), library, ('-DEXTRA="!"', "-O0"))
    loaded = ctypes.CDLL(str(library))
    loaded.name.restype = ctypes.c_char_p
    found = [loaded.name(index).decode() for index in range(len(tables))]
    assert found == [f"{name}!" for name, _ in tables.values()]
    assert {path.name for path in tmp_path.iterdir()} == {"cpp", "lib.so"}


Compile = Callable[[Path, Path], None]


def hook_data(build: ModuleType, root: Path, target: str, compiled: Compile) -> dict[str, object]:
    hook = build.KernelsBuildHook(str(root), {}, None, None, str(root), target)
    build.compile_kernels = compiled
    data: dict[str, object] = {"artifacts": [], "pure_python": True}
    hook.initialize("standard", data)
    return data


def test_a_wheel_without_the_library_is_a_wheel_for_every_system_and_says_so(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(source: Path, library: Path) -> None:
        raise build.CompileError("the reason")

    data = hook_data(build, tmp_path, "wheel", fails)
    assert data == {"artifacts": [], "pure_python": True}
    assert "its CPU kernels are not built: the reason" in capsys.readouterr().err


def test_a_wheel_with_the_library_is_bound_to_its_platform(
    build: ModuleType, tmp_path: Path
) -> None:
    asked: list[tuple[Path, Path]] = []
    data = hook_data(build, tmp_path, "wheel", lambda *places: asked.append(places))
    folder = tmp_path / "src/hanok/kernels"
    assert asked == [(folder / "cpp", folder / "libhanok_kernels.so")]
    assert data["artifacts"] == ["src/hanok/kernels/libhanok_kernels.so"]
    assert data["pure_python"] is False
    assert str(data["tag"]).startswith("py3-none-")


def test_a_source_distribution_compiles_nothing(build: ModuleType, tmp_path: Path) -> None:
    asked: list[tuple[Path, Path]] = []
    data = hook_data(build, tmp_path, "sdist", lambda *places: asked.append(places))
    assert asked == []
    assert data == {"artifacts": [], "pure_python": True}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_every_processor_has_the_portable_kernels(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    tables = build.instruction_sets()
    assert tables["portable"][1] == []
    assert len({name for name, _ in tables.values()}) == len(tables)
