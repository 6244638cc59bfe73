"""The cost model of docs/scaling.md, fitted at a small size and checked at two larger ones.

    python benchmarks/scaling.py [--model multilingual-e5-small]

Encoding, search and cleaning each get one constant from their smallest run. The larger runs are then
predicted from it and measured; a ratio near 1 says that the model holds. Everything on one process with
all its cores, on made-up texts and vectors.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.process import runtime

runtime.prepare()

import numpy as np  # noqa: E402

from utils.arguments.scripts import ModelArguments, build  # noqa: E402
from utils.cleaning.greedy import remove_near_duplicates  # noqa: E402
from utils.encoding.embed import build_encoders  # noqa: E402
from utils.ranks.group import Ranks  # noqa: E402
from utils.search.exact import ExactIndex  # noqa: E402

DIM = 384


def seconds(work: Callable[[], object], rounds: int = 2) -> float:
    """The faster of some runs."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def encoder_flops(config: dict, tokens: int) -> float:
    """Multiplications and additions of one text's matrix products: projections, feed-forward, attention."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return config["num_hidden_layers"] * tokens * (2 * (4 * width**2 + 2 * width * inner) + 4 * tokens * width)


def vectors(n: int, seed: int) -> np.ndarray:
    """Unit vectors as embedding models give them: one common direction, and a spectrum that falls off."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((n, DIM), dtype=np.float32) / np.sqrt(np.arange(1, DIM + 1, dtype=np.float32))
    found *= 0.5 / np.linalg.norm(found, axis=1, keepdims=True)
    found[:, 0] += 0.85
    found[n // 2 :: 10] = found[: len(found[n // 2 :: 10])]  # some copies
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def report(what: str, unit: str, sizes: list, work: list[float], taken: list[float]) -> None:
    """Each size's seconds, its rate, and how it compares with the first one's prediction."""
    print(f"\n{what}")
    for size, amount, spent in zip(sizes, work, taken, strict=True):
        predicted = amount * taken[0] / work[0]
        print(f"  {size:>24}: {spent:8.2f} s, {amount / spent / 1e9:8.2f} {unit}, {spent / predicted:5.2f} x predicted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="multilingual-e5-small")
    given = parser.parse_args()

    sizes = [(64, 256), (128, 128), (256, 64), (512, 32)]
    work, taken = [], []
    for tokens, count in sizes:
        _, encoder = build_encoders(build(ModelArguments, model_path=given.model, max_src_len=tokens))
        texts = [" ".join(["word"] * (2 * tokens))] * count
        encoder.encode(texts)
        work.append(count * encoder_flops(encoder.model.config, tokens))
        taken.append(seconds(lambda encoder=encoder, texts=texts: encoder.encode(texts)))
    report("encoding", "GFLOP/s", [f"{count} x {tokens} tokens" for tokens, count in sizes], work, taken)

    queries, counts = vectors(4096, 1), [50_000, 100_000, 200_000]
    work, taken = [], []
    for count in counts:
        index = ExactIndex(DIM, vectors=vectors(count, 2))
        work.append(2.0 * len(queries) * count * DIM)
        taken.append(seconds(lambda index=index: index.search(queries, 50)))
    report("search, the best 50", "GFLOP/s", [f"4,096 x {count:,}" for count in counts], work, taken)

    counts = [25_000, 50_000, 100_000]
    work, taken = [], []
    for count in counts:
        rows = vectors(count, 3)
        kept = 0

        def clean(rows: np.ndarray = rows, count: int = count) -> None:
            nonlocal kept
            kept = len(remove_near_duplicates(rows, np.arange(count), DIM, 0.97, Ranks()).kept_rows)

        taken.append(seconds(clean, 1))
        work.append(count * kept / 2)
    report("cleaning", "Gpairs/s", [f"{count:,} rows" for count in counts], work, taken)


if __name__ == "__main__":
    main()
