"""One training step here and in plain PyTorch, in turns: 16 pairs, queries of 64 tokens, passages of 128.

    python benchmarks/training_step.py --model all-MiniLM-L6-v2/ --torch .venv-bench/bin/python

``--model`` is a BERT checkpoint's folder, ``--torch`` a Python that has torch and transformers. Both sides
take the same token ids (no padding), the same loss (InfoNCE with in-batch negatives, temperature 0.05) and
AdamW over all parameters, with the checkpoint's dropout and without, in float32 and in bfloat16 (``bf16`` here,
autocast there). Each side runs in a process of its own that keeps its memory, and the two take turns, so that
neither gets the quieter moments. Prints the median seconds of each, the ratio, and its range over the rounds.
Without bfloat16 products in the processor, that half is left out, and named.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PAIRS, QUERY_TOKENS, PASSAGE_TOKENS, TEMPERATURE = 16, 64, 128, 0.05
LEARNING_RATE = 2e-5
STEPS = 5


def our_step(model: str, dropout: float | None, bfloat16: bool) -> Callable[[], None]:
    """A function that makes one step of ours."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from utils.process import runtime

    runtime.prepare(trains=True)
    paddle = runtime.import_paddle()
    import numpy as np

    from utils.models import checkpoint
    from utils.training import losses
    from utils.training.batches import TrainingBatch
    from utils.training.encoder import TrainableEncoder
    from utils.training.gradients import GradientStep
    from utils.training.losses import Targets

    base = checkpoint.resolve(model)
    encoder = TrainableEncoder(base, "mean", dropout=dropout, bfloat16=bfloat16)
    encoder.model.train()
    optimizer = paddle.optimizer.AdamW(LEARNING_RATE, parameters=encoder.model.parameters(), weight_decay=0.01)
    objective = losses.objective(losses.get("contrastive").function, True, None)
    step = GradientStep(encoder, objective, Targets(1, temperature=TEMPERATURE), (0, 0), seed=0)
    rng = np.random.default_rng(0)
    queries, passages = (
        rng.integers(1000, base.vocabulary, (PAIRS, tokens)).tolist() for tokens in (QUERY_TOKENS, PASSAGE_TOKENS)
    )
    batch = TrainingBatch(queries, passages, np.zeros((PAIRS, PAIRS), bool), None, [PAIRS], 0)

    def run() -> None:
        step(batch)
        optimizer.step()
        optimizer.clear_grad()

    return run


def torch_step(model: str, dropout: float | None, bfloat16: bool) -> Callable[[], None]:
    """A function that makes one step of plain PyTorch on Hugging Face's model."""
    import torch
    from transformers import AutoModel

    shares = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    network = AutoModel.from_pretrained(model, add_pooling_layer=False, **shares).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    torch.manual_seed(0)
    queries, passages = (
        torch.randint(1000, network.config.vocab_size, (PAIRS, tokens)) for tokens in (QUERY_TOKENS, PASSAGE_TOKENS)
    )

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, bfloat16):
            states = [network(input_ids=ids).last_hidden_state for ids in (queries, passages)]
        vectors = [torch.nn.functional.normalize(state.float().mean(1), dim=1) for state in states]
        scores = vectors[0] @ vectors[1].T / TEMPERATURE
        torch.nn.functional.cross_entropy(scores, torch.arange(PAIRS)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def serve(side: str, model: str, dropout: float | None, bfloat16: bool) -> None:
    """Make ``STEPS`` steps for each line on stdin, and print the fastest one's seconds."""
    step = {"ours": our_step, "torch": torch_step}[side](model, dropout, bfloat16)
    step()
    step()
    for _ in sys.stdin:
        best = float("inf")
        for _ in range(STEPS):
            started = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - started)
        print(json.dumps(best), flush=True)


class Side:
    """One side in its process."""

    def __init__(self, python: str, name: str, model: str, dropout: float | None, bfloat16: bool):
        command = [python, __file__, "--side", name, "--model", model, "--dropout", json.dumps(dropout)]
        command += ["--bfloat16"] if bfloat16 else []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def seconds(self) -> float:
        """Of its fastest step of a round."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[0]} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a BERT checkpoint")
    parser.add_argument("--torch", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", choices=("ours", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--bfloat16", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        serve(given.side, given.model, given.dropout, given.bfloat16)
        return
    if not given.torch:
        parser.error("--torch is needed")
    shares = (None, "the checkpoint's dropout"), (0.0, "no dropout")
    from compare import NO_BFLOAT16, has_bfloat16  # the sides do without

    kinds = (False, True) if has_bfloat16() else (False,)
    for (dropout, what), bfloat16 in itertools.product(shares, kinds):
        sides = (sys.executable, "ours"), (given.torch, "torch")
        ours, torch = (Side(python, name, given.model, dropout, bfloat16) for python, name in sides)
        pairs = [(ours.seconds(), torch.seconds()) for _ in range(given.rounds)]
        ratios = sorted(own / other for own, other in pairs)
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        print(
            f"{what}, {'bf16' if bfloat16 else 'float32'}: ours {medians[0]:.3f} s, torch {medians[1]:.3f} s a step; "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )
        ours.close()
        torch.close()
    if len(kinds) == 1:
        print(f"bf16: {NO_BFLOAT16}")


if __name__ == "__main__":
    main()
