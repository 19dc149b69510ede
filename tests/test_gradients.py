"""Every gradient of autograd.py, fast.py and txl.py against finite differences, in float64.

Run it with -v: the names of the tests are a table of contents of the operations.
"""
import itertools

import numpy
import pytest

import autograd
import fast
import txl
from autograd import OPS, GradientError, Tensor, check_gradients, to_numpy, xp

# %% The operations
# A case is an operation, what is special about it, a function of its inputs and the inputs. An
# input is a shape, filled with random numbers away from zero (kinks and poles are at zero), or
# a NumPy array.


def positive(*shape):
    return numpy.random.default_rng(len(shape)).uniform(0.5, 2.0, size=shape)


def to_device(key):
    """The integer lists and arrays in an index, as arrays of the current device."""
    if isinstance(key, tuple):
        return tuple(map(to_device, key))
    if isinstance(key, Tensor):
        return Tensor(to_device(key.numpy()))
    return xp.asarray(key) if isinstance(key, (list, numpy.ndarray)) else key


def constant(x, *shape):
    """An array of x's dtype, for operations of a Tensor and an array."""
    return xp.full(shape, 0.7, dtype=x.dtype)


def elementwise():
    for name in ("add", "subtract", "multiply", "divide"):
        f, whole = OPS[name], positive(3, 4)
        for what, *inputs in [
                ("equal shapes", (3, 4), whole), ("first over rows", (4,), whole),
                ("first over columns", (3, 1), whole), ("first 0-d", (), whole),
                ("second over rows", (3, 4), positive(4)),
                ("second over columns", (3, 4), positive(3, 1)),
                ("second 0-d", (3, 4), positive()), ("both", (3, 1, 2), positive(4, 1)),
                ("size-1 axes that stay", (1, 1), positive(1)), ("size 0", (0, 3), positive(3))]:
            yield name, what, f, *inputs
        yield name, "the same tensor twice", lambda x, f=f: f(x, x), positive(3)
        yield name, "a number on the right", lambda x, f=f: f(x, 2.5), (3,)
        yield name, "a number on the left", lambda x, f=f: f(2.5, x), positive(3)
        yield name, "integers beside", lambda x, f=f: f(x, xp.asarray([1, 2, 3])), (2, 3)
    for what, b, a in [
            ("whole", 3, (3, 4)), ("of negative numbers", 2, -positive(3)),
            ("0-d", 0.5, positive()), ("negative", -1.5, positive(3)), ("size 0", 3, (0, 2)),
            *((f"{b} of 0", b, numpy.zeros(2)) for b in (0, 1, 2))]:
        yield "power", what, lambda x, b=b: x ** b, a
    for name in ("negative", "exp", "tanh", "sigmoid", "relu", "squared_relu", "log", "sqrt"):
        for shape in ((3, 4), (), (0, 2), (1, 3, 1)):
            a = positive(*shape) if name in ("log", "sqrt") else shape
            yield name, str(shape), OPS[name], a


