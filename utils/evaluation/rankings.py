"""Rankings that are judged instead of a model's: BM25's, or those of a TREC run file."""

import logging

import numpy as np

from ..arguments.scripts import EvaluateArguments
from ..files import trec
from ..search import bm25, fusion
from ..search.scores import Neighbors
from .collection import Collection

logger = logging.getLogger(__name__)


class GivenRankings:
    """One ranking of the corpus for each query of a collection.

    Raises:
        OSError, ValueError: a run file that cannot be used.
    """

    def __init__(self, given: EvaluateArguments, collection: Collection):
        self._queries = collection.queries
        self._bm25, self._lists = None, []
        if given.lexical:
            self._bm25 = bm25.Bm25(collection.corpus)
            return
        assert given.run_path is not None
        # Judged passages that the corpus lacks count where a run finds them, as in trec_eval.
        passages = {collection.passage_id(row): row for row in range(len(collection.passages))}
        queries = {name: number for number, name in enumerate(collection.query_ids)}
        run = trec.read_run(
            given.run_path, queries, passages, len(collection.passages),
            collection.rejected if given.on_bad_row == "skip" else None, passes_unknown_queries=True,
            older=collection.other_names,
        )  # fmt: skip
        if not any(run):
            example = next(iter(queries))
            raise ValueError(
                f"{given.run_path}: no line is of a query of {given.dev_path}; expected ids as {example!r}"
            )
        self._lists = run + [[]] * (len(queries) - len(run))
        if n := sum(not ranking for ranking in self._lists):
            logger.warning("%s ranks nothing for %d of %d queries, which count 0", given.run_path, n, len(queries))

    def search(self, start: int, stop: int, depth: int) -> Neighbors:
        """The first ``depth`` passages for some queries, [stop - start, depth]; a passage's score is 1 / its rank."""
        if self._bm25 is not None:
            rows = self._bm25.search(self._queries[start:stop], depth)
        else:
            rows = fusion.padded(self._lists[start:stop], depth)
        return Neighbors(np.where(rows >= 0, 1.0 / np.arange(1, depth + 1), -np.inf), rows)
