"""What a model's folder says about itself, read without loading the model.

Knows the layouts of Hugging Face, sentence-transformers and PaddleNLP. Only small JSON files are read
here, so that a wrong option is refused before any weight is loaded.
"""

import difflib
import functools
import hashlib
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..files import json_files
from . import bundled, families, sentence_transformers_folder
from .families import DECODERS

logger = logging.getLogger(__name__)

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.pdparams")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "tokenizer.model", "spiece.model",
)  # fmt: skip
# All that is read of a folder beside its weights.
DESCRIPTION = ("config.json", *TOKENIZER_FILES, *sentence_transformers_folder.FILES)

_SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, and the defaults that come with it.

    query_template and passage_template hold ``{text}``. normalize says whether vectors are scaled to length 1.
    Lengths count special tokens: max_length is what the position embeddings allow (None: no limit), default_length
    what the model was made for.
    """

    folder: Path
    tokenizer_folder: Path
    config: dict
    model_type: str
    hidden_size: int
    vocabulary: int
    max_length: int | None
    default_length: int
    pooling: str
    normalize: bool
    query_template: str
    passage_template: str

    def check_ids(self, largest: int) -> None:
        """Refuse token ids that the model does not know, which a tokenizer that is not its own may give.

        Raises:
            ValueError: the largest is none of its vocabulary's.
        """
        if largest >= self.vocabulary:
            raise ValueError(
                f"{self.tokenizer_folder}: its tokenizer gives id {largest}, but the model {self.folder} knows only"
                f" {self.vocabulary}; expected the model's own tokenizer"
            )

    @property
    def is_decoder(self) -> bool:
        """True for causal models."""
        return self.model_type in DECODERS

    @property
    def position_offset(self) -> int:
        """How many position embeddings come before the first token's."""
        return _position_offset(self.config, self.model_type)

    @property
    def task(self) -> int | None:
        """ERNIE 3's task, of which every token gets the embedding; None for other models."""
        return self.config.get("task_id") or 0 if self.config.get("use_task_id") else None

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, of the first kind that is there."""
        return _weight_files(self.folder)

    @property
    def is_torch(self) -> bool:
        """True if the weights are PyTorch's, whose linear layers are [out, in], and not Paddle's, which are [in, out].

        Names do not tell: PaddleNLP names XLM-RoBERTa's weights as Hugging Face does, and transposes them.
        """
        return _is_torch(self.weight_files()[0])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over weights, configuration and tokenizer: equal digests give equal vectors."""
        hasher = hashlib.sha256()
        tokenizer = [self.tokenizer_folder / name for name in TOKENIZER_FILES]
        for path in [self.folder / "config.json", *self.weight_files(), *tokenizer]:
            if path.is_file():
                hasher.update(path.name.encode() + _sha256(path))
        return hasher.hexdigest()


def resolve(model_path: str, tokenizer_path: str | None = None, pooling: str | None = None) -> Checkpoint:
    """The checkpoint that a ``model_path`` argument means: the bundled model, a folder, or a hub name.

    Args:
        pooling: instead of what the folder says, which may be one that this toolkit does not know.

    Raises:
        FileNotFoundError: no such folder, or the hub cannot be reached.
        ValueError: the folder is no model, or one that this toolkit cannot use.
    """
    folder = _folder(model_path)
    tokenizer_folder = folder if tokenizer_path in (None, model_path) else _folder(tokenizer_path)
    try:
        return _understand(folder, tokenizer_folder, pooling)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{folder}: its configuration files cannot be understood ({error!r})") from error


