"""Where mining's candidates come from: each tier of queries searched, kept on disk, and fused with other rankings."""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..arguments.scripts import MiningArguments
from ..encoding import engines
from ..files import report
from ..files.store import EmbeddingStore, fingerprint
from ..process import runtime
from ..ranks.group import Ranks
from ..ranks.mapped import taken
from ..search import bm25, fusion
from ..search.exact import ShardedIndex
from ..search.faiss_index import FactoryIndex
from ..search.scores import Neighbors, scores_of
from .inputs import Inputs
from .tiers import Tier, tiers_of

logger = logging.getLogger(__name__)

# Queries, and neighbours, between two notes in the store of neighbours: what a kill can cost of the search. They go
# through the corpus together, so that many cost little more than few.
_QUERY_BLOCK, _BLOCK_NEIGHBORS = 16384, 1 << 21
# Queries on which an approximate index is compared with exact search.
_RECALL_QUERIES = 200
# Below this recall an approximate index leaves out many of the hardest negatives, which a person must know.
_LOW_RECALL = 0.9


@dataclass
class Vectors:
    """On rank 0 the arrays, elsewhere None; ``keys`` identify their contents for the store of neighbours.

    Of length 1 if they are ``normalized``.
    """

    queries: np.ndarray | None
    passages: np.ndarray | None
    normalized: bool
    keys: tuple[str, str] = ("", "")


class CandidateSearch:
    """Queries' candidates from every retriever that was asked for. Every rank makes one and calls it in the same order.

    Args:
        folder: where neighbours are kept, beside the vectors: another run with other rules, counts or formats searches
            nothing.
    """

    def __init__(
        self,
        given: MiningArguments,
        ranks: Ranks,
        run: report.RunReport,
        inputs: Inputs | None,
        vectors: Vectors,
        folder: Path,
    ):
        run.counts["searched"] = 0
        self._given, self._ranks, self._inputs, self._vectors = given, ranks, inputs, vectors
        self._dense = _DenseSearch(given, ranks, run, inputs, vectors, folder) if given.dense else None
        self._lexical: bm25.Bm25 | None = None

    def find(self, stop: int, asked: np.ndarray | None = None) -> list[tuple[np.ndarray, Neighbors]] | None:
        """On rank 0 lists of candidates as ``Rankings`` takes them, best first, which reach to the window's end.

        Args:
            asked: on rank 0 the queries, int64, ascending; all if None.
        """
        tiers = tiers_of(self._inputs.forbidden, asked) if self._inputs is not None else None
        dense: list[Neighbors] = []
        if self._dense is not None:
            for number in range(self._ranks.broadcast_object(len(tiers) if tiers is not None else None)):
                found = self._dense.neighbors(tiers[number] if tiers is not None else None, stop)
                if found is not None:
                    dense.append(found)
        return self._ranks.on_first(lambda: self._lists(tiers, dense, stop))

    def _lists(self, tiers: list[Tier] | None, dense: list[Neighbors], stop: int) -> list[tuple[np.ndarray, Neighbors]]:
        assert tiers is not None
        found = self._fused(tiers, dense, stop) if self._given.lexical or self._given.run_path else dense
        return [(tier.queries, own) for tier, own in zip(tiers, found, strict=True)]

    def _fused(self, tiers: list[Tier], dense: list[Neighbors], stop: int) -> list[Neighbors]:
        inputs, vectors = self._inputs, self._vectors
        assert inputs is not None and vectors.queries is not None and vectors.passages is not None
        depths = [tier.depth(stop, inputs.n_candidates) for tier in tiers]
        lists: list[list[np.ndarray]] = [[] for _ in tiers]
        for own, neighbors, depth in zip(lists, dense, depths, strict=False):
            own.append(neighbors.rows[:, :depth].astype(np.int64))
        if self._given.lexical:
            with report.Progress("lexical search", sum(len(tier.queries) for tier in tiers), "queries") as progress:
                self._lexical = self._lexical or bm25.Bm25(inputs.passages[: inputs.n_candidates])
                for own, tier, depth in zip(lists, tiers, depths, strict=True):
                    texts = [inputs.queries[query] for query in tier.queries]
                    own.append(self._lexical.search(texts, depth, progress.update))
        if inputs.run_lists is not None:
            for own, tier, depth in zip(lists, tiers, depths, strict=True):
                own.append(fusion.padded([inputs.run_lists[query] for query in tier.queries], depth))
        fused = (fusion.fuse(own, depth) for own, depth in zip(lists, depths, strict=True))
        return [_scored(vectors, tier.queries, rows) for tier, rows in zip(tiers, fused, strict=True)]


def _scored(vectors: Vectors, queries: np.ndarray, rows: np.ndarray) -> Neighbors:
    """Other rankings' candidates (int64 [q, depth]) with the model's scores."""
    scores = np.full(rows.shape, -np.inf)
    query, place = np.nonzero(rows >= 0)
    scores[query, place] = scores_of(vectors.queries, queries[query], vectors.passages, rows[query, place])
    return Neighbors(scores, rows)


