"""What an evaluation writes of each query: its metrics with the passages found, and TREC's files."""

from contextlib import ExitStack
from typing import IO

import numpy as np

from ..arguments.scripts import EvaluateArguments
from ..files import trec
from ..files.jsonl import to_line
from ..files.outputs import Outputs
from ..search.scores import Neighbors
from .collection import Collection
from .metrics import Relevance

SUFFIXES = (".run.trec", ".qrels.trec", ".rejected.jsonl", ".report.json")


class QueryWriter:
    """The per-query file, and the TREC files if asked for, written as the blocks come."""

    def __init__(self, given: EvaluateArguments, collection: Collection, outputs: Outputs, stack: ExitStack):
        self.given, self.collection = given, collection
        self.digest = collection.digest()
        self.per_query = stack.enter_context(outputs.stage())
        self.run: IO[bytes] | None = None
        if given.write_trec:
            self.run = stack.enter_context(outputs.stage(".run.trec"))
            qrels = stack.enter_context(outputs.stage(".qrels.trec"))
            qrels.writelines(line.encode() for line in trec.qrels_lines(collection.named_judgments()))

    def write(self, start: int, found: Neighbors, relevance: Relevance, values: np.ndarray, names: list[str]) -> None:
        """A block of queries, the first of them number ``start``."""
        collection = self.collection
        for place, (scores, rows) in enumerate(zip(*found, strict=True)):
            query = start + place
            n_found = int((rows >= 0).sum())
            query_id = collection.query_ids[query]
            prompt = collection.prompts[query] if collection.prompts else None
            if self.run is not None:
                ids = [collection.passage_id(row) for row in rows[:n_found].tolist()]
                self.run.write(trec.run_lines(query_id, ids, scores[:n_found]).encode())
            shown = min(self.given.top_passages, n_found)
            top = zip(scores[:shown].tolist(), rows[:shown].tolist(), relevance.grades[place], strict=False)
            rest = slice(shown, n_found)
            grades = relevance.grades[place, rest].tolist()
            below = range(shown + 1, n_found + 1), scores[rest].tolist(), rows[rest].tolist(), grades
            judged = dict(collection.judgments.of_query(query))
            seen = set(rows.tolist())
            missed = [row for row, grade in judged.items() if grade >= 1 and row not in seen]
            entry = {
                "id": query_id,
                "query": collection.queries[query],
                **({"prompt": prompt} if prompt is not None else {}),
                "relevant": int(relevance.n_relevant[place]),
                **dict(zip(names, values[place].tolist(), strict=True)),
                "passages": [self._passage(row, rank, score, grade) for rank, (score, row, grade) in enumerate(top, 1)],
                "right_below": [
                    self._passage(row, rank, score, grade)
                    for rank, score, row, grade in zip(*below, strict=True)
                    if grade >= 1
                ],
                "not_found": [
                    {"id": collection.passage_id(row), "grade": judged[row], "text": collection.passages[row]}
                    for row in missed
                ],
                "collection": self.digest,
            }
            self.per_query.write(to_line(entry))

    def _passage(self, row: int, rank: int, score: float, grade: float) -> dict:
        collection = self.collection
        name, text = collection.passage_id(row), collection.passages[row]
        return {"rank": rank, "id": name, "score": score, "grade": int(grade), "text": text}
