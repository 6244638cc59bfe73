"""Each rank's part of the planned batches, tokenised, and the warnings that come before any step.

Every rank reads the same rows and makes the same plan of whole batches, then tokenises its own part of
each. So all ranks know which passages are in a batch, and which of them are known positives of which
queries, without exchanging a text.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..files.row_keys import LIKE_QUERIES
from ..models.tokenizers.tokenizer import Tokenizer
from .plan import Example, Plan
from .rows import TrainingRows

# Texts of each side whose lengths the preflight measures, at most, and batches that it looks through.
_SAMPLE_TEXTS, _SAMPLE_BATCHES = 2000, 50


@dataclass
class TrainingBatch:
    """One rank's part of a batch, tokenised, with what is known about the whole of it.

    The positive of query i is passage i * group_size. ``ignored`` [n, n * group_size] and ``scores``
    [n, group_size] cover the whole batch, or this rank's part only if negatives are not shared.

    Args:
        counts: queries on each rank.
        number: of the batch since training began, counting from 0.
    """

    query_tokens: list[Sequence[int]]
    passage_tokens: list[Sequence[int]]
    ignored: np.ndarray
    scores: np.ndarray | None
    counts: list[int]
    number: int


class Collator:
    """Makes one rank's ``TrainingBatch`` of a planned batch.

    Args:
        tokenizers, templates: of queries and of passages.
        shared: True if every rank's passages are negatives of every query.
    """

    def __init__(
        self,
        rows: TrainingRows,
        group_size: int,
        tokenizers: tuple[Tokenizer, Tokenizer],
        templates: tuple[str, str],
        rank: int = 0,
        n_ranks: int = 1,
        shared: bool = True,
        needs_scores: bool = False,
    ):
        self.rows, self.group_size, self.needs_scores = rows, group_size, needs_scores
        self.tokenizers, self.templates = tokenizers, templates
        self.rank, self.n_ranks, self.shared = rank, n_ranks, shared

    def __call__(self, examples: list[Example], number: int) -> TrainingBatch:
        parts = np.array_split(np.arange(len(examples)), self.n_ranks)
        own = [examples[i] for i in parts[self.rank]]
        whole = examples if self.shared else own
        return TrainingBatch(
            query_tokens=self.tokenizers[0]([self._query(example) for example in own]),
            passage_tokens=self.tokenizers[1]([text for example in own for text in self._passages(example)]),
            ignored=ignored(self.rows, whole),
            scores=self._scores(whole) if self.needs_scores else None,
            counts=[len(part) for part in parts],
            number=number,
        )

    def _query(self, example: Example) -> str:
        return as_query(self.rows, example.row, self.rows.queries[example.query_id], self.templates[0])

    def _passages(self, example: Example) -> list[str]:
        texts = [self.rows.passages[p] for p in example.passages]
        if self.rows.types.get(example.row) in LIKE_QUERIES:
            return [as_query(self.rows, example.row, text, self.templates[0]) for text in texts]
        return [self.templates[1].replace("{text}", text) for text in texts]

    def _scores(self, examples: list[Example]) -> np.ndarray:
        by_row = [[self.rows.scores[e.row].get(int(p), np.nan) for p in e.passages] for e in examples]
        return np.array(by_row, np.float32)


def as_query(rows: TrainingRows, row: int, text: str, template: str) -> str:
    """A text of a row as its query is encoded: with the row's own prompt before it, or in the template."""
    prompt = rows.prompts.get(row)
    return template.replace("{text}", text) if prompt is None else prompt + text


def ignored(rows: TrainingRows, examples: list[Example]) -> np.ndarray:
    """Which passages of a batch are no negatives of its queries, bool [n, n * g].

    They are the known positives, and of rows that stand ``alone`` all but the negatives that such a row itself names.
    A query's own positive, at column i * g, is False: it is no negative, but the loss needs it.
    """
    columns: dict[int, list[int]] = {}
    for column, passage in enumerate(np.concatenate([example.passages for example in examples]).tolist()):
        columns.setdefault(passage, []).append(column)
    group_size = len(examples[0].passages)
    mask = np.zeros((len(examples), len(examples) * group_size), bool)
    for i, example in enumerate(examples):
        for passage in rows.known_positives[example.query_id] & columns.keys():
            mask[i, columns[passage]] = True
        mask[i, i * group_size] = False
    for i in np.flatnonzero(rows.alone[[example.row for example in examples]]).tolist():
        group = slice(i * group_size, (i + 1) * group_size)
        mask[i, :] = mask[:, group] = True
        mask[i, group] = ~np.isin(examples[i].passages, rows.negatives[examples[i].row])
        mask[i, i * group_size] = False
    return mask


