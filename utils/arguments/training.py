"""What a training can be told: our own arguments, and those of PaddleNLP's Trainer."""

import ast
import dataclasses
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from . import paddlenlp_keys
from .fields import ELSEWHERE, IN_FILES, ArgumentError, nearest, option
from .scripts import DEFAULT_MODEL, LARGEST_SEED, NEW_LINE, POOLINGS

# So often a checkpoint is saved by time, unless it is said otherwise.
_SAVE_MINUTES = 10
LOSS_TYPES = (
    "contrastive", "inf_cl", "symmetric", "triplet", "hinge", "pairwise_logistic", "cosent", "kl", "margin_mse",
)  # fmt: skip
WORD_EMBEDDINGS = ("train", "freeze")
_DATA_PARALLEL = "training is data-parallel"
_WHY = {
    "metrics_output_path": "losses and metrics are in <output_dir>/training.jsonl",
    "ignore_load_lr_and_optim": "a checkpoint is gone on from with its optimizer; else give it as model_name_or_path",
    "ignore_save_lr_and_optim": "a killed training goes on with its optimizer; save_total_limit bounds what is kept",
    "minimum_eval_times": "eval_steps says how often the dev rows are evaluated",
    "do_train": "run_embedding.py trains; embedding_evaluate.py evaluates a model",
    "local_rank": "Paddle's launcher says which worker this is",
}
# Where PaddleNLP's Trainer can report to, and the package that it needs for that.
_REPORTS = {"visualdl": "visualdl", "tensorboard": "tensorboardX", "wandb": "wandb", "autonlp": "ray"}
# The least that PaddleNLP's Trainer understands; it takes what is below for something else, or for nothing.
_LEAST = {
    "warmup_steps": 0, "eval_steps": 0, "per_device_eval_batch_size": 1, "dataloader_num_workers": 0,
    "weight_decay": 0, "max_grad_norm": 0, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "power": 0,
    "lr_end": 0, "num_cycles": 0,
}  # fmt: skip
# Arguments of PaddleNLP's Trainer that this toolkit's data-parallel training cannot honour.
_NOT_SUPPORTED = {
    "count_trained_tokens": (None, False), "local_rank": (None, -1),
    "tensor_parallel_degree": (None, -1, 0, 1), "pipeline_parallel_degree": (None, -1, 0, 1),
    "sep_parallel_degree": (None, -1, 0, 1), "context_parallel_degree": (None, -1, 0, 1),
    "expert_parallel_degree": (None, -1, 0, 1), "to_static": (None, False), "enable_auto_parallel": (None, False),
    "use_expert_parallel": (None, False), "distributed_dataloader": (None, False),
    "offload_optim": (None, False), "do_predict": (None, False), "do_export": (None, False),
    "amp_master_grad": (None, False), "skip_data_intervals": (None,), "label_names": (None,),
    "ignore_data_skip": (None, False), "ignore_load_lr_and_optim": (None, False), "flatten_param_grads": (None, False),
    "ignore_save_lr_and_optim": (None, False), "minimum_eval_times": (None,), "do_train": (None, True),
    "hybrid_parallel_topo_order": (None, "pp_first", "sharding_first"),
    # It leaves a process behind; training.jsonl has the metrics.
    "metrics_output_path": (None,),
}  # fmt: skip


# Words that PaddleNLP's Trainer would take without a look at them.
_EXPECTED = {"fp16_opt_level": "O0|O1|O2", "device": "cpu|gpu|xpu|npu|mlu|gcu|intel_hpu(:[0-9]+)?"}


