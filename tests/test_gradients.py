"""Every gradient in autograd.py and txl.py against central finite differences, in float64.

Run it with -v: the names of the tests are a table of contents of the engine and of the paper.
"""
import itertools

import numpy
import pytest

import autograd
import backend
import txl
from autograd import GradientError, Tensor, check_gradients, to_numpy, xp

# %% The operations
# A case is an operation, what is special about it, a function of its inputs and the inputs. An
# input is a shape, filled with random numbers away from zero (kinks and poles are at zero), or
# a NumPy array.


def positive(*shape):
    return numpy.random.default_rng(len(shape)).uniform(0.5, 2.0, size=shape)


def far_apart(*shape):
    """Distinct values further apart than the finite difference, so that none overtakes another."""
    size = int(numpy.prod(shape))
    return (numpy.random.default_rng(5).permutation(size) / 3.0 - size / 6.0).reshape(shape)


def a(name):
    return getattr(autograd, name)


def cases():
    for name, second in [("add", (3, 4)), ("subtract", (3, 4)), ("multiply", (3, 4)),
                         ("divide", positive(3, 4))]:
        f = a(name)
        yield name, "equal shapes", f, [(3, 4), second]
        yield name, "first operand broadcast over rows", f, [(4,), second]
        yield name, "first operand broadcast over columns", f, [(3, 1), second]
        yield name, "first operand 0-d", f, [(), second]
        yield name, "second operand broadcast over rows", f, [(3, 4), positive(4)]
        yield name, "second operand broadcast over columns", f, [(3, 4), positive(3, 1)]
        yield name, "second operand 0-d", f, [(3, 4), positive()]
        yield name, "both broadcast", f, [(3, 1, 2), positive(4, 1)]
        yield name, "size-1 axes that stay", f, [(1, 1), positive(1)]
        yield name, "size 0", f, [(0, 3), positive(3)]
        yield name, "the same tensor twice", lambda x, f=f: f(x, x), [positive(3)]
        yield name, "a number on the right", lambda x, f=f: f(x, 2.5), [(3,)]
        yield name, "a number on the left", lambda x, f=f: f(2.5, x), [positive(3)]
        yield name, "an integer array beside", lambda x, f=f: f(x, xp.asarray([1, 2, 3])), [(2, 3)]
    power = a("power")
    yield "power", "base and exponent", power, [positive(3, 4), (3, 4)]
    yield "power", "exponent broadcast", power, [positive(3, 4), (4,)]
    yield "power", "base broadcast", power, [positive(4), (3, 4)]
    yield "power", "number as exponent", lambda x: x ** 3, [(3, 4)]
    yield "power", "negative base, whole exponent", lambda x: x ** 2, [-positive(3)]
    yield "power", "exponent zero at base zero", lambda x: x ** 0, [numpy.zeros(2)]
    yield "power", "exponent two at base zero", lambda x: x ** 2, [numpy.zeros(2)]
    yield "power", "number as base", lambda x: 2 ** x, [(3,)]
    yield "power", "the same tensor twice", lambda x: x ** x, [positive(3)]
    for name in ("negative", "exp", "tanh", "sigmoid", "relu", "squared_relu"):
        for what, shape in [("matrix", (3, 4)), ("0-d", ()), ("size 0", (0, 2)),
                            ("size-1 axes", (1, 3, 1))]:
            yield name, what, a(name), [shape]
    for name in ("log", "sqrt"):
        for what, shape in [("matrix", (3, 4)), ("0-d", ()), ("size 0", (0, 2))]:
            yield name, what, a(name), [positive(*shape)]

    chosen = numpy.array([[True, False, True], [False, True, True]])
    where = a("where")
    yield "where", "equal shapes", lambda x, y: where(xp.asarray(chosen), x, y), [(2, 3), (2, 3)]
    yield ("where", "operands broadcast",
           lambda x, y: where(xp.asarray(chosen), x, y), [(3,), (2, 1)])
    yield ("where", "condition broadcast",
           lambda x, y: where(xp.asarray(chosen[0]), x, y), [(2, 3), (2, 3)])
    yield ("where", "condition a Tensor",
           lambda x, y: where(Tensor(xp.asarray(chosen)), x, y), [(2, 3), (2, 3)])
    yield "where", "a number", lambda x: where(xp.asarray(chosen), x, 7.0), [(2, 3)]
    yield "reshape", "one tuple", lambda x: x.reshape((6, 2)), [(3, 4)]
    yield "reshape", "several numbers, one unknown", lambda x: x.reshape(2, -1), [(3, 4)]
    yield "reshape", "to 0-d", lambda x: x.reshape(()), [(1, 1)]
    yield "reshape", "size 0", lambda x: x.reshape(0, 7), [(3, 0)]
    yield "reshape", "of a transposed matrix", lambda x: x.T.reshape(2, 6), [(3, 4)]
    yield "transpose", "all axes reversed", lambda x: x.T, [(2, 3, 4)]
    yield ("transpose", "a permutation that is not its own inverse",
           lambda x: x.transpose(1, 2, 0), [(2, 3, 4)])
    yield "transpose", "negative axes", lambda x: x.transpose(-1, 0, -2), [(2, 3, 4)]
    yield "swapaxes", "negative axes", lambda x: x.swapaxes(-1, 0), [(2, 3, 4)]
    for what, key in [("one row", 1), ("negative row", -1), ("slice", slice(1, 3)),
                      ("step", slice(None, None, 2)), ("backwards", slice(None, None, -1)),
                      ("column", (slice(None), 2)), ("one element", (1, 2)),
                      ("ellipsis and new axis", (Ellipsis, None, 0)), ("nothing", slice(0, 0)),
                      ("integers", [2, 0]), ("repeated integers", [1, 1, 2, 1]),
                      ("negative integers", [-1, 2]), ("pairs, repeated", ([0, 0, 2], [1, 1, 3])),
                      ("a column of integers", ([[0], [2]], [1, 3])),
                      ("integers beside a slice", (slice(1, None), [3, 0, 3]))]:
        yield "index", what, lambda x, key=key: x[to_device(key)], [(3, 4)]
    yield "index", "boolean mask", lambda x: x[xp.asarray(chosen)], [(2, 3)]
    yield "index", "integers in a Tensor", lambda x: x[Tensor(xp.asarray([0, 0, 1]))], [(2, 3)]
    join = a("concatenate")
    yield "concatenate", "first axis", lambda x, y: join([x, y]), [(2, 3), (1, 3)]
    yield ("concatenate", "last axis, three parts",
           lambda x, y, z: join([x, y, z], axis=-1), [(2, 3), (2, 1), (2, 2)])
    yield "concatenate", "with an empty part", lambda x, y: join([x, y], axis=1), [(2, 0), (2, 3)]
    yield "concatenate", "with itself", lambda x: join([x, x * 2, x], axis=0), [(2, 3)]
    yield ("concatenate", "with a constant",
           lambda x: join([xp.ones((2, 3), dtype=x.dtype), x], axis=0), [(2, 3)])
    yield "astype", "to the same dtype", lambda x: x.astype(x.dtype), [(3,)]

    yield "sum", "several axes as a tuple", lambda x: x.sum(axis=(0, -1)), [(2, 3, 4)]
    yield "mean", "several axes as a tuple", lambda x: x.mean(axis=(0, -1)), [(2, 3, 4)]
    yield "max", "several axes as a tuple", lambda x: x.max(axis=(0, -1)), [far_apart(2, 3, 4)]
    for name in ("sum", "mean", "max"):
        f = a(name)
        for what, options in [("everything", {}), ("everything, keepdims", {"keepdims": True}),
                              ("first axis", {"axis": 0}), ("last axis", {"axis": -1}),
                              ("last axis, keepdims", {"axis": -1, "keepdims": True}),
                              ("two axes, keepdims", {"axis": (1, 2), "keepdims": True})]:
            yield name, what, lambda x, f=f, options=options: f(x, **options), [far_apart(2, 3, 4)]
        yield name, "0-d", f, [()]
        yield name, "size-1 axis", lambda x, f=f: f(x, axis=1), [(2, 1)]
    yield "sum", "size 0", lambda x: x.sum(axis=0), [(0, 3)]
    yield "mean", "size 0 elsewhere", lambda x: x.mean(axis=1), [(0, 3)]
    yield "max", "size 0 elsewhere", lambda x: x.max(axis=1), [(0, 3)]

    matmul = a("matmul")
    for what, *shapes in [
            ("matrices", (3, 4), (4, 2)), ("vector and vector", (4,), (4,)),
            ("matrix and vector", (3, 4), (4,)), ("vector and matrix", (4,), (4, 2)),
            ("stack and matrix", (2, 3, 4), (4, 2)),
            ("two leading axes and matrix", (2, 3, 2, 4), (4, 2)),
            ("matrix and stack", (3, 4), (2, 4, 2)), ("stacks", (2, 3, 4), (2, 4, 2)),
            ("stacks, first broadcast", (1, 3, 4), (2, 4, 2)),
            ("stacks, second broadcast", (2, 3, 4), (1, 4, 2)),
            ("stacks, both broadcast", (3, 1, 2, 4), (2, 4, 2)),
            ("stack and vector", (2, 3, 4), (4,)), ("vector and stack", (4,), (2, 4, 3)),
            ("size-1 axes", (1, 1), (1, 1)), ("no rows", (0, 3), (3, 2)),
            ("no columns", (2, 3), (3, 0)), ("an empty sum", (2, 0), (0, 3)),
            ("stack and matrix, an empty sum", (2, 2, 0), (0, 3))]:
        yield "matmul", what, matmul, shapes
    linear = a("linear")
    for name in ("relu", "squared_relu"):
        for what, shape in [("rows", (3, 4)), ("batch of sequences", (2, 3, 4)),
                            ("no rows", (0, 4))]:
            yield ("activated", f"{name}, {what}",
                   lambda x, w, b, name=name: a("activated")(x, w, b, name), [shape, (4, 2), (2,)])
    yield "linear", "matrix", linear, [(3, 4), (4, 2), (2,)]
    yield "linear", "stack", linear, [(2, 3, 4), (4, 2), (2,)]
    yield "linear", "vector", linear, [(4,), (4, 2), (2,)]
    fold = a("fold")
    yield ("linear", "with a gain and bias folded in",
           lambda x, w, gain, bias: linear(x, *fold(gain, bias, w)), [(3, 4), (4, 2), (4,), (4,)])
    yield ("linear", "with a gain and bias folded in, no rows",
           lambda x, w, gain, bias: linear(x, *fold(gain, bias, w)), [(0, 4), (4, 2), (4,), (4,)])
    yield "linear", "a constant bias", lambda x, w: linear(x, w, 0.0), [(2, 3, 4), (4, 2)]
    yield ("linear", "constants before the rows, gain and bias folded in",
           lambda x, w, gain, bias: linear(
               x, *fold(gain, bias, w), before=xp.full((2, 5, 4), 0.7, dtype=x.dtype)),
           [(2, 3, 4), (4, 2), (4,), (4,)])
    yield "linear", "constants before the rows", lambda x, w, b: linear(
        x, w, b, before=xp.full((2, 1, 4), 0.7, dtype=x.dtype)), [(2, 3, 4), (4, 2), (2,)]
    for what, T, M in [("memory longer than the segment", 2, 3), ("no memory", 3, 0),
                       ("a single query", 1, 2)]:
        yield ("attend", what,
               lambda *inputs, T=T, M=M: txl.attend(*inputs, txl.hidden_keys(T, M)),
               [(2, T, 4), (2, M + T, 8), (M + T, 4), (2, 2), (2, 2)])
    yield "linear", "no rows", linear, [(0, 4), (4, 2), (2,)]
    yield "linear", "an empty sum", linear, [(2, 0), (0, 3), (3,)]
    yield "matmul", "square stacks", matmul, [(2, 3, 3), (2, 3, 3)]
    yield ("matmul", "a stack with a transposed one",
           lambda x, y: x @ y.swapaxes(-1, -2), [(2, 3, 4), (2, 5, 4)])
    yield "matmul", "a matrix with itself", lambda x: x @ x, [(3, 3)]
    yield "matmul", "a matrix with its transpose", lambda x: x @ x.T, [(3, 2)]
    yield "matmul", "an array on the left", lambda x: xp.ones((2, 3), dtype=x.dtype) @ x, [(3, 4)]

    ids = numpy.array([[2, 0, 2], [2, 1, 0]])
    yield ("embedding", "repeated ids",
           lambda table: a("embedding")(table, xp.asarray(ids)), [(4, 3)])
    yield ("embedding", "a large table",
           lambda table: a("embedding")(table, xp.asarray(ids)), [(600, 1)])
    yield "embedding", "one id", lambda table: a("embedding")(table, xp.asarray(1)), [(4, 3)]
    mask = numpy.array([[False, False, False, True], [False, True, False, True],
                        [True, True, True, True]])
    for what, options in [("no mask", {}), ("mask, one row hidden entirely", {"mask": mask}),
                          ("mask broadcast", {"mask": mask[1]})]:
        yield "softmax", what, lambda x, options=options: a("softmax")(
            x, **{name: to_device(value) for name, value in options.items()}), [(3, 4)]
    yield "softmax", "large numbers", lambda x: a("softmax")(x * 300), [(2, 3)]
    yield "softmax", "size-1 axis", a("softmax"), [(3, 1)]
    yield "softmax", "no rows", a("softmax"), [(0, 3)]
    yield "log_softmax", "rows", a("log_softmax"), [(3, 4)]
    yield "log_softmax", "batch of sequences", a("log_softmax"), [(2, 3, 4)]
    for shape in [(1, 1), (1, 4), (3, 3), (3, 5), (2, 2, 4, 6)]:
        yield "rel_shift", " x ".join(map(str, shape)), txl.rel_shift, [shape]
    yield "log_softmax", "large numbers", lambda x: a("log_softmax")(x * 1000), [(2, 3)]
    targets = numpy.array([[0, 3, 3], [1, 0, 2]])
    yield ("cross_entropy", "batch of sequences",
           lambda x: a("cross_entropy")(x, xp.asarray(targets)), [(2, 3, 4)])
    yield "cross_entropy", "rows", lambda x: a("cross_entropy")(x, xp.asarray(targets[0])), [(3, 4)]
    yield "cross_entropy", "one row", lambda x: a("cross_entropy")(x, xp.asarray(2)), [(4,)]
    yield ("cross_entropy", "weighted",
           lambda x, w: a("cross_entropy")(x, xp.asarray(targets[0])) * w, [(3, 4), ()])
    yield ("cross_entropy", "confidence penalty",
           lambda x: a("cross_entropy")(x, xp.asarray(targets), 0.3), [(2, 3, 4)])
    yield ("cross_entropy", "large logits",
           lambda x: a("cross_entropy")(x * 1000, xp.asarray(targets[0])), [(3, 4)])
    yield "normalise", "rows", a("normalise"), [(3, 4)]
    yield "normalise", "batch of sequences", a("normalise"), [(2, 3, 4)]
    yield "normalise", "one vector", a("normalise"), [(4,)]
    yield "normalise", "empty rows", a("normalise"), [(3, 0)]
    yield "log_softmax", "no rows", a("log_softmax"), [(0, 3)]
    yield "normalise", "no rows", a("normalise"), [(0, 4)]
    yield "layer_norm", "rows", a("layer_norm"), [(3, 4), (4,), (4,)]
    yield "layer_norm", "batch of sequences", a("layer_norm"), [(2, 3, 4), (4,), (4,)]
    yield "layer_norm", "one vector", a("layer_norm"), [(4,), (4,), (4,)]
    yield "layer_norm", "no rows", a("layer_norm"), [(0, 4), (4,), (4,)]
    yield "dropout", "half", lambda x: a("dropout")(x, 0.5, xp.random.default_rng(3)), [(4, 5)]
    yield "dropout", "not training", lambda x: a("dropout")(x, 0.5, None), [(4, 5)]
    yield "dropout", "never", lambda x: a("dropout")(x, 0.0, xp.random.default_rng(3)), [(4, 5)]


