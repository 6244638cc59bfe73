"""PaddleNLP's models and tokenizers, loaded quietly, their failures turned into one clear line."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from ..files.outputs import described
from ..process import runtime
from . import pdparams, torch_files

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def new_model(model: "Checkpoint", dtype: str, **config):
    """A model of the checkpoint's configuration, with fresh weights.

    Args:
        config: values that override the checkpoint's configuration.

    Raises:
        ValueError: PaddleNLP does not know the model.
    """
    transformers = import_paddlenlp()
    if model.model_type == "qwen3":
        return _new_qwen3(model, dtype, **config)
    with one_line(f"{model.folder}: PaddleNLP cannot make this {model.model_type} model"):
        return transformers.AutoModel.from_config(
            transformers.AutoConfig.from_pretrained(str(model.folder), **_settled(model), **config), dtype=dtype
        )


def _new_qwen3(model: "Checkpoint", dtype: str, **config):
    from .qwen3 import DEFAULTS, Qwen3Model

    given = {name: value for name, value in model.config.items() if value is not None or name not in DEFAULTS}
    with default_dtype(dtype), one_line(f"{model.folder}: this qwen3 model cannot be made"):
        return Qwen3Model(import_paddlenlp().PretrainedConfig.from_dict(DEFAULTS | given, **config))


@contextlib.contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """Parameters and masks that are made in this block have this type."""
    import paddle

    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


def first_output(output):
    """A model's first tensor: the hidden states, or the logits of one with a head; some models give no other."""
    return output[0] if isinstance(output, list | tuple) else output


def _settled(model: "Checkpoint") -> dict:
    """How fast a decoder's positions are rotated: PaddleNLP looks in one place only, and else assumes a value.

    And ERNIE's task, which may be null for the first.
    """
    rotations = {"rope_theta": model.config["rope_theta"]} if "rope_theta" in model.config else {}
    return rotations | ({} if model.task is None else {"task_id": model.task})


def load_tokenizer(folder: Path):
    """The tokenizer in a folder as PaddleNLP's AutoTokenizer.

    Raises:
        ValueError: PaddleNLP cannot read it.
    """
    transformers = import_paddlenlp()
    with one_line(f"{folder}: PaddleNLP cannot load its tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(str(folder))


@contextlib.contextmanager
def checked_files() -> Iterator[None]:
    """In this block Paddle and PaddleNLP load no file of weights that holds more than tensors, numbers and text."""
    import paddle
    from paddlenlp.transformers import conversion_utils

    def first(check: Callable[[Path], object], load: Callable) -> Callable:
        def checked(path, *args, **kwargs):
            check(Path(path))
            return load(path, *args, **kwargs)

        return checked

    with (
        mock.patch.object(paddle, "load", first(pdparams.read_state, paddle.load)),
        mock.patch.object(conversion_utils, "load_torch", first(torch_files.read, conversion_utils.load_torch)),
    ):
        yield


def download(name: str, weights: Sequence[str]) -> Path:
    """The folder of a model with a hub's name, which PaddleNLP fetches into its own cache unless it is there.

    Args:
        weights: patterns of the names that files of weights have.

    Raises:
        FileNotFoundError: it could not be fetched; the message is the reason alone.
    """
    try:
        transformers = import_paddlenlp()
        from paddlenlp.utils.env import MODEL_HOME

        folder = Path(MODEL_HOME) / name
        if (folder / "config.json").is_file() and any(any(folder.glob(kind)) for kind in weights):
            return folder
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), checked_files():
            transformers.AutoTokenizer.from_pretrained(name)
            transformers.AutoModel.from_pretrained(name)
        if (folder / "config.json").is_file():
            return folder
        reason = f"PaddleNLP left no model in {folder}"
    except Exception as error:  # noqa: BLE001 - PaddleNLP raises whatever its download library does
        reason = _shortened((str(error).strip().splitlines() or [type(error).__name__])[0])
    raise FileNotFoundError(reason)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever PaddleNLP raises becomes a ValueError of one line: what could not be done, and why."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({_shortened(str(error))})") from error


def _shortened(reason: str) -> str:
    """An error's text on one line, not cut within a word."""
    return textwrap.shorten(reason, 300, placeholder=" …")


def import_paddlenlp():
    """``paddlenlp.transformers``, imported without its warnings and with its log on errors only.

    Raises:
        OSError: the folder that PaddleNLP makes for itself when it is imported cannot be made.
    """
    runtime.import_paddle()
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            from paddlenlp import transformers
            from paddlenlp.utils.log import logger
        except OSError as error:
            what = f"PaddleNLP makes {error.filename} for itself; set HOME to a folder that can be written"
            raise described(error, what) from None

    logger.set_level("ERROR")
    # Such as of functions that Paddle will rename: for PaddleNLP's authors, and not for its users.
    warnings.filterwarnings("ignore", module=r"paddlenlp\.")
    return transformers
