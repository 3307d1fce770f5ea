import pathlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import meshkit

PACKAGE = """
from meshkit._lazy import lazily
__getattr__, __all__ = lazily(__name__, {"fruit": ["Apple", "Pear"], "empty": ["Nothing"], "broken": ["Broken"]})
"""


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "a_lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "fruit.py").write_text("class Apple: ...\nclass Pear: ...\n")
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("a_lazy_package")
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_lazy_package"]:
        del sys.modules[name]


def test_a_name_is_imported_when_it_is_first_asked_for_and_is_an_attribute_from_then_on(package: ModuleType) -> None:
    assert "a_lazy_package.fruit" not in sys.modules
    apple = package.Apple
    assert apple is sys.modules["a_lazy_package.fruit"].Apple
    assert vars(package)["Apple"] is apple
    assert "Pear" not in vars(package)
    assert package.Pear.__name__ == "Pear"


def test_all_and_dir_name_everything_sorted_and_import_nothing(package: ModuleType) -> None:
    assert package.__all__ == ["Apple", "Broken", "Nothing", "Pear"]
    assert {"Apple", "Pear", "__all__", "__name__"} <= set(dir(package))
    _ = package.Apple
    assert dir(package).count("Apple") == 1
    assert "a_lazy_package.empty" not in sys.modules


def test_names_can_be_imported_from_it(package: ModuleType) -> None:
    from a_lazy_package import Apple  # type: ignore[import-not-found]

    assert Apple is package.Apple
    with pytest.raises(ImportError, match="cannot import name 'Plum'"):
        from a_lazy_package import Plum  # noqa: F401


def test_an_unknown_name_is_an_attribute_error_that_knows_similar_names(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=r"^module 'a_lazy_package' has no attribute 'Aple'$") as caught:
        _ = package.Aple
    assert caught.value.name == "Aple"
    assert caught.value.obj is package
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_what_goes_wrong_in_the_module_is_said_as_it_is(package: ModuleType) -> None:
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        _ = package.Broken
    with pytest.raises(AttributeError, match=r"module 'a_lazy_package.empty' has no attribute 'Nothing'"):
        _ = package.Nothing


def test_python_asks_whether_you_meant_the_right_name() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import meshkit; meshkit.RateLimter"], capture_output=True, text=True, check=False
    )
    assert ended.stderr.endswith("Did you mean: 'RateLimiter'?\n")


def test_completion_in_a_shell_offers_every_public_name() -> None:
    assert set(vars(meshkit)["__all__"]) <= set(dir(meshkit))