def selection():
    chosen = numpy.array([[True, False, True], [False, True, True]])
    for what, condition, *inputs in [
            ("equal shapes", chosen, (2, 3), (2, 3)), ("operands broadcast", chosen, (3,), (2, 1)),
            ("condition broadcast", chosen[0], (2, 3), (2, 3)),
            ("condition a Tensor", Tensor(chosen), (2, 3), (2, 3))]:
        yield ("where", what, lambda x, y, condition=condition: OPS["where"](
            to_device(condition), x, y), *inputs)
    yield "where", "a number", lambda x: OPS["where"](xp.asarray(chosen), x, 7.0), (2, 3)
    yield "reshape", "one tuple", lambda x: x.reshape((6, 2)), (3, 4)
    yield "reshape", "several numbers, one unknown", lambda x: x.reshape(2, -1), (3, 4)
    yield "reshape", "to 0-d", lambda x: x.reshape(()), (1, 1)
    yield "reshape", "size 0", lambda x: x.reshape(0, 7), (3, 0)
    yield "reshape", "of a transposed matrix", lambda x: x.T.reshape(2, 6), (3, 4)
    yield "transpose", "all axes reversed", lambda x: x.T, (2, 3, 4)
    yield "transpose", "not its own inverse", lambda x: x.transpose(1, 2, 0), (2, 3, 4)
    yield "transpose", "negative axes", lambda x: x.transpose(-1, 0, -2), (2, 3, 4)
    yield "swapaxes", "negative axes", lambda x: x.swapaxes(-1, 0), (2, 3, 4)
    for what, key in [("one row", 1), ("negative row", -1), ("slice", slice(1, 3)),
                      ("step", slice(None, None, 2)), ("backwards", slice(None, None, -1)),
                      ("column", (slice(None), 2)), ("one element", (1, 2)),
                      ("ellipsis and new axis", (Ellipsis, None, 0)), ("nothing", slice(0, 0)),
                      ("integers", [2, 0]), ("repeated integers", [1, 1, 2, 1]),
                      ("negative integers", [-1, 2]), ("pairs, repeated", ([0, 0, 2], [1, 1, 3])),
                      ("a column of integers", ([[0], [2]], [1, 3])),
                      ("integers beside a slice", (slice(1, None), [3, 0, 3]))]:
        yield "getitem", what, lambda x, key=key: x[to_device(key)], (3, 4)
    yield "getitem", "boolean mask", lambda x: x[xp.asarray(chosen)], (2, 3)
    yield "getitem", "integers in a Tensor", lambda x: x[Tensor(xp.asarray([0, 0, 1]))], (2, 3)
    join = OPS["concatenate"]
    yield "concatenate", "first axis", lambda x, y: join([x, y]), (2, 3), (1, 3)
    yield "concatenate", "last axis", lambda *xs: join(xs, axis=-1), (2, 3), (2, 1), (2, 2)
    yield "concatenate", "with an empty part", lambda x, y: join([x, y], axis=1), (2, 0), (2, 3)
    yield "concatenate", "with itself", lambda x: join([x, x * 2, x], axis=0), (2, 3)
    yield "concatenate", "with a constant", lambda x: join([constant(x, 2, 3), x]), (2, 3)
    yield "astype", "to the same dtype", lambda x: x.astype(x.dtype), (3,)


def reductions():
    for name in ("sum", "mean", "max"):
        f = OPS[name]
        for options in ({}, {"keepdims": True}, {"axis": 0}, {"axis": -1}, {"axis": (0, -1)},
                        {"axis": -1, "keepdims": True}, {"axis": (1, 2), "keepdims": True}):
            yield name, str(options), lambda x, f=f, o=options: f(x, **o), positive(2, 3, 4)
        yield name, "0-d", f, ()
        yield name, "size-1 axis", lambda x, f=f: f(x, axis=1), (2, 1)
        yield name, "no rows", lambda x, f=f: f(x, axis=1), (0, 3)
    yield "sum", "of nothing", lambda x: x.sum(axis=0), (0, 3)


def products():
    for shapes in [
            ((3, 4), (4, 2)), ((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 2)), ((2, 3, 4), (4, 2)),
            ((2, 3, 2, 4), (4, 2)), ((3, 4), (2, 4, 2)), ((2, 3, 4), (2, 4, 2)),
            ((1, 3, 4), (2, 4, 2)), ((2, 3, 4), (1, 4, 2)), ((3, 1, 2, 4), (2, 4, 2)),
            ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((1, 1), (1, 1)), ((2, 3, 3), (2, 3, 3)),
            ((0, 3), (3, 2)), ((2, 3), (3, 0)), ((2, 0), (0, 3)), ((2, 2, 0), (0, 3))]:
        yield "matmul", str(shapes), OPS["matmul"], *shapes
    yield "matmul", "transposed stack", lambda x, y: x @ y.swapaxes(1, 2), (2, 3, 4), (2, 5, 4)
    yield "matmul", "a matrix with itself", lambda x: x @ x, (3, 3)
    yield "matmul", "a matrix with its transpose", lambda x: x @ x.T, (3, 2)
    yield "matmul", "an array on the left", lambda x: constant(x, 2, 3) @ x, (3, 4)
    for rows in [(3, 4), (2, 3, 4), (4,), (0, 4), (2, 0)]:
        weight = (rows[-1], 2)
        yield "linear", str(rows), fast.linear, rows, weight, (2,)
        for name in ("relu", "squared_relu"):
            yield ("linear_relu", f"{name} {rows}",
                   lambda *inputs, name=name: fast.linear_relu(*inputs, name), rows, weight, (2,))
    yield "linear", "constant bias", lambda x, w: fast.linear(x, w, 0.0), (2, 3, 4), (4, 2)
    yield ("linear", "rows before", lambda x, w, b: fast.linear(
        x, w, b, before=constant(x, 2, 5, 4)), (2, 3, 4), (4, 2), (2,))
    for T, M in [(2, 3), (3, 0), (1, 2)]:
        yield ("fused_attention", f"{T} queries, memory {M}",
               lambda *inputs, T=T, M=M: fast.fused_attention(*inputs, txl.attention_mask(T, M)),
               (2, T, 4), (2, M + T, 8), (M + T, 4), (2, 2), (2, 2))


