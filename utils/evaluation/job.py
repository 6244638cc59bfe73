"""The evaluation job: a test collection in, each query's metrics, their means and intervals out."""

import logging
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from ..arguments.scripts import EvaluateArguments, ModelArguments, input_paths
from ..encoding import engines
from ..encoding.embed import build_encoders, description, embed, note_cut, with_prompts
from ..files import beir, report, trec
from ..files.outputs import Outputs, write_rejected
from ..files.store import derive, read_user_vectors
from ..process import interruption, runtime
from ..ranks.group import Ranks
from ..search.exact import ShardedIndex
from ..search.scores import Neighbors
from . import collection as collections
from . import comparison, intervals, metrics
from .collection import Collection
from .comparison import Comparison, Others
from .metrics import Relevance
from .query_files import SUFFIXES, QueryWriter
from .rankings import GivenRankings
from .result import EvaluationResult

logger = logging.getLogger(__name__)

# Queries, and neighbours, that are searched, judged and written at a time.
_QUERY_BLOCK, _BLOCK_NEIGHBORS = 16384, 1 << 22
# The same where one process ranks them.
_RANKED = 256
# What a text costs beside itself: its places in lists and tables, its id and its judgments.
_OVERHEAD = 300


def evaluate(given: EvaluateArguments) -> EvaluationResult:
    """Run the whole job; every rank calls it and gets the result.

    Rank 0 alone reads, judges and writes; the others take part in encoding and in the search.
    """
    ranks = Ranks()
    run = report.RunReport("embedding_evaluate", asdict(given))
    with Outputs(given.output_data_path, SUFFIXES) as outputs:
        with run.stage("read"):
            inputs = ranks.start(lambda: _Inputs.read(given, outputs))
        if given.judges_rankings:
            by_dimension = ranks.on_first(lambda: _evaluate_rankings(given, run, inputs, outputs)) or {}
        else:
            by_dimension = _evaluate_model(given, _model(given), ranks, run, inputs, outputs)
        other = None
        if ranks.broadcast_object(inputs.other_model if inputs else None) is not None:
            values = _evaluate_model(given, _other_model(given), ranks, run, inputs, outputs, is_other=True)
            other = Others(given.metric_names(), *values.values())
        elif inputs is not None:
            other = inputs.earlier
        with run.stage("write"), interruption.promising(lambda: _begins_again(given)):
            means = ranks.on_first(lambda: _summarize(given, outputs, inputs, by_dimension, other, run))
        return ranks.broadcast_object(
            ranks.on_first(lambda: EvaluationResult(means, run.publish(outputs), outputs.main))
        )


def _model(given: EvaluateArguments) -> ModelArguments:
    """The model's part of the arguments, at its full width: dimensions are cut later, so that one cache serves all."""
    values = {f.name: getattr(given, f.name) for f in fields(ModelArguments)}
    return ModelArguments(**values | {"dimension": None})


def _other_model(given: EvaluateArguments) -> ModelArguments:
    """The second model: the same settings, but its own tokenizer and pooling, and prompts unless they are given."""
    assert given.compare_with is not None
    return replace(_model(given), model_path=given.compare_with, tokenizer_path=None, pooling=None)


