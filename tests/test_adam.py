"""Adam against its update rule written out by hand, the learning rate, and what training does."""
import math

import numpy
import pytest

import fast
import txl
from autograd import Tensor, to_numpy, xp
from backend import Workers

RNG = numpy.random.default_rng
both = pytest.mark.parametrize("Adam", [txl.Adam, fast.FlatAdam])


def leaf(values, dtype=numpy.float64):
    return Tensor(xp.array(values, dtype=dtype), requires_grad=True)


def by_hand(weights, gradients, lr, beta1, beta2, eps, weight_decay, clip, decayed):
    """The rule of the docstring in Python's floats; `gradients` holds a list for each step."""
    weights, m, v = list(weights), [0.0] * len(weights), [0.0] * len(weights)
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(g * g for g in gradient))
        for i, g in enumerate(gradient):
            if clip is not None and norm > clip:
                g = g * clip / norm
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m_hat, v_hat = m[i] / (1 - beta1 ** t), v[i] / (1 - beta2 ** t)
            decay = weight_decay * weights[i] if decayed[i] else 0.0
            weights[i] -= lr * (m_hat / (math.sqrt(v_hat) + eps) + decay)
    return weights


@pytest.mark.parametrize("weight_decay, clip, eps", [
    (0.0, None, 1e-8), (0.1, None, 1e-8), (0.0, 1.0, 1e-8), (0.2, 0.5, 0.1), (0.0, 100.0, 1e-3)])
@both
def test_adam_is_the_rule_written_out_by_hand(weight_decay, clip, eps, Adam):
    rng = RNG(0)
    shapes = {"layer.W_q": (2, 3), "layer.b": (3,), "embedding": (4, 1), "u": (1, 2)}
    parameters = {name: leaf(rng.normal(size=shape)) for name, shape in shapes.items()}
    start = numpy.concatenate([p.numpy().ravel() for p in parameters.values()])
    decayed = [name == "layer.W_q" for name, p in parameters.items() for _ in range(p.size)]
    gradients = rng.normal(size=(5, len(start))) * numpy.array([[0.1], [1], [3], [0.01], [1]])
    adam = Adam(parameters, lr=0.05, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay,
                clip=clip)
    for gradient in gradients:
        at = 0
        for p in parameters.values():
            p.grad = xp.asarray(gradient[at:at + p.size].reshape(p.shape))
            at += p.size
        norm = adam.step()                          # before clipping
        assert float(norm) == pytest.approx(numpy.linalg.norm(gradient), rel=1e-12)
    expected = by_hand(start, gradients.tolist(), 0.05, 0.8, 0.95, eps, weight_decay, clip, decayed)
    updated = numpy.concatenate([p.numpy().ravel() for p in parameters.values()])
    numpy.testing.assert_allclose(updated, expected, rtol=1e-10)


@pytest.mark.skipif(xp.module is not numpy, reason="a GPU takes the whole batch at once")
@pytest.mark.parametrize("parts", [2, 3])
def test_adam_in_parts_adds_their_gradients_up_and_is_adam_in_one(parts):
    rng = RNG(1)
    values = {"W": rng.normal(size=(5, 3)), "b": rng.normal(size=4)}
    ours, expected = ({name: leaf(value) for name, value in values.items()} for _ in range(2))
    divided = fast.FlatAdam(ours, lr=0.05, weight_decay=0.1, clip=1.0, parts=parts)
    whole = txl.Adam(expected, lr=0.05, weight_decay=0.1, clip=1.0)
    gradients = rng.normal(size=(3, parts, 19))

    def collect(part, step):
        W, b = gradients[step, part, :15].reshape(5, 3), gradients[step, part, 15:]
        divided.collect(part, [(ours["b"], xp.asarray(b)), (ours["W"], xp.asarray(W))])
    with Workers(range(parts), [collect, divided.add_up, divided.update_share]) as workers:
        for step in range(3):
            workers(collect, step)
            norm = divided.step(everywhere=workers)
            W, b = numpy.split(gradients[step].sum(axis=0), [15])
            expected["W"].grad, expected["b"].grad = xp.asarray(W.reshape(5, 3)), xp.asarray(b)
            assert float(norm) == pytest.approx(float(whole.step()), rel=1e-12)
    for name in values:
        numpy.testing.assert_allclose(ours[name].numpy(), expected[name].numpy(), rtol=1e-12)


@pytest.mark.parametrize("average_over", [2, 100])
@both
def test_the_average_follows_the_weights_over_a_tenth_of_the_steps_and_replaces_them_within_a_with(
        average_over, Adam):
    w = leaf([1.0, -2.0])
    adam, a = Adam({"w": w}, lr=0.1, average_over=average_over), 0.0
    for t in range(1, 31):
        w.grad = xp.asarray(RNG(t).normal(size=2))
        adam.step()
        a += max(1 / average_over, 10 / (9 + t)) * (w.numpy() - a)
        if t == 1:
            numpy.testing.assert_allclose(a, w.numpy(), rtol=1e-15)
    weights = w.numpy().copy()
    with pytest.raises(KeyError), adam.averaged():
        numpy.testing.assert_allclose(w.numpy(), a, rtol=1e-12)
        assert not numpy.allclose(a, weights)
        raise KeyError
    numpy.testing.assert_array_equal(w.numpy(), weights)


