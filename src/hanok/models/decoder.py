"""The only forward pass: packed token ids in, hidden states out, logits for the rows that need them.

    embed -> [norm -> mixer -> +] -> [norm -> mlp -> +] x layers -> norm -> head

Training, generation and serving run this code. Where norms are and of what kind, and what a layer's
mixer and MLP are, is data (`ModelConfig`); mixers are in `models/mixers`. Module paths are
Llama's tensor names without the leading "model.", fused weights aside; `models/family.py` knows what
files call them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hanok.attention.base import ForwardBatch, choose
from hanok.attention.cache import KVCache
from hanok.kernels.native import native_for
from hanok.models.config import LayerConfig, ModelConfig, Rope
from hanok.models.layers import NoNorm, NormLayer, added, mlp_of
from hanok.models.linear import Embedding, Linear, Rows, Weight, Weighted
from hanok.models.mixers.base import MixerModule, State, block_of, mixer_of
from hanok.models.rotary import Rotary


class Block(nn.Module):
    """A mixer and an MLP with their residuals; `norm_placement` says where the norms are.

    The mixer of any kind has the path that Llama's attention has.
    """

    attention_norm: nn.Module
    attention_post_norm: nn.Module
    mlp_norm: nn.Module
    mlp_post_norm: nn.Module

    def __init__(self, config: ModelConfig, layer: LayerConfig, rotary: Rotary | None) -> None:
        super().__init__()
        self.is_parallel = layer.norm_placement in ("parallel", "shared")
        self.shares_norm = layer.norm_placement == "shared"
        self.residual_scale = layer.residual_scale
        self.self_attn = mixer_of(config, layer.mixer, rotary)
        self.mlp = mlp_of(config.hidden_size, layer.mlp)
        for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
            is_used = name in layer.norm_names()
            norm = NormLayer(config.norm, config.hidden_size) if is_used else NoNorm()
            self.add_module(name, norm)

    def forward(
        self, x: Tensor, batch: ForwardBatch, cos_sin: Tensor | None, state: State
    ) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        normed = self.attention_norm(x, batch)
        attended = self.self_attn(normed, batch, cos_sin, state)
        if self.is_parallel:
            inner = self.mlp(normed if self.shares_norm else self.mlp_norm(x, batch), batch)
            output: Tensor = added(added(x, attended), inner)
            return output
        x = added(x, self._scaled(self.attention_post_norm(attended, batch)))
        inner = self.mlp(self.mlp_norm(x, batch), batch)
        return added(x, self._scaled(self.mlp_post_norm(inner, batch)))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks in a row that one device computes."""

    device: torch.device
    blocks: range
    core: int | None = None
    """The core of a CPU that computes them, if cores are used as separate devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayout:
    """A decoder over several devices; the last norm is where its weight is."""

    stages: tuple[Stage, ...]
    embed_device: torch.device
    head_device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a decoder is run, whatever its weights are."""

    layout: DeviceLayout | None = None
    """Which device computes what, where several do."""
    cache_dtype: torch.dtype | None = None
    """What `Decoder.new_cache` keeps keys and values in; None: the dtype of activations."""
    records_passes: bool = True
    """Whether short passes are recorded and replayed, where something can (`engine/passes.py`)."""
    is_streamed: bool = False
    """Whether weights are read from disk in every pass (`memory/offload.py`)."""


