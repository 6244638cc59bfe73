"""Candidates from other retrievers than the model: a run file, BM25, and several lists fused into one.

A list of candidates is int64 [queries, depth]: passage rows, best first, -1 where there are no more.
"""

import contextlib
import logging
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from utils import own_files, runtime
from utils.records import RecordError, read_lines, set_aside

logger = logging.getLogger(__name__)

# Reciprocal rank fusion's constant (Cormack, Clarke and Buettcher, SIGIR 2009).
_RRF_K = 60
_WORD = re.compile(r"\w+")
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def read_run(
    path: str,
    queries: dict[str, int],
    passages: dict[str, int],
    n_candidates: int,
    rejected: list[RecordError] | None = None,
    passes_unknown_queries: bool = False,
    older: tuple[dict[str, int], dict[str, int]] = ({}, {}),
) -> list[list[int]]:
    """The passages that a TREC run lists for each query, best score first, equal scores in file order.

    Args:
        queries, passages: rows by their ids.
        n_candidates: passages from this row on are known, but not among those that may be found, and are left out.
        rejected: collects bad lines, if given.
        passes_unknown_queries: lines of other queries are passed over, as trec_eval does.
        older: what else queries and passages may be called, which a log line tells.

    Raises:
        RecordError: a line that is not ``query Q0 passage rank score tag``, or an id that is unknown.
    """
    found: dict[str, dict[int, float]] = {}
    n_lines = n_left_out = n_older = 0
    for raw in read_lines(path):
        n_lines += 1
        try:
            name, text, score = _run_line(raw.content, path, raw.number)
            passage = _known(text, passages, older[1], path, raw.number)
            n_older += (name not in queries and name in older[0]) or text not in passages
            if name not in queries and name not in older[0]:
                if passes_unknown_queries:
                    continue
                example = next(iter(queries))
                reason = f"unknown query id {name!r:.80}; expected one such as {example!r}"
                raise RecordError(path, raw.number, reason)
            ranked = found.setdefault(name, {})
            if passage in ranked:
                raise RecordError(path, raw.number, f"passage {text!r:.80} is named twice for query {name!r:.80}")
        except RecordError as error:
            set_aside(error, rejected)
            continue
        ranked[passage] = score
        n_left_out += passage >= n_candidates
    if n_older:
        logger.warning(
            "warning: %s: %d of %d lines name queries or passages by their numbers from 0, as write_corpus once did;"
            " now they are q and a line, d and a number from 1", path, n_older, n_lines,
        )  # fmt: skip
    if n_left_out:
        logger.info("%s: %d of %d lines name passages that are not searched; left out", path, n_left_out, n_lines)
    if n_lines == 0:
        raise ValueError(f"{path}: the file is empty; expected lines of query id, Q0, passage id, rank, score, tag")
    merged: list[dict[int, float]] = [{} for _ in range(max(queries.values()) + 1)]
    for name, scores in found.items():  # one query may have several ids
        own = merged[queries[name] if name in queries else older[0][name]]
        for passage, score in scores.items():
            if passage < n_candidates:
                own[passage] = max(score, own.get(passage, score))
    return [sorted(scores, key=lambda passage: -scores[passage]) for scores in merged]


def _run_line(content: bytes, path: str, line: int) -> tuple[str, str, float]:
    """The query's id, the passage's, and the score."""
    try:
        columns = content.decode().split()
    except UnicodeDecodeError:
        raise RecordError(path, line, "the line is not UTF-8; expected UTF-8 text") from None
    if len(columns) != 6:
        spaced = " ".join(columns[2:-3])
        hint = f"; {spaced!r:.80} cannot be a passage id, as it holds white space" if len(columns) > 6 else ""
        reason = f"{len(columns)} columns; expected 6: query id, Q0, passage id, rank, score, tag{hint}"
        raise RecordError(path, line, reason)
    query, _, passage, _, score, _ = columns
    try:
        value = float(score)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise RecordError(path, line, f"the score is {score!r:.40}; expected a number")
    return query, passage, value


def _known(name: str, passages: dict[str, int], older: dict[str, int], path: str, line: int) -> int:
    """A passage's row."""
    if name not in passages and name not in older:
        example = next(iter(passages))
        raise RecordError(path, line, f"unknown passage id {name!r:.80}; expected one such as {example!r}")
    return passages[name] if name in passages else older[name]


def padded(lists: Sequence[Sequence[int]], depth: int) -> np.ndarray:
    """Lists of any length as one array of candidates."""
    rows = np.full((len(lists), depth), -1, np.int64)
    for row, values in zip(rows, lists, strict=True):
        row[: len(values)] = values[:depth]
    return rows


class Bm25:
    """BM25 over the words of passages."""

    def __init__(self, passages: Sequence[str]):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.ERROR)
        self._index = bm25s.BM25()
        self._vocabulary: dict[str, int] = {}
        number = self._vocabulary.setdefault
        ids = [[number(word, len(self._vocabulary)) for word in words(text)] for text in passages]
        if self._vocabulary:
            self._index.index(bm25s.tokenization.Tokenized(ids=ids, vocab=self._vocabulary), show_progress=False)

    def search(
        self, queries: Sequence[str], depth: int, progress: Callable[[int], None] = lambda count: None
    ) -> np.ndarray:
        """The best candidates, ties to the lower row; passages that share no word with the query are none."""
        rows = np.full((len(queries), depth), -1, np.int64)
        for number, query in enumerate(queries):
            known = sorted({self._vocabulary[word] for word in words(query) if word in self._vocabulary})
            if known:
                best = _best(self._index.get_scores_from_ids(known), depth)
                rows[number, : len(best)] = best
            progress(1)
        return rows


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """The rows of the ``depth`` highest positive scores, best first, ties to the lower row."""
    cut = 0.0
    if depth < len(scores):
        cut = max(cut, float(np.partition(scores, len(scores) - depth)[len(scores) - depth]))
    rows = np.flatnonzero((scores >= cut) & (scores > 0))
    return rows[np.lexsort((rows, -scores[rows]))][:depth]


def words(text: str) -> list[str]:
    """Lower-cased words after NFKC; Chinese is split into words by jieba."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    if not any(_CHINESE.search(word) for word in found):
        return found
    cut = _jieba()
    return [part for word in found for part in (cut(word) if _CHINESE.search(word) else [word])]


def _jieba() -> Callable[[str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        import jieba

    jieba.setLogLevel(logging.ERROR)
    if not jieba.dt.initialized:
        with _private_folder() as jieba.dt.tmp_dir:
            jieba.initialize()
    return jieba.lcut


@contextlib.contextmanager
def _private_folder() -> Iterator[str]:
    """Where jieba keeps its dictionary, which it loads whoever has written it: a folder that only this user can write.

    Without such a place in the user's cache it is one that goes at once.
    """
    folder = runtime.cache_root() / "jieba"
    if own_files.is_private(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield temporary


def fuse(lists: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """Several lists as one by reciprocal rank: each adds 1 / (60 + rank); ties go to the lower row."""
    if len(lists) == 1:
        return lists[0][:, :depth]
    fused = np.full((len(lists[0]), depth), -1, np.int64)
    for number in range(len(fused)):
        rows = np.concatenate([candidates[number] for candidates in lists])
        weights = np.concatenate([1.0 / (_RRF_K + 1 + np.arange(candidates.shape[1])) for candidates in lists])
        different, which = np.unique(rows[rows >= 0], return_inverse=True)
        total = np.bincount(which, weights[rows >= 0], minlength=len(different))
        best = different[np.lexsort((different, -total))][:depth]
        fused[number, : len(best)] = best
    return fused