@dataclass
class Preflight:
    """What the data will be to the training, found out before the first step."""

    facts: dict[str, float]
    warnings: list[str]

    @classmethod
    def joined(cls, parts: list["Preflight"]) -> "Preflight":
        """What all of them found, in their order."""
        facts = {name: value for part in parts for name, value in part.facts.items()}
        return cls(facts, [warning for part in parts for warning in part.warnings])


def preflight(
    plan: Plan, tokenizers: tuple[Tokenizer, Tokenizer], templates: tuple[str, str], limits: tuple[int, int],
    loss_takes_batch: bool = True, n_parts: int = 1,
) -> Preflight:  # fmt: skip
    """Look the data over.

    Args:
        tokenizers: that do not cut texts.
        limits: the longest query and passage in tokens.
        loss_takes_batch: False for losses that see a query's own group only, and of it what a teacher has scored.
        n_parts: into how many parts a batch falls whose passages are no negatives of each other.

    Raises:
        ValueError: there is no batch, or nothing that the loss could compare.
    """
    rows = plan.rows
    found = [Preflight({"rows": len(rows), "passages": len(rows.passages)}, [])]
    _, first_rows = np.unique(rows.query_ids, return_index=True)
    queries = [as_query(rows, row, rows.queries[rows.query_ids[row]], templates[0]) for row in _sample(first_rows)]
    passages = [templates[1].replace("{text}", text) for text in _sample(rows.passages)]
    sides = ("queries", queries, len(rows.queries)), ("passages", passages, len(rows.passages))
    for side, (name, texts, n) in enumerate(sides):
        lengths = np.array([len(ids) for ids in tokenizers[side](texts)])
        found.append(_cut_texts(name, lengths, n, limits[side], f"max_{('query', 'passage')[side]}_len"))
    found.append(_short_rows(plan, loss_takes_batch))
    if not len(plan):
        raise ValueError(_too_few(plan))
    found.append(_what_queries_see(plan, loss_takes_batch, n_parts))
    return Preflight.joined(found)


