"""The cleaning job: rows in, near-duplicates out, every row accounted for."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..arguments.scripts import CleanArguments, input_paths
from ..encoding import engines
from ..encoding.embed import build_encoders, embed, note_cut
from ..files import report
from ..files.jsonl import RawLine, fold, parse_object, to_line
from ..files.outputs import Outputs, write_rejected
from ..files.store import derive, read_user_vectors
from ..process import interruption
from ..ranks.group import Ranks
from ..search.exact import Neighbors, ShardedIndex
from . import answers, greedy, holdout, merged_positives, thresholds
from . import examples as cleaning_examples
from .greedy import DedupResult
from .result import HOLDOUT, REASONS, REMOVED, CleaningResult, Removed
from .rows import QueryRows

logger = logging.getLogger(__name__)


_SUFFIXES = (HOLDOUT, REMOVED, ".rejected.jsonl", ".report.json")
# Of the different answers, those that may be lost at the default threshold.
_MOST_LOST = 0.02


def clean(given: CleanArguments) -> CleaningResult:
    """Run the whole job; every rank calls it and gets the result.

    Rank 0 alone reads and writes; the others take part in encoding and in the search.
    """
    ranks = Ranks()
    run = report.RunReport("clean_query", asdict(given))
    with Outputs(given.output_data_path, _SUFFIXES) as outputs:
        with run.stage("read"):
            inputs = ranks.start(lambda: _Inputs.read(given, outputs))
        vectors, reference = _vectors(given, ranks, run, inputs, outputs)
        kept = "" if given.embeddings_path else "encodes nothing again, but "
        with (
            run.stage("dedup"),
            interruption.promising(lambda: f"the same command {kept}compares from the first row on"),
        ):
            decision = _decide(given, ranks, run, inputs, vectors, reference)
            if given.holdout is not None:
                decision.split = _split(given, ranks, inputs, decision, vectors, outputs)
        del vectors, reference  # memory maps of files that are removed next
        with run.stage("write"):
            cleaned = ranks.on_first(lambda: _write(given, outputs, inputs, decision, run))
        return ranks.broadcast_object(ranks.on_first(lambda: replace(cleaned, report=run.publish(outputs))))


@dataclass
class _Inputs:
    """What rank 0 reads and checks before any model is loaded."""

    queries: QueryRows
    reference: QueryRows | None
    vectors: np.ndarray | None

    @classmethod
    def read(cls, given: CleanArguments, outputs: Outputs) -> "_Inputs":
        queries = QueryRows.read(given.input_data_path, given.on_bad_row, given.holdout is not None)
        if 0 < queries.n_bare < len(queries.texts):
            logger.warning("warning: %s: %d of %d rows have no positive, and mining and training will refuse those",
                           given.input_data_path, queries.n_bare, len(queries.texts))  # fmt: skip
        if given.holdout is not None:
            holdout.asked(given.holdout, len(queries.unique))
        queries.keys.log_prompts("queries are compared without it")
        queries.keys.log_unused_types()
        reference, vectors = None, None
        if given.reference_data_path:
            reference = QueryRows.read(given.reference_data_path, given.on_bad_row)
        if given.embeddings_path:
            vectors = read_user_vectors(given.embeddings_path, queries.source.n_rows, "row of input", normalize=True)
        else:
            build_encoders(given)
        outputs.open_work(input_paths(given), given.embedding_cache)
        return cls(queries, reference, vectors)


def _vectors(
    given: CleanArguments, ranks: Ranks, run: report.RunReport, inputs: _Inputs | None, outputs: Outputs
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Vectors of the unique queries, and of the reference file's, on rank 0."""
    run.counts["encoded"] = 0
    if given.embeddings_path:

        def chosen() -> np.ndarray:
            assert inputs is not None and inputs.vectors is not None
            rows = inputs.queries.file_rows()[inputs.queries.unique]
            return derive(inputs.vectors, outputs.scratch("vectors"), rows, given.dimension)

        return ranks.on_first(chosen), None
    encoder, _ = ranks.all_agree(lambda: build_encoders(given))
    folder = Path(given.embedding_cache) if given.embedding_cache else outputs.work

    def encode(queries: QueryRows | None, what: str) -> np.ndarray | None:
        vectors, encoded, cut = embed(encoder, queries.unique_texts() if queries else None, ranks, folder, what)
        note_cut(run, what, cut)
        run.counts["encoded"] += encoded
        if encoder.normalize:
            return vectors
        # The rule compares cosines in any case.
        return ranks.on_first(lambda: derive(vectors, outputs.scratch(what)))

    with run.stage("encode"):
        vectors = encode(inputs.queries if inputs else None, "queries")
        reference = None
        if given.reference_data_path:
            reference = encode(inputs.reference if inputs else None, "reference queries")
    if inputs is not None:
        run.results["encoder"] = encoder.description()
        run.results["texts_per_second"] = round(run.counts["encoded"] / max(run.seconds["encode"], 1e-9), 2)
    return vectors, reference


