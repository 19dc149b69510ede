"""fast.py against txl.py: the two models whole, then each faster form against its plain one."""
import itertools
import weakref
from types import SimpleNamespace

import numpy
import pytest

import autograd
import fast
import txl
from autograd import Tensor, to_numpy, xp

RNG = numpy.random.default_rng
B, T = 3, 5


def close(ours, expected, tolerance, setting=""):
    """Each array of one dict like that of the other, measured by its largest number."""
    assert list(ours) == list(expected)
    for name in ours:
        x, y = to_numpy(ours[name]), to_numpy(expected[name])
        assert x.dtype == y.dtype and x.shape == y.shape
        numpy.testing.assert_allclose(x, y, rtol=0, err_msg=f"{name} {setting}",
                                      atol=tolerance * max(1, abs(y).max(initial=0)))


# %% The models, whole

def models(config, dtype=numpy.float64):
    """The plain one and the fast one, with the same parameters away from their initial values."""
    both = [module.TransformerXL(config, seed=1, dtype=dtype) for module in (txl, fast)]
    plain, ours = (model.parameters() for model in both)
    close({name: w.data for name, w in ours.items()},           # a seed means one model
          {name: w.data for name, w in plain.items()}, 0)
    rng = RNG(2)
    for name, w in plain.items():
        w.data += xp.asarray(0.3 * rng.normal(size=w.shape).astype(dtype))
        ours[name].data[...] = w.data
    return both


def same_model(options, tolerance, dtype=numpy.float64, vocab_size=7):
    config = txl.Config(vocab_size, n_layer=2, n_head=2, d_model=8, d_ff=12, **options)
    rng, answers, texts = RNG(3), [], []
    tokens = xp.asarray(rng.integers(vocab_size, size=(B, T + 1)))
    past = [xp.asarray(rng.normal(size=(B, config.mem_len, 8)).astype(dtype)) for _ in range(2)]
    for model in models(config, dtype):
        generator = xp.random.default_rng(5) if config.dropout else None
        loss, memory = txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], past, generator)
        loss.backward()
        found = {"loss": loss.data}
        found.update((f"memory of layer {n}", states) for n, states in enumerate(memory))
        found.update((f"gradient of {name}", w.grad) for name, w in model.parameters().items())
        if not config.dropout:
            read = model.decoder([states[:1] for states in memory], config.mem_len)
            found.update((f"logits after {n} tokens", read(int(token)))
                         for n, token in enumerate(tokens[0], start=1))
            texts.append(list(txl.generate(model, [1, 2, 3], 9, rng=RNG(1))))
        answers.append(found)
    close(*reversed(answers), tolerance, config)
    assert texts == texts[::-1]


