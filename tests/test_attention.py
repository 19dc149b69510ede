"""Relative attention against its definition: the shift, the four terms, the mask, the two forms
of positions."""
import dataclasses
import math
import weakref

import numpy
import pytest

import txl
from autograd import Tensor, linear, softmax, to_numpy, xp

RNG = numpy.random.default_rng


# %% The relative shift

def shapes(*cases):
    """The cases (T, M) or (T, M, clamp_len or window), with names that say so."""
    def name(case):
        T, M, *limits = case
        return ", ".join(["one query" if T == 1 else f"{T} queries", f"memory {M}"] + [
            f"limit {limit}" for limit in limits if limit is not None])
    return [pytest.param(*case, id=name(case)) for case in cases]


@pytest.mark.parametrize("T, M", shapes((1, 0), (1, 4), (3, 0), (3, 2), (4, 4), (2, 7)))
def test_relative_shift_is_the_double_loop(T, M):
    K = M + T
    x = RNG(0).normal(size=(2, 3, T, K))
    shifted = txl.rel_shift(Tensor(xp.asarray(x))).numpy()
    for i in range(T):
        for j in range(M + i + 1):                      # visible keys
            distance = M + i - j
            column = K - 1 - distance       # where attention puts the score of that distance
            numpy.testing.assert_array_equal(shifted[:, :, i, j], x[:, :, i, column])


def test_relative_shift_on_the_matrix_of_the_text():
    x = Tensor(xp.asarray([[4, 3, 2, 1, 0]] * 3))
    shifted = [[2, 1, 0, 4, 3], [3, 2, 1, 0, 4], [4, 3, 2, 1, 0]]
    assert txl.rel_shift(x).numpy().tolist() == shifted
    assert txl.rel_shift(x.data).numpy().tolist() == shifted       # of a plain array too


# %% The mask

def test_hidden_keys_are_the_future():
    hidden = to_numpy(txl.hidden_keys(3, 2))
    assert hidden.astype(int).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_same_length_shows_every_query_itself_and_mem_len_keys_before():
    """The first query still sees the oldest memory; every later one loses one key at the far
    end."""
    hidden = to_numpy(txl.hidden_keys(3, 4, window=4))
    assert hidden.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert ((~hidden).sum(axis=1) == 4 + 1).all()


# %% Sinusoids

def test_sinusoid_is_the_formula():
    R = to_numpy(txl.sinusoid(xp.asarray([0, 1, 7, 300]), 6, numpy.float64))
    for row, x in zip(R, (0, 1, 7, 300)):
        w = [10000 ** (-2 * n / 6) for n in range(3)]
        expected = [math.sin(x * f) for f in w] + [math.cos(x * f) for f in w]
        numpy.testing.assert_allclose(row, expected, rtol=1e-12)


# %% The four terms

def attention_by_loops(attention, x, memory, config, clamp_len):
    """Section 3.3 of the paper as it is written: one score for each query, key and head, each
    of four terms."""
    p = {name: tensor.numpy() for name, tensor in txl.named_tensors(attention)}
    B, T, D = x.shape
    M, H, d = memory.shape[1], config.n_head, D // config.n_head
    h = numpy.concatenate([memory, x], axis=1)
    out = numpy.zeros((B, T, D))
    for b in range(B):
        for head in range(H):
            part = slice(head * d, (head + 1) * d)
            for i in range(T):
                scores = []
                for j in range(M + i + 1):
                    distance = min(M + i - j, clamp_len)
                    q = x[b, i] @ p["W_q"][:, part]
                    k = h[b, j] @ p["W_kv"][:, part]
                    if config.positions == "sinusoid":
                        R = to_numpy(txl.sinusoid(xp.asarray([distance]), D, numpy.float64))[0]
                        r = R @ p["W_r"][:, part]
                        term_d = p["v"][head] @ r
                    else:
                        r = p["table"][distance, head]
                        term_d = p["bias"][distance, head]
                    term_a, term_b, term_c = q @ k, q @ r, p["u"][head] @ k
                    scores.append((term_a + term_b + term_c + term_d) / math.sqrt(d))
                weights = numpy.exp(scores) / numpy.exp(scores).sum()
                for j, weight in enumerate(weights):
                    out[b, i, part] += weight * (h[b, j] @ p["W_kv"][:, D:][:, part])
    return out @ p["W_o"]


