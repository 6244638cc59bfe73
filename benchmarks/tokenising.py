"""How many passages a second are tokenised, against the library alone, and what part of encoding that is.

    .venv/bin/python benchmarks/tokenising.py --data rows.jsonl --model path/of/all-MiniLM-L6-v2

Both get the texts once, in blocks, with nothing remembered from before, and must give the same ids. Processor seconds
are what is compared, of all threads together: tokenising goes on beside the products of a batch before.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.process import runtime  # noqa: E402

runtime.prepare()

from compare import WARM_UP, made_up_texts, passages_of  # noqa: E402

from utils.arguments.scripts import ModelArguments, build  # noqa: E402
from utils.encoding.embed import build_encoders  # noqa: E402
from utils.models.tokenizers import tokenizer as tokenizing  # noqa: E402

_BLOCK = 256


def tokenised(tokenizer: Callable, texts: Sequence[str]) -> tuple[float, list[list[int]]]:
    """Processor seconds, and the ids."""
    started, ids = time.process_time(), []
    for start in range(0, len(texts), _BLOCK):
        ids += tokenizer(texts[start : start + _BLOCK])
    return time.process_time() - started, [list(row) for row in ids]


def main() -> None:
    """Print one line a measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSONL rows whose passages are taken instead of made-up texts")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--model", default="multilingual-e5-small")
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()

    texts = (passages_of(given.data) if given.data else made_up_texts(given.texts))[: given.texts]
    _, encoder = build_encoders(build(ModelArguments, model_path=given.model, max_src_len=given.length))
    filled = [encoder.settings.template.replace("{text}", text) for text in texts]
    tokenizer = tokenizing.load(encoder.model.tokenizer_folder, encoder.max_length, encoder.model.is_torch)
    ours, ids = tokenised(tokenizer, filled)
    alone, expected = tokenised(tokenizer.uncached, filled)
    if ids != expected:
        raise SystemExit("the ids are not the library's")
    encoder.encode(texts[:WARM_UP])
    started = time.process_time()
    encoder.encode(texts)
    whole = time.process_time() - started
    tokens, n = sum(map(len, ids)), len(texts)
    print(f"{n:,} texts of {tokens / n:.0f} tokens, {encoder.description()['dtype']}; per processor second")
    print(f"tokenised                  {n / ours:8,.0f} passages")
    print(f"the library alone          {n / alone:8,.0f} passages ({alone / ours:.1f} times as long)")
    print(f"encoded, tokenised as well {n / whole:8,.0f} passages: {ours / whole:.1%} is tokenising")


if __name__ == "__main__":
    main()
