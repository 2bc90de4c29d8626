"""What a benchmark must know of a checkpoint before loading: facts, tokens to score and to continue."""

import random
from collections.abc import Callable
from functools import cache

import torch

from hanok.attention.base import AttentionSpec, backends, choose, why_not_table
from hanok.bench import speculation
from hanok.bench.fingerprint import fingerprint
from hanok.bench.grid import Facts
from hanok.bench.quality import text_windows
from hanok.bench.report import Subject
from hanok.bench.settings import Load, Setting, Workload
from hanok.bench.workers import Room, Shared, planned
from hanok.checkpoint.tokenizer import open_tokenizer
from hanok.checkpoint.tokenizer_files import has_tokenizer
from hanok.errors import BudgetError, OptionError
from hanok.memory.account import check_head
from hanok.memory.needs import STORED_NAMES, choose_dtype
from hanok.memory.plan import LoadPlan
from hanok.memory.planning import describe
from hanok.memory.tensors import DTYPES
from hanok.models.config import ModelConfig, SoftmaxAttention
from hanok.models.mixers.base import attention_spec
from hanok.quant.recipe import read_recipe
from hanok.registry import nearest_first

WINDOW = 512


class SubjectModel:
    """A checkpoint, described and not loaded."""

    def __init__(self, options: Shared) -> None:
        self.options = options
        described = describe(options.path)
        self.checkpoint = described.checkpoint
        check_head(self.checkpoint.folder, has_head=described.config.has_head)
        self.config: ModelConfig = described.config
        self._family = described.config.model_type
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = choose_dtype(
            described.config,
            described.checkpoint.tensors,
            "auto",
            is_on_cpu=self.device.type == "cpu",
        )
        self._encode = self._encoder()

    def described(self) -> Subject:
        """Return what a report says of it."""
        return Subject(
            name=self.checkpoint.folder.resolve().name,
            fingerprint=fingerprint(self.checkpoint),
            family=self._family,
            num_parameters=self.config.num_parameters(),
            dtype=self.dtype,
        )

    def _encoder(self) -> Callable[[str], list[int]] | None:
        folder = self.checkpoint.folder
        if not has_tokenizer(folder):
            return None
        return open_tokenizer(folder).encode

    def windows(self, text: str, max_tokens: int) -> list[list[int]]:
        """Return the tokens to score; none without a tokenizer, for no other tokens are a text."""
        if self._encode is None:
            return []
        window = min(WINDOW, self.config.max_context_tokens)
        return text_windows(self._encode, text, window, max_tokens)

    def prompts(self, text: str, workload: Workload) -> list[list[int]]:
        """Return what is continued: the text from one place on for each sequence, again where it ends.

        Without a tokenizer the tokens are drawn, the same each time.
        """
        draws = random.Random(0)
        if self._encode is None:
            tokens = [draws.randrange(self.config.vocab_size) for _ in range(4096)]
        else:
            tokens = self._encode(text)
        found = []
        for index in range(workload.batch):
            start = index * len(tokens) // workload.batch
            shifted = tokens[start:] + tokens[:start]
            repeats = -(-workload.prompt_tokens // len(shifted))
            found.append((shifted * repeats)[: workload.prompt_tokens])
        return found

    def facts(self) -> Facts:
        """Return what the planner asks."""
        draft = self.options.draft
        return Facts(
            max_context=self.config.max_context_tokens,
            dtype=self.dtype,
            attention=self._best_attention,
            why_not_attention=self._why_not_attention,
            why_not_speculation=lambda method: speculation.why_not(method, draft, self.config),
            why_not_graphs=self._why_not_graphs,
            why_not_load=cache(self._why_not_load),
        )

    def _specs(self) -> list[AttentionSpec]:
        """Return what layers ask of a backend; where none attends, something that all backends fit."""
        plain = SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=64, rope=None)
        return list(dict.fromkeys(map(attention_spec, self.config.attentions or [plain])))

    def _device_of(self, setting: Setting) -> torch.device:
        return torch.device("cpu") if setting.device_map == "cpu" else self.device

    def _best_attention(self, setting: Setting) -> str:
        device, dtype = self._device_of(setting), DTYPES[STORED_NAMES[setting.dtype]]
        return choose("auto", self._specs()[0], device, dtype).name

    def _why_not_attention(self, setting: Setting) -> str | None:
        known = backends()
        if setting.attention not in known:
            names = ", ".join(nearest_first(setting.attention, list(known)))
            raise OptionError(
                f"attention {setting.attention!r} is unknown. Choose one of: {names}."
            )
        device, dtype = self._device_of(setting), DTYPES[STORED_NAMES[setting.dtype]]
        reasons = (why_not_table(spec, device, dtype)[setting.attention] for spec in self._specs())
        return next((reason for reason in reasons if reason is not None), None)

    def _why_not_graphs(self, setting: Setting) -> str | None:
        device_type = self._device_of(setting).type
        names = [name for name, item in backends().items() if item.recorded_on == device_type]
        if setting.attention in names:
            return None
        return (
            f"nothing is recorded with attention {setting.attention}, only with {', '.join(names)}"
        )

    def _why_not_load(self, setting: Setting, workload: Workload) -> str | None:
        if setting.load.recipe is not None:
            read_recipe(setting.load.recipe)
        try:
            plan = self._planned(setting, workload)
        except (OptionError, BudgetError) as error:
            return str(error)  # a device that is not there, say: other rows may do without
        if plan.fits:
            return None
        lacks = [tier for tier in plan.tiers if tier.missing_bytes]
        return "does not fit: " + ", ".join(
            f"{tier.place.title} lacks {tier.missing_bytes / 2**30:.2f} GiB" for tier in lacks
        )

    def _planned(self, setting: Setting, workload: Workload) -> LoadPlan:
        return planned(
            self.options,
            setting.load,
            Room(context=workload.context, batch=workload.batch),
            "int8" if setting.cache_dtype == "int8" else "auto",
        )


def rooms(rows: "list[tuple[Load, Workload]]") -> dict[Load, Room]:
    """Return what each load must have memory for: the largest of its rows."""
    found: dict[Load, Room] = {}
    for load, workload in rows:
        room = found.get(load, Room(context=1, batch=1))
        found[load] = Room(
            context=max(room.context, workload.context), batch=max(room.batch, workload.batch)
        )
    return found
