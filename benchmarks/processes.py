"""What a second process brings: the same job on one core by one process, and on N cores by N processes.

    python benchmarks/processes.py
    python benchmarks/processes.py --processes 2 --jobs search --rounds 5

The jobs are those of `make bench`, without rivals: `encode` made-up texts with the bundled model, `search` for
queries in passages, `clean` vectors. `limit` comes first, matrix products that need nothing of each other: cores of a
machine that others work on, too, do not give twice as much when two are asked. Every process has one thread, and N of
them are kept on N cores. The runs take turns, and a ratio is the one's seconds by the others' of the same round. The
clock starts when the processes have met and loops are compiled, and stops when rank 0 has the result, so that sending
vectors round counts. Ends with an error if the results differ by a bit.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.process import runtime  # noqa: E402

# What the runs get: this process's own number of threads is not theirs.
ENVIRONMENT = dict(os.environ)
runtime.prepare()

import numpy as np  # noqa: E402
from compare import DEPTH, DIM, THRESHOLD, made_up_queries, made_up_texts, made_up_vectors  # noqa: E402

from utils.arguments.scripts import ModelArguments, build  # noqa: E402
from utils.cleaning.greedy import remove_near_duplicates  # noqa: E402
from utils.encoding.embed import build_encoders, embed  # noqa: E402
from utils.kernels import onednn  # noqa: E402
from utils.ranks.group import Ranks  # noqa: E402
from utils.search.exact import ShardedIndex  # noqa: E402

# A smaller job of the same kind comes first, of a fifth: it compiles the loops and opens the connections.
WARM_UP = 5
# The products of the job that measures the machine.
_PRODUCTS, _SIZE = 3000, 1024


def encode(folder: Path, ranks: Ranks) -> Callable[[int], np.ndarray | None]:
    """Encodes the first texts."""
    _, encoder = build_encoders(build(ModelArguments, max_src_len=256))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8")) if ranks.is_first else None

    def work(share: int) -> np.ndarray | None:
        some = texts[: max(8, len(texts) // share)] if texts is not None else None
        with tempfile.TemporaryDirectory(dir=folder) as store:
            found, *_ = embed(encoder, some, ranks, Path(store), "passages")
            return np.array(found) if ranks.is_first else None

    return work


def search(folder: Path, ranks: Ranks) -> Callable[[int], np.ndarray | None]:
    """Searches for the first queries."""
    queries, passages = (_first(ranks, folder / f"{name}.npy") for name in ("queries", "passages"))
    n_queries, n_passages = ranks.broadcast_object((len(queries), len(passages)) if ranks.is_first else None)

    def work(share: int) -> np.ndarray:
        index = ShardedIndex.of(ranks, passages, n_passages, DIM)
        few = queries[: n_queries // share] if queries is not None else None
        return index.search_all(few, n_queries // share, DEPTH).rows

    return work


def clean(folder: Path, ranks: Ranks) -> Callable[[int], np.ndarray]:
    """Cleans the first vectors."""
    vectors = _first(ranks, folder / "vectors.npy")
    n = ranks.broadcast_object(len(vectors) if ranks.is_first else None)

    def work(share: int) -> np.ndarray:
        return remove_near_duplicates(vectors, np.arange(n // share), DIM, THRESHOLD, ranks).kept_rows

    return work


def limit(folder: Path, ranks: Ranks) -> Callable[[int], np.ndarray]:
    """Makes matrix products that the processes share out and tell nobody of: what the cores give side by side."""
    kind = np.uint16 if onednn.bfloat16_is_fast() else np.float32
    left, result = onednn.empty((_SIZE, _SIZE), kind), onednn.empty((_SIZE, _SIZE), np.float32)
    left[:] = 0

    def work(share: int) -> np.ndarray:
        for _ in range(_PRODUCTS // share // ranks.size):
            onednn.matmul(left, left, result)
        ranks.gather_object(None)
        return result

    return work


JOBS = {"limit": limit, "encode": encode, "search": search, "clean": clean}


def _first(ranks: Ranks, path: Path) -> np.ndarray | None:
    """As the scripts hold them: rank 0 has the file, the others have nothing."""
    return np.load(path, mmap_mode="r") if ranks.is_first else None


def worker(job: str, folder: Path) -> None:
    """One process's part; rank 0 writes the seconds and a digest of the result."""
    ranks = Ranks()
    ranks.start(lambda: None)
    work = JOBS[job](folder, ranks)
    work(WARM_UP)
    ranks.gather_object(None)
    started = time.perf_counter()
    result = work(1)
    seconds = time.perf_counter() - started
    if ranks.is_first:
        digest = hashlib.sha256(np.ascontiguousarray(result)).hexdigest()
        (folder / "result.json").write_text(json.dumps({"seconds": seconds, "digest": digest}))


def measured(job: str, folder: Path, processes: int) -> dict:
    """A run's seconds and digest."""
    command = [__file__, "--worker", job, "--output", str(folder)]
    if processes == 1:
        command = [sys.executable, *command]
    else:
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, "--log_dir", str(folder / "log"), *command]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < processes:
        raise SystemExit(f"{processes} processes need as many cores; there are {len(cores)}")
    command = [sys.executable, "-c", _ON_CORES.format(cores=cores[:processes]), *command]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        raise SystemExit(f"{job} with {processes} processes failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text())


_ON_CORES = "import os, sys; os.sched_setaffinity(0, {cores}); os.execv(sys.argv[1], sys.argv[1:])"


def write_inputs(folder: Path, given: argparse.Namespace) -> None:
    """What the workers read."""
    passages, vectors = made_up_vectors(given.passages, 3, copies=0.05), made_up_vectors(given.vectors, 1)
    arrays = {"passages": passages, "queries": made_up_queries(passages, given.queries)[0], "vectors": vectors}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "texts.json").write_text(json.dumps(made_up_texts(given.texts), ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    sizes = {"texts": 1000, "queries": 50_000, "passages": 200_000, "vectors": 100_000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.output)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, given)
        print(f"{'job':<8} {'1 process':>10} {f'{given.processes} processes':>12} {'times as fast':>24}")
        for job in given.jobs:
            pairs = [[measured(job, folder, n) for n in (1, given.processes)] for _ in range(given.rounds)]
            if len({run["digest"] for pair in pairs for run in pair}) > 1:
                raise SystemExit(f"{job}: the results differ")
            ratios = [one["seconds"] / more["seconds"] for one, more in pairs]
            one, more = (statistics.median(run["seconds"] for run in side) for side in zip(*pairs, strict=True))
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{job:<8} {one:>8.2f} s {more:>10.2f} s {spread:>24}", flush=True)


if __name__ == "__main__":
    runtime.run(main)
