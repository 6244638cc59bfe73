"""A cross-encoder's opinion on pairs of query and passage, dealt to the ranks in whole batches."""

import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..files.report import Progress
from ..files.store import EmbeddingStore, fingerprint
from ..models import checkpoint
from ..models.checkpoint import Checkpoint
from ..models.paddlenlp import first_output, import_paddlenlp, load_tokenizer, one_line
from ..models.weight_files import read_weights
from ..process import runtime
from ..ranks.group import Ranks
from . import engines
from .encoder import Cut, evenly

logger = logging.getLogger(__name__)

_BATCH_PAIRS = 32
# Batches that each rank scores between two exchanges.
_BATCHES_A_ROUND = 8


class Reranker:
    """A checkpoint for sequence classification with one logit; the weights are loaded when first needed.

    Raises:
        FileNotFoundError, ValueError: no such model, or one with other than one logit.
    """

    def __init__(self, path: str, max_length: int):
        self.model = checkpoint.resolve(path, pooling="cls")  # whatever it says: it has a head
        config = self.model.config
        labels = config.get("num_labels") or len(config.get("id2label") or {}) or config.get("num_choices")
        if labels != 1:
            found = f"{labels} logits" if labels else "no num_labels or id2label"
            raise ValueError(f"{self.model.folder}: config.json has {found}; expected a reranker with one logit")
        architecture = (config.get("architectures") or [""])[0]
        if not architecture.endswith("ForSequenceClassification"):
            raise ValueError(
                f"{self.model.folder}: config.json has the architecture {architecture!r}; expected one for sequence"
                " classification"
            )
        if not hasattr(import_paddlenlp(), architecture):
            raise ValueError(f"{self.model.folder}: PaddleNLP has no {architecture}; expected a reranker that it knows")
        self.max_length = min(max_length, self.model.max_length or max_length)
        self._loaded = None

    def description(self) -> dict:
        """What a logit depends on besides its pair, and the batches that pairs are scored in."""
        return {
            "digest": self.model.digest, "max_length": self.max_length, "device": engines.device(),
            "batch_pairs": _BATCH_PAIRS,
        }  # fmt: skip

    def cut(self, pairs: Sequence[tuple[str, str]]) -> Cut:
        """What ``max_length`` leaves out of these pairs; of more than 1,000, as 1,000 of them say."""
        some = [pairs[i] for i in evenly(len(pairs))]
        queries, passages = zip(*some, strict=True)
        whole = self._tokenizer(list(queries), list(passages), truncation=False)["input_ids"]
        return Cut.measured(np.array(list(map(len, whole))), len(pairs), self.max_length)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """One logit for each pair, float32 [n]; a single batch."""
        if self._loaded is None:
            self._loaded = self._load()
        import paddle

        model = self._loaded
        batch = self._tokenizer(
            [query for query, _ in pairs], [passage for _, passage in pairs], max_length=self.max_length,
            truncation=True, padding=True, return_attention_mask=True,
        )  # fmt: skip
        inputs = {name: paddle.to_tensor(np.asarray(values, np.int64)) for name, values in batch.items()}
        with paddle.no_grad():
            logits = first_output(model(**inputs))
        return logits.astype("float32").numpy().reshape(-1)

    @cached_property
    def _tokenizer(self):
        return load_tokenizer(self.model.tokenizer_folder)

    def _load(self):
        runtime.import_paddle().set_device(engines.device())
        with one_line(f"{self.model.folder}: PaddleNLP cannot load this reranker"):
            model = _with_weights(self.model)
        model.eval()
        return model


def _with_weights(reranker: Checkpoint):
    """PaddleNLP's model with the checkpoint's weights, in PyTorch's naming or Paddle's.

    PaddleNLP's own loader runs what a file of weights asks for. It also writes a converted copy of PyTorch's weights
    into the folder, and leaves the head of BERT untransposed and without its bias. Only its names are used here.
    """
    folder, architecture = reranker.folder, reranker.config["architectures"][0]
    model_class = getattr(import_paddlenlp(), architecture)
    config = model_class.config_class.from_pretrained(str(folder), num_labels=1)
    model = model_class(config)
    mappings = model_class._get_name_mappings(config) if reranker.is_torch else ()
    names = {m.source_name: (m.target_name, m.action) for m in mappings}
    state = {}
    for name, values in read_weights(reranker).items():
        target, action = names.get(name, (name, None))
        is_head = reranker.is_torch and name.startswith("classifier.") and values.ndim == 2
        state[target] = np.ascontiguousarray(values.T if action == "transpose" or is_head else values)
    missing = [name for name in model.state_dict() if name not in state and "position_ids" not in name]
    if missing:
        raise ValueError(f"{folder}: the weights lack {missing[0]}; expected those of {architecture}")
    model.set_state_dict(state)
    return model


