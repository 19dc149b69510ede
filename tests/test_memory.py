"""What is true of the whole model: memory, causality, and where gradients stop."""
import dataclasses
import itertools

import numpy
import pytest

import txl
from autograd import to_numpy, xp
from train_shakespeare import evaluate

RNG = numpy.random.default_rng
T = 5
CONFIGS = [pytest.param(dict(positions=positions, pre_norm=pre_norm, tie_weights=tie_weights,
                             clamp_len=clamp_len),
                        id=f"{positions}, {'pre' if pre_norm else 'post'}-norm, "
                           f"{'tied' if tie_weights else 'untied'}, clamp_len {clamp_len}")
           for positions, pre_norm, tie_weights, clamp_len in itertools.product(
               ["sinusoid", "learned"], [True, False], [False, True], [None, 3, 20])
           if not (positions == "learned" and clamp_len is None)]
every_config = pytest.mark.parametrize("options", CONFIGS)


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
@pytest.mark.parametrize("mem_len", [T, 2 * T])
@pytest.mark.parametrize("same_length", [False, True], ids=["causal", "same length"])
def test_two_passes_over_T_are_one_pass_over_2T(options, mem_len, same_length):
    model = model_of(options, mem_len, same_length=same_length)
    tokens = some_tokens(2 * T)
    whole, _ = model(tokens)
    numpy.testing.assert_allclose(in_segments(model, tokens, [T, T]), whole.numpy(),
                                  rtol=1e-10, atol=1e-10)


@every_config
def test_any_cut_gives_the_same_logits_while_memory_covers_the_text(options):
    model = model_of(options, mem_len=12)
    tokens = some_tokens(12)
    whole = model(tokens)[0].numpy()
    for lengths in ([1] * 12, [3, 1, 8], [11, 1], [1, 11]):
        numpy.testing.assert_allclose(in_segments(model, tokens, lengths), whole,
                                      rtol=1e-10, atol=1e-10)


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
    assert [m.shape for m in first] == [(2, 5, 8)] * 3
    assert [m.shape for m in second] == [(2, 7, 8)] * 3
    embedded = to_numpy(model.embedding.data)[to_numpy(tokens)] * numpy.sqrt(8)
    numpy.testing.assert_allclose(to_numpy(second[0]), embedded[:, 5:], rtol=1e-12)
    assert all(type(m) is type(xp.zeros(1)) for m in second)


@pytest.mark.parametrize("M, length, mem_len, kept", [
    (0, 3, 5, 3), (3, 3, 5, 5), (5, 3, 5, 5), (5, 9, 5, 5), (2, 2, 0, 0),
    (5, 2, 3, 3), (5, 1, 0, 0)])
def test_update_memory_keeps_the_last_states_in_order(M, length, mem_len, kept):
    states = numpy.arange(M + length, dtype=float)[None, :, None]
    memory = txl.update_memory(xp.asarray(states[:, :M]), xp.asarray(states[:, M:]), mem_len)
    assert to_numpy(memory).ravel().tolist() == list(range(M + length - kept, M + length))


def test_new_memory_shares_nothing_with_the_old_and_holds_no_more_than_it_shows():
    old, new = xp.ones((1, 4, 2)), xp.zeros((1, 3, 2))
    memory = txl.update_memory(old, new, 5)
    assert memory.base is None or memory.base.size == memory.size
    memory[...] = 7
    assert (old == 1).all() and (new == 0).all()


# %% Where gradients stop

def test_no_gradient_flows_into_memory_although_the_past_matters():
    """The gradient of the second segment's loss ignores how the first made the memory; a finite
    difference does not.

    An embedding row that only the first segment uses: backward() through the second segment
    leaves it no gradient, while moving it does move the second segment's loss.
    """
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


def test_without_memory_nothing_of_the_first_segment_reaches_the_second():
    model = model_of({}, mem_len=0)
    tokens = some_tokens(2 * T)
    _, memory = model(tokens[:, :T])
    numpy.testing.assert_array_equal(model(tokens[:, T:], memory)[0].numpy(),
                                     model(tokens[:, T:])[0].numpy())


def test_a_model_of_N_layers_sees_N_memories_far():
    """Each layer adds M states of reach: 3 layers with M = 4, one token a segment, see 12
    tokens back and no further."""
    model = model_of({}, mem_len=4)
    tokens = some_tokens(20, batch=1)
    base = in_segments(model, tokens, [1] * 20)[0, -1]
    for back, sees in [(1, True), (12, True), (13, False), (19, False)]:
        changed = tokens.copy()
        changed[0, 19 - back] = (changed[0, 19 - back] + 1) % 11
        assert (abs(in_segments(model, changed, [1] * 20)[0, -1] - base).max() > 0) == sees, back


# %% Causality and independence

@every_config
@pytest.mark.parametrize("same_length", [False, True], ids=["causal", "same length"])
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


def test_dropout_acts_only_when_a_generator_is_given():
    model = model_of(dict(dropout=0.5, attn_dropout=0.5))
    tokens = some_tokens(T)
    numpy.testing.assert_array_equal(model(tokens)[0].numpy(), model(tokens)[0].numpy())
    same = [model(tokens, generator=xp.random.default_rng(1))[0].numpy() for _ in range(2)]
    numpy.testing.assert_array_equal(*same)
    assert (same[0] != model(tokens)[0].numpy()).any()
    assert (same[0] != model(tokens, generator=xp.random.default_rng(2))[0].numpy()).any()


