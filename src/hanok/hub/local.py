"""Which files of a folder are pushed, which are left out, and how each is named by its content."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hanok.checkpoint.aside import PARTIAL
from hanok.errors import CheckpointError, OptionError

SAMPLE_BYTES = 512
READ_BYTES = 2**20
RECORD = ".hanok-pull.json"
"""What `hanok pull` notes in a folder: where it comes from."""
UNWANTED_FOLDERS = {".git", ".cache", ".locks", "__pycache__", ".ipynb_checkpoints"}
UNWANTED_FILES = {".DS_Store", RECORD}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A file to be pushed, as it was when it was listed."""

    path: Path
    name: str
    """Its path in the repository."""
    size: int
    modified_ns: int
    inode: int

    def sample(self) -> bytes:
        """Return its first bytes, by which a hub tells text from other content."""
        with self.path.open("rb") as file:
            return file.read(SAMPLE_BYTES)

    def is_unchanged(self) -> bool:
        """Return whether it is still the file that was listed."""
        try:
            return local_file(self.path, self.name) == self
        except OSError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a folder."""

    files: tuple[LocalFile, ...]
    left_out: tuple[str, ...]
    """Names of what is never pushed: unfinished files, caches, git's own."""


def local_file(path: Path, name: str) -> LocalFile:
    """Describe a file; links are followed."""
    found = path.stat()
    return LocalFile(
        path=path,
        name=name,
        size=found.st_size,
        modified_ns=found.st_mtime_ns,
        inode=found.st_ino,
    )


def list_folder(folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Listing:
    """Return the files to be pushed, sorted by name; a path of one file gives that file.

    `include` and `exclude` are patterns as in a shell, "*.json"; one that ends in / means
    all of a folder. Raises CheckpointError where there is no such folder, or a link leads nowhere.
    """
    if folder.is_file():
        return Listing(files=(local_file(folder, folder.name),), left_out=())
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Check the path.")
    files: list[LocalFile] = []
    left_out: list[str] = []
    for path in _walk(folder, left_out):
        name = path.relative_to(folder).as_posix()
        if not matches(name, include, exclude):
            continue
        try:
            files.append(local_file(path, name))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which is missing. Restore or remove it."
            ) from None
    return Listing(files=tuple(sorted(files, key=lambda file: file.name)), left_out=tuple(left_out))


def _walk(folder: Path, left_out: list[str]) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        here = Path(at)
        for name in sorted(folders):
            if name in UNWANTED_FOLDERS or PARTIAL.fullmatch(name):
                folders.remove(name)
                left_out.append((here / name).relative_to(folder).as_posix() + "/")
        for name in names:
            if name in UNWANTED_FILES or PARTIAL.fullmatch(name) or name.endswith(".incomplete"):
                left_out.append((here / name).relative_to(folder).as_posix())
            else:
                yield here / name


def matches(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether a file is wanted: by a pattern of `include` if there are any, no `exclude`."""
    wanted = [_pattern(item) for item in include]
    unwanted = [_pattern(item) for item in exclude]
    if wanted and not any(fnmatchcase(name, item) for item in wanted):
        return False
    return not any(fnmatchcase(name, item) for item in unwanted)


def check_patterns(patterns: Iterable[str], names: Iterable[str], option: str, where: str) -> None:
    """Raise OptionError for a pattern that no name matches: it is mistyped, or the file is not there."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, _pattern(pattern)) for name in known):
            raise OptionError(f"{option} {pattern}: matches no file of {where}. Check the pattern.")


def _pattern(text: str) -> str:
    return f"{text}*" if text.endswith("/") else text


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(view[:count])
    return state.hexdigest()
