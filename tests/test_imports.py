"""The house's directions: launchers -> pretrain -> {model, data_pipeline}, torch only where it must be, each library in one room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "data_pipeline": {"data_pipeline"},
    "pretrain": {"pretrain", "model", "data_pipeline"},
    "launchers": {"launchers", "pretrain", "model", "data_pipeline"},
}
ONLY_IN_PRETRAIN = {"deepspeed", "megatron", "wandb", "tensorboard"}
NO_TORCH = (
    "launchers.cli",
    "launchers.match",
    "launchers.plan",
    "launchers.series",
    "launchers.slurm",
    "launchers.study",
    "launchers.study_arms",
    "launchers.study_report",
    "launchers.study_run",
    "launchers.sweep",
    "launchers.sweep_rows",
    "launchers.puzzle_demo",
    "launchers.puzzle_plan",
    "model.reasoning.memory",
    "pretrain.reasoning.compare",
    "launchers.doctor",
    "launchers.local",
    "pretrain.compare",
    "pretrain.config",
    "pretrain.train",
    "pretrain.layout",
    "pretrain.matching",
    "pretrain.measured",
    "pretrain.partition",
    "pretrain.scaling",
    "pretrain.recommend",
    "model.cost",
)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide the room"
            yield node.lineno, (node.module or "").partition(".")[0]


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"no files in {room}"
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_one_way(room: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files(room)
        for line, module in imports(file)
        if module in MAY_IMPORT and module not in MAY_IMPORT[room]
    ]
    assert not wrong


def test_model_needs_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "model", *sys.stdlib_module_names}
    assert not [
        f"{file.name}:{line} imports {module}" for file in files("model") for line, module in imports(file) if module not in allowed
    ]


@pytest.mark.parametrize("room", ["model", "data_pipeline", "launchers"])
def test_engines_and_mirrors_live_in_pretrain(room: str) -> None:
    wrong = [f"{file.name}:{line} imports {module}" for file in files(room) for line, module in imports(file) if module in ONLY_IN_PRETRAIN]
    assert not wrong


@pytest.mark.parametrize("name", ["model/config.py", "model/cost.py"])
def test_closed_forms_import_no_torch(name: str) -> None:
    assert "torch" not in {module for _, module in imports(ROOT / name)}


def test_command_line_starts_without_torch() -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it now raises
import {", ".join(NO_TORCH)}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_face_of_a_package_is_small() -> None:
    for room in MAY_IMPORT:
        tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{room}/__init__.py says what the room is for"
