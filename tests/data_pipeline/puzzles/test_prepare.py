"""Preparation: generated sets do not leak, sources of every form are read, what is wrong is refused before anything is written."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import Refusal
from data_pipeline.puzzles import PuzzleSet, maze_valid_and_shortest, open_puzzles
from data_pipeline.puzzles.augment import augment
from data_pipeline.puzzles.classes import class_keys
from data_pipeline.puzzles.games import BLANK
from data_pipeline.puzzles.prepare import prepare_puzzles
from data_pipeline.puzzles.readers import read_puzzles
from data_pipeline.puzzles.shards import PuzzleStore, write_split
from data_pipeline.puzzles.solver import solve
from data_pipeline.puzzles.stats import PuzzleStats
from data_pipeline.puzzles.verify import PuzzleReport
from data_pipeline.stats import stats
from data_pipeline.verify import verify
from tests.data_pipeline.puzzles.genuine import MAZE, SUDOKU, TDOKU, needs_mazes, needs_sudoku, needs_tdoku

QUESTION, ANSWER = "1...4..3..4..4.1", "1324421331422431"  # a Sudoku of side 4


def written(folder: Path, rows: list[tuple[str, ...]], header: str = "source,question,answer,rating", name: str = "train.csv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return folder / name


def texts(path: Path, split: str = "train") -> list[tuple[str, str]]:
    """(question, answer) of each puzzle of a set of Sudokus, as a csv has them."""
    held = PuzzleSet(path, split)
    signs = np.array([*" .123456789"])
    return [("".join(signs[one]), "".join(signs[two])) for one, two in zip(held.inputs.numpy(), held.answers.numpy(), strict=True)]


def npy(folder: Path, inputs: np.ndarray, answers: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "all__inputs.npy", inputs)
    np.save(folder / "all__labels.npy", answers)
    return folder


def keys(path: Path, split: str) -> set[int]:
    held = PuzzleSet(path, split)
    return set(class_keys(held.manifest.board, held.inputs.numpy(), held.answers.numpy()).tolist())


@pytest.mark.parametrize(("game", "size"), [("sudoku", 4), ("sudoku", 6), ("maze", 6)])
def test_generated_splits_share_no_class(game: str, size: int, tmp_path: Path) -> None:
    manifest = prepare_puzzles(game, tmp_path / "set", size=size, puzzles=400, validation="0.25", seed=4)
    assert (manifest.splits["train"].puzzles, manifest.splits["validation"].puzzles, manifest.shared) == (400, 100, 0)
    assert not keys(tmp_path / "set", "train") & keys(tmp_path / "set", "validation")
    held = PuzzleSet(tmp_path / "set", "train")
    assert len(np.unique(held.inputs.numpy(), axis=0)) == 400
    if game == "maze":
        assert held.ratings.min() >= 2 * size
        assert maze_valid_and_shortest(held.inputs, held.answers, size).all()
    else:
        solved = solve(held.inputs.numpy(), manifest.box or (0, 0))
        assert (solved.solutions == 1).all()
        assert (solved.answers == held.answers.numpy()).all()
        assert (solved.ratings == held.ratings.numpy()).all()


def test_the_seed_decides_and_clues_are_all_needed(sudokus: Path, tmp_path: Path) -> None:
    prepare_puzzles("sudoku", tmp_path / "same", size=6, puzzles=60, validation="20")
    prepare_puzzles("sudoku", tmp_path / "other", size=6, puzzles=60, validation="20", seed=1)
    assert texts(tmp_path / "same") == texts(sudokus)
    assert not set(texts(tmp_path / "other")) & set(texts(sudokus))
    for row in PuzzleSet(sudokus).inputs.numpy()[:5]:
        weaker = np.repeat(row[None], (row != BLANK).sum(), 0)
        weaker[np.arange(len(weaker)), np.flatnonzero(row != BLANK)] = BLANK
        assert (solve(weaker, (2, 3)).solutions >= 2).all()


def test_least_rating_and_an_impossible_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_puzzles("sudoku", tmp_path / "hard", size=6, puzzles=3, validation="0", least=1)
    assert PuzzleSet(tmp_path / "hard", "train").ratings.min() >= 1
    monkeypatch.setattr("data_pipeline.puzzles.prepare.BARREN", 2)
    with pytest.raises(Refusal, match=r"No more mazes of side 5 rated 25 .* 0 for train"):
        prepare_puzzles("maze", tmp_path / "none", size=5, puzzles=3, validation="0", least=25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard"]


def test_every_form_of_source_gives_the_same_puzzles(sudokus: Path, tmp_path: Path) -> None:
    rows = [("x", question, answer, str(index)) for index, (question, answer) in enumerate(texts(sudokus))]
    plain = written(tmp_path / "csv", rows)
    zipped = tmp_path / "rows.csv.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes().replace(b".", b"0")))
    held = PuzzleSet(sudokus, "train")
    arrays = npy(tmp_path / "npy/train", held.inputs.numpy(), held.answers.numpy()).parent
    for number, path in enumerate((plain, plain.parent, zipped, arrays, arrays / "train")):
        manifest = prepare_puzzles(f"sudoku:{path}", tmp_path / f"set{number}", validation="0")
        assert texts(tmp_path / f"set{number}") == texts(sudokus)
        found = PuzzleSet(tmp_path / f"set{number}", "train").ratings
        assert manifest.splits["train"].rated_by == ("file" if number < 3 else "solver")
        assert found.tolist() == (list(range(60)) if number < 3 else held.ratings.tolist())


def test_mazes_as_text(tmp_path: Path) -> None:
    file = written(tmp_path / "csv", [("x", "S  # ##    #   G", "Soo# ##    #   G"[:16], "1")])
    with pytest.raises(Refusal, match=r"train\.csv, row 2: its answer is not the maze with one shortest path marked"):
        prepare_puzzles(f"maze:{file}", tmp_path / "set")
    far, near = ("x", "S   ###  G  ####", "Sooo###o Goo####", "9"), ("x", "SG  ############", "SG  ############", "9")
    file = written(tmp_path / "csv", [far, near])
    prepare_puzzles(f"maze:{file}", tmp_path / "set", validation="0")
    assert PuzzleSet(tmp_path / "set", "train").ratings.tolist() == [7, 1]


def test_held_out_of_a_source_by_class(tmp_path: Path) -> None:
    """A source that holds every puzzle three times, transformed, still does not leak."""
    prepare_puzzles("sudoku", tmp_path / "set", size=6, puzzles=40, validation="0")
    held = PuzzleSet(tmp_path / "set", "train")
    copies = [
        augment(held.manifest.board, held.inputs.numpy(), held.answers.numpy(), 0, np.full(40, epoch), np.arange(40)) for epoch in range(3)
    ]
    arrays = npy(tmp_path / "npy", *(np.concatenate(columns) for columns in zip(*copies, strict=True)))
    manifest = prepare_puzzles(f"sudoku:{arrays}", tmp_path / "split")
    assert {name: split.puzzles for name, split in manifest.splits.items()} == {"train": 108, "validation": 12}
    assert not keys(tmp_path / "split", "train") & keys(tmp_path / "split", "validation")
    leaking = prepare_puzzles(f"sudoku:{arrays}", tmp_path / "leak", validation=f"sudoku:{arrays}", puzzles=100)
    assert leaking.shared > 100
    assert leaking.splits["train"].puzzles == 100


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("x", QUESTION[:-1], ANSWER, "")], "15 cells; a sudoku has 16, 36 or 81"),
        ([("x", QUESTION, ANSWER, ""), ("x", "1" * 36, "1" * 36, "")], "row 3: the question has 36 cells"),
        ([("x", QUESTION, ANSWER[:-1], "")], "row 2: the answer has 15 cells"),
        ([("x", "1...............", ANSWER, "")], "more than one solution"),
        ([("x", QUESTION[:-1] + "5", ANSWER, "")], "the sign '5' in cell 16"),
        ([("x", QUESTION, ANSWER[:-1] + "2", "")], "its answer is no full, valid grid"),
        ([("x", QUESTION, ANSWER, "hard")], "row 2: the rating is 'hard'"),
        ([], "has no puzzle in it"),
    ],
)
def test_bad_rows_are_named(rows: list[tuple[str, ...]], said: str, tmp_path: Path) -> None:
    file = written(tmp_path / "csv", rows)
    with pytest.raises(Refusal, match=said):
        prepare_puzzles(f"sudoku:{file}", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_an_answer_to_another_question(sudokus: Path, tmp_path: Path) -> None:
    (question, _), (_, answer) = texts(sudokus)[:2]
    file = written(tmp_path / "csv", [("x", question, answer, "")])
    with pytest.raises(Refusal, match="row 2: its answer does not keep the digits that are given"):
        prepare_puzzles(f"sudoku:{file}", tmp_path / "set")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"source,question,answer\n" * 99)[:30])
    (tmp_path / "empty").mkdir()
    npy(tmp_path / "misfit", np.ones((2, 81), np.uint8), np.ones((3, 81), np.uint8))
    npy(tmp_path / "foreign", np.full((2, 81), 11, np.uint8), np.ones((2, 81), np.uint8))
    shutil.copytree(tmp_path / "misfit", tmp_path / "half")
    (tmp_path / "half/all__labels.npy").write_bytes(b"nonsense")
    cases = {
        "a.csv": "no columns question and answer, only a, b",
        "b.csv.gz": "cannot be read as csv",
        "empty": "has no puzzles to train on",
        "nowhere": "does not exist",
        "misfit": "alike in shape",
        "foreign": "row 0: token 11 in cell 1",
        "half": "all__labels.npy cannot be read",
    }
    for name, said in cases.items():
        with pytest.raises(Refusal, match=said):
            prepare_puzzles(f"sudoku:{tmp_path / name}", tmp_path / "set")
    for options, said in (
        ({"validation": "1.5"}, "neither a share below 1"),
        ({"validation": "inf"}, "neither a share below 1"),
        ({"validation": "else"}, "nor a source"),
        ({"validation": f"maze:{tmp_path / 'a.csv'}"}, "no columns"),
        ({"seed": -1}, "not a seed"),
        ({"puzzles": 0}, "no number of puzzles"),
        ({"least": -1}, "below 0"),
    ):
        with pytest.raises(Refusal, match=said):
            prepare_puzzles("sudoku", tmp_path / "set", **options)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="exists already"):
        prepare_puzzles("sudoku", tmp_path)
    with pytest.raises(Refusal, match="says what to generate"):
        prepare_puzzles("sudoku:x.csv", tmp_path / "set", size=9)


def test_splits_of_two_sizes_are_refused(sudokus: Path, tmp_path: Path) -> None:
    held = PuzzleSet(sudokus, "train")
    arrays = npy(tmp_path / "npy", held.inputs.numpy(), held.answers.numpy())
    with pytest.raises(Refusal, match="one game and size"):
        prepare_puzzles("sudoku", tmp_path / "set", size=4, puzzles=10, validation=f"sudoku:{arrays}")


def test_verify_and_stats(sudokus: Path, mazes: Path, tmp_path: Path) -> None:
    report, found = verify(sudokus), stats(mazes)
    assert isinstance(report, PuzzleReport)
    assert isinstance(found, PuzzleStats)
    assert (report.puzzles, report.splits, report.shards > 3) == (80, ["train", "validation"], True)
    assert found.splits["train"].ratings["0"] >= 12
    assert found.splits["train"].distinct == 30
    broken = shutil.copytree(sudokus, tmp_path / "set")
    first, second = sorted((broken / "train").glob("shard.*"))[:2]
    first.write_bytes(first.read_bytes()[:-3])
    second.unlink()
    with pytest.raises(Refusal, match=rf"train/{first.name} has \d+ bytes instead of \d+; train/{second.name} is missing"):
        verify(broken)
    (broken / "train/index.json").write_text("{}")
    with pytest.raises(Refusal, match="not the index"):
        verify(broken)


def test_a_sound_shard_of_a_wrong_puzzle_is_found(sudokus: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(sudokus, tmp_path / "set")
    manifest = open_puzzles(broken)
    puzzles = PuzzleStore(broken, "validation", None, manifest).read()
    puzzles.answers[7, :2] = puzzles.answers[7, 1::-1]
    shutil.rmtree(broken / "validation")
    split = write_split(broken / "validation", puzzles, "solver")
    text = json.loads(manifest.to_json())
    text["splits"]["validation"]["index_sha256"] = split.index_sha256
    (broken / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(Refusal, match="puzzle 7 of validation is wrong though its shard is whole"):
        verify(broken)


def test_manifests_of_another_kind(sudokus: Path, small_set: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="not a manifest of puzzles"):
        open_puzzles(small_set)
    assert not isinstance(verify(small_set), PuzzleReport)


@needs_sudoku
@needs_tdoku
def test_the_genuine_sudokus(tmp_path: Path) -> None:
    """csv and npy agree; none of the validation puzzles is a training puzzle transformed."""
    rows = read_puzzles("sudoku", SUDOKU)
    validation = read_puzzles("sudoku", TDOKU, "validation")
    assert rows is not None
    assert validation is not None
    assert (np.load(SUDOKU / "all__inputs.npy") == rows.inputs).all()
    assert (np.load(SUDOKU / "all__labels.npy") == rows.answers).all()
    assert len(validation.inputs) == 4979
    one, two = (class_keys(rows.board, found.inputs, found.answers) for found in (rows, validation))
    assert len(set(one.tolist()) | set(two.tolist())) == 5979


@needs_mazes
def test_the_genuine_mazes(tmp_path: Path) -> None:
    manifest = prepare_puzzles(f"maze:{MAZE}", tmp_path / "set")
    assert {name: split.puzzles for name, split in manifest.splits.items()} == {"train": 1000, "validation": 500}
    assert manifest.shared == 0
    assert verify(tmp_path / "set").splits == ["train", "validation"]
