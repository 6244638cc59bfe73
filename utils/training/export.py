"""What makes a folder of trained weights a model: configuration, tokenizer, and weights as PyTorch stores them."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import json_files
from ..models import loading
from ..models.checkpoint import TOKENIZER_FILES, Checkpoint
from ..models.tokenizers import wordpiece
from ..models.weight_files import write_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn


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
    json_files.write(folder / "config.json", checkpoint.config | stored)


def check_torch_weights(model: "nn.Layer", checkpoint: Checkpoint) -> None:
    """Tell before a training what ``write_torch_weights`` could not do after it.

    Raises:
        ValueError: PaddleNLP does not say how its names of this model map to Hugging Face's, or transformers' model
            would give other vectors.
    """
    if checkpoint.task:
        raise ValueError(f"config.json wants task_id {checkpoint.task}, and transformers knows only task 0")
    names = loading.torch_names(model)
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
    write_weights(loading.to_torch(model, state), folder / "model.safetensors")
