"""The other side of `make bench`: other people's tools, one job a process, one line of JSON.

    .venv-bench/bin/python benchmarks/rivals.py clean '{"vectors": "vectors.npy", "n": 100000, ...}'

Runs in the environment of requirements-rivals.txt. The jobs are the functions below and the JSON their
arguments. Every tool is used as its own documentation does; where it wants a model and the benchmark has
vectors, it gets a stand-in that returns them.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from compare import PEAK_SIZE, WARM_UP, serve


def peak(kinds: list[str]) -> dict:
    """What torch's matrix product reaches in each kind of number, in flops a second; the versions of all the tools."""
    import torch

    speeds = {}
    for name in kinds:
        left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(getattr(torch, name)) for _ in range(2))
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - started)
        speeds[f"torch {name}"] = 2 * PEAK_SIZE**3 / best
    tools = ("torch", "sentence-transformers", "semhash", "faiss-cpu")
    return {"speeds": speeds, "versions": {tool: version(tool) for tool in tools}}


def encode(model: str, texts: str, length: int, dtype: str, prompt: str | None, output: str) -> dict:
    """sentence-transformers on the texts of a JSON list."""
    from sentence_transformers import SentenceTransformer

    wanted = json.loads(Path(texts).read_text(encoding="utf-8"))
    # The toolkit's pinned Paddle is a CPU build; a GPU that torch happens to find must not decide.
    transformer = SentenceTransformer(model, device="cpu")
    transformer.max_seq_length = length
    if dtype == "bfloat16":
        transformer = transformer.bfloat16()
    options = {"batch_size": 32, "normalize_embeddings": True, "prompt": prompt, "show_progress_bar": False}
    transformer.encode(wanted[:WARM_UP], **options)
    started = time.perf_counter()
    vectors = transformer.encode(wanted, **options)
    seconds = time.perf_counter() - started
    np.save(output, vectors.astype(np.float32))
    return {"seconds": seconds, "arithmetic": f"torch {dtype}"}


class _Stand:
    """In a model's place: has vectors, not texts, to give."""

    device = "cpu"

    def __init__(self, queries: np.ndarray, passages: np.ndarray):
        self.queries, self.passages = queries, passages

    def get_embedding_dimension(self) -> int:
        return self.passages.shape[1]

    def encode(self, inputs: list[str], **options: object) -> np.ndarray:
        return self.passages[[int(text) for text in inputs]]

    def encode_query(self, texts: list[str], **options: object) -> np.ndarray:
        assert len(texts) == len(self.queries)
        return self.queries

    def encode_document(self, texts: list[str], **options: object) -> np.ndarray:
        assert len(texts) == len(self.passages)
        return self.passages

    def similarity_pairwise(self, left: np.ndarray, right: np.ndarray):
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(left, right)


def clean(vectors: str, n: int, threshold: float, backend: str, output: str) -> dict:
    """SemHash on the first ``n`` vectors, over an index of vicinity's (``usearch`` is its default)."""
    from semhash import SemHash

    given = np.load(vectors)[:n]
    records = [str(row) for row in range(len(given))]
    model = _Stand(given[:0], given)
    started = time.perf_counter()
    found = SemHash.from_embeddings(given, records, model=model, ann_backend=backend)
    result = found.self_deduplicate(threshold=threshold)
    seconds = time.perf_counter() - started
    kept = np.sort(np.array([int(record) for record in result.selected], np.int64))
    np.save(output, kept)
    return {"seconds": seconds, "kept": len(kept)}


def one_by_one(vectors: str, n: int, threshold: float, output: str) -> dict:
    """The common loop: search a FAISS index for one row, then add it."""
    import faiss

    given = np.load(vectors)[:n]
    index = faiss.IndexFlatIP(given.shape[1])
    kept = []
    started = time.perf_counter()
    for row in range(len(given)):
        vector = given[row : row + 1]
        if index.ntotal and index.search(vector, 1)[0][0, 0] >= threshold:
            continue
        index.add(vector)
        kept.append(row)
    seconds = time.perf_counter() - started
    np.save(output, np.array(kept, np.int64))
    return {"seconds": seconds, "kept": len(kept)}


def mine(queries: str, passages: str, positives: str, depth: int, wanted: int, output: str) -> dict:
    """sentence-transformers' mine_hard_negatives, given vectors, with FAISS's exact index."""
    import faiss
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    model = _Stand(np.load(queries), np.load(passages))
    corpus = [f"passage {row}" for row in range(len(model.passages))]
    answers = [corpus[row] for row in np.load(positives).tolist()]
    dataset = Dataset.from_dict({"query": [f"query {i}" for i in range(len(answers))], "positive": answers})
    clock = {"search_seconds": 0.0}
    found = []

    class Timed(faiss.IndexFlatIP):
        """Its searches are the part that is compared on its own, too."""

        def add(self, x: np.ndarray) -> None:
            started = time.perf_counter()
            super().add(x)
            clock["search_seconds"] += time.perf_counter() - started

        def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            started = time.perf_counter()
            result = super().search(x, k)
            clock["search_seconds"] += time.perf_counter() - started
            found.append(result[1])
            return result

    faiss.IndexFlatIP = Timed
    started = time.perf_counter()
    mined = mine_hard_negatives(
        dataset, model, corpus=corpus, range_max=depth, num_negatives=wanted, sampling_strategy="top",
        use_faiss=True, output_format="n-tuple", verbose=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    np.save(output, np.concatenate(found))
    return clock | {"seconds": seconds, "arithmetic": "numpy float32", "mined": wanted * len(mined)}


if __name__ == "__main__":
    serve({"peak": peak, "encode": encode, "clean": clean, "one_by_one": one_by_one, "mine": mine})
