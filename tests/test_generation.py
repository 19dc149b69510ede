"""Generation: the same distribution as one long pass; sampling does what its options say."""
import numpy
import pytest

import txl
from autograd import to_numpy, xp

RNG = numpy.random.default_rng


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that what comes next depends on all that came before."""
    model = txl.TransformerXL(txl.Config(9, n_layer=2, n_head=2, d_model=8, d_ff=16, mem_len=40),
                              seed=3, dtype=numpy.float64)
    rng = RNG(4)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.7)
    return model


def test_greedy_generation_is_the_argmax_of_one_pass_over_everything_before(model):
    text = [1, 2, 3]
    for token in txl.generate(model, [1, 2, 3], 30, temperature=0):
        assert token == model(xp.asarray([text]))[0].numpy()[0, -1].argmax()
        text.append(token)
    assert len(set(text[3:])) > 3


def test_a_prompt_longer_than_the_memory_is_read_to_its_end(model):
    for seed in range(6):
        prompt, memory = RNG(seed).integers(9, size=23).tolist(), None
        for at in range(0, 23, 5):
            logits, memory = model(xp.asarray([prompt[at:at + 5]]), memory, mem_len=5)
        token = next(txl.generate(model, prompt, 1, temperature=0, mem_len=5))
        assert token == logits.numpy()[0, -1].argmax()
    assert len(list(txl.generate(model, prompt, 3, mem_len=0))) == 3


OPTIONS = [dict(), dict(positions="learned", clamp_len=6), dict(pre_norm=False, tie_weights=True),
           dict(tie_weights=True), dict(activation="squared_relu"),
           dict(same_length=True, clamp_len=3),
           dict(positions="learned", clamp_len=2, pre_norm=False)]


@pytest.mark.parametrize("dtype, tolerance", [(numpy.float64, 1e-12), (numpy.float32, 1e-5)],
                         ids=["float64", "float32"])
@pytest.mark.parametrize("mem_len", [0, 1, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_keys_and_values_give_the_models_own_logits(options, mem_len, dtype, tolerance):
    """Token by token beside the model with its memory: before the memory is full, while it
    moves, and long after."""
    config = txl.Config(9, n_layer=2, n_head=2, d_model=8, d_ff=16, mem_len=5, **options)
    model, rng = txl.TransformerXL(config, seed=5, dtype=dtype), RNG(6)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.2).astype(dtype)
    _, memory = model(xp.asarray([[1, 2, 3]]), None, mem_len=mem_len)
    decoder = txl.Decoder(model, memory, mem_len)
    for token in rng.integers(9, size=25).tolist():
        expected, memory = model(xp.asarray([[token]]), memory, mem_len=mem_len)
        expected, ours = expected.numpy()[0, 0], to_numpy(decoder(token))
        assert ours.dtype == dtype
        numpy.testing.assert_allclose(ours, expected, rtol=tolerance,
                                      atol=tolerance * abs(expected).max())


def test_a_decoder_takes_no_more_memory_however_long_it_reads(model):
    decoder = txl.Decoder(model, model.empty_memory(1), mem_len=4)
    before = [layer.keys.shape for layer in decoder.layers]
    for _ in range(50):
        decoder(1)
    assert [layer.keys.shape for layer in decoder.layers] == before == [(2, 9, 4)] * 2


def test_a_seed_repeats_the_text_and_another_seed_does_not(model):
    texts = [list(txl.generate(model, [0], 30, rng=RNG(seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert list(txl.generate(model, [0], 30)) == list(txl.generate(model, [0], 30))


def test_a_long_prompt_is_read_in_segments_of_at_most_256_whatever_the_memory(model, monkeypatch):
    """Attention's scores would otherwise grow with the square of the prompt."""
    widths, forward = [], type(model).__call__

    def watched(self, tokens, *more, **options):
        widths.append(tokens.shape[1])
        return forward(self, tokens, *more, **options)
    monkeypatch.setattr(type(model), "__call__", watched)
    next(txl.generate(model, [1] * 600, 1, mem_len=10**6))
    assert widths == [256, 256, 88]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [numpy.nan, numpy.inf, -numpy.inf])
def test_logits_that_are_not_finite_are_an_error(wrong, temperature):
    with pytest.raises(FloatingPointError, match="not finite"):
        txl.sample(numpy.array([0.0, wrong]), temperature, None, None, RNG(0))


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", numpy.nan), ("temperature", numpy.inf), ("top_k", 0),
    ("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("top_p", numpy.nan), ("length", -1),
    ("mem_len", -1)])
def test_an_option_out_of_range_is_an_error_that_names_it(model, name, value):
    with pytest.raises(ValueError, match=f"generate: {name} must be .*, not {value}"):
        next(txl.generate(model, [1], **{"length": 3, name: value}))


def test_an_empty_prompt_is_an_error(model):
    with pytest.raises(ValueError, match="non-empty"):
        next(txl.generate(model, [], 3))


def test_the_graph_is_recorded_for_the_caller_between_two_tokens(model):
    stream = txl.generate(model, [1], 3)
    next(stream)
    assert model(xp.asarray([[1]]))[0].requires_grad


LOGITS = numpy.log(numpy.array([0.1, 0.4, 0.2, 0.3]))


def frequencies(**options):
    options = {**dict(temperature=1.0, top_k=None, top_p=None), **options}
    rng = RNG(0)
    draws = [txl.sample(LOGITS, rng=rng, **options) for _ in range(4000)]
    return numpy.bincount(draws, minlength=4) / 4000


@pytest.mark.parametrize("options, expected", [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0}, [0, 1, 0, 0]),
    ({"temperature": 0.5}, numpy.array([0.01, 0.16, 0.04, 0.09]) / 0.30),
    ({"temperature": 1e-6}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"top_p": 0.3}, [0, 1, 0, 0]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
], ids=str)
def test_sampling(options, expected):
    numpy.testing.assert_allclose(frequencies(**options), expected, atol=0.03)