def to_device(key):
    """The integer lists and arrays in an index, as arrays of the current device."""
    if isinstance(key, tuple):
        return tuple(to_device(part) for part in key)
    return xp.asarray(key) if isinstance(key, (list, numpy.ndarray)) else key


CASES = list(cases())
every_case = pytest.mark.parametrize("f, inputs", [case[2:] for case in CASES],
                                     ids=[f"{name}: {what}" for name, what, *_ in CASES])


def values(inputs):
    """The NumPy arrays of a case: a shape becomes numbers of both signs between 0.3 and 1.5."""
    rng = numpy.random.default_rng(11)
    return [numpy.asarray(rng.uniform(0.3, 1.5, size=given) * rng.choice([-1, 1], size=given)
                          if isinstance(given, tuple) else given) for given in inputs]


def tensors(inputs, dtype=numpy.float64):
    return [Tensor(xp.array(value, dtype=dtype), requires_grad=True) for value in values(inputs)]


@every_case
def test_operation(f, inputs):
    check_gradients(f, tensors(inputs))


@every_case
def test_operation_on_strided_memory(f, inputs):
    """The same where the inputs are views: transposed, with gaps between the elements."""
    def strided(value):
        gaps = xp.zeros([2 * n for n in reversed(value.shape)])
        view = gaps[(slice(None, None, 2),) * value.ndim + (Ellipsis,)].transpose()
        view[...] = xp.asarray(value)
        return view
    inputs = values(inputs)
    plain = f(*tensors(inputs))
    views = [Tensor(strided(value), requires_grad=True) for value in inputs]
    numpy.testing.assert_allclose(f(*views).numpy(), plain.numpy(), rtol=1e-12, atol=1e-14)
    check_gradients(f, views)


