"""Every example in the documentation runs: docstrings of all modules, and the Python blocks of all pages."""

import contextlib
import doctest
import importlib
import io
import pathlib
import re
from itertools import zip_longest
from typing import NamedTuple

import pytest

from tests.test_house import PUBLIC

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUNTIME_EXAMPLES = {"behavior", "message", "runtime", "service"}  # the others are inner parts of these
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "meshkit.testing.pytest_plugin"])
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    inner = name.startswith("meshkit.runtime.") and module.__name__.rpartition(".")[2] not in RUNTIME_EXAMPLES
    assert attempted or inner or hasattr(module, "__path__"), f"{name} shows no example"


class Block(NamedTuple):
    line: int
    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """Return the Python blocks of a page, each with the ```text block that follows it, if one does at once."""
    fences = list(FENCE.finditer(text))
    found = []
    for fence, after in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        output = None
        # What may stand between the two is one line about the output ("prints:").
        if after and after[1] == "text" and text[fence.end() : after.start()].strip().count("\n") == 0:
            output = after[2]
        found.append(Block(text.count("\n", 0, fence.start()) + 1, fence[2], output))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_the_page_run_and_print_what_it_says(page: pathlib.Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        code = compile("\n" * block.line + block.code, str(page.relative_to(ROOT)), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)  # the page is ours, and running it is the test
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_relative_links_of_the_page_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
