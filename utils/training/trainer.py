"""PaddleNLP's Trainer with our gradients, batches, checkpoints and evaluation.

The Trainer gives the loop, the schedule and the optimizer. Checkpoints appear whole, by rename, and hold
all that an interrupted training needs to end as an unbroken one. Imports PaddleNLP: import it where it is needed, and
after ``models.paddlenlp.import_paddlenlp``.
"""

import json
import logging
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import paddle
from paddlenlp.trainer import Trainer, TrainingArguments
from paddlenlp.trainer.trainer_callback import PrinterCallback, TrainerCallback

from ..arguments.training import TrainArguments
from ..files.outputs import described, remove, write_whole
from ..files.report import Progress
from ..models import pdparams
from ..process import interruption
from ..ranks.group import Ranks, through_gloo
from .batches import Loader, TrainingBatch
from .encoder import TrainableEncoder
from .folder import (
    FIT_CURE,
    TEMPORARY,
    WEIGHTS,
    Journal,
    check_fit,
    checkpoint_of,
    is_checkpoint,
    remove_old,
    renamed,
    shapes,
    sizes,
    whole,
)
from .gradients import GradientStep, reduce
from .guard import Guard, Standing
from .losses import LossFunction, Targets
from .saves import Saves

logger = logging.getLogger(__name__)

# A checkpoint's files where weights are frozen: those that are trained, and the digest of the base model of the others.
_TRAINED, _BASE = "trained.pdopt", "base"
# How the optimizer's state calls a weight's first moment.
_MOMENT = "_moment1_0"


class Job(Protocol):
    """What is trained, on what, and what is kept of it.

    ``judged_by`` says what the best checkpoint is the best by: the dev metric, and the digests of the dev rows. It is
    empty where there are none to evaluate.
    """

    given: TrainArguments
    ranks: Ranks
    encoder: TrainableEncoder
    objective: LossFunction
    pad_ids: tuple[int, int]
    judged_by: list[str]
    base_digest: str

    def loader(self) -> Loader:
        """Our part of the batches."""

    def evaluate(self) -> dict[str, float]:
        """The dev metrics of the model as it is now; every rank calls it."""

    def write_model_files(self, folder: Path) -> None:
        """The model as it is now, as a folder that can be loaded."""