@every_case
def test_operation_in_float32(f, inputs):
    """Value and gradients stay float32 and agree with float64 to float32's accuracy."""
    results = []
    for dtype in (numpy.float64, numpy.float32):
        operands = tensors(inputs, dtype)
        y = f(*operands)
        y.backward(xp.ones_like(y.data))
        assert y.dtype == dtype
        assert all(x.grad.dtype == dtype and x.grad.shape == x.shape for x in operands)
        results.append([y.numpy()] + [to_numpy(x.grad) for x in operands])
    for double, single in zip(*results):
        numpy.testing.assert_allclose(single, double, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("f, inputs", [case[2:] for case in CASES if len(case[3]) > 1],
                         ids=[f"{name}: {what}" for name, what, _, inputs in CASES
                              if len(inputs) > 1])
def test_operation_with_a_constant_operand(f, inputs):
    """Without requires_grad an operand gets no gradient, and the others get the same as before."""
    operands = tensors(inputs)
    y = f(*operands)
    y.backward(xp.ones_like(y.data))
    expected = [to_numpy(x.grad) for x in operands]
    for constant in range(len(operands)):
        operands = tensors(inputs)
        operands[constant].requires_grad = False
        y = f(*operands)
        y.backward(xp.ones_like(y.data))
        for i, x in enumerate(operands):
            if i == constant:
                assert x.grad is None
            else:
                numpy.testing.assert_array_equal(to_numpy(x.grad), expected[i])


def test_every_operation_of_the_engine_has_a_case():
    assert {case[0] for case in CASES} == set(backend.OPS)


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_astype_brings_the_gradient_back_in_the_operands_dtype(dtype):
    x = Tensor(xp.asarray([1.0, 2.0], dtype=dtype), requires_grad=True)
    for other in (numpy.float32, numpy.float64):
        x.grad = None
        y = x.astype(other)
        (y * y).sum().backward()
        assert y.dtype == other and x.grad.dtype == dtype
        numpy.testing.assert_allclose(to_numpy(x.grad), [2.0, 4.0])


def test_elements_that_tie_for_the_maximum_share_its_gradient():
    """A kink, where no finite difference exists: each of the n largest gets 1/n."""
    x = Tensor(xp.asarray([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]]), requires_grad=True)
    x.max(axis=1).sum().backward()
    assert to_numpy(x.grad).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5]]