def model_operations():
    ids, targets = numpy.array([[2, 0, 2], [2, 1, 0]]), numpy.array([[0, 3, 3], [1, 0, 2]])
    for what, n in [("repeated ids", ids), ("one id", 1)]:
        yield "embedding", what, lambda x, n=n: OPS["embedding"](x, n), (4, 3)
    mask = numpy.array([[False, False, False, True], [False, True, False, True],
                        [True, True, True, True]])
    for what, hidden in [("mask, one row hidden entirely", mask), ("mask broadcast", mask[1])]:
        yield "softmax", what, lambda x, m=hidden: OPS["softmax"](x, to_device(m)), (3, 4)
    for name in ("softmax", "log_softmax", "layer_norm"):
        for shape in [(3, 4), (2, 3, 4), (4,), (0, 3)]:
            yield name, str(shape), OPS[name], shape
        yield name, "large numbers", lambda x, f=OPS[name]: f(x * 1000), (2, 3)
    yield "layer_norm", "empty rows", OPS["layer_norm"], (3, 0)
    for shape in [(3, 4), (2, 3, 4), (4,), (0, 4)]:
        yield "layer_norm", f"gain and bias, {shape}", OPS["layer_norm"], shape, (4,), (4,)
    loss = OPS["cross_entropy"]
    yield "cross_entropy", "batch of sequences", lambda x: loss(x, targets), (2, 3, 4)
    yield "cross_entropy", "one row", lambda x: loss(x, 2), (4,)
    yield "cross_entropy", "weighted", lambda x, w: loss(x, targets[0]) * w, (3, 4), ()
    yield "cross_entropy", "confidence penalty", lambda x: loss(x, targets, 0.3), (2, 3, 4)
    yield "cross_entropy", "large logits", lambda x: loss(x * 1000, targets[0]), (3, 4)
    for p, seed in [(0.5, 3), (0.5, None), (0.0, 3)]:
        yield ("dropout", f"{p} {seed}", lambda x, p=p, seed=seed: OPS["dropout"](
            x, p, None if seed is None else xp.random.default_rng(seed)), (4, 5))


def each(cases):
    return pytest.mark.parametrize("f, inputs", [(f, inputs) for _, _, f, *inputs in cases],
                                   ids=[f"{name}: {what}" for name, what, *_ in cases])


CASES = [*elementwise(), *selection(), *reductions(), *products(), *model_operations()]


def tensors(inputs, dtype=numpy.float64):
    """A shape becomes numbers of both signs between 0.3 and 1.5."""
    rng = numpy.random.default_rng(11)
    values = [rng.uniform(0.3, 1.5, size=given) * rng.choice([-1, 1], size=given)
              if isinstance(given, tuple) else given for given in inputs]
    return [Tensor(xp.array(value, dtype=dtype), requires_grad=True) for value in values]


def answers(f, operands):
    """The value, and the gradient of each operand."""
    y = f(*operands)
    y.backward(xp.asarray(numpy.random.default_rng(7).normal(size=y.shape)))
    assert all(x.dtype == y.dtype for x in operands)
    return [y.numpy()] + [None if x.grad is None else to_numpy(x.grad) for x in operands]


@each(CASES)
def test_operation(f, inputs):
    check_gradients(f, tensors(inputs))


@each(CASES)
def test_operation_on_strided_memory(f, inputs):
    """The same where the inputs are views: transposed, with gaps between the elements."""
    def strided(x):
        gaps = xp.zeros([2 * n for n in reversed(x.shape)])
        view = gaps[(slice(None, None, 2),) * x.ndim + (Ellipsis,)].transpose()
        view[...] = x.data
        return Tensor(view, requires_grad=True)
    views = [strided(x) for x in tensors(inputs)]
    for ours, expected in zip(answers(f, views), answers(f, tensors(inputs))):
        numpy.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-13)


@each(CASES)
def test_operation_in_float32(f, inputs):
    """Value and gradients stay float32 and agree with float64 to float32's accuracy."""
    single, double = (answers(f, tensors(inputs, dtype)) for dtype in ("float32", "float64"))
    for ours, expected in zip(single, double):
        assert ours.dtype == numpy.float32 and ours.shape == expected.shape
        numpy.testing.assert_allclose(ours, expected, rtol=2e-4, atol=5e-5)


@each([case for case in CASES if len(case) > 4])
def test_operation_with_a_constant_operand(f, inputs):
    """Without requires_grad an operand gets no gradient, and the others get the same as before."""
    for i in range(len(inputs)):
        operands, expected = tensors(inputs), answers(f, tensors(inputs))
        operands[i].requires_grad, expected[1 + i] = False, None
        for ours, theirs in zip(answers(f, operands), expected):
            numpy.testing.assert_array_equal(ours, theirs)


