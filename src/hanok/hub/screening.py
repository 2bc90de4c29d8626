"""Finds what should not be published: secrets in text files, pickles, pointers in place of weights."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from hanok.checkpoint.files import PICKLES
from hanok.hub.local import LocalFile

MOST_TEXT_BYTES = 16 * 2**20
"""Longer files hold vocabularies and weights."""
START_BYTES = 4096
POINTER = b"version https://git-lfs.github.com/spec/"
PICKLE_SUFFIXES = {*PICKLES.suffixes, ".ckpt", ".pkl", ".pickle", ".joblib"}
PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
ZIP_START = b"PK\x03\x04"
NEWLINE = b"\n"
SECRETS: Mapping[str, re.Pattern[bytes]] = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an AWS access key": re.compile(rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an AWS secret key": re.compile(
        rb"(?i:aws_secret_access_key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}\b"
    ),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "an OpenAI key": re.compile(
        rb"\bsk-(?:proj|svcacct|admin)-[\w-]{40,}|\bsk-[A-Za-z0-9]{48}\b"
        rb"|\bsk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}\b"
    ),
    "an Anthropic key": re.compile(rb"\bsk-ant-[\w-]{80,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{60,}"),
    "a Weights & Biases key": re.compile(rb"WANDB_API_KEY[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b"),
}


def secrets_in(file: LocalFile) -> list[str]:
    """Return what looks like a secret, as "a private key in line 3"; never the secret itself."""
    if file.size > MOST_TEXT_BYTES:
        return []
    data = file.path.read_bytes()
    if b"\0" in data[:START_BYTES]:
        return []
    return [
        f"{kind} in line {data.count(NEWLINE, 0, found.start()) + 1}"
        for kind, pattern in SECRETS.items()
        for found in pattern.finditer(data)
    ]


def is_pickle(file: LocalFile) -> bool:
    """Return whether a file is a pickle: loading it runs what it says.

    By its content. A file that torch wrote is an archive with a pickle in it; a name alone
    decides nothing, since .bin files of other kinds exist.
    """
    if PurePosixPath(file.name).suffix not in PICKLE_SUFFIXES:
        return False
    with file.path.open("rb") as opened:
        start = opened.read(START_BYTES)
    if PICKLE_START.match(start):
        return True
    if not start.startswith(ZIP_START):
        return False
    try:
        with zipfile.ZipFile(file.path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return True  # damaged, so nothing says that it is harmless


def is_pointer(file: LocalFile) -> bool:
    """Return whether a file is what git-lfs leaves in place of one that was not downloaded."""
    return file.size < START_BYTES and file.path.read_bytes().startswith(POINTER)


def problems_of(
    files: Sequence[LocalFile], *, allow_pickles: bool, allow_secrets: Sequence[str]
) -> Iterator[str]:
    """Yield why each file that must not be pushed must not, and what to do."""
    for file in files:
        if is_pointer(file):
            yield (
                f"{file.name}: is a git-lfs pointer, not the file itself. Get it with `git lfs "
                "pull`, or `hanok pull`."
            )
        if not allow_pickles and is_pickle(file):
            yield (
                f"{file.name}: is a pickle, which runs code when others load it. Convert it (`hanok "
                "convert`), leave it out (--exclude), or allow it (--allow-pickles)."
            )
        if file.name not in allow_secrets and (found := secrets_in(file)):
            yield (
                f"{file.name}: seems to hold {', '.join(found)}. Remove it, and revoke it if it was "
                f"ever published; if it is not one, allow the file (--allow-secrets {file.name})."
            )