# %% The faster forms, against the plain operations that they equal

def same_values_and_gradients(fast, plain, *shapes):
    rng, answers = numpy.random.default_rng(3), []
    inputs = [rng.normal(size=shape) for shape in shapes]
    for f in (fast, plain):
        operands = [Tensor(xp.asarray(value), requires_grad=True) for value in inputs]
        y = f(*operands)
        y.backward(xp.asarray(numpy.random.default_rng(4).normal(size=y.shape)))
        answers.append([y.numpy()] + [to_numpy(x.grad) for x in operands])
    for ours, expected in zip(*answers):
        numpy.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_linear_is_a_product_and_a_sum():
    same_values_and_gradients(autograd.linear, lambda x, w, b: x @ w + b, (2, 3, 4), (4, 5), (5,))


def test_linear_with_rows_before_is_that_of_both_joined():
    before = xp.asarray(numpy.random.default_rng(5).normal(size=(2, 6, 4)))
    same_values_and_gradients(
        lambda x, w, b: autograd.linear(x, w, b, before=before),
        lambda x, w, b: autograd.concatenate([before, x], axis=1) @ w + b, (2, 3, 4), (4, 5), (5,))


@pytest.mark.parametrize("name", ["relu", "squared_relu"])
def test_an_activated_product_is_the_activation_of_the_product(name):
    same_values_and_gradients(lambda x, w, b: a("activated")(x, w, b, name),
                              lambda x, w, b: a(name)(x @ w + b), (2, 3, 4), (4, 5), (5,))


