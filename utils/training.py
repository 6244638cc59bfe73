"""The training job: rows in, a model out, on PaddleNLP's Trainer.

The Trainer gives the loop, the schedule and the optimizer. Gradients (``gradients``), batches
(``training_data``), checkpoints that appear whole, and the evaluation are ours.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from utils import checkpoint, engines, export, losses, report, runtime, tokenizing, training_data
from utils.arguments import TrainArguments
from utils.checkpoint import Checkpoint
from utils.dev_evaluation import METRICS, DevSet
from utils.distributed import Ranks
from utils.encoder import Encoder, EncoderSettings
from utils.gradients import GradientStep, reduce
from utils.losses import Targets
from utils.outputs import LOCK_PATIENCE_S, described, take_lock
from utils.paddlenlp_models import import_paddlenlp
from utils.trainable import TrainableEncoder, TrainableEngine, merged_state
from utils.training_data import Collator, Loader, Plan, Preflight, TrainingRows

logger = logging.getLogger(__name__)

# What may differ between a run and the one that it continues.
_FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_total_limit",
    "export_format", "report_to", "logging_dir", "disable_tqdm",
}  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Passages this alike, for so many steps in a row after the warm-up, mean that the model tells nothing apart
# any more. A model that was only pretrained may begin there and leave it; dropout keeps equal texts below 1.
_COLLAPSED_COSINE, _COLLAPSED_STEPS = 0.98, 20
# fp16 steps in a row whose loss is no number; the loss scale halves at each, and cannot go on for ever.
_SKIPPED_STEPS = 20
_UNCUT = 1 << 20


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

    rows: TrainingRows
    base: Checkpoint
    dev: DevSet | None

    @classmethod
    def read(cls, given: TrainArguments) -> "_Inputs":
        files, dev_path = training_data.find_files(given.dataset_name_or_path, given.dev_dataset_path)
        base = checkpoint.resolve(given.model_name_or_path, given.tokenizer_name_or_path)
        needs_scores = losses.get(given.loss_type).needs_scores
        rows = training_data.read(files, given.dataset_weights, given.on_bad_row, needs_scores)
        dims = given.embedding_matryoshka_dims or []
        if dims and max(dims) > base.hidden_size:
            raise ValueError(f"embedding_matryoshka_dims has {max(dims)}; {base.folder} has only {base.hidden_size}")
        dev = None
        if given.evaluation_strategy != "no" and dev_path is not None:
            dev = DevSet.read(dev_path, given.dev_corpus_path, given.on_bad_row)
            logger.info("dev: %s queries, %s passages", f"{len(dev.queries):,}", f"{len(dev.corpus):,}")
        if dev is None and (given.load_best_model_at_end or given.early_stopping_patience):
            raise ValueError("load_best_model_at_end and early_stopping_patience need dev rows; give dev_dataset_path")
        if dev is not None and _metric(given) not in METRICS:
            raise ValueError(f"metric_for_best_model is {_metric(given)!r}; expected one of {', '.join(METRICS)}")
        return cls(rows, base, dev)


def train(given: TrainArguments) -> TrainingResult:
    """Run the whole job; every rank calls it.

    Raises:
        OSError, ValueError: an input or output that cannot be used, or a training that went wrong.
    """
    ranks = Ranks()
    run = report.RunReport("run_embedding", asdict(given))
    with run.stage("read"):
        lock = ranks.start(lambda: _prepare_output(given))
        inputs = ranks.all_agree(lambda: _Inputs.read(given))
    job = _Job(given, ranks, inputs)
    try:
        with run.stage("preflight"):
            found = ranks.all_agree(job.preflight)
            run.counts = {"rows": len(inputs.rows), "rejected": len(inputs.rows.rejected)}
            run.results["preflight"] = found.facts | {"warnings": found.warnings}
        resume = ranks.broadcast_object(ranks.on_first(job.resumed))
        with run.stage("train"):
            trainer = _trainer(job)
            outcome = trainer.train(resume_from_checkpoint=resume)
            trainer.finish()
        with run.stage("write"):
            ranks.on_first(lambda: job.write_model(Path(given.output_dir)))
        metrics = trainer.final_metrics
        run.results |= {"steps": outcome.global_step, "loss": outcome.training_loss, "metrics": metrics}
        ranks.on_first(lambda: _write(Path(given.output_dir) / "report.json", run.to_json()))
        return TrainingResult(
            given.output_dir, outcome.global_step, outcome.training_loss, metrics, run.as_dict()
        )  # fmt: skip
    finally:
        if lock is not None:
            lock.close()


def _prepare_output(given: TrainArguments):
    """Make and lock the output folder."""
    folder = Path(given.output_dir)
    try:
        lock = take_lock(folder, LOCK_PATIENCE_S)
    except OSError as error:
        raise described(error, f"{folder}: cannot write there") from None
    if lock is None:
        raise ValueError(f"{folder}: another run is training there; wait for it or give another output_dir")
    return lock


class _Job:
    """The pieces of a training run, put together from the arguments."""

    def __init__(self, given: TrainArguments, ranks: Ranks, inputs: _Inputs):
        self.given, self.ranks, self.rows, self.base = given, ranks, inputs.rows, inputs.base
        self.dev = inputs.dev
        self.loss = losses.get(given.loss_type)
        self.pooling = given.pooling or self.base.pooling
        self.templates = (
            given.query_template or self.base.query_template,
            given.passage_template or self.base.passage_template,
        )
        longest = self.base.max_length or _UNCUT
        self.limits = (min(given.max_query_len, longest), min(given.max_passage_len, longest))
        self.tokenizers = tuple(tokenizing.load(self.base.tokenizer_folder, limit) for limit in self.limits)
        self.plan = Plan(
            rows=self.rows,
            batch_size=given.per_device_train_batch_size * ranks.size,
            group_size=given.group_size,
            seed=given.seed,
            n_ranks=ranks.size,
            group_by_source=given.group_by_source,
            drop_last=bool(getattr(given, "dataloader_drop_last", None)),
            multiple=given.gradient_accumulation_steps,
        )
        self.collate = Collator(
            self.rows, given.group_size, self.tokenizers, self.templates, ranks.rank, ranks.size,
            given.embedding_negatives_cross_device, self.loss.needs_scores,
        )  # fmt: skip
        self.encoder: TrainableEncoder | None = None

    def preflight(self) -> Preflight:
        """Measure the data, and say what may be wrong with it."""
        uncut = tokenizing.load(self.base.tokenizer_folder, _UNCUT)
        shared = self.given.embedding_negatives_cross_device
        found = training_data.preflight(
            self.plan, (uncut, uncut), self.templates, self.limits, not self.loss.needs_group,
            1 if shared else self.ranks.size,
        )  # fmt: skip
        for message in found.warnings:
            logger.warning("warning: %s", message)
        facts = found.facts
        logger.info(
            "%s rows, %s batches of %d queries an epoch; a query sees %.0f negatives (%.1f pairs masked a batch)",
            f"{len(self.rows):,}", f"{len(self.plan):,}", self.plan.batch_size, facts["negatives_a_query_sees"],
            facts["masked_pairs_a_batch"],
        )  # fmt: skip
        return found

    def evaluate(self) -> dict[str, float]:
        """The dev metrics of the model as it is now."""
        assert self.encoder is not None and self.dev is not None
        engine = TrainableEngine(self.encoder)
        encoders = tuple(
            Encoder(
                self.base,
                EncoderSettings(template, None, limit, self.pooling, self.given.normalize, "float32"),
                engine,
            )
            for template, limit in zip(self.templates, self.limits, strict=True)
        )
        return self.dev.evaluate(encoders, self.ranks)

    def fingerprint(self) -> dict:
        """What makes two runs the same run."""
        kept = {name: value for name, value in asdict(self.given).items() if name not in _FREE_TO_CHANGE}
        return kept | {"data": self.rows.digests, "model": self.base.digest, "ranks": self.ranks.size}

    def resumed(self) -> str | None:
        """The checkpoint to go on from, on rank 0.

        Raises:
            ValueError: the folder holds another run's checkpoints.
        """
        folder = Path(self.given.output_dir)
        for stale in folder.glob("checkpoint-*.work"):
            shutil.rmtree(stale)
        found = sorted((p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)), key=_step_of)
        record = folder / "run.json"
        own = json.loads(json.dumps(self.fingerprint()))
        asked = getattr(self.given, "resume_from_checkpoint", None)
        if asked is not None:
            if not (Path(asked) / "trainer_state.json").is_file():
                raise ValueError(f"{asked}: no checkpoint there; expected a folder such as {folder}/checkpoint-100")
            return asked
        if found and self.given.overwrite_output_dir:
            for path in found:
                shutil.rmtree(path)
            found = []
        if found:
            before = json.loads(record.read_text()) if record.is_file() else {}
            other = sorted(name for name in {*own, *before} if own.get(name) != before.get(name))
            if other:
                raise ValueError(
                    f"{folder}: holds checkpoints of a run with other {', '.join(other[:4])}; give another output_dir, "
                    "or --overwrite_output_dir true"
                )
            logger.info("going on from %s", found[-1])
        _write(record, (json.dumps(own, ensure_ascii=False, indent=2) + "\n").encode())
        return str(found[-1]) if found else None

    def write_model(self, folder: Path) -> None:
        """The model's files, each appearing whole, the weights last."""
        work = folder / "model.work"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            self.write_model_files(work)
            if self.given.export_format == "huggingface":
                self.write_export(work / "huggingface")
                shutil.rmtree(folder / "huggingface", ignore_errors=True)
            for path in sorted(work.iterdir(), key=lambda p: p.suffix == ".pdparams"):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            work.rmdir()
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise described(error, f"{folder}: cannot write the model") from None

    def write_model_files(self, folder: Path) -> None:
        """Weights in PaddleNLP's form, and all that a loader needs beside them."""
        import paddle

        assert self.encoder is not None
        paddle.save(merged_state(self.encoder.model), str(folder / "model_state.pdparams"))
        self._write_description(folder)

    def write_export(self, folder: Path) -> None:
        """The folder that sentence-transformers loads."""
        assert self.encoder is not None
        folder.mkdir()
        export.write_torch_weights(self.encoder.model, merged_state(self.encoder.model), folder)
        self._write_description(folder)

    def _write_description(self, folder: Path) -> None:
        export.write_config(self.base, folder)
        export.copy_tokenizer(self.base, folder)
        # Not the length trained with: every script here encodes up to 512 tokens unless told otherwise.
        longest = min(self.base.max_length or _UNCUT, max(512, *self.limits))
        export.write_description(folder, self.base, self.pooling, self.given.normalize, self.templates, longest)

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
                logger.info("%s needs a GPU; training in float32", name)
                options[name] = False
        if options.pop("sharding", None) and self.ranks.size > 1:
            logger.info("sharding saves memory only and is not used: every rank keeps the whole optimizer")
        options |= {
            "do_train": True, "device": engines.device(), "disable_tqdm": True, "unified_checkpoint": False,
            "fp16_opt_level": "O1", "recompute": False, "skip_profile_timer": True, "load_best_model_at_end": False,
        }  # fmt: skip
        options.setdefault("report_to", ["visualdl"])
        if self.dev is None:
            options["evaluation_strategy"] = "no"
        return TrainingArguments(**options)


