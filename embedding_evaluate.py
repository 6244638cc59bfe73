"""Evaluate an embedding model at retrieval: hit rate, MRR, NDCG and more, with confidence intervals.

    python embedding_evaluate.py                                 # toy_data, with the bundled model
    python embedding_evaluate.py config/embedding_evaluate.json --k_values 10,100 --metrics ndcg,recall
    python embedding_evaluate.py --dev_path BEIR_FOLDER --split test --compare_with OTHER_MODEL
    python -m paddle.distributed.launch --nproc_per_node 2 embedding_evaluate.py config/embedding_evaluate.json
    python -m paddle.distributed.launch --devices 0,1,2,3 embedding_evaluate.py config/embedding_evaluate.json

Writes each query's values and top passages, and ``<output>.report.json``; ``docs/evaluation.md`` has the
formulae.
"""

import sys

from utils.api import Embedding_Evaluation
from utils.arguments import scripts
from utils.arguments.scripts import EvaluateArguments
from utils.process import runtime

__all__ = ["Embedding_Evaluation", "main"]


def main() -> None:
    runtime.prepare()
    given = scripts.parse(EvaluateArguments, sys.argv[1:], "Evaluate an embedding model at retrieval.")
    from utils.evaluation import job
    from utils.files import report

    report.set_up_logging()
    result = job.evaluate(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
