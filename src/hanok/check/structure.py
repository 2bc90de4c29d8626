"""Tensors against config.json: names, shapes, dtypes and ties, from headers alone. Imports no torch."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hanok.check.adapter import adapter_findings
from hanok.check.finding import Finding, Skipped
from hanok.checkpoint.files import Checkpoint
from hanok.checkpoint.formats import (
    ADAPTER_CONFIG,
    CONFIG,
    PARAMS,
    quantization_in,
    quantization_of,
)
from hanok.checkpoint.safetensors import TensorRef
from hanok.errors import CheckpointError, HanokError
from hanok.memory.account import FLOATS, Understood, understand
from hanok.models.family import families, read_config

TIE_KEY = "tie_word_embeddings"
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
AGAINST_CONFIG = "tensors against config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What the headers and config.json say together."""

    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...] = ()
    understood: Understood | None = None
    """None where the tensors are not those of the config, or could not be compared with it."""
    quantization: str | None = None


def check_structure(
    checkpoint: Checkpoint, *, is_whole: bool, promised: Collection[str] = ()
) -> Structure:
    """Compare tensors and config.

    `is_whole` says whether every weights file could be read, `promised` are the tensors that an index
    lists.
    """
    folder = checkpoint.folder
    if not checkpoint.config:
        return _without_config(checkpoint)
    try:
        method = quantization_of(checkpoint.config, folder)
    except CheckpointError as error:
        return _refused("json", folder, error)
    method = method or quantization_in(checkpoint.tensors)
    if method:
        return Structure(
            findings=(_quantized(folder, method),),
            skipped=(_not_compared("the weights are quantized"),),
            quantization=method,
        )
    model_type = checkpoint.config.get("model_type")
    if isinstance(model_type, str) and model_type not in families():
        unknown = Finding(
            level="note",
            kind="unknown-family",
            where=CONFIG,
            what=f"has model_type {model_type!r}, which hanok does not read",
            advice="nothing, if another program runs the model",
        )
        reason = f"hanok does not know how {model_type} is built"
        return Structure(findings=(unknown,), skipped=(_not_compared(reason),))
    try:
        read_config(checkpoint.config, CONFIG)
    except HanokError as error:
        return _refused("config", folder, error)
    if not is_whole:
        reason = "not every weights file could be read"
        return Structure(findings=(), skipped=(_not_compared(reason),))
    try:
        understood = understand(checkpoint)
    except HanokError as error:
        return _not_understood(checkpoint, error, promised)
    return Structure(findings=tuple(_notes(understood)), understood=understood)


def _without_config(checkpoint: Checkpoint) -> Structure:
    folder = checkpoint.folder
    if (folder / CONFIG).is_file():  # and it is not JSON, which is another finding
        return Structure(findings=(), skipped=(_not_compared(f"{CONFIG} cannot be read"),))
    if (folder / ADAPTER_CONFIG).is_file():
        found = tuple(adapter_findings(folder, checkpoint.tensors))
        return Structure(findings=found, skipped=(_not_compared("it is an adapter"),))
    if not checkpoint.files:
        return Structure(findings=(), skipped=(_not_compared("there are no weights"),))
    where = PARAMS if (folder / PARAMS).is_file() else CONFIG
    what = "is absent, and without it the architecture is not known"
    if where == PARAMS:
        what = f"is in place of {CONFIG}: the weights are in their makers' own layout"
    finding = Finding(
        level="error",
        kind="no-config",
        where=where,
        what=what,
        advice=f"get {CONFIG} from where the model comes from",
    )
    return Structure(findings=(finding,), skipped=(_not_compared(f"there is no {CONFIG}"),))


def _refused(kind: str, folder: Path, error: Exception) -> Structure:
    text = str(error).removeprefix(f"{folder}/").removeprefix(CONFIG).lstrip(": ")
    finding = Finding(
        level="error", kind=kind, where=CONFIG, what=text, advice="correct the key, or the file"
    )
    return Structure(findings=(finding,), skipped=(_not_compared(f"{CONFIG} was refused"),))


def _not_understood(
    checkpoint: Checkpoint, error: Exception, promised: Collection[str]
) -> Structure:
    if _is_tie_missing(checkpoint, promised):
        finding = Finding(
            level="error",
            kind="no-tie",
            where=CONFIG,
            what=f"does not say {TIE_KEY}, and the files have no head, so readers of this family draw "
            "one at random",
            advice=f"write {TIE_KEY}: true, which makes the embedding the head",
            is_mendable=True,
        )
    else:
        finding = Finding(
            level="error",
            kind="tensors",
            where="folder",
            what=str(error).removeprefix(f"{checkpoint.folder}: "),
            advice="get the config and the weights of one version",
        )
    return Structure(findings=(finding,))


def _is_tie_missing(checkpoint: Checkpoint, promised: Collection[str]) -> bool:
    """Return whether all that a checkpoint lacks is the word that its head is the embedding.

    A head that an index lists was lost, and not tied.
    """
    if any(TIE_KEY in place for place in _places(checkpoint.config)):
        return False
    try:
        found = understand(replace(checkpoint, config={**checkpoint.config, TIE_KEY: True}))
    except HanokError:
        return False
    head = f"{found.family.names_in(checkpoint.tensors)['lm_head']}.weight"
    return found.config.tie_embeddings and head not in promised


def _notes(found: Understood) -> Iterator[Finding]:
    checkpoint = found.checkpoint
    for note in found.notes:
        if not note.startswith("index:"):
            what, _, rest = note.partition(": ")
            yield Finding(
                level="note",
                kind="decided",
                where="folder",
                what=f"{what}: {rest}",
                advice="nothing: hanok reads it so",
            )
    refs = {
        name: checkpoint.tensors[name] for source in found.table.values() for name in source.names
    }
    yield from dtype_findings(refs, checkpoint.config)


def dtype_findings(refs: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield where the dtypes of weights are not one, or not the config's."""
    sizes: dict[str, int] = {}
    for ref in refs.values():
        if ref.dtype in FLOATS:
            sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.size_bytes
    if not sizes:
        return
    most = max(sizes, key=lambda dtype: sizes[dtype])
    if len(sizes) > 1:
        parts = ", ".join(f"{DTYPE_NAMES[name]} {size:,} bytes" for name, size in sizes.items())
        yield Finding(
            level="note",
            kind="mixed-dtypes",
            where="weights",
            what=f"are of several dtypes: {parts}",
            advice="nothing, if it was meant; readers compute in one dtype unless they are asked not to",
        )
    said = next(
        (
            str(place[key])
            for place in _places(config)
            for key in ("dtype", "torch_dtype")
            if place.get(key)
        ),
        None,
    )
    known = said.removeprefix("torch.") if said else None
    if known in DTYPE_NAMES.values() and known not in {DTYPE_NAMES[name] for name in sizes}:
        yield Finding(
            level="warning",
            kind="dtype",
            where=CONFIG,
            what=f"says {known}, and the weights are {DTYPE_NAMES[most]}: readers that follow it "
            "convert them",
            advice=f"write {DTYPE_NAMES[most]} if nothing is to be converted",
        )


def _places(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    inner = config.get("text_config")
    return (config, inner) if isinstance(inner, Mapping) else (config,)


def _quantized(folder: Path, method: str) -> Finding:
    return Finding(
        level="note",
        kind="quantized",
        where="folder",
        what=f"the weights are quantized ({method})",
        advice="checks of names, shapes, dtypes and rows do not apply; floats were read",
    )


def _not_compared(reason: str) -> Skipped:
    return Skipped(check=AGAINST_CONFIG, reason=reason)