@pytest.mark.parametrize("dropout, attn_dropout", [(0.0, 0.0), (0.2, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("mem_len", [0, 2, 9])
@pytest.mark.parametrize("positions, clamp_len", [
    ("sinusoid", None), ("sinusoid", 3), ("learned", 3), ("learned", 20)])
def test_the_fast_model_is_the_plain_model(positions, clamp_len, mem_len, dropout, attn_dropout):
    """Loss, every gradient, new memory, the logits token by token, and the text: in every
    setting, with a memory shorter and longer than the segment."""
    for pre_norm, tie_weights, activation, same_length in itertools.product(
            [True, False], [False, True], ["relu", "squared_relu"], [False, True]):
        same_model(dict(positions=positions, clamp_len=clamp_len, mem_len=mem_len,
                        dropout=dropout, attn_dropout=attn_dropout, pre_norm=pre_norm,
                        tie_weights=tie_weights, activation=activation,
                        same_length=same_length), 1e-11)


@pytest.mark.parametrize("vocab_size", [7, 600])
@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
def test_in_float32_too_and_with_a_large_vocabulary(positions, vocab_size):
    same_model(dict(positions=positions, clamp_len=6, mem_len=4), 2e-5, numpy.float32, vocab_size)


@pytest.mark.parametrize("dtype, tolerance", [(numpy.float64, 1e-12), (numpy.float32, 1e-5)])
@pytest.mark.parametrize("mem_len", [0, 1, 5])
@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
def test_a_decoder_stays_exact_and_of_one_size_however_long_it_reads(
        positions, mem_len, dtype, tolerance):
    """Before its memory is full, while keys and values move to the front, and long after."""
    options = dict(mem_len=5, positions=positions, clamp_len=3)
    plain, model = models(txl.Config(9, n_layer=2, n_head=2, d_model=8, d_ff=16, **options), dtype)
    _, memory = model(xp.asarray([[1, 2, 3]]), mem_len=mem_len)
    expected, decoder = plain.decoder(memory, mem_len), model.decoder(memory, mem_len)
    for token in RNG(6).integers(9, size=40).tolist():
        close({token: decoder(token)}, {token: expected(token)}, tolerance)
    shapes = {layer.cache.shape for layer in decoder.layers}
    assert shapes == {(2, 2, 2 * mem_len + 1, 4)}


# %% Products

def same_values_and_gradients(ours, plain, *shapes):
    inputs, answers = [RNG(3).normal(size=shape) for shape in shapes], []
    for f in (ours, plain):
        operands = [Tensor(xp.asarray(value), requires_grad=True) for value in inputs]
        y = f(*operands)
        y.backward(xp.asarray(RNG(4).normal(size=y.shape)))
        answers.append(dict(enumerate([y.data] + [x.grad for x in operands])))
    close(*answers, 1e-12)


BEFORE = RNG(5).normal(size=(2, 6, 4))


@pytest.mark.parametrize("ours, plain, shapes", [
    (fast.linear, lambda x, w, b: x @ w + b, [(4, 5), (5,)]),
    (lambda x, w, b: fast.linear(x, w, b, before=xp.asarray(BEFORE)),
     lambda x, w, b: autograd.concatenate([xp.asarray(BEFORE), x], axis=1) @ w + b, [(4, 5), (5,)]),
    (fast.linear_relu, lambda x, w, b: (x @ w + b).relu(), [(4, 5), (5,)]),
    (lambda x, w, b: fast.linear_relu(x, w, b, "squared_relu"),
     lambda x, w, b: (x @ w + b).squared_relu(), [(4, 5), (5,)]),
    (lambda z, gain, bias, w: fast.linear(z, *fast.fold(SimpleNamespace(gain=gain, bias=bias), w)),
     lambda z, gain, bias, w: (z * gain + bias) @ w, [(4,), (4,), (4, 5)])],
    ids=["linear", "rows before", "relu", "squared_relu", "fold"])
def test_a_product_is_the_operations_that_it_joins(ours, plain, shapes):
    same_values_and_gradients(ours, plain, (2, 3, 4), *shapes)


# %% Attention

@pytest.mark.parametrize("queries, scores", [(64, 1 << 17), (2, 1 << 17), (3, 40), (1, 1)])
@pytest.mark.parametrize("T, M, window", [
    (1, 0, None), (1, 4, None), (5, 0, None), (5, 3, None), (5, 7, 7), (6, 2, 2)])
def test_attention_in_one_operation_is_attention_step_by_step(
        T, M, window, queries, scores, monkeypatch):
    """Value and every gradient, whatever the blocks: all at once, few queries, few heads and
    rows."""
    monkeypatch.setattr(fast, "QUERIES", queries)
    monkeypatch.setattr(fast, "SCORES", scores)
    config = txl.Config(5, n_layer=1, n_head=2, d_model=8)
    attention = txl.RelativeMultiHeadAttention(config, RNG(7), numpy.float64)
    positions = txl.relative_positions(config, T, M, numpy.float64)
    mask = txl.attention_mask(T, M, window)

    def step_by_step(q, kv, u, v, W_r):
        attention.u, attention.v, attention.W_r = u, v, W_r
        return attention.mixed_values(q, kv, positions, mask, None)
    same_values_and_gradients(
        lambda q, kv, u, v, W_r: fast.fused_attention(q, kv, positions @ W_r, u, v, mask),
        step_by_step, (3, T, 8), (3, M + T, 16), (2, 4), (2, 4), (8, 8))


def test_attention_in_one_operation_keeps_keys_and_values_but_not_the_queries():
    """What it needs of them is in the queries with u and v, which it keeps."""
    x, u = Tensor(xp.ones((1, 2, 4)), requires_grad=True), xp.ones((2, 2))
    q, kv = x * 1.0, fast.linear(x, xp.ones((4, 8)), 0.0, before=xp.ones((1, 3, 4)))
    queries, keys = weakref.ref(q.data), weakref.ref(kv.data)
    o = fast.fused_attention(q, kv, xp.ones((5, 4)), u, u, txl.attention_mask(2, 3))
    del q, kv
    assert queries() is None and keys() is not None
    o.sum().backward()
    assert keys() is None and x.grad is not None


def test_scores_too_large_for_exp_are_no_matter():
    """exp(1000) is infinite in any dtype; the largest score of a row is subtracted first."""
    q, kv, zero = (xp.full((1, 3, width), value, dtype=xp.float32)
                   for width, value in ((2, 60), (4, 60), (2, 0)))
    out = fast.fused_attention(q, kv, zero[0], zero[0, :1], zero[0, :1], txl.attention_mask(3, 0))
    numpy.testing.assert_allclose(out.numpy(), numpy.full((1, 3, 2), 60.0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 5), (2, 2, 4, 6)])
def test_the_shift_and_its_way_back_are_rel_shift_and_its_gradient(shape):
    x = Tensor(xp.asarray(RNG(0).normal(size=shape)), requires_grad=True)
    g, y = xp.asarray(RNG(1).normal(size=shape)), txl.rel_shift(x)
    y.backward(g)
    numpy.testing.assert_allclose(to_numpy(fast.shift_back(g)), to_numpy(x.grad), rtol=1e-15)
    for width in range(1, shape[-1] + 1):
        numpy.testing.assert_array_equal(to_numpy(fast.shifted_rows(x.data, width)),
                                         y.numpy()[..., :width])
