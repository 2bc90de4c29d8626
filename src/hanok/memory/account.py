"""Understands a checkpoint from its headers: whose model it is, and where each parameter lies in it.

Loading, planning and `hanok info` ask here, so that none of them accepts what another refuses. Every
tensor is accounted for by name, shape and dtype; only the values are not looked at. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hanok.checkpoint.files import Checkpoint
from hanok.checkpoint.formats import (
    adapter_note,
    quantization_in,
    quantization_of,
    quantized_error,
)
from hanok.checkpoint.pooling import has_modules
from hanok.checkpoint.safetensors import TensorRef
from hanok.errors import CheckpointError, OptionError, UnsupportedError
from hanok.models.config import ModelConfig
from hanok.models.family import (
    Family,
    Source,
    read_config,
    sources,
    spelling_note,
    unwrapped,
)

FLOATS = ("F64", "F32", "F16", "BF16")  # what parameters may be stored in
SHOWN_NAMES = 8
# Classes of transformers without a head. GPT2LMHeadModel has one, and so have others with "Head".
BASE_MODEL = re.compile(r"(?!.*Head)\w+Model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Understood:
    """A checkpoint as its headers and JSON files describe it."""

    checkpoint: Checkpoint
    """As it was opened, but for tensors of all experts: these are one for each here."""
    family: Family
    config: ModelConfig
    table: Mapping[str, Source]
    """Where each parameter lies, by its name in `Decoder`."""
    tied_head: TensorRef | None
    """A second copy of the embedding in the files, whose values should be the same."""
    left_out: Mapping[str, tuple[TensorRef, ...]]
    """Weights in the files that are no part of the decoder, by what they are; they are never read."""
    notes: tuple[str, ...]
    """What is unusual about the files and was decided on the user's behalf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint that was opened once, for its plan and its load."""

    path: Path
    """What was asked for: a folder, a file, or the id of a model on the hub."""
    understood: Understood
    is_here: bool
    """Whether it is on this disk."""


def understand(checkpoint: Checkpoint) -> Understood:
    """Return what a checkpoint is; one without weights files is taken to hold what its config says.

    Raises CheckpointError and UnsupportedError for what cannot be loaded.
    """
    where = str(checkpoint.folder / "config.json")
    if method := quantization_of(checkpoint.config, checkpoint.folder):
        raise quantized_error(str(checkpoint.folder), method)
    family, config = read_config(checkpoint.config, where)
    if _is_tied_unsaid(checkpoint, family):
        config = replace(config, tie_embeddings=True)
    why_headless = None if config.tie_embeddings else _why_headless(checkpoint, family)
    config = replace(config, has_head=why_headless is None)
    table = {
        name: _as_stacked(source, checkpoint.tensors)
        for name, source in sources(family, config, checkpoint.tensors).items()
    }
    checkpoint = replace(checkpoint, tensors=_unstacked(checkpoint.tensors, table))
    tied_head = None
    if checkpoint.files:
        tied_head = _account_for(checkpoint, family, config, table)
    left_out = _left_out(family, checkpoint.tensors)
    notes = (
        *(_left_out_note(name, refs) for name, refs in left_out.items()),
        spelling_note(family, checkpoint.tensors),
        adapter_note(checkpoint.folder),
        why_headless
        and f"no head: {why_headless}. The model makes embeddings and generates nothing",
        *(f"index: {text}, and none of them is needed" for text in checkpoint.disagreements),
    )
    return Understood(
        checkpoint=checkpoint,
        family=family,
        config=config,
        table=table,
        tied_head=tied_head,
        left_out=left_out,
        notes=tuple(note for note in notes if note is not None),
    )


def tied_head_error(checkpoint: Checkpoint, name: str) -> CheckpointError:
    """Return the error of a stored head that differs from the embedding it is tied to."""
    return CheckpointError(
        f"{checkpoint.folder}: config.json ties the head to the embedding, but {name} differs "
        "from it. Set tie_word_embeddings to false to use both, or delete the tensor."
    )


def check_head(path: Path, *, has_head: bool) -> None:
    """Raise OptionError for a model without a head, where tokens or their scores are asked for."""
    if not has_head:
        raise OptionError(
            f"{path} is a base model without a head: it makes embeddings (hanok.load(…).embed, "
            "/v1/embeddings of `hanok serve`), and neither tokens nor their scores. To generate, "
            "choose the causal model that it was made from."
        )


def _why_headless(checkpoint: Checkpoint, family: Family) -> str | None:
    """Return what says that a checkpoint without a head is meant to have none; None: it has one.

    transformers writes base models so (AutoModel), and sentence-transformers lists what follows them.
    A causal model whose head is missing says neither, and transformers would draw it at random.
    """
    in_files = unwrapped(checkpoint.tensors)
    head = f"{family.names_in(in_files)['lm_head']}.weight"
    if head in in_files:
        return None
    absent = f"the files have no {head}" if checkpoint.files else "there are no weights files"
    architectures = checkpoint.config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if names and all(BASE_MODEL.fullmatch(str(name)) for name in names):
        return f"config.json names the base model {names[0]}, and {absent}"
    if has_modules(checkpoint.folder):
        return f"it is an embedder (modules.json), and {absent}"
    return None


def _headless_advice(missing: list[str], head: str) -> str:
    """Return what to do where nothing but the head is missing."""
    if missing != [head]:
        return ""
    return (
        " Without a head nothing is generated. If the model is meant for embeddings alone, say so: name "
        'the base model in config.json (such as "architectures": ["MistralModel"] instead of '
        '["MistralForCausalLM"]), or add the modules.json of sentence-transformers.'
    )


