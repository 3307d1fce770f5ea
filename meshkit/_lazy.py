"""Lazy packages (PEP 562): a public name is imported from its module when it is first asked for."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazily(package: str, exports: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], object], list[str]]:
    """Return `__getattr__` and `__all__` for `package`, given the names that each of its modules exports."""
    home = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str) -> object:  # noqa: N807 - the name that PEP 562 gives it
        try:
            module = home[name]
        except KeyError:
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        value: object = getattr(importlib.import_module(f"{package}.{module}"), name)
        setattr(sys.modules[package], name, value)  # asked for once; from now on an ordinary attribute
        return value

    return __getattr__, sorted(home)
