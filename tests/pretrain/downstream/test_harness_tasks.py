"""Tasks of lm-eval on a run and on its export, by both routes: the same scores; the offline tasks; refusals before a model is loaded."""

from __future__ import annotations

import gzip
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'attractor[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from pretrain.downstream.harness import AttractorLM
from pretrain.downstream.harness_hf import ExportLM
from pretrain.downstream.harness_tasks import OWN_TASKS, evaluate_tasks
from pretrain.errors import Refusal
from pretrain.hub.export import export_run
from tests.pretrain.untrained_runs import write_untrained_run

PARADIGMS = [
    task["dataset_kwargs"]["paradigm"] for task in yaml.load((OWN_TASKS / "local_blimp.yaml").read_text(), yaml.BaseLoader)["task"]
]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("untrained") / "run", data)


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    out = run.parent / "export"
    export_run(run, out)
    return out


def write_lines(path: Path, documents: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


def read_lines(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files, in miniature: passages, and pairs of every paradigm."""
    folder = tmp_path_factory.mktemp("texts")
    passages = [{"text": f"Document {n} says that {n} times {n} is {n * n}"} for n in range(6)]
    write_lines(folder / "lambada_test.jsonl.gz", [*passages, {"text": "word"}])
    pairs = [
        {"sentence_good": f"Document {n} says.", "sentence_bad": f"says {name[:n]} Document.", "UID": name}
        for name in PARADIGMS
        for n in range(2)
    ]
    write_lines(folder / "blimp.jsonl.gz", pairs)
    return folder


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task for each kind of request that the offline ones lack, on a JSON file."""
    folder = tmp_path_factory.mktemp("own_tasks")
    (folder / "texts.json").write_text("".join(json.dumps({"text": f"Document {n} says that {n} is little."}) + "\n" for n in range(4)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "texts.json")}, "test_split": "train"}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{text[:10]}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    }
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    absent = {"task": "own_absent", **common, **rolling, "dataset_path": "nobody/nothing"}
    (folder / "own_absent.yaml").write_text(yaml.safe_dump(absent))
    for name, task, metrics in (("own_rolling", rolling, bits), ("own_written", written, exact)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task, "metric_list": metrics}))
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it read from JSON files under its name: not in a test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def figures(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in report["rows"]}


def test_both_routes_give_the_same_scores(run: Path, export: Path, texts: Path, own_tasks: Path) -> None:
    names = ["local_lambada", "local_blimp", "own_rolling", "own_written"]
    settings: dict[str, Any] = {"tasks_dir": own_tasks, "tasks_data": texts}
    by_run = evaluate_tasks(run, names, **settings)
    by_export = evaluate_tasks(export, names, batch=3, **settings)
    by_hf = evaluate_tasks(export, names, through="hf", **settings)
    assert len(by_run["rows"]) == 2 + 1 + len(PARADIGMS) + 2
    for other in (by_export, by_hf):
        assert figures(other) == pytest.approx(figures(by_run), rel=1e-4)
        for key, value in figures(by_run).items():
            assert key[1] != "acc" or figures(other)[key] == value
        assert other["cut"] == by_run["cut"]
    group = next(row for row in by_run["rows"] if row["task"] == "local_blimp")
    assert (group["n"], group["depth"]) == (2 * len(PARADIGMS), 0)
    kept = json.loads(Path(by_hf["file"]).read_text())
    assert Path(by_hf["file"]).parent == export / "lm_eval"
    assert kept["attractor"]["through"] == "hf"
    assert kept["results"]["local_blimp"]["acc,none"] == group["value"]


def test_each_answer_of_both_routes(run: Path, export: Path) -> None:
    """Token ids and log-likelihoods, request by request, in batches of other sizes."""
    ours, theirs = AttractorLM(str(run), batch_size=4), ExportLM(str(export), device="cpu", batch_size=2)
    long = "Document 7 says that 7 times 7 is 49, and little else; document 8 says that 8 times 8 is 64."
    for text in ("Document 3", "", long, " é\n"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    asked = [("Document 3", " says"), ("", "Document 3"), ("Document ", "3 says"), (long, " And"), ("times", " 4"), ("times", " 5")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in asked]
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    whole = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in ("Document 3", long)]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-4)


