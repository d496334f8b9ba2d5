"""Recipes: layering, overrides, strictness, and errors that name the key, where it was written and the remedy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from pretrain.config import KEYS, Recipe, load_recipe, recipe_names
from pretrain.errors import Refusal
from pretrain.keys import LANGUAGE
from pretrain.overrides import parse_override, parse_yaml


def refusal(*overrides: str, recipe: str = "demo") -> str:
    """The message of a recipe that must be refused."""
    with pytest.raises(Refusal) as caught:
        load_recipe(recipe, list(overrides))
    return str(caught.value)


class TestScalars:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("2e9", 2e9),
            ("1e-3", 1e-3),
            ("2_000_000", 2_000_000),
            ("010", 10),
            ("-3", -3),
            (".5", 0.5),
            ("true", True),
            ("off", "off"),
            ("no", "no"),
            ("2026-01-01", "2026-01-01"),
            ("12:30", "12:30"),
            ("null", None),
            ("nullable", "nullable"),
            ("falsey", "falsey"),
            ("[0, 1, auto]", [0, 1, "auto"]),
            ("s3://bucket/data", "s3://bucket/data"),
        ],
    )
    def test_yaml_1_2(self, text: str, value: object) -> None:
        parsed = parse_yaml(text, "here")
        assert parsed == value
        assert type(parsed) is type(value)

    @given(st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False))
    def test_numbers_survive(self, number: float) -> None:
        assert parse_yaml(repr(number), "here") == number

    @pytest.mark.parametrize("text", ["!!python/name:os.system", "{a: 1, a: 2}", "[1", "@x", "{[1]: 2}"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(Refusal, match="not valid YAML"):
            parse_yaml(text, "here")

    @pytest.mark.parametrize("text", ["tokens", "=3", "a b=3", "train.=3", ".tokens=3", "train.tokens="])
    def test_malformed_overrides(self, text: str) -> None:
        with pytest.raises(Refusal, match="override"):
            parse_override(text)

    def test_values_may_hold_equals_signs(self) -> None:
        assert parse_override("data.path=s3://bucket/a=b") == ("data.path", "s3://bucket/a=b")


class TestKeys:
    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("train.toknes", "train.tokens"),
            ("tokens", "train.tokens"),
            ("atractor.layers", "attractor.layers"),
            ("train.lr", "optimizer.lr"),
            ("solver.tolerence", "solver.tolerance"),
            ("model.vocab_size", "model.vocabulary_size"),
            ("layout.tp", None),
            ("zzz", None),
        ],
    )
    def test_nearest_name(self, wrong: str, meant: str | None) -> None:
        found = LANGUAGE.nearest(wrong)
        assert found == meant if meant else found is None or found in KEYS

    def test_unknown_key_names_itself_its_origin_and_the_nearest(self) -> None:
        message = refusal("train.toknes=3")
        assert "`train.toknes`" in message
        assert "override `train.toknes=3`" in message
        assert "`train.tokens`" in message

    def test_unknown_key_in_a_file_names_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("base: demo\nsolver: {tolerence: 1e-3}\n")
        message = refusal(recipe=str(file))
        assert "mine.yaml" in message
        assert "`solver.tolerance`" in message

    def test_unknown_section_lists_sections(self) -> None:
        assert "Sections: run, data, model" in refusal("qqqqqq.x=3")

    def test_key_within_a_mixture(self) -> None:
        assert "data.path" in refusal("data.path=[{path: a, wieght: 1}]")

    @given(st.sampled_from(sorted(KEYS)), st.data())
    def test_one_lost_letter_is_found_again(self, key: str, data: st.DataObject) -> None:
        section, _, word = key.partition(".")
        if len(word) < 6:
            return
        at = data.draw(st.integers(0, len(word) - 1))
        wrong = f"{section}.{word[:at]}{word[at + 1 :]}"
        assert wrong in KEYS or LANGUAGE.nearest(wrong) == key


class TestTypes:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("train.tokens=abc", "train.tokens=abc (from the override `train.tokens=abc`): expected a number of tokens such as 2e9"),
            ("train.tokens=1.5", "expected a number of tokens"),
            ("train.tokens=null", "train.tokens=null"),
            ("train.seed=true", "expected a whole number"),
            ("train.compile=yes", "expected true or false"),
            ("train.compile=1", "expected true or false"),
            ("model.width=wide", "expected a whole number"),
            ("model.kind=mamba", "expected one of attractor, transformer"),
            ("optimizer.lr=-1", "must be greater than 0"),
            ("optimizer.lr=.inf", "not finite"),
            ("optimizer.betas=[0.9]", "two numbers"),
            ("layout.zero=4", "must be less than or equal to 3"),
            ("evaluation.iterations=[0, sometimes]", "[0, 1, 4, auto]"),
            ("solver=picard", "must hold keys and values"),
            ("telemetry.wandb=maybe", "one of off, offline, online"),
        ],
    )
    def test_refused(self, override: str, said: str) -> None:
        assert said in refusal(override)

    def test_whole_numbers_may_be_written_with_an_exponent(self) -> None:
        recipe = load_recipe("demo", ["train.tokens=2e9", "checkpoint.every=1e3", "model.width=2.56e2"])
        assert (recipe.train.tokens, recipe.checkpoint.every, recipe.model.width) == (2_000_000_000, 1000, 256)
        assert type(recipe.train.tokens) is type(recipe.model.width) is int

    def test_sections_at_once(self) -> None:
        recipe = load_recipe("demo", ["solver={method: picard, tolerance: 1e-2}"])
        assert (recipe.solver.method, recipe.solver.tolerance) == ("picard", 1e-2)
        assert recipe.solver.max_iterations == load_recipe("demo").solver.max_iterations

    def test_model_errors_are_refusals_with_their_own_words(self) -> None:
        message = refusal("model.width=100", "model.heads=3")
        assert "model.width=100 must be an even multiple of model.heads=3" in message


class TestCombinations:
    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["layout.tensor=3"], "layout.tensor may be 2 or 4"),
            (["layout.pipeline=9"], "Use layout.pipeline=4 or less"),
            (["layout.pipeline=2", "layout.zero=2"], "Use layout.zero=1, or layout.pipeline=1"),
            (["layout.tensor=2", "layout.zero=0"], "Use layout.zero=1"),
            (["layout.sequence_parallel=true"], "layout.tensor=1 has one"),
            (["layout.tensor=2", "gradient.jacobian_penalty=0.1"], "gradient.convergence_penalty"),
            (["train.precision=bf16", "layout.zero=0"], "layout.zero=1"),
            (["schedule.shape=trapezoid", "schedule.warmup=0.6", "schedule.decay=0.5"], "schedule.warmup=0.6"),
            (["train.tokens=100"], "less than one step"),
            (["train.global_batch=10", "train.micro_batch=4"], "train.global_batch=8 or 12"),
        ],
    )
    def test_refused(self, overrides: list[str], said: str) -> None:
        assert said in refusal(*overrides)

    @given(batch=st.integers(1, 400), micro=st.integers(1, 40), ranks=st.integers(1, 64))
    def test_accumulation_divides_exactly_or_names_neighbours_that_do(self, batch: int, micro: int, ranks: int) -> None:
        recipe = load_recipe("demo").model_copy(
            update={"train": load_recipe("demo").train.model_copy(update={"global_batch": batch, "micro_batch": micro})}
        )
        if batch % (micro * ranks) == 0:
            assert recipe.check_world(ranks) * micro * ranks == batch
            return
        with pytest.raises(Refusal) as caught:
            recipe.check_world(ranks)
        named = str(caught.value).partition("Use train.global_batch=")[2].partition(";")[0].rstrip(".")
        for neighbour in named.split(" or "):
            assert int(neighbour) % (micro * ranks) == 0

    def test_steps_never_exceed_the_budget(self) -> None:
        recipe = load_recipe("demo", ["train.tokens=1e6", "train.global_batch=16"])
        assert recipe.steps(256) == 1_000_000 // (16 * 256)


class TestFiles:
    def test_bases_are_laid_below(self, tmp_path: Path) -> None:
        (tmp_path / "lower.yaml").write_text("base: demo\nmodel: {width: 64}\ntrain: {seed: 3}\n")
        (tmp_path / "upper.yaml").write_text("base: ./lower.yaml\ntrain: {seed: 4}\n")
        recipe = load_recipe(str(tmp_path / "upper.yaml"), ["model.heads=2"])
        assert (recipe.model.width, recipe.model.heads, recipe.train.seed) == (64, 2, 4)
        assert recipe.run.name == "upper"
        assert recipe.run.dir == "runs/upper"

    def test_circles_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("base: ./b.yaml\n")
        (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
        assert "a -> b -> a" in refusal(recipe=str(tmp_path / "a.yaml"))

    def test_unknown_recipe_offers_the_nearest(self) -> None:
        assert "Did you mean `attractor-140m`?" in refusal(recipe="atractor-140m")

    def test_missing_file(self, tmp_path: Path) -> None:
        assert "no recipe file" in refusal(recipe=str(tmp_path / "none.yaml"))

    def test_broken_yaml_names_file_and_line(self, tmp_path: Path) -> None:
        file = tmp_path / "broken.yaml"
        file.write_text("train:\n  tokens: [1\n")
        message = refusal(recipe=str(file))
        assert "broken.yaml" in message
        assert "line" in message

    def test_missing_budget(self, tmp_path: Path) -> None:
        file = tmp_path / "empty.yaml"
        file.write_text("")
        assert refusal(recipe=str(file)).startswith("train.tokens is missing")
        file.write_text("train: {seed: 1}")
        assert refusal(recipe=str(file)).startswith("train.tokens is missing")

    def test_name_decides_the_folder(self) -> None:
        assert load_recipe("demo").run.dir == "runs/demo"
        assert load_recipe("attractor-1.3b").run.dir == "runs/attractor-1.3b"
        assert load_recipe("demo", ["run.name=first"]).run.dir == "runs/first"
        assert load_recipe("demo", ["run.name=first", "run.dir=/x"]).run.dir == "/x"

    @pytest.mark.parametrize("name", recipe_names("language"))
    def test_stored_recipe_is_the_same(self, name: str) -> None:
        recipe = load_recipe(name, ["telemetry.wandb=off", "data.path=[{path: a, weight: 2}, {path: b, weight: 1}]"])
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_stored_recipe_of_another_version_is_refused(self) -> None:
        with pytest.raises(Refusal, match=r"`train\.tokns` \(from runs/x/config\.yaml\)"):
            Recipe.from_yaml("train: {tokns: 3}", "runs/x/config.yaml")


class TestRecipe:
    def test_architecture_is_the_four_model_sections(self) -> None:
        recipe = load_recipe("attractor-770m")
        assert recipe.architecture == ModelConfig(recipe.model, recipe.attractor, recipe.solver, recipe.gradient)

    def test_sources(self) -> None:
        assert load_recipe("demo", ["data.path=x"]).sources == [("x", 1.0)]
        assert load_recipe("demo", ["data.path=[{path: x, weight: 3}]"]).sources == [("x", 3.0)]
        with pytest.raises(Refusal, match="attractor data prepare"):
            _ = load_recipe("demo").sources

    def test_what_the_data_completes(self) -> None:
        recipe = load_recipe("demo", ["model.vocabulary_size=null", "data.sequence_length=null"]).completed(1000, 128, "data")
        assert (recipe.model.vocabulary_size, recipe.data.sequence_length) == (1024, 128)
        stated = load_recipe("demo", ["model.vocabulary_size=5000"]).completed(1000, 128, "data")
        assert (stated.model.vocabulary_size, stated.data.sequence_length) == (5000, 256)

    def test_an_embedding_smaller_than_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(Refusal, match=r"model\.vocabulary_size=512 is smaller than the 1000 entries"):
            load_recipe("demo", ["model.vocabulary_size=512"]).completed(1000, 128, "data")

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load_recipe("demo").train.seed = 3  # type: ignore[misc]

    def test_every_number_is_finite(self) -> None:
        recipe = load_recipe("attractor-140m")
        assert all(math.isfinite(v) for section in recipe.model_dump().values() for v in section.values() if isinstance(v, float))
