"""A loaded model as its user sees it: text in, text out, and the numbers underneath.

    model = hanok.load("path")
    model.generate("Once upon a time", max_new_tokens=64).text

A prompt is a text, a list of token ids, or a conversation (a list of messages with "role" and
"content"). A list of those is several prompts, which are generated together and give the same tokens
as each alone. A base model, which has no head, makes embeddings (`Model.embed`) and generates nothing.
"""

import math
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.checkpoint.aside import folder_aside
from hanok.checkpoint.files import Checkpoint
from hanok.checkpoint.pooling import Pooling, choose_pooling, pooling_files
from hanok.checkpoint.tokenizer_files import has_tokenizer
from hanok.checkpoint.writer import OnShard, write_json
from hanok.engine.adapters import Adapters
from hanok.engine.embed import embed
from hanok.engine.generate import PrefixCache, TokenStream, generate
from hanok.engine.params import (
    SamplingOptions,
    SamplingParams,
    end_ids_of,
    from_generation_config,
    is_token,
    unsupported_defaults,
)
from hanok.engine.passes import Passes
from hanok.engine.pipeline import Pipeline
from hanok.engine.sequence import (
    FinishReason,
    GenerationSequence,
    SpeculationCounts,
    TokenEvent,
)
from hanok.engine.speculate import Speculation, Speculator
from hanok.errors import CheckpointError, OptionError, RequestError, UnsupportedError
from hanok.memory.account import check_head
from hanok.memory.load import Loaded, LoadReport, load_decoder
from hanok.memory.options import LoadArguments, LoadOptions, refuse_beside_plan
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import check_fits, plan_load
from hanok.memory.save import is_sharded, save_weights, take_part
from hanok.memory.token_options import PIECES
from hanok.models.config import ModelConfig
from hanok.models.linear import Embedding

if TYPE_CHECKING:
    from hanok.checkpoint.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
LOGIT_ROWS = 1024  # rows of (vocab,) float32 that `score` holds at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated for one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    """The generated tokens, the one that ended it included."""
    text: str
    """Their text without special tokens and stop texts; empty without a tokenizer."""
    logprobs: list[float]
    """The model's log-probability of each token, natural logarithm, before any processor."""
    top_logprobs: list[tuple[tuple[int, float], ...]]
    """For each token the likeliest ids with their log-probabilities (`top_logprobs` of them)."""
    finish_reason: FinishReason
    speculation: SpeculationCounts
    """What guessing tokens brought; nothing proposed where none were guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a text is."""

    token_ids: list[int]
    logprobs: list[float | None]
    """Log-probability of each token given those before it; None for the first, which has none."""

    @property
    def nll(self) -> float:
        """Mean negative log-probability per scored token, in nats."""
        scored = [value for value in self.logprobs if value is not None]
        return -sum(scored) / len(scored) if scored else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


