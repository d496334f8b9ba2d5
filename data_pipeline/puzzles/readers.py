"""Readers of the files that puzzles come in: those of HRM and TRM, and the csv files of their sources.

    FILE.csv, FILE.csv.gz    columns question, answer and, if there is one, rating (others are ignored); one character a cell:
                             Sudoku '.' or '0' blank, '1' ... '9';  maze '#' wall, ' ' open, 'S' start, 'G' goal, 'o' path
    FOLDER                   with train.csv(.gz) and perhaps test.csv(.gz) or validation.csv(.gz); or with all__inputs.npy and
                             all__labels.npy, [n, cells] tokens as in games.py; or with train/ and perhaps test/ that hold these

Refuses what is not such a file, an empty one, rows of the wrong length or with signs that the game does not have; the row is named.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Refusal
from data_pipeline.manifest import TRAIN, VALIDATION
from data_pipeline.puzzles.games import BLANK, MAZE, PATH, SUDOKU, Board, board_of_cells

SIGNS = {SUDOKU: {".": BLANK, **{str(digit): BLANK + digit for digit in range(10)}}, MAZE: {sign: 1 + i for i, sign in enumerate("# SGo")}}
FORMS = "a .csv or .csv.gz file, or a folder with train.csv or with all__inputs.npy and all__labels.npy"

_NAMES = {TRAIN: (TRAIN,), VALIDATION: ("test", "validation")}
_NPY = ("all__inputs.npy", "all__labels.npy")


@dataclass(frozen=True)
class Rows:
    """What a file holds, unchecked: inputs and answers [n, cells] tokens, ratings [n] if the file has them; `where` and `first`, the number
    of the first row as an editor shows it, name a row in a message.
    """

    board: Board
    inputs: NDArray[np.uint8]
    answers: NDArray[np.uint8]
    ratings: NDArray[np.int32] | None
    where: str
    first: int

    def name(self, row: int) -> str:
        """Where row `row` is."""
        return f"{self.where}, row {row + self.first}"


def read_puzzles(game: str, path: Path, split: str = TRAIN) -> Rows | None:
    """The rows of `split` in the source `path`; None if it is a folder that has no such split."""
    if path.is_file() and path.name.endswith((".csv", ".csv.gz")):
        return _read_csv(game, path) if split == TRAIN else None
    if not path.is_dir():
        what = "has a suffix that is not known" if path.exists() else "does not exist"
        raise Refusal(f"The source {path} {what}. Puzzles are read from {FORMS}.")
    for name in _NAMES[split]:
        for file in (path / f"{name}.csv", path / f"{name}.csv.gz"):
            if file.is_file():
                return _read_csv(game, file)
        if (path / name / _NPY[0]).is_file():
            return _read_npy(game, path / name)
    if split == TRAIN and (path / _NPY[0]).is_file():
        return _read_npy(game, path)
    return None


def _read_csv(game: str, file: Path) -> Rows:
    questions, answers, ratings = [], [], []
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="ascii", newline="") as text:
            reader = csv.DictReader(text)
            columns = reader.fieldnames or []
            if not {"question", "answer"} <= set(columns):
                raise Refusal(f"{file} has no columns question and answer, only {', '.join(columns) or 'nothing'}. Give its first line: "
                              "source,question,answer,rating.")  # fmt: skip
            for record in reader:
                questions.append(record["question"] or "")
                answers.append(record["answer"] or "")
                ratings.append(record.get("rating") or "")
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise Refusal(f"{file} cannot be read as csv ({error}). It is damaged, or not what its name says: fetch it again.") from error
    if not questions:
        raise Refusal(f"{file} has no puzzle in it. Give a file with a row for each puzzle below its first line.")
    board = board_of_cells(game, len(questions[0]), str(file))
    return Rows(
        board, _tokens(board, questions, "question", file), _tokens(board, answers, "answer", file), _ratings(ratings, file), str(file), 2
    )


def _tokens(board: Board, texts: list[str], column: str, file: Path) -> NDArray[np.uint8]:
    """[n, cells] tokens of as many texts of one sign a cell."""
    for row, text in enumerate(texts):
        if len(text) != board.cells:
            raise Refusal(
                f"{file}, row {row + 2}: the {column} has {len(text)} cells, the first question {board.cells}. All puzzles of a set have "
                "one size: mend the row, or prepare each size by itself."
            )
    token = np.zeros(256, np.uint8)
    for sign, value in SIGNS[board.game].items():
        token[ord(sign)] = value if value < board.vocabulary_size else 0
    signs = np.frombuffer("".join(texts).encode("ascii"), np.uint8).reshape(len(texts), board.cells)
    found = token[signs]
    if (bad := np.argwhere(found == 0)).size:
        row, cell = bad[0]
        known = "".join(sign for sign, value in SIGNS[board.game].items() if value < board.vocabulary_size)
        raise Refusal(
            f"{file}, row {row + 2}: the {column} has the sign {chr(signs[row, cell])!r} in cell {cell + 1}; a {board.game} of this size "
            f"is written with {known!r}. Mend the row, or leave it out."
        )
    return found


def _ratings(texts: list[str], file: Path) -> NDArray[np.int32] | None:
    """The ratings [n] if every row has one, None if none has."""
    if not any(texts):
        return None
    for row, text in enumerate(texts):
        if not text.isdigit() or len(text) > 9:
            raise Refusal(
                f"{file}, row {row + 2}: the rating is {text!r}, not a whole number from 0. Mend the row, or take the column rating out of "
                "the file: then the solver rates."
            )
    return np.array(texts, np.int32)


def _read_npy(game: str, folder: Path) -> Rows:
    arrays = []
    for name in _NPY:
        try:
            found = np.load(folder / name)
        except (OSError, ValueError, EOFError) as error:
            raise Refusal(f"{folder / name} cannot be read as a .npy array ({error}). It is missing or damaged: fetch it again.") from error
        arrays.append(found)
    inputs, answers = arrays
    if inputs.shape != answers.shape or inputs.ndim != 2 or inputs.dtype.kind not in "iu" or answers.dtype.kind not in "iu":
        raise Refusal(
            f"{folder}: {_NPY[0]} is {inputs.dtype}{list(inputs.shape)} and {_NPY[1]} {answers.dtype}{list(answers.shape)}; both have to "
            "be whole numbers [puzzles, cells], alike in shape. Write them with HRM's or TRM's build scripts."
        )
    if not len(inputs):
        raise Refusal(f"{folder / _NPY[0]} has no puzzle in it. Give a folder whose arrays have a row for each puzzle.")
    board = board_of_cells(game, inputs.shape[1], str(folder / _NPY[0]))
    for name, found in zip(_NPY, arrays, strict=True):
        most = board.vocabulary_size - 1 if game == SUDOKU else PATH
        if ((found < 1) | (found > most)).any():
            row, cell = np.argwhere((found < 1) | (found > most))[0]
            raise Refusal(
                f"{folder / name}, row {row}: token {found[row, cell]} in cell {cell + 1}; the tokens of this {game} are 1 to {most}. "
                "See docs/puzzles.md for what they mean."
            )
    return Rows(board, inputs.astype(np.uint8), answers.astype(np.uint8), None, str(folder / _NPY[0]), 0)