class EmbeddingTrainer(Trainer):
    """PaddleNLP's Trainer of a job whose model is loaded."""

    def __init__(self, job: Job, arguments: TrainingArguments):
        self.job, self.given, self.ranks = job, job.given, job.ranks
        self._saves = Saves(job.ranks, job.given)
        super().__init__(
            model=job.encoder.model, args=arguments, train_dataset=job.loader().dataset, callbacks=[_Watch(self._saves)]
        )
        self.remove_callback(PrinterCallback)
        self.final_metrics: dict[str, float] = {}
        self._evaluated_at, self._rate, self._share = -1, 0.0, 1.0
        self._guard = Guard(job.given.accumulated)
        self._standing = Standing(job.judged_by)
        given = job.given
        self._journal = Journal(Path(given.output_dir) / "training.jsonl")
        self.step = GradientStep(
            job.encoder,
            job.objective,
            Targets(given.group_size, None, given.embedding_temperature, given.margin),
            job.pad_ids,
            given.seed,
            given.chunk_size,
            job.ranks.rank,
            given.shares_negatives,
            self.autocast_smart_context_manager,
            self._scaled,
        )  # fmt: skip

    def _scaled(self, loss):
        loss = loss * self._share
        return self.scaler.scale(loss) if self.do_grad_scaling else loss

    def run(self, resume: str | None) -> None:
        """Train, from a checkpoint on if one is given; a training that had ended is not gone on with."""
        step, standing, ended = self.ranks.broadcast_object(self.ranks.on_first(lambda: self._begin(resume)))
        if not ended:
            if self.job.judged_by and resume is None:
                self._note_where_it_began()
            until = "this step ends, and its checkpoint is saved"
            with through_gloo(), interruption.put_off(until):  # the Trainer has collectives of its own
                self._train_from(resume)
            return
        logger.info("%s: the training had ended there", resume)
        self._load_from_checkpoint(resume)
        self._agree(self.model)
        self.state.global_step = step
        self._take_over(standing)

    def _train_from(self, resume: str | None) -> None:
        try:
            self.train(resume_from_checkpoint=resume)
        except AssertionError as error:
            if resume is None or "Optimizer set error" not in str(error):
                raise
            # Only the first step tells which weights take part.
            raise ValueError(
                f"{resume}: weights were frozen in its training that are trained now; {FIT_CURE}"
            ) from None

    def _note_where_it_began(self) -> None:
        """The dev metrics of the base model: what training is to better."""
        self._standing.before = found = self.job.evaluate()
        logger.info("before training: %s %.4f", self.job.judged_by[0], found[self.job.judged_by[0]])
        logs = {f"eval_{name}": value for name, value in found.items()}
        self.ranks.on_first(lambda: self._journal.add(0, logs, shown=False))

    def _begin(self, resume: str | None) -> tuple[int, dict, bool]:
        """Cut the journal. Of what is gone on from: step, standing, and whether the training had ended there."""
        step, standing, ended = 0, {}, False
        if resume is not None:
            with whole(resume):
                step = json.loads((Path(resume) / "trainer_state.json").read_text())["global_step"]
                standing = json.loads((Path(resume) / "standing.json").read_text())
                before = Standing.of(standing, self.job.judged_by)
                ended = before.ends(self.given.early_stopping_patience) or 0 < self.args.max_steps <= step
        goes_on_here = resume is not None and os.path.samefile(Path(resume).parent, self.given.output_dir)
        self._journal.cut(step if goes_on_here else None)
        return step, standing, ended

    def _take_over(self, standing: dict) -> None:
        """A checkpoint's standing. A best step whose checkpoint is not in output_dir cannot be ended with."""
        self._standing = Standing.of(standing, self.job.judged_by)
        if standing["best_step"] is not None and self._standing.best_step is None:
            logger.info("the best so far was found on other dev rows, or by another metric: it does not count")
        best = self._standing.best_step
        is_here = self.ranks.broadcast_object(best is None or is_checkpoint(checkpoint_of(self.given.output_dir, best)))
        if self.given.load_best_model_at_end and not is_here:
            logger.info("step %d was the best so far, but is not in %s: the best from here on counts",
                        best, self.given.output_dir)  # fmt: skip
            self._standing.best = self._standing.best_step = None

    @property
    def first_metrics(self) -> dict[str, float]:
        """The dev metrics before the first step, with which ``final_metrics`` can be compared; empty if not known."""
        return self._standing.before

    def mean_loss(self) -> float:
        """Over all batches whose loss was a number, of a resumed training too."""
        return self._standing.loss_sum / max(1, self._standing.n_losses)

    def get_train_dataloader(self) -> Loader:
        return self.job.loader()

    def _wrap_model(self, model, training=True):
        # Gradients are summed over ranks by hand, once an update; the ranks need only start alike.
        self._agree(model)
        return model

    def _agree(self, model) -> None:
        """Rank 0's weights on every rank."""
        if self.ranks.size > 1:
            with through_gloo():
                for tensor in model.state_dict().values():
                    paddle.distributed.broadcast(tensor, src=0)

    def training_step(self, model, inputs, step_control=0):
        """The gradients of a step's batches, and their mean loss."""
        model.train()
        self._rate, self._share = self._get_learning_rate(), 1 / len(inputs)
        return paddle.to_tensor(sum(map(self._add_gradients, inputs)), "float32")

    def _add_gradients(self, batch: TrainingBatch) -> float:
        """A batch's part of the step's mean loss."""
        outcome = self.step(batch).over(self.ranks)
        step = self.state.global_step + 1
        warming_up = step <= self.args.get_warmup_steps(self.state.max_steps)
        self.ranks.on_first(
            lambda: self._guard.check(step, outcome.loss, outcome.mean_cosine, warming_up, self.do_grad_scaling)
        )
        if not math.isfinite(outcome.loss):
            # The Trainer adds up losses, and what is added to NaN stays NaN. It divides by the steps less these.
            self._skip_steps_since_last_logged += self._share
            self._skip_global_steps += self._share
            return 0.0
        self._standing.loss_sum += outcome.loss
        self._standing.n_losses += 1
        return outcome.loss * self._share

    def create_scheduler(self, num_training_steps: int):
        """The Trainer's, whose warm-up begins with a step at rate 0: that one gets half of the second's rate."""
        scheduler = super().create_scheduler(num_training_steps)
        theirs = scheduler.lr_lambda

        def share(step: int) -> float:
            if step >= num_training_steps:  # asked for after the last step, where some divide by 0
                return 0.0
            return theirs(step) or (step == 0 and (share(1) or 1) / 2)

        scheduler.lr_lambda = share
        scheduler.step(0)
        return scheduler

    def evaluate(self, *args, **kwargs):
        self.final_metrics = self.job.evaluate()
        self._evaluated_at = self.state.global_step
        logs = {f"eval_{name}": value for name, value in self.final_metrics.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._standing.note(self.final_metrics[self.job.judged_by[0]], self.state.global_step)
        if self.given.load_best_model_at_end and self._standing.best_step == self.state.global_step:
            self._saves.keep(self.control)  # the best may come at a step that save_steps passes over
        if self._standing.ends(self.given.early_stopping_patience):
            logger.info(
                "stopping early: no better %s in %d evaluations", self.job.judged_by[0], self._standing.without_gain
            )
            self.control.should_training_stop = True
        self._saves.ask(self.control)
        return logs

    def finish(self) -> None:
        """The best weights if they are asked for, and their metrics."""
        best = self._standing.best_step
        if self.given.load_best_model_at_end and best not in (None, self.state.global_step):
            self._load_weights(str(checkpoint_of(self.given.output_dir, best)))
            self._agree(self.model)
            logger.info("the best checkpoint is that of step %d", best)
            self._evaluated_at = -1
        if self.job.judged_by and self._evaluated_at != self.state.global_step:
            self.final_metrics = self.job.evaluate()
        name = self.job.judged_by[0] if self.job.judged_by else ""
        if name in self.first_metrics and self.final_metrics[name] < self.first_metrics[name]:
            logger.warning(
                "warning: the dev rows' passages are found worse than before training: %s %.4f -> %.4f; a lower"
                " learning_rate, fewer epochs, load_best_model_at_end, or negatives that are no answers can help",
                name, self.first_metrics[name], self.final_metrics[name],
            )  # fmt: skip

    def _load_rng_state(self, checkpoint):
        """Nothing to load: every random draw is seeded by its place in the training."""

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        if resume_from_checkpoint:
            self._load_weights(resume_from_checkpoint)

    def _load_weights(self, folder: str) -> None:
        """Of a checkpoint, on rank 0: those that are trained if some are frozen, else everything.

        Raises:
            ValueError: they are damaged, or another model's.
        """
        self.ranks.on_first(lambda: self._read_weights(Path(folder)))

    def _read_weights(self, folder: Path) -> None:
        is_part, trained = (folder / _TRAINED).is_file(), self._trained()
        path = folder / (_TRAINED if is_part else WEIGHTS)
        with whole(folder):
            state = pdparams.read_state(path)
            base = (folder / _BASE).read_text() if is_part else self.job.base_digest
        if self.given.lora != any(map(_is_adapter, state)):
            raise ValueError(f"{folder}: its training was with{'out' * self.given.lora} lora; {FIT_CURE}")
        if is_part and trained is None:
            raise ValueError(f"{folder}: weights were frozen in its training; {FIT_CURE}")
        if base != self.job.base_digest:
            raise ValueError(f"{folder}: its frozen weights are another base model's; {FIT_CURE}")
        check_fit(path, shapes(state), shapes(trained if is_part else self.model.state_dict()), "weight")
        self.model.set_state_dict(state)

    def _trained(self) -> dict | None:
        """The weights that are trained; None if all are."""
        parameters = dict(self.model.named_parameters())
        trained = {name: value for name, value in parameters.items() if not value.stop_gradient}
        return trained if len(trained) < len(parameters) else None

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return

        def load():
            folder = Path(checkpoint)
            names = ["optimizer", "scheduler"] + ["scaler"] * (folder / "scaler.pdopt").is_file()
            with whole(checkpoint):
                found = {name: pdparams.read_state(folder / f"{name}.pdopt") for name in names}
                standing = json.loads((folder / "standing.json").read_text())
            self._check_moments(folder / "optimizer.pdopt", found["optimizer"])
            return found | {"standing": standing}

        states = self.ranks.broadcast_object(self.ranks.on_first(load))
        names = {name: parameter.name for name, parameter in self.model.named_parameters()}
        self.optimizer.set_state_dict(renamed(states["optimizer"], names))
        self.lr_scheduler.set_state_dict(states["scheduler"])
        self._take_over(states["standing"])
        if self.do_grad_scaling and "scaler" in states:
            self.scaler.load_state_dict(states["scaler"])

    def _check_moments(self, path: Path, optimizer: dict) -> None:
        """They must be those of weights that are trained."""
        moments = {
            key.removesuffix(_MOMENT).removesuffix("_fp32_master_0"): value
            for key, value in optimizer.items()
            if key.endswith(_MOMENT)
        }
        trained = {name: value for name, value in self.model.named_parameters() if not value.stop_gradient}
        if moments:  # weights that take no part, such as a pooler's, have none
            trained = {name: value for name, value in trained.items() if name in moments}
        check_fit(path, shapes(moments), shapes(trained), "state of a trained weight")

    def _save_checkpoint(self, model, metrics=None):
        self.ranks.on_first(self._write_checkpoint)
        self._saves.done()

    def _write_checkpoint(self) -> None:
        """The whole state of the training, in a folder that appears by rename."""
        final = checkpoint_of(self.given.output_dir, self.state.global_step)
        work = final.with_name(final.name + ".work")
        try:
            remove(work)
            work.mkdir()
            if (trained := self._trained()) is None:
                self.job.write_model_files(work)
            else:
                paddle.save(trained, str(work / _TRAINED))
                write_whole(work / _BASE, self.job.base_digest.encode())
            names = {parameter.name: name for name, parameter in self.model.named_parameters()}
            paddle.save(renamed(self.optimizer.state_dict(), names), str(work / "optimizer.pdopt"))
            paddle.save(self.lr_scheduler.state_dict(), str(work / "scheduler.pdopt"))
            if self.do_grad_scaling:
                paddle.save(self.scaler.state_dict(), str(work / "scaler.pdopt"))
            write_whole(work / "standing.json", json.dumps(asdict(self._standing)).encode())
            if self._saves.is_temporary:
                (work / TEMPORARY).touch()
            self.state.save_to_json(str(work / "trainer_state.json"))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(work, final)
            logger.info("saved %s: %s", final.name, sizes(final))
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise described(error, f"{final}: cannot write the checkpoint") from None
        remove_old(self.given.output_dir, self.given.save_total_limit, self._standing.best_step)

    def log(self, logs, **kwargs):
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss()  # the Trainer's counts nothing from before a resume
        if "learning_rate" in logs:
            logs["learning_rate"] = float(self._rate)  # of the step that was done; the Trainer's is the next one's
        super().log(logs, **kwargs)
        self.ranks.on_first(lambda: self._journal.add(self.state.global_step, logs))


class _Watch(TrainerCallback):
    """What must happen at certain points of the Trainer's loop."""

    def __init__(self, saves: Saves):
        self._saves = saves

    def on_epoch_begin(self, args, state, control, **kwargs):
        loader = kwargs["train_dataloader"]
        loader.set_epoch(*divmod(state.global_step, len(loader)))

    def on_optimizer_begin(self, args, state, control, **kwargs):
        reduce(kwargs["model"].parameters())

    def on_train_begin(self, args, state, control, **kwargs):
        self._progress = Progress("training", state.max_steps, "steps", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.update(1)
        if state.global_step in (1, state.max_steps):
            control.should_log = True  # where it began and ended, however long logging_steps are
        steps = len(kwargs["train_dataloader"])
        self._saves.ask(control, state.global_step % steps == 0 or state.global_step >= state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._saves.end_epoch(control)

    def on_train_end(self, args, state, control, **kwargs):
        self._progress.close()


def _is_adapter(name: str) -> bool:
    return "lora_" in name
