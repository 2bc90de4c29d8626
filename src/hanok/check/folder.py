"""Checks a folder: is this model what its files say it is?

Each part of the check gives findings and goes on, so that one fault does not hide the others: files,
index and shards, tensors against config.json, tokens, and the values of every weight.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hanok.check.files import file_findings, files_in
from hanok.check.finding import CheckReport, Finding, Skipped, ordered, plural, shown
from hanok.check.options import CheckOptions
from hanok.check.structure import Structure, check_structure
from hanok.check.tokens import Tokens, facts_of, ids_in, read_tokens
from hanok.check.weights import Weights, read_json, read_weights
from hanok.checkpoint.adapter_files import B
from hanok.checkpoint.formats import ADAPTER_CONFIG, CONFIG
from hanok.errors import CheckpointError, OptionError
from hanok.memory.cpus import cpu_budget

if TYPE_CHECKING:
    from hanok.check.values import TensorValues

MAX_THREADS = 4
AHEAD_BYTES = 4 * 2**30  # of all files, so that a large model does not push out what else is cached
CAUSES = ("lfs-pointer", "broken-link", "json")
"""Kinds after which other parts of the check cannot read the same file."""
FEWEST_COLUMNS = 8  # in shorter rows equal numbers say nothing


def check_folder(
    folder: str | Path,
    options: CheckOptions | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
    on_start: Callable[[int], None] = lambda total: None,
) -> CheckReport:
    """Return what is wrong with the model in a folder, and what is worth knowing about it.

    Nothing is written, and no code of the folder is run. `on_start` gets the bytes of weights that will
    be read, and `progress` those read since its last call, from several threads. Raises OptionError for
    what is no folder; every fault of its files is a finding.
    """
    options = options or CheckOptions()
    folder = Path(folder)
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder. Give the folder of a model.")
    weights, findings = read_weights(folder)
    checkpoint = weights.checkpoint(
        folder, read_json(folder, CONFIG), read_json(folder, "generation_config.json")
    )
    structure = check_structure(checkpoint, is_whole=weights.is_whole, promised=weights.promised)
    tokens, token_faults, not_tried = read_tokens(folder, _rows(structure))
    present = files_in(folder)
    findings += [
        *structure.findings,
        *token_faults,
        *file_findings(folder, present, _used(folder, weights)),
    ]
    if not weights.files and not checkpoint.config and tokens.tokenizer is None and not findings:
        findings.append(_no_model(folder))
    skipped = [*structure.skipped, *not_tried]
    if not options.values:
        skipped.append(Skipped(check="values of weights", reason="as asked for"))
    elif weights.tensors:
        threads = options.threads or min(MAX_THREADS, cpu_budget().threads)
        findings += _value_findings(weights, structure, tokens, threads, progress, on_start)
    return CheckReport(
        folder=str(folder),
        facts={**_facts(weights, structure, present), **facts_of(tokens)},
        findings=ordered(_without_echoes(findings)),
        skipped=tuple(skipped),
    )


def _no_model(folder: Path) -> Finding:
    return Finding(
        level="error",
        kind="no-model",
        where="folder",
        what="holds no weights, no config.json and no vocabulary",
        advice="give the folder of a model",
    )


def _rows(structure: Structure) -> int | None:
    found = structure.understood
    return None if found is None else found.config.vocab_size


def _used(folder: Path, weights: Weights) -> list[Path]:
    """Return the files that the model is made of; of one that cannot be read, its name."""
    return [*([] if weights.entry is None else [weights.entry]), *weights.files, *weights.unread]


def _value_findings(
    weights: Weights,
    structure: Structure,
    tokens: Tokens,
    threads: int,
    progress: Callable[[int], None],
    on_start: Callable[[int], None],
) -> Iterator[Finding]:
    if "torch" not in sys.modules:
        # Its import takes a second, and the disk reads meanwhile.
        threading.Thread(target=_read_ahead, args=(weights.files,), daemon=True).start()
    from hanok.check.values import same_bytes, scan_values, scanned_bytes

    refs = list(weights.tensors.values())
    names = _Names(structure, weights)
    on_start(scanned_bytes(refs))
    try:
        found = scan_values(
            refs,
            with_rows=names.matrices | names.products,
            with_twins=names.embeddings,
            threads=threads,
            progress=progress,
        )
    except (OSError, CheckpointError) as error:
        yield Finding(
            level="error",
            kind="damaged",
            where="weights",
            what=f"cannot be read: {error}",
            advice="get the file again, and check the disk",
        )
        return
    for name, values in found.items():
        shape = weights.tensors[name].shape
        yield from _finite_findings(name, values, shape, is_needed=names.is_needed(name))
        if name in names.embeddings:
            yield from _embedding_findings(name, values, tokens)
        elif name in names.matrices:
            yield from _matrix_findings(name, values, weights)
    idle = [
        name for name in names.products if len(found[name].zero_rows) == _num_rows(weights, name)
    ]
    if idle and len(idle) == len(names.products):
        yield Finding(
            level="warning",
            kind="idle-adapter",
            where="adapter",
            what="every B is zero, so it computes what its base does: it was never trained",
            advice="get the adapter that was trained",
        )
    understood = structure.understood
    if understood is not None and understood.tied_head is not None:
        head = understood.tied_head
        embedding = understood.checkpoint.tensors[understood.table["embed_tokens.weight"].names[0]]
        if same_bytes(head, embedding):
            yield Finding(
                level="note",
                kind="tied-copy",
                where=head.name,
                what=f"is stored though it is the embedding ({head.size_bytes:,} bytes)",
                advice="nothing: both are the same",
            )
        else:
            yield Finding(
                level="error",
                kind="tied-head",
                where=head.name,
                what="differs from the embedding, and config.json ties the two",
                advice="write tie_word_embeddings: false to use both, or delete the tensor",
            )


def _read_ahead(files: Iterable[Path]) -> None:
    """Ask the kernel to read files into its cache."""
    left = AHEAD_BYTES
    for file in files:
        with suppress(OSError), file.open("rb") as opened:
            size = min(left, file.stat().st_size)
            os.posix_fadvise(opened.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
            left -= size


class _Names:
    """Which tensors are looked at how."""

    def __init__(self, structure: Structure, weights: Weights) -> None:
        tensors = weights.tensors
        self.needed: set[str] | None = None
        self.embeddings: set[str] = set()
        understood = structure.understood
        if understood is not None:
            table = understood.table
            # Of a tensor that holds every expert, the name in the file is that of the stack.
            self.needed = {
                source.stack if source.stack in tensors else name
                for source in table.values()
                for name in source.names
            }
            places = ("embed_tokens.weight", "lm_head.weight")
            self.embeddings = {table[place].names[0] for place in places if place in table}
        candidates = self.needed if self.needed is not None else set(tensors)
        self.products: set[str] = set()
        if structure.understood is None and _is_adapter(weights):
            self.products = {name for name in tensors if name.endswith(B)}
        if structure.quantization or self.products:
            candidates = set()
        self.matrices = {
            name
            for name in candidates
            if name in tensors
            and len(tensors[name].shape) > 1
            and tensors[name].shape[-1] >= FEWEST_COLUMNS
        }

    def is_needed(self, name: str) -> bool:
        """Return whether a tensor is part of the model, as far as is known."""
        return self.needed is None or name in self.needed


def _is_adapter(weights: Weights) -> bool:
    return any((file.parent / ADAPTER_CONFIG).is_file() for file in weights.files)


def _finite_findings(
    name: str, values: "TensorValues", shape: tuple[int, ...], *, is_needed: bool
) -> Iterator[Finding]:
    if values.num_not_finite:
        yield Finding(
            level="error" if is_needed else "note",
            kind="not-finite",
            where=name,
            what=f"{plural(values.num_not_finite, 'number')} not finite (NaN or infinity), the first at "
            f"{list(_place(values.first_not_finite or 0, shape))}",
            advice="get the file again; if it was saved so, training diverged"
            if is_needed
            else "nothing: the tensor is no part of the model",
        )


def _place(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the indices along each dimension of a number whose index in C order is given."""
    place: list[int] = []
    for extent in reversed(shape):
        index, last = divmod(index, extent)
        place.insert(0, last)
    return tuple(place)


