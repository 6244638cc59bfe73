"""How near exact search and cleaning come to bare matrix products, on made-up vectors.

    python benchmarks/search_and_dedup.py [--rows 20000] [--dim 1024] [--queries 4096] [--corpus 200000]

Prints ratios from one run, because absolute times depend on the machine and on what else it does:
cleaning against the products it cannot do without and against the common loop that asks a FAISS index
for one row at a time; search against the product of queries and corpus. The products run in a process
of their own, in which the matrix library may use all cores as it likes.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.process import runtime

runtime.prepare()

import numpy as np  # noqa: E402

from utils.cleaning.greedy import remove_near_duplicates  # noqa: E402
from utils.ranks.group import Ranks  # noqa: E402
from utils.search.exact import ExactIndex  # noqa: E402

THRESHOLD = 0.75

# The same flops as blocks of 1,024 rows against the kept rows before them; best of two.
BARE = """
import sys, time
import numpy as np
rows, others, dim, triangle = map(int, sys.argv[1:])
x = np.random.default_rng(0).standard_normal((max(rows, others), dim), dtype=np.float32)
out, best = np.empty((1024, 8192), np.float32), float("inf")
for _ in range(2):
    started = time.perf_counter()
    for start in range(0, rows, 1024):
        block = x[start : min(start + 1024, rows)]
        until = min(start + 1024, rows) * others // rows if triangle else others
        for other in range(0, until, 8192):
            part = x[other : min(other + 8192, until)]
            np.matmul(block, part.T, out=out[: len(block), : len(part)])
    best = min(best, time.perf_counter() - started)
print(best)
"""


def bare_products(rows: int, others: int, dim: int, triangle: bool) -> float:
    """Seconds of the products of ``rows`` with ``others`` rows, or with those before them."""
    command = [sys.executable, "-c", BARE, *map(str, (rows, others, dim, int(triangle)))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env={}).stdout)


def unit_vectors(n: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def one_by_one(vectors: np.ndarray) -> tuple[float, int]:
    """Seconds of the loop, and how many rows it keeps."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    started = time.perf_counter()
    for row in vectors:
        if index.ntotal and index.search(row[None], 1)[0][0, 0] >= THRESHOLD:
            continue
        index.add(row[None])
    return time.perf_counter() - started, index.ntotal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 20_000), ("dim", 1024), ("queries", 4096), ("corpus", 200_000), ("search_dim", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    vectors = unit_vectors(given.rows, given.dim, 1)
    vectors[given.rows // 2 :: 10] = vectors[: len(vectors[given.rows // 2 :: 10])]  # some exact copies
    started = time.perf_counter()
    result = remove_near_duplicates(vectors, np.arange(given.rows), given.dim, THRESHOLD, Ranks())
    ours = time.perf_counter() - started
    bare = bare_products(given.rows, len(result.kept_rows), given.dim, triangle=True)
    loop, kept = one_by_one(vectors)
    assert kept == len(result.kept_rows)
    print(f"cleaning {given.rows:,} x {given.dim}: {ours:.2f} s, {kept:,} kept")
    print(f"  {ours / bare:.2f} times the bare products ({bare:.2f} s)")
    print(f"  {loop / ours:.1f} times as fast as one row at a time ({loop:.2f} s)")
    del vectors

    corpus, queries = (unit_vectors(n, given.search_dim, n) for n in (given.corpus, given.queries))
    bare = bare_products(given.queries, given.corpus, given.search_dim, triangle=False)
    index = ExactIndex(given.search_dim, vectors=corpus)
    print(f"search {given.queries:,} x {given.corpus:,} x {given.search_dim}: the product alone takes {bare:.2f} s")
    for k in (10, 50, 100, 200):
        started = time.perf_counter()
        for start in range(0, given.queries, 4096):
            index.search(queries[start : start + 4096], k)
        ours = time.perf_counter() - started
        print(f"  the best {k}: {ours:.2f} s, {bare / ours:.0%} of the product's throughput")


if __name__ == "__main__":
    main()