@dataclass
class _Decision:
    """What is removed, on every rank; ``examples`` on rank 0, and ``split`` if rows are to be set aside.

    usual: the threshold for queries whose answers differ, if it is another one.
    """

    result: DedupResult
    nearest: Neighbors | None
    usual: float | None = None
    examples: list[dict] = field(default_factory=list)
    split: holdout.Split | None = None


def _decide(
    given: CleanArguments,
    ranks: Ranks,
    run: report.RunReport,
    inputs: _Inputs | None,
    vectors: np.ndarray | None,
    reference: np.ndarray | None,
) -> _Decision:
    """The greedy rule over the unique queries that are no leaks, and each query's nearest reference query."""
    device = engines.device()
    n, dim = ranks.broadcast_object(vectors.shape if vectors is not None else None)
    logger.info("dedup: %s unique queries, at most %.1f MiB of vectors in memory", f"{n:,}", n * dim * 4 / 2**20)
    unrelated = thresholds.Unrelated.of(vectors) if vectors is not None else None
    threshold = ranks.broadcast_object(_threshold(given, unrelated, run) if unrelated is not None else None)
    nearest = None
    if given.reference_data_path:
        nearest = _nearest_reference(ranks, inputs, vectors, reference, n, device)

    def decide(threshold: float, usual: float | None = None, groups: np.ndarray | None = None) -> DedupResult:
        rows = np.arange(n) if nearest is None else np.flatnonzero(nearest.scores[:, 0] < threshold)
        agreeing = None
        if usual is not None:
            agreeing = partial(answers.Agreeing, vectors, groups, threshold, usual)
        with report.Progress("dedup", len(rows), "rows") as progress:
            result = greedy.remove_near_duplicates(
                vectors, rows, dim, usual or threshold, ranks, device, progress.update, agreeing
            )
        return replace(result, threshold=threshold)

    if given.target_size is not None:
        decision = _Decision(thresholds.find(decide, given.target_size), nearest)
        if unrelated is not None:
            thresholds.warn_if_low(decision.result.threshold, unrelated, "give a higher target_size")
    elif not given.protects_answers:
        decision = _Decision(decide(threshold), nearest)
    else:
        decision = _protecting(given, ranks, inputs, decide, threshold, nearest)
    if inputs is not None:
        decision.examples = cleaning_examples.kept(
            vectors, decision.result, inputs.queries.unique_texts(), inputs.queries.answer_groups()
        )
    return decision


def _protecting(
    given: CleanArguments,
    ranks: Ranks,
    inputs: _Inputs | None,
    decide: Callable[..., DedupResult],
    threshold: float,
    nearest: Neighbors | None,
) -> _Decision:
    """With a higher threshold for queries whose answers differ; the highest if too many answers were lost else."""
    groups = inputs.queries.answer_groups() if inputs is not None else None
    if not ranks.broadcast_object(groups is not None and bool(groups.any())):
        return _Decision(decide(threshold), nearest)  # all have the same, or none
    for usual in (thresholds.of_other_answers(threshold), thresholds.SAME):
        result = decide(threshold, usual, groups)
        share = 0.0
        if inputs is not None:
            share = _losses(given, inputs, _account(inputs, result, nearest)).share()
        if ranks.broadcast_object(share) <= _MOST_LOST:
            break
    return _Decision(result, nearest, usual)