def test_a_folded_gain_and_bias_are_those_of_the_rows():
    same_values_and_gradients(
        lambda z, gain, bias, w: autograd.linear(z, *autograd.fold(gain, bias, w)),
        lambda z, gain, bias, w: (z * gain + bias) @ w, (2, 3, 4), (4,), (4,), (4, 5))


@pytest.mark.parametrize("rows", [4, 600])
def test_an_embedding_is_an_index(rows):
    ids = xp.asarray([[2, 0, 2], [2, 1, 0]])
    same_values_and_gradients(lambda table: autograd.embedding(table, ids),
                              lambda table: table[ids], (rows, 3))


# %% The check itself

def broken_square(x):
    """x * x with a gradient of x instead of 2 x."""
    return autograd.result(x.data * x.data, (x, lambda g: g * x.data))


def test_check_gradients_names_the_worst_element_and_both_values():
    x = Tensor([[0.1, 0.2], [3.0, 0.4]], requires_grad=True)
    message = r"d\(input 0\)\[1, 0\]: backward\(\) says .*, finite differences say"
    with pytest.raises(GradientError, match=message):
        check_gradients(broken_square, [x])


def test_check_gradients_uses_the_names_of_a_dict():
    x = Tensor([1.0], requires_grad=True)
    with pytest.raises(GradientError, match=r"layer\.W"):
        check_gradients(broken_square, {"layer.W": x})


