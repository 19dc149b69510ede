"""Adam against its update rule written out by hand, the learning rate, and what training does."""
import copy
import math
import pickle

import numpy
import pytest

import txl
from autograd import Tensor, to_numpy, xp
from backend import Workers

RNG = numpy.random.default_rng
both = pytest.mark.parametrize("Adam", [txl.Adam, txl.DividedAdam])


def by_hand(weights, gradients, lr, beta1, beta2, eps, weight_decay, clip, decayed):
    """The rule of the docstring in plain Python floats, element by element; `gradients` holds a
    list for each step."""
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
    parameters = {name: Tensor(xp.asarray(rng.normal(size=shape)), requires_grad=True)
                  for name, shape in shapes.items()}
    start = numpy.concatenate([p.numpy().ravel() for p in parameters.values()])
    decayed = [name == "layer.W_q" for name, shape in shapes.items()
               for _ in range(math.prod(shape))]
    gradients = rng.normal(size=(5, len(start))) * numpy.array([[0.1], [1], [3], [0.01], [1]])
    adam = Adam(parameters, lr=0.05, betas=(0.8, 0.95), eps=eps, weight_decay=weight_decay,
                    clip=clip)
    for gradient in gradients:
        at = 0
        for p in parameters.values():
            p.grad = xp.asarray(gradient[at:at + p.size].reshape(p.shape))
            at += p.size
        norm = adam.step()
        # before clipping
        assert float(norm) == pytest.approx(numpy.linalg.norm(gradient), rel=1e-12)
    expected = by_hand(start, gradients.tolist(), 0.05, 0.8, 0.95, eps, weight_decay, clip, decayed)
    updated = numpy.concatenate([p.numpy().ravel() for p in parameters.values()])
    numpy.testing.assert_allclose(updated, expected, rtol=1e-10)


@pytest.mark.skipif(xp.module is not numpy, reason="a GPU takes the whole batch at once")
@pytest.mark.parametrize("parts", [2, 3])
def test_adam_in_parts_adds_their_gradients_up_and_is_adam_in_one(parts):
    rng = RNG(1)
    values = {"W": rng.normal(size=(5, 3)), "b": rng.normal(size=4)}
    ours, expected = ({name: Tensor(xp.asarray(value), requires_grad=True)
                       for name, value in values.items()} for _ in range(2))
    divided = txl.DividedAdam(ours, lr=0.05, weight_decay=0.1, clip=1.0, parts=parts)
    whole = txl.Adam(expected, lr=0.05, weight_decay=0.1, clip=1.0)
    gradients = rng.normal(size=(3, parts, 19))

    def collect(part, step):
        W, b = gradients[step, part, :15].reshape(5, 3), gradients[step, part, 15:]
        divided.collect(part, [(ours["b"], xp.asarray(b)), (ours["W"], xp.asarray(W))])
    with Workers(range(parts), [collect, divided.add_up, divided.update_share]) as workers:
        for step in range(3):
            workers(collect, step)
            norm = divided.step(everywhere=workers)
            total = gradients[step].sum(axis=0)
            expected["W"].grad = xp.asarray(total[:15].reshape(5, 3))
            expected["b"].grad = xp.asarray(total[15:])
            assert float(norm) == pytest.approx(float(whole.step()), rel=1e-12)
    for name in values:
        numpy.testing.assert_allclose(ours[name].numpy(), expected[name].numpy(), rtol=1e-12)


@pytest.mark.parametrize("average_over", [2, 100])
@both
def test_the_average_follows_the_weights_over_a_tenth_of_the_steps_and_replaces_them_within_a_with(
        average_over, Adam):
    w = Tensor(xp.asarray([1.0, -2.0]), requires_grad=True)
    adam, a = Adam({"w": w}, lr=0.1, average_over=average_over), 0.0
    for t in range(1, 31):
        w.grad = xp.asarray(RNG(t).normal(size=2))
        adam.step()
        a += max(1 / average_over, 10 / (9 + t)) * (w.numpy() - a)
        if t == 1:
            numpy.testing.assert_array_equal(a, w.numpy())
    weights = w.numpy().copy()
    with pytest.raises(KeyError), adam.averaged():
        numpy.testing.assert_allclose(w.numpy(), a, rtol=1e-12)
        assert not numpy.allclose(a, weights)
        raise KeyError
    numpy.testing.assert_array_equal(w.numpy(), weights)


@both
def test_without_an_average_the_parameters_stay_as_they_are(Adam):
    w = Tensor(xp.asarray([1.0, -2.0]), requires_grad=True)
    with Adam({"w": w}).averaged():
        assert w.numpy().tolist() == [1, -2]


@both
def test_a_model_longer_than_a_block_is_updated_to_its_last_element(Adam):
    w = Tensor(xp.zeros(150_001), requires_grad=True)
    adam = Adam({"w": w}, lr=0.01)
    for _ in range(2):
        w.grad = xp.asarray(numpy.where(numpy.arange(150_001) % 2, 1.0, -3.0))
        adam.step()
    expected = numpy.where(numpy.arange(150_001) % 2, -0.02, 0.02)
    numpy.testing.assert_allclose(w.numpy(), expected, rtol=1e-6)


@both
def test_the_first_step_has_the_size_of_the_learning_rate_whatever_the_gradient(Adam):
    """That is the bias correction: without it the first step would be
    (1 - beta1) / sqrt(1 - beta2) of it."""
    for scale in (1e-3, 1.0, 1e3):
        w = Tensor(xp.zeros(2), requires_grad=True)
        w.grad = xp.asarray([scale, -scale])
        Adam({"w": w}, lr=0.01).step()
        numpy.testing.assert_allclose(w.numpy(), [-0.01, 0.01], rtol=1e-4)


