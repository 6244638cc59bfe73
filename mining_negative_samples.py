"""Mine hard negatives: passages near each query that do not answer it.

    python mining_negative_samples.py                            # toy_data, with the bundled model
    python mining_negative_samples.py config/mining_negative_samples.json --num_negatives 7
    python -m paddle.distributed.launch --nproc_per_node 2 mining_negative_samples.py [config.json] [--name value]
    python -m paddle.distributed.launch --devices 0,1,2,3 mining_negative_samples.py [config.json] [--name value]

Candidates are a query's nearest passages; known positives are never taken, and what comes so near a
positive that it probably answers the query too is dropped. Writes the rows with ``neg_passage`` and
``<output>.report.json``, which counts every drop by its reason.
"""

import sys

from utils import arguments, runtime
from utils.arguments import MiningArguments


class MiningNegativeSamples:
    """One mining job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        input_data_path, output_data_path: what to read and write; None for toy_data.
        template, dimension, max_src_len, normalize, dtype: options, in the order of PaddleNLP's example.
        options: any other field of ``utils.arguments.MiningArguments``.

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
        **options,
    ) -> None:
        self.arguments = arguments.build(
            MiningArguments,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            input_data_path=input_data_path,
            output_data_path=output_data_path,
            template=template,
            dimension=dimension,
            max_src_len=max_src_len,
            normalize=normalize,
            dtype=dtype,
            **options,
        )

    def mining(self):
        """Mine, write the outputs, print the summary; returns a ``utils.mining_result.MiningResult`` on every rank.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from utils import mining

        result = mining.mine(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result


def main() -> None:
    runtime.prepare()
    given = arguments.parse(MiningArguments, sys.argv[1:], "Mine hard negatives for queries with known positives.")
    from utils import mining, report

    report.set_up_logging()
    result = mining.mine(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
