"""Files that let other programs load a trained model: sentence-transformers' own, and PyTorch weights."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from utils import weights, wordpiece
from utils.checkpoint import TOKENIZER_FILES, Checkpoint
from utils.weight_files import write_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn

logger = logging.getLogger(__name__)

_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"
}  # fmt: skip


def write_description(
    folder: Path, checkpoint: Checkpoint, pooling: str, normalize: bool, templates: tuple[str, str], max_length: int
) -> None:
    """Pooling, normalisation, prompts and length limit, as sentence-transformers and ``checkpoint`` read them.

    A template that is more than a prefix has no place there, and is left out with a warning.
    """
    kind = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
    _write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind + name} for i, (path, name) in enumerate(modules)],
    )
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    flags = {flag: name == pooling for name, flag in _POOLING_FLAGS.items()}
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": checkpoint.hidden_size, **flags}
    )  # fmt: skip
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    prompts = {}
    for name, template in zip(("query", "passage"), templates, strict=True):
        prefix, _, rest = template.partition("{text}")
        if rest:
            logger.warning("%s_template %r ends with text; prompts are prefixes, so give it again when encoding",
                           name, template)  # fmt: skip
        prompts[name] = prefix
    # Where sentence-transformers' encode_document looks first: it would find an empty one of its own.
    prompts["document"] = prompts["passage"]
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine" if normalize else "dot"},
    )


def write_tokenizer(checkpoint: Checkpoint, folder: Path, for_torch: bool) -> None:
    """The base model's tokenizer files, byte for byte.

    A bare BERT vocabulary says less: transformers would read one that was Paddle's in its own way, and PaddleNLP one
    that was PyTorch's. How it was read so far is then written into a ``tokenizer.json``.

    Args:
        for_torch: whether transformers is to read it, or this toolkit and PaddleNLP.
    """
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer_folder / name).is_file():
            shutil.copyfile(checkpoint.tokenizer_folder / name, folder / name)
    if for_torch != checkpoint.is_torch and not (folder / "tokenizer.json").is_file():
        built = wordpiece.build(checkpoint.tokenizer_folder, symbols_apart=not checkpoint.is_torch)
        if built is not None:
            built.save(str(folder / "tokenizer.json"))


def write_config(checkpoint: Checkpoint, folder: Path) -> None:
    """The base model's configuration: training changes weights only, which are written in float32."""
    stored = {name: "float32" for name in ("dtype", "torch_dtype") if name in checkpoint.config}
    _write_json(folder / "config.json", checkpoint.config | stored)


def check_torch_weights(model: "nn.Layer", checkpoint: Checkpoint) -> None:
    """Tell before a training what ``write_torch_weights`` could not do after it.

    Raises:
        ValueError: PaddleNLP does not say how its names of this model map to Hugging Face's, or transformers' model
            would give other vectors.
    """
    if checkpoint.task:
        raise ValueError(f"config.json wants task_id {checkpoint.task}, and transformers knows only task 0")
    names = weights.torch_names(model)
    for name, value in model.state_dict().items():
        # Adapters are merged into what has a name.
        if value.is_floating_point() and name not in names and ".lora_" not in name:
            raise ValueError(f"PaddleNLP has no Hugging Face name for {name} of {type(model).__name__}")


def write_torch_weights(model: "nn.Layer", state: dict[str, "Tensor"], folder: Path) -> None:
    """The model's weights ``state`` as ``model.safetensors``, as Hugging Face's transformers names and stores them.

    Raises:
        OSError: the file cannot be written.
        ValueError: PaddleNLP does not say how its names of this model map to Hugging Face's.
    """
    write_weights(weights.to_torch(model, state), folder / "model.safetensors")


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
