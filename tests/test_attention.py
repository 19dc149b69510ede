"""Relative attention against its definition: the shift, the four terms, the mask, the two forms
of positions, the layer."""
import math

import numpy
import pytest

import fast
import plots
import txl
from autograd import Tensor, check_gradients, to_numpy, xp

RNG = numpy.random.default_rng


# %% The relative shift

@pytest.mark.parametrize("T, M", [(1, 0), (1, 4), (3, 0), (3, 2), (4, 4), (2, 7)])
def test_relative_shift_is_the_double_loop(T, M):
    K = M + T
    x = RNG(0).normal(size=(2, 3, T, K))
    shifted = txl.rel_shift(Tensor(xp.asarray(x))).numpy()
    for i in range(T):
        for j in range(M + i + 1):                      # visible keys
            distance = M + i - j
            column = K - 1 - distance       # where attention puts the score of that distance
            numpy.testing.assert_array_equal(shifted[:, :, i, j], x[:, :, i, column])


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 5), (2, 2, 4, 6)])
def test_the_gradient_of_the_relative_shift(shape):
    check_gradients(txl.rel_shift, [Tensor(xp.asarray(RNG(0).normal(size=shape)), True)])


# %% The mask (what it hides without a window is an example of its docstring)

def test_same_length_shows_every_query_itself_and_mem_len_keys_before():
    """The first query still sees the oldest memory; every later one loses one key at the far
    end."""
    hidden = to_numpy(txl.attention_mask(3, 4, window=4))
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
                    q, k = x[b, i] @ p["W_q"][:, part], h[b, j] @ p["W_kv"][:, part]
                    if config.positions == "sinusoid":
                        R = to_numpy(txl.sinusoid(xp.asarray([distance]), D, numpy.float64))[0]
                        r = R @ p["W_r"][:, part]
                        term_d = p["v"][head] @ r
                    else:
                        r, term_d = p["table"][distance, head], p["bias"][distance, head]
                    term_a, term_b, term_c = q @ k, q @ r, p["u"][head] @ k
                    scores.append((term_a + term_b + term_c + term_d) / math.sqrt(d))
                weights = numpy.exp(scores) / numpy.exp(scores).sum()
                for j, weight in enumerate(weights):
                    out[b, i, part] += weight * (h[b, j] @ p["W_kv"][:, D:][:, part])
    return out @ p["W_o"]


@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
@pytest.mark.parametrize("T, M, clamp_len", [
    (1, 0, 20), (4, 0, 20), (3, 2, 20), (3, 5, 20), (3, 5, 2), (3, 5, 0)])
def test_attention_is_the_four_terms_as_four_loops(positions, T, M, clamp_len):
    config = txl.Config(5, n_layer=1, n_head=2, d_model=8, positions=positions,
                        clamp_len=clamp_len)
    rng = RNG(1)
    attention = txl.Layer.Attention[positions](config, rng, numpy.float64)
    for _, tensor in txl.named_tensors(attention):
        tensor.data[...] = xp.asarray(rng.normal(size=tensor.shape))
    x, memory = rng.normal(size=(2, T, 8)), rng.normal(size=(2, M, 8))
    positions = txl.relative_positions(config, T, M, numpy.float64)
    ours = attention(Tensor(xp.asarray(x)), Tensor(xp.asarray(memory)), positions,
                     txl.attention_mask(T, M))
    expected = attention_by_loops(attention, x, memory, config, clamp_len)
    numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("module", [txl, fast])
def test_attention_by_distance_is_the_mean_weight_of_the_keys_that_far_back(module):
    """A layer whose scores are all 0 attends alike to everything it sees: query i of 3 behind a
    memory of 2 to i + 3 keys."""
    model = module.TransformerXL(txl.Config(5, n_layer=2, n_head=2, d_model=8, mem_len=2),
                                 dtype=numpy.float64)
    for name, tensor in model.parameters().items():
        if name.startswith("layers.0") and name.endswith(("W_q", "W_r")):
            tensor.data[...] = 0
    tokens = xp.asarray([[0, 1, 2], [3, 4, 0]])
    memory = [xp.asarray(RNG(0).normal(size=(2, 2, 8))) for _ in range(2)]
    rows = plots.attention_by_distance(model, tokens, memory)
    assert rows.shape == (2, 5)
    whole = (1 / 3 + 1 / 4 + 1 / 5) / 3
    numpy.testing.assert_allclose(rows[0], [whole, whole, whole, (1 / 4 + 1 / 5) / 2, 1 / 5],
                                  rtol=1e-12)
    assert not numpy.allclose(rows[1], rows[0])


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
                 txl.relative_positions(config, 3, 4, numpy.float64), txl.attention_mask(3, 4))
    numpy.testing.assert_allclose(ours.numpy(), y, rtol=1e-9, atol=1e-11)
