"""python-docs: enough English text, the same each time, read and not run."""

from __future__ import annotations

import sys
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.python_docs import python_docs
from data_pipeline.reading import Document, Reading


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(python_docs(Reading()))


def test_there_are_two_megabytes_of_it(documents: list[Document]) -> None:
    assert sum(len(document.text.encode()) for document in documents) >= 2_000_000
    assert len(documents) > 500


def test_it_is_the_same_each_time_and_has_no_document_twice(documents: list[Document]) -> None:
    assert list(islice(python_docs(Reading()), 150)) == documents[:150]
    assert len({document.text for document in documents}) == len(documents)


def test_it_is_documentation(documents: list[Document]) -> None:
    whole = "\n".join(document.text for document in documents)
    assert "textwrap.TextWrapper" in whole
    assert 'The "if" statement is used for conditional execution' in whole
    assert whole.count("\ndef ") < whole.count("the ") / 50


def make_package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(
        f'"""{text}"""\nraise SystemExit("imported!")\n\nclass A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n'
    )
    (folder / name / "bad.py").write_text("this is not Python")


def test_packages_fill_up_only_what_the_library_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, packages = tmp_path / "lib", tmp_path / "site"
    make_package(library, "only", "The library.")
    for name in ("c", "a", "b"):
        make_package(packages, name, f"The package {name}.")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library), "purelib": str(packages)})
    version = f"python-docs {sys.version_info.major}.{sys.version_info.minor}"
    assert list(python_docs(Reading(), enough=10)) == [
        Document("only\n\nThe library.\n\nonly.A\n\nOf A.\n\nonly.A.f\n\nOf f.\n", f"{version} standard library")
    ]
    more = list(python_docs(Reading(), enough=80))
    assert [document.origin for document in more] == [f"{version} standard library", f"{version} a", f"{version} b"]
    assert more[1].text == "a\n\nThe package a.\n"