class Decoder(nn.Module):
    """Embedding, blocks, norm and head of one `ModelConfig`; a base model has no head.

    Build it on the `meta` device and assign the weights, or `initialise` it to train from nothing.
    """

    def __init__(self, config: ModelConfig, execution: Execution | None = None) -> None:
        super().__init__()
        self.config = config
        self.execution = execution or Execution()
        self.gradient_checkpointing = False
        """Whether a pass with gradients keeps only what goes into each layer, and computes the rest
        again on the way back."""
        self.num_weight_changes = 0
        """How often `weights_changed` was called."""
        self.num_adapter_changes = 0
        """How often `adapters_changed` was called."""
        self.rotaries: dict[Rope, Rotary] = {rope: Rotary(rope) for rope in config.ropes}
        self._ropes = [layer.mixer.rotation() for layer in config.layers]
        hidden = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, hidden)
        if config.has_learned_positions:
            self.embed_positions = Embedding(config.max_positions, hidden)
        self.layers = nn.ModuleList(
            block_of(config, layer, self.rotaries[rope] if rope else None, Block)
            for layer, rope in zip(config.layers, self._ropes, strict=True)
        )
        self.norm = NormLayer(config.norm, hidden)
        if config.has_head:
            self.lm_head = Linear(hidden, config.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weight where the config says so and both are floats."""
        if not self.config.tie_embeddings:
            return
        if self.lm_head.stored is None and self.embed_tokens.stored is None:
            self.lm_head.weight = self.embed_tokens.weight

    def weights(self) -> list[Tensor | Weight]:
        """Return every weight, shared ones once: parameters, and quantized ones whole."""
        modules = [item for item in self.modules() if isinstance(item, Weighted)]
        stored = {id(item.stored): item.stored for item in modules if item.stored is not None}
        return [*self.parameters(), *stored.values()]

    @property
    def layout(self) -> DeviceLayout | None:
        """Which device computes what; None where one computes everything."""
        return self.execution.layout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and of the weights that are not quantized."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where tokens go in: the device of the embedding."""
        return self.layout.embed_device if self.layout else self.norm.weight.device

    def device_of(self, block: int) -> torch.device:
        """Return where a block, its keys and values are."""
        stages = self.layout.stages if self.layout else ()
        return next((stage.device for stage in stages if block in stage.blocks), self.device)

    def weights_changed(self) -> None:
        """Say that weights have changed: keys, values and recordings made with others are dropped.

        Changes in place that torch counts are noticed without it; those through `.data`, new modules
        and quantized weights are not.
        """
        self.num_weight_changes += 1

    def adapters_changed(self) -> None:
        """Say that an adapter came or went: recordings are dropped, but keys and values stay right."""
        self.num_adapter_changes += 1

    @property
    def num_changes(self) -> tuple[int, int]:
        """How often weights and adapters have changed; with the same numbers modules are the same."""
        return self.num_weight_changes, self.num_adapter_changes

    def initialise(self, std: float, generator: torch.Generator) -> None:
        """Draw matrices from N(0, std²) and set norms to one: the start of a training run."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, std, generator=generator)
                else:
                    parameter.zero_()
            for module in self.modules():
                if isinstance(module, NormLayer):
                    module.weight.fill_(0.0 if module.norm.unit_offset else 1.0)

    def mixers(self) -> list[tuple[int, MixerModule]]:
        """Return the mixers, children of their blocks, each with the number of its block."""
        return [
            (index, module)
            for index, block in enumerate(self.layers)
            for module in block.children()
            if isinstance(module, MixerModule)
        ]

    def use_attention(self, name: str) -> dict[str, int]:
        """Let every layer attend through backend `name` ("auto": the first that fits).

        Returns how many layers use which backend. Raises as `attention.base.choose` does.
        """
        mixers = [(index, mixer) for index, mixer in self.mixers() if mixer.spec is not None]
        chosen = [
            choose(name, mixer.spec, self.device_of(index), self.dtype)
            for index, mixer in mixers
            if mixer.spec is not None
        ]
        for (_, mixer), backend in zip(mixers, chosen, strict=True):
            mixer.backend = backend
        names = [backend.name for backend in chosen]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def new_cache(self, num_sequences: int, capacity: int, *, is_paged: bool = False) -> KVCache:
        """Return an empty cache for `num_sequences` of up to `capacity` tokens each.

        With `is_paged`, for so many blocks of `capacity` tokens: UnsupportedError where a layer's state
        does not lie in blocks.
        """
        return KVCache(
            [layer.mixer.state() for layer in self.config.layers],
            num_sequences=num_sequences,
            capacity=capacity,
            dtype=self.execution.cache_dtype or self.dtype,
            devices=[self.device_of(index) for index in range(self.config.num_layers)],
            is_paged=is_paged,
        )

    def forward(self, batch: ForwardBatch, cache: KVCache | None = None) -> Tensor:
        """Return the normed hidden states of the packed tokens, (tokens, hidden).

        With a cache, the tokens' keys and values are appended to their sequences in it.
        """
        if cache is not None:
            host = batch.host
            cache.advance(host.slots, host.query_lengths, host.sequence_lengths)
        return self.hidden_states(batch, cache)

    def hidden_states(self, batch: ForwardBatch, cache: KVCache | None) -> Tensor:
        """Return what `forward` does, for tokens that the cache counts already.

        This is all that happens on the device, so that it can be recorded once and replayed.
        """
        x = self.embed(batch)
        if self.layout is None:
            return self.blocks(x, batch, self.cos_sin(batch, x.dtype), cache)
        for stage in self.layout.stages:
            x = self.run_stage(stage, x, batch, cache)
        return x

    def run_stage(
        self, stage: Stage, x: Tensor, batch: ForwardBatch, cache: KVCache | None
    ) -> Tensor:
        """Compute a stage's blocks where they are, and the last norm after the last one."""
        batch, x = batch.to(stage.device), x.to(stage.device)
        x = self._run(stage.blocks, x, batch, self.cos_sin(batch, x.dtype), cache)
        return self._normed(x, batch) if stage.blocks.stop == len(self.layers) else x

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Return what the first block gets, (tokens, hidden)."""
        x: Tensor = self.embed_tokens(batch.token_ids, batch)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' dtype first, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.config.has_learned_positions:
            x = x + self.embed_positions(batch.positions)
        return x

    def cos_sin(self, batch: ForwardBatch, dtype: torch.dtype) -> dict[Rope, Tensor]:
        """Return the tokens' cosines and sines by rotation, (2, tokens, 1, rotary_dim) each."""
        return {rope: rotary.cos_sin(batch, dtype) for rope, rotary in self.rotaries.items()}

    def blocks(
        self, x: Tensor, batch: ForwardBatch, cos_sin: Mapping[Rope, Tensor], cache: KVCache | None
    ) -> Tensor:
        """Run all blocks and the last norm, (tokens, hidden) -> (tokens, hidden)."""
        return self._normed(self._run(range(len(self.layers)), x, batch, cos_sin, cache), batch)

    def _run(
        self,
        blocks: range,
        x: Tensor,
        batch: ForwardBatch,
        cos_sin: Mapping[Rope, Tensor],
        cache: KVCache | None,
    ) -> Tensor:
        for index in blocks:
            rope = self._ropes[index]
            state = cache.states[index] if cache is not None else None
            inputs = (x, batch, cos_sin[rope] if rope else None, state)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.layers[index], *inputs, use_reentrant=False)
            else:
                x = self.layers[index](*inputs)
        return x

    def _normed(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        output: Tensor = self.norm(x.to(self.norm.weight.device), batch)
        return output

    def logits(self, hidden: Tensor, adapters: Tensor | None = None) -> Tensor:
        """Return the scores of the next token, (rows, vocab) float32, of some hidden states.

        adapters: (rows,), those of `ForwardBatch.adapters` that belong to these rows
        Only a decoder with a head has any.
        """
        if self.layout is not None:
            hidden = hidden.to(self.layout.head_device)
        scores: Tensor = self.lm_head(hidden, None if adapters is None else Rows(adapters))
        kernels = native_for(scores)
        scores = scores.float() if kernels is None else kernels.widen(scores)
        if self.config.logit_scale != 1.0:
            scores = scores * self.config.logit_scale
        if self.config.logit_softcap is not None:
            scores = self.config.logit_softcap * torch.tanh(scores / self.config.logit_softcap)
        return scores