def _matrix_findings(name: str, values: "TensorValues", weights: Weights) -> Iterator[Finding]:
    rows = _num_rows(weights, name)
    for kind, found, what in (
        ("dead-rows", values.zero_rows, "rows of zeros, which compute nothing"),
        ("constant-rows", values.constant_rows, "rows of one number throughout"),
    ):
        if found:
            yield Finding(
                level="warning",
                kind=kind,
                where=name,
                what=f"{what}: {len(found):,} of {rows:,} ({shown(found)})",
                advice="compare with the model it was made from",
            )


def _num_rows(weights: Weights, name: str) -> int:
    return math.prod(weights.tensors[name].shape[:-1])


def _embedding_findings(name: str, values: "TensorValues", tokens: Tokens) -> Iterator[Finding]:
    """Yield rows of tokens that mean nothing, or the same as others; spare rows may be anything."""
    tokenizer = tokens.tokenizer
    if tokenizer is None:
        return
    used = {token_id: tokenizer.spelling(token_id) for token_id in _suspects(values)}
    special = {*tokenizer.special_token_ids, *ids_in(tokens.config.get("pad_token_id"))}
    for kind, rows, what in (
        ("dead-rows", values.zero_rows, "rows of zeros"),
        ("constant-rows", values.constant_rows, "rows of one number"),
    ):
        ordinary = [row for row in rows if used[row] is not None and row not in special]
        others = [row for row in rows if row in special and used[row] is not None]
        if ordinary:
            yield Finding(
                level="warning",
                kind=kind,
                where=name,
                what=f"{plural(len(ordinary), 'token')} with {what}: {_spelled(ordinary, used)}",
                advice="they mean nothing to the model; get the weights again, or train them",
            )
        others = [row for row in others if row not in ids_in(tokenizer.pad_token_id)]
        if others:
            yield Finding(
                level="note",
                kind="untrained",
                where=name,
                what=f"{plural(len(others), 'special token')} with {what}: {_spelled(others, used)}",
                advice="train their rows before a conversation uses them",
            )
    twins = [pair for pair in values.twins if None not in (used[pair[0]], used[pair[1]])]
    if twins:
        pairs = [
            f"{used[later]!r} ({later}) as {used[first]!r} ({first})" for first, later in twins
        ]
        is_special = all(later in special for _, later in twins)
        yield Finding(
            level="note" if is_special else "warning",
            kind="twin-rows",
            where=name,
            what=f"{plural(len(twins), 'token')} with the same row as another: {shown(pairs)}",
            advice="the model cannot tell them apart until they are trained, each from a row of its own",
        )


