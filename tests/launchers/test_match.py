"""`attractor plan --match`: what it solves for is what the recipes then have, what it prints fits, what cannot be is refused; the page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launchers.cli import app
from launchers.match import QUANTITIES
from launchers.output import si
from launchers.plan import make_plan
from model.cost import Work, flops
from pretrain.config import load_recipe
from pretrain.matching import run_flops, token_flops, tokens_for_flops
from tests.pretrain.test_measured import run_folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "matching.md"
TRIO = ["attractor-140m", "parcae-140m", "transformer-140m"]
SIZES = ("140m", "370m", "770m", "1.3b")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def document(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_overrides_make_the_runs_of_the_table(quantity: str) -> None:
    found = document("--match", quantity, *TRIO)
    for row in found["rows"]:
        plan = make_plan(load_recipe(row["recipe"], row["overrides"]))
        assert plan.parameters == row["parameters"]
        assert (plan.batch["tokens"], plan.batch["steps"]) == (row["tokens"], row["steps"])
        assert plan.run_flops == pytest.approx(row["flops"]["model"], rel=1e-9)
        assert plan.expected_iterations == (None if row["iterations"] is None else pytest.approx(row["iterations"], rel=1e-3))


@pytest.mark.parametrize(("quantity", "within"), [("flops", 1e-3), ("tokens", 1e-12), ("total", 0.01), ("matmul", 0.01)])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_is_the_reference_and_the_others_meet_it(quantity: str, within: float, size: str) -> None:
    first, *others = document("--match", quantity, *(f"{kind}-{size}" for kind in ("attractor", "parcae", "transformer")))["rows"]
    assert first["overrides"] == []
    assert first["tokens"] <= load_recipe(first["recipe"]).train.tokens
    assert set(first["ratios"].values()) == {1}
    for row in others:
        assert row["ratios"][quantity] == pytest.approx(1, abs=within)
        assert row["ratios"]["flops"] == row["flops"]["model"] / first["flops"]["model"]
        assert row["ratios"]["hardware"] == row["flops"]["hardware"] / first["flops"]["hardware"]
        assert row["ratios"]["matmul"] == row["parameters"]["matmul"] / first["parameters"]["matmul"]
        assert row["tokens_per_parameter"] == row["tokens"] / row["parameters"]["total"]


def test_overrides_apply_to_all_and_solved_ones_replace_them() -> None:
    for quantity in ("flops", "matmul"):
        rows = document("--match", quantity, *TRIO, "train.tokens=2e9", "train.seed=3", "model.qk_norm=false")["rows"]
        assert rows[0]["overrides"] == ["train.tokens=2e9", "train.seed=3", "model.qk_norm=false"]
        for row in rows:
            keys = [text.partition("=")[0] for text in row["overrides"]]
            assert len(set(keys)) == len(keys)
            assert {"train.tokens", "train.seed", "model.qk_norm"} <= set(keys)


def test_stated_iterations_go_to_a_recipe_or_to_a_kind() -> None:
    def iterations(*words: str) -> list[float | None]:
        return [row["iterations"] for row in document("--match", "flops", "attractor-140m", "attractor-370m", *TRIO[1:], *words)["rows"]]

    assert iterations()[:2] == [6, 8]
    assert iterations("--iterations", "attractor=4.5") == [4.5, 4.5, pytest.approx(8, abs=0.001), None]
    assert iterations("--iterations", "attractor=4.5", "--iterations", "attractor-370m=5", "--iterations", "parcae=6") == [
        4.5,
        5,
        pytest.approx(6, abs=0.01),  # max(1, n): none loops less than once
        None,
    ]


def test_fewer_iterations_leave_the_others_fewer_tokens() -> None:
    few, many = (document("--match", "flops", *TRIO, "--iterations", f"attractor={count}")["rows"] for count in (2, 8))
    assert few[0]["tokens"] == many[0]["tokens"]
    assert few[2]["tokens"] < many[2]["tokens"]


def test_measured_runs_speak_for_their_kind(tmp_path: Path) -> None:
    solved = run_folder(tmp_path / "solved", load_recipe("attractor-140m"), [Work(16, 1, 1), Work(5, 1, 1)])
    looped = run_folder(tmp_path / "looped", load_recipe("edu-1m-parcae"), [Work(4.5, 3.5, 0)])
    rows = document("--match", "flops", *TRIO, "--measured", str(solved), "--measured", str(looped))["rows"]
    assert [row["iterations"] for row in rows] == [10.5, 8, None]
    assert rows[0]["work"] == {"evaluations": 10.5, "applications": 1, "products": 1}
    assert rows[1]["work"] == {"evaluations": 4.5, "applications": 3.5, "products": 0}
    refused = run("--match", "flops", "attractor-770m", "transformer-770m", "--measured", str(solved))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "gradient.mode=adjoint" in refused.stderr


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("size", SIZES)
def test_tables_fit_80_columns_and_cut_no_word(quantity: str, size: str) -> None:
    result = run("--match", quantity, *(f"{kind}-{size}" for kind in ("attractor", "parcae", "transformer")))
    assert result.exit_code == 0, result.stderr
    tables, _, words = result.stdout.partition("Recipes and what to add to them:\n")
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    assert f"Matched: {'FLOPs of the run' if quantity == 'flops' else ''}" in tables
    assert tables.count("Not matched, over the first: ") == 1
    for line, kind in zip(words.splitlines(), ("attractor", "parcae", "transformer"), strict=True):
        recipe, *overrides = shlex.split(line)
        assert recipe == f"{kind}-{size}"
        load_recipe(recipe, overrides)


def test_longer_names_are_whole_too() -> None:
    lines = run("--match", "flops", "edu-5m", "edu-5m-transformer").stdout.splitlines()
    assert sum(line.startswith(" edu-5m-transformer ") for line in lines) == 3
    assert max(map(len, lines)) <= 80


def test_a_recipe_of_one_s_own_is_called_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: attractor-140m\nmodel: {backbone_layers: 5}\n")
    mine = str(tmp_path / "mine.yaml")
    rows = document("--match", "flops", mine, "transformer-140m", "--iterations", "mine=3")["rows"]
    assert (rows[0]["recipe"], rows[0]["iterations"]) == (mine, 3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["attractor-140m", "--match", "flops"], "name two or more"),
        ([*TRIO, "--match", "flop"], "--match flop is not known: choose flops, tokens, total, matmul"),
        (["attractor-140m", "demo", "--match", "flops"], "differ in data.sequence_length (attractor-140m 2048, demo 256)"),
        (["attractor-140m", "demo", "--match", "tokens", "data.sequence_length=256"], "differ in model.vocabulary_size"),
        ([*TRIO, "--match", "flops", "--gpus", "8"], "leave them out beside --match"),
        ([*TRIO, "--match", "flops", "--hardware", "h100"], "leave them out beside --match"),
        ([*TRIO, "--match", "flops", "--iterations", "attractor"], "must be RECIPE_OR_KIND=NUMBER"),
        ([*TRIO, "--match", "flops", "--iterations", "attractor=0"], "with a number above 0"),
        ([*TRIO, "--match", "flops", "--iterations", "atractor=4"], "Iterations were given for atractor"),
        ([*TRIO, "--match", "flops", "--iterations", "transformer=4"], "a transformer, which has no iterations"),
        ([*TRIO, "--match", "flops", "--iterations", "attractor=4", "--iterations", "attractor=5"], "for the second time"),
        ([*TRIO, "--match", "flops", "--measured", "nowhere"], "nowhere is no run folder"),
        (["attractor-140m", "attractor-770m", "--match", "flops", "train.tokens=524288", "train.global_batch=256"], "half a step"),
        (["transformer-140m", "attractor-140m", "--match", "total", "attractor.layers=40", "model.heads=1"], "Nearest is model."),
        (TRIO, "A plan is of one recipe, not 3"),
        (["train.tokens=2e9"], "none was named"),
        (["attractor-140m", "--iterations", "attractor=4"], "belong to --match"),
    ],
)
def test_what_cannot_be_is_refused_in_one_paragraph_with_what_can(words: list[str], named: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.count("\n") == 1
    assert named in result.stderr


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of the page's tables for one recipe."""
    count, ratios = row["parameters"], {name: f"x {ratio:.2f}" for name, ratio in row["ratios"].items()}
    return [
        row["recipe"],
        f"{si(count['total'])}, {ratios['total']}",
        f"{si(count['matmul'])}, {ratios['matmul']}",
        si(count["value_embedding"]) if count["value_embedding"] else "",
        f"{si(row['tokens'])}, {ratios['tokens']}",
        f"{row['tokens_per_parameter']:.3g}",
        "" if row["iterations"] is None else f"{row['iterations']:.3g}",
        f"{si(row['flops_per_token']['model'])}",
        f"{si(row['flops']['model'])}, {ratios['flops']}",
        f"{si(row['flops']['hardware'])}, {ratios['hardware']}",
        f"`{' '.join(row['overrides'])}`" if row["overrides"] else "",
    ]


