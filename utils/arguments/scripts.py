"""What each script can be told: one dataclass a script, its fields documented where they stand.

Training's is in ``arguments.training``.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from .fields import ArgumentError, build, nearest, option, parse

__all__ = ["ArgumentError", "build", "parse"]

# The bundled model's name, which bundled_model.py answers to.
DEFAULT_MODEL = "multilingual-e5-small"
DTYPES = ("auto", "float32", "bfloat16", "float16")
POOLINGS = ("cls", "mean", "last")
# Arguments that name files or folders to read, beside those called so.
_READ = ("candidate_pool", "compare_with")
# Of templates. JSON has it anyway.
NEW_LINE = r"; in a flag, \n is a new line"
# What NumPy and Paddle take alike.
LARGEST_SEED = 2**32 - 1


def input_paths(arguments) -> list[str]:
    """Every file and folder that a run reads: those that the arguments name, and the file that they came from."""
    names = [f.name for f in fields(arguments) if f.name in _READ or f.name.endswith("_path")]
    values = [getattr(arguments, name) for name in names if name != "output_data_path"]
    values += [getattr(arguments, "arguments_path", None)]
    paths = [path for value in values if value for path in (value if isinstance(value, list) else [value])]
    return [path for path in paths if path != DEFAULT_MODEL]


@dataclass
class ModelArguments:
    """Which model turns texts into vectors, and how. Shared by every script that encodes."""

    model_path: str = option(
        DEFAULT_MODEL,
        "the model: the bundled one by name, a local folder (PaddleNLP or Hugging Face layout), or a hub name",
    )
    tokenizer_path: str | None = option(None, "the tokenizer, if it is not in the model's folder")
    template: str | None = option(None, 'for queries and passages alike, such as "query: {text}"' + NEW_LINE)
    query_template: str | None = option(None, "for queries; default: the model's own prompt, if it has one" + NEW_LINE)
    passage_template: str | None = option(
        None, "for passages; default: the model's own prompt, if it has one" + NEW_LINE
    )
    dimension: int | None = option(
        None, "keep this many leading dimensions (Matryoshka); default: the model's width", at_least=1
    )
    max_src_len: int | None = option(
        None, "longest text in tokens, special tokens included; default: as the model says, but not over 512",
        at_least=4, at_most=1 << 20,
    )  # fmt: skip
    pooling: str | None = option(None, "how token vectors become one; default: as the model says", choices=POOLINGS)
    normalize: bool | None = option(
        None, "scale vectors to length 1, so that products are cosines; default: yes, unless the model's folder names"
        " dot products",
    )  # fmt: skip
    dtype: str = option("auto", "arithmetic of the forward pass; auto: the fastest sound one", choices=DTYPES)
    batch_tokens: int | None = option(
        None, "most tokens in a batch, padding included; default: by the device. Part of the result's last bits",
        at_least=64,
    )  # fmt: skip
    embedding_cache: str | None = option(
        None, "a folder that keeps the vectors, so that no run encodes a text again; all scripts can share it"
    )

    @property
    def normalizes_own_vectors(self) -> bool:
        """Whether vectors of the user's own are scaled to length 1: no model says otherwise."""
        return self.normalize is not False


@dataclass
class InputArguments:
    """How rows are read."""

    on_bad_row: str = option(
        "error",
        "error: stop at the first bad row; skip: leave bad rows out and list them in a file",
        choices=("error", "skip"),
    )