def _trainer(job: _Job):
    """PaddleNLP's Trainer with our gradients, batches, checkpoints and evaluation."""
    import_paddlenlp()
    paddle = runtime.import_paddle()
    from paddlenlp.trainer import Trainer
    from paddlenlp.trainer.trainer_callback import PrinterCallback, TrainerCallback

    given, ranks = job.given, job.ranks
    arguments = job.trainer_arguments()
    paddle.seed(given.seed)
    lora = (given.lora_rank, given.lora_alpha) if given.lora else None
    flash_attention = bool(given.use_flash_attention) and engines.device() == "gpu"
    job.encoder = TrainableEncoder(job.base, job.pooling, given.recompute, flash_attention, lora, given.dropout)
    if given.word_embeddings == "freeze" or given.freeze_layers:
        job.encoder.freeze(given.freeze_layers)

    class EmbeddingTrainer(Trainer):
        def __init__(self) -> None:
            super().__init__(model=job.encoder.model, args=arguments, train_dataset=job.rows, callbacks=[_Watch()])
            self.remove_callback(PrinterCallback)
            self.final_metrics: dict[str, float] = {}
            self._alike = self._skipped = 0
            self._evaluated_at = -1
            self._standing = _Standing()
            self._journal = _Journal(Path(given.output_dir) / "training.jsonl") if ranks.is_first else None
            self.step = GradientStep(
                job.encoder,
                losses.objective(
                    job.loss.function, given.normalize, given.embedding_matryoshka_dims,
                    given.embedding_matryoshka_weights,
                ),
                Targets(given.group_size, None, given.embedding_temperature, given.margin),
                (job.tokenizers[0].pad_id, job.tokenizers[1].pad_id),
                given.seed,
                given.gradcache_chunk_size,
                ranks.rank,
                given.embedding_negatives_cross_device,
                self.autocast_smart_context_manager,
                self._scaled,
            )  # fmt: skip

        def _scaled(self, loss):
            loss = loss / self.args.gradient_accumulation_steps
            return self.scaler.scale(loss) if self.do_grad_scaling else loss

        def get_train_dataloader(self) -> Loader:
            return Loader(job.plan, job.collate)

        def _wrap_model(self, model, training=True):
            # Gradients are summed over ranks by hand, once an update; the ranks need only start alike.
            self._agree(model)
            return model

        def _agree(self, model) -> None:
            """Rank 0's weights on every rank."""
            if ranks.size > 1:
                for tensor in model.state_dict().values():
                    paddle.distributed.broadcast(tensor, src=0)

        def training_step(self, model, inputs, step_control=0):
            model.train()
            outcome = self.step(inputs)
            self._guard(outcome)
            return paddle.to_tensor(outcome.loss / self.args.gradient_accumulation_steps, "float32")

        def _guard(self, outcome) -> None:
            step = self.state.global_step + 1
            if not math.isfinite(outcome.loss):
                self._skipped += 1
                if not self.do_grad_scaling or self._skipped > _SKIPPED_STEPS:
                    raise ValueError(
                        f"the loss is {outcome.loss} at step {step}; lower learning_rate, or train in float32 or bf16"
                    )
                return
            self._skipped = 0
            warming_up = step <= self.args.get_warmup_steps(self.state.max_steps)
            collapsed = outcome.mean_cosine > _COLLAPSED_COSINE and not warming_up
            self._alike = self._alike + 1 if collapsed else 0
            if self._alike >= _COLLAPSED_STEPS:
                raise ValueError(
                    f"the embeddings have collapsed: at step {step} a batch's passages have a mean cosine of "
                    f"{outcome.mean_cosine:.4f} with each other; lower learning_rate or raise embedding_temperature"
                )

        def evaluate(self, *args, **kwargs):
            self.final_metrics = job.evaluate()
            self._evaluated_at = self.state.global_step
            logs = {f"eval_{name}": value for name, value in self.final_metrics.items()}
            self.log(dict(logs))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
            self._standing.note(self.final_metrics[_metric(given)], self.state.global_step)
            if given.early_stopping_patience and self._standing.without_gain >= given.early_stopping_patience:
                logger.info(
                    "stopping early: no better %s in %d evaluations", _metric(given), self._standing.without_gain
                )
                self.control.should_training_stop = True
            return logs

        def finish(self) -> None:
            """The best weights if they are asked for, and their metrics."""
            best = self._standing.best_step
            if given.load_best_model_at_end and best not in (None, self.state.global_step):
                self._load_weights(str(_checkpoint_folder(given, best)))
                self._agree(self.model)
                logger.info("the best checkpoint is that of step %d", best)
                self._evaluated_at = -1
            if job.dev is not None and self._evaluated_at != self.state.global_step:
                self.final_metrics = job.evaluate()

        def _load_rng_state(self, checkpoint):
            """Nothing to load: every random draw is seeded by its place in the training."""

        def _load_from_checkpoint(self, resume_from_checkpoint=None):
            if resume_from_checkpoint:
                self._load_weights(resume_from_checkpoint)

        def _load_weights(self, folder: str) -> None:
            """Of a checkpoint, on rank 0: the adapters if there are any, else everything."""
            if ranks.is_first:
                name = "adapters.pdopt" if given.lora else "model_state.pdparams"
                self.model.set_state_dict(paddle.load(os.path.join(folder, name), return_numpy=True))

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is None:
                return

            def load():
                folder = Path(checkpoint)
                return {
                    name: paddle.load(str(folder / f"{name}.pdopt"), return_numpy=True)
                    for name in ("optimizer", "scheduler", "scaler")
                    if (folder / f"{name}.pdopt").is_file()
                } | {"standing": json.loads((folder / "standing.json").read_text())}

            states = ranks.broadcast_object(ranks.on_first(load))
            names = {name: parameter.name for name, parameter in self.model.named_parameters()}
            self.optimizer.set_state_dict(_renamed(states["optimizer"], names))
            self.lr_scheduler.set_state_dict(states["scheduler"])
            self._standing = _Standing(**states["standing"])
            if self.do_grad_scaling and "scaler" in states:
                self.scaler.load_state_dict(states["scaler"])

        def _save_checkpoint(self, model, metrics=None):
            ranks.on_first(self._write_checkpoint)

        def _write_checkpoint(self) -> None:
            """The whole state of the training, in a folder that appears by rename."""
            final = _checkpoint_folder(given, self.state.global_step)
            work = final.with_name(final.name + ".work")
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                job.write_model_files(work)
                names = {parameter.name: name for name, parameter in self.model.named_parameters()}
                paddle.save(_renamed(self.optimizer.state_dict(), names), str(work / "optimizer.pdopt"))
                paddle.save(self.lr_scheduler.state_dict(), str(work / "scheduler.pdopt"))
                if self.do_grad_scaling:
                    paddle.save(self.scaler.state_dict(), str(work / "scaler.pdopt"))
                if given.lora:
                    adapters = {name: value for name, value in self.model.state_dict().items() if "lora_" in name}
                    paddle.save(adapters, str(work / "adapters.pdopt"))
                _write(work / "standing.json", json.dumps(asdict(self._standing)).encode())
                self.state.save_to_json(str(work / "trainer_state.json"))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(work, final)
            except OSError as error:
                shutil.rmtree(work, ignore_errors=True)
                raise described(error, f"{final}: cannot write the checkpoint") from None
            _remove_old(given, self._standing.best_step)

        def log(self, logs, **kwargs):
            super().log(logs, **kwargs)
            if self._journal is not None:
                self._journal.add(self.state.global_step, logs)

    class _Watch(TrainerCallback):
        """What must happen at certain points of the Trainer's loop."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            loader = kwargs["train_dataloader"]
            loader.set_epoch(state.global_step * args.gradient_accumulation_steps // max(1, len(loader)))

        def on_optimizer_begin(self, args, state, control, **kwargs):
            reduce(kwargs["model"].parameters())

    return EmbeddingTrainer()


@dataclass
class _Standing:
    """The best dev metric so far, at which step, and how many evaluations have not bettered it since."""

    best: float | None = None
    best_step: int | None = None
    without_gain: int = 0

    def note(self, value: float, step: int) -> None:
        """An evaluation's metric; higher is better."""
        if self.best is None or value > self.best:
            self.best, self.best_step, self.without_gain = value, step, 0
        else:
            self.without_gain += 1


