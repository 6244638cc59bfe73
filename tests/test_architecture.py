"""The rooms of utils/ import only what DESIGN allows them."""

import ast
import graphlib
import sys

import pytest
from conftest import ROOT

# Areas of rooms, the lowest first, and what each may import beside its own rooms: lower areas, or single rooms of them.
AREAS = {
    "arguments": ("other_names paddlenlp_keys argument_parsing arguments training_arguments", ""),
    "own_files": ("own_files", ""),
    "machine": ("interruption runtime mapped shared_memory threads compiled", "own_files"),
    "products": ("avx512 amx matmul amx_matmul amx_attention amx_attention_gradients kernel_maths", "machine"),
    "ranks": ("meeting distributed", "machine"),
    "rows": ("trec records row_keys run_ids ragged merged_positives beir mining_formats", ""),
    "files": ("outputs json_files", "own_files records"),
    "stores": ("embedding_store", "own_files files"),
    "reports": ("report written", "runtime records files"),
    "formulae": ("metrics statistics losses standing", ""),
    "scores": ("scores search_kernels", "machine"),
    "screens": ("search_screens screening", "machine products scores"),
    "search": (
        "search faiss_search dealing answers dedup thresholds", "machine products ranks ragged scores screens",
    ),
    "models": (
        "sentence_transformers_folder bundled_model model_types checkpoint weight_files pdparams torch_files bert_names"
        " weights paddlenlp_models qwen3", "own_files machine files",
    ),
    "texts": ("word_cache wordpiece tokenizer_settings tokenizing", "json_files paddlenlp_models"),
    "encoding": ("encoder_kernels onednn engines encoder", "machine products models texts"),
    "embedding": ("embedding reranker", "arguments machine ranks stores reports models encoding"),
    "collections": ("collection comparison", "arguments rows files formulae"),
    "negatives": ("mining_problem rankings margins negatives sampling", "machine ragged scores"),
    "retrievers": ("bm25 fusion", "own_files runtime"),
    "candidates": ("mining_inputs", "arguments rows files stores mining_problem"),
    "mined": ("mining_result mining_outputs", "arguments machine rows files reports negatives candidates"),
    "mining_search": (
        "mining_search", "arguments machine ranks stores reports scores search engines rankings retrievers candidates",
    ),
    "batches": ("training_rows hard_batches batch_plan training_data", "rows tokenizing"),
    "cpu": ("cpu_kernels cpu_blocks cpu_attention cpu_pylayers cpu_layers", "machine products"),
    "trainable": ("lean_forward trainable", "machine products models encoding cpu"),
    "gradients": ("gradients", "ranks losses tokenizing batches trainable"),
    "dev": ("dev_evaluation", "rows ranks formulae search encoding collections"),
    "folders": ("training_folder", "own_files files"),
    "resuming": ("resuming", "own_files arguments files report checkpoint folders"),
    "export": ("export", "json_files models wordpiece"),
    "trainer": (
        "paddlenlp_arguments saves embedding_trainer",
        "arguments machine ranks files reports formulae models encoding batches trainable gradients folders",
    ),
    "evaluated": (
        "evaluation_outputs evaluation_rankings evaluation_tables evaluation_result",
        "arguments machine rows files reports formulae scores collections retrievers",
    ),
    "evaluation": (
        "evaluation",
        "arguments machine ranks rows files stores reports formulae scores search encoding embedding collections"
        " evaluated",
    ),
    "cleaning": (
        "cleaning_examples cleaning_result cleaning_rows holdout cleaning",
        "arguments machine ranks rows files stores reports scores search encoding embedding",
    ),
    "mining": (
        "mining",
        "arguments machine ranks rows files stores reports scores search embedding negatives candidates mining_search"
        " mined",
    ),
    "training": (
        "training",
        "arguments machine ranks records row_keys files reports formulae models texts encoding batches trainable dev"
        " folders resuming export trainer",
    ),
}  # fmt: skip
# The packages that are not Python's own, and who may import them.
PACKAGES = {
    "numpy": "trec retrievers mapped shared_memory products ranks ragged stores metrics statistics scores screens"
    " search bundled_model weight_files pdparams torch_files weights tokenizing encoding embedding"
    " collections negatives"
    " candidates mining_search batches cpu trainable gradients dev evaluated evaluation cleaning mined mining",
    "paddle": "runtime ranks losses qwen3 paddlenlp_models weights engines reranker cpu_pylayers trainable gradients"
    " trainer training",
    "paddlenlp": "paddlenlp_models trainable trainer",
    "faiss": "search faiss_search", "numba": "compiled amx avx512", "llvmlite": "amx avx512",
    "threadpoolctl": "threads", "tqdm": "report", "safetensors": "weight_files",
    "tokenizers": "wordpiece tokenizer_settings tokenizing bundled_model", "sentencepiece": "bundled_model",
    "bm25s": "bm25", "jieba": "bm25",
}  # fmt: skip
# These cost seconds: they import at the top what others import only where they need it.
SLOW = (
    "amx avx512 amx_matmul amx_attention amx_attention_gradients kernel_maths encoder_kernels cpu_kernels"
    " qwen3 cpu_pylayers embedding_trainer"
)
ROOMS = sorted(path.stem for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__")


def imported(nodes: list[ast.AST]) -> set[str]:
    """Rooms and packages that are imported by these nodes."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("utils.").split(".")[0] for name in names} - sys.stdlib_module_names


def source(room: str) -> ast.Module:
    """Without what is imported for the names of types only, which makes a room depend on nothing."""
    tree = ast.parse((ROOT / "utils" / f"{room}.py").read_text())
    is_for_types = [isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for node in tree.body]
    tree.body = [node for node, skipped in zip(tree.body, is_for_types, strict=True) if not skipped]
    return tree


def rooms_of(names: str) -> set[str]:
    """The rooms of areas, and rooms themselves."""
    return {room for name in names.split() for room in AREAS.get(name, (name,))[0].split()}


def test_every_room_has_its_area_above_those_that_it_may_import():
    lower = []
    for rooms, known in AREAS.values():
        assert rooms_of(known) <= {*lower}
        lower += rooms.split()
    assert sorted(lower) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_area_may(room):
    (area,) = (" ".join(area) for area in AREAS.values() if room in area[0].split())
    packages = {package for package, names in PACKAGES.items() if room in rooms_of(names)}
    assert imported(ast.walk(source(room))) <= rooms_of(area) | packages


def test_rooms_do_not_import_each_other_in_circles():
    graphlib.TopologicalSorter({room: imported(ast.walk(source(room))) for room in ROOMS}).prepare()


@pytest.mark.parametrize("room", sorted({*ROOMS} - rooms_of(SLOW)))
def test_what_is_slow_is_imported_where_it_is_needed(room):
    assert not imported(source(room).body) & (rooms_of(SLOW) | PACKAGES.keys() - {"numpy", "numba"})


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_for(room):
    assert ast.get_docstring(source(room))