@dataclass
class _Inputs:
    """What rank 0 reads and checks before any model is loaded."""

    collection: Collection
    query_vectors: np.ndarray | None = None
    passage_vectors: np.ndarray | None = None
    earlier: Others | None = None
    earlier_encoder: dict | None = None
    other_model: ModelArguments | None = None
    rankings: GivenRankings | None = None

    @classmethod
    def read(cls, given: EvaluateArguments, outputs: Outputs) -> "_Inputs":
        collection = collections.read(given)
        _describe(collection, given)
        inputs = cls(collection)
        if given.write_trec:
            trec.check_ids(collection.query_ids, collection.passage_ids or ())
        if given.compare_with is not None:
            if comparison.is_file(given.compare_with):
                names = given.metric_names()
                inputs.earlier = comparison.read_earlier(given.compare_with, collection, names, collection.digest())
                inputs.earlier_encoder = comparison.encoder_of(given.compare_with)
            else:
                inputs.other_model = _other_model(given)
        inputs._read_vectors(given)
        if given.judges_rankings:
            inputs.rankings = GivenRankings(given, collection)
        largest = max(given.dimension) if given.dimension else None
        has_model = inputs.query_vectors is None and inputs.rankings is None
        for model in ([_model(given)] if has_model else []) + [inputs.other_model]:
            if model is not None:
                build_encoders(replace(model, dimension=largest))
        outputs.open_work(input_paths(given), given.embedding_cache)
        return inputs

    def _read_vectors(self, given: EvaluateArguments) -> None:
        if given.query_embeddings_path is None or given.passage_embeddings_path is None:
            return
        collection = self.collection
        queries = read_user_vectors(
            given.query_embeddings_path, collection.n_query_rows, "row of queries", given.normalizes_own_vectors
        )
        passages = read_user_vectors(
            given.passage_embeddings_path,
            collection.n_passage_rows,
            "passage in reading order, repeated ones too",
            given.normalizes_own_vectors,
        )
        if queries.shape[1] != passages.shape[1]:
            raise ValueError(
                f"{given.passage_embeddings_path}: vectors of {passages.shape[1]} dimensions; "
                f"expected {queries.shape[1]} as in {given.query_embeddings_path}"
            )
        if given.dimension and max(given.dimension) > queries.shape[1]:
            raise ValueError(f"dimension is {max(given.dimension)}; the vectors have only {queries.shape[1]}")
        self.query_vectors, self.passage_vectors = queries, passages


def _describe(collection: Collection, given: EvaluateArguments) -> None:
    """Say what was read, and which cut-offs the corpus is too small for."""
    texts = sum(sys.getsizeof(text) + _OVERHEAD for text in (*collection.queries, *collection.passages))
    logger.info(
        "%s: %s queries, %s passages; about %.0f MiB of texts in memory",
        given.dev_path, f"{len(collection.queries):,}", f"{collection.n_corpus:,}", texts / 2**20,
    )  # fmt: skip
    if given.corpus_path is None and given.neg_path is None and not beir.is_folder(given.dev_path):
        logger.info("all are the rows' own passages; neg_path or corpus_path adds others, among which values tell more")
    large = sorted({k for _, k in map(metrics.split_name, given.metric_names()) if k > collection.n_corpus})
    if large:
        logger.warning(
            "cut-offs larger than the corpus of %d passages: %s; every passage is within them",
            collection.n_corpus, ", ".join(map(str, large)),
        )  # fmt: skip


def _evaluate_rankings(
    given: EvaluateArguments, run: report.RunReport, inputs: _Inputs | None, outputs: Outputs
) -> dict[None, np.ndarray]:
    """Per-query values of what is judged instead of a model, on rank 0; writes the per-query and the TREC files."""
    assert inputs is not None and inputs.rankings is not None
    judge = _Judge(given, inputs.collection)
    n = len(inputs.collection.queries)
    with run.stage("search"), ExitStack() as stack, report.Progress("search", n, "queries") as progress:
        judge.writer = QueryWriter(given, inputs.collection, outputs, stack)
        for start in range(0, n, _RANKED):
            stop = min(start + _RANKED, n)
            judge(start, inputs.rankings.search(start, stop, judge.depth))
            progress.update(stop - start)
    return {None: judge.values}


def _begins_again(given: EvaluateArguments) -> str:
    kept = "" if given.query_embeddings_path else "encodes nothing again, but "
    return f"the same command {kept}searches from the first query on"


