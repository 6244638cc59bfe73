"""What a finished run wrote, read again for its result: texts are not held in memory."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import json_files
from .jsonl import RawLine, parse_object, read_lines
from .outputs import REPORT


@dataclass(frozen=True)
class Written:
    """The files of one run: its main output's path, and what its report holds."""

    main: Path
    report: dict

    def path(self, suffix: str = "") -> str:
        """Of the file ``<main><suffix>``.

        Raises:
            FileNotFoundError: it is gone, or the report is.
            ValueError: another run has written its files there.
        """
        final, about = (self.main.with_name(self.main.name + name) for name in (suffix, REPORT))
        for path in (final, about):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; this result's texts were in it")
        if about.read_bytes() != json_files.as_json(self.report):
            raise ValueError(f"{about}: is of another run, which has replaced the files with this result's texts")
        return str(final)

    def rows(self, suffix: str = "") -> Iterator[dict]:
        """Its rows one by one. Raises at once as ``path`` does."""
        path = self.path(suffix)
        return (parse_object(raw, path) for raw in read_lines(path))

    def between(self, first: int, end: int, suffix: str = "") -> list[dict]:
        """Its rows from one byte to another, of the file before it is gzipped."""
        path = self.path(suffix)
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as stream:
            stream.seek(first)
            lines = stream.read(end - first).splitlines()
        return [parse_object(RawLine(number, line), path) for number, line in enumerate(lines, 1)]
