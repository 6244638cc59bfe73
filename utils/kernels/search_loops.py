"""Compiled loops of the search: which scores of a block count, and the canonical score of a pair.

Strict arithmetic: numbers are added up in the order that is written here, on every machine.
"""

from typing import NamedTuple

import numpy as np

from .compiled import compiled

# Scores that are compared at once before any is looked at alone; a query's candidates need room for so many more.
CHUNK = 64


class Problem(NamedTuple):
    """What a block of queries is searched for.

    queries, corpus: float32 [q, d] and [n, d]. k: how many rows a query is to get. offset: float64 [q], what
    a screened score lacks of the canonical one. slack: float64 [q], how far the two may lie apart besides.
    """

    queries: np.ndarray
    corpus: np.ndarray
    k: int
    offset: np.ndarray
    slack: np.ndarray


class State(NamedTuple):
    """Each query's candidates so far.

    cut: float32 [at least q], the screened score below which nothing can be among the k best any more. count: int64
    [q]. scores, rows: float32 and int64 [q, width], the candidates.
    """

    cut: np.ndarray
    count: np.ndarray
    scores: np.ndarray
    rows: np.ndarray


@compiled(makes_arrays=False)
def canonical(left, right, terms):
    """The inner product of two float32 [d], in float64.

    The product of two float32 is exact in float64. The products are added up by halves, the second half to
    the first until one is left: an order that a processor can follow several at a time. ``terms``, float64
    [d], is overwritten.
    """
    n = len(left)
    if n == 0:
        return 0.0
    half = n // 2
    # Parts are cut out first: an index that might be negative, for all that the compiler knows, keeps it from taking
    # several values at once.
    left_part, right_part, last_left, last_right = left[:half], right[:half], left[n - half :], right[n - half :]
    for j in range(half):
        first = np.float64(left_part[j]) * np.float64(right_part[j])
        terms[j] = first + np.float64(last_left[j]) * np.float64(last_right[j])
    if 2 * half < n:
        terms[half] = np.float64(left[half]) * np.float64(right[half])
    n -= half
    while n > 1:
        half = n // 2
        last = terms[n - half : n]
        for j in range(half):
            terms[j] += last[j]
        n -= half
    return terms[0]


