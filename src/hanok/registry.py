"""The file is the registration: a plugin is one file of a package that defines one named constant.

`discover` imports every module of a package and collects the constant, so that adding a model family or
an attention backend changes no list. A plugin must therefore import without optional dependencies.
"""

import importlib
import pkgutil
from difflib import get_close_matches
from typing import Any


def names_in(package: str) -> list[str]:
    """Return the names of the modules of a package, in alphabetical order, without importing them."""
    module = importlib.import_module(package)
    return sorted(info.name for info in pkgutil.iter_modules(module.__path__))


def discover(package: str, constant: str) -> dict[str, Any]:
    """Return `{module name: value of the constant}` for the modules of `package` that define it.

    Modules are imported in alphabetical order; the names are the last components ("llama").
    """
    found = {}
    for name in names_in(package):
        plugin = importlib.import_module(f"{package}.{name}")
        if hasattr(plugin, constant):
            found[name] = getattr(plugin, constant)
    return found


def nearest_first(name: str, known: list[str]) -> list[str]:
    """Return `known`, the names most like `name` first and the rest in alphabetical order."""
    close = get_close_matches(name, known, n=5, cutoff=0.4)
    return close + sorted(set(known) - set(close))
