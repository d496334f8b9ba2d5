"""The model class that lm-eval is given: begin token, windows, what is cut, generation, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'attractor[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from pretrain.downstream.harness import AttractorLM
from pretrain.errors import Refusal
from tests.pretrain.tiny_run import LENGTH
from tests.pretrain.untrained_runs import write_untrained_run

LONG = "Document 7 says that 7 times 7 is 49, and little else; document 8 says that 8 times 8 is 64."


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_run(tmp_path_factory.mktemp("untrained") / "run", data)


@pytest.fixture(scope="module")
def model(run: Path) -> AttractorLM:
    return AttractorLM(str(run))


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def ids_of(model: AttractorLM, text: str) -> list[int]:
    return list(model.loaded.tokenizer().encode(text, add_special_tokens=False).ids)


def logprobs(model: AttractorLM, inputs: list[int], targets: list[int]) -> float:
    """Of the last targets, plainly."""
    logs = torch.log_softmax(model.loaded.model.logits(torch.tensor([inputs]), None, "strict")[0], dim=-1)
    return sum(logs[len(inputs) - len(targets) + place, token].item() for place, token in enumerate(targets))


def test_it_is_registered_under_its_name() -> None:
    assert get_model("attractor") is AttractorLM


def test_the_begin_token_begins_every_context_once(model: AttractorLM) -> None:
    begin, ids = model.loaded.begin_id, ids_of(model, "Document 3")
    assert model.prefix_token_id == begin
    assert model.tok_encode("Document 3") == [begin, *ids]
    assert model.tok_encode("<|endoftext|>Document 3") == [begin, *ids]
    assert model.tok_encode("Document 3", add_special_tokens=False) == ids
    assert model.tok_encode("") == [begin]
    scores = model.loglikelihood([asked("loglikelihood", "Document", " 3"), asked("loglikelihood", "", "Document 3")])
    whole, context = ids_of(model, "Document 3"), len(ids_of(model, "Document"))
    assert scores[0][0] == pytest.approx(logprobs(model, [begin, *whole[:-1]], whole[context:]), rel=1e-5)
    assert scores[1][0] == pytest.approx(logprobs(model, [begin, *whole[:-1]], whole), rel=1e-5)


def test_a_context_beyond_the_window_loses_its_left_end(model: AttractorLM) -> None:
    before = model.cut
    (score,) = model.loglikelihood([asked("loglikelihood", LONG, " And")])
    whole, context = ids_of(model, LONG + " And"), len(ids_of(model, LONG))
    assert len(whole) > LENGTH + 1
    assert score[0] == pytest.approx(logprobs(model, whole[-LENGTH - 1 : -1], whole[context:]), rel=1e-5)
    assert model.cut == before + 1


def test_rolling_windows_score_each_token_once(model: AttractorLM) -> None:
    """The first window behind the begin token; each later one full, and scored where the one before ended."""
    ids = ids_of(model, LONG)
    expected, scored = logprobs(model, [model.loaded.begin_id, *ids[: LENGTH - 1]], ids[:LENGTH]), LENGTH
    while scored < len(ids):
        end = min(scored + LENGTH, len(ids))
        expected += logprobs(model, ids[end - LENGTH - 1 : end - 1], ids[scored:end])
        scored = end
    short = ids_of(model, "Document 3")
    found = model.loglikelihood_rolling([asked("loglikelihood_rolling", LONG), asked("loglikelihood_rolling", "Document 3")])
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(logprobs(model, [model.loaded.begin_id, *short[:-1]], short), rel=1e-5)


def greedily(model: AttractorLM, text: str, count: int) -> str:
    """The whole text again for every token."""
    ids = [model.loaded.begin_id, *ids_of(model, text)][-(LENGTH - count) :]
    start = len(ids)
    for _ in range(count):
        ids.append(int(model.loaded.model.logits(torch.tensor([ids]), None, "strict")[0, -1].argmax()))
        if ids[-1] == model.loaded.begin_id:
            ids.pop()
            break
    return str(model.loaded.tokenizer().decode(ids[start:]))


def test_generation_is_greedy_and_ends_at_until(run: Path, model: AttractorLM) -> None:
    texts = ["Document 3", "little", LONG, "times"]
    requests = [asked("generate_until", text, {"until": [], "max_gen_toks": 6}) for text in texts]
    made = model.generate_until(requests)
    assert made == [greedily(model, text, 6) for text in texts]
    assert AttractorLM(str(run), batch_size=1).generate_until(requests) == made
    stop = made[1][2:4]
    (cut,) = model.generate_until([asked("generate_until", "little", {"until": [stop], "max_gen_toks": 6})])
    assert cut == made[1].split(stop)[0]


def test_samples_differ_and_do_not_depend_on_the_batch(run: Path, model: AttractorLM) -> None:
    settings = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    requests = [asked("generate_until", "Document 3", settings) for _ in range(4)]
    made = model.generate_until(requests)
    assert len(set(made)) > 1
    assert AttractorLM(str(run), batch_size=3).generate_until(requests) == made


def test_depths_and_precision(run: Path, model: AttractorLM) -> None:
    request = [asked("loglikelihood", "Document 3", " says")]
    (strict,), (proposal,) = model.loglikelihood(request), AttractorLM(str(run), solver_iterations=0).loglikelihood(request)
    assert AttractorLM(str(run), solver_iterations="auto").loglikelihood(request) == [strict]
    assert abs(strict[0] - proposal[0]) > 1e-3
    rounded = AttractorLM(str(run), dtype="bfloat16")
    assert rounded.loaded.model.unembedding.dtype == torch.bfloat16
    assert rounded.loglikelihood(request)[0][0] == pytest.approx(strict[0], abs=0.1)
    assert model.get_model_info() | {"solver_iterations": "strict", "step": 3, "kind": "attractor"} == model.get_model_info()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "int8"}, "dtype=int8 is not known"),
        ({"solver_iterations": "many"}, "solver_iterations=many is no number"),
        ({"batch_size": 0}, "batch_size=0 is no number of rows"),
        ({"path": "nowhere"}, "neither a run nor an export"),
    ],
)
def test_arguments_that_are_refused(run: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        AttractorLM(**{"path": str(run), **arguments})


def test_requests_that_are_refused(model: AttractorLM) -> None:
    with pytest.raises(Refusal, match="cannot be scored"):
        model.loglikelihood([asked("loglikelihood", "Document", LONG)])
    with pytest.raises(Refusal, match="smaller max_gen_toks"):
        model.generate_until([asked("generate_until", "Document", {"until": ["."]})])
