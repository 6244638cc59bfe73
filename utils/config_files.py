"""The small JSON files in a model's folder: read with errors that name them, and written for people to read."""

import json
from pathlib import Path


def read_json(path: Path):
    """What the file holds; None if it is not there.

    Raises:
        ValueError: it cannot be read, or is not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None


def read_json_object(path: Path) -> dict:
    """The JSON object in the file; empty if it is not there.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value or {}


def write_json(path: Path, value) -> None:
    """The value as indented JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
