"""The toolkit. Installed, this package is called ``paddle_embedding_toolkit``."""

import importlib

# What is imported from here, and where it is: at the first use, because some of it loads libraries.
_PLACES = {
    "Clean_Query": "api", "MiningNegativeSamples": "api", "Embedding_Evaluation": "api",
    "ModelArguments": "arguments.scripts", "build": "arguments.scripts", "build_encoders": "encoding.embed",
}  # fmt: skip
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
