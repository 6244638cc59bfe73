"""What the weights of BERT-like encoders (post-layer-norm) are called by transformers, and by PaddleNLP."""

import re

# Our short names for the parts of a layer, to transformers' and to those of PaddleNLP's TransformerEncoder. PaddleNLP
# has XLM-RoBERTa and its kin under transformers' names. transformers stores linear weights [out, in], Paddle [in, out].
LAYER_PARTS = {
    "q": ("attention.self.query", "self_attn.q_proj"),
    "k": ("attention.self.key", "self_attn.k_proj"),
    "v": ("attention.self.value", "self_attn.v_proj"),
    "o": ("attention.output.dense", "self_attn.out_proj"),
    "norm1": ("attention.output.LayerNorm", "norm1"),
    "up": ("intermediate.dense", "linear1"),
    "down": ("output.dense", "linear2"),
    "norm2": ("output.LayerNorm", "norm2"),
}
LINEAR = ("q", "k", "v", "o", "up", "down")

_IN_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_SHORT = {paddlenlp: short for short, (_, paddlenlp) in LAYER_PARTS.items()}


def to_torch(name: str) -> tuple[str, bool] | None:
    """transformers' name of a weight that PaddleNLP names, and whether it is stored transposed there.

    None if the name is none of a PaddleNLP encoder's with a TransformerEncoder, such as BERT's and ERNIE's.
    """
    if match := _IN_LAYER.fullmatch(name):
        number, part, kind = match.groups()
        short = _SHORT.get(part)
        if short is None:
            return None
        return f"encoder.layer.{number}.{LAYER_PARTS[short][0]}.{kind}", short in LINEAR and kind == "weight"
    if name.startswith("embeddings.layer_norm."):
        return name.replace("layer_norm", "LayerNorm"), False
    if name.startswith("embeddings."):
        return name, False
    return (name, name.endswith("weight")) if name.startswith("pooler.dense.") else None
