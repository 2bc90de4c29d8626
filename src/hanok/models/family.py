"""A model family as data: how its `config.json` is read, and what its tensors are called in files.

Our own names are Llama's; a family whose files use others says so in `names`, and says in `layouts`
where a matrix lies differently. `sources` joins both into one answer: which checkpoint tensors each
parameter is made of. Files may put another prefix before the names, or none: a base model without
"model.", a wrapper's "module." or "_orig_mod.", "language_model.". It is whatever the embedding and the
layers lie below; wrappers of single modules are left out of their names. Imports no torch.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from hanok.errors import CheckpointError
from hanok.models.config import Mixer, ModelConfig
from hanok.models.keys import Keys
from hanok.registry import discover, nearest_first

# rows: (out, in), parts one after another. columns: (in, out), GPT-2's Conv1D.
# heads: rows ordered head by head, each with its query, key and value (GPT-NeoX).
Layout = Literal["rows", "columns", "heads"]

LLAMA_NAMES: Mapping[str, str | tuple[str, ...]] = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
GPT2_NAMES: Mapping[str, str | tuple[str, ...]] = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "layers": "transformer.h",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


# What torch.compile, FSDP and activation checkpointing put before the names of the modules they wrap.
_WRAPPERS = re.compile(r"\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# The `names` that are not relative to a block.
_WHOLE_PATHS = ("embed_tokens", "embed_positions", "layers", "norm", "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One file of `models/families`: `FAMILY = Family(...)` is all the registration there is.

    `read_config` may put mixers and layers of the family's own into the `ModelConfig`: data classes of
    its file, whose modules one file of `models/mixers` registers.

    `model_types` are those that its config.json may have, and which published models they are of.
    `names` maps our module paths to the files' (paths inside a block are relative to it, and an
    expert's number is written `{}`); a tuple lists the parts that a fused weight is made of.
    `stacked` are those of our paths whose matrices lie in one tensor, one for each expert in turn.
    `ignored_tensors` are regular expressions. `left_out` are weights that are no part of the decoder:
    what they are, and a regular expression of their names. `other_prefixes` are those that published
    files have as often as that of `names`. `tied_without_head` are model types whose head is the
    embedding where config.json says nothing of it and the files hold no head.
    """

    model_types: Mapping[str, str]
    read_config: Callable[[Keys], ModelConfig]
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: LLAMA_NAMES)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    stacked: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    other_prefixes: tuple[str, ...] = ()
    tied_without_head: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of the layers begin with, such as "model."; it may be empty."""
        return _parent(str(self.names["layers"]))

    def prefixes_in(self, present: Collection[str]) -> list[str]:
        """Return below which prefixes of these tensor names a decoder lies, the largest first.

        One that is as large as the largest is a second copy; the usual prefix comes before it.
        """
        embedding = f"{self.names['embed_tokens']}.weight".removeprefix(self.prefix)
        layers = f"{self.names['layers']}.".removeprefix(self.prefix)
        sizes = {
            prefix: sum(other.startswith(prefix + layers) for other in present)
            for prefix in _before(embedding, present)
        }
        found = [prefix for prefix, size in sizes.items() if size]
        return sorted(found, key=lambda prefix: (-sizes[prefix], prefix != self.prefix, prefix))

    def names_in(self, present: Collection[str]) -> Mapping[str, str | tuple[str, ...]]:
        """Return `names` as files with these tensors spell them."""
        prefix = next(iter(self.prefixes_in(present)), self.prefix)
        if prefix == self.prefix:
            return self.names
        paths = {key: str(self.names[key]) for key in _WHOLE_PATHS if key in self.names}
        head = paths["lm_head"].rpartition(".")[2]
        heads = [place for place in _before(f"{head}.weight", present) if prefix.startswith(place)]
        outer = prefix.removesuffix(self.prefix) if prefix.endswith(self.prefix) else ""
        spelled = {
            key: prefix + path.removeprefix(self.prefix)
            if path.startswith(self.prefix)
            else outer + path
            for key, path in paths.items()
        }
        if heads:
            spelled["lm_head"] = max(heads, key=len) + head
        return {**self.names, **spelled}

    def ignores(self, name: str, prefix: str) -> bool:
        """Return whether a tensor does not belong to the decoder, in files with this prefix."""
        usual = name
        if prefix.endswith(self.prefix):
            usual = name.removeprefix(prefix.removesuffix(self.prefix))
        elif self.prefix.endswith(prefix):
            usual = self.prefix.removesuffix(prefix) + name
        return any(
            re.fullmatch(pattern, spelling)
            for pattern in (*self.ignored_tensors, *self.left_out.values())
            for spelling in {name, usual}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How one parameter lies in a checkpoint.

    `rows` are the output rows that each of `names` contributes; `shape` is the parameter's own.
    `head_rows` are the rows of one head, which the layout "heads" needs.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    head_rows: int
    layout: Layout = "rows"
    stack: str = ""
    """The tensor of the file that this is one matrix of; empty if it is a separate tensor."""

    def file_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape that each of `names` must have in the file."""
        if self.layout == "columns" and len(self.shape) == 2:
            return tuple((self.shape[1], rows) for rows in self.rows)
        return tuple((rows, *self.shape[1:]) for rows in self.rows)


@cache
def families() -> dict[str, Family]:
    """Return every known family by `model_type`."""
    found: dict[str, Family] = {}
    for family in discover("hanok.models.families", "FAMILY").values():
        found |= dict.fromkeys(family.model_types, family)
    return found


