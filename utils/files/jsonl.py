"""Rows of (query, positives, negatives): JSON Lines in and out.

Every complaint names ``path:line``, what was found and what was expected. Nothing here knows what
the rows are for.
"""

import gzip
import hashlib
import json
import math
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

# FlagEmbedding writes its rows under shorter names.
_ALIASES = {"pos_passage": "pos", "neg_passage": "neg"}
# Full-width and half-width forms, by what they are forms of.
_WIDTHS = {
    code: chr(int(unicodedata.decomposition(chr(code)).split()[1], 16))
    for code in range(0x3000, 0x10000)
    if unicodedata.decomposition(chr(code)).startswith(("<wide>", "<narrow>"))
}
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """A row that cannot be used: ``path:line: what was found; what was expected``."""

    def __init__(self, path: str, line: int, reason: str):
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = path, line, reason

    def __reduce__(self) -> tuple:
        """Errors travel between ranks, pickled."""
        return RecordError, (self.path, self.line, self.reason)


def set_aside(error: RecordError, rejected: list[RecordError] | None) -> None:
    """Keep a bad row's error in a list; where there is none, raise it, with what a user can do about it."""
    if rejected is None:
        raise RecordError(error.path, error.line, f"{error.reason} (on_bad_row skip leaves bad rows out)") from None
    rejected.append(error)


@dataclass(frozen=True, slots=True)
class Record:
    """One row. ``row`` is the whole JSON object, so that unknown keys and their order survive."""

    query: str
    pos_passage: tuple[str, ...]
    neg_passage: tuple[str, ...]
    line: int
    row: dict


class RawLine(NamedTuple):
    """A line of a file: its 1-based number, and its bytes without the line ending."""

    number: int
    content: bytes


@dataclass
class Source:
    """A JSONL file (``.gz`` too) read as records, row by row.

    Args:
        path: the file.
        require: the keys that each row must have, filled.
        on_bad_row: ``"error"`` raises at the first bad row, ``"skip"`` collects it in ``rejected``.
        check: raises a RecordError if a row is bad for another reason than its form.

    After a full pass ``n_rows`` counts the rows (blank lines are not rows), ``rejected`` holds the bad
    ones and ``digest`` the SHA-256 of the content, so that a second pass can tell that the file is
    still the same.
    """

    path: str
    require: tuple[str, ...] = ("query",)
    on_bad_row: str = "error"
    check: Callable[[Record], object] = lambda record: None
    n_rows: int = 0
    digest: str = ""
    rejected: list[RecordError] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        hasher = hashlib.sha256()
        rejected: list[RecordError] = []
        n_rows = 0
        for raw in read_lines(self.path, hasher.update):
            n_rows += 1
            try:
                record = parse_record(raw, self.path, self.require)
                self.check(record)
            except RecordError as error:
                set_aside(error, rejected if self.on_bad_row == "skip" else None)
                continue
            yield record
        if n_rows == 0:
            raise ValueError(f"{self.path}: the file has no rows; expected one JSON object a line")
        if len(rejected) == n_rows:
            raise ValueError(f"{self.path}: all {n_rows} rows are bad, the first: {rejected[0]}")
        self.n_rows, self.rejected, self.digest = n_rows, rejected, hasher.hexdigest()

    def raw_lines(self) -> Iterator[RawLine]:
        """The rows' lines again, byte for byte; raises if the file changed since the full pass."""
        hasher = hashlib.sha256()
        yield from read_lines(self.path, hasher.update)
        if hasher.hexdigest() != self.digest:
            raise ValueError(f"{self.path}: the file changed while it was being processed; run again")


