"""The rules of the house (docs/design.md): who imports whom, that cores are pure, that what is public is said so."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import meshkit

ROOT = pathlib.Path(meshkit.__file__).parent
MODULES = sorted(
    ".".join(["meshkit", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]

BASE = {"errors", "events", "faults", "guard"}
UTILITIES = {
    "batch",
    "bulkhead",
    "call_registry",
    "circuit_breaker",
    "consensus",
    "dedup",
    "encryptor",
    "hedger",
    "logger",
    "rate_limiter",
    "retrier",
    "timeout",
}
LAYERS = [BASE, UTILITIES, {"runtime"}, {"transports"}, {"testing", "telemetry", "inspector"}]
CORES = {
    "_chunks": {"Chunks"},
    "_event_batch": {"EventBatch"},
    "_generations": {"Streak", "LastCalls", "Window", "Probation"},
    "_key_times": {"KeyTimes"},
    "_recent_durations": {"RecentDurations"},
    "_retry_budget": {"RetryBudget"},
    "batch": {"Batch"},
    "bulkhead": {"Slots"},
    "call_registry": {"PendingCalls"},
    "circuit_breaker": {"Circuit"},
    "dedup": {"SeenKeys"},
    "rate_limiter": {"SlidingWindow"},
    "retrier": {"Backoff"},
    "runtime.answers": {"Answers"},
    "runtime.backlog": {"Backlog"},
    "runtime.failures": {"DeadLetters"},
    "runtime.presence": {"Presence"},
    "runtime.replay": {"ReplayWindow"},
    "testing._chaos": {"Chaos"},
    "transports._nats.announcement": {"Announcement"},
    "transports._nats.company": {"Company"},
    "transports._nats.servers": {"Server", "Servers"},
    "transports._tcp.handshake": {"Handshake"},
    "transports._tcp.wire": {"Address", "Unrecorder"},
}
NOT_IN_A_CORE = {
    "asyncio",
    "anyio",
    "_time",
    "now",
    "wall",
    "random",
    "os",
    "time",
    "notify",
    "report",
    "print",
    "open",
}
HEAVY = {
    "nacl": {"encryptor", "meshkit.runtime.identity"},
    "structlog": {"logger"},
    "msgspec": {"runtime", "transports", "testing"},
    "nats": {"meshkit.transports._nats.link"},
}


def tree(module: str) -> ast.Module:
    source = inspect.getsourcefile(importlib.import_module(module))
    assert source is not None
    return ast.parse(pathlib.Path(source).read_text(encoding="utf-8"))


def room(module: str) -> str:
    """Return the part of the name that the rules speak of: `meshkit.runtime.service` is in the room `runtime`."""
    return [*module.split("."), ""][1]


def imports(module: str) -> Iterator[str]:
    """Yield the full names of all modules that `module` imports, wherever in it."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def layer(room_name: str) -> int:
    return next((number for number, rooms in enumerate(LAYERS) if room_name in rooms), 0)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_nothing_imports_to_its_right_and_utilities_do_not_import_one_another(module: str) -> None:
    here = room(module)
    assert here.startswith("_") or any(here in rooms for rooms in LAYERS), f"{here} has no place in LAYERS"
    for imported in imports(module):
        if not imported.startswith("meshkit"):
            continue
        there = room(imported)
        assert there, f"{module} imports the package meshkit itself, which is lazy for users only"
        if there.startswith("_") or there == here:
            continue
        assert layer(there) <= layer(here), f"{module} imports {imported}, to its right"
        assert here not in UTILITIES or there in BASE, f"the utility {module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_named_rooms_import_the_heavy_packages(module: str) -> None:
    for imported in imports(module):
        package = imported.partition(".")[0]
        assert package not in HEAVY or {room(module), module} & HEAVY[package], f"{module} imports {package}"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) not in {"_time", "testing"}])
