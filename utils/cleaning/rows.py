"""The rows of a file that cleaning reads: queries, which of them are equal, and their answers."""

from dataclasses import dataclass

import numpy as np

from ..files.jsonl import Source, fold
from ..files.ragged import Ragged
from ..files.row_keys import KeyCounts
from . import answers


@dataclass
class QueryRows:
    """A file's queries. ``first`` gives, for each row, the first row whose text is equal after folding; ``n_bare`` rows
    have no positive; ``answers`` are each row's positives, ``folded_answers`` the same folded, if they are asked for.
    """

    source: Source
    lines: np.ndarray
    texts: list[str]
    first: np.ndarray
    folded: dict[str, int]
    n_bare: int
    keys: KeyCounts
    answers: Ragged
    folded_answers: Ragged | None = None

    @classmethod
    def read(cls, path: str, on_bad_row: str, folds_answers: bool = False) -> "QueryRows":
        source = Source(path, ("query",), on_bad_row)
        lines, texts, first, folded, n_bare, keys = [], [], [], {}, 0, KeyCounts()
        passages, passages_folded = answers.AnswersRead(), answers.AnswersRead(fold)
        for record in source:
            n_bare += not record.pos_passage
            passages.add(record.pos_passage)
            if folds_answers:
                passages_folded.add(record.pos_passage)
            keys.add(record.row)
            first.append(folded.setdefault(fold(record.query), len(texts)))
            lines.append(record.line)
            texts.append(record.query)
        rows = np.array(lines, np.int64), texts, np.array(first, np.int64)
        folded_answers = passages_folded.of_rows() if folds_answers else None
        return cls(source, *rows, folded, n_bare, keys, passages.of_rows(), folded_answers)

    @property
    def unique(self) -> np.ndarray:
        """The rows that are the first of their text, int64, ascending."""
        return np.flatnonzero(self.first == np.arange(len(self.texts)))

    def unique_texts(self) -> list[str]:
        return [self.texts[row] for row in self.unique]

    def answer_groups(self) -> np.ndarray:
        """A number for each unique query, the same for those whose rows have the same answers together; int64."""
        return answers.groups(answers.joined(self.answers, self.first), self.unique)

    def file_rows(self) -> np.ndarray:
        """Each good row's number among all rows of the file, bad ones included."""
        bad = np.sort(np.array([error.line for error in self.source.rejected], np.int64))
        return np.arange(len(self.lines)) + np.searchsorted(bad, self.lines)
