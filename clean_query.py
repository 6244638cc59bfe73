"""Remove near-duplicate queries from a JSONL file by a cosine threshold.

    python clean_query.py                                        # toy_data
    python clean_query.py config/clean_query.json --similarity_threshold 0.8
    python -m paddle.distributed.launch --nproc_per_node 2 clean_query.py config/clean_query.json
    python -m paddle.distributed.launch --devices 0,1,2,3 clean_query.py config/clean_query.json

Rows are taken in file order; a row is removed when its query's cosine with some kept row's reaches
``similarity_threshold``. Writes the kept rows, ``<output>.removed.jsonl`` and ``<output>.report.json``.
"""

import sys

from utils import arguments, runtime
from utils.arguments import CleanArguments


class Clean_Query:
    """One cleaning job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        input_data_path, output_data_path: what to read and write; None for toy_data.
        template, dimension, max_src_len, normalize, dtype, similarity_threshold: options, in the order of PaddleNLP's
            example.
        options: any other field of ``utils.arguments.CleanArguments``.

    Raises:
        utils.arguments.ArgumentError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        model_path: str = arguments.DEFAULT_MODEL,
        tokenizer_path: str | None = None,
        input_data_path: str | None = None,
        output_data_path: str | None = None,
        template: str | None = None,
        dimension: int | None = None,
        max_src_len: int | None = None,
        normalize: bool | None = None,
        dtype: str | None = None,
        similarity_threshold: float | None = None,
        **options,
    ) -> None:
        self.arguments = arguments.build(
            CleanArguments,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            input_data_path=input_data_path,
            output_data_path=output_data_path,
            template=template,
            dimension=dimension,
            max_src_len=max_src_len,
            normalize=normalize,
            dtype=dtype,
            similarity_threshold=similarity_threshold,
            **options,
        )

    def clean(self):
        """Clean, write the outputs, print the summary; returns a ``cleaning_result.CleaningResult`` on every rank.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from utils import cleaning

        result = cleaning.clean(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result


def main() -> None:
    runtime.prepare()
    given = arguments.parse(CleanArguments, sys.argv[1:], "Remove near-duplicate queries.")
    from utils import cleaning, report

    report.set_up_logging()
    result = cleaning.clean(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
