"""The positives of removed rows, given to the row that was kept for them, with a teacher's scores."""

import itertools
from collections.abc import Iterable

from ..files.jsonl import RawLine, parse_object, passages_key, to_line


def gather(
    lines: Iterable[tuple[int, RawLine]], path: str, kept_for: dict[int, int]
) -> dict[int, dict[str, float | None]]:
    """For each kept row that gains any, the positives of the rows that were removed for it, and a teacher's scores.

    Args:
        lines: all rows of the file ``path``, by number.
        kept_for: for each removed row, the one that was kept for it.
    """
    gained: dict[int, dict[str, float | None]] = {}
    for row, raw in lines:
        if row in kept_for:
            record = parse_object(raw, path)
            passages = record.get(passages_key(record, "pos_passage"), [])
            scores = _scores(record, "pos_scores", len(passages)) or [None] * len(passages)
            own = gained.setdefault(kept_for[row], {})
            for passage, score in zip(passages, scores, strict=True):
                if own.get(passage) is None:
                    own[passage] = score
    return gained


def added_to(raw: RawLine, path: str, more: dict[str, float | None]) -> bytes:
    """The row with new positives, which are negatives no longer; the line as it was if none is new.

    A teacher's scores go with their passages. Where one is unknown, the list would no longer fit, and is left out.
    """
    row = parse_object(raw, path)
    key, negatives = passages_key(row, "pos_passage"), passages_key(row, "neg_passage")
    old = row.get(key, [])
    new = {passage: score for passage, score in more.items() if passage not in old}
    if not new:
        return raw.content + b"\n"
    row[key] = [*old, *new]
    scores = _scores(row, "pos_scores", len(old))
    if scores is not None and None not in new.values():
        row["pos_scores"] = [*scores, *new.values()]
    else:
        row.pop("pos_scores", None)
    if negatives in row:
        stays = [passage not in new for passage in row[negatives]]
        scores = _scores(row, "neg_scores", len(stays))
        row[negatives] = list(itertools.compress(row[negatives], stays))
        if scores is not None:
            row["neg_scores"] = list(itertools.compress(scores, stays))
    return to_line(row)


def _scores(row: dict, key: str, n: int) -> list | None:
    """A teacher's scores of n passages, if there are so many."""
    scores = row.get(key)
    return scores if isinstance(scores, list) and len(scores) == n else None
