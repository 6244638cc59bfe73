"""The mining job: rows of queries and positives in, rows with hard negatives out, every drop counted."""

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..arguments.scripts import MiningArguments, input_paths
from ..encoding.cross_encoder import PairLogits, Reranker
from ..encoding.embed import build_encoders, description, embed, note_cut, with_prompts
from ..files import report
from ..files.outputs import Outputs
from ..files.store import derive, fingerprint
from ..ranks.group import Ranks
from ..search.faiss_index import check_factory
from ..search.scores import Neighbors
from . import margins, writing
from . import rules as negatives
from .candidates import CandidateSearch, Vectors
from .inputs import Inputs
from .margins import Background
from .problem import FURTHEST, Problem
from .result import MiningResult
from .rules import Criteria, Rules, Screened
from .sampling import Choice, choose
from .tiers import Rankings
from .writing import WrittenScores

logger = logging.getLogger(__name__)

# Where no window is given, queries with too few candidates left get windows so many times as large, to FURTHEST.
_FURTHER_BY = 4


def mine(given: MiningArguments) -> MiningResult:
    """Run the whole job; every rank calls it and gets the result.

    Rank 0 alone reads, decides and writes; the others take part in encoding and in the search.
    """
    ranks = Ranks()
    run = report.RunReport("mining_negative_samples", asdict(given))
    with Outputs(given.output_data_path, writing.SUFFIXES) as outputs:
        with run.stage("read"):
            inputs = ranks.start(lambda: _read(given, outputs))
        folder = Path(given.embedding_cache) if given.embedding_cache else outputs.work
        vectors = _encode(given, ranks, run, inputs, folder, outputs)
        with run.stage("search"):
            search = CandidateSearch(given, ranks, run, inputs, vectors, folder)
            lists = search.find(given.window[1])
        job = ranks.on_first(lambda: _screen(given, run, inputs, vectors, lists))
        if given.goes_further:
            _go_further(given, ranks, run, search, job)
        reranked = None
        if given.reranker_path:
            with run.stage("rerank"):
                reranked = _rerank(given, ranks, run, inputs, job, folder)
        result = ranks.on_first(lambda: _choose(run, job))
        scores = None
        if reranked is not None and given.output_scores:
            with run.stage("rerank"):
                scores = _teacher_scores(run, reranked, job, result)
        result = ranks.on_first(lambda: _write(outputs, run, inputs, job, result, scores))
        return ranks.broadcast_object(result)


def _read(given: MiningArguments, outputs: Outputs) -> Inputs:
    """Everything that can be refused is refused here, before any model is loaded."""
    inputs = Inputs.read(given)
    if given.reranker_path:
        Reranker(given.reranker_path, given.reranker_max_len)
    if inputs.query_vectors is not None:
        dim, normalized = given.dimension or inputs.query_vectors.shape[1], given.normalizes_own_vectors
    else:
        encoder, _ = build_encoders(given)
        dim, normalized = encoder.dim, encoder.normalize
    if given.score_baseline is not None and given.score_baseline >= 1 and normalized:
        raise ValueError(f"score_baseline is {given.score_baseline}; expected less than 1, a cosine")
    if given.index_factory:
        check_factory(dim, given.index_factory, given.index_parameters)
    outputs.open_work(input_paths(given), given.embedding_cache)
    wanted = given.negatives_a_row
    if given.window[1] - given.window[0] < wanted:
        logger.warning(
            "range_for_sampling %s holds fewer candidates than the %d negatives a row that are wanted",
            given.range_for_sampling, wanted,
        )  # fmt: skip
    elif inputs.n_candidates < given.window[1] and not given.goes_further:
        logger.info("range_for_sampling %s goes beyond the %d passages to mine from",
                    given.range_for_sampling, inputs.n_candidates)  # fmt: skip
    if inputs.n_candidates < wanted:
        logger.warning("%d passages to mine from, but %d negatives a row wanted", inputs.n_candidates, wanted)
    if inputs.n_unjudged:
        logger.info("%d queries of the folder have no relevant passage and are left out", inputs.n_unjudged)
    if inputs.n_unreachable:
        logger.warning(
            "warning: %s relevant passages are not in the corpus, and %s queries have no other and are left out",
            f"{inputs.n_unreachable:,}", f"{inputs.n_unreachable_queries:,}",
        )  # fmt: skip
    inputs.keys.log_prompts(None if inputs.query_vectors is None else "vectors are given")
    inputs.keys.log_unused_types()
    if given.keep_negatives:
        logger.info("%s rows have negatives of their own, which are kept", f"{inputs.n_with_negatives:,}")
        if inputs.n_kept_forbidden:
            logger.warning(
                "warning: %s negatives of the rows are positives of their query, or its own text, and are left out",
                f"{inputs.n_kept_forbidden:,}",
            )  # fmt: skip
    elif inputs.n_with_negatives:
        logger.warning(
            "%d rows already have negatives; the mined ones take their place (keep_negatives keeps them)",
            inputs.n_with_negatives,
        )
    return inputs