class Model:
    """A decoder with its weights, its tokenizer and its defaults."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loaded: Loaded,
        tokenizer: "Tokenizer | None",
        *,
        plan: LoadPlan | None = None,
        pipeline_depth: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.decoder = loaded.decoder
        self.config: ModelConfig = loaded.decoder.config
        self.tokenizer = tokenizer
        self.report: LoadReport = loaded.report
        text_config = checkpoint.config.get("text_config")  # of a model that sees as well
        self.end_ids, end_notes = end_ids_of(
            {
                "generation_config.json": checkpoint.generation_config,
                "config.json": checkpoint.config,
                "config.json's text_config": text_config
                if isinstance(text_config, Mapping)
                else {},
            },
            tokenizer.eos_token_id if tokenizer is not None else None,
            self.config.vocab_size,
        )
        self.notes: tuple[str, ...] = (
            *loaded.report.notes,
            *unsupported_defaults(checkpoint.generation_config, self.config.max_context_tokens),
            *end_notes,
        )
        """What was decided for the user, or asked for by the checkpoint and not done."""
        self.defaults: SamplingParams = from_generation_config(checkpoint.generation_config)
        self.plan = plan
        """What it was loaded by."""
        self._sources = loaded.sources
        self._left_out = loaded.left_out
        self._promotion = loaded.promotion
        self.adapters = Adapters(self.decoder, checkpoint.config, str(checkpoint.folder), plan)
        """Adapters over its weights, by name."""
        self.pipeline_depth = pipeline_depth
        """Groups of sequences on their way over several devices; None: one for each stage."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of what is computed."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is: where its tokens go in, if it is on several devices."""
        return self.decoder.device

    @property
    def hf_device_map(self) -> dict[str, str | int]:
        """Where each module is, by the checkpoint's names; GPUs are numbers."""
        return self.plan.hf_device_map if self.plan is not None else {"": str(self.device)}

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return self.config.num_parameters()

    def check_head(self) -> None:
        """Raise OptionError for a model without a head: one that makes embeddings and no tokens."""
        check_head(self.checkpoint.folder, has_head=self.config.has_head)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        use_cache: bool = ...,
        speculation: Speculation | None = ...,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Message]],
        *,
        use_cache: bool = ...,
        speculation: Speculation | None = ...,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        use_cache: bool = True,
        speculation: Speculation | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several (a list gives a list).

        The options are the fields of `SamplingParams`; what is not given comes from the checkpoint's
        generation_config.json. `speculation` guesses tokens ahead, which changes the speed and not the
        text. Raises RequestError for a prompt that cannot be served and OptionError for an option that
        cannot be.
        """
        self.check_head()
        prompts, is_several = _as_list(prompt)
        sequences = [self.sequence(item, options) for item in prompts]
        events: list[list[TokenEvent]] = [[] for _ in sequences]
        for event in self._stream(sequences, None, use_cache, speculation):
            events[event.sequence].append(event)
        results = [
            _collected(sequence, found) for sequence, found in zip(sequences, events, strict=True)
        ]
        return results if is_several else results[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        use_cache: bool = True,
        cache: PrefixCache | None = None,
        speculation: Speculation | None = None,
        **options: Unpack[SamplingOptions],
    ) -> TokenStream:
        """Return the tokens of a prompt as they come, or of several: `sequence` says whose each is.

        The `text`s of a prompt join to its whole text. `cache` keeps keys and values of one prompt from
        call to call: what the next shares with it is not computed again, as in a conversation.
        `speculation` as in `generate`.
        """
        self.check_head()
        prompts, _ = _as_list(prompt)
        if cache is not None and len(prompts) > 1:
            raise OptionError(
                f"{len(prompts)} prompts share one cache, which keeps the last prompt of one "
                "conversation. Give one prompt, or leave the cache out."
            )
        sequences = [self.sequence(item, options) for item in prompts]
        return self._stream(sequences, cache, use_cache, speculation)

    def _stream(
        self,
        sequences: list[GenerationSequence],
        cache: PrefixCache | None,
        use_cache: bool,
        speculation: Speculation | None,
    ) -> TokenStream:
        if speculation is not None:
            self._check_speculation(speculation, use_cache=use_cache)
        passes, speculator = None, None
        if cache is not None:
            passes = cache.prepare(self.decoder, sequences[0])
            if speculation is not None:
                speculator = cache.speculator(speculation, passes)
        elif speculation is not None:
            speculator = Speculator(
                speculation,
                self.decoder,
                num_sequences=len(sequences),
                max_tokens=max(len(item.prompt_ids) + item.room for item in sequences),
            )
        return TokenStream(sequences, self._events(sequences, passes, use_cache, speculator))

    def _check_speculation(self, speculation: Speculation, *, use_cache: bool) -> None:
        speculation.check(self)
        if not use_cache:
            raise OptionError(
                "speculation needs the cache: a pass that checks guesses computes only them. Leave "
                "out use_cache=False, or speculation."
            )

    def _events(
        self,
        sequences: list[GenerationSequence],
        passes: Passes | None,
        use_cache: bool,
        speculator: Speculator | None,
    ) -> Generator[TokenEvent, None, None]:
        """Generate; after each token a few mapped weights may move into memory.

        Over several devices either groups of sequences keep them all at work, or guesses are checked.
        """
        is_pipelined = self.decoder.layout is not None and passes is None and use_cache
        if is_pipelined and speculator is None:
            with Pipeline(self.decoder, self.pipeline_depth) as pipeline:
                yield from pipeline.generate(sequences)
            return
        for event in generate(
            self.decoder, sequences, passes=passes, use_cache=use_cache, speculator=speculator
        ):
            yield event
            self.promote()

    def promote(self) -> None:
        """Move a few mapped weights into memory, between passes; none once a weight has changed."""
        if self._promotion is not None:
            self._promotion.advance()

    def weights_changed(self) -> None:
        """Say that weights were changed, so that no keys, values or recordings of others are used.

        Changes in place that torch counts (an optimizer's, `load_state_dict`) are noticed without it;
        needed after a change through `.data`, of quantized weights, or of which modules there are.
        """
        self.decoder.weights_changed()
        if self._promotion is not None:
            self._promotion.cancel()

    def use_adapter(self, name: str | None) -> None:
        """Use an adapter of `adapters` from now on; None: the weights alone."""
        self.adapters.use(name)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *,
        init: str = PIECES,
    ) -> Embedding:
        """Give embedding and head a row for each token, and return the embedding.

        There are never fewer rows than before, and those of old tokens stay as they are. Rows of tokens
        that `Tokenizer.add_tokens` added begin as `TokenOptions.init` says, other new ones as the mean
        of all. Not while anything generates. Raises UnsupportedError where embedding or head is
        quantized, has an adapter, or is not in memory as a whole.
        """
        # Imported here: a model without a tokenizer starts without its libraries.
        from hanok.engine.resize import VOCABULARY_WEIGHTS, resize
        from hanok.memory.token_rows import with_vocab_size

        before = self.config.vocab_size
        resize(self.decoder, self.tokenizer, new_num_tokens, pad_to_multiple_of, init)
        self.config = self.decoder.config
        rows = self.config.vocab_size
        self.checkpoint = replace(
            self.checkpoint, config=with_vocab_size(self.checkpoint.config, before, rows)
        )
        self._sources = {
            name: replace(source, rows=(rows,), shape=(rows, *source.shape[1:]))
            if name in VOCABULARY_WEIGHTS
            else source
            for name, source in self._sources.items()
        }
        self.weights_changed()
        return self.decoder.embed_tokens

    def logits(self, prompt: Prompt) -> Tensor:
        """Return the scores of the token after each position, (tokens, vocab) float32."""
        self.check_head()
        return self._hidden_and(self.encode(prompt), lambda rows: self.decoder.logits(rows))

    def score(self, prompt: Prompt) -> Score:
        """Return the log-probability of each token of a text given those before it."""
        self.check_head()
        token_ids = self.encode(prompt)
        following = torch.tensor([*token_ids[1:], 0], device=self.device)
        done = 0

        def of_rows(rows: Tensor) -> Tensor:
            nonlocal done
            logprobs = self.decoder.logits(rows).log_softmax(-1)
            chosen = logprobs.gather(1, following[done : done + len(rows), None])[:, 0]
            done += len(rows)
            return chosen

        logprobs: list[float] = self._hidden_and(token_ids, of_rows).tolist()
        return Score(token_ids=token_ids, logprobs=[None, *logprobs[:-1]])

    @torch.inference_mode()
    def _hidden_and(self, token_ids: list[int], then: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the decoder and apply `then` to LOGIT_ROWS hidden states at a time."""
        hidden = self.decoder(ForwardBatch.of([token_ids], device=self.device))
        starts = range(0, len(token_ids), LOGIT_ROWS)
        return torch.cat([then(hidden[start : start + LOGIT_ROWS]) for start in starts])

    def embed(self, texts: Prompt | Sequence[Prompt], *, pooling: Pooling | None = None) -> Tensor:
        """Return a text's vector of length 1, (hidden,), or those of several, (texts, hidden).

        float32, on the CPU, from the hidden states after the last norm. A text may be token ids or a
        conversation, as a prompt; the tokenizer adds its special tokens, an end token only where it is
        told to. `pooling` is "last" (the last token's) or "mean" (of all); by default what the
        checkpoint's files of sentence-transformers say, else "last". Each vector is that of its text
        alone, and of /v1/embeddings. Raises RequestError for a text that cannot be served,
        UnsupportedError where the checkpoint makes its vectors otherwise, OptionError for another
        pooling and GenerationError for hidden states that are not finite.
        """
        items, is_several = _as_list(texts)
        chosen = choose_pooling(pooling, self.checkpoint.folder, self.checkpoint.config)
        vectors = embed(self.decoder, [self.encode(item) for item in items], chosen)
        self.promote()
        return vectors if is_several else vectors[0]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; RequestError when they cannot be served."""
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise RequestError(
                f"{prompt!r} is not a prompt. Give a text, a list of token ids, or a list of messages "
                "with role and content."
            )
        if isinstance(prompt, str):
            token_ids = self._needed_tokenizer().encode(prompt)
        elif prompt and all(isinstance(item, Mapping) for item in prompt):
            token_ids = self._needed_tokenizer().encode_chat([dict(item) for item in prompt])  # type: ignore[arg-type]  # checked above
        else:
            token_ids = [self._checked_id(item) for item in prompt]
        if not token_ids:
            raise RequestError("the prompt has no tokens; give at least one.")
        largest, size = max(token_ids), self.config.vocab_size
        if largest >= size:
            raise RequestError(
                f"the tokenizer makes token {largest} of the prompt, and this model's tokens are 0 to "
                f"{size - 1}: it was added without making the embedding larger. Call "
                "resize_token_embeddings, or `hanok tokens resize` on the folder, or leave its text out."
            )
        limit = self.config.max_context_tokens
        if len(token_ids) > limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and this model's context holds {limit}. "
                "Shorten the prompt."
            )
        return token_ids

    def save(self, path: str | Path, *, on_shard: OnShard | None = None) -> Path:
        """Write the model to a new folder, in the Hugging Face layout, and return the folder.

        Everything is written under a temporary name first and renamed last. `on_shard` gets each file of
        weights once it is complete, and the name that it will have: `Push.add` uploads it while the next
        one is written. If a model is sharded over
        processes (FSDP), every process calls this; the first one writes, and all return when it has.
        Raises CheckpointError when the folder exists and is not empty, UnsupportedError when the model
        was quantized while loading.
        """
        if self.report.quantized_bytes:
            raise UnsupportedError(
                "a model quantized while loading cannot be saved; load it without quant to save it."
            )
        if self.decoder.execution.is_streamed:
            raise UnsupportedError(
                "a model that is read from disk in every pass cannot be saved; load it without "
                "max_memory, or copy its folder."
            )
        folder = Path(path)
        if not is_sharded(self.decoder):
            return self._save(folder, on_shard)
        if torch.distributed.get_rank() == 0:
            self._save(folder, on_shard)
        else:
            take_part(self.decoder, self._sources, self._left_out)
        torch.distributed.barrier()
        return folder

    def _save(self, folder: Path, on_shard: OnShard | None) -> Path:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not empty; choose another folder.")
        with folder_aside(folder) as unfinished:
            self.write(unfinished, on_shard=on_shard)
        return folder

    def write(self, folder: Path, *, on_shard: OnShard | None = None) -> None:
        """Write the model's files into a folder that is there, and that the caller renames."""
        left_out = self._left_out
        save_weights(folder, self.decoder, self._sources, left_out=left_out, on_shard=on_shard)
        config = dict(self.checkpoint.config)
        spellings = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(spellings, str(self.dtype).removeprefix("torch."))
        write_json(folder / "config.json", config)
        if self.checkpoint.generation_config:
            values = dict(self.checkpoint.generation_config)
            write_json(folder / "generation_config.json", values)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        for file in pooling_files(self.checkpoint.folder):
            target = folder / file.relative_to(self.checkpoint.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    def sequence(self, prompt: Prompt, options: SamplingOptions) -> GenerationSequence:
        """Return a prompt with its options, checked, of which nothing is generated yet."""
        params = self.defaults.updated(options)
        params.check_ids(self.config.vocab_size)
        token_ids = self.encode(prompt)
        limit = self.config.max_context_tokens
        if len(token_ids) >= limit:
            raise RequestError(
                f"the prompt fills the model's context of {limit} tokens; no token can follow it."
            )
        if options.get("stop"):  # a checkpoint's own stop texts have no effect without text
            self._needed_tokenizer()
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= self.end_ids
        text_stream = None
        if self.tokenizer is not None:
            spelled = frozenset(params.spelled_token_ids) - end_ids
            text_stream = self.tokenizer.stream(after=token_ids, spelled=spelled)
        return GenerationSequence(
            prompt_ids=token_ids,
            params=params,
            end_ids=end_ids,
            max_tokens=limit,
            text_stream=text_stream,
        )

    def _needed_tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise RequestError(
                f"{self.checkpoint.folder} has no tokenizer, so only token ids can be given. Add "
                "the tokenizer.json or tokenizer.model that belongs to the model."
            )
        return self.tokenizer

    def _checked_id(self, token: Any) -> int:
        if not is_token(token, self.config.vocab_size):
            raise RequestError(
                f"{token!r} is not a token id; this model's are 0 to {self.config.vocab_size - 1}. "
                "A prompt is a text, token ids, or messages with role and content."
            )
        return int(token)


def load(
    path: str | Path | None = None,
    *,
    plan: LoadPlan | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Unpack[LoadArguments],
) -> Model:
    """Load a checkpoint: a folder in the Hugging Face layout, or one weights file in such a folder.

    The options are the fields of `hanok.LoadOptions`. Every load follows a plan: GPUs first, then the
    CPU; what fits nowhere is read from the checkpoint's files in every pass. A `plan` made before
    (`hanok.plan_load`) has decided `dtype`, `quant`, `weights`, `cache_dtype`, `device_map`,
    `max_memory`, `context` and `batch`; the other options may be given with it. `progress` is called
    with the bytes of each weight placed. Raises CheckpointError, OptionError, UnsupportedError or
    BudgetError, each saying what to do.
    """
    asked = LoadOptions.of(options)
    if plan is None:
        if path is None:
            raise OptionError("there is nothing to load: give a path, or a plan.")
        plan = plan_load(path, may_measure=False, **asked.planned)
    elif path is not None:
        raise OptionError("give a path or a plan: a plan names its checkpoint.")
    else:
        refuse_beside_plan(options)
    opened = plan.opened
    if opened is None:
        raise OptionError("the plan names no checkpoint; make it with hanok.plan_load.")
    if not opened.is_here:
        raise CheckpointError(
            f"{opened.path} is not on this disk. If it is a model on the hub, download it "
            f"(`hf download {opened.path}`) and give its folder."
        )
    check_fits(plan, opened.path)
    checkpoint = opened.understood.checkpoint
    if not checkpoint.files:
        raise CheckpointError(f"{checkpoint.folder}: has a config.json and no weights to load.")
    asked = asked.updated(**plan.options.planned)
    loaded = load_decoder(opened.understood, asked, plan=plan, progress=progress)
    depth = asked.pipeline_depth
    return Model(checkpoint, loaded, _tokenizer_of(checkpoint), plan=plan, pipeline_depth=depth)


def _tokenizer_of(checkpoint: Checkpoint) -> "Tokenizer | None":
    if not has_tokenizer(checkpoint.folder):
        return None
    # Imported here: a checkpoint without a tokenizer starts without its libraries.
    from hanok.checkpoint.tokenizer import open_tokenizer

    return open_tokenizer(checkpoint.folder)


def _as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return the prompts, and whether several were given."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return [prompt], False
    items = list(prompt)
    if not items:
        raise RequestError("there is no prompt; give a text, token ids, or messages.")
    first = items[0]
    if isinstance(first, int | Mapping):
        return [items], False  # type: ignore[list-item]  # a prompt of ids or messages
    return items, True  # type: ignore[return-value]  # prompts


def _collected(sequence: GenerationSequence, events: list[TokenEvent]) -> Generation:
    if sequence.finish_reason is None:
        raise RuntimeError("generation ended before the sequence did")
    return Generation(
        prompt_ids=sequence.prompt_ids,
        token_ids=sequence.generated_ids,
        text="".join(event.text for event in events),
        logprobs=[event.logprob for event in events],
        top_logprobs=[event.top_logprobs for event in events],
        finish_reason=sequence.finish_reason,
        speculation=sequence.speculation,
    )
