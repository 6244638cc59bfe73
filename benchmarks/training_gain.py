"""What does training gain, on rows that it has not seen, and what does mining contribute?

    python benchmarks/training_gain.py --data rows.jsonl --output output/gain
    python benchmarks/training_gain.py --data rows.jsonl --untouched other.jsonl --output output/gain -- --max_steps 40
    python benchmarks/training_gain.py --data rows.jsonl more.jsonl --questions --output output/gain-questions

With ``--questions``, the task is made of the rows' questions alone: half of those on a passage are to find the
other half, a task on short texts that the model was not made for, with many answers that are not labelled.

Splits the rows by passage: the first part to train on, the rest held back, with no passage in both. Mines
the first part with the defaults and, for comparison, the common way (the top 2 of the 10 nearest passages
that are no positive). Trains the bundled model on each with the shipped configuration, and prints
NDCG@10 of all three models on what was held back, and on a collection that training has nothing to do
with. p is the paired randomisation test of ``embedding_evaluate.py --compare_with`` against the untrained
model. What follows ``--`` goes to run_embedding.py. What is there already is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "config/multilingual-e5-small/emb_argument.json"
METRIC = "ndcg@10"
MINED = {
    "mined with the defaults": [],
    "top 2 of 10": [
        "--range_for_sampling", "0-10", "--num_negatives", "2", "--relative_margin", "null",
        "--positive_similarity", "null", "--negative_similarity", "null",
    ],
}  # fmt: skip


def split(paths: list[Path], train: Path, held: Path, share: float, questions: bool) -> None:
    """Rows whose passages all are among the first ``share`` of a file's go to ``train``, of the rest to ``held``."""
    parts: dict[Path, list[dict]] = {train: [], held: []}
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        passages = list(dict.fromkeys(passage for row in rows for passage in row["pos_passage"]))
        first = set(passages[: round(share * len(passages))])
        own: dict[Path, list[dict]] = {train: [], held: []}
        for row in rows:
            among = {passage in first for passage in row["pos_passage"]}
            if len(among) == 1:  # a row with passages of both parts would tell one about the other
                own[train if among.pop() else held].append(row)
        for part, kept in own.items():
            parts[part] += of_questions(kept) if questions else kept
    for part, kept in parts.items():
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def of_questions(rows: list[dict]) -> list[dict]:
    """For each question the questions of the other half of its passage's, as positives."""
    by_passage: dict[str, list[str]] = {}
    for row in rows:
        by_passage.setdefault(row["pos_passage"][0], []).append(row["query"])
    made = []
    for queries in map(list, map(dict.fromkeys, by_passage.values())):
        halves = queries[: len(queries) // 2], queries[len(queries) // 2 :]
        for own, others in (halves, halves[::-1]):
            made += [{"query": query, "pos_passage": others} for query in own if others]
    return made


def run(script: str, *arguments: str) -> None:
    """One of the scripts, with its progress on the terminal."""
    print(f"$ {script} {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, cwd=ROOT, stdout=sys.stderr)


def judged(model: str, data: Path, folder: Path, name: str, before: str | None) -> tuple[float, float | None]:
    """The model's metric on a collection, and the p-value of its difference from ``before``."""
    output = folder / f"{name}.jsonl"
    report = Path(f"{output}.report.json")
    if not report.is_file():
        compare = ["--compare_with", before] if before else []
        run(
            "embedding_evaluate.py", "--model_path", model, "--dev_path", str(data), "--output_data_path", str(output),
            *compare,
        )  # fmt: skip
    found = json.loads(report.read_text(encoding="utf-8"))
    p = found["comparison"]["metrics"][METRIC]["p_value"] if before else None
    return found["metrics"][METRIC]["value"], p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL rows of query and pos_passage")
    parser.add_argument("--questions", action="store_true", help="questions are to find each other")
    parser.add_argument("--untouched", type=Path, help="rows of another collection, only judged")
    parser.add_argument("--output", type=Path, default=Path("output/gain"), help="a folder for everything")
    parser.add_argument("--share", type=float, default=0.6, help="of the passages that are trained on")
    parser.add_argument("training", nargs="*", help="after --: arguments of run_embedding.py")
    given = parser.parse_args()

    folder = given.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train, held = folder / "train.jsonl", folder / "held_back.jsonl"
    split(given.data, train, held, given.share, given.questions)
    models = {"untrained": "multilingual-e5-small"}
    for number, (name, options) in enumerate(MINED.items()):
        mined, model = folder / f"mined-{number}.jsonl", folder / f"model-{number}"
        if not mined.is_file():
            run(
                "mining_negative_samples.py", "--input_data_path", str(train), "--output_data_path", str(mined),
                "--embedding_cache", str(folder / "vectors"), *options,
            )  # fmt: skip
        if not (model / "report.json").is_file():
            run(
                "run_embedding.py", CONFIG, "--dataset_name_or_path", str(mined), "--dev_dataset_path", "null",
                "--evaluation_strategy", "no", "--output_dir", str(model), *given.training,
            )  # fmt: skip
        models[f"trained, {name}"] = str(model)

    collections = {"held back": held} | ({"untouched": given.untouched.resolve()} if given.untouched else {})
    print(f"| {METRIC} | " + " | ".join(collections) + " |\n|---|" + "---|" * len(collections))
    before: dict[str, str] = {}
    for number, (name, model) in enumerate(models.items()):
        cells = []
        for what, data in collections.items():
            value, p = judged(model, data, folder, f"{what.replace(' ', '_')}-{number}", before.get(what))
            cells.append(f"{value:.4f}" + (f" (p = {p:.2g})" if p is not None else ""))
            before.setdefault(what, str(folder / f"{what.replace(' ', '_')}-{number}.jsonl"))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
