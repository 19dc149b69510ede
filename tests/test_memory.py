"""What is true of the whole model: memory, causality, and where gradients stop."""
import itertools

import numpy
import pytest

import txl
from autograd import to_numpy, xp
from train_shakespeare import evaluate

RNG = numpy.random.default_rng
T = 5
every_config = pytest.mark.parametrize("options", [
    dict(positions=positions, clamp_len=clamp_len, pre_norm=pre_norm, tie_weights=tie_weights)
    for (positions, clamp_len), pre_norm, tie_weights in itertools.product(
        [("sinusoid", None), ("sinusoid", 3), ("learned", 3), ("learned", 20)],
        [True, False], [False, True])], ids=lambda options: "-".join(map(str, options.values())))
causal_or_same_length = pytest.mark.parametrize("same_length", [False, True])


def model_of(options, mem_len=T, seed=0, **more):
    """A small float64 model with every parameter away from its initial value."""
    config = txl.Config(**{**dict(vocab_size=11, n_layer=3, n_head=2, d_model=8, d_ff=12,
                                  mem_len=mem_len), **options, **more})
    model = txl.TransformerXL(config, seed=seed, dtype=numpy.float64)
    rng = RNG(seed)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.3)
    return model


def some_tokens(length, batch=2, seed=1):
    return xp.asarray(RNG(seed).integers(11, size=(batch, length)))


def in_segments(model, tokens, lengths, mem_len=None):
    memory, parts, at = None, [], 0
    for length in lengths:
        logits, memory = model(tokens[:, at:at + length], memory, mem_len=mem_len)
        parts.append(logits.numpy())
        at += length
    return numpy.concatenate(parts, axis=1)


# %% Memory continues the text exactly

@every_config
@causal_or_same_length
def test_any_cut_gives_the_logits_of_one_pass_while_memory_covers_the_text(options, same_length):
    for mem_len, lengths in [(T, [T, T]), (2 * T, [T, T]), (12, [3, 1, 8]), (12, [11, 1]),
                             (12, [1, 11]), (12, [1] * 12)]:
        model = model_of(options, mem_len, same_length=same_length)
        tokens = some_tokens(sum(lengths))
        numpy.testing.assert_allclose(in_segments(model, tokens, lengths),
                                      model(tokens)[0].numpy(), rtol=1e-10, atol=1e-10)


def test_with_same_length_any_cut_gives_the_same_logits_even_when_memory_is_shorter_than_the_text():
    """Every query sees the mem_len keys before it, wherever the segments are cut."""
    model = model_of({}, mem_len=4, same_length=True)
    tokens = some_tokens(14)
    by_one = in_segments(model, tokens, [1] * 14)
    for lengths in ([4, 4, 4, 2], [2, 5, 3, 4], [14]):
        numpy.testing.assert_allclose(in_segments(model, tokens, lengths), by_one,
                                      rtol=1e-10, atol=1e-10)


def test_a_longer_memory_at_evaluation_sees_further_back():
    model = model_of({}, mem_len=2)
    tokens = some_tokens(12)
    whole = model(tokens)[0].numpy()
    short, long = (in_segments(model, tokens, [4, 4, 4], mem_len) for mem_len in (None, 8))
    numpy.testing.assert_allclose(long, whole, rtol=1e-10, atol=1e-10)
    assert abs(short - whole).max() > 1e-3


def test_evaluation_does_not_depend_on_the_segment_length():
    model = model_of({}, mem_len=60)
    tokens = to_numpy(some_tokens(60, batch=1))[0]
    losses = [evaluate(model, tokens, 1, seq_len, 60, threads=1) for seq_len in (1, 7, 59, 100)]
    numpy.testing.assert_allclose(losses, losses[0], rtol=1e-12)


# %% What is stored