def _evaluate_model(
    given: EvaluateArguments,
    model: ModelArguments,
    ranks: Ranks,
    run: report.RunReport,
    inputs: _Inputs | None,
    outputs: Outputs,
    is_other: bool = False,
) -> dict[int, np.ndarray | None]:
    """Each dimension's per-query values on rank 0 (None elsewhere), largest dimension first.

    Writes the per-query file and the TREC files for the largest dimension, unless this is the second model.
    """
    queries, passages, normalized = _vectors(given, model, ranks, run, inputs, outputs, is_other)
    width = ranks.broadcast_object(queries.shape[1] if queries is not None else None)
    dimensions = sorted(given.dimension or [width], reverse=True)
    values: dict[int, np.ndarray | None] = {}
    for dim in dimensions[:1] if is_other else dimensions:
        with run.stage("search"), interruption.promising(lambda: _begins_again(given)), ExitStack() as stack:
            writer = None
            if inputs is not None and dim == dimensions[0] and not is_other:
                writer = QueryWriter(given, inputs.collection, outputs, stack)
            cut = ranks.on_first(lambda dim=dim: _cut(normalized, queries, passages, dim, outputs))
            values[dim] = _measure(given, ranks, inputs, *(cut or (None, None)), dim, writer)
    return values


def _cut(
    normalized: bool, queries: np.ndarray | None, passages: np.ndarray | None, dim: int, outputs: Outputs
) -> tuple[np.ndarray, np.ndarray]:
    assert queries is not None and passages is not None
    normalize = normalized and dim < queries.shape[1]
    return (
        derive(queries, outputs.scratch("cut-queries"), dim=dim, normalize=normalize),
        derive(passages, outputs.scratch("cut-passages"), dim=dim, normalize=normalize),
    )


def _vectors(
    given: EvaluateArguments,
    model: ModelArguments,
    ranks: Ranks,
    run: report.RunReport,
    inputs: _Inputs | None,
    outputs: Outputs,
    is_other: bool,
) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
    """Vectors of the queries and of the corpus on rank 0, None elsewhere; whether they are scaled to length 1."""
    run.counts.setdefault("encoded", 0)
    if given.query_embeddings_path is not None and not is_other:
        own = ranks.on_first(lambda: _user_vectors(given, inputs, outputs)) or (None, None)
        return *own, given.normalizes_own_vectors
    query_encoder, passage_encoder = ranks.all_agree(lambda: build_encoders(model))
    folder = Path(given.embedding_cache) if given.embedding_cache else outputs.work
    collection = inputs.collection if inputs is not None else None
    already = run.counts["encoded"], run.seconds.get("encode", 0.0)
    prompts = collection.prompts if collection else None
    prompted, texts = with_prompts(query_encoder, collection.queries if collection else None, prompts, ranks)
    with run.stage("encode"):
        queries, n, cut_queries = embed(prompted, texts, ranks, folder, "queries")
        passages, m, cut_passages = embed(
            passage_encoder, collection.corpus if collection else None, ranks, folder, "passages"
        )
    run.counts["encoded"] += n + m
    note_cut(run, "queries", cut_queries, is_other)
    note_cut(run, "passages", cut_passages, is_other)
    speed = (n + m) / max(run.seconds["encode"] - already[1], 1e-9)
    name = "other_encoder" if is_other else "encoder"
    run.results[name] = {
        "queries": description(query_encoder, prompts),
        "passages": passage_encoder.description(),
        "texts_per_second": round(speed, 2),
    }
    return queries, passages, passage_encoder.normalize


