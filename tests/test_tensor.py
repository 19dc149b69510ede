"""The engine: what a Tensor is, how the graph is built, walked and released, and what its
errors say."""
import copy
import gc
import math
import pickle
import threading
import weakref

import numpy
import pytest

import autograd
from autograd import Tensor, no_grad, stop_gradient, to_numpy, xp


def leaf(values, dtype=numpy.float64):
    return Tensor(xp.asarray(values, dtype=dtype), requires_grad=True)


# %% Values and dtypes

def test_results_are_numpys():
    a, b = numpy.array([[1.0, -2.0], [3.0, 0.5]]), numpy.array([2.0, 4.0])
    x, y = Tensor(xp.asarray(a)), Tensor(xp.asarray(b))
    for ours, expected in [
            (x + y, a + b), (x - y, a - b), (y - x, b - a), (x * y, a * b), (x / y, a / b),
            (y / x, b / a), (y ** x, b ** a), (x @ y, a @ b), (x @ x, a @ a), (-x, -a),
            (2 - x, 2 - a), (1 / x, 1 / a), (x ** 2, a ** 2), (2 ** x, 2 ** a), (x[0], a[0]),
            (x[:, 1], a[:, 1]), (x.T, a.T), (x.sum(), a.sum()),
            (x.mean(axis=0), a.mean(axis=0)), (x.max(axis=-1), a.max(axis=-1)),
            (x.reshape(4), a.reshape(4)), (x.transpose((1, 0)), a.T), (x.swapaxes(0, 1), a.T),
            (autograd.relu(x), numpy.maximum(a, 0)),
            (autograd.squared_relu(x), numpy.where(a > 0, a * a, 0)),
            (autograd.sigmoid(x), 1 / (1 + numpy.exp(-a))), (autograd.log(y), numpy.log(b)),
            (autograd.softmax(x), numpy.exp(a) / numpy.exp(a).sum(-1, keepdims=True))]:
        numpy.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_an_array_on_the_left_of_an_operator_leaves_the_work_to_the_tensor():
    x = leaf([1.0, 2.0])
    for y in (xp.ones(2) + x, xp.ones(2) - x, xp.ones(2) * x, xp.ones(2) / x, xp.ones((2, 2)) @ x):
        assert isinstance(y, Tensor) and y.requires_grad and y.dtype == numpy.float64


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


def test_a_tensor_of_one_number_is_a_number_to_python_and_one_of_several_is_not():
    x, several = leaf(2.5), leaf([1.0, 2.0])
    assert float(x) == 2.5 and int(x) == 2 and bool(x) and not leaf([0.0]) and f"{x:.2f}" == "2.50"
    assert f"{several}" == repr(several)
    for use in (float, int, bool, "{:.2f}".format):
        with pytest.raises(ValueError):
            use(several)


def test_rows_of_a_tensor_can_be_walked_over_and_a_number_has_none():
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    first, second = x
    (first * second).sum().backward()
    assert to_numpy(x.grad).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(TypeError):
        list(leaf(1.0))


def test_a_tensor_as_a_key_is_itself_whatever_its_values():
    x, y = leaf([1.0]), leaf([1.0])
    assert {x: "x", y: "y"}[y] == "y" and len({x, y, x}) == 2


@pytest.mark.parametrize("use", [numpy.asarray, numpy.sum, numpy.transpose,
                                 lambda x: numpy.array_equal(x, x),
                                 lambda x: numpy.array([x, x]), numpy.vstack,
                                 lambda x: numpy.zeros((1, 2)).__setitem__(0, x)])
def test_numpy_does_not_take_a_tensor_for_an_array(use):
    with pytest.raises(TypeError, match=r"\.numpy\(\), or \.data .* \.item\(\)"):
        use(leaf([[1.0, 2.0]]))


def test_importing_everything_leaves_pythons_own_functions():
    names = {}
    exec("from autograd import *", names)
    assert "sum" not in names and "max" not in names
    assert {"Tensor", "softmax", "check_gradients", "where", "no_grad"} < names.keys()


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_a_float_dtype_survives_numbers_and_integers(dtype):
    x = leaf([1.0, 2.0], dtype)
    for y in (x + 1, 1 + x, x * 0.5, 2.0 / x, x ** 2, 2 ** x, x - numpy.float64(0.1),
              x * numpy.float32(0.1), x + True, x * xp.asarray([1, 2]), xp.asarray([1, 2]) * x,
              x * Tensor(xp.asarray([3, 4])), x.mean(), x.sum() * 2.0, autograd.softmax(x),
              autograd.softmax(x, xp.asarray([True, False])), autograd.tanh(x),
              autograd.dropout(x, 0.5, xp.random.default_rng(0)),
              autograd.where(xp.asarray([True, False]), x, 0.0)):
        y.backward(xp.ones_like(y.data))
        assert y.dtype == dtype and x.grad.dtype == dtype
        x.grad = None


