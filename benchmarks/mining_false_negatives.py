"""How many false negatives do mining rules keep? Plants unlabelled copies of positives and counts.

    python benchmarks/mining_false_negatives.py
    python benchmarks/mining_false_negatives.py data.jsonl corpus.jsonl output/vectors 200

The arguments: a JSONL file of rows, a JSONL file of more passages (or -), a folder that keeps the
vectors, and how many passages get two copies each.

For some of the file's positives, edited copies are added to the corpus without telling the miner:
sentences in another order, one sentence left out, words replaced, foreign sentences around the text,
or most of the text as another cut of the same article. Each copy answers its passage's queries, so it
is a false negative wherever it is mined. Where queries have several positives, all but the first are
also hidden from the miner, in a second experiment. Prints, for every rule, how many such pairs are
kept, as a share of what "top 2 of 10, own positives excluded" keeps and of all negatives, how many rows
are left with fewer than 5 negatives, and with how many negatives all rows are left.
"""

import dataclasses
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.process import runtime  # noqa: E402

runtime.prepare()

import numpy as np  # noqa: E402

from utils.arguments.scripts import MiningArguments, build  # noqa: E402
from utils.encoding.embed import build_encoders, embed  # noqa: E402
from utils.files.ragged import Ragged  # noqa: E402
from utils.mining import margins  # noqa: E402
from utils.mining import rules as negatives  # noqa: E402
from utils.mining.inputs import Inputs  # noqa: E402
from utils.mining.problem import Problem  # noqa: E402
from utils.mining.sampling import choose  # noqa: E402
from utils.mining.tiers import Rankings  # noqa: E402
from utils.ranks.group import Ranks  # noqa: E402
from utils.search.exact import ExactIndex  # noqa: E402

_SENTENCE = re.compile(r"[^。！？；!?;.\n]+[。！？；!?;.\n]*\s*")
# Words of much the same meaning, Chinese (both scripts) and English.
_SYNONYMS = {
    "因此": "所以", "但是": "不過", "由於": "因為", "由于": "因为", "开始": "起初", "開始": "起初", "许多": "很多",
    "許多": "很多", "進行": "作", "进行": "作", "位於": "坐落於", "位于": "坐落于", "成為": "變成", "成为": "变成",
    "其中": "當中", "目前": "現在", "主要": "大多", "為了": "為著", "以及": "和", "包括": "包含", "並且": "而且",
    "认为": "觉得", "認為": "覺得", "使用": "採用", "如果": "若", "可以": "能", "需要": "要",
    " is ": " remains ", " are ": " remain ", " and ": " as well as ", " very ": " quite ", " obtained": " found",
    " shown": " seen", " large": " big", " small": " little", " use ": " employ ", " method": " procedure",
    " get ": " obtain ", " with ": " along with ", " problem": " question", " before": " ahead of",
}  # fmt: skip
KINDS = ("reordered", "shortened", "reworded", "extended", "overlapping")


def edited_copy(text: str, kind: str, others: list[str], rng: np.random.Generator) -> str:
    """A text that says much the same as ``text``; ``others`` lends sentences."""
    sentences = _SENTENCE.findall(text) or [text]
    if kind == "reordered" and len(sentences) > 1:
        return "".join(sentences[i] for i in rng.permutation(len(sentences)))
    if kind == "shortened" and len(sentences) > 2:
        gone = rng.integers(len(sentences))
        return "".join(s for i, s in enumerate(sentences) if i != gone)
    if kind == "overlapping" and len(text) > 60:
        cut = int(len(text) * rng.uniform(0.1, 0.25))
        return text[cut:] if rng.random() < 0.5 else text[:-cut]
    if kind == "reworded":
        for word, other in _SYNONYMS.items():
            text = text.replace(word, other)
        return text + " " if len(sentences) < 2 else "".join([*sentences[1:], sentences[0]]).replace("，", ", ")
    foreign = (_SENTENCE.findall(others[rng.integers(len(others))]) or [""])[0]
    return foreign + text


