"""An adapter without its base: its configuration, and whether each product has both of its matrices.

Imports no torch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hanok.check.finding import Finding, plural, shown
from hanok.checkpoint.adapter_files import PREFIX, open_adapter
from hanok.checkpoint.formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from hanok.checkpoint.lora_config import LoraConfig
from hanok.checkpoint.safetensors import TensorRef
from hanok.errors import CheckpointError, UnsupportedError

A, B = ".lora_A.weight", ".lora_B.weight"


def adapter_weights(folder: Path) -> Path | None:
    """Return the weights of a folder that holds an adapter and no model."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / CONFIG).is_file():
        return None
    found = [folder / name for name in sorted(ADAPTER_WEIGHTS, reverse=True)]
    return next((file for file in found if file.is_file()), None)


def adapter_findings(folder: Path, tensors: Mapping[str, TensorRef]) -> Iterator[Finding]:
    """Yield what is wrong with an adapter by its configuration and headers."""
    try:
        config = open_adapter(folder).config
    except UnsupportedError as error:
        yield Finding(
            level="note",
            kind="unknown-adapter",
            where=ADAPTER_CONFIG,
            what=str(error).removeprefix(f"{folder / ADAPTER_CONFIG}: ").rstrip("."),
            advice="nothing, if another program runs it",
        )
        return
    except CheckpointError as error:
        if tensors:  # else it is the weights that are absent or damaged, which is another finding
            yield _wrong(str(error).removeprefix(f"{folder / ADAPTER_CONFIG}: ").rstrip("."))
        return
    alone = sorted(
        name
        for name in tensors
        for one, other in ((A, B), (B, A))
        if name.endswith(one) and name.removesuffix(one) + other not in tensors
    )
    if alone:
        yield _wrong(
            f"{plural(len(alone), 'tensor')} without the other of its pair: {shown(alone)}"
        )
    others = sorted(
        f"{name} is {list(ref.shape)}"
        for name, ref in tensors.items()
        if not _fits(name, ref, config)
    )
    if others:
        yield _wrong(f"ranks other than {ADAPTER_CONFIG} says (r is {config.r}): {shown(others)}")


def _fits(name: str, ref: TensorRef, config: LoraConfig) -> bool:
    for ending, axis in ((A, 0), (B, 1)):
        if name.endswith(ending):
            path = name.removesuffix(ending).removeprefix(PREFIX)
            return len(ref.shape) == 2 and ref.shape[axis] == config.rank_of(path)
    return True


def _wrong(what: str) -> Finding:
    return Finding(
        level="error",
        kind="adapter",
        where="adapter",
        what=what,
        advice="get the configuration and the weights of one training",
    )
