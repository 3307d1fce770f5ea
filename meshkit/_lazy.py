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
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=sys.modules[package]) from None  # "Did you mean ...?"
        value: object = getattr(importlib.import_module(f"{package}.{module}"), name)
        setattr(sys.modules[package], name, value)  # asked for once; from now on an ordinary attribute
        return value

    def __dir__() -> list[str]:  # noqa: N807 - the name that PEP 562 gives it
        return sorted({*vars(sys.modules[package]), *home})

    setattr(sys.modules[package], "__dir__", __dir__)  # noqa: B010 - a module's own attribute, not its type's
    return __getattr__, sorted(home)
