"""Arguments of PaddleNLP's ModelConfig, DataConfig, SFTConfig and EmbeddingArgument that are not trained with here.

Its files hold them. One is accepted where it changes no result. Where it would, it is refused but for its harmless
values.
"""

from typing import Any, NamedTuple


class Key(NamedTuple):
    """An argument: its type, why it has no effect or is refused, and the values that say nothing."""

    kind: type
    why: str
    harmless: tuple
    is_refused: bool


def _keys(is_refused: bool, why: str, **names: Any) -> dict[str, Key]:
    """Arguments for which the same reason holds, each with PaddleNLP's default or, where that is None, its type."""
    return {
        name: Key(given, why, (), is_refused)
        if isinstance(given, type)
        else Key(type(given), why, (given,), is_refused)
        for name, given in names.items()
    }


_ADAPTERS = "the adapters trained here are plain LoRA (lora, lora_rank, lora_alpha)"
_AISTUDIO = "models are read from a folder and written to one"
_LENGTHS = "max_query_len and max_passage_len say where texts are cut"
KEYS: dict[str, Key] = {
    **_keys(
        False, "it changes how fast a model runs, not what it computes",
        use_fast_layer_norm=False, fuse_attention_qkv=bool, fuse_attention_ffn=bool, flash_mask=False,
        use_quick_lora=False, tensor_parallel_output=False, inf_cl_head_dim=64, use_fused_rms_norm=False,
        use_fused_rope=False, use_fused_linear=False, use_fused_dropout_add=False, use_fused_linear_cross_entropy=False,
        tensor_parallel_rank=0, virtual_pp_degree=1, pp_recompute_interval=1, recompute_granularity="full",
        recompute_use_reentrant=False, offload_recompute_inputs=False,
    ),
    **_keys(
        False, "padding changes no vector", intokens=bool, greedy_zero_padding=False, pad_to_multiple_of=int,
        pad_to_max_length=False, eval_packing=bool, return_position_ids=True,
    ),
    **_keys(False, _LENGTHS, src_length=1024, max_length=2048),
    **_keys(False, "rows are read whole, once", lazy=False, dataset_num_proc=int, dataset_batch_size=1000),
    **_keys(False, "nothing is generated", save_generation_output=False),
    **_keys(
        False, "it sets up a method that is not on", weight_blocksize=64, weight_double_quant=False,
        weight_double_quant_block_size=256, vera_rank=8, lokr_dim=8, num_prefix_tokens=128, neftune_noise_alpha=5.0,
        ssa_group_size_ratio=0.25, strategy_type=str, strategy_name=str, block_min_length=False, num_blocks=False,
        aistudio_repo_id=str, aistudio_repo_private=True, aistudio_repo_license="Apache License 2.0",
        aistudio_token=str,
    ),
    **_keys(True, "weights are trained in float32", weight_quantize_algo=str),
    **_keys(True, "give the folder that an earlier training wrote as model_name_or_path", lora_path=str),
    **_keys(
        True, _ADAPTERS, rslora=False, lora_plus_scale=1.0, pissa=False, lora_use_mixer=False, use_mora=False,
        vera=False, lokr=False, lokr_path=str, prefix_tuning=False, prefix_path=str, reft=False,
    ),
    **_keys(True, "query_template and passage_template say what is put around a text", chat_template=str),
    **_keys(True, _AISTUDIO, from_aistudio=False, save_to_aistudio=False),
    **_keys(True, "no noise is added to word embeddings; dropout is the other means", neftune=False),
    **_keys(True, "a model starts from its weights, not from random ones", continue_training=True),
    **_keys(True, "max_steps and save_strategy make a short run", autotuner_benchmark=False, benchmark=False),
    **_keys(True, "a model reads texts as it was made to", autoregressive=False, use_pose_convert=False, use_ssa=False,
            use_ssa_convert=False, use_long_sequence_strategies=False, rope_scaling_factor=1.0),
    **_keys(True, "dataset_name_or_path names the rows", task_name=str, task_name_or_path=str),
}  # fmt: skip


def refusal(name: str, value) -> str | None:
    """Why a value is refused, in one line; None if it is not."""
    key = KEYS[name]
    is_given = value is not None and value not in key.harmless and (key.harmless or value is not False)
    return f"{name} is {value!r}; not supported here: {key.why}" if key.is_refused and is_given else None


def without_effect(given: dict[str, Any]) -> str:
    """What was given of these to no effect, and why; empty if nothing was."""
    found: dict[str, list[str]] = {}
    for name, key in KEYS.items():
        if not key.is_refused and given.get(name) is not None and given[name] not in key.harmless:
            found.setdefault(key.why, []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in found.items())


# What its EmbeddingArgument puts around texts, which its Qwen file does not repeat.
_QWEN = (
    "Query: {text}\nUse one word to summarize the query's relevant information. The word is: \"",
    "Text: {text}\nUse one word to summarize the text's content. The word is: \"",
)


def templates(model_type: str, query: str, passage: str) -> tuple[str, str]:
    """Of queries and passages: PaddleNLP's for a Qwen2 model without prompts of its own, else the model's own."""
    return _QWEN if model_type == "qwen2" and (query, passage) == ("{text}", "{text}") else (query, passage)
