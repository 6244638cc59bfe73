"""Whole inputs to vectors: an encoder's batches dealt to the ranks, their results gathered into a store."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..arguments.scripts import ModelArguments
from ..files.report import Progress, RunReport
from ..files.store import EmbeddingStore, fingerprint
from ..models import checkpoint
from ..ranks.group import Ranks
from . import engines, known_texts
from .encoder import Cut, Encoder, EncoderSettings, TextEncoder

logger = logging.getLogger(__name__)

# Batches that each rank encodes between two exchanges: what a kill can cost.
_BATCHES_A_ROUND = 8


class Embedded(NamedTuple):
    """Vectors on rank 0 (None elsewhere), float32 [n, dim], memory-mapped from a store.

    ``encoded``: how many texts were encoded now. ``cut``: what the length limit left out, on rank 0.
    """

    vectors: np.ndarray | None
    encoded: int
    cut: Cut | None


def build_encoders(given: ModelArguments) -> tuple[Encoder, Encoder]:
    """The encoders of queries and of passages that the arguments describe; no weights are loaded yet.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that does not go with the arguments.
    """
    model = checkpoint.resolve(given.model_path, given.tokenizer_path, given.pooling)
    engine = engines.LazyEngine(model, given.dtype)
    query_template = given.query_template or given.template or model.query_template
    passage_template = given.passage_template or given.template or model.passage_template
    names = {f.name for f in fields(EncoderSettings)} - {"template"}
    settings = {name: getattr(given, name) for name in names}
    query, passage = (
        Encoder(model, EncoderSettings(template=template, **settings), engine)
        for template in (query_template, passage_template)
    )
    return query, passage


def embed(encoder: TextEncoder, texts: Sequence[str] | None, ranks: Ranks, folder: Path, what: str) -> Embedded:
    """Encode ``texts``, but for those that an earlier run has encoded, in this list or another.

    Args:
        texts: on rank 0; None elsewhere.
        folder: where rank 0 keeps its stores; unused on other ranks.
        what: a word for progress lines, such as "queries".
    """
    filling: _Filling | None = None
    finished: set[int] | None = None

    def open_store() -> None:
        nonlocal filling, finished
        assert texts is not None
        about = encoder.description()
        store = EmbeddingStore(folder, fingerprint(about, texts), len(texts), encoder.dim)
        filling = _Filling(store, fingerprint(about, ()), texts)
        finished = filling.open(what)

    try:
        ranks.on_first(open_store)
        finished = ranks.broadcast_object(finished)
        encoded = 0
        if finished is not None:
            new = ranks.broadcast_texts(filling.new_texts() if filling is not None else None)
            encoded = _fill(encoder, new, ranks, filling, finished, what)
        store = filling.store if filling is not None else None
        vectors = ranks.on_first(lambda: store.read() if store is not None else None)
        return Embedded(vectors, encoded, ranks.on_first(lambda: _cut(store, what)))
    finally:
        if filling is not None:
            filling.store.close()


@dataclass
class _Filling:
    """On rank 0, a list's store, into which go the vectors that others hold, and those of its new texts.

    encoder: the key of all that a vector depends on but the text.
    """

    store: EmbeddingStore
    encoder: str
    texts: Sequence[str]

    def open(self, what: str) -> set[int] | None:
        """The batches of the new texts that are finished; None if the store is complete."""
        store, n = self.store, f"{len(self.texts):,}"
        finished = store.open()
        if store.is_complete:
            logger.info("%s: all %s vectors are in %s", what, n, store.folder)
            return None
        if not finished and store.copied is None:
            n_sources = known_texts.copy_known(store, self.encoder, self.texts)
            if n_sources:
                n_known = f"{len(self.texts) - len(self.rows):,}"
                logger.info("%s: %s of %s vectors copied from other lists (%d)", what, n_known, n, n_sources)
        return finished

    @cached_property
    def rows(self) -> np.ndarray:
        """Of the new texts, int64, ascending."""
        return self.store.rows_to_write()

    def new_texts(self) -> Sequence[str]:
        return self.texts if self.store.copied is None else [self.texts[row] for row in self.rows]

    def write(self, numbers: list[int], plan: list[np.ndarray], gathered: list[np.ndarray]) -> None:
        """Finished batches of new texts, of which the ranks took turns."""
        offsets = [0] * len(gathered)
        batches = []
        for position, number in enumerate(numbers):
            owner, rows = position % len(gathered), self.rows[plan[number]]
            block = gathered[owner][offsets[owner] : offsets[owner] + len(rows)]
            offsets[owner] += len(rows)
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if len(bad):
                text = self.texts[rows[bad[0]]][:60]
                reason = "try dtype float32, or check the weights"
                raise ValueError(f"the model gives NaN or infinity for {text!r}; {reason}")
            batches.append((number, rows, block))
        self.store.write(batches)

    def finish(self, encoder: TextEncoder, new_lengths: np.ndarray) -> None:
        """All new texts are written; ``new_lengths`` are their token counts."""
        lengths = new_lengths
        if self.store.copied is not None:
            lengths = np.array(self.store.copied)
            lengths[self.rows] = new_lengths
        known = known_texts.note(self.store, self.encoder, self.texts, lengths)
        self.store.finish({"cut": encoder.cut(self.texts, lengths)} | known)


def with_prompts(
    encoder: Encoder, texts: Sequence[str] | None, prompts: Sequence[str | None] | None, ranks: Ranks
) -> tuple[Encoder, Sequence[str] | None]:
    """What encodes these queries, and as which texts, where some of them have prompts of their own.

    Args:
        texts, prompts: on rank 0; None elsewhere.
    """
    some = any(prompt is not None for prompt in prompts) if prompts is not None else None
    if not ranks.broadcast_object(some):
        return encoder, texts
    ready, filled = encoder.prompted(texts or (), prompts or ())
    return ready, filled if texts is not None else None


def description(encoder: Encoder, prompts: Sequence[str | None] | None) -> dict:
    """Of an encoder of queries, for a report: how many of them have prompts of their own, too."""
    own_prompts = sum(prompt is not None for prompt in prompts or ())
    return encoder.description() | ({"own_prompts": own_prompts} if own_prompts else {})


def note_cut(run: RunReport, what: str, cut: Cut | None, is_other: bool = False) -> None:
    """Put what the length limit left out into the report: ``cut``, or ``other_cut`` for a second model."""
    if cut is not None:
        run.results.setdefault("other_cut" if is_other else "cut", {})[what] = cut._asdict()


def _fill(
    encoder: TextEncoder,
    texts: Sequence[str],
    ranks: Ranks,
    filling: _Filling | None,
    finished: set[int],
    what: str,
) -> int:
    """Encode the batches of the new texts that are not finished; returns the number of texts in them."""
    share = np.array_split(np.arange(len(texts)), ranks.size)[ranks.rank]
    own = encoder.token_lengths([texts[row] for row in share])
    lengths = np.concatenate(ranks.gather_rows(own))
    plan = encoder.plan(lengths)
    todo = [number for number in range(len(plan)) if number not in finished]
    n_todo = sum(len(plan[number]) for number in todo)
    megabytes = len(texts) * encoder.dim * 4 / 2**20
    if todo:
        logger.info(
            "%s: encoding %s texts of %s tokens; their vectors will take %.1f MiB on disk",
            what, f"{n_todo:,}", f"{sum(int(lengths[plan[number]].sum()) for number in todo):,}", megabytes,
        )  # fmt: skip
    mine = todo[ranks.rank :: ranks.size]
    vectors = encoder.encode_batches(texts, [plan[number] for number in mine])
    work = [_work(lengths[rows], encoder.dim) for rows in plan]
    with Progress(what, len(texts), "texts", len(texts) - n_todo, sum(work[number] for number in todo)) as progress:
        step = _BATCHES_A_ROUND * ranks.size
        for start in range(0, len(todo), step):
            numbers = todo[start : start + step]
            blocks = [next(vectors) for _ in numbers[ranks.rank :: ranks.size]]
            own_rows = np.concatenate(blocks) if blocks else np.zeros((0, encoder.dim), np.float32)
            gathered = ranks.gather_rows(own_rows)
            ranks.on_first(partial(_write, filling, numbers, plan, gathered))
            progress.update(sum(len(plan[number]) for number in numbers), sum(work[number] for number in numbers))
    ranks.on_first(lambda: filling.finish(encoder, lengths) if filling is not None else None)
    return n_todo


def _work(lengths: np.ndarray, width: int) -> float:
    """Of encoding texts of so many tokens: their products go by tokens, attention by their squares.

    Of a layer's operations for each token, 24 * width^2 are of products and 4 * width * length of attention.
    """
    tokens = lengths.astype(np.float64)
    return float((tokens + tokens**2 / (6 * width)).sum())


def _cut(store: EmbeddingStore | None, what: str) -> Cut | None:
    """What the length limit left out of a complete store's texts, logged; None if the store does not say."""
    found = store.about.get("cut") if store is not None else None
    if found is None:
        return None
    cut = Cut(*found)
    cut.log(what, "max_src_len")
    return cut


def _write(filling: _Filling | None, numbers: list[int], plan: list[np.ndarray], gathered: list[np.ndarray]) -> None:
    assert filling is not None
    filling.write(numbers, plan, gathered)
