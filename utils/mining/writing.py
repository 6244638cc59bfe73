"""What mining writes: the mined rows, the side files, the counts that must add up, and advice on short rows."""

import logging
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np

from ..arguments.scripts import MiningArguments
from ..files import report
from ..files.jsonl import to_line
from ..files.outputs import Outputs, write_rejected
from . import formats
from .formats import MinedRow
from .inputs import Inputs
from .problem import FURTHEST
from .result import SHORT, Places
from .rules import Screened
from .sampling import BACKFILLED, KEPT, Choice

logger = logging.getLogger(__name__)

# How much larger a window to advise where rows are left without negatives.
_LARGER = 8

SUFFIXES = (SHORT, ".rejected.jsonl", ".corpus.jsonl", ".queries.jsonl", ".report.json")
# How each test drops fewer candidates.
_LOOSER = {
    "relative_margin": "a smaller", "absolute_margin": "a smaller", "reranker_margin": "a smaller",
    "max_score": "a higher", "min_score": "a lower", "positive_similarity": "a higher",
    "negative_similarity": "a higher",
}  # fmt: skip
_QUANTILES = (5, 25, 50, 75, 95)


class WrittenScores(NamedTuple):
    """Scores of one kind: of each of ``Inputs.positives.values``, and of each of ``result.negatives.rows.values``."""

    kind: str
    positives: np.ndarray
    negatives: np.ndarray


def write(
    given: MiningArguments,
    outputs: Outputs,
    run: report.RunReport,
    inputs: Inputs,
    screened: Screened,
    result: Choice,
    own: WrittenScores,
    written: WrittenScores,
) -> Places:
    """The mined rows and the side files, and what the report says of them; returns where each row is.

    Args:
        own: the model's scores; ``written`` are those that output_scores writes.
    """
    dropped = result.negatives.rows.sizes() < given.negatives_needed
    shape = formats.writer(given.output_format, given.output_scores, given.answer_key, given.no_answer_text)
    ends, n_lines = np.zeros(len(dropped), np.int64), 0

    def put(stream: IO[bytes], wanted: np.ndarray, shape: Callable[[MinedRow], list[dict]]) -> None:
        nonlocal n_lines
        end = 0
        for row, mined in zip(np.flatnonzero(wanted), _mined_rows(inputs, written, result, wanted), strict=True):
            lines = list(map(to_line, shape(mined)))
            stream.writelines(lines)
            end += sum(map(len, lines))
            ends[row], n_lines = end, n_lines + len(lines)

    if given.short_rows == "drop" or dropped.any():
        with outputs.stage(SHORT) as stream:
            put(stream, dropped, lambda mined: [formats.as_list(mined)])
    n_lines = 0
    with outputs.stage() as stream:
        put(stream, ~dropped, shape)
    if given.on_bad_row == "skip":
        write_rejected(outputs, inputs.rejected)
    if given.write_corpus:
        _write_ids(outputs, ".corpus.jsonl", inputs.passage_ids, inputs.passages)
        _write_ids(outputs, ".queries.jsonl", inputs.query_ids, inputs.queries)
    run.counts = _counts(inputs, screened, result, dropped, n_lines) | run.counts
    _warn_of_short_rows(given, inputs, run.counts, screened, result)
    run.results["drops_by_reason"] = result.drops_by_reason
    found = result.negatives
    mined = (found.ranks >= 0) & ~np.repeat(dropped, found.rows.sizes())
    run.results["scores"] = _distributions(own, mined)
    if given.output_scores:
        run.results["output_scores"] = {"kind": written.kind, **_distributions(written, mined)}
    return Places(ends, dropped)


def _warn_of_short_rows(
    given: MiningArguments, inputs: Inputs, counts: dict[str, int], screened: Screened, result: Choice
) -> None:
    """One line on the rows without negatives, or on those that were set aside; and which test to look at."""
    set_aside = counts["dropped_short"] > 0
    n_rows = counts["dropped_short"] if set_aside else counts["without_negatives"]
    if n_rows == 0:
        return
    what, others, fewer = "no negative at all", "backfill or drop", ""
    if set_aside:
        if given.negatives_needed > 1:
            what, fewer = f"fewer than {given.negatives_needed} negatives", "fewer negatives a row, "
        what += f" and went to {given.output_data_path}.short.jsonl"
        others = "backfill or keep"
        if given.short_rows is None:
            what += f", as tools that read {given.output_format} cannot take them"
    tests = {name: n for name, n in result.drops_by_reason.items() if n and name in _LOOSER}
    worst = max(tests, key=tests.__getitem__, default=None)
    if worst is None:
        why, looser = "range_for_sampling holds no more passages that may be mined; ", ""
    else:
        why = f"{worst} dropped the most candidates, {tests[worst]:,}; "
        looser = f", {_LOOSER[worst]} {worst}"
    logger.warning(
        "%s%d of %d rows have %s: %s%s--range_for_sampling %d-%d%s%s, or short_rows %s",
        "warning: " if 2 * n_rows > counts["input"] else "", n_rows, counts["input"], what, why, fewer,
        given.window[0], _LARGER * (FURTHEST if given.goes_further else given.window[1]), looser,
        _advice_on_positives(given, inputs, screened, result), others,
    )  # fmt: skip


