"""PaddleNLP models from a checkpoint's files, and back to Hugging Face's names.

PaddleNLP can do the first by itself, but writes a converted copy into the checkpoint's folder, then prefers
it to the original, and refuses safetensors files without its kind of metadata.
"""

import copy
import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np

from . import bert_names, paddlenlp
from .checkpoint import Checkpoint
from .weight_files import read_weights

if TYPE_CHECKING:
    from paddle import Tensor, nn

logger = logging.getLogger(__name__)

# Not trained and not pooled with: a checkpoint of sentence vectors often comes without it.
_UNUSED = "pooler."


def load_model(checkpoint: Checkpoint, dtype: str = "float32", **config) -> "nn.Layer":
    """The checkpoint as PaddleNLP's model. What in it is not floating point stays as the fresh model has it.

    Args:
        config: values that override the checkpoint's configuration.

    Raises:
        ValueError: weights that the model needs are not in the checkpoint, or it has no such task.
    """
    import paddle

    model = paddlenlp.new_model(checkpoint, dtype, **config)
    if "layer_norm_eps" in checkpoint.config:  # PaddleNLP's ERNIE has one of its own
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.LayerNorm):
                layer._epsilon = checkpoint.config["layer_norm_eps"]
    own = model.state_dict()
    tasks = own.get("embeddings.task_type_embeddings.weight", ())
    if checkpoint.task is not None and checkpoint.task >= len(tasks):
        wanted = f"config.json wants the embedding of task {checkpoint.task}"
        raise ValueError(f"{checkpoint.folder}: {wanted}; there are {len(tasks)} tasks")
    weights, torch_layout = read_weights(checkpoint), checkpoint.is_torch
    names = torch_names(model) if torch_layout else {}
    state, missing = {}, []
    for name, parameter in own.items():
        if not parameter.is_floating_point():  # position_ids and their like, which are made and not trained
            continue
        torch_name, transposed = names.get(name, (name, False))
        found = torch_name if torch_name in weights else _with_prefix(torch_name, weights)
        if found is None:
            missing.append(torch_name)
            continue
        values = weights[found].T if transposed else weights[found]
        shape, expected = list(values.shape), list(parameter.shape)
        if shape != expected:
            raise ValueError(f"{checkpoint.folder}: {found} has shape {shape}; expected {expected}")
        state[name] = paddle.to_tensor(np.ascontiguousarray(values), dtype=parameter.dtype)
    missing = [name for name in missing if not name.startswith(_UNUSED)]
    if missing:
        raise ValueError(f"{checkpoint.folder}: the weights {', '.join(missing[:3])} are not there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the weights that are known to be missing
        model.set_state_dict(state)
    return model


def torch_names(model: "nn.Layer") -> dict[str, tuple[str, bool]]:
    """Hugging Face's name of each of the model's weights, and whether it is stored transposed there.

    Raises:
        ValueError: PaddleNLP does not know, and it is no BERT-like encoder such as ERNIE.
    """
    if hasattr(model, "torch_names"):  # not PaddleNLP's
        return model.torch_names()
    if "_get_name_mappings" not in {name for cls in type(model).__mro__[:2] for name in vars(cls)}:
        names = {name: bert_names.to_torch(name) for name in model.state_dict() if ".lora_" not in name}
        if None in names.values():
            raise ValueError(f"PaddleNLP has no Hugging Face names for {type(model).__name__}")
        return names
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    names = {
        mapping.target_name: (mapping.source_name, mapping.action == "transpose")
        for mapping in type(model)._get_name_mappings(config)
    }
    # PaddleNLP's RoBERTa leaves its pooler out.
    rest = {name: bert_names.to_torch(name) for name in model.state_dict() if name not in names}
    return names | {name: found for name, found in rest.items() if found is not None}


def to_torch(model: "nn.Layer", state: dict[str, "Tensor"]) -> dict[str, np.ndarray]:
    """The model's weights ``state`` under Hugging Face's names, linear weights [out, in], float32.

    Whole numbers, such as ``position_ids``, are left out: transformers makes its own.
    """
    names = torch_names(model)
    weights = {}
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        torch_name, transposed = names[name]
        values = value.astype("float32").numpy()
        weights[torch_name] = np.ascontiguousarray(values.T if transposed else values)
    return weights


def _with_prefix(name: str, weights: dict[str, np.ndarray]) -> str | None:
    """A model with a head stores its body under a prefix, such as ``bert.`` or ``model.``."""
    return next((key for key in weights if key.endswith("." + name) and key.count(".") == name.count(".") + 1), None)
