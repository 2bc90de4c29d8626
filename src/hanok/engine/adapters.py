"""The adapters of a loaded model, by name: read, chosen for all or for one request, removed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hanok.checkpoint.adapter_files import AdapterFiles, open_adapter
from hanok.errors import BudgetError, OptionError
from hanok.memory.adapters import read_files
from hanok.memory.needs import adapter_bytes
from hanok.memory.plan import LoadPlan
from hanok.models.adapters import Weights, activate, attach, detach
from hanok.models.decoder import Decoder
from hanok.models.family import Source, family_of, usual_sources
from hanok.registry import nearest_first


class Adapters:
    """Adapters over one decoder, whose own weights stay as they are.

    Several may be used in one batch, each by the tokens of its requests. None is added or removed while
    something is computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: Mapping[str, Any],
        where: str,
        plan: LoadPlan | None = None,
    ) -> None:
        self._decoder = decoder
        self._plan = plan
        self._bytes: dict[int, int] = {}
        self._config = config
        self._where = where
        self._indices: dict[str, int] = {}
        self._next = 0
        self.active: str | None = None
        """That of what names none; None: the weights alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names, in the order in which they were loaded."""
        return tuple(self._indices)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's format under a name.

        Raises CheckpointError where it does not fit the model, UnsupportedError for one of another kind,
        OptionError for a name that is taken.
        """
        self.add(name, self.read(name, folder))

    def unload(self, name: str) -> None:
        """Remove an adapter; what named none and used it uses the weights alone."""
        self.remove(self.retire(name))

    def read(self, name: str, folder: str | Path, *, is_limited: bool = False) -> Weights:
        """Return the weights of an adapter that is to have a name; others may compute meanwhile.

        Raises as `load` does, but for shapes of another base. With `is_limited` also BudgetError, where
        the plan of the load leaves less memory than the adapter takes.
        """
        self._check_free(name)
        files = open_adapter(folder)
        if is_limited:
            self._check_room(files)
        return read_files(self._decoder, self._table(), files)

    def add(self, name: str, weights: Weights) -> None:
        """Add an adapter that was read; raises as `load` does, and then nothing has changed."""
        self._check_free(name)
        attach(self._decoder, self._table(), weights, index=self._next)
        self._indices[name] = self._next
        held = _tensors_of(weights)
        self._bytes[self._next] = sum(item.nbytes for item in held)
        self._next += 1

    def retire(self, name: str) -> int:
        """Forget a name, and return the number of its adapter, which is there until `remove`.

        Raises OptionError for an unknown name.
        """
        index = self.index_of(name)
        if self.active == name:
            self.use(None)
        del self._indices[name]
        return index

    def remove(self, index: int) -> None:
        """Remove an adapter that was retired."""
        detach(self._decoder, index)
        self._bytes.pop(index, None)

    def use(self, name: str | None) -> None:
        """Let an adapter be that of everything that names none; None: the weights alone."""
        activate(self._decoder, None if name is None else self.index_of(name))
        self.active = name

    def index_of(self, name: str) -> int:
        """Return the number that batches know an adapter by; OptionError for an unknown name."""
        if name not in self._indices:
            known = ", ".join(nearest_first(name, list(self._indices))) or "none is loaded"
            raise OptionError(f"there is no adapter {name!r}. Known: {known}.")
        return self._indices[name]

    def _check_free(self, name: str) -> None:
        if name in self._indices:
            raise OptionError(
                f"there is an adapter {name!r} already. Choose another name, or unload it."
            )

    def _check_room(self, files: AdapterFiles) -> None:
        if self._plan is None:
            return
        name = self._plan.placements[0].device
        tier = next(tier for tier in self._plan.tiers if tier.place.name == name)
        if tier.place.budget is None:
            return
        free = tier.place.budget.num_bytes - tier.peak_bytes + tier.place.adapter_bytes
        free -= sum(self._bytes.values())
        needed = adapter_bytes([files], str(self._decoder.dtype).removeprefix("torch."))
        if needed > free:
            raise BudgetError(
                f"the adapter takes {needed:,} bytes, and {max(0, free):,} of {tier.place.title}'s "
                f"budget are left ({tier.place.budget.source}). Unload another one, or start with fewer "
                "users, a shorter context or more memory."
            )

    def _table(self) -> dict[str, Source]:
        return usual_sources(family_of(self._config, self._where), self._decoder.config)


def _tensors_of(weights: Weights) -> list[Tensor]:
    found: list[Tensor | None] = []
    for part in weights.parts.values():
        found += [part.a, part.b, part.magnitude]
    for whole in weights.whole.values():
        found += [whole.weight, whole.bias]
    found += [item.rows for item in weights.token_rows.values()]
    return [item for item in found if item is not None]