@pytest.mark.parametrize("form, Attention", [
    ("sinusoid", txl.RelativeMultiHeadAttention), ("sinusoid", txl.FasterAttention),
    ("learned", txl.LearnedPositions)], ids=["sinusoid", "sinusoid, faster", "learned"])
@pytest.mark.parametrize("T, M, clamp_len", shapes(
    (1, 0, 20), (4, 0, 20), (3, 2, 20), (3, 5, 20), (3, 5, 2)))
def test_attention_is_the_four_terms_as_four_loops(form, Attention, T, M, clamp_len):
    config = txl.Config(5, n_layer=1, n_head=2, d_model=8, positions=form, clamp_len=clamp_len)
    rng = RNG(1)
    attention = Attention(config, rng, numpy.float64)
    for _, tensor in txl.named_tensors(attention):
        tensor.data[...] = xp.asarray(rng.normal(size=tensor.shape))
    x, memory = rng.normal(size=(2, T, 8)), rng.normal(size=(2, M, 8))
    positions = txl.relative_positions(config, T, M, numpy.float64)
    ours = attention(Tensor(xp.asarray(x)), Tensor(xp.asarray(memory)), positions,
                     txl.hidden_keys(T, M))
    expected = attention_by_loops(attention, x, memory, config, clamp_len)
    numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("T, M, window", shapes(
    (1, 0, None), (1, 4, None), (5, 0, None), (5, 3, None), (5, 7, 7), (6, 2, 2)))
def test_attention_in_one_operation_is_attention_step_by_step(T, M, window, monkeypatch):
    """Value and every gradient, whatever the blocks: all at once, few queries, few heads and
    rows."""
    config, rng = txl.Config(5, n_layer=1, n_head=2, d_model=8), RNG(7)
    attention = txl.RelativeMultiHeadAttention(config, rng, numpy.float64)
    q, kv, g = (rng.normal(size=(3, n, width)) for n, width in ((T, 8), (M + T, 16), (T, 8)))
    u, v, W_r = (rng.normal(size=shape) for shape in ((2, 4), (2, 4), (8, 8)))
    positions = txl.relative_positions(config, T, M, numpy.float64)
    mask = txl.hidden_keys(T, M, window)
    answers = []
    for blocks in ("none", (64, 1 << 17), (2, 1 << 17), (3, 40), (1, 1)):
        inputs = [Tensor(xp.asarray(x), requires_grad=True) for x in (q, kv, u, v, W_r)]
        Q, KV, attention.u, attention.v, attention.W_r = inputs
        if blocks != "none":
            monkeypatch.setattr(txl, "QUERIES", blocks[0])
            monkeypatch.setattr(txl, "SCORES", blocks[1])
            y = txl.attend(Q, KV, positions @ attention.W_r, attention.u, attention.v, mask)
        else:
            k, values = txl.heads(KV[..., :8], 2), txl.heads(KV[..., 8:], 2)
            weights = attention.weights(txl.heads(Q, 2), k, positions, mask)
            y = (weights @ values).transpose(1, 2, 0, 3).reshape(Q.shape)
        y.backward(xp.asarray(g))
        answers.append([y.numpy()] + [to_numpy(x.grad) for x in inputs])
    step_by_step, *in_one_operation = answers
    for answer in in_one_operation:
        for ours, expected in zip(answer, step_by_step):
            numpy.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_attention_in_one_operation_keeps_keys_and_values_but_not_the_queries():
    """What it needs of them is in the queries with u and v, which it keeps."""
    x = Tensor(xp.ones((1, 2, 4)), requires_grad=True)
    q, kv = x * 1.0, linear(x, xp.ones((4, 8)), 0.0, before=xp.ones((1, 3, 4)))
    queries, keys = weakref.ref(q.data), weakref.ref(kv.data)
    o = txl.attend(q, kv, xp.ones((5, 4)), xp.ones((2, 2)), xp.ones((2, 2)), txl.hidden_keys(2, 3))
    del q, kv
    assert queries() is None and keys() is not None
    o.sum().backward()
    assert keys() is None and x.grad is not None


