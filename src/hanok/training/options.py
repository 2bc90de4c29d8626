"""Every option of training, once: for Python and the command line. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from hanok.checkpoint.lora_config import LoraConfig
from hanok.errors import OptionError
from hanok.memory.learning import Learning

Schedule = Literal["cosine", "linear", "constant", "wsd"]
LORA_RATE, FULL_RATE = 2e-4, 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a model learns. Raises OptionError for a value that no training could have."""

    lora: LoraConfig | None = field(
        default_factory=lambda: LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
    )
    """The adapter that learns. None: all weights learn."""
    epochs: float = 1.0
    """How often each document is read; less than 1 reads a part of them."""
    max_steps: int | None = None
    """Steps of the optimizer. None: those of the epochs."""
    pack_tokens: int = 2048
    """Tokens of one pass: documents are packed up to so many, and do not see each other."""
    packs_per_step: int = 8
    """Passes of one step of the optimizer."""
    learning_rate: float | None = None
    """The highest one, after the warm-up. None: 2e-4 for an adapter, 2e-5 for all weights."""
    loraplus_lr_ratio: float = 1.0
    """The learning rate of an adapter's B by that of all else (LoRA+, arXiv 2402.12354)."""
    schedule: Schedule = "cosine"
    """How the learning rate goes down to zero after the warm-up; `wsd` keeps it until the last steps."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    decay_ratio: float = 0.1
    """Share of the steps in which it goes down, with the schedule `wsd`."""
    weight_decay: float = 0.0
    """Of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this length. 0: never."""
    gradient_checkpointing: bool | None = None
    """Keep only what goes into each layer and compute the rest again: less memory, a third slower. None:
    where it does not fit otherwise."""
    seed: int = 0
    """Of the order of documents, of new adapters, and of dropout."""
    save_steps: int = 100
    """Steps between checkpoints. 0: none but the last."""
    keep_checkpoints: int = 2
    """Complete checkpoints that are kept."""
    eval_steps: int = 0
    """Steps between losses of the held-out documents, and between samples. 0: before the first and after
    the last one only."""
    held_out: float = 0.0
    """Share of the documents that are held out, drawn by the seed."""

    def __post_init__(self) -> None:
        for name in ("pack_tokens", "packs_per_step", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("epochs", "learning_rate", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name} is {value}; it must be above 0.")
        for name in ("warmup_ratio", "decay_ratio", "held_out", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")
        for name in ("save_steps", "eval_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.max_steps is not None and self.max_steps < 1:
            raise OptionError(f"max_steps is {self.max_steps}; it must be at least 1.")

    @property
    def learning(self) -> Learning:
        """What a plan of memory needs to know."""
        return Learning(
            lora=self.lora,
            pack_tokens=self.pack_tokens,
            gradient_checkpointing=bool(self.gradient_checkpointing),
        )

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if self.lora is None else LORA_RATE
