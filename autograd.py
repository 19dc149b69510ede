# %% autograd: reverse-mode automatic differentiation over NumPy or CuPy
"""A reverse-mode autograd, complete: the graph, the operations, and the proof.

Training changes a million parameters so that one number, the loss L, falls. It needs dL/dp
for every parameter p. Finite differences would compute L anew for each parameter. Reverse
mode computes L once, and then goes back from L through every step of the computation. At
the end it has every dL/dp. Going back takes about twice as long as computing L, because a
matrix product Y = X W has two gradients, and each is a product of the same size. The price
is memory: a step back needs numbers of the step, which are kept until then.

The sections: 1. one gradient   2. the graph   3. the operations   4. the notation
              5. the proof   6. a walk through, which `python autograd.py` prints

This file needs backend.py beside it: `xp` is NumPy or CuPy, row_sums(x) is
x.sum(axis=-1, keepdims=True), row_dots(x, y) is row_sums(x * y), leading_sums(x, n) is
x.sum(axis=the first n axes). What follows `if on_a_gpu()` is the same, faster on CUDA.
"""
import builtins
import contextlib
import functools
import heapq
import itertools
import math

import numpy

from backend import gpu, leading_sums, on_a_gpu, row_dots, row_sums, to_numpy, xp


# %% 1. One gradient
# Let y = f(x) be one step on the way to L. Arrays x and y with n and m numbers have n m
# derivatives dy[j]/dx[i], the Jacobian. For arrays of a million numbers that is too many to
# store. But L is one number, so dL/dy has no more numbers than y, and all that is needed is
# its product with the Jacobian, by the chain rule:
#
#     dL/dx[i]  =  sum_j dL/dy[j] dy[j]/dx[i]
#
# In this file g stands for dL/dy, an array of y's shape. A function that takes g and returns
# dL/dx, without building the Jacobian, is called a VJP, for vector-Jacobian product. For
# y = x w, element by element, the Jacobian is w on its diagonal and 0 elsewhere. So the VJP
# for x returns g w, and that for w returns g x.
#
# An operation computes y. Beside it stands a VJP for each operand.

class Tensor:
    """An array that knows how it was computed.

    data            an array of the current device's library; lists and numbers become arrays.
                    A given array is not copied, so an optimiser will change it
    requires_grad   True for a parameter, and for what is computed from one
    grad            None at first; L.backward() adds dL/d(data) to it, if this is a parameter

    Only float32 and float64 have gradients. `.numpy()` is the data as a NumPy array, on the
    CPU without a copy.
    """

    __slots__ = ("data", "grad", "requires_grad", "_node", "__weakref__")

    def __init__(self, data, requires_grad=False):
        self.data, self.grad, self.requires_grad = numeric_array(data), None, requires_grad
        self._node = None               # its place in the graph, if an operation made it
        if requires_grad and self.dtype not in (numpy.float32, numpy.float64):
            raise TypeError(f"Tensor: only float32 and float64 have a gradient, not {self.dtype}")

    def backward(self, gradient=None):
        """Add dL/dp to p.grad, for every parameter p that this Tensor was computed from.

        gradient   dL/d(this Tensor); not needed where this Tensor is L

        >>> w, x = Tensor([3.0], requires_grad=True), Tensor([4.0])
        >>> multiply(w, x).backward()
        >>> w.grad.tolist()                     # d(w x)/dw = x
        [4.0]
        """
        for leaf, g in leaf_gradients(self, gradient):      # the walk of section 2
            # A copy: one array may be the gradient of two leaves, and grad may be changed.
            leaf.grad = xp.array(g) if leaf.grad is None else xp.asarray(leaf.grad + g)


OPS = {}        # name -> operation; a test demands a gradient check for each


def op(function):
    """Register an operation, and let its errors name it and its operands' shapes."""
    @functools.wraps(function)
    def operation(*operands, **options):
        try:
            return function(*operands, **options)
        except Exception as error:
            if not hasattr(error, "__notes__"):         # the innermost operation says it
                given = [str(getattr(x, "shape", type(x).__name__)) for x in operands]
                error.add_note(f"in {function.__name__}: {', '.join(given)}")
            raise
    OPS[function.__name__] = operation
    return operation