def test_attention_by_distance_is_the_mean_weight_of_the_keys_that_far_back():
    """A layer whose scores are all 0 attends alike to everything it sees: query i of 3 behind a
    memory of 2 to i + 3 keys."""
    model = txl.TransformerXL(txl.Config(5, n_layer=2, n_head=2, d_model=8, mem_len=2),
                              dtype=numpy.float64)
    for name, tensor in model.parameters().items():
        if name.startswith("layers.0") and name.endswith(("W_q", "W_r")):
            tensor.data[...] = 0
    tokens = xp.asarray([[0, 1, 2], [3, 4, 0]])
    memory = [xp.asarray(RNG(0).normal(size=(2, 2, 8))) for _ in range(2)]
    rows = txl.attention_by_distance(model, tokens, memory)
    assert rows.shape == (2, 5)
    whole = (1 / 3 + 1 / 4 + 1 / 5) / 3
    numpy.testing.assert_allclose(rows[0], [whole, whole, whole, (1 / 4 + 1 / 5) / 2, 1 / 5],
                                  rtol=1e-12)
    assert not numpy.allclose(rows[1], rows[0])


def test_scores_too_large_for_exp_are_no_matter():
    """exp(1000) is infinite in any dtype; the largest score of a row is subtracted first."""
    q, kv, zero = (xp.full((1, 3, width), value, dtype=xp.float32)
                   for width, value in ((2, 60), (4, 60), (2, 0)))
    out = txl.attend(q, kv, zero[0], xp.zeros((1, 2), dtype=xp.float32),
                     xp.zeros((1, 2), dtype=xp.float32), txl.hidden_keys(3, 0))
    numpy.testing.assert_allclose(out.numpy(), numpy.full((1, 3, 2), 60.0))


@pytest.mark.parametrize("clamp_len", [11, 3], ids="clamp_len {}".format)
def test_learned_positions_filled_from_the_sinusoids_are_the_sinusoids(clamp_len):
    """table[distance] = R[distance] W_r and bias[distance] = v . table[distance] give the
    paper's model exactly."""
    config = txl.Config(7, n_layer=2, n_head=2, d_model=8, d_ff=16, mem_len=6, clamp_len=clamp_len)
    paper = txl.TransformerXL(config, seed=1, dtype=numpy.float64)
    learned = txl.TransformerXL(dataclasses.replace(config, positions="learned"),
                                dtype=numpy.float64)
    rng = RNG(2)
    source, target = paper.parameters(), learned.parameters()
    for name in source:
        source[name].data[...] = xp.asarray(rng.normal(size=source[name].shape))
        if name in target:
            target[name].data[...] = source[name].data
    R = txl.sinusoid(xp.arange(clamp_len + 1), 8, numpy.float64)
    for i, layer in enumerate(learned.layers):
        r = (R @ source[f"layers.{i}.attention.W_r"].data).reshape(clamp_len + 1, 2, 4)
        layer.attention.table.data[...] = r
        layer.attention.bias.data[...] = (r * source[f"layers.{i}.attention.v"].data).sum(axis=-1)
    tokens, memory, other = xp.asarray(rng.integers(7, size=(3, 6))), None, None
    for _ in range(3):
        ours, memory = learned(tokens, memory)
        theirs, other = paper(tokens, other)
        numpy.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-9, atol=1e-11)


