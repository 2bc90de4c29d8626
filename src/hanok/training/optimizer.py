"""AdamW over what learns, its learning rate by the step, and its state as tensors by name."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hanok.errors import CheckpointError
from hanok.training.options import TrainOptions

STATES = ("exp_avg", "exp_avg_sq")


def learning_rate(options: TrainOptions, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, the first being 0: a linear warm-up, then the schedule."""
    warmup = math.ceil(options.warmup_ratio * num_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.schedule == "constant":
        return options.learning_rate
    left = 1 - (step - warmup) / max(1, num_steps - warmup)
    share = left if options.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return options.learning_rate * share


class Optimizer:
    """AdamW over the parameters of a module that need a gradient."""

    def __init__(self, module: nn.Module, options: TrainOptions) -> None:
        self.parameters = {
            name: item for name, item in module.named_parameters() if item.requires_grad
        }
        matrices = [item for item in self.parameters.values() if item.dim() > 1]
        others = [item for item in self.parameters.values() if item.dim() <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, options.weight_decay), (others, 0.0))
            if params
        ]
        self._max_norm = options.max_grad_norm
        self._adam = torch.optim.AdamW(
            groups, lr=0.0, betas=(options.adam_beta1, options.adam_beta2), fused=True
        )

    def num_parameters(self) -> int:
        """Return how many numbers learn."""
        return sum(item.numel() for item in self.parameters.values())

    def step(self, rate: float) -> float:
        """Move the parameters against their gradients, clipped; return the gradients' norm before.

        Where the norm is not finite nothing moves. The gradients are dropped.
        """
        norm = float(
            torch.nn.utils.clip_grad_norm_(
                list(self.parameters.values()), self._max_norm or math.inf
            )
        )
        if math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the moments of each parameter: "exp_avg." and "exp_avg_sq." with its name."""
        for name, parameter in self.parameters.items():
            for kind in STATES:
                if (found := self._adam.state[parameter].get(kind)) is not None:
                    yield f"{kind}.{name}", found

    def restore(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Take the moments that `state` yielded after so many steps; CheckpointError where one lacks."""
        for name, parameter in self.parameters.items():
            kept = {"step": torch.tensor(float(num_steps))}
            for kind in STATES:
                found = state.get(f"{kind}.{name}")
                if found is None or found.shape != parameter.shape:
                    raise CheckpointError(
                        f"the optimizer's state has no {kind} of {name} with {list(parameter.shape)} "
                        "numbers: it is of another training. Start anew, or choose its checkpoint."
                    )
                kept[kind] = found.clone()
            self._adam.state[parameter] = kept
