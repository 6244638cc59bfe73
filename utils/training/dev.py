"""The dev rows as a small retrieval task, for judging a model while it trains."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from ..encoding import engines
from ..encoding.encoder import Cut, Encoder, TextEncoder
from ..evaluation import metrics
from ..evaluation.collection import read_corpus_file
from ..files.jsonl import Source
from ..files.row_keys import KeyCounts, prompt_of
from ..ranks.group import Ranks
from ..search.exact import ShardedIndex

logger = logging.getLogger(__name__)

METRICS = ("ndcg@10", "mrr@10", "hit_rate@1", "hit_rate@10", "recall@10")
_DEEPEST = 10
_PLURALS = {"query": "queries", "passage": "passages"}


def judging_metric(name: str | None) -> str:
    """The dev metric that decides which checkpoint is best, by its name here, or PaddleNLP's; None for the default."""
    return (name or METRICS[0]).removeprefix("eval_")


@dataclass
class DevSet:
    """Queries, the corpus, and each query's relevant passages, by number.

    Equal texts are one text, as in ``collection``; a query's positives are those of all its rows.
    Rows of one query with different prompts are different queries. ``digests`` are of the files' contents, by path;
    ``cut`` is what the length limits leave out of the queries and the passages, known once they are encoded.
    """

    queries: list[str]
    corpus: list[str]
    positives: list[set[int]]
    prompts: list[str | None] = field(default_factory=list)
    keys: KeyCounts = field(default_factory=KeyCounts)
    digests: dict[str, str] = field(default_factory=dict)
    cut: dict[str, Cut] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[str], corpus_path: str | None, on_bad_row: str) -> "DevSet":
        """The rows of all ``paths``; their passages, negatives too, and those of ``corpus_path`` are the corpus.

        Raises:
            OSError, ValueError: a file that cannot be read, or a bad row.
        """
        queries: dict[tuple[str, str | None], int] = {}
        passages: dict[str, int] = {}
        dev = cls([], [], [])

        def number(text: str) -> int:
            found = passages.setdefault(text, len(dev.corpus))
            if found == len(dev.corpus):
                dev.corpus.append(text)
            return found

        sources = [Source(path, ("query", "pos_passage"), on_bad_row) for path in paths]
        for record in chain.from_iterable(sources):
            dev.keys.add(record.row)
            prompt = prompt_of(record.row)
            query = queries.setdefault((record.query, prompt), len(dev.queries))
            if query == len(dev.queries):
                dev.queries.append(record.query)
                dev.prompts.append(prompt)
                dev.positives.append(set())
            dev.positives[query].update(number(text) for text in record.pos_passage)
            for text in record.neg_passage:
                number(text)
        dev.digests = {source.path: source.digest for source in sources}
        if corpus_path is not None:
            hasher = hashlib.sha256()
            for text in read_corpus_file(corpus_path, [] if on_bad_row == "skip" else None, hasher.update):
                number(text)
            dev.digests[corpus_path] = hasher.hexdigest()
        return dev

    def evaluate(self, encoders: tuple[Encoder, TextEncoder], ranks: Ranks) -> dict[str, float]:
        """Means of ``METRICS`` over the queries, on every rank; the ranks share the encoding and the search."""
        queries = self._encoded("query", *encoders[0].prompted(self.queries, self.prompts), ranks)
        passages = self._encoded("passage", encoders[1], self.corpus, ranks)
        n_corpus, dim = passages.shape
        index = ShardedIndex.of(ranks, passages if ranks.is_first else None, n_corpus, dim, engines.device())
        depth = min(_DEEPEST, n_corpus)
        found = index.search_all(queries if ranks.is_first else None, len(queries), depth)
        hits = np.array([[row in own for row in rows] for rows, own in zip(found.rows, self.positives, strict=True)])
        relevance = metrics.Relevance.of_hits(hits, np.array([len(own) for own in self.positives]), _DEEPEST)
        return ranks.broadcast_object(metrics.compute(relevance, METRICS))

    def _encoded(self, side: str, encoder: TextEncoder, texts: Sequence[str], ranks: Ranks) -> np.ndarray:
        """All vectors of a side; the first time, what is cut of its texts is logged."""
        lengths = encoder.token_lengths(texts)
        if side not in self.cut:
            self.cut[side] = ranks.broadcast_object(ranks.on_first(lambda: encoder.cut(texts, lengths)))
            ranks.on_first(lambda: self.cut[side].log(f"of the {len(texts):,} dev {_PLURALS[side]}", f"max_{side}_len"))
        return _encode(encoder, texts, lengths, ranks)


def _encode(encoder: TextEncoder, texts: Sequence[str], lengths: np.ndarray, ranks: Ranks) -> np.ndarray:
    """All vectors, float32 [n, dim], on every rank, each having encoded its share of the batches."""
    plan = encoder.plan(lengths)
    mine = plan[ranks.rank :: ranks.size]
    blocks = list(encoder.encode_batches(texts, mine))
    own = np.concatenate(blocks) if blocks else np.zeros((0, encoder.dim), np.float32)
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    for rank, part in enumerate(ranks.gather_rows(own)):
        batches = plan[rank :: ranks.size]
        if batches:
            vectors[np.concatenate(batches)] = part
    return vectors
