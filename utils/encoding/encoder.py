"""Texts to vectors: tokenise, batch by length, forward, pool, cut, normalise, input order back.

A text's vector can differ in its last bits with the other texts of its batch, because the shape of the
matrix products decides how they round. (The CPU engine on processors with AVX-512 is the exception: a text has
the same bits in any batch.) Batches are therefore planned over the whole input, from token lengths alone, and
are never split: whoever encodes a batch, on whichever rank, gets the same bits.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from ..models import checkpoint
from ..models.tokenizers import tokenizer
from . import engines

logger = logging.getLogger(__name__)

# No limit on a text's tokens.
UNCUT = 1 << 20
# Texts at the limit that are tokenised whole, to count what is cut: all would take as long as counting them did.
_MEASURED_TEXTS = 1000
# Tokens of a text at most, unless asked for: what a model says can be 32,768, which few texts need.
DEFAULT_LENGTH = 512
# Rows of a batch at most, whatever their length.
_MAX_BATCH_ROWS = 1024
# Part of every fingerprint: raise it when ``plan`` changes, or stores would hold batches of another plan; and when
# an engine rounds or a tokenizer cuts differently, or they would hold vectors of both kinds.
_PLAN = 7
# Tokens that are kept from counting them to encoding them: 16 MiB.
_REMEMBERED_TOKENS = 4 << 20
# Texts tokenised at a time when they are counted, so that memory stays bounded.
_COUNTED_TEXTS = 4096
# Batches tokenised before they are needed.
_BATCHES_AHEAD = 4


class Cut(NamedTuple):
    """Texts that are longer than the limit of ``limit`` tokens, and their tokens beyond it.

    Where more than 1,000 texts reach the limit, both counts are estimated from 1,000 of them.
    """

    texts: int
    tokens: int
    limit: int
    is_estimated: bool = False

    @classmethod
    def measured(cls, lengths: np.ndarray, n: int, limit: int) -> "Cut":
        """Of ``n`` texts, from the whole token counts (int [m]) of some of them, evenly taken."""
        beyond, scale = np.maximum(lengths - limit, 0), n / max(1, len(lengths))
        return cls(int((beyond > 0).sum() * scale), int(beyond.sum() * scale), limit, len(lengths) < n)

    def log(self, what: str, argument: str, left_out: str = "not encoded") -> None:
        """One line, if there are any; ``argument`` sets the limit."""
        if self.texts:
            logger.warning(
                "warning: %s%s %s are longer than %d tokens; their other %s tokens are %s. See %s",
                "about " if self.is_estimated else "", f"{self.texts:,}", what, self.limit, f"{self.tokens:,}",
                left_out, argument,
            )  # fmt: skip


def evenly(n: int) -> np.ndarray:
    """Which of ``n`` texts are measured whole, int64."""
    return np.linspace(0, n - 1, min(n, _MEASURED_TEXTS)).astype(int)


class TextEncoder(Protocol):
    """What the algorithms need of an encoder; tests replace it with one that has no model."""

    dim: int

    def description(self) -> dict:
        """Everything that a vector depends on, apart from the text, as JSON values."""

    def token_lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Token counts, int32 [n]."""

    def cut(self, texts: Sequence[str], lengths: np.ndarray) -> "Cut":
        """What the length limit leaves out of these texts, whose token counts are ``lengths``."""

    def plan(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows of each batch, int64."""

    def encode_batches(self, texts: Sequence[str], batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Vectors of each batch in turn, float32 [b, dim]."""


@dataclass(frozen=True)
class EncoderSettings:
    """The user's choices; None leaves a choice to the checkpoint. ``template`` holds ``{text}``."""

    template: str
    dimension: int | None = None
    max_src_len: int | None = None
    pooling: str | None = None
    normalize: bool | None = None
    dtype: str = "auto"
    batch_tokens: int | None = None


class Encoder:
    """A checkpoint with settings, for one side (queries or passages).

    The tokenizer and the weights are loaded when they are first needed.

    Raises:
        ValueError: the dimension is larger than the model's.
    """

    def __init__(self, model: checkpoint.Checkpoint, settings: EncoderSettings, engine: "engines.LazyEngine"):
        self.model, self.settings, self._engine = model, settings, engine
        self.dim = settings.dimension or model.hidden_size
        if self.dim > model.hidden_size:
            raise ValueError(f"dimension is {self.dim}; the model {model.folder} has only {model.hidden_size}")
        self.pooling = settings.pooling or model.pooling
        self.normalize = model.normalize if settings.normalize is None else settings.normalize
        wanted = settings.max_src_len or min(model.default_length, DEFAULT_LENGTH)
        self.max_length = min(wanted, model.max_length or wanted)
        # Token ids of texts that have been counted and will soon be encoded.
        self._remembered: dict[str, np.ndarray] = {}
        if self.max_length < wanted:
            logger.info("texts are cut to %d tokens, the longest that the model takes", self.max_length)

    @cached_property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.model.tokenizer_folder, self.max_length, self.model.is_torch)

    def description(self) -> dict:
        """Everything that a vector depends on, apart from the text, as JSON values."""
        return asdict(self.settings) | {
            "digest": self.model.digest,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_src_len": self.max_length,
            "dimension": self.dim,
            "batch_tokens": self.settings.batch_tokens or self._engine.batch_tokens,
            "batch_plan": _PLAN,
            **self._engine.description(),
        }

    def token_lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Token counts with template and special tokens, after the cut, int32 [n]."""
        counts = np.empty(len(texts), np.int32)
        self._remembered, kept = {}, 0
        for start in range(0, len(texts), _COUNTED_TEXTS):
            block = texts[start : start + _COUNTED_TEXTS]
            tokens = self._tokenizer([self._filled(text) for text in block])
            counts[start : start + len(block)] = [len(ids) for ids in tokens]
            if kept < _REMEMBERED_TOKENS:
                kept += int(counts[start : start + len(block)].sum())
                self._remembered |= {text: np.array(ids, np.int32) for text, ids in zip(block, tokens, strict=True)}
        return counts

    def cut(self, texts: Sequence[str], lengths: np.ndarray) -> Cut:
        """What the length limit leaves out of these texts, whose token counts after the cut are ``lengths``."""
        full = np.flatnonzero(lengths >= self.max_length)
        if not len(full):
            return Cut(0, 0, self.max_length)
        measured = full[evenly(len(full))]
        uncut = tokenizer.load(self.model.tokenizer_folder, UNCUT, self.model.is_torch)
        whole = np.array([len(ids) for ids in uncut([self._filled(texts[row]) for row in measured])])
        return Cut.measured(whole, len(full), self.max_length)

    def plan(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows of each batch, int64: longest texts first, each batch within the token budget."""
        budget = self.settings.batch_tokens or self._engine.batch_tokens
        order = np.argsort(-lengths, kind="stable")
        batches = []
        start = 0
        while start < len(order):
            width = self._width(int(lengths[order[start]]))
            size = max(1, min(budget // max(1, width), _MAX_BATCH_ROWS))
            batches.append(order[start : start + size].astype(np.int64))
            start += size
        return batches

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """All vectors in input order, float32 [n, dim]; in this process alone."""
        vectors = np.empty((len(texts), self.dim), np.float32)
        batches = self.plan(self.token_lengths(texts))
        for rows, block in zip(batches, self.encode_batches(texts, batches), strict=True):
            vectors[rows] = block
        return vectors

    def encode_batches(self, texts: Sequence[str], batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Vectors of each batch in turn, float32 [b, dim].

        Batches are tokenised ahead of the forward pass, on threads of their own; these also run an engine
        of which a call keeps one core busy.
        """
        engine = self._engine.loaded()

        def prepare(rows: np.ndarray) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
            tokens = self._tokenised([texts[row] for row in rows])
            return self._forward(engine, *tokens) if engine.threads > 1 else tokens

        with ThreadPoolExecutor(engine.threads) as ahead:
            waiting = iter(batches)
            ready = deque(ahead.submit(prepare, rows) for rows in islice(waiting, engine.threads + _BATCHES_AHEAD))
            try:
                while ready:
                    prepared = ready.popleft().result()
                    ready += [ahead.submit(prepare, rows) for rows in islice(waiting, 1)]
                    yield prepared if engine.threads > 1 else self._forward(engine, *prepared)
            finally:
                for future in ready:
                    future.cancel()
                self._remembered = {}

    def prompted(self, texts: Sequence[str], prompts: Sequence[str | None]) -> tuple["Encoder", list[str]]:
        """The texts with their own prompts before them, or else in the template; and the encoder that takes them so."""
        ready = Encoder(self.model, replace(self.settings, template="{text}"), self._engine)
        pairs = zip(texts, prompts, strict=True)
        return ready, [self._filled(text) if prompt is None else prompt + text for text, prompt in pairs]

    def _filled(self, text: str) -> str:
        return self.settings.template.replace("{text}", text)

    def _tokenised(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids int64 [b, t] and lengths int64 [b], padding to the right."""
        new = [text for text in texts if text not in self._remembered]
        fresh = dict(zip(new, self._tokenizer([self._filled(text) for text in new]), strict=True))
        tokens = [fresh[text] if text in fresh else self._remembered[text] for text in texts]
        width = self._width(max(map(len, tokens)))
        padded, lengths = tokenizer.padded(tokens, self._tokenizer.pad_id, width)
        self.model.check_ids(int(padded.max()))
        return padded, lengths

    def _width(self, length: int) -> int:
        """The padded width of a batch whose longest text has ``length`` tokens; never past the last position."""
        width = engines.padded_length(length)
        return min(width, self.model.max_length or width)

    def _forward(self, engine: "engines.Engine", ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        vectors = engine.forward(ids, lengths, pooling_weights(lengths, ids.shape[1], self.pooling))
        vectors = np.ascontiguousarray(vectors[:, : self.dim], np.float32)
        if self.normalize:
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
        return vectors


def pooling_weights(lengths: np.ndarray, width: int, pooling: str) -> np.ndarray:
    """Pooling as a weighted sum over tokens: float32 [b, width], each row summing to 1.

    ``cls`` takes the first token, ``last`` the last one that is no padding, ``mean`` all of those alike.
    Sequences begin at column 0.
    """
    columns = np.arange(width)
    if pooling == "cls":
        return np.broadcast_to(columns == 0, (len(lengths), width)).astype(np.float32)
    if pooling == "last":
        return (columns == lengths[:, None] - 1).astype(np.float32)
    return (columns < lengths[:, None]).astype(np.float32) / np.maximum(lengths, 1)[:, None].astype(np.float32)
