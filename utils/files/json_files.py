"""Small JSON files that describe something: read strictly, and written in one form."""

import json
from pathlib import Path

from .outputs import described


def read(path: Path, missing=None, expected: str = "JSON"):
    """What a JSON file holds, with or without a byte order mark; ``missing`` if there is no such file.

    Args:
        expected: what error messages say was expected.

    Raises:
        OSError: it cannot be read; the message names it.
        ValueError: it is no regular file, or not JSON in UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file; expected {expected}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return missing
    except OSError as error:
        raise described(error, f"{path}: cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); expected {expected}") from None


def read_object(path: Path, expected: str = "a JSON object") -> dict:
    """The object that a JSON file holds, empty if there is no such file; see ``read``.

    Raises:
        ValueError: it holds another value, also where that is null.
    """
    value = read(path, {}, expected)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is {value!r:.40}; expected {expected}")
    return value


def as_json(value) -> bytes:
    """A value as indented JSON in UTF-8, texts in their own script."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def write(path: Path, value) -> None:
    """A value as ``as_json``, in place: for folders that appear whole.

    Raises:
        OSError: it cannot be written.
    """
    path.write_bytes(as_json(value))
