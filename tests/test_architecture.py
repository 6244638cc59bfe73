"""The rooms of utils/ import only what DESIGN allows them."""

import ast

import pytest
from conftest import ROOT

HEAVY = {"numpy", "paddle", "paddlenlp", "faiss", "tqdm", "jinja2", "matplotlib", "safetensors", "tokenizers"}
# What each room must not import, at the top or inside a function.
FORBIDDEN = {
    "records": HEAVY,
    "arguments": HEAVY,
    "argument_parsing": HEAVY | {"arguments"},
    "other_names": HEAVY | {"arguments", "argument_parsing"},
    "training_arguments": HEAVY,
    "outputs": HEAVY,
    "runtime": HEAVY - {"paddle"} | {"records", "outputs"},
    "distributed": {"faiss", "paddlenlp", "records", "search", "encoder"},
    "bundled_model": {"paddle", "paddlenlp", "faiss", "arguments"},
    "checkpoint": {"numpy", "paddle", "faiss", "records", "distributed"},
    "encoder": {"faiss", "records", "distributed", "search"},
    "engines": {"faiss", "records", "distributed", "search"},
    "tokenizing": {"faiss", "records", "distributed", "encoder"},
    "qwen3": HEAVY - {"paddle"} | {"records", "distributed", "encoder", "engines", "checkpoint"},
    "pdparams": HEAVY - {"numpy"} | {"records", "distributed", "encoder", "checkpoint"},
    "bert_names": HEAVY | {"records", "distributed", "encoder", "checkpoint", "weights"},
    "wordpiece": HEAVY - {"tokenizers"} | {"records", "distributed", "encoder", "checkpoint"},
    "word_cache": HEAVY | {"records", "distributed", "encoder", "tokenizing"},
    "onednn": {"faiss", "records", "distributed", "search", "encoder"},
    "weight_files": {"paddle", "paddlenlp", "faiss", "records", "distributed", "encoder", "engines"},
    "paddlenlp_models": {"faiss", "records", "distributed", "encoder"},
    "embedding": {"faiss", "records", "paddle", "paddlenlp", "search"},
    "embedding_store": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "search"},
    "matmul": HEAVY - {"numpy"} | {"records", "distributed", "search", "encoder"},
    "mapped": HEAVY - {"numpy"} | {"records", "distributed", "search"},
    "shared_memory": HEAVY - {"numpy"} | {"records", "distributed", "search", "runtime"},
    "scores": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "distributed", "search"},
    "search_kernels": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "distributed", "search"},
    "search_screens": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "distributed", "search"},
    "search": {"paddle", "paddlenlp", "records", "encoder", "engines"},
    "faiss_search": {"paddle", "paddlenlp", "records", "encoder", "engines", "distributed"},
    "screening": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "outputs", "distributed", "dedup"},
    "threads": HEAVY - {"numpy"} | {"records", "distributed", "search"},
    "dealing": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "outputs", "search", "dedup"},
    "dedup": {"paddle", "paddlenlp", "records", "encoder", "engines", "outputs", "thresholds"},
    "thresholds": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "outputs", "distributed"},
    "merged_positives": HEAVY | {"dedup", "outputs", "cleaning"},
    "metrics": {"paddle", "paddlenlp", "faiss", "records", "search", "encoder", "outputs"},
    "statistics": {"paddle", "paddlenlp", "faiss", "records", "search", "encoder", "outputs", "metrics"},
    "beir": HEAVY | {"distributed", "search", "encoder", "outputs"},
    "collection": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "search", "outputs"},
    "trec": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "search", "outputs"},
    "comparison": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "search", "outputs"},
    "mining_problem": {
        "paddle",
        "paddlenlp",
        "faiss",
        "records",
        "encoder",
        "engines",
        "outputs",
        "distributed",
        "negatives",
        "sampling",
    }
    | {"search", "margins"},
    "rankings": HEAVY - {"numpy"}
    | {"records", "encoder", "engines", "outputs", "distributed", "search", "margins", "negatives", "sampling"},
    "margins": {
        "paddle",
        "paddlenlp",
        "faiss",
        "records",
        "encoder",
        "engines",
        "outputs",
        "distributed",
        "negatives",
        "sampling",
    },
    "negatives": {
        "paddle",
        "paddlenlp",
        "faiss",
        "records",
        "encoder",
        "engines",
        "outputs",
        "distributed",
        "sampling",
    },
    "sampling": {"paddle", "paddlenlp", "faiss", "records", "encoder", "engines", "outputs", "distributed", "rankings"},
    "mining_formats": HEAVY | {"outputs", "distributed", "arguments"},
    "mining_outputs": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "distributed", "search", "mining"},
    "candidates": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "distributed", "outputs"},
    "reranker": {"faiss", "records", "search", "outputs", "negatives", "sampling"},
    "mining_search": {
        "paddle",
        "paddlenlp",
        "faiss",
        "records",
        "encoder",
        "outputs",
        "margins",
        "negatives",
        "sampling",
        "mining",
    },
    "mining_inputs": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "distributed", "search"},
    "losses": {"numpy", "arguments", "records", "training_data", "tokenizing"},
    "ragged": HEAVY - {"numpy"} | {"records", "distributed", "training", "search"},
    "training_rows": {"paddle", "paddlenlp", "faiss", "dedup", "trainable", "training"},
    "hard_batches": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training"},
    "batch_plan": HEAVY - {"numpy"} | {"distributed", "tokenizing", "trainable", "training"},
    "training_data": {"paddle", "paddlenlp", "faiss", "dedup", "trainable", "training"},
    "amx": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training", "onednn"},
    "avx512": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training", "onednn"},
    "amx_matmul": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training", "onednn"},
    "amx_attention_gradients": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training", "onednn"},
    "amx_attention": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training", "onednn"},
    "kernel_maths": HEAVY - {"numpy"} | {"records", "distributed", "cpu_kernels", "encoder_kernels"},
    "encoder_kernels": HEAVY - {"numpy"} | {"records", "distributed", "onednn", "cpu_kernels"},
    "cpu_kernels": HEAVY - {"numpy"} | {"records", "distributed", "trainable", "training"},
    "cpu_layers": {"faiss", "paddlenlp", "records", "distributed", "trainable", "training"},
    "cpu_attention": {"paddle", "paddlenlp", "faiss", "records", "distributed", "trainable", "training", "cpu_layers"},
    "cpu_blocks": {"paddle", "paddlenlp", "faiss", "records", "distributed", "trainable", "training", "cpu_layers"},
    "trainable": {"faiss", "records", "distributed", "search", "training"},
    "gradients": {"faiss", "records", "search", "training", "paddlenlp"},
    "dev_evaluation": {"paddle", "paddlenlp", "faiss", "trainable", "training"},
    "training_folder": HEAVY | {"records", "arguments", "trainable", "trainer", "training"},
    "trainer": {"faiss", "dedup", "search", "records"},
    "training": {"faiss", "dedup", "search"},
    "compiled": HEAVY - {"numpy"} | {"records", "distributed", "encoder"},
    "weights": {"faiss", "records", "distributed", "encoder", "training"},
    "lean_forward": {"faiss", "paddlenlp", "records", "distributed", "training", "trainable", "weights"},
    "export": {"paddlenlp", "faiss", "records", "distributed", "encoder", "training"},
    "evaluation_outputs": {"paddle", "paddlenlp", "faiss", "encoder", "engines", "search", "evaluation"},
    "evaluation_rankings": HEAVY - {"numpy"} | {"distributed", "search", "encoder"},
    "evaluation_tables": HEAVY | {"records", "collection", "evaluation"},
    "cleaning": {"paddle", "paddlenlp", "faiss", "mining", "evaluation", "training"},
    "mining": {"paddle", "paddlenlp", "faiss", "cleaning", "evaluation", "training"},
    "evaluation": {"paddle", "paddlenlp", "faiss", "cleaning", "mining", "training"},
    "report": {"paddle", "paddlenlp", "faiss", "dedup", "search"},
}
# These cost seconds, so no module may import them before it needs them.
LAZY = {
    "paddle", "paddlenlp", "faiss", "tqdm", "safetensors", "tokenizers", "sentencepiece", "bm25s", "jieba",
    "amx", "avx512", "amx_matmul", "amx_attention", "amx_attention_gradients", "cpu_kernels",
    "encoder_kernels", "kernel_maths",  # for numba
    "qwen3",  # for paddle
}  # fmt: skip
COMPILED = {
    "amx",
    "avx512",
    "amx_matmul",
    "amx_attention",
    "amx_attention_gradients",
    "cpu_kernels",
    "encoder_kernels",
    "kernel_maths",
}  # and so these may import each other
LAYERS = {"qwen3"}  # these define Paddle's layers


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {part for name in names for part in (name.split(".")[0], name.removeprefix("utils.").split(".")[0])}


def source(room: str) -> ast.Module:
    return ast.parse((ROOT / "utils" / f"{room}.py").read_text())


def test_every_room_has_its_limits():
    assert FORBIDDEN.keys() == {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_do_not_know_what_they_must_not(room):
    assert not imported(source(room)) & FORBIDDEN[room]


@pytest.mark.parametrize("path", sorted((ROOT / "utils").glob("*.py")), ids=lambda path: path.stem)
def test_slow_packages_are_imported_where_they_are_needed(path):
    top = ast.Module([n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    needed = COMPILED if path.stem in COMPILED else {"paddle"} if path.stem in LAYERS else set()
    assert not imported(top) & (LAZY - needed)


@pytest.mark.parametrize("path", sorted((ROOT / "utils").glob("*.py")), ids=lambda path: path.stem)
def test_every_module_says_what_it_is_for(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text))