@op
def multiply(a, b):
    """a b, element by element."""
    # a and b are operands: Tensors, arrays or numbers. x and w are their arrays (section 3).
    x, w = arrays(a, b)
    # The value, and for each operand its VJP. Section 2 says what becomes of them.
    return record(x * w, (a, lambda g: g * w), (b, lambda g: g * x))


# %% 2. The graph
# Each operation ends in record(value, (operand, VJP), …). It returns the value as a Tensor,
# with a *node* that holds the way back: for each operand that needs a gradient, the operand's
# node and the VJP that carries g to it. Such a pair is an edge, from result to operand. A
# parameter has no node, because nothing computed it. It is a *leaf*, and stands in the pair
# itself.
#
#     w ── multiply ── y ─┬─ multiply ── m ── add ── L      y = 2 w,  m = y y,  L = m + y
#                         ├─────┘              │          backward() walks right to left
#                         └────────────────────┘
#
# A value that is used several times influences L along several paths. The chain rule for
# that is a sum, so gradients add where paths meet. A node may pass its gradient on only
# when all of it has arrived. y must wait for m. The order is found by numbers: each new
# node gets the next one, so numbers fall along every edge.
#
#     Of the nodes reached, visit the one with the highest number, again and again.
#     Whatever still has to be visited lies behind a reached node, so its number is lower.
#     So nothing can pass a gradient to a node after it has been visited.
#
# For w = 1.5, so y = 3, `gradients` is after each visit:
#
#     start               L: 1
#     L passes on         m: 1, y: 1          because L = m + y
#     m passes on         y: 1 + 3 + 3        because m = y y; now y is complete
#     y passes on         w: 14               because y = 2 w
#
# A VJP holds the arrays that it needs, not copies. So do not change an array in place before
# backward(), nor a slice or a reshaped one, which are views of it: the gradients would be
# wrong. An array that no VJP needs is freed as soon as the program forgets its Tensor. The
# others are freed when backward() has visited the node. A second loss that shares a part of
# the graph finds that part released: add the losses first.
#
# VJPs compute with plain arrays, which record nothing. So there are no second derivatives.

_recording, _count = True, itertools.count()


class _Node:
    """The place of an operation's result in the graph."""

    __slots__ = ("edges", "number", "shape")

    def __init__(self, edges, shape):
        self.edges = edges              # ((a node or a leaf, VJP), …)
        self.number = next(_count)
        self.shape = shape              # of the gradient that arrives


def record(value, *edges):
    """The Tensor of an operation's value, an array. `edges` are pairs (operand, VJP).

    An edge to an operand that needs no gradient is dropped, with the arrays that only its
    VJP needed. A VJP need not care about broadcasting: where its result has more axes or
    longer ones than the operand, `unbroadcast` sums over them. And it must not change g,
    which the other VJPs get too.
    """
    tensor = Tensor.__new__(Tensor)     # without the checks of __init__
    tensor.data = value if value.ndim else xp.asarray(value)    # NumPy's sums are no arrays
    tensor.grad, kept = None, ()
    if _recording:
        kept = tuple([(x._node or x, vjp) for x, vjp in edges
                      if isinstance(x, Tensor) and x.requires_grad])
    tensor.requires_grad = bool(kept)
    tensor._node = _Node(kept, tensor.data.shape) if kept else None
    return tensor


def leaf_gradients(root, gradient=None):
    """The backward pass: [(leaf, its gradient), …] for every leaf that requires a gradient.

    There is no recursion, which in Python ends at a depth of a thousand.
    """
    gradients = {root._node or root: first_gradient(root, gradient)}        # dL/dL = 1
    reached = [(-root._node.number, root._node)] if root._node else []      # a heap
    while reached:
        _, node = heapq.heappop(reached)                # of the highest number
        g = gradients.pop(node)
        if node.edges is None:
            raise RuntimeError("backward: this graph was released by an earlier "
                               "backward(); compute the value again")
        for operand, vjp in node.edges:
            contribution = unbroadcast(vjp(g), operand.shape)
            if operand not in gradients:
                gradients[operand] = contribution
                if isinstance(operand, _Node):
                    heapq.heappush(reached, (-operand.number, operand))
            else:                       # not +=: another operand may have the same array
                gradients[operand] = gradients[operand] + contribution
        node.edges = None               # frees what the VJPs held
    return list(gradients.items())      # nodes were popped, the leaves are left