def test_memory_is_the_last_inputs_of_each_layer_as_plain_arrays():
    model = model_of({}, mem_len=7)
    tokens = some_tokens(12)
    _, first = model(tokens[:, :5])
    _, second = model(tokens[:, 5:], first)
    assert [m.shape for m in first + second] == [(2, 5, 8)] * 3 + [(2, 7, 8)] * 3
    embedded = to_numpy(model.embedding.data)[to_numpy(tokens)] * numpy.sqrt(8)
    numpy.testing.assert_allclose(to_numpy(second[0]), embedded[:, 5:], rtol=1e-12)
    assert all(type(m) is type(xp.zeros(1)) for m in second)


@pytest.mark.parametrize("M, length, mem_len", [
    (0, 3, 5), (3, 3, 5), (5, 3, 5), (5, 9, 5), (2, 2, 0), (5, 2, 3), (5, 1, 0)])
def test_update_memory_keeps_the_last_states_in_order_and_shares_nothing(M, length, mem_len):
    states = xp.arange(M + length, dtype=float)[None, :, None]
    memory = txl.update_memory(states[:, :M], states[:, M:], mem_len)
    first = max(0, M + length - mem_len)
    assert to_numpy(memory).ravel().tolist() == list(range(first, M + length))
    memory[...] = -1
    assert (states >= 0).all()


# %% Where gradients stop

def test_no_gradient_flows_into_memory_although_the_past_matters():
    """An embedding row that only the first segment uses: backward() through the second segment
    leaves it no gradient, while moving it does move the second segment's loss."""
    model = model_of(dict(tie_weights=False))
    first, second = some_tokens(T) % 5, some_tokens(T + 1, seed=2) % 5 + 5

    def second_loss():
        _, memory = model(first)
        return txl.loss_and_memory(model, second[:, :-1], second[:, 1:], memory)[0]
    loss = second_loss()
    loss.backward()
    token = int(first[0, 0])
    gradient = to_numpy(model.embedding.grad)
    assert (gradient[token] == 0).all() and (gradient[5:] != 0).any()
    model.embedding.data[token, 0] += 1e-3
    assert abs(second_loss().item() - loss.item()) > 1e-6


@pytest.mark.parametrize("length, mem_len, n_layer, reach", [
    (1, 4, 3, 12), (3, 2, 2, 5), (3, 4, 3, 16)])
