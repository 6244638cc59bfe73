"""Two systems on the same queries: differences, how sure they are, and where they come from."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import json_files
from ..files.jsonl import RecordError, parse_object, read_lines
from ..files.outputs import REPORT
from ..files.row_keys import prompt_of
from . import intervals, metrics
from .collection import Collection

# What two encoders may do differently with one text. Pooling and dimensions differ by model, and are not named.
_SETTINGS = ("template", "max_src_len", "dtype", "own_prompts")


@dataclass
class Others:
    """Another run's values, by the metrics that both runs have.

    Attributes:
        names: these metrics.
        values: float64 [queries, names].
        only_there: metrics that this run lacks.
    """

    names: list[str]
    values: np.ndarray
    only_there: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """This run against another one, ``name``. Values are float64 [queries, metrics]."""

    name: str
    values: np.ndarray
    others: np.ndarray

    def tests(self, names: list[str], confidence: float, resamples: int, seed: int) -> dict[str, dict]:
        """For each metric: the other's mean, the mean difference (this run minus the other), interval, p-value."""
        differences = self.values - self.others
        low, high = intervals.bootstrap_interval(differences, confidence, resamples, seed)
        p_values = intervals.randomization_test(differences, 5 * resamples, seed)
        columns = zip(names, self.others.mean(axis=0), differences.mean(axis=0), low, high, p_values, strict=True)
        return {
            name: {
                "other": float(other),
                "difference": float(difference),
                "low": float(lower),
                "high": float(upper),
                "p_value": float(p),
            }
            for name, other, difference, lower, upper, p in columns
        }

    def changes(self, column: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the queries that won most by one metric, and that lost most; at most ``most`` of each."""
        difference = self.values[:, column] - self.others[:, column]
        falling = np.argsort(-difference, kind="stable")
        rising = np.argsort(difference, kind="stable")
        return falling[difference[falling] > 0][:most], rising[difference[rising] < 0][:most]


def is_file(compare_with: str) -> bool:
    """True if the argument means an earlier per-query file rather than a model.

    Raises:
        FileNotFoundError: it looks like a file, and there is none.
    """
    if os.path.isfile(compare_with):
        return True
    if compare_with.endswith((".json", ".jsonl", ".gz")):
        raise FileNotFoundError(f"{compare_with}: no such file; expected an earlier evaluation's per-query file")
    return False


def encoder_of(path: str) -> dict | None:
    """The encoders that an earlier run's report describes; None without a report, or where no model encoded.

    Raises:
        ValueError: the report is damaged.
    """
    report = Path(path + REPORT)
    return json_files.read_object(report).get("encoder") if report.is_file() else None


def settings_apart(own: dict | None, other: dict | None) -> list[str]:
    """One sentence for each setting in which two runs encode differently, such as the length limit.

    Args:
        own, other: the description of each run's encoders, by side (``queries``, ``passages``).
    """
    if not own or not other:
        return []
    return [
        f"{side}: {name} is {_short(own[side][name])}, the other's {_short(other[side][name])}"
        for side in ("queries", "passages")
        for name in _SETTINGS
        if side in own and side in other and own[side].get(name) != other[side].get(name)
    ]


def _short(value: object) -> str:
    return f"{value!r:.60}"


def read_earlier(path: str, collection: Collection, names: list[str], digest: str) -> Others:
    """An earlier run's values of this run's queries, by those of the metrics ``names`` that its first row has.

    Queries are told apart by their text and prompt, or by their id where the collection comes with ids.

    Raises:
        ValueError: a row that cannot be used, other queries or judgments, or no metric in common.
    """
    by_id = collection.passage_ids is not None
    keys = collection.query_ids if by_id else zip(collection.queries, collection.prompts, strict=True)
    numbers: dict = {key: row for row, key in enumerate(keys)}
    found: Others | None = None
    for raw in read_lines(path):
        row = parse_object(raw, path)

        def bad(reason: str, line: int = raw.number) -> RecordError:
            return RecordError(path, line, reason)

        name = row.get("id" if by_id else "query")
        key = name if by_id else (name, prompt_of(row))
        if not isinstance(name, str) or key not in numbers:
            raise bad(f"query {name!r:.80} is not among this run's; expected a file made from the same queries")
        if row.get("collection", digest) != digest:
            raise bad("made from another corpus, queries or judgments; expected an evaluation on the same ones")
        if found is None:
            found = _in_common(row, names, len(numbers), bad)
        for column, name in enumerate(found.names):
            value = row.get(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                there = "missing" if name not in row else f"{value!r:.40}"
                raise bad(f'"{name}" is {there}; expected a number from 0 to 1, as in every row')
            found.values[numbers[key], column] = value
    assert found is not None  # a file without rows is refused
    missing = np.flatnonzero(np.isnan(found.values).any(axis=1))
    if len(missing):
        query = collection.queries[missing[0]]
        raise ValueError(f"{path}: lacks {len(missing)} of the {len(numbers)} queries, such as {query!r:.80}")
    return found


def _in_common(row: dict, names: list[str], n: int, bad: Callable[[str], RecordError]) -> Others:
    """The metrics that both runs have, without values yet; ``row`` is one of the other's."""
    theirs = [name for name in row if metrics.is_name(name)]
    both = [name for name in names if name in theirs]
    if not both:
        has = f"has {', '.join(theirs)}" if theirs else "has no metric"
        raise bad(f"{has:.200}; expected one of this run's: {', '.join(names)}")
    return Others(both, np.full((n, len(both)), np.nan), [name for name in theirs if name not in both])