def first_gradient(root, gradient):
    """Where the backward pass begins: 1 for a single number, or the gradient that is given."""
    if not root.requires_grad:
        raise RuntimeError("backward: nothing this value was computed from requires a gradient "
                           "(or it was computed inside no_grad())")
    if gradient is None and root.size == 1:
        return xp.ones_like(root.data)
    if numpy.shape(gradient) != root.shape:
        raise ValueError(f"backward: this has shape {list(root.shape)}; give its gradient, of the "
                         "same shape, or call it on a single number")
    return xp.asarray(gradient, root.dtype)


def unbroadcast(g, shape):
    """Sum g over the axes along which broadcasting repeated an operand of `shape`.

    Broadcasting uses one element several times, and its gradient is the sum over all uses.
    A bias [2] added to rows [3, 2] is used by all three rows. So its gradient is the sum of
    the rows of g.

    >>> unbroadcast(numpy.array([[1, 2], [10, 20], [100, 200]]), (2,)).tolist()
    [111, 222]
    """
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)           # axes that the operand does not have
    repeated = tuple(axis for axis in range(g.ndim)
                     if axis < new or shape[axis - new] != g.shape[axis])
    if repeated == tuple(range(new)):
        return leading_sums(g, new)     # a faster sum over the same axes
    return g.sum(axis=repeated).reshape(shape)


def joint_edges(function, *operands):
    """Pairs (operand, VJP) for all operands, where one function of g computes all gradients.

    backward() visits a node once, and calls its VJPs one after the other with the same g. The
    first call computes all gradients and keeps them, the others take theirs.
    """
    gradients = []

    def vjp(i, g):
        if not gradients:
            gradients.append(function(g))
        return gradients[0][i]
    return [(operand, functools.partial(vjp, i)) for i, operand in enumerate(operands)]


def stop_gradient(x):
    """x as a constant: the same value, with no way back.

    >>> x = Tensor([3.0], requires_grad=True)
    >>> multiply(x, stop_gradient(x)).backward()        # as if it were 3 x
    >>> x.grad.tolist()
    [3.0]
    """
    return Tensor(value_of(x))


@contextlib.contextmanager
def no_grad():
    """Inside `with no_grad():` operations compute values only, and keep nothing."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


# %% 3. The operations
# Which dtype a result has is decided here, for all operations. Arrays of float32 and float64
# do not mix: NumPy would silently compute in float64, at half the speed. Python's numbers,
# lists, integer arrays and NumPy's single numbers take the floating-point dtype beside them.
#
# To add an operation: a function marked @op, which ends in record(value, (operand, VJP), …).
# tests/test_gradients.py then fails until its list of cases has one for the new name.

def value_of(operand):
    return operand.data if isinstance(operand, Tensor) else operand


def numeric_array(data):
    """xp.asarray(data), where that is an array of numbers."""
    if isinstance(data, Tensor):
        raise TypeError("this is a Tensor already; .detach() is its value without history")
    array = xp.asarray(data) if hasattr(data, "dtype") else numpy.asarray(data)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"numbers expected, not {data!r:.40}")
    return xp.asarray(array)


def arrays(*operands):
    """The operands' arrays, with one dtype: float32 beside float64 is a TypeError."""
    values = [value_of(operand) for operand in operands]
    dtypes = {getattr(value, "dtype", None) for value in values}
    if len(dtypes) == 1 and None not in dtypes:
        return values                   # the usual case
    values = [value.item() if isinstance(value, numpy.generic) else value for value in values]
    dtypes = {value.dtype for value in values if hasattr(value, "dtype")}
    floats = sorted(str(dtype) for dtype in dtypes if dtype.kind == "f")
    if len(floats) > 1:
        raise TypeError(f"{' and '.join(floats)} do not mix; convert one of them with astype")
    for i, value in enumerate(values):
        if not dtypes or not isinstance(value, (int, float)):       # NumPy leaves these as they are
            array = numeric_array(value)
            values[i] = array.astype(floats[0], copy=False) if floats else array
    return values


