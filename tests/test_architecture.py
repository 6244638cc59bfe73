"""The packages of utils/ import only what stands above them in docs/design.md."""

import ast
import graphlib
import sys

import pytest
from conftest import ROOT

UTILS = ROOT / "utils"
# Packages, the lowest first, and which of the lower ones each may import.
_LOWER = "arguments process files kernels ranks models search encoding"
PACKAGES = {
    "arguments": "", "process": "", "files": "process", "kernels": "process", "ranks": "process files",
    "models": "process files", "search": "process files kernels ranks",
    "encoding": "arguments process files kernels ranks models search", "cleaning": _LOWER, "mining": _LOWER,
    "evaluation": _LOWER, "training": _LOWER + " evaluation",
    "prune_cache": "process files", "api": _LOWER + " cleaning mining evaluation training",
}  # fmt: skip
# The libraries that are not Python's own, and which packages or modules may import them.
LIBRARIES = {
    "numpy": "files kernels ranks models search encoding cleaning mining evaluation training",
    "paddle": "process.runtime ranks.group models encoding training",
    "paddlenlp": "models.paddlenlp training.encoder training.trainer training.trainer_arguments",
    "faiss": "search.exact search.faiss_index", "numba": "kernels.compiled kernels.amx", "llvmlite": "kernels.amx",
    "threadpoolctl": "process.threads", "tqdm": "files.report", "safetensors": "models.weight_files",
    "tokenizers": "models.tokenizers models.bundled", "sentencepiece": "models.bundled",
    "bm25s": "search.bm25", "jieba": "search.bm25",
}  # fmt: skip
# These cost seconds: they import at the top what others import only where they need it.
SLOW = (
    "kernels.amx kernels.maths kernels.encoder_loops kernels.training_loops models.qwen3 training.layers.pylayers"
    " training.trainer"
)  # fmt: skip
MODULES = sorted(
    ".".join(path.relative_to(UTILS).with_suffix("").parts)
    for path in UTILS.rglob("*.py")
    if path.name != "__init__.py"
)


def tree_of(module: str) -> ast.Module:
    """Without what is imported for the names of types only, which makes a module depend on nothing."""
    tree = ast.parse((UTILS / f"{module.replace('.', '/')}.py").read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return tree


def imported(module: str, nodes) -> tuple[set[str], set[str]]:
    """Modules of utils, and other libraries, that are imported by these nodes."""
    own, libraries = set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            libraries |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            libraries.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level]
            base = [*above, *(node.module or "").split(".")] if node.module else above
            name = ".".join(base)
            own |= {name} if name in MODULES else {f"{name}.{alias.name}".lstrip(".") for alias in node.names}
    libraries = {name.split(".")[0] for name in libraries} - sys.stdlib_module_names
    return own, libraries


def is_within(module: str, names: str) -> bool:
    """Whether a module is one of these, or lies in one of these packages."""
    return any(module == name or module.startswith(f"{name}.") for name in names.split())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_stands_above_its_package(module):
    own, libraries = imported(module, ast.walk(tree_of(module)))
    package = module.split(".")[0]
    assert own <= {*MODULES}
    assert not [name for name in own if not is_within(name, f"{package} {PACKAGES[package]}")]
    assert not [name for name in libraries if not is_within(module, LIBRARIES[name])]


def test_packages_stand_above_what_imports_them():
    lower = []
    for package, known in PACKAGES.items():
        assert {*known.split()} <= {*lower}
        lower.append(package)
    assert {module.split(".")[0] for module in MODULES} == {*PACKAGES}


def test_modules_do_not_import_each_other_in_circles():
    graphlib.TopologicalSorter({module: imported(module, ast.walk(tree_of(module)))[0] for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if not is_within(module, SLOW)])
def test_what_is_slow_is_imported_where_it_is_needed(module):
    own, libraries = imported(module, tree_of(module).body)
    assert not [name for name in own if is_within(name, SLOW)]
    assert libraries <= {"numpy", "numba"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(tree_of(module))