def test_each_layer_sees_a_memory_further_than_the_one_below(length, mem_len, n_layer, reach):
    """Beyond its segment, after that one's reach is rounded up to whole segments."""
    model, tokens = model_of({}, mem_len, n_layer=n_layer), some_tokens(30, batch=1)
    lengths = [length] * (30 // length)
    base = in_segments(model, tokens, lengths)[0, -1]
    for back, sees in [(1, True), (reach, True), (reach + 1, False), (29 - length, False)]:
        changed, at = tokens.copy(), 30 - length - back
        changed[0, at] = (changed[0, at] + 1) % 11
        assert (in_segments(model, changed, lengths)[0, -1] != base).any() == sees, back


# %% Causality and independence

@every_config
@causal_or_same_length
def test_a_later_token_changes_no_earlier_logit(options, same_length):
    model = model_of(options, same_length=same_length)
    tokens = some_tokens(2 * T)
    _, memory = model(tokens[:, :T])
    base = model(tokens[:, T:], memory)[0].numpy()
    for changed in range(T):
        other = tokens[:, T:].copy()
        other[:, changed] = (other[:, changed] + 1) % 11
        logits = model(other, memory)[0].numpy()
        numpy.testing.assert_array_equal(logits[:, :changed], base[:, :changed])
        assert (logits[:, changed:] != base[:, changed:]).any(axis=(0, 2)).all()


@every_config
def test_logits_do_not_depend_on_the_other_rows_of_the_batch(options):
    model = model_of(options)
    tokens = some_tokens(2 * T, batch=3)
    together = in_segments(model, tokens, [T, T])
    for row in range(3):
        numpy.testing.assert_allclose(in_segments(model, tokens[row:row + 1], [T, T]),
                                      together[row:row + 1], rtol=1e-10, atol=1e-12)


def test_dropout_acts_only_when_a_generator_is_given_which_decides_it():
    model, tokens = model_of(dict(dropout=0.5, attn_dropout=0.5)), some_tokens(T)
    plain = model_of({})(tokens)[0].numpy()
    numpy.testing.assert_array_equal(model(tokens)[0].numpy(), plain)
    one, again, other = (model(tokens, generator=xp.random.default_rng(seed))[0].numpy()
                         for seed in (1, 1, 2))
    numpy.testing.assert_array_equal(one, again)
    assert (one != plain).any() and (one != other).any()


def test_dropout_is_applied_where_the_text_says():
    """Embeddings; in each layer attention weights, attention output, hidden and output of the
    feed-forward; the last state."""
    class Recording:
        def __init__(self):
            self.shapes, self.generator = [], xp.random.default_rng(0)

        def random(self, shape, dtype):
            self.shapes.append(shape)
            return self.generator.random(shape, dtype=dtype)
    state, hidden, weights, layers = (2, T, 8), (2, T, 12), (2, 2, T, T), 3
    for options, expected in [
            (dict(dropout=0.1), [state] + [state, hidden, state] * layers + [state]),
            (dict(attn_dropout=0.1), [weights] * layers),
            (dict(dropout=0.1, attn_dropout=0.1),
             [state] + [weights, state, hidden, state] * layers + [state])]:
        for pre_norm in (True, False):
            recording = Recording()
            model_of(dict(pre_norm=pre_norm, **options))(some_tokens(T), generator=recording)
            assert recording.shapes == expected


# %% The configuration and what a call accepts

@pytest.mark.parametrize("field, wrong", [
    ("vocab_size", 0), ("n_layer", 0), ("d_model", 132), ("mem_len", -1), ("dropout", 1.0),
    ("attn_dropout", -0.1), ("positions", "absolute"), ("activation", "swish"), ("clamp_len", -1)])
def test_a_wrong_configuration_names_the_field(field, wrong):
    with pytest.raises(ValueError, match=f"{field} must be .*, not {wrong!r}"):
        txl.Config(**{"vocab_size": 5, field: wrong})
    with pytest.raises(ValueError, match="positions='learned' needs clamp_len"):
        txl.Config(5, positions="learned")


def test_a_call_with_what_is_no_batch_of_tokens_or_no_memory_is_an_error():
    model = model_of({})
    with pytest.raises(TypeError, match="tokens must be integers, not float64"):
        model(xp.ones((2, 3)))
    for wrong in (-1, 11, 10**9):
        with pytest.raises(IndexError, match=f"tokens: {wrong} is not one of 0 … 10"):
            model([[0, wrong]])
    for shape in ((3,), (2, 0), (0, 3)):
        with pytest.raises(ValueError, match="tokens must be .* and not empty"):
            model(numpy.zeros(shape, int))
    for shape, layers in (((2, 1, 8), 1), ((2, 1, 8), 4), ((1, 1, 8), 3), ((2, 1, 4), 3)):
        with pytest.raises(ValueError):
            model(some_tokens(T), [xp.zeros(shape)] * layers)


def test_a_seed_means_one_model_and_float32_and_float64_agree():
    (one, memory), (again, _), (other, _), (double, _) = (
        txl.TransformerXL(model_of({}).config, seed, dtype)(some_tokens(T))
        for seed, dtype in ((1, "float32"), (1, "float32"), (2, "float32"), (1, "float64")))
    numpy.testing.assert_array_equal(one.numpy(), again.numpy())
    assert (one.numpy() != other.numpy()).any()
    assert one.dtype == memory[0].dtype == numpy.float32
    numpy.testing.assert_allclose(one.numpy(), double.numpy(), rtol=1e-4, atol=1e-5)


def test_the_parameters_of_a_model_have_dotted_names_and_all_get_gradients():
    model = model_of({})
    names = model.parameters()
    assert {"embedding", "layers.0.attention.W_q", "layers.2.feed_forward.b_2",
            "layers.1.attention_norm.gain", "norm.bias", "W_out", "b_out"} <= set(names)
    tokens = some_tokens(T + 1)
    txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert all(parameter.grad is not None for parameter in names.values())
    assert model.parameter_count() == sum(parameter.size for parameter in names.values())