def _encode(
    given: MiningArguments, ranks: Ranks, run: report.RunReport, inputs: Inputs | None, folder: Path, outputs: Outputs
) -> Vectors:
    run.counts["encoded"] = 0
    if given.embeddings_path:
        own = ranks.on_first(lambda: _users_vectors(given, inputs, outputs))
        return own or Vectors(None, None, given.normalizes_own_vectors)
    query_encoder, passage_encoder = ranks.all_agree(lambda: build_encoders(given))
    prompted, texts = with_prompts(
        query_encoder, inputs.queries if inputs else None, inputs.prompts if inputs else None, ranks
    )
    with run.stage("encode"):
        queries, n_queries, cut_queries = embed(prompted, texts, ranks, folder, "queries")
        passages, n_passages, cut_passages = embed(
            passage_encoder, inputs.passages if inputs else None, ranks, folder, "passages"
        )
    run.counts["encoded"] = n_queries + n_passages
    note_cut(run, "queries", cut_queries)
    note_cut(run, "passages", cut_passages)
    if inputs is None:
        return Vectors(queries, passages, passage_encoder.normalize)
    about = {"query": description(query_encoder, inputs.prompts), "passage": passage_encoder.description()}
    run.results["encoder"] = about
    run.results["texts_per_second"] = round(run.counts["encoded"] / max(run.seconds["encode"], 1e-9), 2)
    keys = (
        fingerprint(prompted.description(), texts),
        fingerprint(passage_encoder.description(), inputs.passages),
    )
    return Vectors(queries, passages, passage_encoder.normalize, keys)


def _users_vectors(given: MiningArguments, inputs: Inputs | None, outputs: Outputs) -> Vectors:
    assert inputs is not None and inputs.query_vectors is not None and inputs.passage_vectors is not None
    arrays = [
        derive(vectors, outputs.scratch(name), rows, given.dimension, given.normalizes_own_vectors)
        for name, vectors, rows in (
            ("queries", inputs.query_vectors, inputs.query_rows), ("passages", inputs.passage_vectors, None)
        )
    ]  # fmt: skip
    keys = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
    return Vectors(arrays[0], arrays[1], given.normalizes_own_vectors, (keys[0], keys[1]))


@dataclass
class _Job:
    """On rank 0: what is being decided, between its steps."""

    given: MiningArguments
    criteria: Criteria
    rankings: Rankings
    screened: Screened


def _screen(
    given: MiningArguments,
    run: report.RunReport,
    inputs: Inputs | None,
    vectors: Vectors,
    lists: list[tuple[np.ndarray, Neighbors]] | None,
) -> _Job:
    assert inputs is not None and vectors.queries is not None and vectors.passages is not None
    assert lists is not None
    rankings = Rankings(len(inputs.queries), lists)
    problem = Problem(
        inputs.query_of_row, vectors.queries, vectors.passages, inputs.positives, inputs.forbidden,
        inputs.n_candidates, vectors.normalized, inputs.kept, inputs.repeats,
    )  # fmt: skip
    with run.stage("choose"), report.Progress("screen", len(inputs.query_of_row), "rows") as progress:
        criteria = _criteria(given, run, problem, rankings)
        screened = negatives.screen(criteria, rankings, progress.update)
    return _Job(given, criteria, rankings, screened)


def _go_further(
    given: MiningArguments, ranks: Ranks, run: report.RunReport, search: CandidateSearch, job: _Job | None
) -> None:
    """Look at further candidates of the queries that have too few left, until they have enough."""
    usual = stop = given.window[1]
    n_further: dict[str, int] = {}
    while stop < FURTHEST:
        before, stop = stop, min(_FURTHER_BY * stop, FURTHEST)
        asked = None
        if job is not None and before < job.criteria.problem.n_candidates:
            asked = np.flatnonzero((job.screened.left.rows.sizes() < given.negatives_a_row) & (job.screened.times > 0))
        n_asked = ranks.broadcast_object(len(asked) if asked is not None else 0)
        if n_asked == 0:
            break
        n_further[f"to {stop}"] = n_asked
        logger.info("%s queries have fewer than %d candidates left: looking at their nearest %d",
                    f"{n_asked:,}", given.negatives_a_row, stop)  # fmt: skip
        with run.stage("search"):
            lists = search.find(stop, asked)
        with run.stage("choose"):
            ranks.on_first(partial(_screen_again, job, lists, asked, stop, usual))
    run.results["queries_searched_further"] = n_further