def _advice_on_positives(given: MiningArguments, inputs: Inputs, screened: Screened, result: Choice) -> str:
    """Names margin_positive if margins leave nothing to over a third of the rows, and some have several positives."""
    bare = (result.negatives.rows.sizes() == 0) & screened.by_margin[inputs.query_of_row]
    several = int((inputs.positives.sizes()[inputs.query_of_row[bare]] > 1).sum())
    if 3 * bare.sum() <= len(bare) or not several or given.margin_positive == "highest":
        return ""
    higher = "median or highest" if given.margin_positive == "lowest" else "highest"
    return f", margin_positive {higher} ({several} of them have several positives)"


def _write_ids(outputs: Outputs, suffix: str, ids: dict[str, int], texts: list[str]) -> None:
    """Texts in order, each under the first of its ids."""
    name_of: dict[int, str] = {}
    for name, number in ids.items():
        name_of.setdefault(number, name)
    with outputs.stage(suffix) as stream:
        for number, text in enumerate(texts):
            stream.write(to_line({"_id": name_of[number], "text": text}))


def _mined_rows(inputs: Inputs, scores: WrittenScores, result: Choice, wanted: np.ndarray) -> Iterator[MinedRow]:
    """The wanted rows with what was mined for them, in input order, from a second pass over the file."""
    groups = inputs.positives
    for i, record in enumerate(inputs.rows_again()):
        if not wanted[i]:
            continue
        query = inputs.query_of_row[i]
        own = [inputs.number_of[text] for text in record.pos_passage]
        # A query that many rows ask has many positives, of which a row names few.
        own_scores = scores.positives[groups.lims[query] + np.searchsorted(groups[query], own)]
        chosen = result.negatives[i]
        yield MinedRow(
            row=record.row,
            query=record.query,
            positives=list(record.pos_passage),
            negatives=[inputs.passages[negative.row] for negative in chosen],
            pos_scores=own_scores.tolist(),
            neg_scores=scores.negatives[result.negatives.rows.part(i)].tolist(),
            n_backfilled=sum(negative.rank == BACKFILLED for negative in chosen),
        )


def _counts(inputs: Inputs, screened: Screened, result: Choice, dropped: np.ndarray, n_lines: int) -> dict[str, int]:
    """What went where. Rows and candidates must add up."""
    n_rows = len(inputs.query_of_row)
    total = len(result.negatives.rows.values)
    mined = int((result.negatives.ranks >= 0).sum())
    counts = {
        "input": inputs.n_rows,
        "written": n_rows - int(dropped.sum()),
        "dropped_short": int(dropped.sum()),
        "rejected": inputs.n_rejected_rows,
        "short": len(result.short_queries),
        "without_negatives": int((result.negatives.rows.sizes() == 0).sum()),
        "output_lines": n_lines,
        "queries": len(inputs.queries),
        "passages": len(inputs.passages),
        "candidates": inputs.n_candidates,
        "negatives": total,
        "backfilled": int((result.negatives.ranks == BACKFILLED).sum()),
        "kept": int((result.negatives.ranks == KEPT).sum()),
        "in_window": screened.n_window,
        "not_needed": screened.n_window - mined - sum(result.drops_by_reason.values())
        + result.drops_by_reason["forbidden"],
    }  # fmt: skip
    if counts["input"] != counts["written"] + counts["dropped_short"] + counts["rejected"] or counts["not_needed"] < 0:
        raise AssertionError(f"the rows or the candidates do not add up: {counts}")
    return counts


def _distributions(scores: WrittenScores, mined: np.ndarray) -> dict:
    return {"positives": _distribution(scores.positives), "negatives": _distribution(scores.negatives[mined])}


def _distribution(values: np.ndarray) -> dict:
    if len(values) == 0:
        return {"n": 0}
    quantiles = np.percentile(values, _QUANTILES)
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        **{f"p{q}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "max": float(values.max()),
    }