def floating(operand):
    """The operand's array, of a floating-point dtype: integers become float64."""
    x, = arrays(operand)
    return x if x.dtype.kind == "f" else x.astype(numpy.float64)


def checked_indices(operand, name, count):
    """The operand as an array of integers among 0 … count-1.

    NumPy would count negative ones from the end, and CuPy wraps those that are too large.
    What is on a GPU already is not looked at: that would wait for it.
    """
    given = value_of(operand)
    given = given if hasattr(given, "dtype") else numpy.asarray(given)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {given.dtype}")
    if given.size and not (on_a_gpu() and hasattr(given, "get")):
        least, most = given.min(), given.max()
        if not 0 <= least <= most < count:
            wrong = least if least < 0 else most
            raise IndexError(f"{name}: {wrong} is not one of 0 … {count - 1}")
    return xp.asarray(given)


# Arithmetic: elementwise, with broadcasting.

@op
def add(a, b):
    x, w = arrays(a, b)
    return record(x + w, (a, lambda g: g), (b, lambda g: g))


@op
def subtract(a, b):
    x, w = arrays(a, b)
    return record(x - w, (a, lambda g: g), (b, lambda g: -g))


@op
def divide(a, b):
    x, w = arrays(a, b)
    return record(x / w, (a, lambda g: g / w), (b, lambda g: -g * (x / w) / w))


@op
def negative(a):
    x, = arrays(a)
    return record(-x, (a, lambda g: -g))


@op
def power(a, b):
    """a ** b for a number b. With b = 0 the gradient is 0, at a = 0 too."""
    x, = arrays(a)
    b = b.item() if isinstance(b, numpy.generic) else b
    if not isinstance(b, (int, float)):
        raise TypeError("the exponent must be a number; for others use exp(b * log(a))")
    return record(x ** b, (a, lambda g: g * b * x ** (b - 1) if b else g * 0))


# Functions of one number. A VJP uses x or y, and only that array is kept.

def unary(name, f, of_x=None, of_y=None):
    """The operation y = f(x), whose VJP is of_x(x, g) or of_y(y, g)."""
    def operation(a):
        x, = arrays(a)
        y = f(x)
        vjp = functools.partial(of_x, x) if of_x else functools.partial(of_y, y)
        return record(y, (a, vjp))
    operation.__name__ = operation.__qualname__ = name
    return op(operation)


# (lambda x: xp.exp(x), not xp.exp, because xp stands for the library that was chosen last.)
exp = unary("exp", lambda x: xp.exp(x), of_y=lambda y, g: g * y)
log = unary("log", lambda x: xp.log(x), of_x=lambda x, g: g / x)
sqrt = unary("sqrt", lambda x: xp.sqrt(x), of_y=lambda y, g: g / (2 * y))
tanh = unary("tanh", lambda x: xp.tanh(x), of_y=lambda y, g: g * (1 - y * y))
relu = unary("relu", lambda x: xp.maximum(x, 0), of_y=lambda y, g: g * (y > 0))
# relu(x)^2 (So et al. 2021, arXiv 2109.08668) has a derivative everywhere:
squared_relu = unary("squared_relu", lambda x: xp.maximum(x, 0) ** 2,
                     of_x=lambda x, g: 2 * g * xp.maximum(x, 0))
# 1 / (1 + exp(-x)), as exp(-log(1 + exp(-x))) with a logarithm that does not overflow:
sigmoid = unary("sigmoid", lambda x: xp.exp(-xp.logaddexp(xp.zeros_like(x), -x)),
                of_y=lambda y, g: g * y * (1 - y))