def tables_of_the_page() -> list[tuple[str, list[list[str]]]]:
    """(command, cells by row) of each table that stands below the command that makes it."""
    found = re.findall(r"^    attractor plan (--match .*)\n\n(?:\|.*\n){2}((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(command, [line.strip("| ").split(" | ") for line in body.splitlines()]) for command, body in found]


def test_the_page_holds_every_family_in_three_ways() -> None:
    commands = [command for command, _ in tables_of_the_page()]
    for size in SIZES:
        for quantity in ("tokens", "matmul", "flops"):
            assert f"--match {quantity} attractor-{size} parcae-{size} transformer-{size}" in commands


@pytest.mark.parametrize(("command", "table"), tables_of_the_page(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_page_says_what_its_commands_say(command: str, table: list[list[str]]) -> None:
    rows = [" | ".join(cells(row)).strip("| ").split(" | ") for row in document(*shlex.split(command))["rows"]]
    assert table == rows


def a_token(name: str, iterations: float | None = None) -> float:
    return token_flops(load_recipe(name), iterations).model


def test_the_sentences_of_the_page_hold() -> None:
    attractor, transformer = (load_recipe(name) for name in ("attractor-770m", "transformer-1.3b"))
    matched = tokens_for_flops(transformer, run_flops(attractor, attractor.train.tokens))
    assert transformer.train.tokens / matched == pytest.approx(1.26, abs=0.005)
    assert run_flops(attractor, attractor.train.tokens) / run_flops(transformer, transformer.train.tokens) == pytest.approx(0.8, abs=0.005)
    assert a_token("attractor-770m") / a_token("transformer-1.3b") == pytest.approx(4 / 3, abs=0.02)
    assert a_token("attractor-770m") / 1e9 == pytest.approx(7.10, abs=0.005)
    for size, ratio, evaluation in (("140m", 0.84, 0.027), ("370m", 0.85, 0.027), ("770m", 0.96, 0.014)):
        planned = load_recipe(f"attractor-{size}").solver.expected_iterations
        assert a_token(f"parcae-{size}") / a_token(f"attractor-{size}") == pytest.approx(ratio, abs=0.005)
        assert a_token(f"attractor-{size}", planned + 1) / a_token(f"attractor-{size}") - 1 == pytest.approx(evaluation, abs=5e-4)
        assert a_token(f"attractor-{size}", 1.0) == pytest.approx(a_token(f"parcae-{size}"), rel=0.05)
    products = flops(attractor.architecture, 2048, 6, products=0).model
    assert 1 - products / a_token("attractor-770m") == pytest.approx(0.1, abs=0.005)
