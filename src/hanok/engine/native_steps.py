"""Decoding on a CPU without Python in between: a pass's calls of our kernels are kept and replayed.

A pass over one token is hundreds of short calls; in Python, those of a small model take a fifth as long
as what they compute. Recordings are kept by the number of tokens: one for each sequence while texts are
generated, a few more where drafted ones are checked. The second pass over so many tokens is recorded
(`kernels.native.recording`), and from the third on the library makes all calls in turn: the same kernels
on the same buffers, so the same result bit for bit, however the tokens belong to sequences. What changes
is written into the buffers first: the embedded tokens, their cosines and sines, and of each sequence how
many tokens and keys it has and in which blocks.

While a pass is recorded every function of torch is watched. Views and new buffers need nothing, sums
and copies become calls of our kernels, and any other function would be missing from the recording: then
passes over so many tokens are not recorded again. Where adapters are attached, their kernel looks for
each token's in a buffer as well. A recording keeps its buffers, so the least recently used is dropped.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from ctypes import addressof, c_int64
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache
from hanok.kernels.native import FLOATS, AttentionCall, Native, Recording, Step, native, recording
from hanok.models.adapters import activated
from hanok.models.decoder import Decoder

# torch's functions by name. What asks for no numbers of a tensor and makes none:
QUERIES = frozenset(
    {"__get__", "__len__", "data_ptr", "dim", "is_contiguous", "numel", "size", "stride"}
)
NEW_BUFFERS = frozenset({"empty", "empty_like", "new_empty"})
# What may give its input back under another shape; whether it did is looked at.
VIEWS = frozenset(
    {"__getitem__", "chunk", "contiguous", "reshape", "split", "tensor_split", "to", "view"}
)
SUMS = frozenset({"add", "__add__"})
KEPT_TOKENS = 136  # of all recorded passes together: those of an engine, over 1 to 16 tokens


def why_not(decoder: Decoder, cache: KVCache) -> str | None:
    """Return why passes over this cache are not recorded, or None where it is tried."""
    if decoder.device.type != "cpu":
        return f"records calls on a CPU (found: {decoder.device.type})"
    if native() is None:
        return "our kernels are not there"
    if decoder.execution.is_streamed:
        return "weights are read from disk in every pass"
    if decoder.dtype not in FLOATS:
        return f"our kernels do not compute in {str(decoder.dtype).removeprefix('torch.')}"
    reasons = (mixer.why_not_recorded("cpu") for _, mixer in decoder.mixers())
    return next((reason for reason in reasons if reason is not None), None)


class NativeSteps:
    """A few more tokens for each sequence of a cache, recorded once for each number of tokens."""

    def __init__(self, decoder: Decoder, cache: KVCache, blocks_per_sequence: int = 1) -> None:
        kernels = native()
        if kernels is None:
            raise ValueError("our kernels are not there; ask why_not first")
        self.obstacles: dict[int, str] = {}
        """By the number of tokens: the function that kept passes from being recorded."""
        self._decoder = decoder
        self._cache = cache
        self._kernels = kernels
        self._blocks_per_sequence = blocks_per_sequence
        self._passes: OrderedDict[int, _Pass] = OrderedDict()
        self._seen: set[int] = set()
        self._addresses: tuple[int, ...] = ()
        self._tables: list[Mapping[str, Tensor | None]] = []
        self._listed = (-1, -1)

    @property
    def recorded_tokens(self) -> list[int]:
        """The numbers of tokens whose passes are recorded."""
        return list(self._passes)

    def logits(self, tokens: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Return the logits that follow each of some sequences' next tokens, (tokens, vocab) float32.

        Counts the tokens in the cache; raises as it does.
        """
        past = [self._cache.lengths[slot] for slot in slots]
        batch = ForwardBatch.of([list(item) for item in tokens], past=past, slots=list(slots))
        return self._decoder.logits(self.hidden_states(batch))

    def hidden_states(self, batch: ForwardBatch) -> Tensor:
        """Return the normed hidden states of a batch.

        They are valid until the next call. Counts the tokens in the cache; raises as it does.
        """
        count = len(batch.token_ids)
        # Weights may move while the model works (memory/promote.py); a recording has the old places.
        addresses = tuple(item.data_ptr() for item in self._weights())
        if self._addresses != addresses:
            self._addresses = addresses
            self._passes.clear()
            self._seen.clear()
        is_kept = count <= KEPT_TOKENS and count not in self.obstacles
        if not is_kept or count not in self._seen:
            self._seen.add(count)
            hidden: Tensor = self._decoder(batch, self._cache)
            return hidden
        host = batch.host
        self._cache.advance(host.slots, host.query_lengths, host.sequence_lengths)
        if count in self._passes:
            self._passes.move_to_end(count)
            return self._passes[count].run(batch)
        found = _Pass(self._decoder, self._cache, self._kernels, batch, self._blocks_per_sequence)
        if found.obstacle is not None:
            self.obstacles[count] = found.obstacle
            return found.hidden
        self._passes[count] = found
        while sum(self._passes) > KEPT_TOKENS:
            self._seen.discard(self._passes.popitem(last=False)[0])
        return found.hidden

    def _weights(self) -> list[Tensor]:
        """Return the decoder's parameters: of the modules that there are since they last changed."""
        if self._listed != self._decoder.num_changes:
            self._listed = self._decoder.num_changes
            tables = [module._parameters for module in self._decoder.modules()]
            self._tables = [table for table in tables if table]
        return [item for table in self._tables for item in table.values() if item is not None]