def _sample(everything: Sequence) -> Sequence:
    return everything[:: -(-len(everything) // _SAMPLE_TEXTS)]


def _cut_texts(name: str, lengths: np.ndarray, n: int, limit: int, argument: str) -> Preflight:
    """How many of the ``n`` texts of a side are longer than ``argument`` lets through, from the lengths of some."""
    median, share = float(np.median(lengths)), float((lengths > limit).mean())
    beyond, scale = np.maximum(lengths - limit, 0), n / len(lengths)
    n_cut, n_tokens = round(float((beyond > 0).sum() * scale)), round(float(beyond.sum() * scale))
    facts = {"median_tokens": median, "cut_share": round(share, 4), "cut_texts": n_cut, "cut_tokens": n_tokens}
    found = Preflight({f"{name}_{fact}": value for fact, value in facts.items()}, [])
    if n_cut:
        about = "about " if len(lengths) < n else ""
        found.warnings.append(
            f"{about}{n_cut:,} of the {n:,} {name} ({share:.1%}) are longer than {argument} = {limit} tokens (half are"
            f" longer than {median:.0f}); their other {n_tokens:,} tokens are cut off and cannot be learnt"
        )
    return found


def _short_rows(plan: Plan, loss_takes_batch: bool) -> Preflight:
    """Rows with fewer negatives than their group has room for, or with negatives that go unused.

    Raises:
        ValueError: there is nothing that the loss could compare.
    """
    rows, wanted = plan.rows, plan.group_size - 1
    counts = rows.negatives.sizes()
    short, without = int((counts < wanted).sum()), int((counts == 0).sum())
    found = Preflight({"rows_without_negatives": without, "negatives_that_are_positives": rows.n_false}, [])
    if not loss_takes_batch and without == len(rows):
        which = " that is no positive of its query" if rows.n_false else ""
        raise ValueError(
            f"no row has a negative{which}, and this loss compares a row's own passages; expected neg_passage with "
            "neg_scores"
        )
    if wanted == 0 and counts.any() and not plan.hard_batches:
        found.warnings.append(
            f"group_size is 1, so the hard negatives of {len(rows) - without:,} rows go unused; hard_batches uses "
            "those that are other rows' positives"
        )
    if short:
        gaps = "other queries' positives fill the gaps"
        if not loss_takes_batch:
            gaps = (
                "this loss compares a row's own passages only, so nothing fills the gaps, and a row with none is idle"
            )
        found.warnings.append(
            f"{short:,} of {len(rows):,} rows have fewer than {wanted} negatives ({without:,} have none); {gaps}"
        )
    idle = int((rows.alone & (np.minimum(counts, wanted) == 0)).sum())
    if idle:
        found.warnings.append(
            f"{idle:,} rows of a type that has no in-batch negatives see no negative, and teach nothing; expected"
            " neg_passage in them, and a group_size of 2 or more"
        )
    if rows.n_false:
        found.warnings.append(
            f"{rows.n_false:,} negatives are named elsewhere as positives of the same query and left out"
        )
    return found


def _what_queries_see(plan: Plan, loss_takes_batch: bool, n_parts: int) -> Preflight:
    """How many negatives a query meets in its batch, and how many of them its own row names, on the first batches."""
    rows, wanted = plan.rows, plan.group_size - 1
    counts = rows.negatives.sizes()
    masked, seen, own = 0, [], []
    for batch in itertools.islice(plan.epoch(0), _SAMPLE_BATCHES):
        for part in np.array_split(np.arange(len(batch)), n_parts):
            examples = [batch[i] for i in part]
            mask = ignored(rows, examples)
            masked += int(mask.sum())
            named = np.minimum(counts[[example.row for example in examples]], wanted)
            seen.append((~mask).sum(1) - 1 if loss_takes_batch else named)
            groups = [set(example.passages.tolist()) for example in examples]
            present = set().union(*groups)
            for example, group in zip(examples, groups, strict=True):
                seen_by_it = present if loss_takes_batch else group
                own.append(sum(passage in seen_by_it for passage in rows.negatives[example.row].tolist()))
    seen_by_each = np.concatenate(seen)
    facts = {
        "batches_an_epoch": len(plan),
        "masked_pairs_a_batch": round(masked / min(len(plan), _SAMPLE_BATCHES), 2),
        "negatives_a_query_sees": round(float(seen_by_each.mean()), 1),
        "own_negatives_a_query_sees": round(float(np.mean(own)), 1),
    }
    if seen_by_each.any():
        return Preflight(facts, [])
    warning = (
        "no query sees a negative, so nothing can be learnt; expected rows of different queries and passages, and "
        "more than one in a batch (per_device_train_batch_size), or hard negatives (neg_passage, and a group_size "
        "of 2 or more)"
    )
    return Preflight(facts, [warning])


def _too_few(plan: Plan) -> str:
    """Why a plan has no batch."""
    n = plan.rows_that_can_meet
    found = f"an epoch has {n} row{'s' * (n != 1)}"
    if plan.group_by_source:
        found += " of one file at most, and group_by_source mixes none"
    if any(weight < 1 for weight in plan.rows.weights):
        found += f" (dataset_weights leave so few of {len(plan.rows)})"
    expected = f"expected at least {plan.smallest_batch} for a batch"
    if plan.drop_last:
        expected += ", as dataloader_drop_last leaves smaller ones out"
    elif plan.n_ranks > 1:
        expected += f" over {plan.n_ranks} ranks"
    return f"{found}; {expected}"


class Loader:
    """The steps of an epoch, for the Trainer's loop; ``set_epoch`` says of which.

    Args:
        batches_a_step: whose gradients are added up before an update; an epoch's last step may have fewer.
    """

    def __init__(self, plan: Plan, collate: Collator, batches_a_step: int = 1):
        self.plan, self.collate, self.number, self.n_passed_over = plan, collate, 0, 0
        self.batches_a_step, self.dataset = batches_a_step, plan.rows

    def set_epoch(self, number: int, n_passed_over: int = 0) -> None:
        """The epoch that the next iteration goes through.

        Args:
            n_passed_over: its first steps, which a resumed training passes over; they come as None, untokenised.
        """
        self.number, self.n_passed_over = number, n_passed_over

    def __len__(self) -> int:
        return -(-len(self.plan) // self.batches_a_step)

    def __iter__(self) -> Iterator[list[TrainingBatch] | None]:
        epoch, first = self.plan.epoch(self.number), self.number * len(self.plan)
        for step in range(len(self)):
            places = range(len(self.plan))[step * self.batches_a_step : (step + 1) * self.batches_a_step]
            yield None if step < self.n_passed_over else [self.collate(epoch[i], first + i) for i in places]

    def rows_in(self, n_steps: int) -> int:
        """How many rows the first steps of a training go through."""
        epochs, begun = divmod(n_steps, len(self))
        started = self.plan.epoch(epochs).bounds[: begun * self.batches_a_step] if begun else []
        return epochs * (self.plan.n_rows - self.plan.n_left_out) + sum(stop - start for start, stop in started)
