# %% autograd: reverse-mode automatic differentiation over NumPy or CuPy
"""A reverse-mode autograd in one file.

Training needs the gradient of one number, the loss, with respect to a million parameters.
The chain rule can be multiplied out from either end. Forward mode needs one pass for each
parameter. Reverse mode starts at the loss and needs one pass in all, which takes about twice
as long as computing the loss. Its price is memory: what gradients need is kept until then.

    1. one gradient      Tensor, an operation, and backward() on a single product
    2. the graph         how backward() finds its way, and where it stops
    3. the operations    value and gradient side by side, in the order of difficulty
    4. the notation      NumPy's operators and methods on Tensor
    5. the proof         check_gradients: every gradient against finite differences
    6. faster            forms of operations that save time
    7. a walk through    what `python autograd.py` prints

From backend.py: `xp` is NumPy or CuPy. `@op` registers an operation for the tests, and makes
its errors name it. What is marked `@gpu_form` a GPU computes in one pass. row_sums(x) is
x.sum(axis=-1, keepdims=True), row_dots(x, y) is row_sums(x * y).
"""
import builtins
import contextlib
import functools
import heapq
import itertools
import math
import threading

import numpy

from backend import (OPS, activate, activation_gradient, drop, first_gradient, gpu_form, jointly,
                     leading_sums, numeric_array, op, row_dots, row_sums, same_dtype, to_numpy,
                     use_device, within, xp)


# %% 1. One gradient
# Let y = f(x) be one step on the way to the loss L. dL/dy is an array of y's shape. It says
# how much L grows when an element of y grows by a little. The chain rule carries it back to
# x:
#
#     y = f(x)          dL/dx = dL/dy dy/dx
#
# In this file g stands for dL/dy. An operation computes y. Beside it stands, for each
# operand x, its *gradient function*: it takes g and returns dL/dx. Example: y = x w. The
# gradient function of x returns g w, that of w returns g x.

class Tensor:
    """An array that knows how it was computed.

    data            an array of the current device's library; lists and numbers become one
    requires_grad   True for a parameter, and for what is computed from one
    grad            None at first; L.backward() adds dL/d(data) to that of a parameter
    """

    __slots__ = ("data", "grad", "requires_grad", "_node", "__weakref__")

    def __init__(self, data, requires_grad=False):
        self.data = numeric_array(data, requires_grad)
        self.requires_grad, self.grad = requires_grad, None
        self._node = None               # its place in the graph, if an operation made it

    def backward(self, gradient=None):
        """Add dL/dp to p.grad, for every parameter p that this Tensor was computed from.

        gradient   dL/d(this Tensor); not needed where this Tensor is L

        >>> w, x = Tensor([3.0], requires_grad=True), Tensor([4.0])
        >>> multiply(w, x).backward()
        >>> w.grad.tolist()                     # d(w x)/dw = x
        [4.0]
        """
        for leaf, g in leaf_gradients(self, gradient):      # the walk of section 2
            leaf.grad = xp.array(g) if leaf.grad is None else xp.asarray(leaf.grad + g)


@op
def multiply(a, b):
    """a b, element by element."""
    x, w = arrays(a, b)                 # the operands' arrays, of one dtype
    return result(x * w, (a, lambda g: g * w), (b, lambda g: g * x))


# %% 2. The graph
# The result of an operation gets a node, if any operand needs a gradient. The node lists
# pairs: the node of such an operand, and the gradient function that carries g back to it.
# Each pair is an edge. A parameter has no node. It is a leaf, and stands in the pair itself.
#
#     x ──┐
#         ├─ multiply ── y ── sum ── L       L.backward() walks the edges, right to left
#     w ──┘
#
# A value that is used twice influences L along two paths. The chain rule for several
# paths is a sum, so gradients add where paths meet.
#
# A node does not hold its result's array. A gradient function holds the arrays that it needs,
# not copies. Any other array is freed as soon as the program forgets its Tensor. Do not change
# an array in place before backward(), or the gradients are wrong.

class _State(threading.local):
    recording = True                    # each thread has its own; no_grad() sets it


_state, _serial = _State(), itertools.count()