def _split(
    given: CleanArguments,
    ranks: Ranks,
    inputs: _Inputs | None,
    decision: _Decision,
    vectors: np.ndarray | None,
    outputs: Outputs,
) -> holdout.Split | None:
    """Which of the kept rows are set aside; on rank 0."""
    result = decision.result

    def kept() -> holdout.Kept:
        assert inputs is not None and vectors is not None
        queries = inputs.queries
        kept_for, gives = _givers(given, inputs, _account(inputs, result, decision.nearest))
        final = answers.joined(queries.folded_answers, np.where(gives, kept_for, np.arange(len(gives))))
        chosen = derive(vectors, outputs.scratch("kept"), result.kept_rows, normalize=False)
        return holdout.Kept(chosen, final.take(queries.unique[result.kept_rows]))

    is_apart = decision.usual is None  # then no two kept queries reach the threshold
    drawing = holdout.Drawing(given.holdout, given.seed, result.threshold, is_apart)
    return holdout.split(ranks, ranks.on_first(kept), drawing, outputs.scratch("held"), engines.device())


def _threshold(given: CleanArguments, unrelated: thresholds.Unrelated, run: report.RunReport) -> float | None:
    """The threshold that is given, or else one that suits the model. None where ``target_size`` finds it."""
    if unrelated.n_queries > 1:
        run.results["unrelated_queries"] = unrelated.described()
    if given.target_size is not None:
        if given.similarity_threshold is not None:
            logger.info("similarity_threshold is not used: target_size finds its own")
        return None
    if given.similarity_threshold is not None:
        thresholds.warn_if_low(given.similarity_threshold, unrelated, f"try {unrelated.above:g}")
        return thresholds.reachable(given.similarity_threshold)
    return thresholds.measured(unrelated)


def _nearest_reference(
    ranks: Ranks,
    inputs: _Inputs | None,
    vectors: np.ndarray | None,
    reference: np.ndarray | None,
    n: int,
    device: str,
) -> Neighbors:
    """Each unique query's nearest reference query, on every rank; equal texts score infinity."""
    n_reference, dim = ranks.broadcast_object(reference.shape if reference is not None else None)
    index = ShardedIndex.of(ranks, reference, n_reference, dim, device)
    nearest = index.search_all(vectors, n, k=1)
    if inputs is not None and inputs.reference is not None:
        position = {int(row): i for i, row in enumerate(inputs.reference.unique)}
        for i, text in enumerate(inputs.queries.unique_texts()):
            equal = inputs.reference.folded.get(fold(text))
            if equal is not None:
                nearest.scores[i, 0], nearest.rows[i, 0] = np.inf, position[equal]
    return ranks.broadcast_object(nearest)


def _account(inputs: _Inputs, result: DedupResult, nearest: Neighbors | None) -> list[Removed]:
    """Every removed row with its reason, ascending."""
    queries, unique = inputs.queries, inputs.queries.unique
    by_row: dict[int, Removed] = {}
    for duplicate in result.duplicates:
        row, kept = int(unique[duplicate.row]), int(unique[duplicate.kept_row])
        by_row[row] = Removed(row, kept, duplicate.score, "similar")
    if nearest is not None and inputs.reference is not None:
        reference_rows = inputs.reference.unique
        for i in np.flatnonzero(nearest.scores[:, 0] >= result.threshold):
            row, score = int(unique[i]), min(float(nearest.scores[i, 0]), 1.0)  # infinity: equal texts
            by_row[row] = Removed(row, int(reference_rows[nearest.rows[i, 0]]), score, "leakage")
    removed = []
    for row, first in enumerate(queries.first.tolist()):
        if first in by_row:  # a copy goes where the first of its text goes
            removed.append(replace(by_row[first], row=row))
        elif row != first:
            same = queries.texts[row] == queries.texts[first]
            removed.append(Removed(row, first, 1.0 if same else math.nan, "exact"))
    return removed