# Selection and shape. These move numbers, so g is moved back to where the numbers came
# from. What was left out gets zero. What was used twice gets a sum.

@op
def where(condition, a, b):
    """a where the boolean `condition` holds, else b."""
    condition = xp.asarray(value_of(condition)).astype(bool, copy=False)
    x, w = arrays(a, b)
    return record(xp.where(condition, x, w), (a, lambda g: xp.where(condition, g, 0)),
                  (b, lambda g: xp.where(condition, 0, g)))


@op
def reshape(a, *shape):
    """The numbers in another shape: reshape(a, 2, 3) or reshape(a, (2, 3))."""
    x, = arrays(a)
    before = x.shape
    return record(x.reshape(*shape), (a, lambda g: g.reshape(before)))


@op
def transpose(a, *axes):
    """The axes in the order `axes`, or reversed. Back: the inverse permutation."""
    x, = arrays(a)
    y = x.transpose(*axes)
    order = numpy.ravel(axes or range(x.ndim)[::-1]) % (x.ndim or 1)
    inverse = numpy.argsort(order).tolist()
    return record(y, (a, lambda g: g.transpose(inverse)))


@op
def swapaxes(a, axis1, axis2):
    x, = arrays(a)
    return record(x.swapaxes(axis1, axis2), (a, lambda g: g.swapaxes(axis1, axis2)))


@op
def getitem(a, key):
    """a[key], with any of NumPy's indices. An element picked several times gets a sum."""
    x, = arrays(a)
    key = tuple(map(value_of, key if isinstance(key, tuple) else (key,)))
    basic = all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in key)
    shape, dtype = x.shape, x.dtype

    def vjp(g):
        out = xp.zeros(shape, dtype=dtype)
        if basic:                                   # no element is picked twice
            out[key] = g
        else:
            xp.add.at(out, key, g)
        return out
    return record(x[key], (a, vjp))


@op
def concatenate(tensors, axis=0):
    tensors = list(tensors)
    xs = arrays(*tensors)
    *cuts, _ = itertools.accumulate(x.shape[axis] for x in xs)
    return record(xp.concatenate(xs, axis=axis),
                  *joint_edges(lambda g: xp.split(g, cuts, axis=axis), *tensors))


@op
def astype(a, dtype):
    """The only way to change a floating-point dtype. The gradient gets the operand's dtype."""
    x, = arrays(a)
    y, before = x.astype(dtype), x.dtype
    has_gradient = y.dtype in (numpy.float32, numpy.float64)
    return record(y, *([(a, lambda g: g.astype(before))] if has_gradient else []))


# Reductions. `axis` is None for all, an integer or a tuple. Axes that are reduced stay with
# size 1 at first, so that g can be broadcast along them. In this file `sum` and `max` are
# these; Python's own are in `builtins`.

@op
def sum(a, axis=None, keepdims=False):
    """Every element that was summed gets the sum's g."""
    x, = arrays(a)
    total, shape = x.sum(axis=axis, keepdims=True), x.shape
    y = record(total, (a, lambda g: xp.broadcast_to(g, shape)))
    return y if keepdims else reshape(y, total.squeeze(axis).shape)


@op
def mean(a, axis=None, keepdims=False):
    x, = arrays(a)
    total = sum(a, axis=axis, keepdims=keepdims)
    return total * (total.size / (x.size or 1))     # each sums x.size / total.size elements


@op
def max(a, axis=None, keepdims=False):
    """Elements that tie share the gradient equally."""
    x, = arrays(a)
    top = x.max(axis=axis, keepdims=True)

    def vjp(g):
        chosen = (x == top).astype(x.dtype)
        return chosen * g / chosen.sum(axis=axis, keepdims=True)
    y = record(top, (a, vjp))
    return y if keepdims else reshape(y, top.squeeze(axis).shape)


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
    if w.ndim == 1:                                 # a vector on the right is a column
        return reshape(matmul(a, reshape(b, -1, 1)), x.shape[:-1])
    if x.ndim == 1:                                 # a vector on the left is a row
        return reshape(matmul(reshape(a, 1, -1), b), w.shape[:-2] + w.shape[-1:])
    if w.ndim == 2:                                 # all rows of a stack meet w: one product
        rows, m, shape = math.prod(x.shape[:-1]), w.shape[1], x.shape
        flat = x.reshape(rows, shape[-1])
        return record((flat @ w).reshape(shape[:-1] + (m,)),
                      (a, lambda g: (g.reshape(rows, m) @ w.T).reshape(shape)),
                      (b, lambda g: flat.T @ g.reshape(rows, m)))
    return record(x @ w, (a, lambda g: g @ w.swapaxes(-1, -2)),
                  (b, lambda g: x.swapaxes(-1, -2) @ g))


