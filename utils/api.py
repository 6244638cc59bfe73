"""The scripts' classes: one job each, its options as keywords.

A project with a ``utils`` of its own installs the toolkit (``pip install --no-deps .``) and imports them from
``paddle_embedding_toolkit``.
"""

from .arguments import scripts
from .arguments.scripts import CleanArguments, EvaluateArguments, MiningArguments
from .process import runtime


class Clean_Query:
    """One cleaning job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        input_data_path, output_data_path: what to read and write; None for toy_data.
        template, dimension, max_src_len, normalize, dtype, similarity_threshold: options, in the order of PaddleNLP's
            example.
        options: any other field of ``arguments.scripts.CleanArguments``.

    Raises:
        utils.arguments.fields.ArgumentError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        model_path: str = scripts.DEFAULT_MODEL,
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
        self.arguments = scripts.build(
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
        """Clean, write the outputs, print the summary; returns a ``cleaning.result.CleaningResult`` on every rank.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from .cleaning import job

        result = job.clean(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result


class MiningNegativeSamples:
    """One mining job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        input_data_path, output_data_path: what to read and write; None for toy_data.
        template, dimension, max_src_len, normalize, dtype: options, in the order of PaddleNLP's example.
        options: any other field of ``arguments.scripts.MiningArguments``.

    Raises:
        utils.arguments.fields.ArgumentError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        model_path: str = scripts.DEFAULT_MODEL,
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
        self.arguments = scripts.build(
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
        """Mine, write the outputs, print the summary; returns a ``mining.result.MiningResult`` on every rank.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from .mining import job

        result = job.mine(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result


class Embedding_Evaluation:
    """One evaluation job.

    Args:
        model_path: the bundled model's name, a local folder, or a hub name.
        tokenizer_path: the tokenizer's folder or hub name, if it differs.
        dev_path: JSONL rows of ``query`` and ``pos_passage``, or a BEIR folder; default: toy_data.
        neg_path: JSONL rows of ``neg_passage``, more passages for the corpus.
        template, dimension, max_src_len, normalize, dtype: options, in the order of PaddleNLP's example, which calls
            the two paths ``query_pos_passage_path`` and ``neg_passage_path``; those names are taken, too.
        options: any other field of ``arguments.scripts.EvaluateArguments``.

    Raises:
        utils.arguments.fields.ArgumentError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        model_path: str = scripts.DEFAULT_MODEL,
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
        self.arguments = scripts.build(
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

        The dictionary is a ``evaluation.job.EvaluationResult``, whose ``report`` holds the intervals and
        all else. With several dimensions it holds the values at the largest one.

        Raises:
            OSError, ValueError: an input or output that cannot be used; nothing is written then.
        """
        runtime.prepare()
        from .evaluation import job

        result = job.evaluate(self.arguments)
        if runtime.rank() == 0:
            runtime.tell(result.summary())
        return result
