"""The training job: rows in, a model out. The loop is ``trainer``'s."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..arguments import paddlenlp_keys
from ..arguments.training import TrainArguments
from ..encoding import engines
from ..encoding.encoder import UNCUT, Encoder, EncoderSettings
from ..files import report
from ..files.json_files import as_json
from ..files.jsonl import fold
from ..files.outputs import write_whole
from ..models import checkpoint, pdparams, sentence_transformers_folder
from ..models.checkpoint import Checkpoint
from ..models.tokenizers import tokenizer as tokenizing
from ..process import interruption, runtime
from ..ranks.group import Ranks
from . import batches, export, losses
from . import resume as resuming
from . import rows as training_rows
from .batches import Collator, Loader, Preflight
from .dev import METRICS, DevSet, judging_metric
from .encoder import TrainableEncoder, TrainableEngine, merged_state, multiplies_bfloat16, shares_of_dropout
from .folder import WEIGHTS, put_into
from .plan import Plan
from .rows import TrainingRows
from .trainer_arguments import trainer_arguments

logger = logging.getLogger(__name__)


@dataclass
class TrainingResult:
    """What a training run did."""

    folder: str
    steps: int
    epochs: float
    loss: float
    before: dict[str, float]
    metrics: dict[str, float]
    report: dict = field(repr=False)

    def summary(self) -> str:
        """A short table for a person."""
        rows = [("steps", f"{self.steps:,}"), ("epochs", f"{self.epochs:.3g}"), ("mean loss", f"{self.loss:.4f}")]
        for name, value in self.metrics.items():
            before = f"{self.before[name]:.4f} -> " if name in self.before else ""
            rows.append((f"dev {name}", f"{before}{value:.4f}"))
        rows += [("seconds", f"{self.report['seconds']['total']:.1f}")]
        is_exported = self.report["arguments"]["export_format"] is not None
        exported = ", and for sentence-transformers in huggingface/" if is_exported else ""
        return report.table(rows, f"-> {self.folder}{exported}")

    def __repr__(self) -> str:
        return self.summary()


@dataclass
class _Inputs:
    """What every rank reads and checks before any weight is loaded."""

    files: list[str]
    rows: TrainingRows
    base: Checkpoint
    dev: DevSet | None

    def digests(self) -> dict[str, str]:
        """Of all that was read: the data by path, and the base model, whose path machines may not share."""
        data = dict(zip(self.files, self.rows.digests, strict=True)) | (self.dev.digests if self.dev else {})
        return data | {"model_name_or_path": self.base.digest}

    def fingerprint(self, n_ranks: int) -> dict:
        """What makes two runs with equal arguments the same run."""
        dev = list(self.dev.digests.values()) if self.dev else None
        return {"data": self.rows.digests, "dev_data": dev, "model": self.base.digest, "ranks": n_ranks}

    @classmethod
    def read(cls, given: TrainArguments) -> "_Inputs":
        found = training_rows.find_files(given.dataset_name_or_path, given.dataset_weights, given.dev_dataset_path)
        base = checkpoint.resolve(given.model_name_or_path, given.tokenizer_name_or_path, given.pooling)
        needs_scores = losses.get(given.loss_type).needs_scores
        rows = training_rows.read(found.train, found.weights, given.on_bad_row, needs_scores)
        if given.group_size > len(rows.passages):
            raise ValueError(f"group_size is {given.group_size:,}; the data has only {len(rows.passages):,} passages")
        dims = given.embedding_matryoshka_dims or []
        if dims and max(dims) > base.hidden_size:
            raise ValueError(f"embedding_matryoshka_dims has {max(dims)}; {base.folder} has only {base.hidden_size}")
        n_layers = base.config.get("num_hidden_layers")
        if given.freeze_layers and (n_layers is None or given.freeze_layers >= n_layers):
            raise ValueError(
                f"freeze_layers is {given.freeze_layers}; {base.folder} has only {n_layers} layers to train"
            )
        shares_of_dropout(base, given.share_of_dropout)
        if base.hidden_size in dims and not any(given.embedding_matryoshka_weights or [1]):
            raise ValueError("embedding_matryoshka_weights are all 0, the full width's too; expected one above 0")
        rows.keys.log_prompts()
        rows.keys.log_types()
        if rows.rejected:
            logger.warning(
                "warning: %s bad rows are left out, the first: %s", f"{len(rows.rejected):,}", rows.rejected[0]
            )
        dev = _read_dev(given, found.dev, rows) if given.evaluation_strategy != "no" else None
        if dev is None and (given.load_best_model_at_end or given.early_stopping_patience):
            raise ValueError("load_best_model_at_end and early_stopping_patience need dev rows; give dev_dataset_path")
        metric = judging_metric(given.metric_for_best_model)
        if dev is not None and metric not in METRICS:
            raise ValueError(f"metric_for_best_model is {metric!r}; expected one of {', '.join(METRICS)}")
        return cls(found.train, rows, base, dev)


def _read_dev(given: TrainArguments, paths: list[str], rows: TrainingRows) -> DevSet | None:
    """The dev rows, if there are any, and a word on those that training knows."""
    if not paths:
        logger.info("no dev rows, so nothing is evaluated: give dev_dataset_path, or a folder with dev.json")
        return None
    dev = DevSet.read(paths, given.dev_corpus_path, given.on_bad_row)
    dev.keys.log_prompts()
    dev.keys.log_unused_types()
    logger.info("dev: %s queries, %s passages of %s", f"{len(dev.queries):,}", f"{len(dev.corpus):,}", ", ".join(paths))
    n_known = len({fold(query) for query in dev.queries}.intersection(map(fold, rows.queries)))
    if n_known:
        logger.warning(
            "warning: %s of the %s dev queries are training rows' too, and tell little of what is learnt; "
            "clean_query.py --reference_data_path takes them out",
            f"{n_known:,}", f"{len(dev.queries):,}",
        )  # fmt: skip
    return dev


def train(given: TrainArguments) -> TrainingResult:
    """Run the whole job; every rank calls it.

    Raises:
        OSError, ValueError: an input or output that cannot be used, or a training that went wrong.
    """
    promise = resuming.Promise(given)
    with interruption.promising(promise):
        return _train(given, promise)


def _train(given: TrainArguments, promise: resuming.Promise) -> TrainingResult:
    ranks = Ranks()
    run = report.RunReport("run_embedding", asdict(given))
    existed = Path(given.output_dir).exists()
    with run.stage("read"):
        lock = ranks.start(lambda: resuming.take_folder(given))
    try:
        with run.stage("read"):
            inputs = ranks.all_agree(lambda: _Inputs.read(given))
            _agree_on_inputs(ranks, inputs)
        job = Job(given, ranks, inputs)
        with run.stage("preflight"):
            found = ranks.all_agree(job.preflight)
            run.counts = {"rows": len(inputs.rows), "rejected": len(inputs.rows.rejected)}
            run.results["preflight"] = found.facts | {"warnings": found.warnings}
        same = inputs.fingerprint(ranks.size) | job.settled()
        resume = ranks.broadcast_object(ranks.on_first(lambda: resuming.resumed(given, same)))
        promise.is_settled = True
        with run.stage("train"):
            loader = job.loader()
            arguments = trainer_arguments(given, inputs.base, len(loader), ranks.size, inputs.dev is not None)
            job.load()
            from .trainer import EmbeddingTrainer

            loop = EmbeddingTrainer(job, arguments)
            loop.run(resume)
            loop.finish()
        with run.stage("write"):
            ranks.on_first(lambda: job.write_model(Path(given.output_dir)))
        before, metrics = loop.first_metrics, loop.final_metrics
        steps, loss = loop.state.global_step, loop.mean_loss()
        n_rows = loader.rows_in(steps)
        epochs = n_rows / job.plan.n_rows
        run.results |= {
            "steps": steps,
            "rows_trained": n_rows,
            "epochs": epochs,
            "loss": loss,
            "metrics_before": before,
            "metrics": metrics,
            "dev_cut": {side: cut._asdict() for side, cut in inputs.dev.cut.items()} if inputs.dev else {},
        }
        about = run.as_dict()
        ranks.on_first(lambda: write_whole(Path(given.output_dir) / "report.json", as_json(about)))
        return TrainingResult(given.output_dir, steps, epochs, loss, before, metrics, about)
    finally:
        if lock is not None:
            resuming.leave_nothing_else(given, existed)
            lock.close()


def _agree_on_inputs(ranks: Ranks, inputs: _Inputs) -> None:
    """Every rank takes its part of batches that it has planned by itself, so all must have read the same.

    Raises:
        ValueError: a rank has not read what rank 0 has.
    """
    digests = ranks.gather_object(ranks.all_agree(inputs.digests))

    def compare() -> None:
        for rank, own in enumerate(digests):
            other = sorted(name for name in {*own, *digests[0]} if own.get(name) != digests[0].get(name))
            if other:
                raise ValueError(
                    f"{', '.join(other)}: rank {rank} has read other content there than rank 0; expected the same data "
                    "and base model on every machine"
                )

    ranks.on_first(compare)


class _Fitting:
    """A tokenizer, with a check that the model knows what it gives: before any weight is loaded."""

    def __init__(self, tokenizer: tokenizing.Tokenizer, base: Checkpoint):
        self._tokenizer, self._base, self.pad_id = tokenizer, base, tokenizer.pad_id

    def __call__(self, texts):
        tokens = self._tokenizer(texts)
        self._base.check_ids(max(max(ids, default=0) for ids in tokens))
        return tokens


class Job:
    """The pieces of a training run, put together from the arguments."""

    def __init__(self, given: TrainArguments, ranks: Ranks, inputs: _Inputs):
        self.given, self.ranks, self.rows, self.base = given, ranks, inputs.rows, inputs.base
        self.dev, self.base_digest = inputs.dev, inputs.base.digest
        metric = judging_metric(given.metric_for_best_model)
        self.judged_by = [metric, *self.dev.digests.values()] if self.dev else []
        self.loss = losses.get(given.loss_type)
        self.pooling = given.pooling or self.base.pooling
        self.normalize = self.base.normalize if given.normalize is None else given.normalize
        query_template, passage_template = paddlenlp_keys.templates(
            self.base.model_type, self.base.query_template, self.base.passage_template
        )
        self.templates = given.query_template or query_template, given.passage_template or passage_template
        longest = self.base.max_length or UNCUT
        self.limits = (min(given.max_query_len, longest), min(given.max_passage_len, longest))
        self.tokenizers = tuple(self._tokenizer(limit) for limit in self.limits)
        self.pad_ids = tuple(tokenizer.pad_id for tokenizer in self.tokenizers)
        self.plan = Plan(
            rows=self.rows,
            batch_size=given.queries_of_a_rank * ranks.size,
            group_size=given.group_size,
            seed=given.seed,
            n_ranks=ranks.size,
            group_by_source=given.group_by_source,
            hard_batches=given.hard_batches,
            drop_last=bool(given.dataloader_drop_last),
        )
        self.collate = Collator(
            self.rows, given.group_size, self.tokenizers, self.templates, ranks.rank, ranks.size,
            given.shares_negatives, self.loss.needs_scores,
        )  # fmt: skip
        self.objective = losses.objective(
            self.loss.function, self.normalize, given.embedding_matryoshka_dims, given.embedding_matryoshka_weights
        )
        self.encoder: TrainableEncoder | None = None

    def settled(self) -> dict:
        """Arguments by their names, with the base model's own values where none are given."""
        query_template, passage_template = self.templates
        return {
            "pooling": self.pooling, "normalize": self.normalize, "query_template": query_template,
            "passage_template": passage_template,
        }  # fmt: skip

    def _tokenizer(self, limit: int) -> tokenizing.Tokenizer:
        return tokenizing.load(self.base.tokenizer_folder, limit, self.base.is_torch)

    def preflight(self) -> Preflight:
        """Measure the data, and say what may be wrong with it."""
        uncut = _Fitting(self._tokenizer(UNCUT), self.base)
        shared = self.given.shares_negatives
        found = batches.preflight(
            self.plan, (uncut, uncut), self.templates, self.limits, not self.loss.needs_group,
            1 if shared else self.ranks.size,
        )  # fmt: skip
        self._tell_of_paddlenlp()
        for side, template in zip(("query", "passage"), self.templates, strict=True):
            if not sentence_transformers_folder.is_prompt(template):
                found.warnings.append(
                    f"{side}_template {template!r} goes on behind the text; the trained model's folder keeps what comes"
                    " before it only, so give it again when encoding"
                )
        if n := self.plan.n_left_out:
            reason = f"a batch has at least {self.plan.smallest_batch}"
            if self.plan.drop_last:
                reason = f"dataloader_drop_last leaves a last batch of fewer than {self.plan.batch_size} out"
            found.warnings.append(f"{n:,} row{'s are' if n > 1 else ' is'} in no batch of an epoch: {reason}")
        for message in found.warnings:
            logger.warning("warning: %s", message)
        facts = found.facts
        logger.info(
            "%s rows, %s batches of %d queries an epoch; a query sees %g negatives, %.1f of them named in its row "
            "(%.1f pairs masked a batch)",
            f"{len(self.rows):,}", f"{len(self.plan):,}", self.plan.batch_size, facts["negatives_a_query_sees"],
            facts["own_negatives_a_query_sees"], facts["masked_pairs_a_batch"],
        )  # fmt: skip
        return found

    def _tell_of_paddlenlp(self) -> None:
        """What of its files has another effect here than their values say, or none."""
        given, own = self.given, (self.base.query_template, self.base.passage_template)
        if unused := paddlenlp_keys.without_effect(asdict(given)):
            logger.info("without effect here: %s", unused)
        if given.loss_type == "inf_cl":
            logger.info(
                "inf_cl: as in PaddleNLP, embedding_temperature is not used, and no other process's passages are"
                " negatives"
            )
        for side, asked, template, base in zip(
            ("query", "passage"), (given.query_template, given.passage_template), self.templates, own, strict=True
        ):
            if asked is None and template != base:
                logger.info("%s_template is PaddleNLP's for Qwen models: %r", side, template)
            elif self.base.model_type == "qwen2" and template.endswith("{text}"):
                logger.info(
                    "%s texts end where the tokenizer ends them; PaddleNLP would add the end token to a template that"
                    " ends with {text}", side,
                )  # fmt: skip

    def load(self) -> None:
        """Load the base model, to be trained."""
        given = self.given
        runtime.import_paddle().seed(given.seed)
        lora = (given.lora_rank, given.lora_alpha) if given.lora else None
        flash_attention = bool(given.use_flash_attention) and engines.device() == "gpu"
        self.encoder = TrainableEncoder(
            self.base, self.pooling, given.recompute, flash_attention, lora, given.share_of_dropout,
            bool(given.bf16) and multiplies_bfloat16(self.base),
        )  # fmt: skip
        self.ranks.on_first(self._check_export)
        if given.word_embeddings == "freeze" or given.freeze_layers:
            self.encoder.freeze(given.freeze_layers)

    def loader(self) -> Loader:
        """Our part of the batches."""
        return Loader(self.plan, self.collate, self.given.accumulated)

    def evaluate(self) -> dict[str, float]:
        """The dev metrics of the model as it is now."""
        assert self.encoder is not None and self.dev is not None
        engine = TrainableEngine(self.encoder)
        encoders = tuple(
            Encoder(
                self.base,
                EncoderSettings(template, None, limit, self.pooling, self.normalize, "float32"),
                engine,
            )
            for template, limit in zip(self.templates, self.limits, strict=True)
        )
        return self.dev.evaluate(encoders, self.ranks)

    def _check_export(self) -> None:
        """Refuse an export that the model does not allow, before it is trained."""
        assert self.encoder is not None
        if self.given.export_format == "huggingface":
            try:
                export.check_torch_weights(self.encoder.model, self.base)
            except ValueError as error:
                raise ValueError(f"export_format is 'huggingface', but {error}; leave it out") from None

    def write_model(self, folder: Path) -> None:
        """The model's files; then its export, if one is asked for, so that its failure costs no model."""
        # An earlier model may have left files that this one has not, such as a tokenizer.json.
        earlier = [WEIGHTS, *checkpoint.DESCRIPTION]
        with put_into(folder, "the model", earlier) as work:
            self.write_model_files(work)
            export_folder = folder / "huggingface"
            if export_folder.is_dir() and not pdparams.are_equal(work / WEIGHTS, folder / WEIGHTS):
                earlier.insert(0, export_folder.name)
        if self.given.export_format == "huggingface":
            with put_into(folder, "the export") as work:
                self.write_export(work / "huggingface")

    def write_model_files(self, folder: Path) -> None:
        """Weights in PaddleNLP's form, and all that a loader needs beside them."""
        import paddle

        assert self.encoder is not None
        paddle.save(merged_state(self.encoder.model), str(folder / WEIGHTS))
        self._write_description(folder, for_torch=False)

    def write_export(self, folder: Path) -> None:
        """The folder that sentence-transformers loads."""
        assert self.encoder is not None
        folder.mkdir()
        export.write_torch_weights(self.encoder.model, merged_state(self.encoder.model), folder)
        self._write_description(folder, for_torch=True)

    def _write_description(self, folder: Path, for_torch: bool) -> None:
        export.write_config(self.base, folder)
        export.write_tokenizer(self.base, folder, for_torch)
        # The base model's own length, so that both encode alike; longer only if the training was.
        longest = min(self.base.max_length or UNCUT, max(self.base.default_length, *self.limits))
        sentence_transformers_folder.write(
            folder, self.base.hidden_size, self.pooling, self.normalize, self.templates, longest
        )
