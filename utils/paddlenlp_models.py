"""PaddleNLP's models and tokenizers, loaded quietly, their failures turned into one clear line."""

import contextlib
import io
import warnings
from pathlib import Path

from utils import runtime
from utils.checkpoint import Checkpoint


def load_model(model: Checkpoint, dtype: str):
    """A checkpoint as PaddleNLP's AutoModel, weights in ``dtype``.

    Raises:
        ValueError: PaddleNLP does not know the model, or its weights do not fit.
    """
    transformers = import_paddlenlp()
    try:
        return transformers.AutoModel.from_pretrained(str(model.folder), convert_from_torch=model.is_torch, dtype=dtype)
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{model.folder}: PaddleNLP cannot load this {model.model_type} model ({reason})") from error


def load_tokenizer(folder: Path):
    """The tokenizer in a folder as PaddleNLP's AutoTokenizer.

    Raises:
        ValueError: PaddleNLP cannot read it.
    """
    transformers = import_paddlenlp()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: PaddleNLP cannot load its tokenizer ({reason})") from error


def import_paddlenlp():
    """``paddlenlp.transformers``, imported without its warnings and with its log on errors only."""
    runtime.import_paddle()
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        from paddlenlp import transformers
        from paddlenlp.utils.log import logger

    logger.set_level("ERROR")
    return transformers