def _write(
    given: CleanArguments,
    outputs: Outputs,
    inputs: _Inputs | None,
    decision: _Decision,
    run: report.RunReport,
) -> CleaningResult:
    """Account for every row and write the outputs; the result lacks its report."""
    assert inputs is not None
    queries, result = inputs.queries, decision.result
    removed = _account(inputs, result, decision.nearest)
    lost = _losses(given, inputs, removed)
    gone = np.zeros(len(queries.texts), bool)
    gone[[r.row for r in removed]] = True
    held = np.zeros(0, np.int64)
    if decision.split is not None:
        held = queries.unique[result.kept_rows[decision.split.held]]
        run.results["holdout"] = decision.split.described()
    kept = np.setdiff1d(np.flatnonzero(~gone), held)
    counts = {
        "input": queries.source.n_rows,
        "kept": len(kept),
        "held_out": len(held),
        **{f"removed_{reason}": sum(r.reason == reason for r in removed) for reason in REASONS},
        "rejected": len(queries.source.rejected),
    }
    if counts["input"] != sum(counts.values()) - counts["input"]:
        raise AssertionError(f"the rows do not add up: {counts}")
    run.counts = {**counts, **run.counts}
    run.results["similarity_threshold"] = result.threshold
    if decision.usual is not None:
        run.results["threshold_of_other_answers"] = decision.usual
    run.results["answers"] = {
        "different": lost.n_answers, "in_no_kept_row": lost.n_lost,
        "rows_removed_for_one_without_their_answer": int(lost.rows.sum()),
    }  # fmt: skip
    _write_rows(given, outputs, inputs, {r.row: r for r in removed}, lost, held)
    run.results["closest_removals"] = cleaning_examples.removed(queries.texts, queries.first, removed)
    run.results["nearest_kept"] = decision.examples
    if given.on_bad_row == "skip":
        rejected = queries.source.rejected + (inputs.reference.source.rejected if inputs.reference else [])
        write_rejected(outputs, rejected)
    return CleaningResult(kept, removed, queries.source.rejected, result.threshold, {}, held, outputs.main)


def _losses(given: CleanArguments, inputs: _Inputs, removed: list[Removed]) -> answers.Losses:
    """What the kept rows no longer say."""
    return answers.losses(inputs.queries.answers, *_givers(given, inputs, removed))


def _givers(given: CleanArguments, inputs: _Inputs, removed: list[Removed]) -> tuple[np.ndarray, np.ndarray]:
    """The row that was kept for each one, and whether that gets its answers: as ``answers.losses`` takes them.

    A leak is kept in the reference file, whose answers are not read.
    """
    n = len(inputs.queries.texts)
    kept_for, gives = np.arange(n), np.zeros(n, bool)
    for r in removed:
        kept_for[r.row] = -1 if r.reason == "leakage" else r.kept_row
        gives[r.row] = r.reason in given.merged_reasons
    return kept_for, gives


def _write_rows(
    given: CleanArguments,
    outputs: Outputs,
    inputs: _Inputs,
    removed: dict[int, Removed],
    lost: answers.Losses,
    held: np.ndarray,
) -> None:
    """The kept rows byte for byte, ``held`` of them apart, and the removed ones with their explanation."""
    queries = inputs.queries
    gained = {}
    kept_for = {row: r.kept_row for row, r in removed.items() if r.reason in given.merged_reasons}
    if kept_for:
        gained = merged_positives.gather(_good_lines(queries), queries.source.path, kept_for)
    set_aside = {*held.tolist()}
    with ExitStack() as open_files:
        kept_stream, removed_stream = map(open_files.enter_context, (outputs.stage(), outputs.stage(REMOVED)))
        held_stream = open_files.enter_context(outputs.stage(HOLDOUT)) if given.holdout is not None else None
        for row, raw in _good_lines(queries):
            reason = removed.get(row)
            if reason is None:
                content = raw.content + b"\n"
                if row in gained:
                    content = merged_positives.added_to(raw, queries.source.path, gained[row])
                (held_stream if row in set_aside else kept_stream).write(content)
                continue
            where, prefix = (inputs.reference, "reference") if reason.reason == "leakage" else (queries, "kept")
            assert where is not None
            entry = {
                "line": raw.number,
                "row": parse_object(raw, queries.source.path),
                f"{prefix}_line": int(where.lines[reason.kept_row]),
                f"{prefix}_query": where.texts[reason.kept_row],
                "cosine": None if math.isnan(reason.score) else reason.score,
                "reason": reason.reason,
                "answer_lost": bool(lost.rows[row]),
            }
            removed_stream.write(to_line(entry))


def _good_lines(queries: QueryRows) -> Iterator[tuple[int, RawLine]]:
    """The good rows' numbers and lines, from a second pass over the file."""
    bad = {error.line for error in queries.source.rejected}
    return enumerate(raw for raw in queries.source.raw_lines() if raw.number not in bad)