class _Node:
    """The place of an operation's result in the graph."""

    __slots__ = ("edges", "number", "shape")

    def __init__(self, edges, shape):
        self.edges = edges              # ((a node or a leaf, gradient function), …)
        self.number = next(_serial)     # operands come first: their numbers are lower
        self.shape = shape


def result(data, *edges):
    """The Tensor of an operation's value. `edges` are pairs (operand, gradient function).

    An edge to an operand that needs no gradient is dropped, with the arrays that only it
    needed.
    """
    tensor = Tensor.__new__(Tensor)     # without the checks of __init__
    tensor.data = data if data.ndim else xp.asarray(data)
    tensor.grad, kept = None, ()
    if _state.recording:
        kept = tuple([(x._node or x, gradient_function) for x, gradient_function in edges
                      if isinstance(x, Tensor) and x.requires_grad])
    tensor.requires_grad = bool(kept)
    tensor._node = _Node(kept, tensor.data.shape) if kept else None
    return tensor


def leaf_gradients(root, gradient=None):
    """The backward pass: [(leaf, its gradient), …] for every leaf that requires a gradient.

    It visits the youngest of the nodes reached, again and again. Then g is complete. For suppose
    that node n is visited while m, which still has to pass a gradient to n, is not. Follow a path
    from `root` to m. Visiting a node reaches the next one. So the first unvisited node on the
    path has been reached. It is m or younger than m, and so younger than n. It would have been
    visited before n.

    There is no recursion, which in Python ends at a depth of a thousand.
    """
    gradients = {root._node or root: first_gradient(root, gradient)}        # dL/dL = 1
    reached = [(-root._node.number, root._node)] if root._node else []      # youngest first
    while reached:
        _, node = heapq.heappop(reached)
        g = gradients.pop(node)
        if node.edges is None:
            raise RuntimeError("backward: this graph was released by an earlier "
                               "backward(); compute the value again")
        for operand, gradient_function in node.edges:
            part = unbroadcast(gradient_function(g), operand.shape)
            if operand not in gradients:
                gradients[operand] = part
                if isinstance(operand, _Node):
                    heapq.heappush(reached, (-operand.number, operand))
            else:                       # not +=: another operand may have the same array
                gradients[operand] = gradients[operand] + part
        node.edges = None               # released: frees what the gradient functions held
    return list(gradients.items())      # nodes were popped, the leaves are left


def unbroadcast(g, shape):
    """Sum g over the axes along which broadcasting repeated an operand of `shape`.

    Broadcasting uses one element several times, and its gradient is the sum over all
    uses. [2, 3] + [3] adds the same vector to both rows. So the vector's gradient is g
    summed over the rows.

    >>> unbroadcast(numpy.array([[1, 2, 3], [10, 20, 30]]), (3,)).tolist()
    [11, 22, 33]
    """
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)           # axes that the operand does not have
    repeated = tuple(axis for axis in range(g.ndim)
                     if axis < new or shape[axis - new] != g.shape[axis])
    if repeated == tuple(range(new)):
        return leading_sums(g, new)     # the same, faster
    return g.sum(axis=repeated).reshape(shape)


def stop_gradient(x):
    """SG(x) of Transformer-XL (Dai et al. 2019, section 3.2): x as a constant.

    >>> x = Tensor([3.0], requires_grad=True)
    >>> multiply(x, stop_gradient(x)).backward()        # as if it were 3 x
    >>> x.grad.tolist()
    [3.0]
    """
    return Tensor(value_of(x))


@contextlib.contextmanager
def no_grad():
    """Inside `with no_grad():` operations compute values only, and keep nothing."""
    before, _state.recording = _state.recording, False
    try:
        yield
    finally:
        _state.recording = before


# %% 3. The operations
def value_of(operand):
    return operand.data if isinstance(operand, Tensor) else operand


def arrays(*operands):
    """The operands' arrays, with one dtype: float32 beside float64 is a TypeError. Integers
    take the floating-point dtype beside them; Python numbers stay as they are."""
    return same_dtype([value_of(operand) for operand in operands])


def integers(operand, name, count):
    """The operand as an array of integers among 0 … count-1."""
    given = value_of(operand)
    given = given if hasattr(given, "dtype") else numpy.asarray(given)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {given.dtype}")
    within(given, count)
    return xp.asarray(given)


# Arithmetic: elementwise, with broadcasting.

