"""Gradients of one batch, for test_gradients.py: run alone or under the launcher.

    python gradient_worker.py <model folder> <rows.jsonl> <output folder>

Every rank saves its parameters' reduced gradients of each case of ``CASES`` as ``<case>.<n ranks>.<rank>.npz``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.models import checkpoint
from utils.models.tokenizers import tokenizer as tokenizing
from utils.process import runtime
from utils.ranks.group import Ranks
from utils.training import batches, losses
from utils.training import rows as training_rows
from utils.training.plan import Plan

BATCH, GROUP = 12, 3


@dataclass(frozen=True)
class Case:
    """A setting under which gradients are taken."""

    loss: str = "contrastive"
    chunk: int | None = None
    dropout: bool = False
    shared: bool = True
    bfloat16: bool = False


CASES = {
    "plain": Case(),
    "cosent": Case(loss="cosent"),
    "symmetric": Case(loss="symmetric"),
    "cached": Case(chunk=2),
    "dropout": Case(chunk=2, dropout=True),
    "alone": Case(shared=False),
}


def gradients(model_folder: str, rows_path: str, case: Case, ranks: Ranks, drop_last_rows: int = 0):
    """Gradients by parameter name, and the loss."""
    import paddle

    from utils.training.encoder import TrainableEncoder
    from utils.training.gradients import GradientStep, reduce
    from utils.training.losses import Targets

    base = checkpoint.resolve(model_folder)
    rows = training_rows.read([rows_path], None, "error", False)
    tokenizer = tokenizing.load(base.tokenizer_folder, 32, base.is_torch)
    plan = Plan(rows, BATCH, GROUP, seed=3)
    templates = ("{text}", "{text}")
    collate = batches.Collator(
        rows, GROUP, (tokenizer, tokenizer), templates, ranks.rank, ranks.size, shared=case.shared
    )
    encoder = TrainableEncoder(base, "mean", bfloat16=case.bfloat16)
    encoder.model.train() if case.dropout else encoder.model.eval()
    step = GradientStep(
        encoder,
        losses.objective(losses.get(case.loss).function, True, [16, 32]),
        Targets(GROUP, temperature=0.1),
        (tokenizer.pad_id, tokenizer.pad_id),
        seed=5,
        chunk_size=case.chunk,
        rank=ranks.rank,
        shared=case.shared,
    )
    batch = plan.epoch(0)[0]
    outcome = step(collate(batch[: len(batch) - drop_last_rows], 0))
    parameters = encoder.model.parameters()
    reduce(parameters)
    named = {name: p.grad.numpy() for name, p in encoder.model.named_parameters() if p.grad is not None}
    assert paddle.isfinite(paddle.to_tensor(outcome.loss))
    return named, outcome.loss


def main() -> None:
    runtime.prepare()
    ranks = Ranks()
    ranks.start(lambda: None)
    model_folder, rows_path, output = sys.argv[1:]
    for name, case in CASES.items():
        for short in (0, 1):  # the second batch gives the ranks different numbers of queries
            named, loss = gradients(model_folder, rows_path, case, ranks, short)
            path = Path(output) / f"{name}.{short}.{ranks.size}.{ranks.rank}.npz"
            np.savez(path, loss=loss, **named)
    ranks.gather_object(None)  # nobody leaves while another still works


if __name__ == "__main__":
    runtime.run(main)
