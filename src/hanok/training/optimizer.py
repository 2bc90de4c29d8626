"""AdamW over what learns, its learning rate by the step, and its state as tensors by name.

Parameters in fewer bits than float32 have a float32 master each: gradients are added up in float32, the
master moves, and the parameter is the master rounded.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hanok.errors import CheckpointError
from hanok.training.options import TrainOptions

STATES = FIRST, SECOND = "exp_avg", "exp_avg_sq"
MASTER = "master"
EPS = 1e-8  # of AdamW


def learning_rate(options: TrainOptions, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, the first being 0: a linear warm-up, then the schedule."""
    peak, warmup = options.peak_rate, math.ceil(options.warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, num_steps - warmup)
    match options.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * left
        case "wsd":  # arXiv 2404.06395
            decay = max(1, math.ceil(options.decay_ratio * num_steps))
            return peak * min(1.0, (num_steps - step) / decay)
        case _:
            return peak * (1 - math.cos(math.pi * left)) / 2


class Optimizer:
    """AdamW over the parameters of a module that need a gradient."""

    def __init__(self, module: nn.Module, options: TrainOptions) -> None:
        self.parameters = {
            name: item for name, item in module.named_parameters() if item.requires_grad
        }
        self._masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                self._masters[name] = _master_of(parameter)
        self._moved = {
            name: self._masters.get(name, item) for name, item in self.parameters.items()
        }
        self._options = options
        self._moments = {
            kind: {name: torch.zeros_like(item) for name, item in self._moved.items()}
            for kind in STATES
        }
        self._num_steps = 0
        # Matrices decay, an adapter's B has a rate of its own, and one call is for one device.
        self._groups: dict[tuple[float, float, torch.device], list[str]] = {}
        for name, item in self._moved.items():
            is_b = ".lora.adapters." in name and ".b." in name
            ratio = options.loraplus_lr_ratio if is_b else 1.0
            decay = options.weight_decay if item.dim() > 1 else 0.0
            self._groups.setdefault((decay, ratio, item.device), []).append(name)

    def num_parameters(self) -> int:
        """Return how many numbers learn."""
        return sum(item.numel() for item in self.parameters.values())

    def step(self, rate: float) -> float:
        """Move the parameters against their gradients, clipped; return the gradients' norm before.

        Where the norm is not finite nothing moves. The gradients are dropped.
        """
        moved = list(self._moved.values())
        norm = float(torch.nn.utils.clip_grad_norm_(moved, self._options.max_grad_norm or math.inf))
        if math.isfinite(norm):
            self._move(rate)
            self._round()
            # The fused kernel does not count its changes, which what is kept of A and B looks at.
            torch.autograd.graph.increment_version(moved)
        for item in moved:
            item.grad = None
        return norm

    @torch.no_grad()
    def _move(self, rate: float) -> None:
        """Call torch's AdamW. `torch.optim` would import a compiler: 150 MB and a second."""
        self._num_steps += 1
        for (decay, ratio, device), names in self._groups.items():
            gradients = {name: self._moved[name].grad for name in names}
            used = {name: found for name, found in gradients.items() if found is not None}
            torch._fused_adamw_(
                [self._moved[name] for name in used],
                list(used.values()),
                [self._moments[FIRST][name] for name in used],
                [self._moments[SECOND][name] for name in used],
                [],
                [torch.tensor(float(self._num_steps), device=device)] * len(used),
                lr=rate * ratio,
                beta1=self._options.adam_beta1,
                beta2=self._options.adam_beta2,
                weight_decay=decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    @torch.no_grad()
    def _round(self) -> None:
        for name, master in self._masters.items():
            self.parameters[name].copy_(master)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what each parameter has: "exp_avg.", "exp_avg_sq." and "master." with its name."""
        for name, item in self._moved.items():
            for kind in STATES:
                yield f"{kind}.{name}", self._moments[kind][name]
            if name in self._masters:
                yield f"{MASTER}.{name}", item

    def restore(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Take what `state` yielded after so many steps; CheckpointError where something lacks."""
        for name, item in self._moved.items():
            own = {kind: self._moments[kind][name] for kind in STATES}
            if name in self._masters:
                own[MASTER] = item
            for kind, values in own.items():
                found = state.get(f"{kind}.{name}")
                if found is None or found.shape != item.shape:
                    raise CheckpointError(
                        f"the optimizer's state has no {kind} of {name} with {list(item.shape)} "
                        "numbers: it is of another training. Start anew, or choose its checkpoint."
                    )
                values.copy_(found)
        self._num_steps = num_steps
        self._round()


def _master_of(parameter: nn.Parameter) -> Tensor:
    """Return a float32 copy to which the parameter's gradients are added as soon as they are there."""
    master = parameter.detach().float()

    def add(owner: Tensor) -> None:
        assert owner.grad is not None
        if master.grad is None:
            master.grad = owner.grad.float()
        else:
            master.grad += owner.grad
        owner.grad = None

    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]  # torch's
    return master