def test_distances_beyond_clamp_len_count_as_clamp_len():
    """With every distance clamped to 0 the order of the keys behind a query no longer matters."""
    config = txl.Config(9, n_layer=1, n_head=2, d_model=8, d_ff=8, clamp_len=0)
    rng = RNG(3)
    tokens = rng.permutation(9)[None, :6]
    shuffled = tokens[:, [3, 1, 4, 0, 2, 5]]
    for clamp_len, alike in [(0, True), (2, False), (None, False)]:
        model = txl.TransformerXL(dataclasses.replace(config, clamp_len=clamp_len), seed=4,
                                  dtype=numpy.float64)
        last = [model(xp.asarray(t))[0].numpy()[0, -1] for t in (tokens, shuffled)]
        assert numpy.allclose(*last, rtol=1e-10) == alike


def test_attention_weights_are_scaled_by_the_square_root_of_the_head_width():
    """One head of width 4, scores q . k alone: the weights are softmax(q . k / 2)."""
    config = txl.Config(5, n_layer=1, n_head=1, d_model=4)
    rng = RNG(5)
    attention = txl.RelativeMultiHeadAttention(config, rng, numpy.float64)
    eye = numpy.eye(4)
    for name, tensor in txl.named_tensors(attention):
        tensor.data[...] = xp.asarray(
            {"W_q": eye, "W_kv": numpy.hstack([eye, eye]), "W_o": eye}.get(name, 0))
    x = rng.normal(size=(1, 3, 4))
    positions = txl.relative_positions(config, 3, 0, numpy.float64)
    out = attention(Tensor(xp.asarray(x)), Tensor(xp.zeros((1, 0, 4))), positions,
                    txl.hidden_keys(3, 0))
    weights = softmax(Tensor(xp.asarray(x[0, 2] @ x[0].T / 2))).numpy()
    numpy.testing.assert_allclose(out.numpy()[0, 2], weights @ x[0], rtol=1e-12)


def test_attention_without_positions_says_what_it_got_instead():
    config = txl.Config(5, n_layer=1, n_head=1, d_model=4)
    for Attention in (txl.RelativeMultiHeadAttention, txl.FasterAttention):
        with pytest.raises(TypeError, match="numbers expected, not None"):
            Attention(config, RNG(0), numpy.float64)(xp.ones((1, 3, 4)), xp.ones((1, 0, 4)), None,
                                                     txl.hidden_keys(3, 0))


# %% The layer, sublayer by sublayer

@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_layer_is_its_formula(pre_norm):
    """x + f(norm(x)) twice, or the paper's norm(x + f(x)) twice; pre-norm normalises the memory
    like the segment."""
    config = txl.Config(5, n_layer=1, n_head=2, d_model=8, d_ff=12, pre_norm=pre_norm)
    rng = RNG(6)
    layer = txl.Layer(config, rng, numpy.float64)
    for _, tensor in txl.named_tensors(layer):
        tensor.data[...] = xp.asarray(rng.normal(size=tensor.shape))
    p = {name: tensor.numpy() for name, tensor in txl.named_tensors(layer)}
    x, memory = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 4, 8))

    def norm(which, h):
        z = (h - h.mean(-1, keepdims=True)) / numpy.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return z * p[f"{which}_norm.gain"] + p[f"{which}_norm.bias"]

    def attention(h, m):
        return attention_by_loops(layer.attention, h, m, config, 99)

    def feed_forward(h):
        hidden = numpy.maximum(h @ p["feed_forward.W_1"] + p["feed_forward.b_1"], 0)
        return hidden @ p["feed_forward.W_2"] + p["feed_forward.b_2"]
    if pre_norm:
        y = x + attention(norm("attention", x), norm("attention", memory))
        y = y + feed_forward(norm("feed_forward", y))
    else:
        y = norm("attention", x + attention(x, memory))
        y = norm("feed_forward", y + feed_forward(y))
    ours = layer(Tensor(xp.asarray(x)), Tensor(xp.asarray(memory)),
                 txl.relative_positions(config, 3, 4, numpy.float64), txl.hidden_keys(3, 4))
    numpy.testing.assert_allclose(ours.numpy(), y, rtol=1e-9, atol=1e-11)
