"""What a name that is unknown here may stand for: a slip, or what another toolkit calls an argument."""

import difflib
import re

# What FlagEmbedding, sentence-transformers, tevatron and PaddleNLP's older examples call an argument that has another
# name here. The first that the script knows is meant; words after it are part of the hint.
CALLED_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "negative_number": ("num_negatives",),
    "range_for_negatives": ("range_for_sampling",),
    "input_file": ("input_data_path",),
    "output_file": ("output_data_path",),
    "input_path": ("input_data_path",),
    "output_path": ("output_data_path", "output_dir"),
    "output_dir": ("output_data_path",),
    "input_data_path": ("dataset_name_or_path", "dev_path"),
    "output_data_path": ("output_dir",),
    "train_data": ("dataset_name_or_path", "input_data_path"),
    "train_file": ("dataset_name_or_path", "input_data_path"),
    "train_dataset": ("dataset_name_or_path", "input_data_path"),
    "data_dir": ("dataset_name_or_path", "input_data_path", "dev_path"),
    "eval_data": ("dev_path", "dev_dataset_path"),
    "dev_file": ("dev_dataset_path", "dev_path"),
    "eval_file": ("dev_dataset_path", "dev_path"),
    "eval_dataset": ("dev_dataset_path", "dev_path"),
    "input": ("input_data_path", "dev_path"),
    "output": ("output_data_path", "output_dir"),
    "queries_path": ("dev_path", "input_data_path"),
    "corpus": ("corpus_path", "candidate_pool"),
    "k": ("k_values",),
    "top_k": ("k_values", "range_for_sampling"),
    "as_triplets": ("output_format triplet",),
    "loss": ("loss_type",),
    "batch_sampler": ("hard_batches",),
    "model": ("model_path", "model_name_or_path"),
    "embedder_name_or_path": ("model_path", "model_name_or_path"),
    "model_name_or_path": ("model_path",),
    "model_path": ("model_name_or_path",),
    "tokenizer_name": ("tokenizer_path", "tokenizer_name_or_path"),
    "tokenizer_name_or_path": ("tokenizer_path",),
    "tokenizer_path": ("tokenizer_name_or_path",),
    "reranker_name_or_path": ("reranker_path",),
    "query_instruction_for_retrieval": ("query_template",),
    "query_instruction_for_model": ("query_template",),
    "query_instruction_format": ("query_template",),
    "query_instruction_format_for_retrieval": ("query_template",),
    "query_prompt": ("query_template",),
    "query_instruction": ("query_template",),
    "document_instruction": ("passage_template",),
    "passage_instruction": ("passage_template",),
    "document_max_length": ("max_passage_len", "max_src_len"),
    "passage_instruction_for_retrieval": ("passage_template",),
    "passage_instruction_format": ("passage_template",),
    "corpus_prompt": ("passage_template",),
    "prompts": ("query_template and passage_template",),
    "sentence_pooling_method": ("pooling",),
    "pooling_method": ("pooling",),
    "normalize_embeddings": ("normalize",),
    "normlized": ("normalize",),
    "temperature": ("embedding_temperature",),
    "train_group_size": ("group_size",),
    "query_max_len": ("max_query_len", "max_src_len"),
    "query_max_length": ("max_query_len", "max_src_len"),
    "embedder_query_max_length": ("max_query_len", "max_src_len"),
    "passage_max_len": ("max_passage_len", "max_src_len"),
    "passage_max_length": ("max_passage_len", "max_src_len"),
    "embedder_passage_max_length": ("max_passage_len", "max_src_len"),
    "max_length": ("max_src_len", "max_query_len and max_passage_len"),
    "max_seq_length": ("max_src_len", "max_query_len and max_passage_len"),
    "max_src_len": ("max_query_len and max_passage_len",),
    "negatives_cross_device": ("embedding_negatives_cross_device",),
    "negatives_x_device": ("embedding_negatives_cross_device",),
    "gather_across_devices": ("embedding_negatives_cross_device",),
    "scale": ("embedding_temperature, which is 1 / scale",),
    "triplet_margin": ("margin",),
    "knowledge_distillation": ("loss_type kl",),
    "kd_loss_type": ("loss_type kl",),
    "use_mrl": ("embedding_matryoshka_dims",),
    "mrl_dims": ("embedding_matryoshka_dims",),
    "matryoshka_dims": ("embedding_matryoshka_dims",),
    "matryoshka_weights": ("embedding_matryoshka_weights",),
    "truncate_dim": ("dimension",),
    "same_dataset_within_batch": ("group_by_source",),
    "gradient_checkpointing": ("recompute",),
    "use_lora": ("lora",),
    "use_flash_attn": ("use_flash_attention",),
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "batch_size": ("per_device_train_batch_size", "batch_tokens, a number of tokens"),
    "train_batch_size": ("per_device_train_batch_size",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size", "batch_tokens, a number of tokens"),
    "embedder_batch_size": ("batch_tokens, a number of tokens",),
    "per_device_eval_batch_size": ("batch_tokens, a number of tokens",),
    "eval_strategy": ("evaluation_strategy",),
    "evaluation_steps": ("eval_steps",),
    "use_fp16": ("fp16", "dtype, whose auto is the fastest sound one"),
    "fp16": ("dtype, whose auto is the fastest sound one",),
    "use_bf16": ("bf16", "dtype, whose auto is the fastest sound one"),
    "bf16": ("dtype, whose auto is the fastest sound one",),
    "torch_dtype": ("dtype",),
    "sub_batch_size": ("gradcache_chunk_size",),
    "mini_batch_size": ("gradcache_chunk_size",),
    "threshold": ("similarity_threshold",),
    "num_hard_negatives": ("num_negatives",),
    "absolute_score_margin": ("absolute_margin",),
    "margin": ("relative_margin",),
    "candidate_pool_path": ("candidate_pool",),
    "cross_encoder": ("reranker_path",),
    "search_top_k": ("range_for_sampling",),
    "range_min": ("range_for_sampling",),
    "range_max": ("range_for_sampling",),
    "sample_range": ("range_for_sampling",),
    "eval_metrics": ("metrics",),
    "corpus_embd_save_dir": ("embedding_cache",),
    "cache_folder": ("embedding_cache",),
    **dict.fromkeys(
        ("train_path", "train_files", "train_set_file", "train_dataset_path", "dataset_name", "dataset_path"),
        ("dataset_name_or_path", "input_data_path"),
    ),
    **dict.fromkeys(("similar_text_pair_file", "evaluator"), ("dev_dataset_path", "dev_path")),
    **dict.fromkeys(("corpus_file", "corpus_name"), ("corpus_path", "dev_corpus_path", "candidate_pool")),
    "passages_path": ("corpus_path", "dev_corpus_path", "candidate_pool"),
    **dict.fromkeys(("query_prefix", "query_prompt_name", "query_instruct", "instruction"), ("query_template",)),
    **dict.fromkeys(("passage_prefix", "corpus_prompt_name"), ("passage_template",)),
    **dict.fromkeys(("q_max_len", "max_seq_len", "max_len"), ("max_query_len and max_passage_len", "max_src_len")),
    "p_max_len": ("max_passage_len", "max_src_len"),
    "train_n_passages": ("group_size",),
    **dict.fromkeys(
        ("grad_cache", "gradient_cache", "use_gradient_cache", "gc_q_chunk_size", "gc_p_chunk_size"),
        ("gradcache_chunk_size",),
    ),
    **dict.fromkeys(("encode_output_path", "encode_in_path", "encoded_save_path"), ("embedding_cache",)),
    **dict.fromkeys(("output_emb_size", "embedding_dim", "embedding_size"), ("dimension",)),
    **dict.fromkeys(("params_path", "init_from_ckpt"), ("model_path", "model_name_or_path")),
    **dict.fromkeys(("num_neg", "neg_num", "negs_per_query"), ("num_negatives", "group_size, 1 above that")),
    **dict.fromkeys(("recall_num", "retrieval_k"), ("range_for_sampling", "k_values")),
    **dict.fromkeys(("ks", "cutoffs"), ("k_values",)),
    **dict.fromkeys(("run_file", "recall_result_file"), ("run_path",)),
    **dict.fromkeys(("hnsw_m", "hnsw_ef", "index_type"), ("index_factory",)),
    **dict.fromkeys(("sim_threshold", "dedup_threshold", "score_threshold"), ("similarity_threshold", "min_score")),
    "loss_fn": ("loss_type",),
    "lora_r": ("lora_rank",),
    "use_recompute": ("recompute",),
    "warmup_proportion": ("warmup_ratio",),
    # These have no counterpart, whatever is spelt alike.
    **dict.fromkeys(
        (
            "cache_dir", "cache_path", "deepspeed", "fsdp", "fsdp_config", "learning_rate_mapping", "mp_parameters",
            "lora_name_or_path", "parallelism_config", "peft_model_path", "reranker_peft_path", "write_csv",
        ),
        (),
    ),
}  # fmt: skip
# And what needs no argument here.
_BY_ITSELF = "a batch is as large as its memory allows"
_DATALOADER = "tokens are ready before training begins"
_KEYS = "rows have the keys query, pos_passage and neg_passage"
_TOKENS = "special tokens are as the tokenizer's files say"
_IN_BATCH = 'losses that take in-batch negatives use them; a row\'s "type" leaves them out'
NOT_NEEDED: dict[str, str] = {
    **dict.fromkeys(("use_inbatch_neg", "use_inbatch_negative", "use_inbatch_negatives"), _IN_BATCH),
    "no_in_batch_neg_flag": _IN_BATCH,
    **dict.fromkeys(("append_eos_token", "padding_side"), _TOKENS),
    **dict.fromkeys(("text_key", "anchor_column_name", "positive_column_name"), _KEYS),
    "show_progress_bar": "progress is logged",
    "use_multi_process": "paddle.distributed.launch starts several processes",
    "include_positives": "mined rows keep their positives",
    "fix_encoder": "freeze_layers and word_embeddings say what is frozen",
    "use_gpu_for_searching": "GPUs that the process may use are searched on",
    "query_key": _KEYS,
    "positive_key": _KEYS,
    "negative_key": _KEYS,
    "use_faiss": "index_factory names a FAISS index; without it, search is exact",
    "search_batch_size": _BY_ITSELF,
    "faiss_batch_size": _BY_ITSELF,
    "corpus_chunk_size": _BY_ITSELF,
    "reranker_batch_size": _BY_ITSELF,
    "devices": "paddle.distributed.launch --devices chooses them",
    "target_devices": "paddle.distributed.launch --devices chooses them",
    "trust_remote_code": "no code of a model's is run",
    "pad_to_multiple_of": "nothing is padded on a CPU, and texts of like lengths are batched",
    "dataloader_persistent_workers": _DATALOADER,
    "dataloader_pin_memory": _DATALOADER,
    "dataloader_prefetch_factor": _DATALOADER,
}
# And what other toolkits can and this one cannot.
_DENSE = "one dense vector a text is trained, no sparse or multi-vector heads"
_SMOOTHING = "no loss smooths its labels"
NOT_SUPPORTED: dict[str, str] = {
    **dict.fromkeys(("unified_finetuning", "use_self_distill", "self_distill_start_step", "colbert_dim"), _DENSE),
    **dict.fromkeys(("label_smoothing", "label_smoothing_factor"), _SMOOTHING),
    **dict.fromkeys(("untie_encoder", "router_mapping"), "queries and passages share one encoder"),
    **dict.fromkeys(("rdrop_coef", "dup_rate"), "no loss encodes a query twice"),
    "multi_dataset_batch_sampler": "dataset_weights says how often each file is used",
}
# How much a name must be like a known one, to be taken for a slip: less, and strangers get hints that mislead.
_ALIKE = 0.75


def nearest(value, known) -> str:
    """The end of an error line: "; did you mean ...?", or nothing if no known value comes near."""
    close = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def meant_by(name: str, known: list[str]) -> str:
    """What an unknown name may stand for, "did you mean ...?", why it is not needed or not supported, or nothing.

    A flag's name has its dashes.
    """
    bare = name.lstrip("-").replace("-", "_")
    if bare in NOT_NEEDED:
        return f"not needed: {NOT_NEEDED[bare]}"
    if bare in NOT_SUPPORTED:
        return f"not supported: {NOT_SUPPORTED[bare]}"
    dashes = "--" if name.startswith("-") or bare in known else ""
    if bare in CALLED_ELSEWHERE:
        meant = [hint for hint in CALLED_ELSEWHERE[bare] if re.match(r"\w+", hint)[0] in known][:1]
    else:
        meant = difflib.get_close_matches(bare, known, n=1, cutoff=_ALIKE)
    dashed = [re.sub(r"\w+", lambda word: dashes * (word[0] in known) + word[0], hint) for hint in meant]
    return f"did you mean {dashed[0]}?" if dashed else ""