def test_integers_compute_as_in_numpy():
    x = Tensor([1, 2, 3])
    assert (x + 1).dtype.kind == "i" and (x / 2).dtype == numpy.float64
    assert (x * 2).numpy().tolist() == [2, 4, 6]


def test_numbers_booleans_and_integers_where_arrays_are_expected():
    assert (0.5 ** Tensor([1, 2])).numpy().tolist() == [0.5, 0.25]
    assert autograd.add(1, 2).item() == 3 and autograd.exp(0).item() == 1.0
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    for condition, grads in [(True, ([1, 1], [0, 0])), ([True, False], ([1, 0], [0, 1])),
                             (xp.asarray([0, 7]), ([0, 1], [1, 0]))]:
        x.grad = y.grad = None
        autograd.where(condition, x, y).sum().backward()
        assert (to_numpy(x.grad).tolist(), to_numpy(y.grad).tolist()) == grads
    assert not x.astype(xp.int64).requires_grad


def test_a_quotient_in_float32_has_the_gradient_that_float32_can_hold():
    for y in (1e-18, 1e25):
        x = leaf([y], numpy.float32)
        (Tensor(xp.asarray([y], dtype=xp.float32)) / x).sum().backward()
        assert to_numpy(x.grad)[0] == pytest.approx(-1 / y, rel=1e-6)


def test_dropout_with_a_probability_of_numpys_keeps_float32():
    x = Tensor(xp.ones(9, dtype=numpy.float32), requires_grad=True)
    y = autograd.dropout(x, numpy.float64(0.5), xp.random.default_rng(1))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == numpy.float32


@pytest.mark.parametrize("rows, dtype", [(256, "uint8"), (200, "int8")])
def test_the_ids_of_an_embedding_may_have_any_integer_dtype(rows, dtype):
    """Also one that cannot hold the number of rows."""
    table = leaf(numpy.arange(2.0 * rows).reshape(rows, 2))
    ids = numpy.array([3, numpy.iinfo(dtype).max, 3], dtype=dtype)
    autograd.embedding(table, xp.asarray(ids)).sum().backward()
    expected = numpy.zeros((rows, 2))
    expected[3], expected[ids[1]] = 2, 1
    numpy.testing.assert_array_equal(to_numpy(table.grad), expected)


@pytest.mark.parametrize("wrong", [-1, 3, 10**12])
def test_ids_and_targets_out_of_range_are_an_error_on_every_device(wrong):
    """Negative ones as well: -1, which elsewhere means "ignore", would be the last row."""
    table = leaf(numpy.ones((3, 3)))
    for compute in (lambda: autograd.embedding(table, [0, wrong]),
                    lambda: autograd.cross_entropy(table, [0, 1, wrong]),
                    lambda: autograd.embedding(table, numpy.array([[wrong]]))):
        with pytest.raises(IndexError, match=f"{wrong} is not one of 0 … 2"):
            compute()


def test_float32_and_float64_do_not_mix():
    with pytest.raises(TypeError, match=r"multiply\(float32\[2\], float64\[2\]\).*astype"):
        leaf([1, 2], numpy.float32) * leaf([1, 2], numpy.float64)