def read_lines(path: str, saw: Callable[[bytes], None] = lambda chunk: None) -> Iterator[RawLine]:
    """The non-blank lines of a file, gunzipped by content; ``saw`` gets every byte that was read."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; expected a JSONL file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a directory; expected a JSONL file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: is no regular file; expected a JSONL file, which is read twice")
    try:
        plain = open(path, "rb")  # noqa: SIM115 - the next line closes it
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror}") from None
    with plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=plain) if zipped else plain
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                saw(line)
                if number == 1:
                    line = line.removeprefix(_BOM)
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield RawLine(number, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise RecordError(path, number + 1, f"broken gzip data: {error}") from None


def parse_record(raw: RawLine, path: str, require: tuple[str, ...]) -> Record:
    """One line as a record.

    Raises:
        RecordError: not UTF-8, not a JSON object, or a key that is missing, empty or of a wrong type.
    """

    def bad(reason: str) -> RecordError:
        return RecordError(path, raw.number, reason)

    row = parse_object(raw, path)
    query = row.get("query", "")
    if "query" in row and not isinstance(query, str):
        raise bad(f'"query" is {_kind(query)}; expected a string')
    if "query" in require and not query.strip():
        hint = " (rows of anchor, positive and negative are for other tools)" if "anchor" in row else ""
        raise bad(f'"query" is {"empty" if "query" in row else "missing"}; expected a non-empty string{hint}')
    passages = []
    for key in _ALIASES:
        name = passages_key(row, key)
        values = _as_list(key, row, name)
        alias = _ALIASES[key]
        if name != alias and alias in row and _as_list(key, row, alias) != values:
            raise bad(f'"{key}" and "{alias}" are both there and differ; expected one of them')
        if not isinstance(values, list):
            raise bad(f'"{name}" is {_kind(values)}; expected a list of strings')
        for position, value in enumerate(values):
            if not isinstance(value, str):
                raise bad(f'"{name}"[{position}] is {_kind(value)}; expected a string')
            if not value.strip():
                raise bad(f'"{name}"[{position}] is empty; expected a non-empty string')
        if key in require and not values:
            found = "an empty list" if name in row else "missing"
            raise bad(f'"{name}" is {found}; expected a list of at least one string')
        passages.append(tuple(values))
    try:
        for text in (query, *passages[0], *passages[1]):
            text.encode()
    except UnicodeEncodeError:
        raise bad("a text holds half of a surrogate pair (\\ud800 to \\udfff); expected valid Unicode") from None
    return Record(query, passages[0], passages[1], raw.number, row)


def _as_list(key: str, row: dict, name: str):
    """A row's passages. PaddleNLP's rows may hold a positive as a string; others say "no negative" by null or [""]."""
    values = row.get(name, [])
    if isinstance(values, str) and values.strip():
        row[name] = values = [values]
    return [] if key == "neg_passage" and values in (None, [""], "") else values


def parse_object(raw: RawLine, path: str) -> dict:
    """One line as a JSON object, or a RecordError that says what stands there instead.

    Raises:
        ValueError: the file is a JSON array, whose lines mean nothing alone: none can be skipped.
    """
    if raw.number == 1 and raw.content.lstrip().startswith(b"["):
        hint = "for row in json.load(file): print(json.dumps(row, ensure_ascii=False))"
        raise ValueError(f"{path}: is a JSON array; expected one JSON object a line, as made by: {hint}")
    try:
        row = json.loads(
            raw.content.decode(), parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole,
            object_pairs_hook=_each_once,
        )  # fmt: skip
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} of the line is not UTF-8; expected UTF-8 text{_other_encoding(raw.content)}"
        raise RecordError(path, raw.number, reason) from None
    except json.JSONDecodeError as error:
        hint = ", with double quotes around keys and texts" if raw.content.lstrip().startswith(b"{'") else ""
        reason = f"not JSON ({error.msg} at column {error.colno}); expected one JSON object a line{hint}"
        raise RecordError(path, raw.number, reason) from None
    except RecursionError:
        reason = "JSON nested too deeply; expected one flat JSON object a line"
        raise RecordError(path, raw.number, reason) from None
    except ValueError as error:  # of our own
        reason = f"not usable JSON ({error}); expected one JSON object a line"
        raise RecordError(path, raw.number, reason) from None
    if not isinstance(row, dict):
        raise RecordError(path, raw.number, f"the row is {_kind(row)}; expected a JSON object")
    return row


def _other_encoding(content: bytes) -> str:
    """A hint for lines that Chinese programs have written."""
    try:
        content.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return " (it may be GB18030: iconv -f GB18030 -t UTF-8 converts it)"


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, of whose equal keys Python would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f'"{twice:.40}" is there twice')
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    """Such as 1e400, which Python would read as infinity and write as what is no JSON."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's message tells programmers how to allow so many digits
        raise ValueError(f"a number of {len(text.lstrip('-')):,} digits is too large") from None


def _kind(value) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def passages_key(row: dict, key: str) -> str:
    """Under which name a row holds ``pos_passage`` or ``neg_passage``: ours, or FlagEmbedding's."""
    alias = _ALIASES[key]
    return alias if key not in row and alias in row else key


def fold(text: str) -> str:
    """What makes two texts equal: composed characters, of ordinary width, white space as one space, none at the ends.

    Keyboards and encodings vary these. Nothing is folded that changes a number or a letter: ``10⁵`` is not ``105``.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_WIDTHS))
    return " ".join(text.split())


def to_line(row: dict) -> bytes:
    """A JSON object as one UTF-8 line, with its line ending."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a key that is not ours: it stays escaped
        return json.dumps(row).encode() + b"\n"