def score_pairs(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """The canonical scores, float64 [n], of pairs of rows (int64 [n]) of two float32 [any, d] arrays."""
    scores = np.empty(len(right_rows))
    _score_pairs(left, left_rows, right, right_rows, np.empty(right.shape[1]), scores)
    return scores


@compiled(makes_arrays=False)
def _score_pairs(left, left_rows, right, right_rows, terms, scores):
    for i in range(len(scores)):
        scores[i] = canonical(left[left_rows[i]], right[right_rows[i]], terms)


@compiled()
def sizes(vectors, centre, rounded):
    """Of each float32 row [n, d] less the centre [d]: its norm, and that of its difference from ``rounded``.

    rounded: bfloat16, as uint16 [n, d]. Returns float64 [n] twice.
    """
    n, d = vectors.shape
    norms, residuals = np.empty(n), np.empty(n)
    bits, whole, rest = np.empty(d, np.uint32), np.empty(d), np.empty(d)
    near = bits.view(np.float32)
    for i in range(n):
        for j in range(d):
            bits[j] = np.uint32(rounded[i, j]) << np.uint32(16)
        for j in range(d):
            whole[j] = np.float64(vectors[i, j]) - np.float64(centre[j])
            rest[j] = whole[j] - np.float64(near[j])
        norms[i], residuals[i] = np.sqrt(np.dot(whole, whole)), np.sqrt(np.dot(rest, rest))
    return norms, residuals


@compiled()
def finish_sketches(vectors, inside, share, sketches, norms):
    """Sketches [n, k + 1] and norms, float64 [n], of float32 rows [n, d], whose first k numbers are ``inside``.

    inside: float64 [n, k]. The last number is the root of what is left of a row's square, and of ``share`` of all.
    """
    n, k = inside.shape
    whole = np.empty(vectors.shape[1])
    for i in range(n):
        for j in range(len(whole)):
            whole[j] = np.float64(vectors[i, j])
        square = np.dot(whole, whole)
        norms[i] = np.sqrt(square) + 1e-30
        across = max(square - np.dot(inside[i], inside[i]), 0.0) + share * norms[i] * norms[i]
        for j in range(k):
            sketches[i, j] = inside[i, j]
        sketches[i, k] = np.sqrt(across) * (1 + 2.0**-22)


@compiled()
def collect(scores, first_query, first_row, problem, state):
    """Take a block of screened scores, float32 [q, n], into the candidates, clearing them when they are full.

    The block is of queries from ``first_query`` and of corpus rows from ``first_row`` on.
    """
    full = state.scores.shape[1] - CHUNK
    for i in range(len(scores)):
        query, row = first_query + i, scores[i]
        kept, numbers = state.scores[query], state.rows[query]
        for start in range(0, len(row), CHUNK):
            stop = min(start + CHUNK, len(row))
            cut = state.cut[query]
            if stop == start + CHUNK and not _any_reaches(row, start, cut):
                continue
            # Each is written, and the next one over it unless it counts: that needs no branch.
            place = state.count[query]
            for j in range(start, stop):
                kept[place] = row[j]
                numbers[place] = first_row + j
                place += np.int64(row[j] >= cut)
            state.count[query] = place
            if place >= full:
                _clear(query, problem, state)


@compiled()
def collect_pairs(queries, rows, scores, problem, state):
    """The same of pairs, int64 [n] twice and float32 [n], whose scores reached their query's cut some time ago."""
    full = state.scores.shape[1] - CHUNK
    for i in range(len(queries)):
        query = queries[i]
        if scores[i] >= state.cut[query]:
            place = state.count[query]
            state.scores[query, place], state.rows[query, place] = scores[i], rows[i]
            state.count[query] = place + 1
            if place + 1 >= full:
                _clear(query, problem, state)


@compiled()
def reaching(scores, cuts, first_row, found):
    """The pairs of a block, float32 [q, n], that reach their query's cut, float32 [q]; returns how many.

    Their queries and rows, counted from ``first_row``, go into ``found``, int64 [2, at least q * n].
    """
    count = 0
    for i in range(len(scores)):
        row = scores[i]
        for start in range(0, len(row), CHUNK):
            stop = min(start + CHUNK, len(row))
            if stop == start + CHUNK and not _any_reaches(row, start, cuts[i]):
                continue
            for j in range(start, stop):
                if row[j] >= cuts[i]:
                    found[0, count], found[1, count] = i, first_row + j
                    count += 1
    return count


@compiled()
def settle(later, earlier, pair_scores, numbers, scores, kept_rows):
    """The greedy rule within a block: each row goes for the best of those before it that stay.

    later, earlier, pair_scores: int64 twice and float64 [pairs], by later and then by earlier row of the block.
    numbers: int64 [n], what a row is called. scores, kept_rows: float64 and int64 [n], each row's best in earlier
    blocks (minus infinity, -1), which are overwritten with what is better.
    """
    for i in range(len(later)):
        row = later[i]
        if kept_rows[earlier[i]] < 0 and pair_scores[i] > scores[row]:
            scores[row], kept_rows[row] = pair_scores[i], numbers[earlier[i]]


@compiled()
def _any_reaches(row, start, cut):
    """Whether one of the scores of the chunk from ``start`` is at least the cut, without a branch for each."""
    chunk = row[start : start + CHUNK]
    near = np.int32(0)
    for j in range(CHUNK):
        near |= np.int32(chunk[j] >= cut)
    return near > 0


@compiled()
def _kth_largest(values, k):
    """The k-th largest of some float32, found bit by bit: the highest number that k of them reach."""
    bits = values.view(np.int32)
    # A negative float's other bits count down; like this, integers compare as the floats do.
    found = np.int32(-(2**31))
    for bit in range(31, -1, -1):
        # The sign's bit is worth 2**31, which takes the lowest integer to 0.
        higher = np.int32(0) if bit == 31 else np.int32(found | np.int32(1 << bit))
        count = np.int32(0)
        for j in range(len(bits)):
            ordered = np.int32(bits[j] ^ (np.int32(bits[j] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            count = np.int32(count + np.int32(ordered >= higher))
        if count >= k:
            found = higher
    return np.int32(found ^ (np.int32(found >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@compiled()
def _clear(query, problem, state):
    """Raise a query's cut to what its k-th best candidate allows, and drop what falls below."""
    scores, rows, m = state.scores[query], state.rows[query], state.count[query]
    slack = problem.slack[query]
    if m >= problem.k:
        state.cut[query] = max(state.cut[query], np.float32(_kth_largest(scores[:m], problem.k) - 2 * slack))
    left = 0
    for place in range(m):
        if scores[place] >= state.cut[query]:
            scores[left], rows[left] = scores[place], rows[place]
            left += 1
    state.count[query] = left
    if left > max(problem.k, 3 * (len(scores) - CHUNK) // 4):
        # So many near-ties that the bound cannot part them: settle them now, canonically.
        vector, terms, found = problem.queries[query], np.empty(problem.queries.shape[1]), 0
        best_scores, best_rows = np.empty(problem.k), np.empty(problem.k, np.int64)
        for place in range(left):
            score = canonical(vector, problem.corpus[rows[place]], terms)
            found = _offer(score, rows[place], best_scores, best_rows, found)
        for place in range(found):
            scores[place], rows[place] = best_scores[place] - problem.offset[query], best_rows[place]
        state.count[query] = found
        state.cut[query] = max(state.cut[query], np.float32(best_scores[0] - problem.offset[query] - slack))


@compiled()
def clear_all(problem, state):
    """Drop every candidate that a query's k best leave no hope."""
    for query in range(len(state.count)):
        if state.count[query] > problem.k:
            _clear(query, problem, state)


@compiled()
def take_best(query, row, scores, floor, best_scores, best_rows):
    """Each query's best pairs, at or above the floor, into float64 and int64 [q, k], best first.

    query, row, scores: int64 twice and float64 [pairs], in any order.
    """
    found = np.zeros(len(best_scores), np.int64)
    for i in range(len(query)):
        if scores[i] >= floor:
            own = query[i]
            found[own] = _offer(scores[i], row[i], best_scores[own], best_rows[own], found[own])
    for own in range(len(found)):
        # The worst of what is left goes behind it, until the best is first.
        heap, rows = best_scores[own], best_rows[own]
        for last in range(found[own] - 1, 0, -1):
            heap[0], heap[last] = heap[last], heap[0]
            rows[0], rows[last] = rows[last], rows[0]
            _sift(heap, rows, last)


@compiled()
def _offer(score, row, scores, rows, count):
    """Put a row into a heap of the best, whose root is the worst of them, if it is good enough; the new size."""
    if count < len(scores):
        place = count
        while place > 0 and _is_worse(score, row, scores[(place - 1) // 2], rows[(place - 1) // 2]):
            scores[place], rows[place] = scores[(place - 1) // 2], rows[(place - 1) // 2]
            place = (place - 1) // 2
        scores[place], rows[place] = score, row
        return count + 1
    if _is_worse(scores[0], rows[0], score, row):
        scores[0], rows[0] = score, row
        _sift(scores, rows, count)
    return count


@compiled()
def _sift(scores, rows, count):
    """Let a heap's root sink to where it belongs among the first ``count``."""
    score, row, place = scores[0], rows[0], 0
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and _is_worse(scores[child + 1], rows[child + 1], scores[child], rows[child]):
            child += 1
        if not _is_worse(scores[child], rows[child], score, row):
            break
        scores[place], rows[place] = scores[child], rows[child]
        place = child
    scores[place], rows[place] = score, row


@compiled()
def _is_worse(score, row, other_score, other_row):
    return score < other_score or (score == other_score and row > other_row)
