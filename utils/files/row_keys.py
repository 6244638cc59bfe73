"""FlagEmbedding's keys that say how a row is encoded and trained: its own instruction, and its type."""

import logging
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

# Rows whose queries see their own passages only; nor are these any other query's negatives.
ALONE = ("symmetric_class", "symmetric_clustering")
# Rows whose passages are of the same kind as their queries, and are encoded like them.
LIKE_QUERIES = ("symmetric_sts", "symmetric_clustering")
# Rows of which a group takes one negative.
ONE_NEGATIVE = "only_1neg"
_NORMAL = "normal"
TYPES = (_NORMAL, ONE_NEGATIVE, *dict.fromkeys(LIKE_QUERIES + ALONE))


def prompt_of(row: dict) -> str | None:
    """What stands before the row's query, in place of a template; None if it has no such text."""
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, str) else None


def type_of(row: dict) -> str | None:
    """The row's type, if it is one that asks for anything; None otherwise."""
    kind = row.get("type")
    return kind if isinstance(kind, str) and kind in TYPES[1:] else None


@dataclass
class KeyCounts:
    """How many rows have a prompt, an unusable one, and each type; unknown types are counted together."""

    prompts: int = 0
    bad_prompts: int = 0
    types: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    first_unknown: object = None

    def add(self, row: dict) -> None:
        """Count a row."""
        prompt, kind = row.get("prompt"), row.get("type")
        self.prompts += isinstance(prompt, str)
        self.bad_prompts += prompt is not None and not isinstance(prompt, str)
        if type_of(row) is not None:
            self.types[kind] += 1
        elif kind not in (None, _NORMAL):
            self.first_unknown = self.first_unknown if self.unknown else kind
            self.unknown += 1

    def log_prompts(self, why_unused: str | None = None) -> None:
        """One line on each kind of prompt; ``why_unused``, where none of them is used."""
        if self.prompts and why_unused is None:
            logger.info(
                "%s rows have a prompt: it stands before the query, in place of the template", f"{self.prompts:,}"
            )
        elif self.prompts:
            logger.warning("warning: %s rows have a prompt, which is not used: %s", f"{self.prompts:,}", why_unused)
        if self.bad_prompts:
            logger.warning(
                "warning: %s rows have a prompt that is not a string; it is not used", f"{self.bad_prompts:,}"
            )

    def log_types(self) -> None:
        """One line on the types that training goes by, and one on those that it does not know."""
        if self.types:
            found = ", ".join(f"{kind} ({count:,})" for kind, count in self.types.items())
            logger.info("rows of a type with rules of its own (docs/training.md): %s", found)
        if self.unknown:
            logger.warning(
                "warning: %s rows have an unknown type, such as %.40r, and are trained as %s; known: %s",
                f"{self.unknown:,}", self.first_unknown, _NORMAL, ", ".join(TYPES),
            )  # fmt: skip

    def log_unused_types(self) -> None:
        """One line on the types, where nothing goes by them."""
        n = sum(self.types.values()) + self.unknown
        if n:
            found = [*self.types, *([f"{self.first_unknown!r:.40}"] if self.unknown else [])]
            logger.warning("warning: %s rows have a type (%s), which only training uses", f"{n:,}", ", ".join(found))