@op
def add(a, b):
    x, w = arrays(a, b)
    return result(x + w, (a, lambda g: g), (b, lambda g: g))


@op
def subtract(a, b):
    x, w = arrays(a, b)
    return result(x - w, (a, lambda g: g), (b, lambda g: -g))


@op
def divide(a, b):
    x, w = arrays(a, b)
    return result(x / w, (a, lambda g: g / w), (b, lambda g: -g * (x / w) / w))


@op
def power(a, b):
    """a ** b. d/da = b a^(b-1), 0 where b = 0. d/db = a^b log a, 0 where a = 0 < b."""
    x, w = arrays(a, b)
    x = x if hasattr(x, "dtype") else xp.full((), x, dtype=xp.result_type(x, w))
    y = x ** w
    return result(y, (a, lambda g: g * w * x ** (w - (w != 0))),        # w = 0: not 0 ** -1
                  (b, lambda g: g * y * xp.log(xp.where(x == 0, xp.ones_like(y), x))))


# Functions of one number. A gradient uses x or y, and only that array is kept.

def elementary(name, f, of_x=None, of_y=None):
    """The operation y = f(x), with dL/dx = of_x(x, g) or of_y(y, g)."""
    def operation(a):
        x, = arrays(a)
        y = f(x)
        gradient = functools.partial(of_x, x) if of_x else functools.partial(of_y, y)
        return result(y, (a, gradient))
    operation.__name__ = operation.__qualname__ = name
    return op(operation)


negative = elementary("negative", lambda x: -x, of_y=lambda y, g: -g)
# (lambda x: xp.exp(x), not xp.exp: the library may change.)
exp = elementary("exp", lambda x: xp.exp(x), of_y=lambda y, g: g * y)
log = elementary("log", lambda x: xp.log(x), of_x=lambda x, g: g / x)
sqrt = elementary("sqrt", lambda x: xp.sqrt(x), of_y=lambda y, g: g / (2 * y))
tanh = elementary("tanh", lambda x: xp.tanh(x), of_y=lambda y, g: g * (1 - y * y))
relu = elementary("relu", lambda x: xp.maximum(x, 0), of_y=lambda y, g: g * (y > 0))
# 1 / (1 + exp(-x)), as exp(-log(1 + exp(-x))) with a logarithm that does not overflow:
sigmoid = elementary("sigmoid", lambda x: xp.exp(-xp.logaddexp(xp.zeros_like(x), -x)),
                     of_y=lambda y, g: g * y * (1 - y))


@op
def squared_relu(a):
    """relu(x)^2 (So et al. 2021, arXiv 2109.08668). It has a derivative everywhere."""
    x, = arrays(a)
    y = xp.maximum(x, 0)
    return result(y * y, (a, lambda g: 2 * g * y))


# Selection and shape. These move numbers, so g is moved back to where the numbers came
# from. What was left out gets zero. What was used twice gets a sum.

@op
def where(condition, a, b):
    """a where the boolean `condition` holds, else b."""
    condition = xp.asarray(value_of(condition)).astype(bool, copy=False)
    x, w = arrays(a, b)
    return result(xp.where(condition, x, w), (a, lambda g: xp.where(condition, g, 0)),
                  (b, lambda g: xp.where(condition, 0, g)))


@op
def reshape(a, shape):
    x, = arrays(a)
    before = x.shape
    return result(x.reshape(shape), (a, lambda g: g.reshape(before)))


@op
def transpose(a, axes=None):
    """The axes in the order `axes`, or reversed. Back: the inverse permutation."""
    x, = arrays(a)
    axes = list(range(x.ndim)[::-1] if axes is None else axes)
    places = numpy.arange(x.ndim)[axes]             # an axis may count from the end
    inverse = numpy.argsort(places).tolist()
    return result(x.transpose(axes), (a, lambda g: g.transpose(inverse)))


@op
def swapaxes(a, axis1, axis2):
    x, = arrays(a)
    return result(x.swapaxes(axis1, axis2), (a, lambda g: g.swapaxes(axis1, axis2)))