def test_only_one_place_reads_clocks_and_nobody_uses_wait_for(module: str) -> None:
    assert not {"time", "datetime"} & set(imports(module)), f"{module} reads a clock of its own"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            assert node.attr != "wait_for", f"{module}:{node.lineno} wait_for can swallow a cancellation on 3.11"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "time", f"{module}:{node.lineno} reads a clock; _time.now() is the place"


@pytest.mark.parametrize(("room_name", "name"), [(room, name) for room in CORES for name in sorted(CORES[room])])
def test_cores_are_pure(room_name: str, name: str) -> None:
    body = tree(f"meshkit.{room_name}").body
    core = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in ast.walk(core):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith), (
            f"{name}:{node.lineno} is asynchronous"
        )
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            parameters = {argument.arg for argument in ast.walk(core) if isinstance(argument, ast.arg)}
            assert node.id not in NOT_IN_A_CORE - parameters, f"{name}:{node.lineno} uses {node.id}"


def defined(module: ModuleType) -> set[str]:
    """Return the public names that `module` defines (type variables aside), or offers as its own: `import X as X`."""
    names = set()
    for node in tree(module.__name__).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    kinds = {"TypeVar", "ParamSpec", "TypeVarTuple"}
    return {n for n in names if not n.startswith("_") and type(getattr(module, n, None)).__name__ not in kinds}


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "meshkit.testing.pytest_plugin"])
def test_all_equals_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        assert set(module.__all__) == defined(module)
    assert sorted(set(module.__all__), key=str) == sorted(module.__all__, key=str), "a name stands twice"
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("package", [meshkit, importlib.import_module("meshkit.testing")])
def test_type_checkers_see_the_names_that_a_lazy_package_has(package: ModuleType) -> None:
    block = next(
        node
        for node in tree(package.__name__).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(vars(package)["__all__"])


def test_the_package_offers_every_public_name_of_the_base_the_utilities_and_the_runtime() -> None:
    offered = {
        name
        for module in PUBLIC
        if room(module) in BASE | UTILITIES | {"runtime", "transports"} and module.count(".") == 1
        for name in importlib.import_module(module).__all__
    }
    assert offered == set(vars(meshkit)["__all__"])


def test_the_reading_order_names_each_file_of_the_runtime_once_and_each_is_short() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("read in this order:") : page.index("## Errors")]
    files = {path.name: path for path in (ROOT / "runtime").glob("*.py") if path.name != "__init__.py"}
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(files)
    assert not {name for name, path in files.items() if len(path.read_text(encoding="utf-8").splitlines()) > 300}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'meshkit' has no attribute 'nonsense'"):
        _ = getattr(meshkit, "nonsense")  # noqa: B009 - type checkers know that it is not there


def documented(value: object) -> Iterator[tuple[str, object]]:
    """Yield `value` and, for a class, its public methods and properties that it defines itself."""
    yield getattr(value, "__qualname__", repr(value)), value
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if not name.startswith("_") and (
                callable(member) or isinstance(member, property | classmethod | staticmethod)
            ):
                yield f"{value.__qualname__}.{name}", member


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # constants and type aliases carry theirs in the source
        for qualified, member in documented(value):
            assert (inspect.getdoc(member) or "").strip(), f"{name}.{qualified} has no docstring"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_meshkit_loads_nothing_heavy() -> None:
    loaded = loaded_after("import meshkit")
    assert not {"nacl", "structlog", "msgspec", "anyio", "asyncio", "meshkit.runtime"} & loaded


@pytest.mark.parametrize("utility", sorted(UTILITIES))
def test_importing_a_utility_loads_no_other_utility_and_nothing_heavy_of_others(utility: str) -> None:
    loaded = loaded_after(f"import meshkit.{utility}")
    assert not {f"meshkit.{other}" for other in UTILITIES - {utility}} & loaded
    assert "meshkit.runtime" not in loaded
    for package, rooms in HEAVY.items():
        assert package not in loaded or utility in rooms