def _renamed(state: dict, names: dict[str, str]) -> dict:
    """An optimizer's state under other names of the parameters.

    Paddle numbers parameters as they are made in a process (``linear_3.w_0``), which a resumed run may do in
    another order; checkpoints hold the names that the parameters have in their model.
    """
    renamed = {}
    for key, value in state.items():
        owner = next((name for name in names if key.startswith(name + "_")), None)
        renamed[key if owner is None else names[owner] + key[len(owner) :]] = value
    return renamed


def _metric(given: TrainArguments) -> str:
    return (given.metric_for_best_model or METRICS[0]).removeprefix("eval_")


class _Journal:
    """``training.jsonl``: a line for every log of the Trainer, and log lines for people."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, step: int, logs: dict) -> None:
        """One log entry."""
        kept = {"step": step, "time": round(time.time(), 1)}
        kept |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(kept) + "\n")
        shown = {name: kept[name] for name in ("loss", "learning_rate") if name in kept}
        shown |= {name: value for name, value in kept.items() if name.startswith("eval_")}
        if shown:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def _checkpoint_folder(given: TrainArguments, step: int) -> Path:
    return Path(given.output_dir) / f"checkpoint-{step}"


def _step_of(path: Path) -> int:
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove_old(given: TrainArguments, best: int | None) -> None:
    """Keep the newest ``save_total_limit`` checkpoints, and the best one."""
    found = sorted((p for p in Path(given.output_dir).iterdir() if _CHECKPOINT.fullmatch(p.name)), key=_step_of)
    for path in found[: -given.save_total_limit] if given.save_total_limit else []:
        if _step_of(path) != best:
            shutil.rmtree(path)


def _write(path: Path, content: bytes) -> None:
    """A small file, appearing whole."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as error:
        raise described(error, f"{path}: cannot write") from None