@op
def index(a, key):
    """a[key], with any of NumPy's indices. An element picked several times gets a sum."""
    x, = arrays(a)
    parts = tuple(map(value_of, key if isinstance(key, tuple) else (key,)))
    no_array = all(part is None or part is Ellipsis or isinstance(part, (int, slice))
                   for part in parts)
    shape, dtype = x.shape, x.dtype

    def gradient(g):
        out = xp.zeros(shape, dtype=dtype)
        if no_array:                                # no element is picked twice
            out[parts] = g
        else:
            xp.add.at(out, parts, g)
        return out
    return result(x[parts], (a, gradient))


@op
def concatenate(tensors, axis=0):
    xs = arrays(*tensors)
    *cuts, _ = itertools.accumulate(x.shape[axis] for x in xs)
    # jointly: the edges to all operands, whose gradients one call computes.
    return result(xp.concatenate(xs, axis=axis),
                  *jointly(lambda g: xp.split(g, cuts, axis=axis), *tensors))


@op
def astype(a, dtype):
    """The only way to change a floating-point dtype. The gradient gets the operand's dtype."""
    x, = arrays(a)
    y, before = x.astype(dtype), x.dtype
    return result(y, *([(a, lambda g: g.astype(before))] if y.dtype.kind == "f" else []))


# Reductions. `axis` is None for all, an integer or a tuple. Every element that was summed
# gets the sum's g. In this file `sum` and `max` are these; Python's own are in `builtins`.

def _spread(shape, axis, keepdims):
    """A function that repeats g along the axes that were reduced: a view of `shape`."""
    def spread(g):
        kept = g if axis is None or keepdims else xp.expand_dims(g, axis)
        return xp.broadcast_to(kept, shape)
    return spread


@op
def sum(a, axis=None, keepdims=False):
    x, = arrays(a)
    return result(x.sum(axis=axis, keepdims=keepdims), (a, _spread(x.shape, axis, keepdims)))


@op
def mean(a, axis=None, keepdims=False):
    x, = arrays(a)
    total = sum(a, axis=axis, keepdims=keepdims)
    return total * (total.size / (x.size or 1))     # each sums x.size / total.size elements


@op
def max(a, axis=None, keepdims=False):
    """Elements that tie share the gradient equally."""
    x, = arrays(a)
    top, spread = x.max(axis=axis, keepdims=True), _spread(x.shape, axis, keepdims)

    def gradient(g):
        chosen = (x == top).astype(x.dtype)
        return chosen * spread(g) / chosen.sum(axis=axis, keepdims=True)
    return result(top if keepdims else top.squeeze(axis), (a, gradient))


# Matrix products. With Y = X W, Y[i,j] = sum_k X[i,k] W[k,j]:
#
#     dL/dX[i,k] = sum_j g[i,j] W[k,j]          dL/dX = g W^T
#     dL/dW[k,j] = sum_i X[i,k] g[i,j]          dL/dW = X^T g

@op
def matmul(a, b):
    """a @ b as NumPy defines it: matrices, stacks whose leading axes broadcast, vectors."""
    x, w = arrays(a, b)
    if not (getattr(x, "ndim", 0) and getattr(w, "ndim", 0)):
        raise ValueError("a number has no matrix product; use *")
    if x.ndim == 1:                                 # a vector on the left is a row
        row = matmul(reshape(a, (1, -1)), b)
        return reshape(row, () if w.ndim == 1 else w.shape[:-2] + w.shape[-1:])
    if w.ndim == 1:                                 # a vector on the right is a column
        return reshape(matmul(a, reshape(b, (-1, 1))), x.shape[:-1])
    if w.ndim == 2:                                 # a stack's rows all meet w: one product
        rows, m, shape = math.prod(x.shape[:-1]), w.shape[1], x.shape
        flat = x.reshape(rows, shape[-1])
        return result((flat @ w).reshape(shape[:-1] + (m,)),
                      (a, lambda g: (g.reshape(rows, m) @ w.T).reshape(shape)),
                      (b, lambda g: flat.T @ g.reshape(rows, m)))
    return result(x @ w, (a, lambda g: g @ w.swapaxes(-1, -2)),
                  (b, lambda g: x.swapaxes(-1, -2) @ g))


@op
def embedding(table, ids):
    """Rows of `table`, picked by `ids`: table [V, D], integers ids [...] -> [..., D]."""
    x, = arrays(table)
    ids = integers(ids, "ids", len(x))
    shape = x.shape
    return result(x[ids], (table, lambda g: sum_by_id(g, ids, shape)))      # xp.add.at, section 6