@both
def test_the_learning_rate_can_be_given_for_a_step(Adam):
    w = Tensor(xp.ones(2), requires_grad=True)
    adam = Adam({"w": w}, lr=0.01)
    w.grad = xp.ones(2)
    adam.step(lr=0.5)
    numpy.testing.assert_allclose(w.numpy(), [0.5, 0.5], rtol=1e-6)
    adam.zero_grad()
    assert w.grad is None


def test_a_parameter_without_gradient_stays_as_it_is():
    """It neither decays nor drifts on, also where it had gradients before."""
    w, W_frozen = (Tensor(xp.ones(2), requires_grad=True) for _ in range(2))
    adam = txl.Adam({"w": w, "W_frozen": W_frozen}, lr=0.1, weight_decay=0.1, average_over=2)
    w.grad = W_frozen.grad = xp.ones(2)
    adam.step()
    before, W_frozen.grad = W_frozen.numpy().copy(), None
    adam.step()
    numpy.testing.assert_array_equal(W_frozen.numpy(), before)
    assert abs(w.numpy() - before).max() > 0.05


def test_divided_adam_wants_a_gradient_for_every_parameter():
    w, frozen = (Tensor(xp.ones(2), requires_grad=True) for _ in range(2))
    adam, w.grad = txl.DividedAdam({"w": w, "frozen": frozen}), xp.ones(2)
    with pytest.raises(ValueError, match="frozen has no gradient"):
        adam.step()
    assert w.numpy().tolist() == frozen.numpy().tolist() == [1, 1]


@both
def test_a_parameter_that_was_given_another_array_is_trained_on_from_there(Adam):
    w = Tensor(xp.ones(2), requires_grad=True)
    adam = Adam({"w": w}, lr=0.5)
    w.data, w.grad = xp.asarray([10.0, 20.0]), xp.ones(2)
    adam.step()
    numpy.testing.assert_allclose(w.numpy(), [9.5, 19.5], rtol=1e-6)
    w.grad = xp.ones(2)
    adam.step()
    numpy.testing.assert_allclose(w.numpy(), [9, 19], rtol=1e-6)


@both
def test_without_an_average_evaluation_takes_the_weights_as_they_are_also_assigned_ones(Adam):
    w = Tensor(xp.zeros(2), requires_grad=True)
    adam = Adam({"w": w}, lr=0.5)
    w.data = xp.asarray([10.0, 20.0])
    with adam.averaged():
        assert w.numpy().tolist() == [10, 20]
    assert w.numpy().tolist() == [10, 20]


@pytest.mark.parametrize("other", [numpy.ones(1), numpy.ones(2, numpy.float32)], ids=str)
def test_divided_adam_refuses_an_array_of_another_shape_or_dtype(other):
    w = Tensor(xp.zeros(2), requires_grad=True)
    adam = txl.DividedAdam({"w": w})
    w.data, w.grad = xp.asarray(other), xp.ones(2)
    with pytest.raises(ValueError, match="another shape or dtype"):
        adam.step()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_divided_adam_is_not_copied_because_its_copy_would_move_no_parameter(copied):
    with pytest.raises(TypeError, match="cannot be copied"):
        copied(txl.DividedAdam({"w": Tensor(xp.zeros(2), requires_grad=True)}))


@both
def test_parameters_of_two_dtypes_are_refused(Adam):
    with pytest.raises(TypeError, match="one dtype"):
        Adam({name: Tensor(xp.ones(2, dtype=name), requires_grad=True)
              for name in ("float32", "float64")})


@both
def test_adam_keeps_float32(Adam):
    w = Tensor(xp.ones(3, dtype=xp.float32), requires_grad=True)
    adam = Adam({"W": w}, weight_decay=0.1, clip=1.0)
    w.grad = xp.ones(3, dtype=xp.float32)
    norm = adam.step()
    dtypes = {w.dtype, adam.first["W"].dtype, adam.second["W"].dtype, norm.dtype}
    assert dtypes == {numpy.dtype("float32")}


def test_warmup_cosine():
    rate = [txl.warmup_cosine(step, 100, peak=1.0, warmup=10, final=0.1) for step in range(101)]
    numpy.testing.assert_allclose(rate[:10], numpy.arange(1, 11) / 10)
    assert rate[10] == 1.0 and rate[55] == pytest.approx(0.55) and rate[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert txl.warmup_cosine(500, 100, 1.0, 10, 0.1) == pytest.approx(0.1)


@both
def test_training_learns_a_text_that_memory_makes_predictable(Adam):
    """A period of 7 read in segments of 3 with a memory of 6: what comes next is in the memory,
    and the loss vanishes."""
    config = txl.Config(4, n_layer=2, n_head=2, d_model=16, d_ff=32, mem_len=6)
    model = txl.TransformerXL(config, seed=1)
    adam = Adam(model.parameters(), lr=1e-2, clip=1.0)
    text = numpy.array([0, 0, 1, 0, 0, 2, 3] * 60)
    memory, losses = None, []
    for at in range(0, len(text) - 4, 3):
        tokens, targets = xp.asarray(text[None, at:at + 3]), xp.asarray(text[None, at + 1:at + 4])
        loss, memory = txl.loss_and_memory(model, tokens, targets, memory)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), rel=0.35) and max(losses[-10:]) < 0.05