class _DenseSearch:
    """The model's nearest passages. Every rank makes one and calls it in the same order."""

    def __init__(
        self,
        given: MiningArguments,
        ranks: Ranks,
        run: report.RunReport,
        inputs: Inputs | None,
        vectors: Vectors,
        folder: Path,
    ):
        self.given, self.ranks, self.run, self.inputs = given, ranks, run, inputs
        self.vectors, self.folder = vectors, folder
        self._index: ShardedIndex | _OnFirst | None = None
        self._recall: dict | None = None

    def neighbors(self, tier: Tier | None, stop: int) -> Neighbors | None:
        """Those of a tier's queries to the window's end, on rank 0, which alone knows it; from the store if there."""
        store: EmbeddingStore | None = None

        def open_store() -> tuple[int, int, set[int] | None]:
            nonlocal store
            assert self.inputs is not None and tier is not None
            home = self.folder / f"neighbors-{self._key(tier)}"
            depth = tier.depth(stop, self.inputs.n_candidates)
            if not self.given.index_factory:  # an approximate index may find others first where it looks for more
                depth = _kept_depth(home, depth)
            store = EmbeddingStore(home, f"{depth}", len(tier.queries), 2 * depth, np.dtype("<f8"), "neighbours")
            finished = store.open()
            if store.is_complete:
                logger.info("search: all neighbours are in %s", store.folder)
                self._report(store.about.get("index"))
                finished = None
            return len(tier.queries), depth, finished

        try:
            n, depth, finished = self.ranks.broadcast_object(self.ranks.on_first(open_store))
            if finished is not None:
                queries = tier.queries if tier is not None else None
                self.run.counts["searched"] += self._fill(queries, n, depth, store, finished)
            kept = self.ranks.on_first(lambda: store.read() if store is not None else None)
            if kept is None:
                return None
            return Neighbors(kept[:, :depth], kept[:, depth:])
        finally:
            if store is not None:
                store.close()

    def _key(self, tier: Tier) -> str:
        assert self.inputs is not None
        # Blocks of queries are noted by their numbers, which mean nothing where blocks are of another size.
        what = {
            "index": self.given.index_factory, "parameters": self.given.index_parameters,
            "candidates": self.inputs.n_candidates, "blocks": [_QUERY_BLOCK, _BLOCK_NEIGHBORS],
        }  # fmt: skip
        if len(tier.queries) < len(self.inputs.queries):
            what["queries"] = hashlib.sha256(tier.queries.tobytes()).hexdigest()
        return fingerprint(what, self.vectors.keys)[:32]

    def _fill(
        self, numbers: np.ndarray | None, n: int, depth: int, store: EmbeddingStore | None, finished: set[int]
    ) -> int:
        """Search for the blocks of queries that are not finished; returns the number of queries in them."""
        if self._index is None:
            self._index = self._made_index(depth)
        ranks, queries = self.ranks, self.vectors.queries
        searched, size = 0, min(_QUERY_BLOCK, max(1, _BLOCK_NEIGHBORS // max(1, depth)))
        with report.Progress("search", n, "queries") as progress:
            for number, start in enumerate(range(0, n, size)):
                stop = min(start + size, n)
                if number not in finished:
                    block = taken(queries, numbers[start:stop]) if numbers is not None else None
                    found = self._index.search(ranks.broadcast(block), depth)
                    # Row numbers are exact as float64, which keeps scores and rows in one array.
                    packed = np.concatenate([found.scores, found.rows.astype(np.float64)], axis=1)
                    ranks.on_first(partial(_note, store, number, np.arange(start, stop), packed))
                    searched += stop - start
                progress.update(stop - start)
        runtime.give_back_memory()
        ranks.on_first(lambda: store.finish({"index": self._recall}) if store is not None else None)
        return searched

    def _made_index(self, depth: int) -> "ShardedIndex | _OnFirst":
        sizes, passages = None, None
        if self.inputs is not None:
            passages = self.vectors.passages[: self.inputs.n_candidates]
            sizes = passages.shape
        n_candidates, dim = self.ranks.broadcast_object(sizes)
        if not self.given.index_factory:
            return ShardedIndex.of(self.ranks, passages, n_candidates, dim, engines.device())
        return _OnFirst(self.ranks, self.ranks.on_first(lambda: self._factory_index(passages, depth)))

    def _factory_index(self, passages: np.ndarray, depth: int) -> FactoryIndex:
        given, queries = self.given, self.vectors.queries
        index = FactoryIndex(passages, given.index_factory, given.index_parameters)
        sample = np.sort(np.random.default_rng(0).permutation(len(queries))[:_RECALL_QUERIES])
        recall = index.recall(np.ascontiguousarray(queries[sample]), depth)
        self._recall = {"factory": given.index_factory, "recall": recall, "depth": depth, "queries": len(sample)}
        self._report(self._recall)
        logger.info("search: %s finds %.1f%% of the exact top %d", given.index_factory, 100 * recall, depth)
        if recall < _LOW_RECALL:
            logger.warning(
                "warning: %s misses %.0f%% of the nearest passages; give index_parameters that search more, such as "
                "nprobe=32, or leave index_factory out for the exact search",
                given.index_factory, 100 * (1 - recall),
            )  # fmt: skip
        return index

    def _report(self, recall: dict | None) -> None:
        """How well an approximate index finds, of the first tier: each has a depth of its own."""
        if recall is not None:
            self.run.results.setdefault("index", recall)


class _OnFirst:
    """An index that rank 0 alone holds, searched like a sharded one."""

    def __init__(self, ranks: Ranks, index: FactoryIndex | None):
        self.ranks, self.index = ranks, index

    def search(self, queries: np.ndarray, k: int) -> Neighbors:
        found = self.ranks.on_first(lambda: self.index.search(queries, k) if self.index is not None else None)
        return found or Neighbors(np.zeros((0, k)), np.zeros((0, k), np.int64))


def _note(store: EmbeddingStore | None, number: int, rows: np.ndarray, packed: np.ndarray) -> None:
    assert store is not None
    store.write([(number, rows, packed)])


def _kept_depth(home: Path, depth: int) -> int:
    """The depth of a finished store that goes deep enough, else ``depth``."""
    depths = [int(path.parent.name) for path in home.glob("*/vectors") if path.parent.name.isdecimal()]
    return min((kept for kept in depths if kept >= depth), default=depth)
