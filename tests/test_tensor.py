"""What a Tensor is, how the graph is built, walked and released, and what errors say."""
import gc
import math
import weakref

import numpy
import pytest

import autograd
import backend
import fast
from autograd import Tensor, no_grad, stop_gradient, to_numpy, xp


def leaf(values, dtype=numpy.float64):
    return Tensor(xp.asarray(values, dtype=dtype), requires_grad=True)


# %% Values

def test_results_are_numpys():
    a, b = numpy.array([[1.0, -2.0], [3.0, 0.5]]), numpy.array([2.0, 4.0])
    x, y = Tensor(xp.asarray(a)), Tensor(xp.asarray(b))
    soft = numpy.exp(a) / numpy.exp(a).sum(-1, keepdims=True)
    for ours, expected in [
            (x + y, a + b), (x - y, a - b), (y - x, b - a), (x * y, a * b), (x / y, a / b),
            (y / x, b / a), (x @ y, a @ b), (x @ x, a @ a), (-x, -a), (2 - x, 2 - a),
            (1 / x, 1 / a), (x ** 2, a ** 2), (x[0], a[0]), (x[:, 1], a[:, 1]), (x.T, a.T),
            (x.sum(), a.sum()), (x.mean(axis=0), a.mean(axis=0)),
            (x[:1].max(axis=-1), a[:1].max(axis=-1)), (x.reshape(4), a.reshape(4)),
            (x.transpose((1, 0)), a.T), (x.swapaxes(0, 1), a.T), (x.exp(), numpy.exp(a)),
            (y.log(), numpy.log(b)), (y.sqrt(), numpy.sqrt(b)), (x.tanh(), numpy.tanh(a)),
            (x.relu(), numpy.maximum(a, 0)), (x.squared_relu(), numpy.where(a > 0, a * a, 0)),
            (x.sigmoid(), 1 / (1 + numpy.exp(-a))), (x.softmax(), soft),
            (x.log_softmax(), numpy.log(soft))]:
        assert ours.shape == expected.shape
        numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_comparisons_are_numpys_and_select_with_where_and_index():
    a = numpy.array([[0.0, -2.0], [3.0, 0.0]])
    x = leaf(a)
    for ours, expected in [(x == 0, a == 0), (x != 0, a != 0), (x < 1, a < 1), (x <= 0, a <= 0),
                           (x > 0, a > 0), (0 >= x, 0 >= a), (x == x.detach(), a == a),
                           (xp.zeros(2) == x, a == 0)]:
        assert ours.dtype == bool and not ours.requires_grad
        numpy.testing.assert_array_equal(ours.numpy(), expected)
    y = autograd.where(x == 0, 9.0, x)
    assert y.numpy().tolist() == [[9, -2], [3, 9]] and x[x > 0].numpy().tolist() == [3]
    y.sum().backward()
    assert to_numpy(x.grad).tolist() == [[0, 1], [1, 0]]


def test_to_python_one_number_is_a_number_several_are_a_sequence_and_a_key_is_itself():
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    first, second = x
    (first * second).sum().backward()
    assert to_numpy(x.grad).tolist() == [[3, 4], [1, 2]]
    assert float(x[0, 1]) == x[0, 1].item() == 2 and bool(x[0, 1]) and not leaf([0.0])
    for use in (float, bool, Tensor.item):
        with pytest.raises(ValueError):
            use(x)
    with pytest.raises(TypeError):
        list(leaf(1.0))
    one, alike = leaf([1.0]), leaf([1.0])
    assert {one: "one", alike: "alike"}[alike] == "alike" and len({one, alike, one}) == 2


def test_numpy_does_not_take_a_tensor_for_an_array():
    x = leaf([[1.0, 2.0]])
    for use in (numpy.asarray, numpy.sum, numpy.transpose, numpy.vstack,
                lambda x: numpy.array_equal(x, x), lambda x: numpy.array([x, x]),
                lambda x: numpy.zeros((1, 2)).__setitem__(0, x)):
        with pytest.raises(TypeError, match=r"\.numpy\(\), or \.data .* \.item\(\)"):
            use(x)


# %% Dtypes

@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_a_float_dtype_survives_numbers_and_integers(dtype):
    x = leaf([1.0, 2.0], dtype)
    whole, chosen = xp.asarray([1, 2]), xp.asarray([True, False])
    for y in (x + 1, 1 + x, x * 0.5, 2.0 / x, x ** 2, x + True, x - numpy.float64(0.1),
              x * numpy.float32(0.1), x * whole, whole - x, whole / x, x * Tensor(whole),
              x.mean(), x.sum() * 2.0, x.softmax(), x.softmax(chosen), x.tanh(),
              autograd.dropout(x, numpy.float64(0.5), xp.random.default_rng(1)),
              autograd.where(chosen, x, 0.0),
              x ** numpy.float64(2), x ** numpy.float32(2), x ** numpy.int64(2)):
        y.backward(xp.ones_like(y.data))
        assert y.dtype == dtype and x.grad.dtype == dtype
        x.grad = None