@dataclass
class CleanArguments(ModelArguments, InputArguments):
    """Arguments of clean_query.py."""

    input_data_path: str = option("./toy_data/toy_source.json", "the JSONL file to clean")
    output_data_path: str = option("./output/toy_clean.json", "where the kept rows go")
    similarity_threshold: float | None = option(
        None, "a row is removed when its cosine with a kept row reaches this; default: 0.75, or more for a model whose"
        " unrelated queries score that much, and nearly 1 for queries whose answers differ", at_least=-1.0, at_most=1.0,
    )  # fmt: skip
    target_size: int | None = option(
        None, "keep at most this many rows: finds the highest threshold that does, instead of the given one",
        at_least=1,
    )  # fmt: skip
    reference_data_path: str | None = option(
        None, "a JSONL file (a dev or test set): rows that come as close to one of its queries are removed as leaks"
    )
    merge_positives: bool | None = option(
        None, "give a removed row's positives to the row that was kept for it, so that no answer is lost; default: only"
        " those of equal queries, and only where neither similarity_threshold nor target_size is given",
    )  # fmt: skip
    holdout: float | None = option(
        None, "set kept rows aside as a dev set, in <output>.holdout.jsonl: a share of them below 1, or how many; rows "
        "that are near duplicates or have an answer in common stay together", above=0.0,
    )  # fmt: skip
    seed: int = option(0, "of the draw of holdout", at_least=0, at_most=LARGEST_SEED)
    embeddings_path: str | None = option(
        None, "a .npy file of your own vectors, float [rows of the input, dim], instead of a model"
    )

    def check(self) -> None:
        """Rules that tie fields together."""
        if self.holdout is not None and self.holdout >= 1 and not self.holdout.is_integer():
            raise ArgumentError(f"holdout is {self.holdout:g}; expected a share below 1, or a whole number of rows")
        if self.embeddings_path and self.reference_data_path:
            raise ArgumentError("embeddings_path and reference_data_path are both given; a reference needs a model")

    @property
    def protects_answers(self) -> bool:
        """Whether queries must be nearer to each other if their answers differ: where the threshold is measured."""
        return self.similarity_threshold is None and self.target_size is None

    @property
    def merged_reasons(self) -> tuple[str, ...]:
        """For which reasons rows are removed whose positives go to their kept row."""
        if self.merge_positives is None:
            return ("exact",) if self.protects_answers else ()
        return ("exact", "similar") if self.merge_positives else ()


# What a metric may be called; metrics.py holds the formulae.
METRICS = ("hit_rate", "mrr", "ndcg", "recall", "precision", "map")
# So many of each query's passages are looked at, at most.
_DEEPEST = 100_000
_TOY_DEV, _TOY_NEG = "./toy_data/toy_dev.json", "./toy_data/toy_dev_neg.json"