def _user_vectors(given: EvaluateArguments, inputs: _Inputs | None, outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """The user's vectors, one for each query and passage that is left after equal ones became one."""
    assert inputs is not None and inputs.query_vectors is not None and inputs.passage_vectors is not None
    collection, normalize = inputs.collection, given.normalizes_own_vectors
    return (
        derive(inputs.query_vectors, outputs.scratch("queries"), collection.query_rows, None, normalize),
        derive(inputs.passage_vectors, outputs.scratch("passages"), collection.passage_rows, None, normalize),
    )


def _measure(
    given: EvaluateArguments,
    ranks: Ranks,
    inputs: _Inputs | None,
    queries: np.ndarray | None,
    passages: np.ndarray | None,
    dim: int,
    writer: QueryWriter | None,
) -> np.ndarray | None:
    """Search and judge, block by block: float64 [queries, metrics] on rank 0, None elsewhere."""
    judge = _Judge(given, inputs.collection, writer) if inputs is not None else None
    sizes = (len(judge.values), judge.collection.n_corpus, judge.depth) if judge is not None else None
    n, n_corpus, depth = ranks.broadcast_object(sizes)
    _log_memory(n, n_corpus, dim, depth, len(given.metric_names()), ranks)
    index = ShardedIndex.of(ranks, passages, n_corpus, dim, engines.device())
    with report.Progress("search", n, "queries") as progress:
        for start in range(0, n, _block(depth)):
            size = min(_block(depth), n - start)
            found = index.search_all(queries[start : start + size] if queries is not None else None, size, depth)
            ranks.on_first(lambda start=start, found=found: judge(start, found))
            progress.update(size)
    return judge.values if judge is not None else None


class _Judge:
    """Judges rankings, a block of queries at a time, and writes them if it has a writer.

    Attributes:
        values: float64 [queries, metrics].
        depth: how many passages a ranking must have, so that enough are left without those to be ignored.
    """

    def __init__(self, given: EvaluateArguments, collection: Collection, writer: QueryWriter | None = None):
        self.collection, self.writer = collection, writer
        self._names = given.metric_names()
        self._deepest = max(given.top_passages, *(k for _, k in map(metrics.split_name, self._names)))
        most_ignored = max(map(len, collection.ignored.values()), default=0)
        self.depth = min(self._deepest + most_ignored, collection.n_corpus)
        self.values = np.empty((len(collection.queries), len(self._names)), np.float64)

    def __call__(self, start: int, found: Neighbors) -> None:
        """Of the queries from ``start`` on."""
        found = _without_ignored(found, self.collection, start, self._deepest)
        relevance = _relevance(self.collection, start, found.rows, self._deepest)
        part = slice(start, start + len(found.rows))
        self.values[part] = metrics.per_query(relevance, self._names)
        if self.writer is not None:
            self.writer.write(start, found, relevance, self.values[part], self._names)


def _block(depth: int) -> int:
    """How many queries are searched at a time."""
    return min(_QUERY_BLOCK, max(1, _BLOCK_NEIGHBORS // max(1, depth)))


def _log_memory(n: int, n_corpus: int, dim: int, depth: int, n_metrics: int, ranks: Ranks) -> None:
    """What the search will need, before it starts."""
    vectors, by_whom = (n_corpus + n) * dim * 4, ""
    if runtime.local_world_size() < ranks.size:  # on one machine, every rank maps them
        held = n_corpus * dim * 4 / ranks.size
        by_whom = f" by rank 0, {held / 2**20:.0f} MiB in memory on each of {ranks.size} ranks"
    # A screened block and its rescoring on each thread, a block's neighbours with their candidates, the values.
    working = runtime.cpu_threads() * (160 << 20) + _block(depth) * depth * 120 + n * n_metrics * 8
    logger.info(
        "search: %s queries x %s passages of %d dimensions, the best %d of each, in blocks: %.0f MiB of vectors "
        "mapped from disk%s, at most %.0f MiB of working memory",
        f"{n:,}", f"{n_corpus:,}", dim, depth, vectors / 2**20, by_whom, working / 2**20,
    )  # fmt: skip


def _without_ignored(found: Neighbors, collection: Collection, start: int, k: int) -> Neighbors:
    """The ``k`` best that are left without each query's ignored passages."""
    scores, rows = found
    for place in range(len(rows)):
        ignored = collection.ignored.get(start + place)
        if ignored is not None:
            last = np.isin(rows[place], ignored)
            order = np.argsort(last, kind="stable")
            scores[place] = np.where(last[order], -np.inf, scores[place, order])
            rows[place] = np.where(last[order], -1, rows[place, order])
    return Neighbors(scores[:, :k], rows[:, :k])


def _relevance(collection: Collection, start: int, rows: np.ndarray, deepest: int) -> Relevance:
    """Judge a block of rankings; ``rows`` int64 [b, width], for the queries from ``start`` on."""
    grades = collection.judgments.lookup(start, rows)
    n_relevant = collection.judgments.n_relevant[start : start + len(rows)]
    return Relevance(grades.astype(np.float64), collection.judgments.ideal(start, len(rows), deepest), n_relevant)


def _summarize(
    given: EvaluateArguments,
    outputs: Outputs,
    inputs: _Inputs | None,
    by_dimension: dict[int | None, np.ndarray | None],
    other: Others | None,
    run: report.RunReport,
) -> dict[str, float]:
    """Means, intervals and the comparison, for the report; the rejected rows. Returns the largest dimension's means."""
    assert inputs is not None
    names = given.metric_names()
    run.counts = {**_balanced(inputs.collection), **run.counts}
    summaries = {}
    for dim, values in by_dimension.items():
        assert values is not None
        low, high = intervals.metric_interval(values, given.confidence, given.resamples, given.seed)
        means = metrics.aggregate(values, names)
        ends = zip(names, low.tolist(), high.tolist(), strict=True)
        summaries[dim] = {name: {"value": means[name], "low": lower, "high": upper} for name, lower, upper in ends}
    largest = next(iter(by_dimension))
    if largest is not None:
        run.results["dimension"] = largest
    run.results["metrics"] = summaries[largest]
    if len(summaries) > 1:
        run.results["dimensions"] = {str(dim): summary for dim, summary in summaries.items()}
    if other is not None:
        values = by_dimension[largest]
        assert values is not None and given.compare_with is not None
        values = values[:, [names.index(name) for name in other.names]]
        compared = Comparison(given.compare_with, values, other.values)
        run.results["comparison"] = _compare(given, inputs, compared, other.names)
        only_here = [name for name in names if name not in other.names]
        run.results["comparison"]["not_compared"] = {"this": only_here, "other": other.only_there}
        others = run.results.get("other_encoder", inputs.earlier_encoder)
        apart = comparison.settings_apart(run.results.get("encoder"), others)
        run.results["comparison"]["settings_apart"] = apart
    if given.on_bad_row == "skip":
        write_rejected(outputs, inputs.collection.rejected)
    return {name: summaries[largest][name]["value"] for name in names}


def _balanced(collection: Collection) -> dict[str, int]:
    """The counts, once it is certain that every row is in one of them."""
    counts = {**collection.counts, "rejected": len(collection.rejected)}
    rest = ("query_rows_merged", "query_rows_rejected", "queries_not_judged")
    if counts["query_rows"] != counts["queries"] + sum(counts.get(name, 0) for name in rest):
        raise AssertionError(f"the queries do not add up: {counts}")
    if counts["passages_read"] != counts["passages"] + counts["passages_merged"]:
        raise AssertionError(f"the passages do not add up: {counts}")
    return counts


def _compare(given: EvaluateArguments, inputs: _Inputs, compared: Comparison, names: list[str]) -> dict:
    """The comparison as the report holds it; changes are listed by the deepest NDCG, else the first metric."""
    ndcg = [name for name in names if name.startswith("ndcg@")]
    by = max(ndcg, key=lambda name: metrics.split_name(name)[1], default=names[0])
    column = names.index(by)
    collection = inputs.collection

    def entry(row: int) -> dict:
        own, other = float(compared.values[row, column]), float(compared.others[row, column])
        return {"id": collection.query_ids[row], "query": collection.queries[row], "this": own, "other": other}

    won, lost = compared.changes(column, given.n_changes)
    difference = compared.values[:, column] - compared.others[:, column]
    return {
        "with": compared.name,
        "metrics": compared.tests(names, given.confidence, given.resamples, given.seed),
        "changes_by": by,
        "n_won": int((difference > 0).sum()),
        "n_lost": int((difference < 0).sum()),
        "n_equal": int((difference == 0).sum()),
        "won_most": [entry(row) for row in won.tolist()],
        "lost_most": [entry(row) for row in lost.tolist()],
    }