def _suspects(values: "TensorValues") -> Iterator[int]:
    yield from values.zero_rows
    yield from values.constant_rows
    for pair in values.twins:
        yield from pair


def _spelled(rows: list[int], used: Mapping[int, str | None]) -> str:
    return shown(f"{row} {used[row]!r}" for row in rows)


def _without_echoes(findings: list[Finding]) -> Iterator[Finding]:
    """Yield findings, but not again what a pointer, a broken link or broken JSON explains."""
    explained = {item.where for item in findings if item.kind in CAUSES}
    for item in findings:
        is_same_file = item.where in explained or item.what.startswith(tuple(explained))
        if item.kind in CAUSES or item.kind not in ("damaged", "tokenizer") or not is_same_file:
            yield item


def _facts(weights: Weights, structure: Structure, present: list[Path]) -> dict[str, str]:
    sizes = [file.stat().st_size for file in present if file.is_file()]
    facts = {
        "files": f"{len(sizes):,}, {sum(sizes):,} bytes, the largest {max(sizes, default=0):,}"
    }
    if weights.tensors:
        kinds: dict[str, int] = {}
        for ref in weights.tensors.values():
            kinds[ref.dtype] = kinds.get(ref.dtype, 0) + ref.dense_bytes
        listed = ", ".join(f"{name} {size:,} bytes" for name, size in sorted(kinds.items()))
        facts["weights"] = (
            f"{plural(len(weights.tensors), 'tensor')} in {len(weights.files)}: {listed}"
        )
    if (found := structure.understood) is not None:
        config = found.config
        head = "tied head" if config.tie_embeddings else "head" if config.has_head else "no head"
        facts["model"] = f"{config.model_type}, {config.num_parameters():,} parameters, {head}"
    elif structure.quantization:
        facts["model"] = f"quantized ({structure.quantization})"
    return facts