class PairLogits:
    """The logits of pairs of a query and a passage, by their numbers; pairs that were asked about before are known.

    Every rank makes one and asks in turn; rank 0 alone has the texts and gets the logits.

    Args:
        texts: on rank 0, the queries and the passages; None elsewhere.
        folder: as for ``rerank``.
    """

    def __init__(
        self, reranker: Reranker, ranks: Ranks, folder: Path, texts: tuple[Sequence[str], Sequence[str]] | None
    ):
        self.reranker, self._ranks, self._folder, self._texts = reranker, ranks, folder, texts
        self._keys, self._logits = np.zeros(0, np.int64), np.zeros(0, np.float32)
        self.n_scored = 0
        self.cut = Cut(0, 0, reranker.max_length)

    def of(self, queries: np.ndarray | None, passages: np.ndarray | None) -> np.ndarray | None:
        """The logits of pairs (int [n] and int [n], on rank 0), float32 [n]; those that are not known are scored."""
        keys, new, pairs = None, None, None
        if self._texts is not None:
            assert queries is not None and passages is not None
            width = len(self._texts[1])
            keys = queries.astype(np.int64) * width + passages
            new = np.setdiff1d(keys, self._keys)
            numbers = (divmod(key, width) for key in new.tolist())
            pairs = [(self._texts[0][query], self._texts[1][passage]) for query, passage in numbers]
        if self._ranks.broadcast_object(len(pairs) if pairs is not None else None):
            logits, n_scored = rerank(self.reranker, pairs, self._ranks, self._folder)
            self.n_scored += n_scored
            self._ranks.on_first(lambda: self._note_cut(pairs))
            if new is not None:
                self._keys, self._logits = np.concatenate([self._keys, new]), np.concatenate([self._logits, logits])
                order = np.argsort(self._keys)
                self._keys, self._logits = self._keys[order], self._logits[order]
        return self._logits[np.searchsorted(self._keys, keys)] if keys is not None else None

    def _note_cut(self, pairs: list[tuple[str, str]] | None) -> None:
        assert pairs is not None
        new, old = self.reranker.cut(pairs), self.cut
        new.log("pairs", "reranker_max_len", "not read by the cross-encoder")
        estimated = new.is_estimated or old.is_estimated
        self.cut = Cut(old.texts + new.texts, old.tokens + new.tokens, new.limit, estimated)


def rerank(
    reranker: Reranker, pairs: Sequence[tuple[str, str]] | None, ranks: Ranks, folder: Path
) -> tuple[np.ndarray | None, int]:
    """The logits of rank 0's pairs (None elsewhere), float32 [n], on rank 0; and how many had to be scored now.

    Batches are formed over all pairs by length and never split, so the number of ranks changes nothing. Finished ones
    are kept on disk, for these very pairs: in other batches a pair's logit may differ in its last bits.

    Args:
        folder: where rank 0 keeps its stores; unused on other ranks.

    Raises:
        ValueError: the model gives NaN or infinity.
    """
    store: EmbeddingStore | None = None

    def open_store() -> set[int] | None:
        nonlocal store
        assert pairs is not None
        key = fingerprint(reranker.description(), (text for pair in pairs for text in pair))
        store = EmbeddingStore(folder, key, len(pairs), 1, what="logits")
        finished = store.open()
        if not store.is_complete:
            return finished
        logger.info("rerank: all %s logits are in %s", f"{len(pairs):,}", store.folder)
        return None

    try:
        finished = ranks.broadcast_object(ranks.on_first(open_store))
        n_scored = _fill(reranker, pairs, ranks, store, finished) if finished is not None else 0
        return ranks.on_first(lambda: np.array(store.read()[:, 0]) if store is not None else None), n_scored
    finally:
        if store is not None:
            store.close()


def _fill(
    reranker: Reranker,
    pairs: Sequence[tuple[str, str]] | None,
    ranks: Ranks,
    store: EmbeddingStore | None,
    finished: set[int],
) -> int:
    """Score the batches that are not finished; returns the number of pairs in them."""
    batches, sizes = None, None
    if pairs is not None:
        order = np.argsort([-len(query) - len(passage) for query, passage in pairs], kind="stable")
        batches = [order[start : start + _BATCH_PAIRS] for start in range(0, len(order), _BATCH_PAIRS)]
        sizes = list(map(len, batches))
    sizes = ranks.broadcast_object(sizes)
    todo = [number for number in range(len(sizes)) if number not in finished]
    n_todo = sum(sizes[number] for number in todo)
    step = _BATCHES_A_ROUND * ranks.size
    with Progress("rerank", sum(sizes), "pairs", sum(sizes) - n_todo) as progress:
        for start in range(0, len(todo), step):
            numbers = todo[start : start + step]
            texts = None
            if batches is not None:
                texts = [[pairs[row] for row in batches[number]] for number in numbers]
            texts = ranks.broadcast_object(texts)
            own = [reranker.score(batch) for batch in texts[ranks.rank :: ranks.size]]
            gathered = ranks.gather_rows(np.concatenate(own) if own else np.zeros(0, np.float32))
            ranks.on_first(partial(_write, store, numbers, batches, gathered))
            progress.update(sum(map(len, texts)))
    ranks.on_first(lambda: store.finish() if store is not None else None)
    return n_todo


def _write(
    store: EmbeddingStore | None, numbers: list[int], batches: list[np.ndarray] | None, gathered: list[np.ndarray]
) -> None:
    """Keep a round's logits, which each rank gives for its batches in turn."""
    assert store is not None and batches is not None
    if not all(np.isfinite(logits).all() for logits in gathered):
        raise ValueError("the reranker gives NaN or infinity; check its weights")
    noted = []
    for rank, logits in enumerate(gathered):
        own = numbers[rank :: len(gathered)]
        ends = np.cumsum([len(batches[number]) for number in own])
        parts = np.split(logits[:, None], ends[:-1]) if own else []
        noted += [(number, batches[number], part) for number, part in zip(own, parts, strict=True)]
    store.write(noted)
