"""CORE: prompts letter for letter, spans token for token, an exact score of a model whose answers are known, every kind of model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model.config import BackboneConfig, LoopConfig, ModelConfig, SolverConfig
from model.language_model import LanguageModel, build
from pretrain.downstream.core_bundle import Task, read_bundle
from pretrain.downstream.core_prompts import Row, prompts, rows, shown
from pretrain.downstream.core_tasks import Subject, _mean_losses, _padded, evaluate_core
from pretrain.errors import Refusal
from tests.pretrain.downstream.core_bundles import BOS, FIT, PICK, TELL, TOKENIZER, Next, write_bundle

KINDS = ["attractor", "transformer", "parcae", "looped", "deq"]


def task(kind: str, examples: list[dict[str, Any]], fewshot: int = 0, delimiter: str = " ") -> Task:
    return Task("it", kind, fewshot, delimiter, 0.0, examples)


def subject(model: Any, **changes: Any) -> Subject:
    given = Subject(model, TOKENIZER, BOS, 257, "auto", window=1000, batch_tokens=300, device=torch.device("cpu"))
    return replace(given, **changes)


def tiny(kind: str) -> LanguageModel:
    backbone = BackboneConfig(kind=kind, vocabulary_size=257, width=16, heads=2, backbone_layers=3, zero_output_init=False)  # type: ignore[arg-type]
    return build(ModelConfig(backbone, solver=SolverConfig(tolerance=1e-3), loop=LoopConfig(1, 1, 3)), seed=3).eval()


class TestPrompts:
    def test_multiple_choice(self) -> None:
        choices = prompts(task("multiple_choice", PICK[:2], fewshot=1, delimiter="\nAnswer: "), 0)
        assert choices == ["q1\nAnswer: xa!\n\nq0\nAnswer: xa!", "q1\nAnswer: xa!\n\nq0\nAnswer: xb!"]

    def test_schema(self) -> None:
        assert prompts(task("schema", FIT[:2], fewshot=1), 0) == ["it is p and z\n\nit is q and z", "it is p and z\n\nit is p and z"]

    def test_language_modeling_is_stripped_where_the_continuation_begins(self) -> None:
        without, whole = prompts(task("language_modeling", TELL[:2], fewshot=1, delimiter=": "), 0)
        assert (without, whole) == ("say: bcd\n\nsay:", "say: bcd\n\nsay: bcb")

    def test_the_shown_examples_are_drawn_from_all_others_as_nanochat_draws_them(self) -> None:
        examples = [{"context": str(n), "continuation": "x"} for n in range(30)]
        for number in (0, 7, 29):
            others = [index for index in range(30) if index != number]
            drawn = random.Random(1234 + number).sample(others, 5)
            assert shown(task("language_modeling", examples, fewshot=5), number) == [examples[index] for index in drawn]


class TestRows:
    def test_choices_are_scored_from_where_they_differ(self) -> None:
        assert rows("multiple_choice", [[0, 1, 2, 3], [0, 1, 4, 3, 5]], 9) == [Row([0, 1, 2, 3], 2, False), Row([0, 1, 4, 3, 5], 2, False)]

    def test_a_choice_that_begins_another_keeps_a_token(self) -> None:
        assert [row.start for row in rows("multiple_choice", [[0, 1, 2], [0, 1, 2, 3]], 9)] == [2, 2]

    def test_schemas_are_scored_over_their_common_end(self) -> None:
        assert [row.start for row in rows("schema", [[0, 1, 2, 8, 9], [0, 5, 8, 9]], 9)] == [3, 2]
        assert [row.start for row in rows("schema", [[0, 1, 2], [0, 1, 3]], 9)] == [2, 2]  # nothing in common: the last token
        assert [row.start for row in rows("schema", [[0, 1, 2], [0, 1, 2]], 9)] == [1, 1]

    def test_language_modeling_is_scored_after_the_prompt(self) -> None:
        assert rows("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]], 9) == [Row([0, 1, 2, 3, 4], 3, False)]
        assert rows("language_modeling", [[0, 1, 2], [0, 1, 7, 4]], 9) == [Row([0, 1, 7, 4], 2, False)]  # 2 and what follows joined to 7
        assert rows("language_modeling", [[0, 1, 2], [0, 1, 2]], 9) == [Row([0, 1, 2], 2, False)]

    def test_what_is_longer_than_the_window_loses_its_left_end(self) -> None:
        assert rows("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]], 4) == [Row([1, 2, 3, 4], 2, True)]
        assert rows("language_modeling", [[0, 1], [0, 1, 2, 3, 4]], 2) == [Row([3, 4], 1, True)]  # one token stands before those scored


class TestCore:
    def test_exactly(self, tmp_path: Path) -> None:
        """pick 3/4 over 1/2 is 0.5, fit 2/4 over 1/2 is 0, tell 3/4 over 0 is 0.75."""
        moved: list[float] = []
        report = evaluate_core(subject(Next()), read_bundle(write_bundle(tmp_path)), moved.append)
        pick, fit, tell = report["tasks"]
        assert pick == {
            "label": "pick",
            "type": "multiple_choice",
            "fewshot": 1,
            "examples": 4,
            "accuracy": 0.75,
            "baseline": 0.5,
            "centred": 0.5,
            "cut": 0.0,
        }
        assert (fit["accuracy"], fit["centred"]) == (0.5, 0.0)
        assert (tell["accuracy"], tell["centred"]) == (0.75, 0.75)
        assert report["core"] == pytest.approx((0.5 + 0 + 0.75) / 3)
        assert moved == pytest.approx([1 / 3, 2 / 3, 1])

    def test_the_mean_over_tokens_decides_not_the_sum(self) -> None:
        """After x, `k` costs 6.0 nats and `bcdqqq` 25.6, which is 4.3 a token."""
        examples = [{"query": "", "choices": ["xk", "xbcdqqq"], "gold": 1}]
        assert evaluate_core(subject(Next()), [task("multiple_choice", examples)])["tasks"][0]["accuracy"] == 1.0

    @pytest.mark.parametrize("batch_tokens", [1, 10_000])
    def test_batches_do_not_matter(self, tmp_path: Path, batch_tokens: int) -> None:
        model = Next()
        report = evaluate_core(subject(model, batch_tokens=batch_tokens), read_bundle(write_bundle(tmp_path)))
        assert [row["accuracy"] for row in report["tasks"]] == [0.75, 0.5, 0.75]
        assert model.rows == 2 * 4 + 2 * 4 + 4

    def test_cut_prompts_are_counted(self, tmp_path: Path) -> None:
        report = evaluate_core(subject(Next(), window=6), read_bundle(write_bundle(tmp_path)))
        assert [row["cut"] for row in report["tasks"]] == [1.0, 1.0, 1.0]
        assert report["tasks"][2]["accuracy"] == 0.75

    def test_losses_that_are_not_finite_are_refused(self, tmp_path: Path) -> None:
        broken = Next()
        broken.table[:] = float("nan")
        for each in read_bundle(write_bundle(tmp_path)):
            with pytest.raises(Refusal, match="diverged"):
                evaluate_core(subject(broken), [each])

    def test_prompts_the_model_cannot_read_are_refused(self, tmp_path: Path) -> None:
        tasks = read_bundle(write_bundle(tmp_path))
        with pytest.raises(Refusal, match="model's vocabulary ends at 60"):
            evaluate_core(subject(Next(), vocabulary=60), tasks)
        empty = task("multiple_choice", [{"query": "", "choices": ["", "x"], "gold": 0}], delimiter="")
        with pytest.raises(Refusal, match="Question 0 of it has a prompt without text"):
            evaluate_core(subject(Next()), [empty])


class TestEveryModel:
    @pytest.mark.parametrize("kind", KINDS)
    def test_answers_are_those_of_the_logits(self, kind: str, tmp_path: Path) -> None:
        """One prompt at a time, no padding, straight from the logits."""
        model, depth, right = tiny(kind), 2, []
        tasks = read_bundle(write_bundle(tmp_path))
        for each in tasks:
            for number, example in enumerate(each.examples):
                encoded = [[BOS, *TOKENIZER.encode(text, add_special_tokens=False).ids] for text in prompts(each, number)]
                found = []
                for row in rows(each.kind, encoded, 1000):
                    logits = model.logits(torch.tensor([row.ids[:-1]]), depth=depth)[0, row.start - 1 :]
                    expected = torch.tensor(row.ids[row.start :])
                    found.append(F.cross_entropy(logits, expected) if "gold" in example else (logits.argmax(-1) == expected).all())
                right.append(int(torch.stack(found).argmin()) == example["gold"] if "gold" in example else bool(found[0]))
        told = evaluate_core(subject(model, depth=depth, batch_tokens=1), tasks)["tasks"]
        assert [row["accuracy"] for row in told] == [sum(right[n : n + 4]) / 4 for n in (0, 4, 8)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_padding_changes_no_loss_at_a_fixed_depth(self, kind: str) -> None:
        it = subject(tiny(kind), depth=2)
        short, long = Row([BOS, 5, 6, 7], 2, False), Row([BOS, *range(20)], 3, False)
        together = _mean_losses(it, *_padded([short, long], BOS))
        alone = [_mean_losses(it, *_padded([row], BOS))[0] for row in (short, long)]
        assert together.tolist() == pytest.approx([float(loss) for loss in alone], rel=1e-5)
