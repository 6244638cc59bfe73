"""PaddleNLP's Trainer with our gradients, batches, checkpoints and evaluation.

The Trainer gives the loop, the schedule and the optimizer. Checkpoints appear whole, by rename, and hold
all that an interrupted training needs to end as an unbroken one.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import engines, losses, runtime
from utils.dev_evaluation import METRICS
from utils.distributed import through_gloo
from utils.gradients import GradientStep, reduce
from utils.losses import Targets
from utils.outputs import described, remove, write_whole
from utils.paddlenlp_models import import_paddlenlp
from utils.report import Progress
from utils.trainable import TrainableEncoder, faster_precision
from utils.training_arguments import TrainArguments
from utils.training_data import Loader
from utils.training_folder import Journal, checkpoint_of, is_checkpoint, remove_old

if TYPE_CHECKING:
    from utils.training import Job

logger = logging.getLogger(__name__)

# Passages this alike, for so many steps in a row after the warm-up, mean that the model tells nothing apart
# any more. A model that was only pretrained may begin there and leave it; dropout keeps equal texts below 1.
_COLLAPSED_COSINE, _COLLAPSED_STEPS = 0.98, 20
# fp16 steps in a row whose loss is no number; the loss scale halves at each, and cannot go on for ever.
_SKIPPED_STEPS = 20


def make(job: "Job"):
    """The Trainer of a job, with the model loaded."""
    import_paddlenlp()
    paddle = runtime.import_paddle()
    from paddlenlp.trainer import Trainer
    from paddlenlp.trainer.trainer_callback import PrinterCallback, TrainerCallback

    given, ranks = job.given, job.ranks
    arguments = job.trainer_arguments()
    paddle.seed(given.seed)
    lora = (given.lora_rank, given.lora_alpha) if given.lora else None
    flash_attention = bool(given.use_flash_attention) and engines.device() == "gpu"
    wanted = "medium" if getattr(given, "bf16", None) else given.float32_matmul_precision
    job.encoder = TrainableEncoder(
        job.base, job.pooling, given.recompute, flash_attention, lora, given.dropout,
        faster_precision(job.base, wanted),
    )  # fmt: skip
    ranks.on_first(job.check_export)
    if given.word_embeddings == "freeze" or given.freeze_layers:
        job.encoder.freeze(given.freeze_layers)

    class EmbeddingTrainer(Trainer):
        def __init__(self) -> None:
            super().__init__(model=job.encoder.model, args=arguments, train_dataset=job.rows, callbacks=[_Watch()])
            self.remove_callback(PrinterCallback)
            self.final_metrics: dict[str, float] = {}
            self._alike = self._skipped = 0
            self._evaluated_at = -1
            self._standing = _Standing(job.judged_by())
            self._journal = Journal(Path(given.output_dir) / "training.jsonl")
            self.step = GradientStep(
                job.encoder,
                losses.objective(
                    job.loss.function, job.normalize, given.embedding_matryoshka_dims,
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

        def run(self, resume: str | None) -> None:
            """Train, from a checkpoint on if one is given; a training that had ended is not gone on with."""
            step, standing, ended = ranks.broadcast_object(ranks.on_first(lambda: self._begin(resume)))
            if not ended:
                if job.dev is not None and resume is None:
                    self._note_where_it_began()
                with through_gloo():  # the Trainer has collectives of its own
                    self.train(resume_from_checkpoint=resume)
                return
            logger.info("%s: the training had ended there", resume)
            self._load_from_checkpoint(resume)
            self._agree(self.model)
            self.state.global_step = step
            self._take_over(standing)

        def _note_where_it_began(self) -> None:
            """The dev metrics of the base model: what training is to better."""
            found = job.evaluate()
            logger.info("before training: %s %.4f", metric(given), found[metric(given)])
            logs = {f"eval_{name}": value for name, value in found.items()}
            ranks.on_first(lambda: self._journal.add(0, logs, shown=False))

        def _begin(self, resume: str | None) -> tuple[int, dict, bool]:
            """Cut the journal. Of what is gone on from: step, standing, and whether the training had ended there."""
            step, standing, ended = 0, {}, False
            if resume is not None:
                with _whole(resume):
                    step = json.loads((Path(resume) / "trainer_state.json").read_text())["global_step"]
                    standing = json.loads((Path(resume) / "standing.json").read_text())
                    before = _Standing.of(standing, job.judged_by())
                    ended = before.ends(given.early_stopping_patience) or 0 < self.args.max_steps <= step
            goes_on_here = resume is not None and os.path.samefile(Path(resume).parent, given.output_dir)
            self._journal.cut(step if goes_on_here else None)
            return step, standing, ended

        def _take_over(self, standing: dict) -> None:
            """A checkpoint's standing. A best step whose checkpoint is not in output_dir cannot be ended with."""
            self._standing = _Standing.of(standing, job.judged_by())
            if standing["best_step"] is not None and self._standing.best_step is None:
                logger.info("the best so far was found on other dev rows, or by another metric: it does not count")
            best = self._standing.best_step
            is_here = ranks.broadcast_object(best is None or is_checkpoint(checkpoint_of(given.output_dir, best)))
            if given.load_best_model_at_end and not is_here:
                logger.info("step %d was the best so far, but is not in %s: the best from here on counts",
                            best, given.output_dir)  # fmt: skip
                self._standing.best = self._standing.best_step = None

        def mean_loss(self) -> float:
            """Over all batches whose loss was a number, of a resumed training too."""
            return self._standing.loss_sum / max(1, self._standing.n_losses)

        def get_train_dataloader(self) -> Loader:
            return Loader(job.plan, job.collate)

        def _wrap_model(self, model, training=True):
            # Gradients are summed over ranks by hand, once an update; the ranks need only start alike.
            self._agree(model)
            return model

        def _agree(self, model) -> None:
            """Rank 0's weights on every rank."""
            if ranks.size > 1:
                with through_gloo():
                    for tensor in model.state_dict().values():
                        paddle.distributed.broadcast(tensor, src=0)

        def training_step(self, model, inputs, step_control=0):
            model.train()
            outcome = self.step(inputs).over(ranks)
            ranks.on_first(lambda: self._guard(outcome))
            share = 1 / self.args.gradient_accumulation_steps
            if not math.isfinite(outcome.loss):
                # The Trainer adds up losses, and what is added to NaN stays NaN. It divides by the steps less these.
                self._skip_steps_since_last_logged += share
                self._skip_global_steps += share
                return paddle.zeros([])
            self._standing.loss_sum += outcome.loss
            self._standing.n_losses += 1
            return paddle.to_tensor(outcome.loss * share, "float32")

        def _guard(self, outcome) -> None:
            """End a training that has gone wrong; on rank 0, for all."""
            step, batches_a_step = self.state.global_step + 1, self.args.gradient_accumulation_steps
            if not math.isfinite(outcome.loss):
                self._skipped += 1
                if not self.do_grad_scaling or self._skipped > _SKIPPED_STEPS * batches_a_step:
                    raise ValueError(
                        f"the loss is {outcome.loss} at step {step}; lower learning_rate, or train in float32 or bf16"
                    )
                return
            self._skipped = 0
            warming_up = step <= self.args.get_warmup_steps(self.state.max_steps)
            collapsed = outcome.mean_cosine > _COLLAPSED_COSINE and not warming_up
            self._alike = self._alike + 1 if collapsed else 0
            if self._alike >= _COLLAPSED_STEPS * batches_a_step:
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
            self._standing.note(self.final_metrics[metric(given)], self.state.global_step)
            if given.load_best_model_at_end and self._standing.best_step == self.state.global_step:
                self.control.should_save = True  # the best may come at a step that save_steps passes over
            if self._standing.ends(given.early_stopping_patience):
                logger.info(
                    "stopping early: no better %s in %d evaluations", metric(given), self._standing.without_gain
                )
                self.control.should_training_stop = True
            return logs

        def finish(self) -> None:
            """The best weights if they are asked for, and their metrics."""
            best = self._standing.best_step
            if given.load_best_model_at_end and best not in (None, self.state.global_step):
                self._load_weights(str(checkpoint_of(given.output_dir, best)))
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
                with _whole(folder):
                    self.model.set_state_dict(paddle.load(os.path.join(folder, name), return_numpy=True))

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is None:
                return

            def load():
                folder = Path(checkpoint)
                names = ["optimizer", "scheduler"] + ["scaler"] * (folder / "scaler.pdopt").is_file()
                with _whole(checkpoint):
                    found = {name: paddle.load(str(folder / f"{name}.pdopt"), return_numpy=True) for name in names}
                    return found | {"standing": json.loads((folder / "standing.json").read_text())}

            states = ranks.broadcast_object(ranks.on_first(load))
            names = {name: parameter.name for name, parameter in self.model.named_parameters()}
            self.optimizer.set_state_dict(_renamed(states["optimizer"], names))
            self.lr_scheduler.set_state_dict(states["scheduler"])
            self._take_over(states["standing"])
            if self.do_grad_scaling and "scaler" in states:
                self.scaler.load_state_dict(states["scaler"])

        def _save_checkpoint(self, model, metrics=None):
            ranks.on_first(self._write_checkpoint)

        def _write_checkpoint(self) -> None:
            """The whole state of the training, in a folder that appears by rename."""
            final = checkpoint_of(given.output_dir, self.state.global_step)
            work = final.with_name(final.name + ".work")
            try:
                remove(work)
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
                write_whole(work / "standing.json", json.dumps(asdict(self._standing)).encode())
                self.state.save_to_json(str(work / "trainer_state.json"))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(work, final)
            except OSError as error:
                shutil.rmtree(work, ignore_errors=True)
                raise described(error, f"{final}: cannot write the checkpoint") from None
            remove_old(given.output_dir, given.save_total_limit, self._standing.best_step)

        def log(self, logs, **kwargs):
            if "train_loss" in logs:
                logs["train_loss"] = self.mean_loss()  # the Trainer's counts nothing from before a resume
            super().log(logs, **kwargs)
            ranks.on_first(lambda: self._journal.add(self.state.global_step, logs))

    class _Watch(TrainerCallback):
        """What must happen at certain points of the Trainer's loop."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            loader = kwargs["train_dataloader"]
            epoch, begun = divmod(state.global_step * args.gradient_accumulation_steps, len(loader))
            loader.set_epoch(epoch, begun)

        def on_optimizer_begin(self, args, state, control, **kwargs):
            reduce(kwargs["model"].parameters())

        def on_train_begin(self, args, state, control, **kwargs):
            self._progress = Progress("training", state.max_steps, "steps", state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self._progress.update(1)
            if state.global_step == 1:
                control.should_log = True  # a sign of life, however long logging_steps are

        def on_train_end(self, args, state, control, **kwargs):
            self._progress.close()

    return EmbeddingTrainer()


@contextmanager
def _whole(folder: str | Path) -> Iterator[None]:
    """What goes wrong because a checkpoint is damaged becomes one line about it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise described(error, f"{folder}: cannot be read") from None
        raise ValueError(
            f"{folder}: cannot be read ({type(error).__name__}); the checkpoint is damaged. Remove it to go on from the"
            " one before"
        ) from error


@dataclass
class _Standing:
    """What a training knows about its past: the best dev metric so far, at which step, and how many evaluations have
    not bettered it since; the sum of all batches' losses, and of how many. ``judged_by`` names that metric and the
    dev rows' digests.
    """

    judged_by: list[str]
    best: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    loss_sum: float = 0.0
    n_losses: int = 0

    @classmethod
    def of(cls, values: dict, judged_by: list[str]) -> "_Standing":
        """A checkpoint's; what another metric or other dev rows said cannot be compared, and is left out."""
        found = cls(**values)
        if found.judged_by == judged_by:
            return found
        return cls(judged_by, loss_sum=found.loss_sum, n_losses=found.n_losses)

    def note(self, value: float, step: int) -> None:
        """An evaluation's metric; higher is better."""
        if self.best is None or value > self.best:
            self.best, self.best_step, self.without_gain = value, step, 0
        else:
            self.without_gain += 1

    def ends(self, patience: int | None) -> bool:
        """Whether early stopping ends the training here."""
        return bool(patience) and self.without_gain >= patience


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


def metric(given: TrainArguments) -> str:
    """The dev metric that decides which checkpoint is best."""
    return (given.metric_for_best_model or METRICS[0]).removeprefix("eval_")