# The softmax and its relatives. With y = softmax(x), y[j] = exp(x[j]) / sum_k exp(x[k]):
#
#     log y[j] = x[j] - log sum_k exp(x[k])       d log y[j] / dx[i] = 1[i = j] - y[i]
#
# So dy[j]/dx[i] = y[j] (1[i = j] - y[i]). L depends on x[i] through every y[j], so these
# add:
#
#     dL/dx[i] = sum_j g[j] dy[j]/dx[i] = y[i] (g[i] - sum_j g[j] y[j])
#
# Adding a constant to every x[i] changes nothing. Subtracting the largest keeps exp from
# overflowing.

@op
def softmax(a, mask=None):
    """Softmax over the last axis. Where the boolean `mask` is True, x counts as -infinity.

    The weight there is 0. A row that is masked everywhere has only zeros.

    >>> softmax(Tensor([[0.0, math.log(3.0)], [1000.0, 1000.0]])).numpy().round(12).tolist()
    [[0.25, 0.75], [0.5, 0.5]]
    """
    x, = arrays(a)
    limits = xp.finfo(x.dtype)
    if mask is not None:
        x = xp.where(mask, x.dtype.type(-math.inf), x)
    y = x - xp.maximum(x.max(axis=-1, keepdims=True), limits.min)   # not -inf - -inf
    xp.exp(y, out=y)
    y /= xp.maximum(row_sums(y), limits.tiny)                       # not 0 / 0
    return result(y, (a, lambda g: (g - row_dots(g, y)) * y))


@op
def log_softmax(a):
    """log softmax(x) over the last axis. dL/dx[i] = g[i] - softmax(x)[i] sum_j g[j]."""
    x, = arrays(a)
    y = x - x.max(axis=-1, keepdims=True)
    y -= xp.log(row_sums(xp.exp(y)))
    return result(y, (a, lambda g: g - xp.exp(y) * row_sums(g)))


@op
def cross_entropy(logits, targets, confidence_penalty=0.0):
    """Mean over all positions of -log softmax(logits)[target], in nats.

    logits [..., V], integer targets [...]. With N positions the gradient is
    (softmax(logits) - onehot(target)) / N: what the model believes, minus what was true.

    A confidence penalty c (Pereyra et al. 2017) subtracts c H, where H = -sum_v p[v] log p[v]
    is the entropy of p = softmax(logits). With dH/dlogits = -p (log p + H), p in the gradient
    becomes p (1 + c (log p + H)).

    >>> logits = Tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, [2])
    >>> loss.backward()
    >>> round(loss.item() / math.log(2), 12)            # 2 bits to guess one of four
    2.0
    >>> logits.grad.tolist()
    [[0.25, 0.25, -0.75, 0.25]]
    """
    x, = arrays(logits)
    targets = integers(targets, "targets", x.shape[-1])
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets must have the shape {list(x.shape[:-1])}, "
                         "one for each row of logits")
    rows, columns = xp.arange(targets.size), targets.reshape(-1)
    log_p = log_softmax(x.reshape(targets.size, x.shape[-1])).data
    loss = -log_p[rows, columns].mean()
    if confidence_penalty:
        entropy = -row_dots(xp.exp(log_p), log_p)
        loss -= confidence_penalty * entropy.mean()

    def gradient(g):
        difference = xp.exp(log_p)
        if confidence_penalty:
            difference *= 1 + confidence_penalty * (log_p + entropy)
        difference[rows, columns] -= 1
        difference *= g / targets.size
        return difference.reshape(targets.shape + log_p.shape[1:])
    return result(loss, (logits, gradient))


# Layer normalisation (Ba et al. 2016) gives every row of n numbers mean 0 and variance 1.
# Then come a learned gain and a learned bias. With s = 1 / sqrt(variance + eps) and
# z = (x - mean) s:
#
#     dvariance/dx[i] = 2/n (x[i] - mean) = 2/n z[i] / s
#         The mean's dependence on x[i] contributes 0, because deviations sum to 0.
#     ds/dx[i] = -1/2 s^3 dvariance/dx[i] = -s^2 z[i] / n
#     dz[j]/dx[i] = s (1[i = j] - 1/n) + (z[j] / s) ds/dx[i]
#                 = s (1[i = j] - 1/n - z[j] z[i] / n)
#     dL/dx[i] = sum_j g[j] dz[j]/dx[i] = s (g[i] - mean(g) - z[i] mean(g z))
#
# eps keeps a constant row from a division by 0. Shifting a row, or stretching it about its
# mean, leaves z as it is, but for eps. So L does not change along (1, …, 1) and along
# x - mean, and dL/dx is orthogonal to both.

