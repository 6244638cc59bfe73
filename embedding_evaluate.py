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

from utils import arguments, runtime
from utils.arguments import EvaluateArguments


class Embedding_Evaluation:
    """One evaluation job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        dev_path: JSONL rows of ``query`` and ``pos_passage``, or a BEIR folder; default: toy_data.
        neg_path: JSONL rows of ``neg_passage``, more passages for the corpus.
        template, dimension, max_src_len, normalize, dtype: options, in the order of PaddleNLP's example, which calls
            the two paths ``query_pos_passage_path`` and ``neg_passage_path``; those names are taken, too.
        options: any other field of ``utils.arguments.EvaluateArguments``.

    Raises:
        utils.arguments.ArgumentError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        model_path: str = arguments.DEFAULT_MODEL,
        tokenizer_path: str | None = None,
        dev_path: str | None = None,
        neg_path: str | None = None,
        template: str | None = None,
        dimension: int | list[int] | None = None,
        max_src_len: int | None = None,
        normalize: bool | None = None,
        dtype: str | None = None,
        **options,
    ) -> None:
        self.arguments = arguments.build(
            EvaluateArguments,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            dev_path=dev_path,
            neg_path=neg_path,
            template=template,
            dimension=dimension,
            max_src_len=max_src_len,
            normalize=normalize,
            dtype=dtype,
            **options,
        )

    def evaluate(self):
        """Evaluate, write the outputs, print the summary, and return ``{"hit_rate@10": ...}``, the same on every rank.

        The dictionary is a ``utils.evaluation.EvaluationResult``, whose ``report`` holds the intervals and
        all else. With several dimensions it holds the values at the largest one.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from utils import evaluation

        result = evaluation.evaluate(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result


def main() -> None:
    runtime.prepare()
    given = arguments.parse(EvaluateArguments, sys.argv[1:], "Evaluate an embedding model at retrieval.")
    from utils import evaluation, report

    report.set_up_logging()
    result = evaluation.evaluate(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
