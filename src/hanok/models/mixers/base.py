"""What computes a layer's data: the file of a mixer registers its module by the type of its config.

A file of this package that defines `MODULES` adds mixers, or blocks of another build: a subclass of
`LayerConfig` and the module that computes it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal

from torch import nn

from hanok.attention.base import AttentionSpec, Backend
from hanok.attention.cache import LayerState, SequenceState
from hanok.errors import UnsupportedError
from hanok.models.config import LayerConfig, Mixer, ModelConfig, SoftmaxAttention
from hanok.models.rotary import Rotary
from hanok.registry import discover

State = LayerState | SequenceState | None


def attention_spec(mixer: SoftmaxAttention) -> AttentionSpec:
    """Return what a layer asks of a backend."""
    return AttentionSpec(
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        scale=mixer.score_scale,
        window=mixer.window,
        softcap=mixer.softcap,
    )


class MixerModule(nn.Module):
    """What lets the tokens of a layer see others.

    Made from (config of the model, config of the mixer, what rotates its heads or None). Called with

    x: (tokens, hidden)   batch   cos_sin: of the tokens' angles, None without rotation   state: what
    the config's `state()` describes, None without a cache; the batch's tokens follow those it holds,
    and change it.   returns: (tokens, hidden)
    """

    spec: AttentionSpec | None = None
    """What it asks of an attention backend; None: it uses none."""
    backend: Backend

    def why_not_recorded(self, device: Literal["cpu", "cuda"]) -> str | None:
        """Return why passes of a few tokens are not recorded there; None where they may be."""
        return f"layers of {type(self).__name__} are not recorded"


@cache
def modules() -> Mapping[type, type[nn.Module]]:
    """Return the module of each config of a mixer or of a block of another build."""
    found: dict[type, type[nn.Module]] = {}
    for plugin in discover("hanok.models.mixers", "MODULES").values():
        found |= plugin
    return found


def mixer_of(config: ModelConfig, mixer: Mixer, rotary: Rotary | None) -> nn.Module:
    """Make the module of a mixer. Raises UnsupportedError where no file registers one."""
    kind = modules().get(type(mixer))
    if kind is None:
        known = ", ".join(sorted(item.__name__ for item in modules()))
        raise UnsupportedError(
            f"no file of hanok.models.mixers has the module of {type(mixer).__name__}. Known: {known}."
        )
    return kind(config, mixer, rotary)


def block_of(
    config: ModelConfig, layer: LayerConfig, rotary: Rotary | None, default: type[nn.Module]
) -> nn.Module:
    """Make the module of a layer: `default`, or what a file registers for its kind."""
    return modules().get(type(layer), default)(config, layer, rotary)