@dataclass
class TrainArguments:
    """Arguments of run_embedding.py that are this toolkit's own, or whose defaults are, or that it reads.

    ``arguments.training`` adds the others of PaddleNLP's Trainer.
    """

    model_name_or_path: str = option(
        DEFAULT_MODEL,
        "the base model: the bundled one by name, a local folder (PaddleNLP or Hugging Face layout), or a hub name",
    )
    tokenizer_name_or_path: str | None = option(None, "the tokenizer, if it is not in the model's folder")
    dataset_name_or_path: list[str] = option(
        ["./toy_data/toy_source.json"],
        "JSONL files, or folders that hold train.json or train/*.json, and perhaps dev.json or dev/*.json",
    )
    dataset_weights: list[float] | None = option(
        None, "how often an epoch goes through each file, or each of a folder's: 0.5 is a new half of it every epoch;"
        " default: once", above=0.0, at_most=1000.0,
    )  # fmt: skip
    dev_dataset_path: str | None = option(
        None, "the dev rows; default: dev.json or dev/*.json in the first folder that has them"
    )
    dev_corpus_path: str | None = option(None, "more passages for the dev corpus: rows of neg_passage, or of text")
    on_bad_row: str = option(
        "error", "error: stop at the first bad row; skip: leave bad rows out and count them", choices=("error", "skip")
    )
    output_dir: str = option("./output/embedding", "where checkpoints and the trained model go")
    query_template: str | None = option(None, "for queries; default: the model's own prompt, if it has one" + NEW_LINE)
    passage_template: str | None = option(
        None, "for passages; default: the model's own prompt, if it has one" + NEW_LINE
    )
    max_query_len: int = option(64, "longest query in tokens", at_least=4, at_most=1 << 20)
    max_passage_len: int = option(512, "longest passage in tokens", at_least=4, at_most=1 << 20)
    pooling: str | None = option(None, "how token vectors become one; default: as the model says", choices=POOLINGS)
    normalize: bool | None = option(
        None, "train on cosines; false: on dot products, as the model then says; default: as the base model says"
    )
    group_size: int = option(
        2, "passages a query: one positive, the rest hard negatives, drawn anew every epoch", at_least=1
    )
    loss_type: str = option("contrastive", "the loss", choices=LOSS_TYPES)
    embedding_temperature: float = option(0.02, "divides similarities in the loss", above=0.0)
    margin: float = option(0.2, "of the triplet and hinge losses", at_least=0)
    embedding_negatives_cross_device: bool = option(True, "the passages of all ranks are negatives of every query")
    embedding_matryoshka_dims: list[int] | None = option(
        None, "train these leading dimensions as well as the full width, such as 64,128", at_least=1
    )
    embedding_matryoshka_weights: list[float] | None = option(
        None, "weights of the losses over embedding_matryoshka_dims; default: 1 each. The full width has 1 unless it is"
        " among them", at_least=0,
    )  # fmt: skip
    gradcache_chunk_size: int | None = option(
        None, "gradient cache: so many queries (and their passages) in memory at a time; default: the whole batch",
        at_least=1,
    )  # fmt: skip
    group_by_source: bool = option(False, "fill each batch from one file, so that negatives are of the same kind")
    hard_batches: bool = option(
        False, "fill batches with queries whose positives are each other's mined negatives: hard negatives at no cost"
    )
    word_embeddings: str = option("train", "train the word embeddings, or freeze them", choices=WORD_EMBEDDINGS)
    freeze_layers: int = option(
        0, "train neither the embeddings nor this many of the lowest layers: less time and memory", at_least=0
    )
    dropout: float | None = option(
        None,
        "share of values that dropout sets to 0 while training; default: as the model says",
        at_least=0,
        at_most=0.9,
    )
    hidden_dropout_prob: float | None = option(
        None, "PaddleNLP's name of dropout, with attention_probs_dropout_prob", at_least=0, at_most=0.9
    )
    attention_probs_dropout_prob: float | None = option(
        None, "as hidden_dropout_prob, which it equals", at_least=0, at_most=0.9
    )
    decay_steps: int = option(0, "updates after which the learning rate is at its end; 0: all of them", at_least=0)
    per_device_train_batch_size: int = option(32, "queries a rank and step", at_least=1)
    gradient_accumulation_steps: int = option(
        1,
        "batches that make one update: together they are one contrastive batch, through the gradient cache",
        at_least=1,
    )
    plain_accumulation: bool = option(
        False, "gradient_accumulation_steps adds up gradients of batches that are not each other's negatives"
    )
    learning_rate: float = option(3e-5, "the highest learning rate", at_least=0)
    num_train_epochs: float = option(1.0, "how often to go through the data", above=0.0)
    max_steps: int = option(-1, "updates at most; -1: as num_train_epochs says", at_least=-1)
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises", at_least=0, at_most=1)
    evaluation_strategy: str = option("epoch", "when to evaluate the dev rows", choices=("no", "steps", "epoch"))
    save_strategy: str = option("epoch", "when to keep a checkpoint", choices=("no", "steps", "epoch"))
    save_minutes: float | None = option(
        None, "besides, keep a checkpoint every so many minutes, in the last such one's place; 0: none by time;"
        " default: 10, and none where save_strategy is no", at_least=0,
    )  # fmt: skip
    save_total_limit: int | None = option(2, "checkpoints to keep, besides the best one", at_least=1)
    load_best_model_at_end: bool = option(False, "end with the checkpoint of the best dev metric, not the last")
    metric_for_best_model: str | None = option(None, "the dev metric that names the best checkpoint; default: ndcg@10")
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations without a better dev metric", at_least=1
    )
    logging_steps: int = option(10, "log every so many steps", at_least=1, at_most=1 << 31)
    seed: int = option(42, "of shuffling, sampling and dropout", at_least=0, at_most=LARGEST_SEED)
    lora: bool = option(False, "train low-rank adapters only; the saved model has them merged in")
    lora_rank: int = option(8, "of the adapters", at_least=1, at_most=4096)
    lora_alpha: int = option(16, "scale of the adapters", at_least=1)
    recompute: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    export_format: str | None = option(
        None, "huggingface: also write <output_dir>/huggingface for sentence-transformers", choices=("huggingface",)
    )
    overwrite_output_dir: bool = option(False, "start anew, removing an earlier run's checkpoints from output_dir")
    # In PaddleNLP's shipped files, and without effect on an embedding.
    zero_padding: bool | None = option(None, "accepted for PaddleNLP's files; changes nothing here")
    eval_with_do_generation: bool | None = option(None, "accepted for PaddleNLP's files; changes nothing here")
    use_flash_attention: bool | None = option(None, "decoders on GPUs: PaddleNLP's flash attention")
    # Of the Trainer's own, those that are read here too.
    bf16: bool | None = option(None, ELSEWHERE)
    fp16: bool | None = option(None, ELSEWHERE)
    save_steps: int | None = option(None, ELSEWHERE, at_least=0)
    # "none" is a word of its own, which flags would take for null: the default.
    report_to: list[str] | Literal["none"] | None = option(None, ELSEWHERE)
    resume_from_checkpoint: str | None = option(None, ELSEWHERE)
    dataloader_drop_last: bool | None = option(None, ELSEWHERE)

    @property
    def share_of_dropout(self) -> float | None:
        """Instead of the model's own; None leaves it that."""
        return self.hidden_dropout_prob if self.dropout is None else self.dropout

    @property
    def shares_negatives(self) -> bool:
        """Whether the passages of all ranks are negatives of every query; PaddleNLP's inf_cl never has them so."""
        return self.embedding_negatives_cross_device and self.loss_type != "inf_cl"

    @property
    def accumulated(self) -> int:
        """Batches whose gradients are added up before an update."""
        return self.gradient_accumulation_steps if self.plain_accumulation else 1

    @property
    def queries_of_a_rank(self) -> int:
        """Queries of one contrastive batch on each rank."""
        return self.per_device_train_batch_size * (self.gradient_accumulation_steps // self.accumulated)

    @property
    def chunk_size(self) -> int | None:
        """Queries of the gradient cache that are in memory at a time; None for the whole batch."""
        is_cached = self.queries_of_a_rank > self.per_device_train_batch_size
        return self.gradcache_chunk_size or (self.per_device_train_batch_size if is_cached else None)

    @property
    def seconds_between_saves(self) -> float | None:
        """After how long a checkpoint is saved whatever ``save_strategy`` says; None for never."""
        minutes = self.save_minutes
        if minutes is None:
            minutes = 0 if self.save_strategy == "no" else _SAVE_MINUTES
        return 60 * minutes or None

    def check(self) -> None:
        """Rules that tie fields together."""
        files, weights = self.dataset_name_or_path, self.dataset_weights
        if weights is not None and len(weights) != len(files):
            raise ArgumentError(
                f"dataset_weights has {len(weights)} numbers for {len(files)} data sets; expected one each"
            )
        dims, dim_weights = self.embedding_matryoshka_dims, self.embedding_matryoshka_weights
        if dim_weights is not None and len(dim_weights) != len(dims or []):
            raise ArgumentError(
                f"embedding_matryoshka_weights has {len(dim_weights)} numbers; expected as many as "
                f"embedding_matryoshka_dims, {len(dims or [])}"
            )
        if self.loss_type in ("kl", "margin_mse") and self.group_size < 2:
            raise ArgumentError(f"group_size is 1; {self.loss_type} compares passages, so it needs at least 2")
        if self.hidden_dropout_prob != self.attention_probs_dropout_prob or None not in (
            self.dropout, self.hidden_dropout_prob
        ):  # fmt: skip
            raise ArgumentError(
                f"hidden_dropout_prob is {self.hidden_dropout_prob}, attention_probs_dropout_prob is"
                f" {self.attention_probs_dropout_prob} and dropout is {self.dropout}; expected the first two alike, or"
                " dropout alone"
            )
        for name in paddlenlp_keys.KEYS:
            if (refusal := paddlenlp_keys.refusal(name, getattr(self, name, None))) is not None:
                raise ArgumentError(refusal)
        for name, harmless in _NOT_SUPPORTED.items():
            value = getattr(self, name, None)
            if value not in harmless:
                raise ArgumentError(f"{name} is {value!r}; not supported here: {_WHY.get(name, _DATA_PARALLEL)}")
        for name, expected in _EXPECTED.items():
            value = getattr(self, name, None)
            if value is not None and not re.fullmatch(expected, value):
                words = re.sub(r"\(.*", "", expected).replace("|", ", ")
                raise ArgumentError(f"{name} is {value!r}; expected one of {words}{nearest(value, words.split(', '))}")
        if self.max_steps == 0:
            raise ArgumentError("max_steps is 0; expected at least 1, or -1 for as many as num_train_epochs says")
        if self.save_strategy == "steps" and self.save_steps == 0:
            raise ArgumentError("save_steps is 0; expected at least 1, or another save_strategy than 'steps'")
        self._check_reports()
        if self.fp16 and self.bf16:
            raise ArgumentError("fp16 and bf16 are both true; expected one of them")
        needs_dev = self.load_best_model_at_end or self.early_stopping_patience
        if needs_dev and self.evaluation_strategy == "no":
            raise ArgumentError("load_best_model_at_end and early_stopping_patience need an evaluation_strategy")
        if self.load_best_model_at_end and self.save_strategy != self.evaluation_strategy:
            raise ArgumentError(
                f"load_best_model_at_end: evaluation_strategy is {self.evaluation_strategy}, but save_strategy is"
                f" {self.save_strategy}; expected save_strategy {self.evaluation_strategy} too"
            )

    def _check_reports(self) -> None:
        """Whether there is what report_to needs."""
        names = self.report_to or []
        for name in names if names not in (["all"], ["none"], "none") else []:
            if name not in _REPORTS:
                expected = f"'all' or 'none' alone, or some of {', '.join(_REPORTS)}"
                raise ArgumentError(f"report_to holds {name!r}; expected {expected}{nearest(name, _REPORTS)}")
            if importlib.util.find_spec(_REPORTS[name]) is None:
                raise ArgumentError(f"report_to is {name!r}, which needs {_REPORTS[name]}; it is not installed")

    def trainer_options(self) -> dict[str, Any]:
        """What was given of PaddleNLP's own arguments, by name."""
        theirs = [f.name for f in dataclasses.fields(self) if f.metadata["help"] == ELSEWHERE]
        return {name: getattr(self, name) for name in theirs if getattr(self, name) is not None}


def training_arguments() -> type[TrainArguments]:
    """``TrainArguments`` and the arguments of PaddleNLP's Trainer, whose default here is None: PaddleNLP's own.

    They are read from PaddleNLP's source, so that refusing a misspelt name takes no seconds of importing it.
    """
    own = {f.name for f in dataclasses.fields(TrainArguments)}
    fields = [
        (name, hint | None, option(None, ELSEWHERE, at_least=_LEAST.get(name)))
        for name, hint in _trainer_fields().items()
        if name not in own
    ]
    known = own | {name for name, _, _ in fields}
    fields += [
        (name, key.kind | None, option(None, IN_FILES))
        for name, key in paddlenlp_keys.KEYS.items()
        if name not in known
    ]
    return dataclasses.make_dataclass("TrainingArguments", fields, bases=(TrainArguments,))


def _trainer_fields() -> dict[str, Any]:
    """Names and types of the fields of PaddleNLP's TrainingArguments."""
    spec = importlib.util.find_spec("paddlenlp")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("paddlenlp is not installed; training needs it")
    path = os.path.join(spec.submodule_search_locations[0], "trainer", "training_args.py")
    with open(path, encoding="utf-8") as stream:
        tree = ast.parse(stream.read())
    (body,) = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"]
    simple = {"bool": bool, "int": int, "float": float}
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation).removeprefix("Optional[").removesuffix("]")
            listed = kind.startswith("List[")
            fields[node.target.id] = list[str] if listed else simple.get(kind, str)
    return fields