def test_check_gradients_notices_errors_that_cancel_in_a_sum():
    x = Tensor([1.0, 2.0], requires_grad=True)
    def swapped(x):
        return autograd.result(x.data * 1.0, (x, lambda g: g[::-1]))
    with pytest.raises(GradientError):
        check_gradients(swapped, [x])


def test_check_gradients_notices_nan_and_a_missing_gradient():
    x = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(GradientError, match="nan"):
        check_gradients(lambda x: autograd.result(x.data * 1.0, (x, lambda g: g * numpy.nan)), [x])
    with pytest.raises(GradientError, match="says 0,"):
        check_gradients(lambda x, y: x.detach() * y, [x, Tensor([1.0, 1.0], requires_grad=True)])


def test_check_gradients_leaves_the_inputs_as_they_were():
    x = Tensor([0.1, 0.7], requires_grad=True)
    check_gradients(lambda x: x * x, [x])
    numpy.testing.assert_array_equal(x.numpy(), [0.1, 0.7])


def test_check_gradients_refuses_float32_and_constants():
    with pytest.raises(TypeError, match="float64"):
        check_gradients(lambda x: x, [Tensor(xp.ones(2, dtype=xp.float32), requires_grad=True)])
    with pytest.raises(TypeError, match="requires_grad"):
        check_gradients(lambda x: x, [Tensor(xp.ones(2))])