def test_numbers_booleans_and_integers_where_arrays_are_expected():
    x = Tensor([1, 2, 3])
    assert (x + 1).dtype.kind == "i" and (x / 2).dtype == x.softmax().dtype == "float64"
    assert (x * 2).numpy().tolist() == [2, 4, 6]
    assert autograd.add(1, 2).item() == 3 and autograd.exp(0).item() == 1.0
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    for condition, grads in [(True, ([1, 1], [0, 0])), ([True, False], ([1, 0], [0, 1])),
                             (xp.asarray([0, 7]), ([0, 1], [1, 0]))]:
        x.grad = y.grad = None
        autograd.where(condition, x, y).sum().backward()
        assert (to_numpy(x.grad).tolist(), to_numpy(y.grad).tolist()) == grads
    assert not x.astype(xp.int64).requires_grad


def test_a_quotient_in_float32_has_the_gradient_that_float32_can_hold():
    x = leaf([1e-18, 1e25], numpy.float32)
    (x.detach() / x).sum().backward()
    numpy.testing.assert_allclose(to_numpy(x.grad), [-1e18, -1e-25], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_ids_may_have_an_integer_dtype_that_cannot_hold_the_number_of_rows(dtype):
    table, last = leaf(numpy.ones((256, 2))), numpy.iinfo(dtype).max
    autograd.embedding(table, xp.asarray([3, last, 3], dtype=dtype)).sum().backward()
    used = to_numpy(table.grad)[:, 0]
    assert used[3] == 2 and used[last] == 1 and used.sum() == 3


# %% What single operations promise

def test_softmax_sigmoid_and_cross_entropy_are_stable():
    x = leaf([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], numpy.float32)
    with numpy.errstate(all="raise", under="ignore"):
        loss = autograd.cross_entropy(x, xp.asarray([1, 0]))
        loss.backward()
        y = x.sigmoid()
    assert loss.item() == pytest.approx((2e4 + numpy.log(3)) / 2, rel=1e-6)
    assert numpy.isfinite(to_numpy(x.grad)).all() and numpy.isfinite(y.numpy()).all()
    numpy.testing.assert_allclose(x.softmax().numpy(), [[1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    y = Tensor(xp.asarray([-30.0, -80.0, 80.0], dtype=numpy.float32)).sigmoid()
    numpy.testing.assert_allclose(y.numpy(), numpy.exp([-30.0, -80.0, 0.0]), rtol=1e-5)


def test_a_confidence_penalty_takes_part_of_the_mean_entropy_off_the_loss():
    logits, targets = numpy.random.default_rng(3).normal(size=(2, 3, 5)), [[0, 4, 4], [1, 2, 0]]
    loss = autograd.cross_entropy(logits, targets).item()
    p = autograd.softmax(logits).numpy()
    entropy = -(p * numpy.log(p)).sum(axis=-1).mean()
    penalised = autograd.cross_entropy(logits, targets, confidence_penalty=0.25)
    assert penalised.item() == pytest.approx(loss - 0.25 * entropy)
    logits = leaf([[0.0, 0.0, -math.inf]])                  # 0 log 0 is 0
    loss = autograd.cross_entropy(logits, [0], 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.9 * math.log(2))
    numpy.testing.assert_allclose(to_numpy(logits.grad), [[-0.5, 0.5, 0]], atol=1e-15)


def test_softmax_gives_hidden_keys_no_weight_and_a_hidden_row_zeros():
    mask = xp.asarray([[False, True, False], [True, True, True]])
    y = autograd.softmax(leaf([[1.0, 50.0, 1.0], [1.0, 2.0, 3.0]]), mask)
    numpy.testing.assert_allclose(y.numpy(), [[0.5, 0, 0.5], [0, 0, 0]])


def test_dropout_drops_about_p_keeps_the_expectation_and_repeats_with_its_seed():
    x = leaf(numpy.ones((200, 200)))
    y, again = (autograd.dropout(x, 0.3, xp.random.default_rng(1)).numpy() for _ in range(2))
    assert abs((y == 0).mean() - 0.3) < 0.01 and abs(y.mean() - 1) < 0.02
    numpy.testing.assert_allclose(numpy.unique(y), [0, 1 / 0.7])
    numpy.testing.assert_array_equal(y, again)


# %% The graph

def test_gradients_add_over_paths_and_over_calls():
    x, w = leaf([1.0, 2.0]), leaf([3.0, -1.0])
    (x * w + x).sum().backward()
    assert to_numpy(x.grad).tolist() == [4, 0] and to_numpy(w.grad).tolist() == [1, 2]
    (x * 3).sum().backward()
    assert to_numpy(x.grad).tolist() == [7, 3]
    x = leaf(2.0)
    y = x * x
    (y * y + y).backward()                          # x^4 + x^2
    assert x.grad.item() == 4 * 8 + 2 * 2


def test_gradients_share_memory_with_nothing():
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    start = xp.ones(2)
    (x + y).backward(start)
    x.grad += 5
    assert to_numpy(y.grad).tolist() == [1.0, 1.0] and to_numpy(start).tolist() == [1.0, 1.0]
    before = x.grad
    (x * 2).sum().backward()
    assert to_numpy(before).tolist() == [6.0, 6.0] and to_numpy(x.grad).tolist() == [8.0, 8.0]


def test_intermediate_values_keep_no_gradient_and_constants_get_none():
    x, c, called = leaf([1.0]), Tensor([2.0]), []
    y = autograd.record(x.data * c.data, (x, lambda g: g * c.data), (c, called.append))
    (y * 1.0).sum().backward()
    assert y.grad is None and c.grad is None and x.grad.item() == 2 and called == []


def test_a_graph_or_a_part_of_it_cannot_be_walked_twice():
    x = leaf([1.0, 2.0])
    shared = x * x
    a, b = shared.sum(), (shared * 2).sum()
    a.backward()
    for again in (a, b):
        with pytest.raises(RuntimeError, match="released by an earlier backward"):
            again.backward()
    assert to_numpy(x.grad).tolist() == [2.0, 4.0]


def test_the_graph_holds_the_arrays_that_gradients_need_and_backward_frees_them():
    x = leaf(numpy.ones(3))
    y = x + 1.0
    z = autograd.exp(y)                             # the gradient of exp is its value
    unneeded, needed = weakref.ref(y.data), weakref.ref(z.data)
    loss = z.sum()
    del y, z
    assert unneeded() is None and needed() is not None
    loss.backward()
    assert needed() is None
    numpy.testing.assert_allclose(to_numpy(x.grad), math.e ** 2)


def test_an_operation_keeps_no_operand_that_its_gradient_does_not_need():
    for f in (lambda x: x.reshape(4), lambda x: x.T, lambda x: x[0], lambda x: x.mean(axis=0),
              lambda x: x.astype(numpy.float64), lambda x: x.swapaxes(0, 1), lambda x: x + x,
              lambda x: x @ xp.ones((2, 2)), lambda x: autograd.concatenate([x, x]),
              autograd.relu, autograd.softmax, autograd.layer_norm,
              lambda x: autograd.cross_entropy(x, [0, 1]),
              lambda x: autograd.embedding(x, [0, 1, 1])):
        x = leaf(numpy.ones((2, 2)))
        y = x * 2.0
        operand, z = weakref.ref(y.data), f(y) * 1.0        # f(y) may be a view of the operand
        del y
        assert operand() is None
        z.sum().backward()
        assert x.grad is not None


def test_a_graph_that_is_dropped_needs_no_garbage_collector():
    """Closures hold arrays, never the Tensor they belong to: reference counts free everything
    at once."""
    gc.disable()
    try:
        y = autograd.softmax(leaf(numpy.ones((2, 3))) @ leaf(numpy.ones((3, 2))))
        reference = weakref.ref(y)
        loss = (y * 2).sum()
        del y, loss
        assert reference() is None
    finally:
        gc.enable()


def test_a_long_chain_meets_no_recursion_limit():
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = y + 1e-4
    y.backward()
    assert x.grad.item() == 1.0


def test_no_grad_builds_no_graph_and_ends_with_its_block():
    x = leaf([1.0])
    with no_grad():
        assert not (x * 2).requires_grad
        with no_grad():
            pass
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        y = x * 2
        raise ZeroDivisionError
    assert (x * 2).requires_grad
    y.requires_grad = True                      # what no_grad made may become a leaf,
    (y * y).sum().backward()
    assert y.grad.item() == 4
    y.data, y.grad = xp.ones((2, 2)), None      # and a leaf may get another array
    (y * xp.ones(2)).sum().backward()
    assert to_numpy(y.grad).tolist() == [[1, 1], [1, 1]]


def test_stop_gradient_and_detach_keep_the_value_and_drop_the_history():
    assert stop_gradient([1.0, 2.0]).numpy().tolist() == [1, 2]
    for stop in (stop_gradient, Tensor.detach):
        x = leaf([1.0, 3.0])
        y = x * x
        (y + stop(y) * x).sum().backward()
        assert stop(y).numpy().tolist() == [1.0, 9.0] and not stop(y).requires_grad
        assert to_numpy(x.grad).tolist() == [2 + 1, 6 + 9]


# %% Errors

def test_backward_needs_a_gradient_of_the_shape_and_something_to_differentiate():
    for given in ((), (xp.ones(2),)):
        with pytest.raises(ValueError, match=r"shape \[1, 2\]; give its gradient, of the same sh"):
            (leaf([[1.0, 2.0]]) * 2).backward(*given)
    with no_grad():
        inside = leaf([1.0]).sum()
    for y in ((Tensor([1.0]) * 2).sum(), inside):
        with pytest.raises(RuntimeError, match="nothing this .* requires a gradient .*no_grad"):
            y.backward()


@pytest.mark.parametrize("error, said, note, compute", [
    (ValueError, "broadcast", "add: (2,), (3,)", lambda: leaf([1, 2]) + leaf([1, 2, 3])),
    (TypeError, "float32 and float64 do not mix; convert one of them with astype",
     "multiply: (2,), (2,)", lambda: leaf([1, 2], numpy.float32) * leaf([1, 2])),
    (TypeError, "numbers expected, not 'a'", "matmul: str, (2,)", lambda: "a" @ leaf([1, 2])),
    (TypeError, r"must be a number; for others use exp\(b \* log\(a\)\)", "power: (2,), (2,)",
     lambda: leaf([1, 2]) ** leaf([1, 2])),
    (TypeError, "the exponent must be a number", "power: int, (2,)", lambda: 2 ** leaf([1, 2])),
    (ValueError, "a number has no matrix pro", "matmul: (2,), float", lambda: leaf([1, 2]) @ 3.0),
    (ValueError, None, "matmul: (1, 2), (3, 1)", lambda: leaf([1, 2]) @ leaf([1, 2, 3])),
    (IndexError, "out of bounds", "getitem: (2,), int", lambda: leaf([1, 2])[5]),
    (IndexError, "axis 1", "sum: (2,)", lambda: leaf([1, 2]).mean(axis=1)),
    (ValueError, None, "concatenate: list",
     lambda: autograd.concatenate([leaf([[1, 2]]), leaf([[1, 2, 3]])])),
    (TypeError, "ids must be integers, not float64", "embedding: (1, 2), (1,)",
     lambda: autograd.embedding(leaf([[1, 2]]), xp.asarray([0.0]))),
    (ValueError, r"targets must have the shape \[2\]", "cross_entropy: (2, 3), (3,)",
     lambda: autograd.cross_entropy(leaf(numpy.ones((2, 3))), xp.asarray([0, 1, 2]))),
    (TypeError, "float32 and float64 do not mix", "linear: (1, 2, 1), (1, 1), (1,)",
     lambda: fast.linear(leaf([[[1], [2]]]), leaf([[1]]), leaf([0]), leaf([[[3]]], "float32"))),
    (ValueError, None, "multiply: (2, 3), (2,)",
     lambda: autograd.layer_norm(leaf(numpy.ones((2, 3))), leaf([1, 1]), leaf([0, 0]))),
    (ValueError, r"p must be in \[0, 1\)", "dropout: (2,), float",
     lambda: autograd.dropout(leaf([1, 2]), 1.0, None)),
])
def test_an_error_of_numpys_has_one_note_of_the_innermost_operation(error, said, note, compute):
    with pytest.raises(error, match=said) as caught:
        compute()
    assert len(caught.value.__notes__) == 1 and caught.value.__notes__[0].startswith(f"in {note}")


@pytest.mark.parametrize("wrong", [-1, 3, 10**12])
def test_ids_and_targets_out_of_range_are_an_error(wrong):
    """Negative ones as well: -1, which elsewhere means "ignore", would be the last row."""
    table = leaf(numpy.ones((3, 3)))
    for use, ids in [(autograd.embedding, [0, wrong]), (autograd.cross_entropy, [0, 1, wrong]),
                     (autograd.embedding, numpy.array([[wrong]]))]:
        with pytest.raises(IndexError, match=f"{wrong} is not one of 0 … 2"):
            use(table, ids)


def test_what_a_tensor_cannot_hold():
    for data in (["a"], "a", numpy.array(["a"]), [None], None):
        with pytest.raises(TypeError, match="numbers expected"):
            Tensor(data)
    with pytest.raises(TypeError, match="Tensor already"):
        Tensor(Tensor([1.0]))
    for dtype in (numpy.int64, bool, numpy.float16):
        with pytest.raises(TypeError, match="only float32 and float64 have a gradient, not"):
            leaf([1, 0], dtype)


def test_use_device_knows_two_devices():
    with pytest.raises(ValueError, match="'cpu' or 'gpu', not 'tpu'"):
        backend.use_device("tpu")
