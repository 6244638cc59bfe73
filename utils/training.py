"""The training job: rows in, a model out. The loop is ``trainer``'s."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from utils import checkpoint, engines, export, losses, report, tokenizing, trainer, training_data, training_rows
from utils.batch_plan import Plan
from utils.checkpoint import WEIGHT_PATTERNS, Checkpoint
from utils.dev_evaluation import METRICS, DevSet
from utils.distributed import Ranks
from utils.encoder import Encoder, EncoderSettings
from utils.outputs import LOCK_PATIENCE_S, described, remove, take_lock, write_whole
from utils.paddlenlp_models import import_paddlenlp
from utils.trainable import TrainableEncoder, TrainableEngine, faster_precision, merged_state
from utils.training_arguments import TrainArguments
from utils.training_data import Collator, Preflight
from utils.training_folder import checkpoints, not_leading_to, put_into
from utils.training_rows import TrainingRows

logger = logging.getLogger(__name__)

# What may differ between a run and the one that it continues.
_FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_total_limit",
    "export_format", "report_to", "logging_dir", "disable_tqdm",
}  # fmt: skip
# The key under which a run's record says which checkpoint it was asked to go on from.
_RESUMED = "resume_from_checkpoint"
_UNCUT = 1 << 20
_WEIGHTS = "model_state.pdparams"


@dataclass
class TrainingResult:
    """What a training run did."""

    folder: str
    steps: int
    loss: float
    metrics: dict[str, float]
    report: dict = field(repr=False)

    def summary(self) -> str:
        """A short table for a person."""
        rows = [("steps", f"{self.steps:,}"), ("mean loss", f"{self.loss:.4f}")]
        rows += [(f"dev {name}", f"{value:.4f}") for name, value in self.metrics.items()]
        rows += [("seconds", f"{self.report['seconds']['total']:.1f}")]
        return report.table(rows, f"-> {self.folder}")


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

    @classmethod
    def read(cls, given: TrainArguments) -> "_Inputs":
        files, dev_path = training_rows.find_files(given.dataset_name_or_path, given.dev_dataset_path)
        base = checkpoint.resolve(given.model_name_or_path, given.tokenizer_name_or_path, given.pooling)
        needs_scores = losses.get(given.loss_type).needs_scores
        rows = training_rows.read(files, given.dataset_weights, given.on_bad_row, needs_scores)
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
        if base.hidden_size in dims and not any(given.embedding_matryoshka_weights or [1]):
            raise ValueError("embedding_matryoshka_weights are all 0, the full width's too; expected one above 0")
        dev = None
        if given.evaluation_strategy != "no" and dev_path is not None:
            dev = DevSet.read(dev_path, given.dev_corpus_path, given.on_bad_row)
            logger.info("dev: %s queries, %s passages of %s", f"{len(dev.queries):,}", f"{len(dev.corpus):,}", dev_path)
        if dev is None and (given.load_best_model_at_end or given.early_stopping_patience):
            raise ValueError("load_best_model_at_end and early_stopping_patience need dev rows; give dev_dataset_path")
        metric = trainer.metric(given)
        if dev is not None and metric not in METRICS:
            raise ValueError(f"metric_for_best_model is {metric!r}; expected one of {', '.join(METRICS)}")
        return cls(files, rows, base, dev)


def train(given: TrainArguments) -> TrainingResult:
    """Run the whole job; every rank calls it.

    Raises:
        OSError, ValueError: an input or output that cannot be used, or a training that went wrong.
    """
    ranks = Ranks()
    run = report.RunReport("run_embedding", asdict(given))
    with run.stage("read"):
        lock = ranks.start(lambda: _prepare_output(given))
    try:
        with run.stage("read"):
            inputs = ranks.all_agree(lambda: _Inputs.read(given))
            _agree_on_inputs(ranks, inputs)
        job = Job(given, ranks, inputs)
        with run.stage("preflight"):
            found = ranks.all_agree(job.preflight)
            run.counts = {"rows": len(inputs.rows), "rejected": len(inputs.rows.rejected)}
            run.results["preflight"] = found.facts | {"warnings": found.warnings}
        resume = ranks.broadcast_object(ranks.on_first(job.resumed))
        with run.stage("train"):
            loop = trainer.make(job)
            loop.run(resume)
            loop.finish()
        with run.stage("write"):
            ranks.on_first(lambda: job.write_model(Path(given.output_dir)))
        metrics = loop.final_metrics
        steps, loss = loop.state.global_step, loop.mean_loss()
        run.results |= {"steps": steps, "loss": loss, "metrics": metrics}
        ranks.on_first(lambda: write_whole(Path(given.output_dir) / "report.json", run.to_json()))
        return TrainingResult(given.output_dir, steps, loss, metrics, run.as_dict())
    finally:
        if lock is not None:
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


def _prepare_output(given: TrainArguments):
    """Make and lock the output folder."""
    folder = Path(given.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; expected a folder, or a path for a new one")
    if folder.is_dir():
        if os.path.isdir(given.model_name_or_path) and os.path.samefile(folder, given.model_name_or_path):
            raise ValueError(f"{folder}: is the base model's folder; give another output_dir")
        others = {path.name for kind in WEIGHT_PATTERNS for path in folder.glob(kind)} - {_WEIGHTS}
        if others:
            raise ValueError(
                f"{folder}: holds {min(others)}, which would be loaded in place of what is trained or with it; give"
                " another output_dir"
            )
    try:
        lock = take_lock(folder, LOCK_PATIENCE_S)
    except OSError as error:
        raise described(error, f"{folder}: cannot write there") from None
    if lock is None:
        raise ValueError(f"{folder}: another run is training there; wait for it or give another output_dir")
    return lock


def _differences(own: dict, record: Path, asked: bool) -> list[str]:
    """In which arguments the run that a folder's record tells of is another one.

    Args:
        asked: True if a checkpoint to go on from was asked for; the run goes on as it began where none is.
    """
    before = _read_object(record) if record.is_file() else {}
    names = {*own, *before} - (set() if asked else {_RESUMED})
    return sorted(name for name in names if own.get(name) != before.get(name))


def _read_object(path: Path) -> dict:
    """A JSON object that an earlier run left.

    Raises:
        ValueError: it is something else by now.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise ValueError(f"{path}: is damaged; expected what an earlier run left. Remove its folder, or move it away")


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
        self.dev = inputs.dev
        self.loss = losses.get(given.loss_type)
        self.pooling = given.pooling or self.base.pooling
        self.normalize = self.base.normalize if given.normalize is None else given.normalize
        self.templates = (
            given.query_template or self.base.query_template,
            given.passage_template or self.base.passage_template,
        )
        longest = self.base.max_length or _UNCUT
        self.limits = (min(given.max_query_len, longest), min(given.max_passage_len, longest))
        self.tokenizers = tuple(self._tokenizer(limit) for limit in self.limits)
        self.plan = Plan(
            rows=self.rows,
            batch_size=given.per_device_train_batch_size * ranks.size,
            group_size=given.group_size,
            seed=given.seed,
            n_ranks=ranks.size,
            group_by_source=given.group_by_source,
            hard_batches=given.hard_batches,
            drop_last=bool(getattr(given, "dataloader_drop_last", None)),
            multiple=given.gradient_accumulation_steps,
        )
        self.collate = Collator(
            self.rows, given.group_size, self.tokenizers, self.templates, ranks.rank, ranks.size,
            given.embedding_negatives_cross_device, self.loss.needs_scores,
        )  # fmt: skip
        self.encoder: TrainableEncoder | None = None

    def _tokenizer(self, limit: int) -> tokenizing.Tokenizer:
        return tokenizing.load(self.base.tokenizer_folder, limit, self.base.is_torch)

    def preflight(self) -> Preflight:
        """Measure the data, and say what may be wrong with it."""
        uncut = _Fitting(self._tokenizer(_UNCUT), self.base)
        shared = self.given.embedding_negatives_cross_device
        found = training_data.preflight(
            self.plan, (uncut, uncut), self.templates, self.limits, not self.loss.needs_group,
            1 if shared else self.ranks.size,
        )  # fmt: skip
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

    def fingerprint(self) -> dict:
        """What makes two runs the same run."""
        kept = {name: value for name, value in asdict(self.given).items() if name not in _FREE_TO_CHANGE}
        dev = list(self.dev.digests.values()) if self.dev else None
        return kept | {
            "data": self.rows.digests, "dev_data": dev, "model": self.base.digest, "ranks": self.ranks.size
        }  # fmt: skip

    def judged_by(self) -> list[str]:
        """What the best checkpoint is the best by: the metric, and the digests of the dev rows; empty without any."""
        return [trainer.metric(self.given), *self.dev.digests.values()] if self.dev else []

    def resumed(self) -> str | None:
        """The checkpoint to go on from, on rank 0: this run's last one, or what ``resume_from_checkpoint`` says.

        Raises:
            ValueError: the folder holds checkpoints that are not this run's, or none is there where one was asked for.
        """
        folder = Path(self.given.output_dir)
        for stale in folder.glob("checkpoint-*.work"):
            remove(stale)
        found = checkpoints(self.given.output_dir)
        asked = getattr(self.given, "resume_from_checkpoint", None)
        own = json.loads(json.dumps(self.fingerprint())) | {_RESUMED: asked and os.path.realpath(asked)}
        record = folder / "run.json"
        anew = asked is None and self.given.overwrite_output_dir
        other = _differences(own, record, asked is not None) if found and not anew else []
        if found and not anew and not other:
            logger.info("going on from %s", found[-1])
            return str(found[-1])
        what = f"checkpoints of a run with other {', '.join(other[:4])}"
        if asked is not None:
            found = not_leading_to(asked, found)
            what = f"{', '.join(path.name for path in found)}, not on the way to {asked}"
        if found and not self.given.overwrite_output_dir:
            raise ValueError(f"{folder}: holds {what}; give another output_dir, or --overwrite_output_dir true")
        for path in found:
            logger.info("removing %s, of an earlier run", path)
            remove(path)
        write_whole(record, (json.dumps(own, ensure_ascii=False, indent=2) + "\n").encode())
        return asked

    def check_export(self) -> None:
        """Refuse an export that the model does not allow, before it is trained."""
        assert self.encoder is not None
        if self.given.export_format == "huggingface":
            try:
                export.check_torch_weights(self.encoder.model, self.base)
            except ValueError as error:
                raise ValueError(f"export_format is 'huggingface', but {error}; leave it out") from None

    def write_model(self, folder: Path) -> None:
        """The model's files; then its export, if one is asked for, so that its failure costs no model."""
        # An earlier model may have left its export, and files that this one has not, such as a tokenizer.json.
        with put_into(folder, "the model", ("huggingface", _WEIGHTS, *checkpoint.DESCRIPTION)) as work:
            self.write_model_files(work)
        if self.given.export_format == "huggingface":
            with put_into(folder, "the export") as work:
                self.write_export(work / "huggingface")

    def write_model_files(self, folder: Path) -> None:
        """Weights in PaddleNLP's form, and all that a loader needs beside them."""
        import paddle

        assert self.encoder is not None
        paddle.save(merged_state(self.encoder.model), str(folder / _WEIGHTS))
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
        # Not the length trained with: every script here encodes up to 512 tokens unless told otherwise.
        longest = min(self.base.max_length or _UNCUT, max(512, *self.limits))
        export.write_description(folder, self.base, self.pooling, self.normalize, self.templates, longest)

    def trainer_arguments(self):
        """PaddleNLP's TrainingArguments."""
        import_paddlenlp()
        from paddlenlp.trainer import TrainingArguments

        given, options = self.given, self.given.trainer_options()
        shared = {f.name for f in fields(TrainingArguments)} & {f.name for f in fields(TrainArguments)}
        options = {name: getattr(given, name) for name in shared} | options
        on_gpu = engines.device() == "gpu"
        for name in ("bf16", "fp16"):
            if options.get(name) and not on_gpu:
                options[name] = False  # the Trainer's way is a GPU's
                if name == "fp16" or faster_precision(self.base, "medium") != "medium":
                    logger.info("%s is of no use here; training in float32", name)
        if options.pop("sharding", None) and self.ranks.size > 1:
            logger.info("sharding saves memory only and is not used: every rank keeps the whole optimizer")
        options |= {
            "do_train": True, "device": engines.device(), "disable_tqdm": True, "unified_checkpoint": False,
            "fp16_opt_level": "O1", "recompute": False, "skip_profile_timer": True, "load_best_model_at_end": False,
        }  # fmt: skip
        # The Trainer would do so by itself, after it has counted with the other number, and in a log that is off.
        options["gradient_accumulation_steps"] = min(given.gradient_accumulation_steps, len(self.plan))
        if len(self.plan) < given.gradient_accumulation_steps:
            logger.info("an epoch has %d batches: gradient_accumulation_steps is %d, not %d",
                        len(self.plan), len(self.plan), given.gradient_accumulation_steps)  # fmt: skip
        options.setdefault("report_to", ["visualdl"])
        options["do_eval"] = self.dev is not None  # true alone would make PaddleNLP evaluate every few steps
        if self.dev is None:
            options["evaluation_strategy"] = "no"
        try:
            return TrainingArguments(**options)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            raise ValueError(f"PaddleNLP's Trainer does not take these arguments: {reason}") from error
