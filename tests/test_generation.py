"""Generation: the same distribution as one long pass; sampling does what its options say."""
import numpy
import pytest

import fast
import txl
from autograd import xp

RNG = numpy.random.default_rng


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that what comes next depends on all that came before."""
    config, rng = txl.Config(9, n_layer=2, n_head=2, d_model=8, d_ff=16, mem_len=40), RNG(4)
    model = fast.TransformerXL(config, seed=3, dtype=numpy.float64)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.7)
    return model


def test_greedy_generation_is_the_argmax_of_one_pass_over_everything_before(model):
    text = [1, 2, 3]
    for token in txl.generate(model, [1, 2, 3], 30, temperature=0):
        assert token == model(xp.asarray([text]))[0].numpy()[0, -1].argmax()
        text.append(token)
    assert len(set(text[3:])) > 3


def test_a_prompt_longer_than_the_memory_is_read_to_its_end_and_an_empty_one_refused(model):
    for seed in range(6):
        prompt, memory = RNG(seed).integers(9, size=23).tolist(), None
        for at in range(0, 23, 5):
            logits, memory = model(xp.asarray([prompt[at:at + 5]]), memory, mem_len=5)
        token = next(txl.generate(model, prompt, 1, temperature=0, mem_len=5))
        assert token == logits.numpy()[0, -1].argmax()
    assert len(list(txl.generate(model, prompt, 3, mem_len=0))) == 3
    with pytest.raises(ValueError, match="non-empty"):
        next(txl.generate(model, [], 3))


def test_a_seed_repeats_the_text_and_another_seed_does_not(model):
    texts = [list(txl.generate(model, [0], 30, rng=RNG(seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert list(txl.generate(model, [0], 30)) == list(txl.generate(model, [0], 30))


def test_a_long_prompt_is_read_in_segments_of_at_most_256_without_a_graph(model, monkeypatch):
    """Attention's scores would otherwise grow with the square of the prompt."""
    seen, forward = [], type(model).__call__

    def watched(self, tokens, *more, **options):
        logits, memory = forward(self, tokens, *more, **options)
        seen.append((tokens.shape[1], logits.requires_grad))
        return logits, memory
    monkeypatch.setattr(type(model), "__call__", watched)
    next(txl.generate(model, [1] * 600, 1, mem_len=10**6))
    assert seen == [(256, False), (256, False), (88, False)]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [numpy.nan, numpy.inf, -numpy.inf])
def test_logits_that_are_not_finite_are_an_error(wrong, temperature):
    with pytest.raises(FloatingPointError, match="not finite"):
        txl.sample(numpy.array([0.0, wrong]), temperature, None, None, RNG(0))


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", numpy.nan), ("top_k", 0), ("top_p", 0), ("top_p", 1.5),
    ("top_p", numpy.nan)])
def test_an_option_out_of_range_is_an_error_that_names_it(model, name, value):
    with pytest.raises(ValueError, match=f"generate: .*{name} .*not .*{value}"):
        next(txl.generate(model, [1], 3, **{name: value}))


def test_the_graph_is_recorded_for_the_caller_between_two_tokens(model):
    stream = txl.generate(model, [1], 3)
    next(stream)
    assert model(xp.asarray([[1]]))[0].requires_grad


@pytest.mark.parametrize("options, expected", [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0}, [0, 1, 0, 0]),
    ({"temperature": 0.5}, numpy.array([0.01, 0.16, 0.04, 0.09]) / 0.30),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_k": 99, "top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"top_p": 0.3, "temperature": 1e-6}, [0, 1, 0, 0]),
    ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
], ids=str)
def test_sampling(options, expected):
    rng, logits = RNG(0), numpy.log([0.1, 0.4, 0.2, 0.3])
    options = {**dict(temperature=1.0, top_k=None, top_p=None), **options}
    draws = [txl.sample(logits, rng=rng, **options) for _ in range(4000)]
    numpy.testing.assert_allclose(numpy.bincount(draws, minlength=4) / 4000, expected, atol=0.03)
