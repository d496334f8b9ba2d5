"""`python-docs`: the English documentation that every Python carries, so that there is real text to train on with no download.

Two parts, in a fixed order: the language reference's topics (pydoc_data.topics, one document a topic), then the docstrings of the
standard library, one document a module: the module's docstring, then those of its classes and functions, each under its qualified name. A
docstring met before is left out. Source is parsed with `ast`, never imported. The standard library alone gives over 2 MB, and nearly the
same text for one version of Python on any machine; only where a distribution has stripped it are installed packages added, in the order
of their names, until 2 MB are reached.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.reading import Document, Reading, pieces

ENOUGH = 2_000_000  # bytes of text
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def python_docs(reading: Reading, enough: int = ENOUGH) -> Iterator[Document]:
    """Topics, then modules of the standard library, then of as many installed packages as `enough` bytes need. An origin is the
    package's name.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    seen: set[str] = set()
    size = 0
    for origin, documents in _parts(library, f"python-docs {version}", seen):
        if size >= enough and origin != f"python-docs {version} standard library":
            return
        for document in documents:
            if (text := reading.accept(document, origin)) is not None:
                size += len(text.encode())
                yield from pieces(text, origin)


def _parts(library: Path, name: str, seen: set[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """(origin, its documents) in order: topics, standard library, then each installed package."""
    topics = library / "pydoc_data" / "topics.py"
    if topics.exists():
        yield f"{name} topics", _topics(topics, seen)
    yield f"{name} standard library", _modules(library, library, seen)
    for package in _installed():
        yield f"{name} {package.name}", _modules(package, package.parent, seen)


def _topics(path: Path, seen: set[str]) -> Iterator[str]:
    """The values of the one dictionary in pydoc_data/topics.py, by topic."""
    dictionary = next(node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Dict))
    for _, text in sorted(ast.literal_eval(dictionary).items()):
        if text not in seen:
            seen.add(text)
            yield text


def _installed() -> list[Path]:
    """Installed packages, by name."""
    folder = Path(sysconfig.get_paths()["purelib"])
    return sorted((path.parent for path in folder.glob("*/__init__.py")), key=lambda path: path.name)


def _modules(root: Path, path_entry: Path, seen: set[str]) -> Iterator[str]:
    """A document for each module under `root` that has docstrings not seen before, by path; names are relative to `path_entry`."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(path_entry).parts
        if LEFT_OUT.intersection(parts) or parts[-1] == "topics.py":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of other syntaxes
            continue
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        found = []
        for title, text in _docstrings(tree, name):
            if text not in seen:
                seen.add(text)
                found.append(f"{title}\n\n{text}\n")
        if found:
            yield "\n".join(found)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function, then of what is defined directly in it."""
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
