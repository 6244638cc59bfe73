"""Gradients over ranks and through the gradient cache are those of one process with the whole batch."""

import numpy as np
import pytest
from conftest import make_rows, run_script, write_jsonl
from gradient_worker import BATCH, CASES, GROUP, Case, gradients
from thread_ranks import on_ranks

from utils.kernels import onednn
from utils.models import checkpoint
from utils.models.tokenizers import tokenizer as tokenizing
from utils.ranks.group import Ranks
from utils.training import batches, losses
from utils.training import rows as training_rows
from utils.training.gradients import Outcome
from utils.training.plan import Plan

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory) -> str:
    rows = make_rows(80)
    for i, row in enumerate(rows):
        row["neg_passage"] = [rows[(i + k) % 80]["pos_passage"][0] for k in (7, 9, 11)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module", params=[2, 3])
def launched(request, tiny_model, rows_path, tmp_path_factory):
    """What every rank of a launched run saved."""
    folder = tmp_path_factory.mktemp("gradients")
    done = run_script("tests/gradient_worker.py", tiny_model, rows_path, folder, nproc=request.param)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, folder


def relative_error(found: dict, expected: dict) -> float:
    """Of all gradients as one long vector."""
    assert found.keys() == expected.keys()
    difference = sum(np.square(found[name] - expected[name], dtype=np.float64).sum() for name in expected)
    return float(np.sqrt(difference / sum(np.square(g, dtype=np.float64).sum() for g in expected.values())))


needs_bfloat16 = pytest.mark.skipif(not onednn.bfloat16_is_fast(), reason="no bfloat16 products here")


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shared])
def test_ranks_give_the_gradients_of_one_process(launched, tiny_model, rows_path, name, short):
    n_ranks, folder = launched
    if CASES[name].dropout and (short or BATCH // n_ranks % CASES[name].chunk):
        pytest.skip("dropout is drawn by chunk, so chunks must fall alike")
    expected, loss = gradients(tiny_model, rows_path, CASES[name], Ranks(), short)
    for rank in range(n_ranks):
        found = dict(np.load(folder / f"{name}.{short}.{n_ranks}.{rank}.npz"))
        assert found.pop("loss") == pytest.approx(loss, rel=1e-6)
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("short", [0, 1])
def test_unshared_negatives_give_the_mean_over_queries(launched, tiny_model, rows_path, short):
    n_ranks, folder = launched
    expected = mean_over_parts(tiny_model, rows_path, n_ranks, short)
    found = dict(np.load(folder / f"alone.{short}.{n_ranks}.0.npz"))
    found.pop("loss")
    assert relative_error(found, expected) < TOLERANCE


def mean_over_parts(model: str, rows_path: str, n_parts: int, short: int) -> dict:
    """Each part of the batch as a batch of its own, weighted by its queries."""

    class Part(Ranks):
        def __init__(self, rank):
            self.rank, self.size = rank, n_parts

    total: dict = {}
    for rank in range(n_parts):
        for name, gradient in gradients(model, rows_path, CASES["alone"], Part(rank), short)[0].items():
            total[name] = total.get(name, 0) + gradient  # already weighted by the step
    return total


def test_a_loss_that_is_no_number_on_one_rank_is_none_on_all():
    def found(loss: float):
        return on_ranks(2, lambda ranks: Outcome(loss if ranks.rank else 2.0, 0.5 * ranks.rank).over(ranks))

    assert found(4.0) == [Outcome(3.0, 0.25)] * 2
    assert all(np.isnan(outcome.loss) for outcome in found(np.nan))


def test_the_cache_changes_nothing(tiny_model, rows_path):
    expected, _ = gradients(tiny_model, rows_path, Case(), Ranks())
    for chunk in (1, 5, BATCH):
        found, _ = gradients(tiny_model, rows_path, Case(chunk=chunk), Ranks())
        assert relative_error(found, expected) < TOLERANCE


@needs_bfloat16
def test_bfloat16_gives_nearly_the_gradients_of_float32(tiny_model, rows_path):
    exact, near = (gradients(tiny_model, rows_path, Case(bfloat16=given), Ranks())[0] for given in (False, True))
    assert 1e-3 < relative_error(near, exact) < 5e-2


def test_the_cache_replays_dropout(tiny_model, rows_path):
    """Against one graph over all chunks, each with the dropout of its place."""
    found, loss = gradients(tiny_model, rows_path, Case(chunk=5, dropout=True), Ranks())
    expected, expected_loss = with_one_graph(tiny_model, rows_path, 5)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(found, expected) < TOLERANCE
    without, _ = gradients(tiny_model, rows_path, Case(chunk=5), Ranks())
    assert relative_error(found, without) > 0.1  # dropout was on


def with_one_graph(model: str, rows_path: str, chunk: int):
    import paddle

    from utils.models.tokenizers.tokenizer import padded
    from utils.training.encoder import TrainableEncoder

    base = checkpoint.resolve(model)
    rows = training_rows.read([rows_path], None, "error", False)
    tokenizer = tokenizing.load(base.tokenizer_folder, 32, base.is_torch)
    collate = batches.Collator(rows, GROUP, (tokenizer, tokenizer), ("{text}", "{text}"))
    batch = collate(Plan(rows, BATCH, GROUP, seed=3).epoch(0)[0], 0)
    encoder = TrainableEncoder(base, "mean")
    encoder.model.train()
    sides: tuple[list, list] = ([], [])
    for start in range(0, BATCH, chunk):
        for side, (tokens, size) in enumerate(((batch.query_tokens, 1), (batch.passage_tokens, GROUP))):
            encoder.seed_dropout(5, 0, start, side)
            part = tokens[start * size : (start + chunk) * size]
            sides[side].append(encoder.embed(*padded(part, tokenizer.pad_id)))
    whole = losses.objective(losses.contrastive, True, [16, 32])
    targets = losses.Targets(GROUP, paddle.to_tensor(batch.ignored), temperature=0.1)
    loss = whole(paddle.concat(sides[0]), paddle.concat(sides[1]), targets)
    loss.backward()
    return {n: p.grad.numpy() for n, p in encoder.model.named_parameters() if p.grad is not None}, float(loss)


def test_the_lean_forward_pass_is_paddlenlps(tiny_model):
    from utils.training.encoder import TrainableEncoder

    encoder = TrainableEncoder(checkpoint.resolve(tiny_model), "mean")
    encoder.model.eval()
    ids = np.random.default_rng(0).integers(4, 40, (5, 9))
    lengths = np.array([9, 1, 4, 7, 2])
    lean = encoder.embed(ids, lengths).numpy()
    encoder._lean = None
    np.testing.assert_allclose(lean, encoder.embed(ids, lengths).numpy(), rtol=1e-5, atol=1e-5)


def both_ways(inputs, ours, theirs, tolerance=1e-5):
    """Values and gradients of two functions of the same tensors agree."""
    outer, results = None, []
    for function in (theirs, ours):
        tensors = [tensor.clone().detach() for tensor in inputs]
        for tensor in tensors:
            tensor.stop_gradient = False
        y = function(*tensors)
        outer = paddle_randn_like(y) if outer is None else outer
        (y * outer).sum().backward()
        results.append([y.numpy(), *(tensor.grad.numpy() for tensor in tensors)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def paddle_randn_like(tensor):
    import paddle

    return paddle.randn(tensor.shape)


def dropped_by(shape, dropping):
    """The mask of a kernel's dropout, as a tensor."""
    import paddle

    from utils.kernels import training_loops

    mask = np.empty(shape, np.float32)
    training_loops.dropout(np.ones(shape, np.float32), 0, dropping, mask)
    return paddle.to_tensor(mask)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_cpu_layers_are_paddles(share, monkeypatch):
    import paddle
    from paddle.nn import functional

    from utils.training.layers import blocks, cpu

    monkeypatch.setattr(blocks, "_ROWS", 3)
    paddle.seed(0)
    x, z, bias, gain, offset = (paddle.randn(shape) * 2 for shape in ([20, 7], [20, 7], [7], [7], [7]))
    drop = cpu.Drop(share, [3])
    mask = dropped_by([20, 7], drop.settled())
    both_ways([x, bias], cpu.gelu, lambda x, bias: functional.gelu(x + bias))
    both_ways([x], cpu.gelu, functional.gelu)
    both_ways([x], lambda x: cpu.dropout(x, drop), lambda x: x * mask)
    both_ways(
        [x, z, bias, gain, offset],
        lambda *tensors: cpu.add_norm(*tensors, 1e-5, drop),
        lambda x, z, bias, gain, offset: functional.layer_norm(x + (z + bias) * mask, [7], gain, offset, 1e-5),
    )


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 30])
def test_the_cpu_attention_is_the_textbooks(share, size, monkeypatch):
    """Against softmax(QK^T)V text by text in Paddle, with the same dropout; with huge scores too."""
    import paddle
    from paddle.nn import functional

    from utils.training.layers import attention, cpu

    monkeypatch.setattr(attention, "_SCORES", 200)  # so that some texts are cut by heads and some are not
    lengths, heads, width = [7, 1, 13, 4], 4, 6
    paddle.seed(1)
    inputs = [paddle.randn([sum(lengths), 3 * heads * width]) * size, paddle.randn([3 * heads * width])]
    drop = cpu.Drop(share, [5])

    def textbook(qkv, bias):
        rows = []
        for text, start in enumerate(np.cumsum([0, *lengths[:-1]])):
            t = lengths[text]
            query, key, value = (qkv[start : start + t] + bias).reshape([t, 3, heads, width]).transpose([1, 2, 0, 3])
            weights = functional.softmax(paddle.matmul(query, key, transpose_y=True) * width**-0.5)
            weights = weights * dropped_by([heads * t, t], drop.settled(text)).reshape([heads, t, t])
            rows.append(paddle.matmul(weights, value).transpose([1, 0, 2]).reshape([t, heads * width]))
        return paddle.concat(rows)

    both_ways(inputs, lambda *t: cpu.attention(*t, lengths, heads, drop), textbook, 1e-5 * size**2)


def test_the_rounded_attention_is_nearly_the_other():
    import paddle

    from utils.training.layers import attention, cpu

    if not attention.can_round(32, cpu.Drop()):
        pytest.skip("this processor has no AMX")
    paddle.seed(2)
    lengths, heads = [7, 40, 1, 70], 3
    width = heads * 32
    inputs = [paddle.randn([sum(lengths), 3 * width]), paddle.randn([width]).tile([3])]
    outer, found = paddle.randn([sum(lengths), width]), []
    for bfloat16 in (False, True):
        tensors = [tensor.clone().detach() for tensor in inputs]
        for tensor in tensors:
            tensor.stop_gradient = False
        result = cpu.attention(*tensors, lengths, heads, bfloat16=bfloat16)
        (result * outer).sum().backward()
        gradients = (tensor.grad.numpy() for tensor in tensors)
        found.append([result.numpy(), *(part for own in gradients for part in np.split(own, 3, axis=-1))])
    key_bias = 5  # added to every score of a row alike, it changes nothing: its gradient is 0 but for rounding
    for number, (exact, rounded) in enumerate(zip(*found, strict=True)):
        assert 0 < np.linalg.norm(rounded - exact) <= (1.0 if number == key_bias else 0.01 * np.linalg.norm(exact))
    dropped = cpu.attention(*inputs, lengths, heads, cpu.Drop(0.5, [1]), bfloat16=True)
    same = cpu.attention(*inputs, lengths, heads, cpu.Drop(0.5, [1]))
    np.testing.assert_array_equal(dropped.numpy(), same.numpy())


@needs_bfloat16
@pytest.mark.parametrize("n", [1, 130, 700, 2300])
def test_a_bfloat16_layer_multiplies_what_it_rounds(n):
    import paddle

    from utils.training.layers import cpu

    rng = np.random.default_rng(n)
    x, weight, gradient = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, 48), (48, 40), (n, 40)))

    def rounded(values):
        return (onednn.to_bfloat16(values).astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    tensors = [paddle.to_tensor(values, stop_gradient=False) for values in (x, weight)]
    result = cpu.linear(*tensors)
    result.backward(paddle.to_tensor(gradient))
    x, weight, gradient = map(rounded, (x, weight, gradient))
    for found, left, right in (
        (result, x, weight), (tensors[0].grad, gradient, weight.T), (tensors[1].grad, x.T, gradient),
    ):  # fmt: skip
        bound = np.abs(left) @ np.abs(right) * (left.shape[1] + 2) * 2.0**-24
        assert (np.abs(found.numpy() - left @ right) <= bound).all()
    tensors[1].stop_gradient = True
    cpu.linear(*tensors).sum().backward()


def test_cpu_dropout_draws_evenly():
    """Its share, its mean, and no likeness between neighbours, rows, keys."""
    import paddle

    from utils.training.layers import cpu

    x = paddle.ones([400, 500])
    first, second = (cpu.dropout(x, cpu.Drop(0.1, [seed])).numpy() for seed in (0, 1))
    assert (first == 0).mean() == pytest.approx(0.1, abs=0.003)
    assert first.mean() == pytest.approx(1, abs=0.003)
    for other in (second, np.roll(first, 1, axis=1), np.roll(first, 1, axis=0)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.01


def test_no_key_moves_anothers_mask_along():
    """Keys that differ by as much as places do."""
    from utils.kernels import training_loops

    whole, masks = np.ones((1, 20_000), np.float32), []
    for key in (5, (5 + 1000 * 0x9E3779B1) % 2**32):
        masks.append(np.empty_like(whole))
        dropping = training_loops.Dropping(np.uint32(key), np.uint32(2**31), np.float32(2))
        training_loops.dropout(whole, 0, dropping, masks[-1])
    for moved in (1000, -1000):
        assert abs(np.corrcoef(masks[0].ravel(), np.roll(masks[1], moved).ravel())[0, 1]) < 0.05


def test_nan_comes_through_the_cpu_layers():
    import paddle

    from utils.training.layers import cpu

    x = paddle.randn([6, 8])
    x[2, 3] = float("nan")
    gain = paddle.ones([8])
    assert np.isnan(cpu.gelu(x).numpy()).sum() == 1
    assert np.isnan(cpu.add_norm(x, x, None, gain, gain, 1e-5, cpu.Drop()).numpy()).any(axis=1).sum() == 1
    assert np.isnan(cpu.attention(paddle.concat([x] * 3, axis=1), None, [4, 2], 2).numpy()[2]).any()


def test_padded_batches_are_packed_ones(tiny_model, monkeypatch):
    """What a GPU computes, computed here: texts padded to one length, in Paddle's own operators."""
    from utils.training import encoder as trainable

    encoder = trainable.TrainableEncoder(checkpoint.resolve(tiny_model), "mean")
    encoder.model.eval()
    ids, lengths = np.random.default_rng(0).integers(4, 40, (5, 9)), np.array([9, 1, 4, 7, 2])
    found = []
    for device in ("cpu", "gpu"):
        monkeypatch.setattr(trainable.engines, "device", lambda device=device: device)
        vectors = encoder.embed(ids, lengths)
        (vectors**2).sum().backward()
        own = {n: p.grad.numpy() for n, p in encoder.model.named_parameters() if p.grad is not None}
        found.append(own | {"vectors": vectors.numpy()})
        encoder.model.clear_gradients()
    assert relative_error(found[1], found[0]) < TOLERANCE


@pytest.mark.parametrize("trained", ["all", "upper", "adapters"])
def test_recomputing_changes_no_gradients(tiny_model, trained):
    """Of two passes, each with its own dropout, before one backward pass: as queries and passages are trained."""
    import paddle

    from utils.training.encoder import TrainableEncoder

    found = []
    for recompute in (False, True):
        paddle.seed(3)  # of the adapters
        lora = (4, 8) if trained == "adapters" else None
        encoder = TrainableEncoder(checkpoint.resolve(tiny_model), "mean", recompute, lora=lora, dropout=0.3)
        if trained == "upper":
            encoder.freeze(1)
        encoder.model.train()
        passes = []
        for side in range(2):
            encoder.seed_dropout(1, 0, 0, side)
            ids = np.random.default_rng(side).integers(4, 40, (5, 9))
            passes.append(encoder.embed(ids, np.array([9, 1, 4, 7, 2])))
        (passes[0] * passes[1] ** 2).sum().backward()
        found.append({n: p.grad.numpy() for n, p in encoder.model.named_parameters() if p.grad is not None})
    assert found[0]
    assert relative_error(found[1], found[0]) < TOLERANCE