def test_softmax_sigmoid_and_cross_entropy_are_stable():
    x = leaf([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], numpy.float32)
    with numpy.errstate(all="raise", under="ignore"):
        loss = autograd.cross_entropy(x, xp.asarray([1, 0]))
        loss.backward()
        y = autograd.sigmoid(x * 1.0)
    assert loss.item() == pytest.approx((2e4 + numpy.log(3)) / 2, rel=1e-6)
    assert numpy.isfinite(to_numpy(x.grad)).all() and numpy.isfinite(y.numpy()).all()
    numpy.testing.assert_allclose(autograd.softmax(x).numpy(),
                                  [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def test_a_confidence_penalty_takes_part_of_the_mean_entropy_off_the_loss():
    logits, targets = numpy.random.default_rng(3).normal(size=(2, 3, 5)), [[0, 4, 4], [1, 2, 0]]
    loss = autograd.cross_entropy(logits, targets).item()
    p = autograd.softmax(logits).numpy()
    entropy = -(p * numpy.log(p)).sum(axis=-1).mean()
    penalised = autograd.cross_entropy(logits, targets, confidence_penalty=0.25)
    assert penalised.item() == pytest.approx(loss - 0.25 * entropy)


def test_with_a_confidence_penalty_no_answer_becomes_certain():
    """Without one, a text in which an answer is certain is learned best by p = 1. A penalty c
    stops where log(p / q) = 1 / (c p), with q the probability of each other answer."""
    c, V, target = 0.1, 65, 2
    p = 0.99
    for _ in range(50):
        q = p * numpy.exp(-1 / (c * p))
        p = 1 - (V - 1) * q
    answers = numpy.full((1, V), q)
    answers[0, target] = p
    logits = leaf(numpy.log(answers))
    autograd.cross_entropy(logits, xp.asarray([target]), confidence_penalty=c).backward()
    assert round(p, 3) == 0.997
    numpy.testing.assert_allclose(to_numpy(logits.grad), 0, atol=1e-15)


def test_softmax_gives_hidden_keys_no_weight_and_a_hidden_row_zeros():
    mask = xp.asarray([[False, True, False], [True, True, True]])
    y = autograd.softmax(leaf([[1.0, 50.0, 1.0], [1.0, 2.0, 3.0]]), mask)
    numpy.testing.assert_allclose(y.numpy(), [[0.5, 0, 0.5], [0, 0, 0]])


def test_dropout_drops_about_p_keeps_the_expectation_and_repeats_with_its_seed():
    x = leaf(numpy.ones((200, 200)))
    y = autograd.dropout(x, 0.3, xp.random.default_rng(1)).numpy()
    assert abs((y == 0).mean() - 0.3) < 0.01 and abs(y.mean() - 1) < 0.02
    numpy.testing.assert_allclose(numpy.unique(y), [0, 1 / 0.7])
    numpy.testing.assert_array_equal(y, autograd.dropout(x, 0.3, xp.random.default_rng(1)).numpy())


def test_layer_norm_gives_every_row_mean_zero_and_variance_one():
    x = Tensor(xp.asarray(numpy.random.default_rng(0).normal(3, 5, size=(4, 50))))
    y = autograd.layer_norm(x, xp.ones(50), xp.zeros(50)).numpy()
    numpy.testing.assert_allclose(y.mean(-1), 0, atol=1e-12)
    numpy.testing.assert_allclose(y.var(-1), 1, rtol=1e-5)


# %% The graph

def test_backward_by_hand():
    x, w = leaf([1.0, 2.0]), leaf([3.0, -1.0])
    (x * w + x).sum().backward()
    assert to_numpy(x.grad).tolist() == [4.0, 0.0] and to_numpy(w.grad).tolist() == [1.0, 2.0]


def test_a_value_used_on_several_paths_gets_the_sum():
    x = leaf(2.0)
    y = x * x
    (y * y + y).backward()                          # x^4 + x^2
    assert x.grad.item() == 4 * 8 + 2 * 2


def test_gradients_accumulate_over_calls():
    x = leaf([1.0, 2.0])
    (x * 3).sum().backward()
    (x * 4).sum().backward()
    assert to_numpy(x.grad).tolist() == [7.0, 7.0]


def test_gradients_share_memory_with_nothing():
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    start = xp.ones(2)
    z = x + y
    z.backward(start)
    x.grad += 5
    assert to_numpy(y.grad).tolist() == [1.0, 1.0] and to_numpy(start).tolist() == [1.0, 1.0]
    before = x.grad
    (x * 2).sum().backward()
    assert to_numpy(before).tolist() == [6.0, 6.0] and to_numpy(x.grad).tolist() == [8.0, 8.0]


def test_intermediate_values_keep_no_gradient_and_constants_get_none():
    x, c = leaf([1.0]), Tensor([2.0])
    y = x * c
    y.sum().backward()
    assert y.grad is None and c.grad is None and x.grad is not None


def test_a_second_backward_is_a_clear_error():
    x = leaf([1.0, 2.0])
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="released by an earlier backward"):
        y.backward()
    assert to_numpy(x.grad).tolist() == [2.0, 4.0]


def test_a_shared_part_of_the_graph_cannot_be_walked_twice():
    x = leaf([1.0, 2.0])
    shared = x * x
    a, b = shared.sum(), (shared * 2).sum()
    a.backward()
    with pytest.raises(RuntimeError, match="released"):
        b.backward()


def test_the_graph_holds_the_arrays_that_gradients_need_and_backward_frees_them():
    x = leaf(numpy.ones(3))
    y = x + 1.0
    z = autograd.exp(y)
    # the gradient of exp is its value
    unneeded, needed = weakref.ref(y.data), weakref.ref(z.data)
    loss = z.sum()
    del y, z
    assert unneeded() is None and needed() is not None
    loss.backward()
    assert needed() is None
    numpy.testing.assert_allclose(to_numpy(x.grad), math.e ** 2)


@pytest.mark.parametrize("f", [
    lambda x: x.reshape(4), lambda x: x.T, lambda x: x[0], lambda x: x.astype(numpy.float64),
    lambda x: x.mean(axis=0), lambda x: x.swapaxes(0, 1), lambda x: x + x,
    lambda x: x @ xp.ones((2, 2)), lambda x: autograd.concatenate([x, x]), autograd.relu,
    autograd.softmax, autograd.normalise, lambda x: autograd.cross_entropy(x, [0, 1]),
    lambda x: autograd.embedding(x, [0, 1, 1])])
def test_an_operation_keeps_no_operand_that_its_gradient_does_not_need(f):
    x = leaf(numpy.ones((2, 2)))
    y = x * 2.0
    operand, z = weakref.ref(y.data), f(y)
    z = z * 1.0                         # whose value may be a view of the operand's
    del y
    assert operand() is None
    z.sum().backward()
    assert x.grad is not None


def test_copies_of_a_leaf_are_leaves_of_their_own():
    for again in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        x = leaf([1.0, 2.0])
        y = again(x)
        (x * y * y).sum().backward()
        assert to_numpy(x.grad).tolist() == [1, 4] and to_numpy(y.grad).tolist() == [2, 8]


def test_a_computed_tensor_is_not_copied_with_its_graph():
    """Its gradient would go to the copies of the leaves."""
    x = leaf([1.0, 2.0])
    x.grad = xp.ones(2)
    with pytest.raises(TypeError, match=r"copy \.detach\(\)"):
        copy.deepcopy(x * 2.0)
    one, two = copy.deepcopy([x, x])
    assert one is two and to_numpy(one.grad).tolist() == [1, 1] and one.grad is not x.grad


def test_a_result_may_become_a_leaf_and_a_leaf_may_get_another_array():
    with no_grad():
        x = leaf([1.0, 2.0]) * 2.0
    x.requires_grad = True
    (x * x).sum().backward()
    assert to_numpy(x.grad).tolist() == [4, 8]
    x.data, x.grad = xp.ones((2, 2)), None
    (x * xp.ones(2)).sum().backward()
    assert to_numpy(x.grad).tolist() == [[1, 1], [1, 1]]


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
    with pytest.raises(ZeroDivisionError):
        with no_grad():
            raise ZeroDivisionError
    assert (x * 2).requires_grad


def test_no_grad_in_one_thread_does_not_reach_another():
    x, seen = leaf([1.0]), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_stop_gradient_and_detach_keep_the_value_and_drop_the_history():
    x = leaf([1.0, 3.0])
    assert stop_gradient([1.0, 2.0]).numpy().tolist() == [1, 2]
    for stop in (stop_gradient, Tensor.detach):
        x.grad = None
        y = x * x
        (y + stop(y) * x).sum().backward()
        assert stop(y).numpy().tolist() == [1.0, 9.0] and not stop(y).requires_grad
        assert to_numpy(x.grad).tolist() == [2 + 1, 6 + 9]


def test_a_gradient_nobody_wants_is_not_computed():
    x, constant, called = leaf([1.0]), Tensor([2.0]), []
    y = autograd.result(x.data * 2, (x, lambda g: 2 * g), (constant, called.append))
    y.sum().backward()
    assert called == []


def test_sigmoid_keeps_its_digits_far_below_zero():
    y = autograd.sigmoid(Tensor(xp.asarray([-30.0, -80.0, 80.0], dtype=numpy.float32)))
    numpy.testing.assert_allclose(y.numpy(), numpy.exp([-30.0, -80.0, 0.0]), rtol=1e-5)


# %% Errors

def test_backward_of_a_non_scalar_needs_a_gradient_of_its_shape():
    y = leaf([[1.0, 2.0]]) * 2
    message = r"shape \[1, 2\]; give its gradient, or call it on a single number"
    with pytest.raises(ValueError, match=message):
        y.backward()
    with pytest.raises(ValueError, match=r"gradient of shape \[2\] for a result of shape \[1, 2\]"):
        y.backward(xp.ones(2))


def test_backward_without_anything_to_differentiate():
    with pytest.raises(RuntimeError,
                       match="nothing this value was computed from requires a gradient"):
        (Tensor([1.0]) * 2).sum().backward()
    with no_grad():
        y = leaf([1.0]).sum()
    with pytest.raises(RuntimeError, match="no_grad"):
        y.backward()


@pytest.mark.parametrize("error, message, compute", [
    (ValueError, r"add\(float64\[2\], float64\[3\]\)", lambda: leaf([1, 2]) + leaf([1, 2, 3])),
    (ValueError, r"matmul\(float64\[2, 3\], float64\[2, 3\]\)",
     lambda: leaf(numpy.ones((2, 3))) @ leaf(numpy.ones((2, 3)))),
    (ValueError, r"matmul\(float64\[2\], 3.0\)", lambda: leaf([1, 2]) @ 3.0),
    (ValueError, r"reshape\(float64\[3\], \(2, 2\)\)", lambda: leaf([1, 2, 3]).reshape(2, 2)),
    (ValueError, r"concatenate\(\[float64\[1, 2\], float64\[1, 3\]\]\)",
     lambda: autograd.concatenate([leaf([[1, 2]]), leaf([[1, 2, 3]])])),
    (TypeError, r"add\(float64\[2\], None\): numbers expected, not None",
     lambda: leaf([1, 2]) + None),
    (TypeError, r"matmul\('a', float64\[2\]\): numbers expected", lambda: "a" @ leaf([1, 2])),
    (IndexError, r"index\(float64\[2\], 5\)", lambda: leaf([1, 2])[5]),
    (IndexError, r"sum\(float64\[2\]\)", lambda: leaf([1, 2]).sum(axis=1)),
    (TypeError, r"embedding\(float64\[2, 2\], float64\[1\]\).*integers",
     lambda: autograd.embedding(leaf([[1, 2], [3, 4]]), xp.asarray([0.0]))),
    (ValueError, r"cross_entropy\(float64\[2, 3\], int64\[3\]\).*shape \[2\]",
     lambda: autograd.cross_entropy(leaf(numpy.ones((2, 3))), xp.asarray([0, 1, 2]))),
    (ValueError, r"layer_norm\(float64\[2, 3\], float64\[2\], float64\[2\]\)",
     lambda: autograd.layer_norm(leaf(numpy.ones((2, 3))), leaf([1, 1]), leaf([0, 0]))),
    (TypeError, r"linear\(float64\[1, 2, 1\].*float32 and float64 do not mix",
     lambda: autograd.linear(leaf([[[1], [2]]]), leaf([[1]]), leaf([0]),
                             before=xp.zeros((1, 3, 1), dtype=numpy.float32))),
    (IndexError, r"transpose\(float64\[1, 2\], \(0, 3\)\)",
     lambda: autograd.transpose(leaf([[1, 2]]), (0, 3))),
    (ValueError, r"dropout\(float64\[2\].*p must be in \[0, 1\)",
     lambda: autograd.dropout(leaf([1, 2]), 1.0, None)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_an_error_names_the_operation_and_the_shapes(error, message, compute):
    with pytest.raises(error, match=message):
        compute()


def test_what_a_tensor_cannot_hold():
    for data in (["a"], "a", numpy.array(["a"]), [None]):
        with pytest.raises(TypeError, match="numbers expected"):
            Tensor(data)
    with pytest.raises(TypeError, match="only floating-point values have a gradient, not int64"):
        Tensor(xp.asarray([1, 2]), requires_grad=True)
    with pytest.raises(TypeError, match="Tensor already"):
        Tensor(Tensor([1.0]))


def test_use_device_knows_two_devices():
    with pytest.raises(ValueError, match="'cpu' or 'gpu', not 'tpu'"):
        autograd.use_device("tpu")