def _screen_again(
    job: _Job, lists: list[tuple[np.ndarray, Neighbors]], asked: np.ndarray, stop: int, usual: int
) -> None:
    job.rankings = job.rankings.further(lists, stop, usual)
    found = negatives.screen(job.criteria, job.rankings, asked=asked)
    job.screened = job.screened.replaced(asked, found)


def _rerank(
    given: MiningArguments,
    ranks: Ranks,
    run: report.RunReport,
    inputs: Inputs | None,
    job: _Job | None,
    folder: Path,
) -> PairLogits:
    """Let the cross-encoder score what is left and the positives, and drop what it finds too near."""
    reranker = ranks.all_agree(lambda: Reranker(given.reranker_path, given.reranker_max_len))
    texts = (inputs.queries, inputs.passages) if inputs is not None else None
    known = PairLogits(reranker, ranks, folder, texts)
    left = job.screened.left.rows if job is not None else None
    logits = known.of(
        *_pairs(job, left.owners(), left.values) if job is not None and left is not None else (None, None)
    )
    run.counts["reranked"] = known.n_scored
    note_cut(run, "pairs", known.cut)
    if job is not None and left is not None and logits is not None:
        run.results["reranker"] = {"digest": reranker.model.digest, "margin": given.reranker_margin}
        n_left = len(left.values)
        job.screened = negatives.apply_reranker(
            job.criteria, job.screened, logits[:n_left], logits[n_left:], given.reranker_margin
        )
    return known


def _pairs(job: _Job, queries: np.ndarray, passages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """These pairs, and behind them each query with each of its positives."""
    groups = job.criteria.problem.positives
    return np.concatenate([queries, groups.owners()]), np.concatenate([passages, groups.values])


def _teacher_scores(
    run: report.RunReport, known: PairLogits, job: _Job | None, result: Choice | None
) -> WrittenScores | None:
    """The cross-encoder's logits of all that is written; backfilled negatives are scored only now."""
    pairs: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if job is not None and result is not None:
        mined = result.negatives.rows
        pairs = _pairs(job, job.criteria.problem.query_of_row[mined.owners()], mined.values)
    logits = known.of(*pairs)
    run.counts["reranked"] = known.n_scored
    note_cut(run, "pairs", known.cut)
    if logits is None or result is None:
        return None
    logger.info("pos_scores and neg_scores are the cross-encoder's logits")
    n = len(result.negatives.rows.values)
    return WrittenScores("logits of the cross-encoder", logits[n:], logits[:n])


def _choose(run: report.RunReport, job: _Job | None) -> Choice:
    assert job is not None
    n_rows = len(job.criteria.problem.query_of_row)
    with run.stage("choose"), report.Progress("choose", n_rows, "rows") as progress:
        return choose(job.criteria, job.screened, progress.update)


def _write(
    outputs: Outputs,
    run: report.RunReport,
    inputs: Inputs | None,
    job: _Job | None,
    result: Choice | None,
    scores: WrittenScores | None,
) -> MiningResult:
    assert inputs is not None and job is not None and result is not None
    own = WrittenScores("scores of the model", job.criteria.positives, result.negatives.scores)
    with run.stage("write"):
        places = writing.write(job.given, outputs, run, inputs, job.screened, result, own, scores or own)
    return MiningResult(
        result.negatives, result.short_queries, result.drops_by_reason, run.publish(outputs), outputs.main, places
    )


def _criteria(given: MiningArguments, run: report.RunReport, problem: Problem, rankings: Rankings) -> Criteria:
    positives = problem.positive_scores()
    background, run.results["background"] = margins.measure_background(problem, positives)
    if given.score_baseline is not None:
        background = Background(given.score_baseline, given.score_baseline, background.spread)
    rules = Rules(
        window=given.window,
        parts=tuple(given.parts),
        absolute_margin=given.absolute_margin,
        margin_positive=given.margin_positive,
        max_score=given.max_score,
        min_score=given.min_score,
        positive_similarity=given.positive_similarity,
        negative_similarity=given.negative_similarity,
        temperature=given.temperature,
        easy_from=given.easy_from,
        seed=given.seed,
        backfill=given.short_rows == "backfill",
    )
    criteria, margin = Criteria(problem, positives, rules, background), given.relative_margin
    if margin == "auto":
        depth = rules.window[1]
        margin, counted = margins.measure_margin(problem, rankings, criteria.reference, depth, background)
        run.results["relative_margin"] = {"measured": margin, "counted": counted}
        if margin == margins.WIDEST_MARGIN and rankings.n_queries >= margins.FEWEST_QUERIES:
            logger.info(
                "relative_margin: %g, the widest that is taken: even so far below the positives, unlabelled answers may"
                " be as many as other passages; more positives a query, or a reranker, would allow less", margin,
            )  # fmt: skip
    return replace(criteria, rules=replace(rules, relative_margin=margin))