@gpu_form
def normalised_rows(x, eps):
    """z and s of every row (last axis)."""
    n = x.shape[-1] or 1
    z = x - row_sums(x) / n
    s = 1 / xp.sqrt(row_dots(z, z) / n + eps)
    z *= s
    return z, s


@gpu_form
def normalise_gradient(g, z, s):
    """s (g - mean(g) - z mean(g z))"""
    n = g.shape[-1] or 1
    h = z * (row_dots(g, z) / -n)
    h += g
    h -= row_sums(g) / n
    h *= s
    return h


@op
def normalise(a, eps=1e-5):
    """z of every row (last axis)."""
    x, = arrays(a)
    z, s = normalised_rows(x, eps)
    return result(z, (a, lambda g: normalise_gradient(g, z, s)))


@op
def layer_norm(a, gain, bias, eps=1e-5):
    """Layer normalisation over the last axis: a [..., D], gain [D], bias [D]."""
    return normalise(a, eps) * gain + bias


@op
def dropout(a, p, generator):
    """Zero each element with probability p, and divide the rest by 1 - p.

    The expectation stays the same. `generator` is one of xp.random.default_rng(…). Where
    it is None (not training) or p is 0, a stays unchanged.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), not {p}")
    x, = arrays(a)
    if generator is None or p == 0:
        return a if isinstance(a, Tensor) else Tensor(x)
    u = generator.random(x.shape, dtype=xp.float32)
    y, factor = drop(x, u, p)                       # x factor, where factor = (u >= p) / (1 - p)
    return result(y, (a, lambda g: g * factor))


# %% 4. The notation
# What an array offers, on Tensor.

def _shape_given(shape):
    """reshape(2, 3) and reshape((2, 3)) mean the same."""
    return shape[0] if shape and isinstance(shape[0], (tuple, list)) else shape


Tensor.__add__, Tensor.__radd__ = add, lambda self, other: add(other, self)
Tensor.__sub__, Tensor.__rsub__ = subtract, lambda self, other: subtract(other, self)
Tensor.__mul__, Tensor.__rmul__ = multiply, lambda self, other: multiply(other, self)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, lambda self, other: divide(other, self)
Tensor.__pow__, Tensor.__rpow__ = power, lambda self, other: power(other, self)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda self, other: matmul(other, self)
Tensor.__neg__, Tensor.__getitem__ = negative, index
Tensor.__array_ufunc__ = None                       # array * tensor calls Tensor.__rmul__
Tensor.__len__ = lambda self: len(self.data)
Tensor.__iter__ = lambda self: (self[i] for i in range(len(self)))
Tensor.__bool__ = lambda self: bool(self.data)
Tensor.__int__, Tensor.__float__ = lambda self: int(self.item()), lambda self: float(self.item())
Tensor.__format__ = lambda self, form: format(self.item(), form) if form else repr(self)
Tensor.__repr__ = lambda self: (
    f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})")


def _comparison(name):
    """x < y and its like: a Tensor of booleans, which have no gradient."""
    return lambda self, other: Tensor(getattr(self.data, name)(value_of(other)))


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Tensor, _name, _comparison(_name))
Tensor.__hash__ = object.__hash__                   # as a key a Tensor is itself, not its values


def _no_array(self, *_, **__):
    raise TypeError("a Tensor is no array of NumPy's: its values are .numpy(), or .data on the "
                    "device, or .item() for a single one")


Tensor.__array__ = Tensor.__array_function__ = _no_array


def _deepcopy(self, memo):
    if self._node:                      # the graph would be copied, with the leaves it leads to
        raise TypeError("copy.deepcopy: this Tensor was computed from others; copy .detach()")
    copy = Tensor(self.data.copy(), self.requires_grad)
    copy.grad = None if self.grad is None else self.grad.copy()
    return memo.setdefault(id(self), copy)


Tensor.__deepcopy__ = _deepcopy
Tensor.sum, Tensor.mean, Tensor.max = sum, mean, max
Tensor.swapaxes, Tensor.astype = swapaxes, astype
Tensor.reshape = lambda self, *shape: reshape(self, _shape_given(shape))
Tensor.transpose = lambda self, *axes: transpose(self, _shape_given(axes) or None)
Tensor.T = property(transpose)

Tensor.shape = property(lambda self: self.data.shape)
Tensor.ndim = property(lambda self: self.data.ndim)
Tensor.size = property(lambda self: self.data.size)
Tensor.dtype = property(lambda self: self.data.dtype)
Tensor.item = lambda self: self.data.item()         # the one value, as a Python number
Tensor.numpy = lambda self: to_numpy(self.data)     # the values, as a NumPy array
Tensor.detach = stop_gradient


# %% 5. The proof
# A derivative is a limit, and a small eps comes near it:
#
#     f'(x)  is about  (f(x + eps) - f(x - eps)) / (2 eps)
#
# The difference is eps^2 f'''/6, and rounding, about 1e-16 |f| / eps. In float64 with
# eps = 1e-5 both are near 1e-11 where f and f''' are near 1. So even a small mistake shows. In
# float32 rounding alone would be 6e-8 / 1e-5 = 6e-3, which hides it: float32 is refused. Where f
# has a kink, like relu at 0, there is no derivative to agree on. Random inputs miss those.

class GradientError(AssertionError):
    """backward() and finite differences disagree."""


def check_gradients(f, inputs, eps=1e-5, rtol=1e-6, atol=1e-7, samples=None, seed=0):
    """Compare backward() with central differences, element by element.

    f         deterministic function of the inputs; returns a Tensor of any shape
    inputs    float64 Tensors with requires_grad, whose `.grad` is overwritten: a list, or a
              dict, whose names go into messages
    samples   how many elements of each input to check, chosen by `seed`; None: all

    The loss is a randomly weighted sum of f's elements, in which errors do not cancel.
    Returns the largest difference. Raises GradientError with the worst element where a
    difference exceeds atol + rtol |value|, and TypeError where an input is not float64 or
    requires no gradient.
    """
    if not isinstance(inputs, dict):
        inputs = {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    for name, tensor in inputs.items():
        if tensor.dtype != numpy.float64 or not tensor.requires_grad:
            raise TypeError(f"check_gradients: {name} must be float64 with requires_grad, "
                            f"is {tensor!r:.80}")
        tensor.grad = None
    rng = numpy.random.default_rng(seed)
    y = f(*inputs.values())
    weights = xp.asarray(rng.normal(size=y.shape))
    sum(y * weights).backward()

    def loss():
        with no_grad():
            return sum(f(*inputs.values()) * weights).item()

    largest, worst, message = 0.0, 0.0, None
    for name, tensor in inputs.items():
        places = list(numpy.ndindex(tensor.shape))
        if samples is not None and samples < len(places):
            places = [places[i] for i in rng.choice(len(places), samples, replace=False)]
        for place in places:
            here = tensor.data[place].item()
            tensor.data[place] = here + eps
            above = loss()
            tensor.data[place] = here - eps
            below = loss()
            tensor.data[place] = here
            numeric = (above - below) / (2 * eps)
            by_backward = 0.0 if tensor.grad is None else tensor.grad[place].item()
            difference = abs(numeric - by_backward)
            largest = builtins.max(largest, difference)
            excess = difference - (atol + rtol * abs(numeric))
            if excess > worst or math.isnan(excess):
                worst = math.inf if math.isnan(excess) else excess
                message = (f"check_gradients: d/d({name}){list(place)}: backward() says "
                           f"{by_backward:.10g}, finite differences say {numeric:.10g}")
    if message:
        raise GradientError(message)
    return largest


# %% 6. The same operations, faster
# Each function names what it equals, and a test compares the two.

@op
def linear(a, weight, bias, before=None):
    """a @ weight + bias; with `before` concatenate([before, a], axis=1) @ weight + bias.

    a [..., n], weight [n, m], bias [m]. The bias is added in place. Its gradient is g, which
    backward() sums over the rows.

    before   a constant [B, M, n], whose rows come before those of a [B, T, n]: the memory of
             Transformer-XL. They count in the gradients of weight and bias. `before` gets none
             itself, which makes a product smaller
    """
    x, w, b = arrays(a, weight, bias)
    shape, M = x.shape, 0
    if before is not None:
        M = before.shape[1]
        x = xp.concatenate(arrays(before, x), axis=1)
    rows, m = math.prod(x.shape[:-1]), w.shape[1]
    flat = x.reshape(rows, x.shape[-1])
    y = flat @ w
    y += b

    def gradient_of_a(g):
        g = g[:, M:] if M else g
        return (g.reshape(math.prod(shape[:-1]), m) @ w.T).reshape(shape)
    return result(y.reshape(x.shape[:-1] + (m,)), (a, gradient_of_a),
                  (weight, lambda g: flat.T @ g.reshape(rows, m)), (bias, lambda g: g))


@op
def activated(a, weight, bias, name):
    """relu(a @ weight + bias), or squared_relu(…), as `name` says."""
    x, w, b = arrays(a, weight, bias)
    rows, shape = math.prod(x.shape[:-1]), x.shape
    flat = x.reshape(rows, shape[-1])
    t, y = activate(flat @ w, b, name)

    def gradients(g):
        h = activation_gradient(g.reshape(t.shape), t, name)
        return (h @ w.T).reshape(shape), flat.T @ h, h
    return result(y.reshape(shape[:-1] + w.shape[1:]), *jointly(gradients, a, weight, bias))


def fold(gain, bias, weight):
    """(W', b') with z @ W' + b' = (z * gain + bias) @ weight.

        W' = diag(gain) weight          b' = bias weight

    Gain and bias of a layer normalisation are the same for all rows. So the matrix that
    multiplies next can absorb them. fold is made of operations, so backward() reaches gain,
    bias and weight.
    """
    return reshape(gain, (-1, 1)) * weight, bias @ weight


def sum_by_id(g, ids, shape):
    """Zeros of `shape` [V, D], to whose row ids[i] every g[i] is added. xp.add.at does this.

    For a small table a product is several times faster. table[ids] is P @ table, where row i
    of P has a 1 at ids[i] and zeros elsewhere. So the gradient of table is P^T g.
    """
    if len(shape) != 2 or shape[0] > 512:
        out = xp.zeros(shape, dtype=g.dtype)
        xp.add.at(out, ids, g)
        return out
    picked = xp.eye(shape[0], dtype=g.dtype)[ids.reshape(-1)]
    return picked.T @ g.reshape(ids.size, shape[1])


# `from autograd import *` leaves Python's own sum and max as they are.
__all__ = ["GradientError", "Tensor", "check_gradients", "fold", "no_grad", "stop_gradient",
           "to_numpy", "use_device", "xp", *sorted(OPS.keys() - {"sum", "max"})]


# %% 7. A walk through it
# `python autograd.py` runs this section.

def walk_through():
    print("1. A gradient by hand and by backward().\n"
          "   L = sum_i (w_i x_i)^2        dL/dw_i = 2 w_i x_i^2")
    w, x = Tensor([1.0, 2.0, 3.0], requires_grad=True), Tensor([4.0, 5.0, 6.0])
    loss = ((w * x) ** 2).sum()
    loss.backward()
    print(f"   by hand      {2 * w.numpy() * x.numpy() ** 2}\n   backward()   {w.grad}")

    print("\n2. The proof, for a layer normalisation between two products.")
    rng = numpy.random.default_rng(0)
    inputs = [Tensor(rng.normal(size=shape), requires_grad=True)
              for shape in ((4, 3), (3, 5), (5,), (5,), (5, 2))]
    error = check_gradients(lambda x, W, a, b, V: layer_norm(x @ W, a, b) @ V, inputs)
    numbers = builtins.sum(x.size for x in inputs)
    print(f"   largest difference over {numbers} numbers: {error:.1e}")
    print("   x^2 with the factor 2 forgotten (a random weight multiplies both numbers):")
    try:
        check_gradients(lambda x: result(x.data ** 2, (x, lambda g: g * x.data)),
                        [Tensor([3.0], requires_grad=True)])
    except GradientError as wrong:
        print(f"   {wrong}")


if __name__ == "__main__":
    walk_through()
