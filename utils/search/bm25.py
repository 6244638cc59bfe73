"""BM25 over words, English and Chinese."""

import contextlib
import logging
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..process import own_files, runtime

_WORD = re.compile(r"\w+")
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


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