@op
def embedding(table, ids):
    """Rows of `table`, picked by `ids`: table [V, D], integers ids [...] -> [..., D]."""
    x, = arrays(table)
    ids, shape = checked_indices(ids, "ids", len(x)), x.shape

    def vjp(g):
        out = xp.zeros(shape, dtype=g.dtype)
        xp.add.at(out, ids, g)                      # a row picked several times gets a sum
        return out
    return record(x[ids], (table, vjp))


# The softmax and its relatives. With y = softmax(x), y[j] = exp(x[j]) / sum_k exp(x[k]).
# [i = j] is 1 where i = j and 0 elsewhere:
#
#     log y[j] = x[j] - log sum_k exp(x[k])       d log y[j] / dx[i] = [i = j] - y[i]
#
# Because dy = y d log y, dy[j]/dx[i] = y[j] ([i = j] - y[i]). L depends on x[i] through
# every y[j], so these add:
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
    x = floating(a)
    limits = xp.finfo(x.dtype)
    if mask is not None:
        x = xp.where(value_of(mask), x.dtype.type(-math.inf), x)
    # In a row of -inf the largest is -inf too, and -inf - -inf is NaN. So subtract at least
    # the lowest finite number. Such a row sums to 0, so divide by at least a tiny number.
    y = x - xp.maximum(x.max(axis=-1, keepdims=True), limits.min)
    xp.exp(y, out=y)
    y /= xp.maximum(row_sums(y), limits.tiny)
    return record(y, (a, lambda g: (g - row_dots(g, y)) * y))


@op
def log_softmax(a):
    """log softmax(x) over the last axis. dL/dx[i] = g[i] - softmax(x)[i] sum_j g[j]."""
    x = floating(a)
    y = x - x.max(axis=-1, keepdims=True)
    y -= xp.log(row_sums(xp.exp(y)))
    return record(y, (a, lambda g: g - xp.exp(y) * row_sums(g)))


@op
def cross_entropy(logits, targets, confidence_penalty=0.0):
    """Mean over all positions of -log softmax(logits)[target], in nats.

    logits [..., V], integer targets [...]. With N positions the gradient is
    (softmax(logits) - onehot(target)) / N: what the model believes, minus what was true.

    A confidence penalty c (Pereyra et al. 2017) subtracts c times the mean entropy
    H = -sum_v p[v] log p[v] of p = softmax(logits). Certainty then costs something. With
    dp[v]/dlogits[i] = p[v] ([i = v] - p[i]):

        dH/dlogits[i] = -sum_v (log p[v] + 1) dp[v]/dlogits[i] = -p[i] (log p[i] + H)

    So p[i] in the gradient becomes p[i] (1 + c (log p[i] + H)).

    >>> logits = Tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, [2])
    >>> loss.backward()
    >>> round(loss.item() / math.log(2), 12)            # 2 bits to guess one of four
    2.0
    >>> logits.grad.tolist()
    [[0.25, 0.25, -0.75, 0.25]]
    """
    x = floating(logits)
    targets = checked_indices(targets, "targets", x.shape[-1])
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets must have the shape {list(x.shape[:-1])}, one for each row "
                         f"of logits, not {list(targets.shape)}")
    rows, columns = xp.arange(targets.size), targets.reshape(-1)
    log_p = log_softmax(x.reshape(targets.size, x.shape[-1])).data
    loss = -log_p[rows, columns].mean()
    if confidence_penalty:
        finite_log_p = xp.maximum(log_p, -1e30)             # 0 log 0 is 0, not 0 times infinity
        entropy = -row_dots(xp.exp(log_p), finite_log_p)
        loss -= confidence_penalty * entropy.mean()

    def vjp(g):
        d_logits = xp.exp(log_p)
        if confidence_penalty:
            d_logits *= 1 + confidence_penalty * (finite_log_p + entropy)
        d_logits[rows, columns] -= 1
        d_logits *= g / targets.size
        return d_logits.reshape(targets.shape + log_p.shape[1:])
    return record(loss, (logits, vjp))