@both
def test_before_the_first_step_the_average_is_the_weights(Adam):
    w = leaf([1.0, -2.0])
    with Adam({"w": w}, average_over=2).averaged():
        assert w.numpy().tolist() == [1, -2]


@both
def test_without_an_average_evaluation_takes_the_weights_as_they_are_also_assigned_ones(Adam):
    w = leaf([0.0, 0.0])
    adam, w.data = Adam({"w": w}), xp.asarray([10.0, 20.0])
    with adam.averaged():
        assert w.numpy().tolist() == [10, 20]
    assert w.numpy().tolist() == [10, 20]


@both
def test_the_means_go_by_names_and_keep_float32(Adam):
    w = leaf([1.0, 1.0], numpy.float32)
    adam = Adam({"W": w}, betas=(0.8, 0.9), weight_decay=0.1, clip=9.0, average_over=2)
    w.grad = xp.asarray([2.0, -1.0], dtype=numpy.float32)
    assert adam.step().dtype == w.dtype == numpy.float32
    for mean, expected in [(adam.first["W"], [0.4, -0.2]), (adam.second["W"], [0.4, 0.1]),
                           (adam.average["W"], w.numpy())]:
        numpy.testing.assert_allclose(to_numpy(mean), expected, rtol=1e-6)
        assert mean.dtype == numpy.float32


@both
def test_a_model_longer_than_a_block_is_updated_to_its_last_element(Adam):
    """And the learning rate can be given for a step."""
    w, odd = leaf(numpy.zeros(150_001)), numpy.arange(150_001) % 2
    adam = Adam({"w": w}, lr=9.0)
    for _ in range(2):
        w.grad = xp.asarray(numpy.where(odd, 1.0, -3.0))
        assert float(adam.step(lr=0.01)) == pytest.approx(numpy.linalg.norm(to_numpy(w.grad)))
    numpy.testing.assert_allclose(w.numpy(), numpy.where(odd, -0.02, 0.02), rtol=1e-6)


# %% A parameter without gradient, and one that was given another array

def test_a_parameter_without_gradient_stays_as_it_is():
    """It neither decays nor drifts on, also where it had gradients before; so does its average."""
    w, W_frozen, W_never = leaf([1.0, 1.0]), leaf([1.0, 1.0]), leaf([3.0])
    adam = txl.Adam({"w": w, "W_frozen": W_frozen, "W_never": W_never}, lr=0.1,
                    weight_decay=0.1, average_over=2)
    w.grad = W_frozen.grad = xp.ones(2)
    adam.step()
    before, W_frozen.grad = W_frozen.numpy().copy(), None
    adam.step()
    numpy.testing.assert_array_equal(W_frozen.numpy(), before)
    assert abs(w.numpy() - before).max() > 0.05
    with adam.averaged():
        assert W_never.numpy().tolist() == [3]


def test_flat_adam_wants_a_gradient_for_every_parameter():
    w, frozen = leaf([1.0, 1.0]), leaf([1.0, 1.0])
    adam, w.grad = fast.FlatAdam({"w": w, "frozen": frozen}), xp.ones(2)
    with pytest.raises(ValueError, match="frozen has no gradient"):
        adam.step()
    assert w.numpy().tolist() == frozen.numpy().tolist() == [1, 1]


@both
def test_an_array_given_to_a_parameter_is_trained_by_adam_and_refused_by_flat_adam(Adam):
    w = leaf([0.0, 0.0])
    adam = Adam({"w": w}, lr=0.5)
    w.data, w.grad = xp.asarray([10.0, 20.0]), xp.ones(2)
    if Adam is txl.Adam:
        adam.step()
        numpy.testing.assert_allclose(w.numpy(), [9.5, 19.5], rtol=1e-6)
    else:
        with pytest.raises(ValueError, match="w was given another array"):
            adam.step()


def test_flat_adam_refuses_parameters_of_two_dtypes():
    with pytest.raises(ValueError):
        fast.FlatAdam({name: leaf([1.0], name) for name in ("float32", "float64")})


# %% Training

def test_after_its_last_step_the_learning_rate_stays_where_it_ended():
    assert txl.warmup_cosine(500, 100, peak=1.0, warmup=10, final=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("module, Adam", [(txl, "Adam"), (fast, "FlatAdam")])
def test_training_learns_a_text_that_memory_makes_predictable(module, Adam):
    """A period of 7 read in segments of 3 with a memory of 6: what comes next is in the memory,
    and the loss vanishes."""
    config = txl.Config(4, n_layer=2, n_head=2, d_model=16, d_ff=32, mem_len=6)
    model = module.TransformerXL(config, seed=1)
    adam = getattr(module, Adam)(model.parameters(), lr=1e-2, clip=1.0)
    text = numpy.array([0, 0, 1, 0, 0, 2, 3] * 60)
    memory, losses = None, []
    for at in range(0, len(text) - 4, 3):
        tokens, targets = xp.asarray(text[None, at:at + 3]), xp.asarray(text[None, at + 1:at + 4])
        loss, memory = txl.loss_and_memory(model, tokens, targets, memory)
        loss.backward()
        adam.step()
        adam.zero_grad()
        assert model.b_out.grad is None
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), rel=0.35) and max(losses[-10:]) < 0.05


@both
def test_a_list_of_parameters_is_refused_in_one_line(Adam):
    with pytest.raises(TypeError, match="give {name: Tensor}"):
        Adam([leaf([1.0])])