def test_dropout_is_applied_where_the_text_says():
    """Embeddings; in each layer attention weights, attention output, hidden and output of the
    feed-forward; the last state."""
    class Recording:
        def __init__(self):
            self.shapes, self.generator = [], xp.random.default_rng(0)

        def random(self, shape, dtype):
            self.shapes.append(shape)
            return self.generator.random(shape, dtype=dtype)
    B, D, F, K, H, layers = 2, 8, 12, T, 2, 3
    of_layer = {"weights": (H, B, T, K), "attention": (B, T, D), "hidden": (B, T, F),
                "output": (B, T, D)}
    for options, expected in [
            (dict(dropout=0.1),
             [(B, T, D)] + [of_layer[s] for s in ("attention", "hidden", "output")] * layers
             + [(B, T, D)]),
            (dict(attn_dropout=0.1), [of_layer["weights"]] * layers),
            (dict(dropout=0.1, attn_dropout=0.1),
             [(B, T, D)] + list(of_layer.values()) * layers + [(B, T, D)])]:
        for pre_norm in (True, False):
            recording = Recording()
            model_of(dict(pre_norm=pre_norm, **options))(some_tokens(T), generator=recording)
            assert recording.shapes == expected


def test_without_a_generator_dropout_probabilities_change_nothing():
    tokens = some_tokens(T)
    numpy.testing.assert_array_equal(
        model_of(dict(dropout=0.5, attn_dropout=0.5))(tokens)[0].numpy(),
        model_of({})(tokens)[0].numpy())


# %% The configuration and what a call accepts

@pytest.mark.parametrize("wrong, message", [
    (dict(vocab_size=0), "vocab_size"), (dict(n_layer=0), "n_layer"),
    (dict(n_head=3), "d_model must be a multiple"), (dict(mem_len=-1), "mem_len"),
    (dict(dropout=1.0), "dropout"), (dict(attn_dropout=-0.1), "attn_dropout"),
    (dict(positions="absolute"), "positions"), (dict(activation="swish"), "activation"),
    (dict(positions="learned"), "clamp_len"), (dict(clamp_len=-1), "clamp_len"),
    (dict(d_model=128.0), "d_model must be int"), (dict(n_layer=True), "n_layer must be int"),
    (dict(pre_norm=1), "pre_norm must be bool")])
def test_a_wrong_configuration_names_the_field(wrong, message):
    with pytest.raises(ValueError, match=message):
        txl.Config(**{**dict(vocab_size=5), **wrong})


def test_a_call_with_wrong_shapes_says_what_is_expected():
    model = model_of({})
    message = r"tokens must be integers \[batch, seq_len\] and not empty, not float64\[2, 3\]"
    with pytest.raises(ValueError, match=message):
        model(xp.ones((2, 3)))
    with pytest.raises(ValueError, match="memory must be 3 arrays"):
        model(some_tokens(T), [xp.zeros((2, 1, 8))])
    with pytest.raises(ValueError, match=r"memory must be 3 arrays \[2, M, 8\]"):
        model(some_tokens(T), [xp.zeros((1, 1, 8))] * 3)


@pytest.mark.parametrize("wrong", [-1, 11, 10**9])
def test_a_token_that_is_none_is_an_error(wrong):
    model = model_of({})
    for compute in (lambda: model([[0, wrong]]), lambda: model(numpy.array([[wrong]])),
                    lambda: list(txl.generate(model, [1, wrong], 2))):
        with pytest.raises(IndexError, match=f"{wrong} is not one of 0 … 10"):
            compute()


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_a_call_without_a_token_is_an_error(shape):
    with pytest.raises(ValueError, match="not empty"):
        model_of({})(numpy.zeros(shape, int))


def test_a_model_shown_tells_its_sizes_and_how_many_numbers_it_learns():
    shown = repr(model_of({}))
    assert all(part in shown for part in (
        f"{model_of({}).config.parameter_count():,} parameters, float64", "3 layers", "2 heads",
        "width 8", "vocabulary 11", "memory 5", "sinusoid", "pre-norm"))


def test_a_seed_means_one_model_and_float32_and_float64_agree():
    config = dataclasses.replace(model_of({}).config)
    one, two, other = (txl.TransformerXL(config, seed=seed) for seed in (1, 1, 2))
    double = txl.TransformerXL(config, seed=1, dtype=numpy.float64)
    tokens = some_tokens(T)
    numpy.testing.assert_array_equal(one(tokens)[0].numpy(), two(tokens)[0].numpy())
    assert (one(tokens)[0].numpy() != other(tokens)[0].numpy()).any()
    logits, memory = one(tokens)
    assert logits.dtype == numpy.float32 and memory[0].dtype == numpy.float32
    numpy.testing.assert_allclose(logits.numpy(), double(tokens)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_the_parameters_of_a_model_have_dotted_names_and_all_get_gradients():
    model = model_of({})
    names = model.parameters()
    assert {"embedding", "layers.0.attention.W_q", "layers.2.feed_forward.b_2",
            "layers.1.attention_norm.gain", "norm.bias", "W_out", "b_out"} <= set(names)
    tokens = some_tokens(T + 1)
    txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert all(parameter.grad is not None for parameter in names.values())


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
def test_the_parameter_count_of_a_configuration_is_that_of_its_model(
        positions, pre_norm, tie_weights):
    model = model_of(dict(positions=positions, pre_norm=pre_norm, tie_weights=tie_weights,
                          clamp_len=4))
    sizes = [parameter.size for parameter in model.parameters().values()]
    assert model.config.parameter_count() == sum(sizes)
