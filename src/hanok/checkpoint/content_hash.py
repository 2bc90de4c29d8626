"""Hashes of files' contents, computed once: while a file's state is the same, its hash is looked up.

The state is device, inode, size and times, which change whenever contents do.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hanok.checkpoint.writer import write_json

BLOCK_BYTES = 2**24
NUM_READERS = 4


def content_hashes(files: Iterable[Path], index: Path) -> list[str]:
    """Return the hash of each file's contents, and keep new ones in `index`, a JSON file.

    Raises OSError where a file cannot be read or the index not be written.
    """
    files = list(files)
    try:
        known: Mapping[str, Mapping[str, object]] = json.loads(index.read_text())
    except (OSError, ValueError):
        known = {}
    found = dict(known)
    for file in files:
        place, state = str(file.resolve()), _state_of(file)
        if known.get(place, {}).get("state") != state:
            found[place] = {"state": state, "hash": _hash_of(file)}
    if found != known:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_json(index, found)
    return [str(found[str(file.resolve())]["hash"]) for file in files]


def _hash_of(file: Path) -> str:
    """Return the SHA-256 of the SHA-256s of a file's blocks, which several threads can work out."""
    blocks = range(0, file.stat().st_size, BLOCK_BYTES)

    def hash_block(start: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return hashlib.sha256(opened.read(BLOCK_BYTES)).digest()

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return hashlib.sha256(b"".join(pool.map(hash_block, blocks))).hexdigest()


def _state_of(file: Path) -> list[int]:
    """Return what changes whenever a file's contents do."""
    found = file.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
