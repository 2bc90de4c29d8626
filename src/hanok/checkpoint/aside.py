"""Files and folders are written under temporary names and renamed once they are complete.

An incomplete one is called ".NAME.xxxxxxxx.partial", next to NAME, and its writer holds a lock on it
(flock). An error or an interrupt removes it. A killed writer leaves it, but its lock is released: the
next writer in the same folder removes every unlocked leftover and leaves locked files alone.

Invariant: a file or folder under its final name is complete, and on disk if the batch is durable.
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from hanok.errors import CheckpointError

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
RENAME_EXCHANGE = 2  # of renameat2
AT_FDCWD = -100


class Batch:
    """Files written under temporary names and renamed together or not at all.

    A batch that is not durable does not call fsync.
    """

    def __init__(self, *, is_durable: bool = True) -> None:
        self._is_durable = is_durable
        self._waiting: dict[Path, Path] = {}
        self._files: list[BinaryIO] = []
        self._cleaned: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for temporary in self._waiting.values():
            temporary.unlink(missing_ok=True)
        for file in self._files:
            # Renamed files were flushed; the others may not fit on the disk, and were removed.
            with suppress(OSError):
                file.close()

    @property
    def waiting(self) -> Mapping[Path, Path]:
        """Where each file is until it gets its name, in the order they were opened."""
        return self._waiting

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Yield a new temporary file next to `path`; when the block ends, its bytes are written."""
        if path.parent not in self._cleaned:
            remove_leftovers(path.parent)
            self._cleaned.add(path.parent)
        file = self._created(path)
        yield file
        file.flush()
        if self._is_durable:
            os.fsync(file.fileno())

    def _created(self, path: Path) -> BinaryIO:
        """Return a new file that stays open, and so locked, until it has its name."""
        while True:
            # Exclusive creation instead of tempfile, whose files only their owner may read.
            temporary = _partial_name(path)
            self._waiting[path] = temporary
            file = temporary.open("xb")
            self._files.append(file)
            if _is_mine(temporary, file.fileno()):
                return file

    def publish(self) -> tuple[Path, ...]:
        """Rename the files in the order they were opened and return their names."""
        paths = tuple(self._waiting)
        for path in paths:
            self._waiting[path].replace(path)
            del self._waiting[path]
        for folder in {path.parent for path in paths} if self._is_durable else ():
            # The renames themselves are only safe once the folder is on disk.
            with _opened(folder) as descriptor:
                os.fsync(descriptor)
        return paths


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`, which is renamed to it when the block ends without an error.

    `path` may be an empty folder; it is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary, descriptor = _created_folder(path)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def folder_exchanged(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path`, which takes its place in one step when the block ends.

    Nobody sees a mixture of old and new files, and programs that have old ones open keep them. Raises
    CheckpointError where the file system cannot exchange two folders, where another process is doing
    so, or where this one runs inside of `path`, whose shell would be left in a removed folder.
    """
    path = path.resolve()
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(
            f"{path} is the folder you are in, and would be replaced by a new one. Run this from "
            "outside of it, or write to another folder."
        )
    remove_leftovers(path.parent)
    with _opened(path) as old:
        try:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{path} is being changed by another process. Wait for it, and run this again."
            ) from None
        except OSError:
            pass  # a network file system without locks
        temporary, descriptor = _created_folder(path)
        try:
            shutil.copystat(path, temporary)
            yield temporary
            os.fsync(descriptor)
            _exchange(temporary, path)
            with _opened(path.parent) as parent:
                os.fsync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)


def folder_state(folder: Path) -> Mapping[Path, tuple[int, int, int]]:
    """Return what shows that a file of a folder was changed: inode, bytes, time; by relative paths."""
    found = {}
    for file in folder.rglob("*"):
        if not PARTIAL.fullmatch(file.name):
            facts = file.stat(follow_symlinks=False)
            if not stat.S_ISDIR(facts.st_mode):
                name = file.relative_to(folder)
                found[name] = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return found


def link_files(
    source: Path, target: Path, is_linked: Callable[[Path], bool | None]
) -> tuple[Path, ...]:
    """Give `target` the files of a folder; return those that should be hard links and are copies.

    `is_linked` says of a path in the folder whether it becomes a hard link, or a copy, or, by None, is
    left out. Files are copied where no hard link is possible: to another file system, or of somebody
    else's file. Symbolic links to files are followed, and those to folders kept.
    """
    copied = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        linked = is_linked(name)
        if linked is None or PARTIAL.fullmatch(file.name):
            continue
        if file.is_dir() and not file.is_symlink():
            (target / name).mkdir(parents=True, exist_ok=True)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        real = file.resolve()
        if file.is_dir():
            (target / name).symlink_to(real)
        elif not linked:
            shutil.copy2(real, target / name)
        elif not _linked(real, target / name):
            shutil.copy2(real, target / name)
            copied.append(file)
    return tuple(copied)


def _linked(file: Path, target: Path) -> bool:
    try:
        target.hardlink_to(file)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        names = [os.fsencode(path) for path in (one, other)]
        if rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
    raise CheckpointError(
        f"{other} cannot be replaced in one step here ({os.strerror(code)}); nothing was changed. Write "
        "to another folder."
    )


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder, as far as it can be removed."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if PARTIAL.fullmatch(entry.name) and not entry.is_symlink():
                _remove_unless_held(entry)


def _remove_unless_held(entry: Path) -> None:
    with suppress(OSError), _opened(entry) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is locked
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _created_folder(path: Path) -> tuple[Path, int]:
    """Return a new folder, and the descriptor that locks it until it is closed."""
    while True:
        temporary = _partial_name(path)
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        if _is_mine(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)


def _is_mine(temporary: Path, descriptor: int) -> bool:
    """Lock what was just created; return False if another writer removed it as a leftover first."""
    # Some network file systems have no locks; nothing is ever removed there.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return temporary.exists()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