def family_of(config: Mapping[str, object], where: str) -> Family:
    """Return the family of a `config.json`; `where` names the file in the error."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{where} has no `model_type`, which says how the model is built. "
            f"Known: {', '.join(sorted(families()))}."
        )
    if model_type not in families():
        known = nearest_first(model_type, list(families()))
        raise CheckpointError(
            f"{where} has model_type {model_type!r}, which hanok does not know. "
            f"Known, the nearest first: {', '.join(known)}."
        )
    return families()[model_type]


def read_config(config: Mapping[str, object], where: str) -> tuple[Family, ModelConfig]:
    """Return the family and the `ModelConfig` of a `config.json`; every key must be accounted for."""
    family = family_of(config, where)
    keys = Keys(config, where)
    model_config = family.read_config(keys)
    keys.refuse_unread()
    return family, model_config


def sources(family: Family, config: ModelConfig, present: Collection[str]) -> dict[str, Source]:
    """Return the source of every parameter, by its name in `Decoder`.

    `present` are the checkpoint's tensor names; they only decide how the files spell them.
    """
    in_files = unwrapped(present)
    names = family.names_in(in_files)
    found = {}
    for name, shape in config.parameter_shapes().items():
        module, _, leaf = name.rpartition(".")
        paths = _file_paths(module, names)
        key = _layer_relative(module)[1]
        pattern = _expert_pattern(key)
        in_table = tuple(in_files.get(f"{path}.{leaf}", f"{path}.{leaf}") for path in paths)
        stack = ""
        if pattern in family.stacked:
            path, _, expert = paths[0].rpartition(".")
            stack = in_files.get(path, path)
            in_table = (f"{stack}.{expert}",)
        mixer = _mixer_of(config, module)
        found[name] = Source(
            names=in_table,
            rows=_part_rows(mixer, key, shape[0], len(paths)),
            shape=shape,
            layout=family.layouts.get(pattern, "rows"),
            head_rows=mixer.head_rows if mixer else 1,
            stack=stack,
        )
    return found


def usual_sources(family: Family, config: ModelConfig) -> dict[str, Source]:
    """Return the sources of every parameter by the names that transformers gives modules.

    A head that is tied to the embedding is among them.
    """
    found = sources(family, config, ())
    if config.has_head and "lm_head.weight" not in found:
        found["lm_head.weight"] = replace(
            found["embed_tokens.weight"], names=(f"{family.names['lm_head']}.weight",)
        )
    return found


def unwrapped(present: Collection[str]) -> dict[str, str]:
    """Return the names in the files by what they are without the wrappers of single modules."""
    return {_WRAPPERS.sub("", name): name for name in present}


def spelling_note(family: Family, present: Collection[str]) -> str | None:
    """Return how the names in the files differ from the family's; None where they do not."""
    in_files = unwrapped(present)
    usual = f"{family.names['embed_tokens']}.weight"
    prefix = next(iter(family.prefixes_in(in_files)), family.prefix)
    found = in_files.get(prefix + usual.removeprefix(family.prefix), usual)
    if found == usual or prefix in family.other_prefixes:
        usual = found
        wrapped = (pair for pair in in_files.items() if pair[0] != pair[1])
        usual, found = next(wrapped, (usual, found))
    if found == usual:
        return None
    return f"tensor names: {found} in the files is read as {usual}, and the others likewise"


def _before(tail: str, present: Collection[str]) -> list[str]:
    """Return the part before `tail` of the names that end with it."""
    return [
        name.removesuffix(tail) for name in present if name == tail or name.endswith(f".{tail}")
    ]


def _parent(path: str) -> str:
    """Return a path up to its last component: "model." of "model.layers"."""
    outer, dot, _ = path.rpartition(".")
    return outer + dot


def _layer_relative(module: str) -> tuple[str, str]:
    """Split "layers.3.mlp.down_proj" into ("layers.3", "mlp.down_proj"); other paths have no first."""
    match = re.fullmatch(r"(layers\.\d+)\.(.+)", module)
    return (match[1], match[2]) if match else ("", module)


def _expert_pattern(inner: str) -> str:
    """Return a path inside a block with an expert's number written `{}`."""
    return re.sub(r"(?<=experts\.)\d+", "{}", inner)


def _file_paths(module: str, names: Mapping[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    layer, inner = _layer_relative(module)
    pattern = _expert_pattern(inner)
    expert = re.search(r"(?<=experts\.)\d+", inner)
    target = names.get(pattern, pattern)
    parts = (target,) if isinstance(target, str) else target
    if expert:
        parts = tuple(part.replace("{}", expert[0]) for part in parts)
    if layer:
        parts = tuple(f"{names['layers']}.{layer.removeprefix('layers.')}.{part}" for part in parts)
    return parts


def _mixer_of(config: ModelConfig, module: str) -> Mixer | None:
    """Return the mixer that a path in `Decoder` lies in."""
    match = re.match(r"layers\.(\d+)\.self_attn\.", module)
    return config.layers[int(match[1])].mixer if match else None


def _part_rows(mixer: Mixer | None, key: str, rows: int, num_parts: int) -> tuple[int, ...]:
    if num_parts == 1:
        return (rows,)
    parts = mixer.part_rows if mixer else {}
    return parts.get(key.removeprefix("self_attn."), (rows // num_parts,) * num_parts)