class _Pass:
    """The calls of one pass over a few tokens of some sequences."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        kernels: Native,
        batch: ForwardBatch,
        blocks_per_sequence: int,
    ) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._x = decoder.embed(batch).clone()
        self._cos_sin = {
            rope: values.clone() for rope, values in decoder.cos_sin(batch, self._x.dtype).items()
        }
        self._default_adapter = activated(decoder)
        self._adapters: Tensor | None = None
        if self._default_adapter is not None:
            self._adapters = torch.empty_like(batch.token_ids)
            self._choose(batch)
            batch = batch.with_adapters(self._adapters)
        with recording() as found, _Watch(kernels) as watch:
            self.hidden = decoder.blocks(self._x, batch, self._cos_sin, cache)
        self.obstacle = watch.obstacle
        self._found: Recording = found
        self._steps = (Step * len(found.steps))(*found.steps)
        # As many sequences as tokens at the most.
        size, most = len(batch.token_ids), blocks_per_sequence
        self._query_counts, self._key_counts = (c_int64 * size)(), (c_int64 * size)()
        self._blocks = (c_int64 * (size * most))()
        self._block_starts = (c_int64 * size)(*range(0, size * most, most))
        self._calls = [call for call in found.kept if isinstance(call, AttentionCall)]
        for call in self._calls:
            call.query_counts = addressof(self._query_counts)
            call.key_counts = addressof(self._key_counts)
            call.blocks = addressof(self._blocks)
            call.block_starts = addressof(self._block_starts)

    def run(self, batch: ForwardBatch) -> Tensor:
        """Return the normed hidden states of other tokens; they are valid until the next call."""
        self._x.copy_(self._decoder.embed(batch))
        for rope, values in self._decoder.cos_sin(batch, self._x.dtype).items():
            self._cos_sin[rope].copy_(values)
        self._choose(batch)
        host = batch.host
        num_sequences = len(host.blocks)
        if self._calls and self._calls[0].num_sequences != num_sequences:
            for call in self._calls:
                call.num_sequences = num_sequences
        self._query_counts[:num_sequences] = list(host.query_lengths)
        self._key_counts[:num_sequences] = list(host.key_lengths)
        for start, blocks in zip(self._block_starts, host.blocks, strict=False):
            self._blocks[start : start + len(blocks)] = list(blocks)
        self._kernels.run(self._steps)
        return self.hidden

    def _choose(self, batch: ForwardBatch) -> None:
        """Write each token's adapter where the recorded calls look."""
        if self._adapters is None or self._default_adapter is None:
            return
        if batch.adapters is None:
            self._adapters.fill_(self._default_adapter)
        else:
            self._adapters.copy_(batch.adapters)


class _Watch(TorchFunctionMode):
    """Makes sums and copies calls of our kernels; remembers the first function that cannot be one."""

    def __init__(self, kernels: Native) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._kernels = kernels

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        name = func.__name__
        if name in SUMS and not kwargs and _are_alike(*args):
            return self._kernels.add(*args)
        if name == "contiguous" and not kwargs and _stands_apart(args[0]):
            return self._kernels.copy(args[0])
        result = func(*args, **(kwargs or {}))
        is_known = name in QUERIES or name in NEW_BUFFERS
        if not is_known and not (name in VIEWS and _is_view(result, args)) and not self.obstacle:
            self.obstacle = name
        return result


def _are_alike(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype) == (b.shape, b.dtype)
        and a.dtype in FLOATS
        and a.is_contiguous()
        and b.is_contiguous()
    )


def _stands_apart(tensor: Tensor) -> bool:
    """Return whether rows have something between them and nothing within."""
    return tensor.dim() > 1 and not tensor.is_contiguous() and tensor[0].is_contiguous()


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Return whether the result shares the input's memory: nothing was copied or converted."""
    results = result if isinstance(result, list | tuple) else (result,)
    place = args[0].untyped_storage().data_ptr()
    return all(item.untyped_storage().data_ptr() == place for item in results)