# Layer normalisation (Ba et al. 2016) gives every row of n numbers mean 0 and variance 1.
# With s = 1 / sqrt(variance + eps) and z = (x - mean) s:
#
#     dvariance/dx[i] = 2/n (x[i] - mean) = 2/n z[i] / s
#         The mean's dependence on x[i] contributes 0, because deviations sum to 0.
#     ds/dx[i] = -1/2 s^3 dvariance/dx[i] = -s^2 z[i] / n
#     dz[j]/dx[i] = s ([i = j] - 1/n) + (z[j] / s) ds/dx[i]
#                 = s ([i = j] - 1/n - z[j] z[i] / n)
#     dL/dx[i] = sum_j g[j] dz[j]/dx[i] = s (g[i] - mean(g) - z[i] mean(g z))
#
# eps, a small number, keeps a constant row from a division by 0. A row that is shifted has
# the same z, so L does not change in the direction (1, …, 1), and dL/dx is orthogonal to it.
# But for eps the same holds for stretching a row about its mean, the direction x - mean.

def layer_norm_forward(x, eps):
    """z and s of every row (last axis)."""
    if on_a_gpu():
        return gpu.layer_norm_forward(x, eps)
    n = x.shape[-1] or 1
    z = x - row_sums(x) / n
    s = 1 / xp.sqrt(row_dots(z, z) / n + eps)
    z *= s
    return z, s


def layer_norm_backward(g, z, s):
    """s (g - mean(g) - z mean(g z))"""
    if on_a_gpu():
        return gpu.layer_norm_backward(g, z, s)
    n = g.shape[-1] or 1
    h = z * (row_dots(g, z) / -n)
    h += g
    h -= row_sums(g) / n
    h *= s
    return h


@op
def layer_norm(a, gain=None, bias=None, eps=1e-5):
    """z gain + bias for every row of a [..., D], with learned gain [D] and bias [D]; or z."""
    x = floating(a)
    z, s = layer_norm_forward(x, eps)
    y = record(z, (a, lambda g: layer_norm_backward(g, z, s)))
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


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
    y, factor = dropped(x, u, p)
    return record(y, (a, lambda g: g * factor))


def dropped(x, u, p):
    """x factor and factor, where factor is 0 with probability p: where u in [0, 1) is below p."""
    if on_a_gpu() and x.dtype == u.dtype:
        return gpu.dropped(x, u, x.dtype.type(p), x.dtype.type(1 / (1 - p)))
    factor = (u >= p).astype(xp.result_type(x, u)) * float(1 / (1 - p))
    return x * factor, factor


# %% 4. The notation
# What an array offers, on Tensor. It is attached here, because operations are functions: so
# each could stand beside its VJP, in the order of difficulty.

for _name, _function in dict(add=add, sub=subtract, mul=multiply, truediv=divide, pow=power,
                             matmul=matmul).items():
    setattr(Tensor, f"__{_name}__", _function)
    setattr(Tensor, f"__r{_name}__", lambda self, other, f=_function: f(other, self))
for _name in ("exp log sqrt tanh relu squared_relu sigmoid softmax log_softmax sum mean max "
              "reshape transpose swapaxes astype").split():
    setattr(Tensor, _name, OPS[_name])
for _name in ("shape", "ndim", "size", "dtype"):
    setattr(Tensor, _name, property(lambda self, name=_name: getattr(self.data, name)))
