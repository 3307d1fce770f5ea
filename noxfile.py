"""The checks: `nox` runs lint, typing, tests, coverage and examples; `nox -s bench` runs the benchmarks.

The tests run on every CPython from 3.11 to 3.13 that this machine has, and at least on the one that runs nox.
Nothing but packages is downloaded.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typing", "tests", "coverage", "examples"]

GROUPS = nox.project.load_toml("pyproject.toml")
VERSIONS = ["3.11", "3.12", "3.13"]


def _packages(group: str) -> list[str]:
    return list(nox.project.dependency_groups(GROUPS, group))


def _find(version: str) -> str | None:
    """Return a working Python of this version: from PATH (a shim may refuse to run), or else one of pyenv's."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}", path=folder) for folder in os.get_exec_path()]
    found += sorted(str(path) for path in pyenv.glob(f"{version}.*/bin/python{version}"))
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return python
    return None


HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = {version: python for version in VERSIONS if version != HERE and (python := _find(version))}
# nox looks on PATH; what was found comes first there, so that a shim that refuses to run does not stand before it.
os.environ["PATH"] = os.pathsep.join([*(os.path.dirname(python) for python in PYTHONS.values()), os.environ["PATH"]])


@nox.session
def lint(session: nox.Session) -> None:
    session.install(*_packages("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    session.install(".", *_packages("typing"))
    session.run("mypy")
    session.run("pyright", "--pythonpath", os.path.join(session.bin, "python"))


@nox.session(python=sorted({HERE, *PYTHONS}))
def tests(session: nox.Session) -> None:
    """Run the tests, or those named after `--`, on all processors; on the Python that runs nox, measure coverage."""
    session.install(".", *_packages("test"))
    measure = ["-m", "coverage", "run"] if session.python == HERE else []
    session.run("python", *measure, "-m", "pytest", "-n", "auto", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Say what the tests did not cover; fail below the limit in pyproject.toml."""
    session.install(*_packages("test"))
    session.run("python", "-m", "coverage", "combine")
    session.run("python", "-m", "coverage", "report")


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example program."""
    session.install(".")
    for path in sorted(pathlib.Path("examples").glob("*.py")):
        if path.name != "__init__.py":
            session.run("python", "-m", f"examples.{path.stem}")
    session.run("python", "-m", "examples.mesh")
    session.run("python", "-m", "examples.node.story")


@nox.session
def simulate(session: nox.Session) -> None:
    """Simulate a cluster with the seeds 0 to MESHKIT_SEEDS (1000); after `--`: `mutants`, `calls 1000000`, `hour`."""
    session.install(".", *_packages("test"))
    session.run("python", "-m", "tests.simulation", *(session.posargs or ["cluster"]))


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks, or those named after `--`: ours beside the bare primitive, in one run."""
    session.install(".", *_packages("bench"))
    session.run("python", "-m", "tests.bench", *session.posargs)
