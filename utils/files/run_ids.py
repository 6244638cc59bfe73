"""How run files and qrels name queries and passages: by their rows' ids, and those without one by where they are read.

A query without an id is ``q`` and the line of its first row; a passage ``d`` and its number, from 1, among the
different texts of all rows (a row's positives, then its negatives) and of the files after them. Evaluation and mining
number alike, whatever of it each of them uses. Mining once counted queries and what it mines from 0.
"""

from collections.abc import Iterable, Sequence

# Under which keys a row may carry its own id.
QUERY_IDS = ("_id", "query_id", "id")
PASSAGE_IDS = ("_id", "id", "docid")


def own_id(row: dict, keys: tuple[str, ...]) -> str | None:
    """The id that a row has under the first of these keys, if any."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def query_name(line: int) -> str:
    """Of a query whose first row is on that line."""
    return f"q{line}"


def passage_name(number: int) -> str:
    """Of the passage with that number in reading order, from 0."""
    return f"d{number + 1}"


class ReadingOrder:
    """Numbers the different texts that are read, from 0."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def add(self, texts: Iterable[str]) -> None:
        """The next texts."""
        for text in texts:
            self.numbers.setdefault(text, len(self.numbers))


def complete(ids: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    """Give everything its name by place, in ``ids``; ``row-`` before that where it is another's id.

    Args:
        ids: numbers by the ids that rows have.
        names: the name by place of each number.

    Returns:
        The names that mining once used, of what has no id: its number from 0.
    """
    has_own = set(ids.values())
    older = {str(number): number for number in range(len(names)) if number not in has_own and str(number) not in ids}
    for number, name in enumerate(names):
        if number in has_own:
            ids.setdefault(name, number)
            continue
        while name in ids:
            name = f"row-{name}"
        ids[name] = number
    return older
