"""Which types of models run, and which values of their ``config.json`` are computed.

Each type here was compared with transformers (PyTorch's weights) or PaddleNLP (Paddle's) on random weights.
"""

from pathlib import Path

# Model types whose attention looks only backwards; their sentence is summed up in its last token.
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gpt", "opt", "bloom")
# What runs with PyTorch's weights, and what with Paddle's.
TORCH = (
    "bert", "roberta", "xlm-roberta", "camembert", "ernie", "electra", "albert", "qwen2", "qwen3", "llama", "gemma",
    "opt", "bloom",
)  # fmt: skip
PADDLE = (
    "bert", "roberta", "xlm-roberta", "ernie", "ernie-gram", "ernie-m", "electra", "albert", "roformer", "roformerv2",
    "mpnet", "distilbert", "tinybert", "ppminilm", "skep", "squeezebert", "qwen2", "qwen3", "llama", "mistral", "gemma",
    "gpt", "opt", "bloom",
)  # fmt: skip
# Values of the configuration that change what a model computes, and the only ones that are computed here.
_PLAIN_DECODER = {
    "is_causal": (True,), "use_sliding_window": (False,), "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
}  # fmt: skip
_PLAIN_ENCODER = {
    "position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},),
}  # fmt: skip
_GELU = ("gelu_pytorch_tanh", "gelu")
_PLAIN_OF_TYPE = {
    "qwen3": {"hidden_act": ("silu",)},
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "gemma": {"hidden_act": _GELU, "hidden_activation": _GELU, "attention_bias": (False,)},
    "opt": {
        "do_layer_norm_before": (True,), "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
    },
    "bloom": {"slow_but_exact": (False,)},
    "albert": {"inner_group_num": (1,)},
}  # fmt: skip
_FULL_ATTENTION = "full_attention"


def check_type(path: Path, model_type: str, is_torch: bool) -> None:
    """Refuse what cannot be run.

    Args:
        path: of the ``config.json``, for the message.

    Raises:
        ValueError: the type is not among those that run with these weights.
    """
    known = TORCH if is_torch else PADDLE
    if model_type not in known:
        whose = "PyTorch's" if is_torch else "Paddle's"
        raise ValueError(
            f"{path}: model_type {model_type!r} is not supported with {whose} weights; expected one of"
            f" {', '.join(known)}"
        )


def check_values(path: Path, model_type: str, config: dict) -> None:
    """What a folder's own code, or another kind of layer, would compute is not computed here.

    Raises:
        ValueError: the configuration asks for that.
    """
    if "AutoModel" in (config.get("auto_map") or {}):
        raise ValueError(
            f"{path}: auto_map names code of the model's own, which is not run here; expected a plain"
            f" {model_type} model (take auto_map out if it is one)"
        )
    plain = _PLAIN_DECODER if model_type in DECODERS else _PLAIN_ENCODER
    for name, allowed in (plain | _PLAIN_OF_TYPE.get(model_type, {})).items():
        if config.get(name, allowed[0]) not in (*allowed, None):
            raise ValueError(f"{path}: {name} is {config[name]!r}; expected {allowed[0]!r}, the only kind supported")
    kinds = set(config.get("layer_types") or ()) - {_FULL_ATTENTION}
    if kinds:
        raise ValueError(f"{path}: layer_types has {min(kinds)!r}; expected {_FULL_ATTENTION!r} alone")
    _check_widths(path, model_type, config)


def _check_widths(path: Path, model_type: str, config: dict) -> None:
    """PaddleNLP derives some widths from others."""
    hidden, heads = config["hidden_size"], config.get("num_attention_heads")
    derived = {"opt": ("word_embed_proj_dim", hidden)}
    if heads:
        derived |= dict.fromkeys(("qwen2", "llama"), ("head_dim", hidden // heads))
    name, width = derived.get(model_type, ("", None))
    if config.get(name, width) not in (width, None):
        raise ValueError(f"{path}: {name} is {config[name]!r}; expected {width}, the only width supported")


def with_rotations(path: Path, config: dict) -> dict:
    """A decoder's configuration with ``rope_theta`` where PaddleNLP looks for it; transformers 5 keeps it elsewhere.

    Raises:
        ValueError: positions are rotated in a way that PaddleNLP's loader passes over.
    """
    rotations = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotations.get("rope_type", rotations.get("type", "default"))
    if kind != "default" or rotations.get("partial_rotary_factor", 1) != 1:
        kind = kind if kind != "default" else "partial_rotary_factor"
        raise ValueError(f"{path}: positions are rotated by {kind!r}; expected the default, the only kind supported")
    theta = rotations.get("rope_theta")
    return config if theta is None else config | {"rope_theta": theta}