@dataclass
class EvaluateArguments(ModelArguments, InputArguments):
    """Arguments of embedding_evaluate.py. OTHER_NAMES are what PaddleNLP's example calls some of them."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {"query_pos_passage_path": "dev_path", "neg_passage_path": "neg_path"}

    dimension: list[int] | None = option(  # type: ignore[assignment]
        None, "leading dimensions to keep (Matryoshka); several give a curve from one encoding; default: the "
        "model's width", at_least=1,
    )  # fmt: skip
    dev_path: str | None = option(
        None, f"JSONL rows of query and pos_passage, or a BEIR folder; default: {_TOY_DEV} with {_TOY_NEG}"
    )
    neg_path: str | None = option(None, "JSONL rows of neg_passage, or of text and title: more passages for the corpus")
    corpus_path: str | None = option(
        None, "JSONL rows of neg_passage, or of text and perhaps title: the corpus, instead of dev_path's positives"
    )
    split: str | None = option(None, "of a BEIR folder: which qrels/SPLIT.tsv; default: test")
    merge_equal_texts: bool = option(
        False, "count a BEIR folder's passages of equal text as one, with the highest grade; our own rows always are"
    )
    ignore_identical: bool = option(False, "a query does not find the passage that is its own text")
    metrics: list[str] = option(["hit_rate", "mrr", "ndcg"], "what to compute", choices=METRICS)
    k_values: list[int] | None = option(
        None, "cut-offs, for every metric; default: 10,5,3, and for hit_rate 1 too", at_least=1, at_most=_DEEPEST
    )
    output_data_path: str = option(
        "./output/toy_evaluation.jsonl", "where each query's values and top passages go; others are named after it"
    )
    top_passages: int = option(3, "passages to write for each query, best first", at_least=0, at_most=_DEEPEST)
    write_trec: bool = option(False, "write a TREC run and qrels too, for trec_eval and its like")
    compare_with: str | None = option(
        None,
        "a second model, or the per-query file of an earlier evaluation: differences with p-values, by the "
        "metrics that both have",
    )
    lexical: bool = option(False, "judge BM25 instead of a model, Chinese split into words")
    run_path: str | None = option(None, "judge the rankings of a TREC run file instead of a model's")
    n_changes: int = option(10, "queries to list that won most, and that lost most, in a comparison", at_least=0)
    confidence: float = option(0.95, "of the intervals", at_least=0.5, at_most=0.999)
    resamples: int = option(2000, "draws of the bootstrap; the randomisation test takes five times as many",
        at_least=100, at_most=1_000_000,
    )  # fmt: skip
    seed: int = option(0, "of the draws", at_least=0, at_most=LARGEST_SEED)
    query_embeddings_path: str | None = option(
        None, "a .npy file of your own vectors, float [rows of queries, dim], instead of a model"
    )
    passage_embeddings_path: str | None = option(
        None, "the same for the passages, float [passages in reading order, dim]"
    )

    @property
    def judged_split(self) -> str:
        """Of a BEIR folder."""
        return self.split or "test"

    def check(self) -> None:
        """Rules that tie fields together; and toy_data where no data is named."""
        if self.dev_path is None:
            for name in ("neg_path", "corpus_path", "query_embeddings_path", "passage_embeddings_path"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} is given without dev_path; expected the queries too")
            self.dev_path, self.neg_path = _TOY_DEV, _TOY_NEG
        if (self.query_embeddings_path is None) != (self.passage_embeddings_path is None):
            raise ArgumentError("query_embeddings_path and passage_embeddings_path: expected both or neither")
        if self.query_embeddings_path is not None and self.on_bad_row == "skip":
            raise ArgumentError("on_bad_row is 'skip' with your own vectors, which would no longer match the rows")
        self._check_rankings()
        for name in ("metrics", "k_values", "dimension"):
            values = getattr(self, name)
            if values is not None and not values:
                raise ArgumentError(f"{name} is an empty list; expected at least one")
            if values is not None:
                setattr(self, name, list(dict.fromkeys(values)))

    def _check_rankings(self) -> None:
        """What stands in for a model stands alone."""
        if self.lexical and self.run_path is not None:
            raise ArgumentError("lexical and run_path are both given; expected one of them")
        for name in ("query_embeddings_path", "dimension"):
            if self.judges_rankings and getattr(self, name) is not None:
                raise ArgumentError(
                    f"{name} is given with {'lexical' if self.lexical else 'run_path'}, which has no vectors"
                )

    @property
    def judges_rankings(self) -> bool:
        """True if no model is judged, but ``lexical`` or ``run_path``."""
        return self.lexical or self.run_path is not None

    def metric_names(self) -> list[str]:
        """What is computed, such as ``ndcg@10``, in the order of the results."""
        names = []
        for metric in self.metrics:
            cutoffs = self.k_values or ([10, 5, 3, 1] if metric == "hit_rate" else [10, 5, 3])
            names += [f"{metric}@{k}" for k in cutoffs]
        return names


STRATEGIES = ("top", "random", "easy")
EASY_FROM = ("query", "positive")
MARGIN_POSITIVES = ("lowest", "median", "highest")
FORMATS = ("list", "flagembedding", "triplet", "n-tuple", "labeled-list", "context_qa")
_MOST_NEGATIVES = 1_000_000
# What users call the strategies in a mix.
# How many of a query's nearest passages are candidates, where no window is given.
_USUAL_WINDOW = 50
_MIX_NAMES = {"hard": "top", **{name: name for name in STRATEGIES}}


@dataclass
class MiningArguments(ModelArguments, InputArguments):
    """Arguments of mining_negative_samples.py."""

    input_data_path: str = option(
        "./toy_data/toy_source.json",
        "a JSONL file of rows with query and pos_passage (or FlagEmbedding's query and pos), or a BEIR folder",
    )
    output_data_path: str = option("./output/toy_mined.json", "where the rows with their negatives go")
    split: str | None = option(
        None, "of a BEIR folder: which qrels/<split>.tsv; default: train if there, else the only one"
    )
    candidate_pool: str | None = option(
        None, "a JSONL file of more passages to mine from: rows of neg_passage, or of text and title"
    )
    candidate_pool_only: bool = option(False, "mine from candidate_pool alone, not from the rows' positives")
    range_for_sampling: str | None = option(
        None, "which of a query's nearest passages are candidates, counted without its own positives: START-STOP;"
        " default: 0-50, and further, to 800 at most, for queries with too few left"
    )  # fmt: skip
    num_negatives: int | None = option(
        None,
        "negatives a row; default: 15, or what mix adds up to",
        at_least=1,
        at_most=_MOST_NEGATIVES,
    )
    sampling_strategy: str = option(
        "top", "top: the nearest; random: any of the range; easy: the less similar, the likelier", choices=STRATEGIES
    )
    mix: str | None = option(None, 'several strategies at once, such as "hard:10,easy:5" (hard is top)')
    temperature: float = option(
        0.1, "of easy, in units of the positives' mean distance from the background: lower is easier", above=0.0
    )
    easy_from: str = option("query", "what easy is measured from: query, or its nearest positive", choices=EASY_FROM)
    keep_negatives: bool = option(False, "a row's own negatives come first, and the rest is mined; else replace them")
    seed: int = option(0, "of random, easy and backfill", at_least=0, at_most=LARGEST_SEED)
    relative_margin: float | Literal["auto"] | None = option(
        "auto", "drop candidates that score within this share of the way from the query's lowest positive (see"
        " margin_positive) down to the background; auto: 0.25, or less where the scores show that few of those are"
        " answers; null: no such test",
        at_least=0.0, at_most=1.0,
    )  # fmt: skip
    score_baseline: float | None = option(
        None, "the zero of relative_margin and of the similarities; default: the model's own background, measured on"
        " random pairs; 0: raw cosines"
    )  # fmt: skip
    absolute_margin: float | None = option(
        None, "drop candidates that score within this much of the query's lowest positive", at_least=0.0
    )
    margin_positive: str = option(
        "lowest", "which of a query's positives all margins are measured from, where it has several: median or highest"
        " drop fewer candidates", choices=MARGIN_POSITIVES,
    )  # fmt: skip
    max_score: float | None = option(None, "drop candidates that score more")
    min_score: float | None = option(None, "drop candidates that score less")
    positive_similarity: float | None = option(
        0.6, "drop near-copies of a positive: passages this similar to it, 0 as random passages are, 1 identical;"
        " null: no such test", above=0.0, at_most=1.0,
    )  # fmt: skip
    negative_similarity: float | None = option(
        0.9, "drop near-copies of a negative already chosen, on the same scale; null: no such test",
        above=0.0, at_most=1.0,
    )  # fmt: skip
    short_rows: str | None = option(
        None, "rows with too few candidates: keep them with fewer negatives, backfill with random passages (marked), or"
        " drop them into <output>.short.jsonl; default: keep; for other tools' formats, set aside in that file the rows"
        " without any negative (n-tuple: with fewer than num_negatives)", choices=("keep", "backfill", "drop"),
    )  # fmt: skip

    reranker_path: str | None = option(
        None, "a cross-encoder (sequence classification, one logit): a second opinion on the candidates that are left"
    )
    reranker_margin: float = option(
        3.0,
        "with reranker_path: drop candidates whose logit is within this much of the lowest positive's (see"
        " margin_positive)",
    )
    reranker_max_len: int = option(512, "with reranker_path: longest pair in tokens", at_least=8)
    dense: bool = option(True, "candidates are the model's nearest passages; false: only those of run_path or lexical")
    lexical: bool = option(False, "BM25 candidates too, Chinese split into words; fused by reciprocal rank")
    run_path: str | None = option(
        None, "a TREC run file of any search engine: its candidates too, fused by reciprocal rank"
    )
    write_corpus: bool = option(
        False, "write the passages and the queries with their ids, for run_path, and in the order of embeddings_path:"
        " <output>.corpus.jsonl, <output>.queries.jsonl",
    )  # fmt: skip
    index_factory: str | None = option(
        None, 'an approximate faiss index instead of exact search, such as "IVF1024,Flat" or "HNSW32"'
    )
    index_parameters: str | None = option(None, 'of index_factory, such as "nprobe=32" or "efSearch=128"')
    embeddings_path: str | None = option(
        None, "a .npy file of your own vectors of the queries, float [rows of the input, dim], instead of a model"
    )
    passage_embeddings_path: str | None = option(
        None, "with embeddings_path: a .npy file for the passages, float [different passages, dim], in the order of"
        " write_corpus",
    )  # fmt: skip
    output_format: str = option(
        "list", "list: the rows with their own keys, and neg_passage (neg where they have pos); flagembedding: query,"
        " pos, neg, and no row without negatives; triplet, n-tuple, labeled-list: the columns of sentence-transformers;"
        " context_qa: rows of context, question, answer", choices=FORMATS,
    )  # fmt: skip
    output_scores: bool = option(
        False, "write pos_scores and neg_scores (scores, in sentence-transformers' formats): the model's, or with"
        " reranker_path the cross-encoder's logits, which loss_type kl and margin_mse learn from",
    )  # fmt: skip
    answer_key: str = option("answer", "of context_qa: the key of a row's answer, a string or a list of them")
    no_answer_text: str = option(
        "The context does not answer the question.", "of context_qa: the answer to a question on a negative passage"
    )

    @property
    def window(self) -> tuple[int, int]:
        """range_for_sampling as (start, stop)."""
        if self.range_for_sampling is None:
            return 0, max(_USUAL_WINDOW, self.negatives_a_row)
        start, dash, stop = self.range_for_sampling.partition("-")
        if not (dash and start.strip().isdecimal() and stop.strip().isdecimal() and int(start) < int(stop)):
            raise ArgumentError(
                f"range_for_sampling is {self.range_for_sampling!r}; expected START-STOP with START below STOP,"
                ' such as "0-50"'
            )
        return int(start), int(stop)

    @property
    def goes_further(self) -> bool:
        """Whether the windows of queries with too few candidates left become larger."""
        return self.range_for_sampling is None

    @property
    def parts(self) -> list[tuple[str, int]]:
        """How many negatives each strategy gives: mix, or all from sampling_strategy."""
        if self.mix is None:
            return [(self.sampling_strategy, self.num_negatives or 15)]
        parts = []
        for part in self.mix.split(","):
            name, _, count = (word.strip() for word in part.partition(":"))
            if name not in _MIX_NAMES:
                raise ArgumentError(f"mix holds {name!r}; expected {', '.join(_MIX_NAMES)}{nearest(name, _MIX_NAMES)}")
            if not count.isdecimal() or int(count) == 0:
                raise ArgumentError(f'mix holds {part!r}; expected a strategy and a count, such as "hard:10,easy:5"')
            if len(count) > 7 or int(count) > _MOST_NEGATIVES:
                raise ArgumentError(f"mix holds {part!r}; expected at most {_MOST_NEGATIVES:,} negatives")
            parts.append((_MIX_NAMES[name], int(count)))
        return parts

    @property
    def negatives_a_row(self) -> int:
        """How many negatives a full row has."""
        return sum(count for _, count in self.parts)

    @property
    def negatives_needed(self) -> int:
        """With fewer negatives, a row is written to the side file instead."""
        if self.short_rows == "drop":
            return self.negatives_a_row
        if self.short_rows is not None:
            return 0
        # context_qa has a line for each passage, and no reader who misses one.
        return {"list": 0, "context_qa": 0, "n-tuple": self.negatives_a_row}.get(self.output_format, 1)

    def check(self) -> None:
        """Rules that tie fields together."""
        self.window, self.parts  # noqa: B018 - they raise
        if self.mix is not None and self.sampling_strategy != "top":
            raise ArgumentError("mix and sampling_strategy are both given; mix already names the strategies")
        if self.num_negatives is not None and self.num_negatives != self.negatives_a_row:
            raise ArgumentError(f"mix adds up to {self.negatives_a_row}, but num_negatives is {self.num_negatives}")
        if self.easy_from != "query" and "easy" not in dict(self.parts):
            raise ArgumentError(f"easy_from is {self.easy_from!r}, but neither sampling_strategy nor mix has easy")
        if not (self.dense or self.lexical or self.run_path):
            raise ArgumentError("dense is false, and neither lexical nor run_path is given; nothing finds candidates")
        if (self.embeddings_path is None) != (self.passage_embeddings_path is None):
            raise ArgumentError("embeddings_path and passage_embeddings_path go together; one is missing")
        if self.index_parameters and not self.index_factory:
            raise ArgumentError("index_parameters needs index_factory")
        if self.index_factory and not self.dense:
            raise ArgumentError("index_factory is given, but dense is false: there is nothing to search")
        if self.candidate_pool_only and self.candidate_pool is None:
            raise ArgumentError("candidate_pool_only needs candidate_pool")
        if None not in (self.min_score, self.max_score) and self.min_score > self.max_score:
            raise ArgumentError(f"min_score is {self.min_score}, above max_score, which is {self.max_score}")