# %% The paper: attention, layer, model, loss
# Every combination of what changes the computation; memory empty, shorter than, as long as and
# longer than the segment.
SEGMENT = 3
VARIANTS = [pytest.param(dict(positions=positions, pre_norm=pre_norm, tie_weights=tie_weights,
                              clamp_len=clamp_len, same_length=same_length), memory,
                         id=f"{positions}, {'pre' if pre_norm else 'post'}-norm, "
                            f"{'tied' if tie_weights else 'untied'}, clamp_len {clamp_len}, "
                            f"{'same length' if same_length else 'causal'}, memory {memory}")
            for positions, pre_norm, tie_weights, clamp_len, same_length, memory
            in itertools.product(["sinusoid", "learned"], [True, False], [False, True],
                                 [None, 2, 8], [False, True], [0, 2, 3, 5])
            # 8 clamps nothing: learned's way of saying None
            if clamp_len != (None if positions == "learned" else 8)]


def model_of(options, memory_len, seed=0, n_layer=2):
    """A small float64 model whose parameters are all away from their initial zeros and ones,
    with tokens and memory."""
    rng = numpy.random.default_rng(seed)
    config = txl.Config(vocab_size=5, n_layer=n_layer, n_head=2, d_model=4, d_ff=6,
                        mem_len=memory_len, **options)
    model = txl.TransformerXL(config, seed=seed, dtype=numpy.float64)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.3)
    tokens = xp.asarray(rng.integers(5, size=(2, SEGMENT + 1)))
    memory = [xp.asarray(rng.normal(size=(2, memory_len, 4))) for _ in range(n_layer)]
    return model, tokens, memory


@pytest.mark.parametrize("options, memory_len", VARIANTS)
def test_model_and_loss(options, memory_len):
    model, tokens, memory = model_of(options, memory_len)
    check_gradients(lambda *_: txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], memory)[0],
                    model.parameters(), samples=2)


@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation", ["relu", "squared_relu"])
def test_every_element_of_every_parameter(activation, pre_norm, positions):
    options = dict(positions=positions, pre_norm=pre_norm, activation=activation, clamp_len=4)
    model, tokens, memory = model_of(options, 3)
    check_gradients(lambda *_: txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], memory)[0],
                    model.parameters())


@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
def test_model_with_dropout(positions):
    options = dict(positions=positions, clamp_len=4, dropout=0.3, attn_dropout=0.2)
    model, tokens, memory = model_of(options, 2)
    check_gradients(lambda *_: txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], memory,
                                                   xp.random.default_rng(7))[0],
                    model.parameters(), samples=6)


def layer_inputs(model, memory_len):
    rng = numpy.random.default_rng(3)
    x = Tensor(xp.asarray(rng.normal(size=(2, SEGMENT, 4))), requires_grad=True)
    memory = Tensor(xp.asarray(rng.normal(size=(2, memory_len, 4))))
    positions = txl.relative_positions(model.config, SEGMENT, memory_len, numpy.float64)
    return x, memory, positions, txl.hidden_keys(SEGMENT, memory_len)


@pytest.mark.parametrize("memory_len", [0, 2, 5])
@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
@pytest.mark.parametrize("part", [
    "attention", "layer, pre-norm", "layer, post-norm", "feed-forward"])
def test_part_of_the_model(part, positions, memory_len):
    """Gradients of the parameters and of the segment, all elements."""
    model, _, _ = model_of(dict(positions=positions, clamp_len=7, pre_norm="pre" in part),
                           memory_len, n_layer=1)
    x, memory, where, mask = layer_inputs(model, memory_len)
    layer = model.layers[0]
    module = (layer.attention if part == "attention" else
              layer.feed_forward if part == "feed-forward" else layer)
    arguments = (x,) if part == "feed-forward" else (x, memory, where, mask)
    check_gradients(lambda *_: module(*arguments), {"x": x, **dict(txl.named_tensors(module))})