def plant(passages: list[str], everything: list[str], copies: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Copies of each passage, and the number of the passage that each was made from."""
    rng = np.random.default_rng(seed)
    texts, owner = [], []
    for i, passage in enumerate(passages):
        for kind in rng.permutation(KINDS)[:copies]:
            texts.append(edited_copy(passage, kind, everything, rng))
            owner.append(i)
    return texts, owner


def load(data: str, pool: str, n_passages: int) -> tuple[Inputs, list[set[int]]]:
    """The file with planted copies, and for each query the copies that answer it."""
    given = build(MiningArguments, input_data_path=data, candidate_pool=None if pool == "-" else pool)
    inputs = Inputs.read(given)
    rng = np.random.default_rng(1)
    answers = np.unique(inputs.positives.values)
    chosen = np.sort(rng.permutation(answers)[:n_passages])
    copies, owner = plant([inputs.passages[row] for row in chosen], inputs.passages, 2)
    copies_of: dict[int, set[int]] = {}
    for number, text in enumerate(copies):
        copies_of.setdefault(int(chosen[owner[number]]), set()).add(len(inputs.passages))
        inputs.passages.append(text)
    wrong = [
        {copy for row in inputs.positives[query] for copy in copies_of.get(int(row), ())}
        for query in range(len(inputs.queries))
    ]
    return inputs, wrong


def hide(inputs: Inputs) -> tuple[Ragged, Ragged, list[set[int]]]:
    """The positives and the forbidden passages if only each query's first positive were known, and the others."""
    first = [own[:1].tolist() for own in map(inputs.positives.__getitem__, range(len(inputs.queries)))]
    hidden = [set(inputs.positives[query].tolist()) - set(first[query]) for query in range(len(inputs.queries))]
    forbidden = [sorted(set(inputs.forbidden[query].tolist()) - hidden[query]) for query in range(len(inputs.queries))]
    return Ragged.of(first), Ragged.of(forbidden), hidden


def judge(problem: Problem, rankings: Rankings, wrong: list[set[int]]) -> None:
    """Print what every rule keeps of the passages that are wrong for a query."""
    positives = problem.positive_scores()
    measured, about = margins.measure_background(problem, positives)
    everyone = dataclasses.replace(problem, query_of_row=np.arange(len(problem.query_vectors)))
    lowest = problem.positives.lowest(positives)
    auto, _ = margins.measure_margin(everyone, rankings, lowest, negatives.Rules().window[1], measured)
    print(f"{len(problem.query_of_row)} queries with {sum(map(len, wrong))} of them; background {about}")
    print(f"the margin measured: {auto}")

    def mine(background=measured, **options) -> types.SimpleNamespace:
        criteria = negatives.Criteria(problem, positives, negatives.Rules(**options), background)
        rows = choose(criteria, negatives.screen(criteria, rankings)).negatives
        kept = sum(n.row in wrong[query] for query, row in zip(problem.query_of_row, rows, strict=True) for n in row)
        return types.SimpleNamespace(kept=kept, short=sum(len(row) < 5 for row in rows), total=sum(map(len, rows)))

    base = mine(window=(0, 10), parts=(("top", 2),))
    print(f"{'rule':<34} {'kept':>6} {'share':>7} {'of all':>7} {'short':>6} {'negatives':>10}")
    raw = margins.Background(0.0, 0.0, measured.spread)
    rules = [
        (margin, similar, measured)
        for margin in (None, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
        for similar in (None, 0.6, 0.8)
    ]
    found = {"top 2 of 10": base}
    for margin, similar, background in [*rules, (0.05, None, raw)]:
        name = f"margin {margin}, similarity {similar}" + (", raw cosines" if background is raw else "")
        found[name] = mine(background, relative_margin=margin, positive_similarity=similar, negative_similarity=0.9)
    for name, left in found.items():
        share, of_all = left.kept / max(1, base.kept), left.kept / max(1, left.total)
        print(f"{name:<34} {left.kept:>6} {share:>7.1%} {of_all:>7.1%} {left.short:>6} {left.total:>10}")


def main() -> None:
    defaults = [str(ROOT / "toy_data" / "toy_source.json"), "-", "./output/vectors", "200"]
    data, pool, cache, n_passages = [*sys.argv[1:], *defaults[len(sys.argv) - 1 :]]
    inputs, planted = load(data, pool, int(n_passages))
    query_encoder, passage_encoder = build_encoders(build(MiningArguments))
    queries, *_ = embed(query_encoder, inputs.queries, Ranks(), Path(cache), "queries")
    passages, *_ = embed(passage_encoder, inputs.passages, Ranks(), Path(cache), "passages")
    depth = min(50 + int(inputs.forbidden.sizes().max()), len(passages))
    rankings = Rankings.of(ExactIndex(passages.shape[1], vectors=passages).search(queries, depth))
    known_first, forbidden, hidden = hide(inputs)
    for name, known, never, wrong in (
        ("unlabelled copies", inputs.positives, inputs.forbidden, planted),
        ("hidden positives", known_first, forbidden, hidden),
    ):
        concerned = np.array([query for query, passages_of_it in enumerate(wrong) if passages_of_it], np.int64)
        if len(concerned):
            print(name, end=": ")
            judge(Problem(concerned, queries, passages, known, never, len(passages)), rankings, wrong)


if __name__ == "__main__":
    main()