def _understand(folder: Path, tokenizer_folder: Path, pooling: str | None) -> Checkpoint:
    _refuse_adapters(folder)
    config = json_files.read_object(folder / "config.json")
    if not config:
        first = sentence_transformers_folder.read_modules(folder).get("Transformer", folder)
        hint = f"; the model lies in {first}: give that, and pooling=..." if (first / "config.json").is_file() else ""
        raise ValueError(f"{folder}: no config.json there; expected a model's folder{hint}")
    weights = _weight_files(folder)
    for path in {*weights, *folder.glob("*.safetensors")}:
        if not path.is_file():
            raise ValueError(f"{path}: is no regular file; expected the model's weights")
    for path in folder.glob("*.safetensors"):
        _safetensors_header(path)
    if not weights:
        raise ValueError(f"{folder}: no weights there; expected one of {', '.join(WEIGHT_PATTERNS)}")
    _check_shards(folder, weights[0].suffix)
    model_type = str(config.get("model_type", "")).replace("_", "-")
    if model_type:
        families.check_type(folder / "config.json", model_type, _is_torch(weights[0]))
    hidden_size = config.get("hidden_size")
    if not model_type or hidden_size is None:
        raise ValueError(f"{folder / 'config.json'}: lacks model_type or hidden_size; expected a text encoder's")
    _check_config(folder / "config.json", config)
    families.check_values(folder / "config.json", model_type, config)
    if model_type in DECODERS:
        config = families.with_rotations(folder / "config.json", config)
    if not any((tokenizer_folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{tokenizer_folder}: no tokenizer there; expected one of {', '.join(TOKENIZER_FILES)}")
    _name_unused_heads(folder, (config.get("architectures") or [""])[0])
    modules = sentence_transformers_folder.read_modules(folder)
    query_prompt, passage_prompt = sentence_transformers_folder.read_prompts(folder, modules)
    max_length = _max_length(config, model_type)
    return Checkpoint(
        folder=folder,
        tokenizer_folder=tokenizer_folder,
        config=config,
        model_type=model_type,
        hidden_size=hidden_size,
        vocabulary=int(config["vocab_size"]),
        max_length=max_length,
        default_length=_default_length(folder, tokenizer_folder) or max_length or 512,
        pooling=pooling
        or sentence_transformers_folder.read_pooling(modules)
        or ("last" if model_type in DECODERS else "cls"),
        normalize=sentence_transformers_folder.read_normalize(folder, modules),
        query_template=query_prompt + "{text}",
        passage_template=passage_prompt + "{text}",
    )


def _refuse_adapters(folder: Path) -> None:
    """Without its adapter a base model gives other vectors."""
    for name in ("adapter_config.json", "lora_config.json"):
        if (folder / name).is_file():
            raise ValueError(
                f"{folder}: {name} says that the model has an adapter, which is not merged here; expected merged"
                " weights (peft: merge_and_unload, then save_pretrained; leave the adapter's files out)"
            )


@functools.cache
def _name_unused_heads(folder: Path, architecture: str) -> None:
    """Say once which representations of a model are not computed."""
    heads = [name for name in ("sparse_linear.pt", "colbert_linear.pt") if (folder / name).is_file()]
    heads += ["masked-language-model head"] * str(architecture).endswith("ForMaskedLM")
    if heads:
        logger.info("%s: %s not used; texts become dense vectors only", folder, " and ".join(heads))


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, of the first kind that is there."""
    for pattern in WEIGHT_PATTERNS:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _is_torch(weights: Path) -> bool:
    if weights.suffix == ".safetensors":
        return _safetensors_header(weights).get("__metadata__", {}).get("format", "pt") == "pt"
    return weights.suffix == ".bin"


def _check_shards(folder: Path, suffix: str) -> None:
    """Every file that the index of the weights in use names must be there; another format may be there in part."""
    for path in folder.glob(f"*{suffix}.index.json"):
        files = (json_files.read_object(path).get("weight_map") or {}).values()
        for name in sorted({name for name in files if not (folder / name).is_file()}):
            raise ValueError(f"{folder / name}: not there, but {path.name} says that it holds a part of the weights")


# A word between two special tokens.
_FEWEST_POSITIONS = 3


def _check_config(path: Path, config: dict) -> None:
    """Sizes must be positive whole numbers where they are given, and heads must divide the width."""
    for name in _SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
            raise ValueError(f"{path}: {name} is {value!r}; expected a positive whole number")
    task = config.get("task_id")
    if task is not None and (type(task) is not int or task < 0):
        raise ValueError(f"{path}: task_id is {task!r}; expected a whole number, 0 or above")
    padding = config.get("pad_token_id")
    if padding is not None and type(padding) is not int:
        raise ValueError(f"{path}: pad_token_id is {padding!r:.40}; expected a whole number")
    positions = config.get("max_position_embeddings")
    offset = _position_offset(config, config["model_type"].replace("_", "-"))
    if positions is not None and positions - offset < _FEWEST_POSITIONS:
        least = _FEWEST_POSITIONS + offset
        raise ValueError(f"{path}: max_position_embeddings is {positions}; expected {least} at least")
    epsilon = config.get("layer_norm_eps")
    if epsilon is not None and not (type(epsilon) in (int, float) and 0 <= epsilon < math.inf):
        raise ValueError(f"{path}: layer_norm_eps is {epsilon!r:.40}; expected a small number, 0 or above")
    if not isinstance(config.get("hidden_act", ""), str):
        raise ValueError(f"{path}: hidden_act is {config['hidden_act']!r}; expected a name")
    heads = config.get("num_attention_heads", 1)
    if config["hidden_size"] % heads and config.get("head_dim") is None:
        raise ValueError(f"{path}: hidden_size is {config['hidden_size']}, which {heads} heads do not divide")


def _safetensors_header(path: Path) -> dict:
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if 0 < size <= path.stat().st_size:
                return dict(json.loads(stream.read(size)))
    except (ValueError, TypeError, RecursionError):  # it may be nested to any depth
        pass
    raise ValueError(f"{path}: is no safetensors file; expected the model's weights (an unfetched git-lfs file?)")


def _sha256(path: Path) -> bytes:
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            hasher.update(chunk)
    return hasher.digest()


def _folder(name: str) -> Path:
    if name == bundled.NAME:
        _tell_of_folder()
        return bundled.build()
    if os.path.isdir(name):
        return Path(name)
    if difflib.get_close_matches(name, [bundled.NAME], cutoff=0.9):
        raise FileNotFoundError(f"{name}: no such model; did you mean {bundled.NAME}?")
    looks_local = name.startswith((".", "/", "~")) or os.path.exists(name) or not _HUB_NAME.fullmatch(name)
    if looks_local or os.path.isdir(os.path.dirname(name)):  # such as output/modle
        raise FileNotFoundError(f"{name}: no such model folder; expected a folder, a hub name or {bundled.NAME}")
    from .paddlenlp import download

    try:
        return download(name, WEIGHT_PATTERNS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: not a local folder, and the hub could not supply it ({error}); "
            f"give a local folder (of embedding models, {bundled.NAME} is bundled)"
        ) from None


@functools.cache
def _tell_of_folder() -> None:
    """A folder of the bundled model's name may be meant."""
    if os.path.isdir(bundled.NAME):
        logger.info("%s means the bundled model; the folder of that name is ./%s", *[bundled.NAME] * 2)


def _position_offset(config: dict, model_type: str) -> int:
    """RoBERTa's kin number positions from the padding id plus one."""
    padding = config.get("pad_token_id")
    return (1 if padding is None else int(padding)) + 1 if model_type in _OFFSET_POSITIONS else 0


def _max_length(config: dict, model_type: str) -> int | None:
    positions = config.get("max_position_embeddings")
    return None if positions is None else max(1, positions - _position_offset(config, model_type))


def _default_length(folder: Path, tokenizer_folder: Path) -> int | None:
    """sentence-transformers' own limit, or, where today's versions keep it, the tokenizer's."""
    length = sentence_transformers_folder.read_max_length(folder)
    if length is None:
        limit = json_files.read_object(tokenizer_folder / "tokenizer_config.json").get("model_max_length")
        length = limit if type(limit) is int and 0 < limit < 1 << 31 else None  # 1e30 stands for none
    return length
