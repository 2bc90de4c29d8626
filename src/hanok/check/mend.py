"""Mends what has one answer: indexes, missing keys, leftovers. No weight changes.

A mend is planned first, as the new bytes of each file, so that it can be shown; then all files are
written together or none. Imports no torch.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanok.check.finding import CheckReport
from hanok.check.generation import FILE
from hanok.check.structure import TIE_KEY
from hanok.check.tokens import NAMES, end_of_turn, ids_in, read_tokens
from hanok.check.weights import index_of, read_json, read_weights
from hanok.checkpoint.aside import Batch, remove_leftovers
from hanok.checkpoint.formats import CONFIG
from hanok.errors import CheckpointError
from hanok.text_files import unified_diff

INDEX_KINDS = ("no-index", "index", "index-shard", "index-absent", "index-unlisted", "total-size")
TOKEN_KINDS = ("no-pad", "no-end", "end-token", "end-of-turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A file that a mend writes or removes."""

    path: Path
    old: bytes | None
    """None for a file that is not there yet, or whose content is not shown."""
    new: bytes | None
    """None where the file is removed."""


def plan_mends(folder: Path, report: CheckReport) -> tuple[Change, ...]:
    """Return what mends the mendable findings of a report."""
    kinds = {finding.kind for finding in report.findings if finding.is_mendable}
    changes: dict[Path, Callable[[], bytes | None]] = {}
    if kinds.intersection(INDEX_KINDS):
        path, content = _index(folder)
        changes[path] = lambda: _json(content, path)
    if "no-tie" in kinds:
        config = folder / CONFIG
        changes[config] = lambda: _json({**read_json(folder, CONFIG), TIE_KEY: True}, config)
    if kinds.intersection(TOKEN_KINDS):
        settings = folder / FILE
        changes[settings] = lambda: _json(_generation_config(folder, kinds), settings)
    planned = [
        Change(path=path, old=path.read_bytes() if path.is_file() else None, new=new())
        for path, new in changes.items()
    ]
    if "leftover" in kinds:
        planned += [
            Change(path=folder / finding.where, old=None, new=None)
            for finding in report.findings
            if finding.kind == "leftover"
        ]
    return tuple(planned)


def apply_mends(folder: Path, changes: Collection[Change]) -> None:
    """Write all files of `changes` or none, and remove leftovers that no writer holds."""
    try:
        with Batch() as batch:
            for change in changes:
                if change.new is not None:
                    with batch.open(change.path) as file:
                        file.write(change.new)
            batch.publish()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    for place in {change.path.parent for change in changes if change.new is None}:
        remove_leftovers(place)


def shown_change(change: Change, folder: Path) -> str:
    """Return a change as a unified diff, or the line that says what is removed."""
    name = change.path.relative_to(folder)
    if change.new is None:
        return f"removed {name}"
    old = (change.old or b"").decode("utf-8", errors="replace")
    return "\n".join(unified_diff(old, change.new.decode("utf-8"), f"a/{name}", f"b/{name}"))


def _index(folder: Path) -> tuple[Path, dict[str, Any]]:
    weights, _ = read_weights(folder)
    assert weights.entry is not None  # a finding about the index says that there is one, or will be
    old = read_json(folder, weights.entry.name)
    return weights.entry, index_of(weights.tensors, old)


def _generation_config(folder: Path, kinds: Collection[str]) -> dict[str, Any]:
    """Return generation_config.json with the end and padding tokens that other files have."""
    tokens, _, _ = read_tokens(folder, None)
    tokenizer = tokens.tokenizer
    assert tokenizer is not None  # it is where these findings come from
    values = dict(tokens.generation_config)
    if not values:
        # Readers that find the file no longer look into config.json.
        keys = [f"{name}_token_id" for name in NAMES]
        values = {key: tokens.config[key] for key in keys if tokens.config.get(key) is not None}
    if "no-pad" in kinds:
        values["pad_token_id"] = tokenizer.pad_token_id
    ends = ids_in(values.get("eos_token_id")) or list(tokens.end_ids)
    if {"no-end", "end-token"}.intersection(kinds):
        ends += [item for item in ids_in(tokenizer.eos_token_id) if item not in ends]
    if "end-of-turn" in kinds:
        ends += [item for item in end_of_turn(tokenizer) if item not in ends]
    if {"no-end", "end-token", "end-of-turn"}.intersection(kinds):
        values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return values


def _json(value: Mapping[str, Any], path: Path) -> bytes:
    """Return JSON that is indented as the file was."""
    indent: int | None = 2
    if path.is_file():
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        depths = [len(line) - len(line.lstrip(" ")) for line in lines[1:2]]
        indent = depths[0] or 2 if depths else None
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
