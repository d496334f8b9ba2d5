"""`attractor evaluate --tasks` and `--internalization` on an untrained run: what is printed, and where its files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'attractor[eval]'")

from launchers.cli import app
from tests.pretrain.tiny_run import prepare_text
from tests.pretrain.untrained_runs import write_untrained_run


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    return write_untrained_run(folder / "run", prepare_text(folder))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group of one task."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "questions.json").write_text("".join(json.dumps({"text": f"Document {n}"}) + "\n" for n in range(5)))
    task = {
        "task": "own_pick",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "questions.json")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": 0,
        "doc_to_choice": ["says that", "is"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    group = {"group": "own", "task": ["own_pick"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, content in (("own_pick", task), ("own", group)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_results_are_shown_and_kept(untrained: Path, tasks: Path) -> None:
    words = [str(untrained), "--tasks", "own", "--tasks-dir", str(tasks), "--limit", "4", "--solver-iterations", "auto"]
    report = document(run(*words, "--json"))
    assert [(row["task"], row["depth"], row["metric"], row["n"]) for row in report["rows"]] == [
        ("own", 0, "acc", 4),
        ("own_pick", 1, "acc", 4),
    ]
    assert Path(report["file"]).parent == untrained / "lm_eval"
    kept = json.loads(Path(report["file"]).read_text())
    assert kept["results"]["own_pick"]["acc,none"] == report["rows"][1]["value"]
    assert kept["config"]["kind"] == "attractor"
    shown = run(*words, "--batch", "1")
    assert shown.exit_code == 0, shown.stderr
    table = shown.stdout.partition("lm-eval's results")[0].splitlines()[2:]  # the paths may be long
    assert "  own_pick" in shown.stdout
    assert f"{report['rows'][1]['value']:.4f}" in shown.stdout
    assert max(map(len, table)) <= 80
    assert len(list((untrained / "lm_eval").iterdir())) == 2


def test_an_unknown_route_is_refused(untrained: Path) -> None:
    assert run(str(untrained), "--tasks", "own", "--through", "vllm").exit_code == 2


def test_internalization_is_shown(untrained: Path, tmp_path: Path) -> None:
    report = document(run(str(untrained), "--internalization", "--limit", "3", "--out", str(tmp_path), "--json"))
    assert json.loads((tmp_path / "internalization.json").read_text()) == report
    shown = run(str(untrained), "--internalization", "--limit", "3", "--solver-iterations", "0,3,auto", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.stderr
    tables = shown.stdout.partition(str(tmp_path / "internalization.json"))[0].splitlines()[2:]
    assert "decile" in shown.stdout
    assert f"{report['loss']['auto']:.4f}" in shown.stdout
    assert max(map(len, tables)) <= 80
    assert list(json.loads((tmp_path / "internalization.json").read_text())["loss"]) == ["0", "3", "auto"]