Tensor.__neg__, Tensor.__getitem__ = negative, getitem
Tensor.T, Tensor.detach = property(transpose), stop_gradient
Tensor.item = lambda self: self.data.item()         # the one value, as a Python number
Tensor.numpy = lambda self: to_numpy(self.data)     # the values, as a NumPy array
Tensor.__len__ = lambda self: len(self.data)
Tensor.__iter__ = lambda self: (self[i] for i in range(len(self)))
Tensor.__bool__ = lambda self: bool(self.data)
Tensor.__float__ = lambda self: float(self.item())
Tensor.__repr__ = lambda self: (
    f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})")

for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):      # booleans
    setattr(Tensor, _name, lambda self, other, name=_name: Tensor(
        getattr(self.data, name)(value_of(other))))
Tensor.__hash__ = object.__hash__                   # as a key a Tensor is itself, not its values


def _no_array(self, *_, **__):
    raise TypeError("a Tensor is no array of NumPy's: its values are .numpy(), or .data on the "
                    "device, or .item() for a single one")


Tensor.__array__ = Tensor.__array_function__ = _no_array
Tensor.__array_ufunc__ = None                       # array * tensor calls Tensor.__rmul__


# %% 5. The proof
# A derivative is a limit, and a small eps comes near it:
#
#     f'(x)  is about  (f(x + eps) - f(x - eps)) / (2 eps)
#
# The error is eps^2 f'''/6, plus rounding, about 1e-16 |f| / eps. In float64 with eps = 1e-5
# both are near 1e-11 where f and f''' are near 1. A mistake (a sign, a factor, an index) is
# as large as the gradient itself, say 1e-2. So the tolerance, 1e-7 and a millionth of the
# value, lies far from both. In float32 rounding alone would be 6e-8 / 1e-5 = 6e-3, which
# hides mistakes: float32 is refused. Where f has a kink, like relu at 0, there is no
# derivative to agree on. Random inputs miss those.

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
    difference exceeds atol + rtol |value|.
    """
    if not isinstance(inputs, dict):
        inputs = {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    for name, tensor in inputs.items():
        if tensor.dtype != numpy.float64 or not tensor.requires_grad:
            raise TypeError(f"check_gradients: {name} must be float64 with requires_grad")
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
            here, losses = tensor.data[place].item(), []
            for moved in (here + eps, here - eps):
                tensor.data[place] = moved
                losses.append(loss())
            tensor.data[place] = here
            numeric = (losses[0] - losses[1]) / (2 * eps)
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


# %% 6. A walk through it
# `python autograd.py` runs this section.

def walk_through():
    print("1. Training: w x comes near 3 x.       L = mean_i (w x_i - 3 x_i)^2")
    w, x = Tensor([0.0], requires_grad=True), Tensor([1.0, 2.0])
    for step in range(4):
        loss = ((w * x - 3 * x) ** 2).mean()
        w.grad = None                           # because backward() adds to it
        loss.backward()
        by_hand = (2 * (w.item() - 3) * x.numpy() ** 2).mean()
        print(f"   w {w.item():.3f}   L {loss.item():7.4f}   "
              f"dL/dw {w.grad.item():7.3f}, by hand {by_hand:7.3f}")
        w.data -= 0.15 * w.grad                 # in place, after backward()

    print("\n2. The proof, for a layer normalisation between two products.")
    rng = numpy.random.default_rng(0)
    inputs = [Tensor(rng.normal(size=shape), requires_grad=True)
              for shape in ((4, 3), (3, 5), (5,), (5,), (5, 2))]
    error = check_gradients(lambda x, W, a, b, V: layer_norm(x @ W, a, b) @ V, inputs)
    count = builtins.sum(x.size for x in inputs)
    print(f"   largest difference over {count} numbers: {error:.1e}")
    print("   x^2 with the factor 2 forgotten (a random weight multiplies both numbers):")
    try:
        check_gradients(lambda x: record(x.data ** 2, (x, lambda g: g * x.data)),
                        [Tensor([3.0], requires_grad=True)])
    except GradientError as wrong:
        print(f"   {wrong}")


if __name__ == "__main__":
    walk_through()
