"""The toolkit's side of `make bench`: one job a process, one line of JSON.

    .venv/bin/python benchmarks/ours.py encode '{"model": "multilingual-e5-small", "texts": "texts.json", ...}'

The jobs are the functions below and the JSON their arguments. Loading is not timed, on either side: not
the inputs, and not the model, which encodes a few texts before the clock starts.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.process import runtime  # noqa: E402

runtime.prepare()

import numpy as np  # noqa: E402
from compare import WARM_UP, serve  # noqa: E402

from utils.arguments.scripts import ModelArguments, build  # noqa: E402
from utils.cleaning.greedy import remove_near_duplicates  # noqa: E402
from utils.encoding.embed import build_encoders  # noqa: E402
from utils.encoding.encoder import Encoder  # noqa: E402
from utils.files.ragged import Ragged  # noqa: E402
from utils.mining import margins  # noqa: E402
from utils.mining import rules as negatives  # noqa: E402
from utils.mining.problem import Problem  # noqa: E402
from utils.mining.sampling import choose  # noqa: E402
from utils.mining.tiers import Rankings  # noqa: E402
from utils.ranks.group import Ranks  # noqa: E402
from utils.search.exact import ShardedIndex  # noqa: E402


def encode(model: str, texts: str, length: int, dtype: str, output: str) -> dict:
    """The texts of a JSON list as passages."""
    wanted = json.loads(Path(texts).read_text(encoding="utf-8"))
    _, encoder = build_encoders(build(ModelArguments, model_path=model, max_src_len=length, dtype=dtype))
    encoder.encode(wanted[:WARM_UP])
    started = time.perf_counter()
    vectors = encoder.encode(wanted)
    seconds = time.perf_counter() - started
    np.save(output, vectors)
    # Where there is no bfloat16, auto is float32: the peak to compare with follows what was used.
    arithmetic = f"torch {encoder.description()['dtype']}"
    return {"seconds": seconds, "flops": {"seconds": encoder_flops(encoder, wanted)}, "arithmetic": arithmetic}


def encoder_flops(encoder: Encoder, texts: list[str]) -> float:
    """The matrix products that the texts need without padding.

    Two for each weight of a layer and token (query, key, value, output; two of the feed-forward part), and
    for attention 4 x width for each pair of tokens.
    """
    config = encoder.model.config
    width, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    tokens = encoder.token_lengths(texts).astype(np.float64)
    return float(layers * (2 * (4 * width**2 + 2 * width * inner) * tokens.sum() + 4 * width * (tokens**2).sum()))


def clean(vectors: str, n: int, threshold: float, output: str) -> dict:
    """The first ``n`` vectors; the rows that stay go to ``output``."""
    given = np.load(vectors)[:n]
    started = time.perf_counter()
    result = remove_near_duplicates(given, np.arange(len(given)), given.shape[1], threshold, Ranks())
    seconds = time.perf_counter() - started
    np.save(output, result.kept_rows)
    return {"seconds": seconds, "kept": len(result.kept_rows)}


def mine(queries: str, passages: str, positives: str, depth: int, wanted: int, output: str) -> dict:
    """The first ``wanted`` of each query's ``depth`` nearest passages that are not its positive, as texts."""
    # As the script holds them.
    query_vectors, passage_vectors = np.load(queries, mmap_mode="r"), np.load(passages, mmap_mode="r")
    n, n_passages, dim = len(query_vectors), len(passage_vectors), query_vectors.shape[1]
    own = Ragged.of([[row] for row in np.load(positives).tolist()])
    texts = [f"passage {row}" for row in range(n_passages)]
    # The rival's defaults: no margins, no near-copies looked for.
    rules = negatives.Rules(window=(0, depth), parts=(("top", wanted),))

    started = time.perf_counter()
    index = ShardedIndex.of(Ranks(), passage_vectors, n_passages, dim)
    found = index.search_all(query_vectors, n, min(depth + 1, n_passages))
    searched = time.perf_counter() - started
    problem = Problem(np.arange(n), query_vectors, passage_vectors, own, own, n_passages)
    scores = problem.positive_scores()
    background, _ = margins.measure_background(problem, scores)
    criteria = negatives.Criteria(problem, scores, rules, background)
    screened = negatives.screen(criteria, Rankings.of(found))
    np.save(output, found.rows)
    del found
    chosen = choose(criteria, screened).negatives
    mined = [[texts[negative.row] for negative in row] for row in chosen]
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "search_seconds": searched,
        "flops": {"search_seconds": 2.0 * n * n_passages * dim},
        "arithmetic": "numpy float32",
        "mined": sum(map(len, mined)),
    }


if __name__ == "__main__":
    serve({"encode": encode, "clean": clean, "mine": mine})