def _account_for(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, table: Mapping[str, Source]
) -> TensorRef | None:
    """Raise unless files and decoder agree on every tensor; return the second copy of a tied one."""
    tensors = checkpoint.tensors
    expected = {
        name: shape
        for source in table.values()
        for name, shape in zip(source.names, source.file_shapes(), strict=True)
    }
    in_files = unwrapped(tensors)
    prefixes = family.prefixes_in(in_files)
    prefix = prefixes[0] if prefixes else family.prefix
    left_over = [
        name
        for plain, name in in_files.items()
        if name not in expected and not family.ignores(plain, prefix)
    ]
    head_path = str(family.names_in(in_files)["lm_head"])
    head = _tied_head(checkpoint, config, table, head_path)
    if head is not None and head.name in left_over:
        left_over.remove(head.name)
    wrong = [
        f"{name} is {list(tensors[name].shape)} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing = [name for name in expected if name not in tensors]
    complaints = [
        f"{len(items)} {what}: {_shown(items)}"
        for what, items in (
            ("missing", missing),
            ("of the wrong shape", wrong),
            ("left over", left_over),
        )
        if items
    ]
    if complaints:
        if method := quantization_in(tensors):
            raise quantized_error(str(checkpoint.folder), f"{method}, by its tensors")
        copies = ""
        if left_over and len(prefixes) > 1:
            copies = f" Layers lie below {' and '.join(map(repr, prefixes))}: keep one of them."
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors are not those of the {config.model_type} model that "
            f"config.json describes. {'; '.join([*complaints, *checkpoint.disagreements])}.{copies} "
            "Check that config.json and the weights belong together and that every file was downloaded."
            + _headless_advice(missing, f"{head_path}.weight")
        )
    _check_dtypes(checkpoint, [tensors[name] for name in expected])
    return head


def _is_tied_unsaid(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the head is the embedding though config.json does not say so.

    transformers ties then, and untied files of these families have both, with or without a word of it.
    """
    config, names = checkpoint.config, unwrapped(checkpoint.tensors)
    if config["model_type"] not in family.tied_without_head or not names:
        return False
    inner = config.get("text_config") or {}
    is_said = any(place.get("tie_word_embeddings") is not None for place in (config, inner))
    return not is_said and f"{family.names_in(names)['lm_head']}.weight" not in names


def _as_stacked(source: Source, tensors: Mapping[str, TensorRef]) -> Source:
    """Return a source whose matrices are (out, in) in these files, whatever its family's usually are.

    transformers 5 writes them so, and reads both by their shapes.
    """
    stack = tensors.get(source.stack)
    if stack is None or stack.shape[1:] == source.file_shapes()[0]:
        return source
    return replace(source, layout="rows") if stack.shape[1:] == source.shape else source


def _unstacked(
    tensors: Mapping[str, TensorRef], table: Mapping[str, Source]
) -> Mapping[str, TensorRef]:
    """Return the tensors with those that hold a matrix for each expert cut into these."""
    stacks = {source.stack for source in table.values() if source.stack in tensors}
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        if name not in stacks or len(ref.shape) != 3 or ref.strides is not None:
            found[name] = ref
            continue
        count, *shape = ref.shape
        size = ref.size_bytes // max(count, 1)
        for index in range(count):
            part = f"{name}.{index}"
            start = ref.offset_bytes + index * size
            found[part] = replace(
                ref, name=part, shape=tuple(shape), offset_bytes=start, size_bytes=size
            )
    return found


def _left_out(family: Family, tensors: Mapping[str, TensorRef]) -> dict[str, tuple[TensorRef, ...]]:
    in_files = unwrapped(tensors).items()
    found = {
        what: tuple(tensors[name] for plain, name in in_files if re.fullmatch(pattern, plain))
        for what, pattern in family.left_out.items()
    }
    return {what: refs for what, refs in found.items() if refs}


def _left_out_note(what: str, refs: tuple[TensorRef, ...]) -> str:
    count = f"{len(refs)} tensor{'s' * (len(refs) > 1)}"
    return f"left out: {what}, {count} of {sum(ref.size_bytes for ref in refs):,} bytes"


def _check_dtypes(checkpoint: Checkpoint, refs: list[TensorRef]) -> None:
    others = sorted({ref.dtype for ref in refs} - set(FLOATS))
    if others:
        named = [ref.name for ref in refs if ref.dtype in others]
        raise UnsupportedError(
            f"{checkpoint.folder}: {len(named)} weights are {' and '.join(others)}, which this version "
            f"does not compute with: {_shown(named)}. It reads {', '.join(FLOATS)}; use the checkpoint "
            "that these were made from."
        )


def _tied_head(
    checkpoint: Checkpoint, config: ModelConfig, table: Mapping[str, Source], path: str
) -> TensorRef | None:
    """Return the head that is stored though it is tied; one that cannot be the embedding is refused."""
    name = unwrapped(checkpoint.tensors).get(f"{path}.weight")
    embedding = checkpoint.tensors.get(table["embed_tokens.weight"].names[0])
    if not config.tie_embeddings or name is None or embedding is None:
        return None
    head = checkpoint.tensors[name]
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        raise tied_head_error(checkpoint, name)
    return head


def _shown(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN_NAMES} more" if len(items) > SHOWN_NAMES else ""
    return ", ".join(items[:SHOWN_NAMES]) + more
