"""The keys of another trainer's file, taken one by one, and what became of each."""

import re
from collections.abc import Collection, Mapping
from typing import Any

LORA = "lora"
ADAM = re.compile(r"(adamw_|paged_adamw).*|adamw")
"""Optimizers that are AdamW, whatever computes it and in how many bits it keeps its moments."""
SCHEDULES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
"""Schedules that have another name here."""


class ForeignKeys:
    """A file's keys. What is taken, left or refused is no more among them; null is no value."""

    def __init__(self, trainer: str, found: Mapping[str, Any], known: Collection[str]) -> None:
        """`known` are the names of hanok's options; those of the adapter are lora.NAME."""
        self.trainer = trainer
        self._left = {key: value for key, value in found.items() if value is not None}
        self._taken: dict[str, Any] = {}
        self._known = known
        self.values: dict[str, Any] = {}
        """By the names of hanok's options."""
        self.notes: list[tuple[str, str]] = []
        """Keys that were translated or left out, with what became of them."""
        self.refused: dict[str, str] = {}
        """Keys that cannot be translated, with the reason."""

    def take(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or the default without it."""
        if key in self._left:
            self._taken[key] = self._left[key]
        return self._left.pop(key, default)

    def put(self, key: str, ours: str, value: Any, why: str = "") -> None:
        """Translate a key into an option; it is refused where hanok has no such option."""
        if ours not in self._known:
            self.refused[key] = f"hanok has no option {ours}"
            return
        part, _, name = ours.partition(".")
        if part == LORA and name:
            self.values.setdefault(LORA, {})[name] = value
        else:
            self.values[ours] = value
        self.notes.append((key, f"{ours} = {value!r}" + (f", {why}" if why else "")))

    def pass_on(self, key: str, ours: str, default: Any = None) -> None:
        """Translate a key whose value means the same; without the key the default, unless it is None."""
        if key in self._left:
            self.put(key, ours, self.take(key))
        elif default is not None:
            self.put(f"({key})", ours, default, f"{self.trainer}'s default")

    def leave(self, key: str, why: str) -> None:
        """Leave a key out, which changes no result."""
        self.notes.append((key, f"left out: {why}"))

    def refuse(self, key: str, why: str) -> None:
        """Refuse a key: without it the training is another one."""
        self.refused[key] = why

    def leave_all(self, reasons: Mapping[str, str]) -> None:
        """Leave out the keys that match these patterns."""
        for pattern, why in reasons.items():
            for key in [key for key in self._left if re.fullmatch(pattern, key)]:
                self.leave(key, why)
                del self._left[key]

    def finish(self) -> None:
        """Refuse what is left, but for what is switched off, and say so of all that is not said."""
        said = {*self.refused, *(key for key, _ in self.notes)}
        for key, value in self._taken.items():
            if key not in said:
                self.leave(key, "it is off" if not value else "it is part of another key's value")
        for key, value in self._left.items():
            if value in (False, 0, "", [], {}):
                self.leave(key, "it is off")
            else:
                self.refused[key] = f"{value!r} is nothing that hanok knows of"
        self._left = {}

    # What both trainers have under the same names, from transformers' arguments.

    def take_numbers(self) -> None:
        """Translate what is a number for AdamW and the clipping of gradients."""
        for name in (
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "max_grad_norm",
            "loraplus_lr_ratio",
        ):
            self.pass_on(name, name)
        epsilon = self.take("adam_epsilon", 1e-8)
        if float(epsilon) != 1e-8:
            self.refuse("adam_epsilon", f"it is {epsilon}, and hanok's AdamW has 1e-8")
        steps = self.take("max_steps", -1)
        if steps > 0:
            self.put("max_steps", "max_steps", steps)

    def take_optimizer(self, key: str, default: str) -> None:
        """Translate the optimizer: AdamW, or refused."""
        name = self.take(key, default)
        if not ADAM.fullmatch(name):
            self.refuse(key, f"{name} is another optimizer than AdamW, the only one here")
        elif "8bit" in name or "4bit" in name:
            self.leave(key, f"{name} is AdamW, whose moments are float32 here")
        else:
            self.leave(key, "AdamW is what hanok has")

    def take_schedule(self, key: str, default: str, warmup_ratio: float | None) -> None:
        """Translate schedule and warm-up; `warmup_ratio` is the trainer's own, None: hanok's."""
        given = self.take(key)
        name = given or default
        ours = SCHEDULES.get(name, name)
        if ours in ("cosine", "linear", "constant", "wsd"):
            why = "" if given else f"{self.trainer}'s default"
            self.put(key if given else f"({key})", "schedule", ours, why)
        else:
            self.refuse(key, f"there is no schedule {name!r} here")
        steps, ratio = self.take("warmup_steps"), self.take("warmup_ratio")
        if name == "constant":
            self.put(key, "warmup_ratio", 0.0, "a schedule without warm-up")
        elif steps:
            self._put_warmup_steps(steps)
        elif ratio is not None or warmup_ratio is not None:
            key = "(warmup_ratio)" if ratio is None else "warmup_ratio"
            value = warmup_ratio if ratio is None else float(ratio)
            self.put(
                key, "warmup_ratio", value, f"{self.trainer}'s default" if ratio is None else ""
            )

    def _put_warmup_steps(self, steps: float) -> None:
        total = self.values.get("max_steps")
        if 0 < steps < 1:
            self.put("warmup_steps", "warmup_ratio", float(steps))
        elif "warmup_steps" in self._known:
            self.put("warmup_steps", "warmup_steps", steps)
        elif total:
            # hanok rounds up: half a step less makes it the same number.
            self.put("warmup_steps", "warmup_ratio", (steps - 0.5) / total, f"of {total} steps")
        else:
            self.refuse("warmup_steps", "hanok has a share of all steps: give --warmup-ratio")

    def take_batch(self, key: str, default: int) -> None:
        """Translate passes of a step: sequences of a pass times the passes of a step."""
        size = self.take(key, default)
        passes = self.take("gradient_accumulation_steps", 1)
        why = f"{size} sequences of {passes} passes, of one device"
        self.put(key, "packs_per_step", size * passes, why)

    def take_dtype(self) -> None:
        """Translate what is computed in."""
        bf16, fp16 = self.take("bf16", False), self.take("fp16", False)
        if bf16 == "auto":
            self.put("bf16", "dtype", "auto")
        elif bf16:
            self.put("bf16", "dtype", "bfloat16")
        elif fp16:
            self.refuse("fp16", "there is no scaling of losses here; without it, dtype is auto")

    def take_saving(self) -> None:
        """Translate checkpoints, losses of held-out documents, and where they are shown."""
        for key, ours in (("save_steps", "save_steps"), ("eval_steps", "eval_steps")):
            value = self.take(key)
            if isinstance(value, int) and not isinstance(value, bool):
                self.put(key, ours, value)
            elif value is not None:
                self.leave(key, f"{value!r} is no number of steps")
        keep = self.take("save_total_limit")
        if keep:
            self.put("save_total_limit", "keep_checkpoints", keep)
        shown = self.take("report_to")
        names = [shown] if isinstance(shown, str) else shown or []
        for name in names:
            if name == "tensorboard":
                self.put("report_to", "report_to", ["tensorboard"])
            elif name != "none":
                self.leave("report_to", f"nothing is sent to {name}; see log.jsonl")

    def take_held_out(self, key: str) -> None:
        """Translate the share of documents that are held out."""
        share = self.take(key, 0)
        if 0 < share < 1:
            self.put(key, "held_out", float(share))
        elif share:
            self.refuse(key, f"{share} is a number of documents, and hanok's held_out is a share")


def source_of(path: str, settings: Mapping[str, Any]) -> str:
    """Return the text of a source of data with its settings."""
    said = ",".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    return f"{path}:{said}" if said else path
