"""Merges an adapter into the weights it was trained over, as files: one weight in memory at a time.

Each changed weight is computed in float32 and rounded once to the dtype of the files. The weights may
first become what a quantized base really computed with: quantized and dequantized. Everything else of
the base's folder is copied.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hanok.checkpoint.adapter_files import (
    MAGNITUDE,
    TOKEN_ROWS,
    A,
    AdapterFiles,
    B,
    open_adapter,
)
from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.card import Step, add_step
from hanok.checkpoint.convert import COMPANION_SUFFIXES
from hanok.checkpoint.files import INDEX_SUFFIX, open_checkpoint, read_object
from hanok.checkpoint.safetensors import TensorRef
from hanok.checkpoint.writer import TensorData, write_json, write_safetensors
from hanok.errors import CheckpointError
from hanok.memory.account import Understood, understand
from hanok.memory.adapters import token_rows_of
from hanok.memory.save import bytes_of
from hanok.memory.tensors import MappedFiles, from_file_order, to_file_order
from hanok.models.family import Source, sources
from hanok.models.lora import Part, merged
from hanok.quant.base import QuantMethod, quantize
from hanok.quant.recipe import Recipe, read_recipe

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was merged."""

    num_changed: int
    """Tensors of the files that an adapter changed."""
    num_dequantized: int
    """Tensors that were quantized and dequantized."""
    is_untied: bool
    """Whether embedding and head, one weight in the base, are two in the result."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    base_quant: str | None = None,
    progress: Callable[[int], None] | None = None,
    step: Step | None = None,
) -> MergeReport:
    """Write a checkpoint whose weights have an adapter in them.

    `base_quant` is how the base was quantized when the adapter was trained: each weight that it
    quantizes is what was computed with then. `step` is written into the card. Raises CheckpointError
    where the adapter does not fit the base, where a merged weight is not finite, or where the output
    exists and is not empty; UnsupportedError for a base whose files are quantized.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder.")
    recipe = None if base_quant is None else read_recipe(base_quant)
    merging = _Merging(understand(open_checkpoint(base)), open_adapter(adapter), recipe)
    # As it was opened: matrices of all experts in one tensor are one tensor in the result too.
    tensors = [
        *(merging.tensor(ref) for ref in open_checkpoint(base).tensors.values()),
        *merging.head_alone(),
    ]
    folder = merging.base.checkpoint.folder
    with folder_aside(target) as unfinished:
        write_safetensors(unfinished, tensors, metadata={"format": "pt"}, progress=progress)
        for file in sorted(folder.iterdir()):
            is_companion = file.suffix in COMPANION_SUFFIXES and file.is_file()
            if is_companion and not file.name.endswith(INDEX_SUFFIX):
                shutil.copyfile(file, unfinished / file.name)
        if merging.is_untied:
            config = read_object(unfinished / "config.json")
            write_json(unfinished / "config.json", {**config, "tie_word_embeddings": False})
        if step is not None:
            add_step(unfinished, step)
    return merging.report()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a part of a parameter lies in the files."""

    parameter: str
    source: Source
    number: int
    """Which part of the parameter."""
    usual: str
    """What transformers calls it."""


class _Merging:
    """Base and adapter, and what becomes of each tensor of the base."""

    def __init__(self, base: Understood, files: AdapterFiles, recipe: Recipe | None) -> None:
        self.base = base
        self._files = files
        self._recipe = recipe
        self._mapped = MappedFiles()
        self._whole: tuple[str, Tensor] | None = None
        usual: Mapping[str, Source] = sources(base.family, base.config, ())
        self._places = {
            stored: _Place(parameter=name, source=source, number=number, usual=known)
            for name, source in base.table.items()
            for number, (stored, known) in enumerate(
                zip(source.names, usual[name].names, strict=True)
            )
        }
        self._embedding = usual[EMBEDDING].names[0]
        self._head = f"{base.family.names['lm_head']}.weight"
        self._changes = self._read_changes()
        known = {place.usual for place in self._places.values() if not place.source.stack}
        if base.config.tie_embeddings:
            known.add(self._head)
        if unknown := sorted(self._changes.keys() - known):
            raise CheckpointError(
                f"{files.folder}: {unknown[0].removesuffix('.weight')} is no module of "
                f"{base.checkpoint.folder} that can be merged into. Check that the adapter was trained "
                "on this base."
            )
        self.is_untied = base.config.tie_embeddings and base.config.has_head and self._differ()

    def report(self) -> MergeReport:
        """Return what is merged."""
        methods = map(self._method, self._places.values())
        return MergeReport(
            num_changed=len(self._changes),
            num_dequantized=sum(method is not None for method in methods),
            is_untied=self.is_untied,
        )

    def tensor(self, ref: TensorRef) -> TensorData:
        """Return what is written in place of a tensor of the base."""
        place = self._places.get(ref.name)
        stack = [
            self._places[name]
            for name in (
                f"{ref.name}.{number}" for number in range(ref.shape[0] if ref.shape else 0)
            )
            if name in self._places
        ]
        read: Callable[[], bytes | memoryview] = partial(self._unchanged, ref)
        if stack and any(self._method(item) is not None for item in stack):
            read = partial(self._stack, ref, stack)
        elif place is not None and (self._method(place) or place.usual in self._changes):
            read = partial(self._changed, ref, place, self._method(place), place.usual)
        return TensorData(name=ref.name, dtype=ref.dtype, shape=ref.shape, read=read)

    def head_alone(self) -> list[TensorData]:
        """Return the head of a base whose embedding is its head, where both are no longer the same."""
        if not self.is_untied:
            return []
        (stored,) = self.base.table[EMBEDDING].names
        ref, place = self.base.checkpoint.tensors[stored], self._places[stored]
        name = str(self.base.family.names_in(self.base.checkpoint.tensors)["lm_head"]) + ".weight"
        read = partial(self._changed, ref, place, self._head_method(), self._head)
        return [TensorData(name=name, dtype=ref.dtype, shape=ref.shape, read=read)]

    def _differ(self) -> bool:
        """Return whether a head that is the embedding becomes another."""
        embedding, head = (self._changes.get(name) for name in (self._embedding, self._head))
        if head is None and self._embedding.removesuffix(".weight") in self._files.token_rows:
            head = embedding  # rows of tokens are those of a tied head, too
            self._changes[self._head] = self._changes[self._embedding]
        is_same = embedding is None and head is None
        whole = [self._files.of(_path(name), ".weight") for name in (self._embedding, self._head)]
        if whole[0] is not None and whole[1] is not None:
            is_same = torch.equal(*(self._mapped.view(ref) for ref in whole if ref is not None))
        elif embedding is not None and head is embedding:
            is_same = True
        if is_same:
            self._changes.pop(self._head, None)
        method = self._method(self._places[self.base.table[EMBEDDING].names[0]])
        return not is_same or method != self._head_method()

    def _head_method(self) -> QuantMethod | None:
        return None if self._recipe is None else self._recipe.method_for(HEAD, is_tied=False)

    def _method(self, place: _Place) -> QuantMethod | None:
        if self._recipe is None:
            return None
        is_tied = self.base.config.tie_embeddings
        return self._recipe.method_for(place.parameter, is_tied=is_tied)

    def _read_changes(self) -> dict[str, Change]:
        """Return what becomes of weights (out, in) float32, by transformers' names of them."""
        files, found = self._files, dict[str, Change]()
        for path in files.products:
            a, b, length = (
                None if ref is None else self._mapped.view(ref)
                for ref in (files.of(path, end) for end in (A, B, MAGNITUDE))
            )
            assert a is not None
            assert b is not None  # `AdapterFiles.check` has seen both
            part = Part(a=a, b=b, scale=files.config.scale_of(path), magnitude=length)
            found[f"{path}.weight"] = partial(self._with_part, path, part)
        for path in files.whole:
            for leaf in (".weight", ".bias"):
                if (ref := files.of(path, leaf)) is not None:
                    found[path + leaf] = partial(self._replaced, path, self._mapped.view(ref))
        for path in files.token_rows:
            ref = files.of(path, TOKEN_ROWS)
            assert ref is not None
            rows = token_rows_of(path, files, self._mapped.view(ref))
            found[f"{path}.weight"] = partial(self._with_rows, rows.ids, rows.rows)
        return found

    def _with_part(self, path: str, part: Part, weight: Tensor) -> Tensor:
        self._check(path, weight, (part.b.shape[0], part.a.shape[1]))
        return merged(weight, part)

    def _replaced(self, path: str, other: Tensor, weight: Tensor) -> Tensor:
        self._check(path, weight, tuple(other.shape))
        return other

    def _with_rows(self, ids: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        return weight.index_copy(0, ids, rows.float())

    def _check(self, path: str, weight: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{self._files.folder}: the adapter of {path} is {list(shape)}, and the base's weight "
                f"{list(weight.shape)}. Check that it was trained on this base."
            )

    def _unchanged(self, ref: TensorRef) -> memoryview:
        return bytes_of(self._mapped.view(ref))

    def _changed(
        self, ref: TensorRef, place: _Place, method: QuantMethod | None, name: str
    ) -> memoryview:
        """Return a tensor of the files, in their order and dtype, as it becomes."""
        weight = self._mapped.view(ref)
        dtype, is_columns = weight.dtype, place.source.layout == "columns" and weight.dim() == 2
        weight = weight.t() if is_columns else weight
        weight = weight.float() if method is None else self._dequantized(place, method)
        if name in self._changes:
            weight = self._changes[name](weight)
        found = (weight.t() if is_columns else weight).to(dtype)
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{ref.name} would have numbers that are not finite; nothing was written."
            )
        return bytes_of(found)

    def _stack(self, ref: TensorRef, places: list[_Place]) -> bytes:
        parts = []
        for place in places:
            method = self._method(place)
            inner = self.base.checkpoint.tensors[place.source.names[0]]
            parts.append(
                self._unchanged(inner)
                if method is None
                else self._changed(inner, place, method, place.usual)
            )
        return b"".join(parts)

    def _dequantized(self, place: _Place, method: QuantMethod) -> Tensor:
        """Return a part, (rows, in) float32, of a parameter that was quantized as a whole."""
        key = f"{place.parameter} {method}"
        if self._whole is None or self._whole[0] != key:
            refs = [self.base.checkpoint.tensors[name] for name in place.source.names]
            parts = [self._mapped.view(ref) for ref in refs]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            if place.source.layout != "rows":
                whole = from_file_order(whole, place.source).contiguous()
            found = quantize(method, whole.float()).dequantize()
            if place.source.layout == "heads":
                found = to_file_order(found, place.source)
            self._whole = key, found
        start = sum(place.source.rows[: place.number])
        return self._whole[1][start : start + place.source.rows[place.number]]


def _path(name: str) -> str:
    return name.removesuffix(".weight")