def test_the_offline_tasks_are_what_they_say(run: Path, texts: Path) -> None:
    """LAMBADA: perplexity and accuracy of last words; BLiMP: the likelier sentence of a pair, paradigms weighing the same."""
    report = figures(evaluate_tasks(run, ["local_lambada", "local_blimp"], tasks_data=texts))
    model = AttractorLM(str(run))

    def scores(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        return model.loglikelihood([Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs])

    passages = [document["text"] for document in read_lines(texts / "lambada_test.jsonl.gz")]
    words = scores([(text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in passages])
    perplexity = math.exp(-sum(score for score, _ in words) / len(words))
    assert report["local_lambada", "perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert report["local_lambada", "acc"] == pytest.approx(sum(greedy for _, greedy in words) / len(words))
    pairs = read_lines(texts / "blimp.jsonl.gz")
    good, bad = (scores([("", " " + pair[f"sentence_{which}"]) for pair in pairs]) for which in ("good", "bad"))
    right = [first[0] > second[0] for first, second in zip(good, bad, strict=True)]
    assert 0 < sum(right) < len(right)
    assert report["local_blimp", "acc"] == pytest.approx(sum(right) / len(right))


def test_results_of_other_depths_differ_and_are_kept_apart(run: Path, texts: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks_data": texts, "limit": 3, "out": tmp_path / "results"}
    reports = [evaluate_tasks(run, ["local_lambada"], solver_iterations=depth, **settings) for depth in (0, 1)]
    assert figures(reports[0]) != figures(reports[1])
    assert [row["n"] for report in reports for row in report["rows"]] == [3] * 4
    assert sorted(map(str, (tmp_path / "results").iterdir())) == sorted(report["file"] for report in reports)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["local_lambda"], {}, "no task `local_lambda`. Names near it: .*local_lambada"),
        (["local_lambada"], {"through": "hf"}, "transformers cannot read"),
        (["local_lambada"], {"tasks_data": "nowhere"}, "nowhere/lambada_test.jsonl.gz, which cannot be read"),
        (["local_lambada"], {}, "was not told where it is"),
        (["own_absent"], {"tasks_dir": "OWN"}, "data of task `own_absent` cannot be had here"),
        (["local_lambada"], {"tasks_dir": Path("nowhere")}, "--tasks-dir nowhere is no folder"),
    ],
)
def test_refusals(
    run: Path, own_tasks: Path, names: list[str], settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATTRACTOR_DATA", raising=False)
    near = partial(TaskManager, include_defaults=False)  # not the seconds that lm-eval's 14,000 take
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults=False, **named: near(**named))
    settings = {**settings, "tasks_dir": own_tasks} if settings.get("tasks_dir") == "OWN" else settings
    with pytest.raises(Refusal, match=said):
        evaluate_tasks(run, names, **settings)


def test_data_that_is_not_whole(run: Path, texts: Path, tmp_path: Path) -> None:
    whole = (texts / "lambada_test.jsonl.gz").read_bytes()
    (tmp_path / "lambada_test.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match="cannot be read"):
        evaluate_tasks(run, ["local_lambada"], tasks_data=tmp_path)
    write_lines(tmp_path / "lambada_test.jsonl.gz", [{"text": "word after word"}, {"words": "none"}])
    with pytest.raises(Refusal, match="line 2, is no JSON object with text"):
        evaluate_tasks(run, ["local_lambada"], tasks_data=tmp_path)
    write_lines(tmp_path / "blimp.jsonl.gz", [{"sentence_good": "a", "sentence_bad": "b", "UID": PARADIGMS[0]}])
    with pytest.raises(Refusal, match="has no pair of the paradigm"):
        evaluate_tasks(run, ["local_blimp"], tasks_data=tmp_path)


def test_without_lm_eval(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.downstream.harness_tasks.find_spec", lambda _: None)
    with pytest.raises(Refusal, match=r"pip install 'attractor\[eval\]'"):
        evaluate_tasks(run, ["local_lambada"])


EVALS = Path(os.environ.get("ATTRACTOR_DATA", "nowhere"), "evals")


@pytest.mark.skipif(not (EVALS / "blimp.jsonl.gz").is_file(), reason="LAMBADA and BLiMP are not in $ATTRACTOR_DATA/evals")
def test_the_real_files(data: Path, tmp_path: Path) -> None:
    run = write_untrained_run(
        tmp_path / "run", data, "data.sequence_length=1024", "train.tokens=1e6"
    )  # its tokens are little longer than bytes
    report = evaluate_tasks(run, ["local_lambada", "local_blimp"], tasks_data=EVALS, limit=2)
    assert {row["n"] for row in report["rows"]} == {2, 2 * 67}
    assert report["cut"] == 0