def test_every_operation_has_a_case():
    assert {name for name, *_ in CASES} == set(autograd.OPS)


def test_astype_brings_the_gradient_back_in_the_operands_dtype():
    for dtype, other in itertools.product([numpy.float32, numpy.float64], repeat=2):
        x = Tensor(xp.asarray([1.0, 2.0], dtype=dtype), requires_grad=True)
        y = x.astype(other)
        (y * y).sum().backward()
        assert y.dtype == other and x.grad.dtype == dtype
        numpy.testing.assert_allclose(to_numpy(x.grad), [2.0, 4.0])


def test_elements_that_tie_for_the_maximum_share_its_gradient():
    """A kink, where no finite difference exists: each of the n largest gets 1/n."""
    x = Tensor(xp.asarray([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]]), requires_grad=True)
    x.max(axis=1).sum().backward()
    assert to_numpy(x.grad).tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5]]


# %% The check itself

@pytest.mark.parametrize("vjp, said", [
    (lambda g, x: g * x, r"\[1, 0\]: backward\(\) says .*, finite differences say .*"),
    (lambda g, x: (g * 2 * x)[::-1], r"\[., 0\]: backward"),       # alike in a sum over x
    (lambda g, x: g * numpy.nan, "says nan"), (lambda g, x: g * 0, r"\[1, 0\].* says 0,")])
def test_check_gradients_names_the_worst_element_and_both_values(vjp, said):
    """Of x^2, whose gradient is g * 2 x. The numbers stay as they are."""
    x = Tensor([[0.1, 0.2], [3.0, 0.4]], requires_grad=True)
    x.grad = xp.ones((2, 2))                                # is forgotten
    with pytest.raises(GradientError, match=rf"check_gradients: d/d\(layer.W\).*{said}"):
        check_gradients(lambda x: autograd.record(x.data * x.data, (x, lambda g: vjp(g, x.data))),
                        {"layer.W": x})
    assert x.numpy().tolist() == [[0.1, 0.2], [3.0, 0.4]]


def test_check_gradients_refuses_float32_and_constants():
    for x in (Tensor(xp.ones(2, dtype=xp.float32), requires_grad=True), Tensor(xp.ones(2))):
        with pytest.raises(TypeError, match="input 0 must be float64 with requires_grad"):
            check_gradients(lambda x: x, [x])


# %% The model

def check_model(options, memory_len, samples, seed=None):
    """All parameters are away from their initial zeros and ones. seed: that of dropout."""
    rng = numpy.random.default_rng(0)
    config = txl.Config(vocab_size=5, n_layer=2, n_head=2, d_model=4, d_ff=6,
                        mem_len=memory_len, **options)
    model = txl.TransformerXL(config, dtype=numpy.float64)
    for parameter in model.parameters().values():
        parameter.data += xp.asarray(rng.normal(size=parameter.shape) * 0.3)
    tokens = xp.asarray(rng.integers(5, size=(2, 4)))
    memory = [xp.asarray(rng.normal(size=(2, memory_len, 4))) for _ in range(2)]

    def loss(*_):
        generator = None if seed is None else xp.random.default_rng(seed)
        return txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], memory, generator)[0]
    check_gradients(loss, model.parameters(), samples=samples)


@pytest.mark.parametrize("memory_len", [0, 2, 5])
@pytest.mark.parametrize("positions, clamp_len", [
    ("sinusoid", None), ("sinusoid", 2), ("learned", 2), ("learned", 8)])
def test_model_and_loss(positions, clamp_len, memory_len):
    """With a memory shorter and longer than the segment of 3, and with none."""
    for pre_norm, tie_weights, same_length in itertools.product([False, True], repeat=3):
        check_model(dict(positions=positions, clamp_len=clamp_len, pre_norm=pre_norm,
                         tie_weights=tie_weights, same_length=same_length), memory_len, 1)


@pytest.mark.parametrize("positions", ["sinusoid", "learned"])
@pytest.mark.parametrize("options, samples, seed", [
    (dict(pre_norm=True, activation="squared_relu"), None, None),
    (dict(pre_norm=False, activation="relu"), None, None),
    (dict(dropout=0.3, attn_dropout=0.2), 6, 7)])
def test_every_element_of_every_parameter_and_some_with_dropout(
        options, samples, seed, positions):
    check_model(dict(options, positions=positions, clamp_len=4), 3, samples, seed)
