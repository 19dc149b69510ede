# %% autograd: reverse-mode automatic differentiation over NumPy or CuPy
"""A reverse-mode autograd in one file.

Training a network means knowing the gradient of one number, the loss, with respect to a million numbers, the
parameters. The chain rule can be multiplied out from either end. Forwards it takes one pass for every parameter, because a
pass follows the influence of one. Backwards, from the loss, it takes one pass in all, because every intermediate result needs
only the gradient of that one number: an array of its own shape. That pass costs about twice as much as computing the loss,
since a matrix product has two products as its gradients; and intermediate results must be kept until it reaches them. That
is reverse mode. The file has these parts:

    1. the device      which array library computes: NumPy on the CPU, CuPy on a CUDA GPU
    2. the graph       Tensor, what an operation leaves behind for the way back, and backward()
    3. the operations  forward and gradient side by side, from addition to layer normalisation and dropout
    4. the notation    NumPy's operators on Tensor
    5. the proof       check_gradients: every gradient against finite differences
    6. kernels         a few elementwise formulas, each as one program for a GPU
    7. a walk through  what `python autograd.py` prints: gradients with numbers

Throughout, `g` is the gradient of the loss with respect to an operation's result y, an array of y's shape, and
an operation's *gradient function* maps g to the gradient with respect to one operand:

    loss = L(y),  y = f(x)      dL/dx[i] = sum over j of  g[j] * dy[j]/dx[i]      with  g[j] = dL/dy[j]
"""
import builtins
import contextlib
import functools
import heapq
import itertools
import math
import mmap
import os
import threading

import numpy


# %% 1. The device
class _ArrayLibrary:
    """`xp`: the array library of the current device; `xp.exp` is numpy.exp or cupy.exp.

    CuPy has NumPy's interface, so everything else in this project is written once, against `xp`.
    """

    module = numpy

    def __getattr__(self, name):
        return getattr(self.module, name)


xp = _ArrayLibrary()


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the message is one sentence that says what to do."""


def use_device(name, tf32=False):
    """Compute on "cpu" (NumPy) or "gpu" (CuPy) from now on. Arrays made before stay where they are.

    tf32   let the GPU round the factors of float32 products to 10 bits, which is faster (settled by the first use of "gpu")

    Raises DeviceError when CuPy or a CUDA device is missing, ValueError for any other name.
    """
    if name not in ("cpu", "gpu"):
        raise ValueError(f"use_device: the device is 'cpu' or 'gpu', not {name!r}")
    xp.module = numpy if name == "cpu" else _cupy(tf32)


def _cupy(tf32):
    if tf32:
        os.environ["CUPY_TF32"] = "1"       # CuPy reads it when it is imported
    try:
        import cupy
    except ImportError as error:
        raise DeviceError("--device gpu needs CuPy, which is not installed here (or does not load): "
                          'pip install "cupy-cuda13x[ctk]" (CUDA 13) or "cupy-cuda12x[ctk]" (CUDA 12), '
                          f"or use --device cpu [{error.__class__.__name__}]") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError("CuPy is installed but finds no working CUDA device: check that nvidia-smi lists a GPU and "
                          f"that its driver is new enough for this CuPy, or use --device cpu [{error}]") from error
    try:
        (cupy.random.default_rng(0).random((2, 2), dtype=cupy.float32) @ cupy.ones((2, 2), dtype=cupy.float32)).get()
    except Exception as error:              # a library of CUDA that does not load, a kernel that does not compile, …
        raise DeviceError("CuPy finds the GPU but cannot compute on it; most often it was built for another CUDA than the "
                          'driver supports: reinstall it as "cupy-cuda13x[ctk]" or "cupy-cuda12x[ctk]", or use --device '
                          f"cpu [{error.__class__.__name__}: {str(error)[:100]}]".replace("\n", " ")) from error
    return cupy


def to_numpy(array):
    """The same values as a NumPy array: a copy from the GPU, or the array itself on the CPU."""
    return array.get() if hasattr(array, "get") else array


def shared_zeros(shape, dtype):
    """An array of zeros that processes forked from this one see as well: what one of them writes, all read."""
    if xp.module is not numpy:
        return xp.zeros(shape, dtype=dtype)             # on a GPU there is one process
    size = math.prod(shape) * numpy.dtype(dtype).itemsize
    return numpy.frombuffer(mmap.mmap(-1, size or 1), dtype=dtype, count=math.prod(shape)).reshape(shape)


FUSED = {}      # name -> formula; for each of them section 6 has a kernel (the tests compare the two)


def fused(function):
    """Mark an elementwise formula. On the CPU it runs as written, one pass over memory for each operation; on a GPU, where
    these passes take more time than the arithmetic, the kernel of the same name (section 6) does it in one."""
    @functools.wraps(function)
    def formula(*operands):
        return (function if xp.module is numpy else _kernel(xp.module, function.__name__))(*operands)
    FUSED[function.__name__] = formula
    return formula


# %% 2. The graph
# Every operation makes a Tensor, with a node that remembers the nodes of the operands that need a gradient and, for each, the
# function that carries the gradient back to it. Each such pair is an edge; together the edges are what is often called the
# tape. A Tensor without a node is a leaf: a parameter, or a constant. Nodes hold no arrays. Gradient functions refer to the
# arrays they need; any other is freed as soon as the program forgets its Tensor, which saves a training step a fifth of its
# memory. Nothing is copied (nor does Tensor(array) copy): changing an array in place before backward() falsifies the gradients.
#
#     x ──┐
#         ├─ multiply ── y ── sum ── loss          loss.backward() walks the edges from right to left
#     w ──┘
#
# A value that is used twice influences the loss along two paths, and the chain rule for several paths is a sum:
# that is why gradients *add*, wherever paths meet in `leaf_gradients` below. (They add in Tensor.grad too, from one
# backward() to the next: the gradient of a sum of losses.)

class _State(threading.local):
    recording = True        # each thread has its own: no_grad() in one changes nothing in another


_state = _State()
_serial = itertools.count()


@contextlib.contextmanager
def no_grad():
    """Inside `with no_grad():` operations compute values only: no graph, no memory held for a backward pass."""
    before, _state.recording = _state.recording, False
    try:
        yield
    finally:
        _state.recording = before


class _Node:
    """The place of an operation's result in the graph."""

    __slots__ = ("edges", "number", "shape")

    def __init__(self, edges, shape):
        self.edges = edges                  # ((an operand's node, or a leaf, and gradient function), …); None when released
        self.number = next(_serial)         # an operand is always older than the result
        self.shape = shape


class Tensor:
    """An array that knows where it came from.

    data            array of the current device's library, any shape (lists and numbers are converted)
    requires_grad   True for a parameter, and for everything computed from one while recording
    grad            of a parameter after backward(): d(loss)/d(data), an array of the shape and dtype of `data`, to which
                    repeated calls add; otherwise None
    """

    __slots__ = ("data", "grad", "requires_grad", "_node", "__weakref__")
    __array_ufunc__ = None      # `array * tensor` asks the Tensor, instead of multiplying element by element

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor: the data is a Tensor already; use .detach() for the same value without history")
        self.data = xp.asarray(data)
        if self.data.dtype.kind not in "fiub":
            raise TypeError(f"Tensor: numbers expected, not dtype {self.data.dtype}")
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(f"Tensor: only floating-point values have a gradient, not {self.data.dtype}")
        self.grad = None
        self.requires_grad = requires_grad
        self._node = None                   # a leaf

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def item(self):
        """The one value as a Python number (on a GPU: waits for it)."""
        return self.data.item()

    def numpy(self):
        """The values as a NumPy array (see `to_numpy`)."""
        return to_numpy(self.data)

    def detach(self):
        """The same value with no history: a constant for every gradient computed from it."""
        return Tensor(self.data)

    def backward(self, gradient=None):
        """Add the gradient with respect to every leaf that requires one to the leaf's `.grad`.

        Without `gradient` this Tensor is the loss, a single number. Otherwise `gradient` is that of some loss with respect
        to this Tensor, an array of its shape. The graph is released on the way: a second backward() through it is a
        RuntimeError.

        >>> w, x = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0])
        >>> ((w * x) ** 2).sum().backward()     # the gradient is 2 w x^2
        >>> w.grad.tolist()
        [18.0, 64.0]
        """
        for leaf, g in leaf_gradients(self, gradient):
            leaf.grad = xp.array(g) if leaf.grad is None else xp.asarray(leaf.grad + g)     # a new array, not shared with g


def stop_gradient(x):
    """SG(x) of Transformer-XL (Dai et al. 2019, section 3.2): the same value, through which no gradient flows.

    >>> x = Tensor([3.0], requires_grad=True)
    >>> (x * stop_gradient(x)).backward()       # as if it were x * 3
    >>> x.grad.tolist()
    [3.0]
    """
    return x.detach()


def unbroadcast(g, shape):
    """Sum g over the axes along which broadcasting repeated an operand of `shape`.

    Broadcasting uses one element several times; its gradient is the sum over all its uses. [2, 3] + [3] adds the
    same vector to both rows, so the vector's gradient is g summed over the rows. Gradient functions leave this to
    `leaf_gradients`.

    >>> unbroadcast(numpy.array([[1, 2, 3], [10, 20, 30]]), (3,)).tolist()
    [11, 22, 33]
    >>> unbroadcast(numpy.array([[1, 2, 3], [10, 20, 30]]), (2, 1)).tolist()
    [[6], [60]]
    """
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    repeated = tuple(axis for axis in range(g.ndim) if axis < extra or shape[axis - extra] != g.shape[axis])
    return g.sum(axis=repeated).reshape(shape)


def leaf_gradients(root, gradient=None):
    """The backward pass: [(leaf, its gradient), …] for every leaf with requires_grad that `root` was computed from.

    It visits results before their operands, so that when a Tensor is visited its gradient g is complete. A result is
    always younger than its operands: always to visit the youngest of those reached is such an order (and needs no recursion,
    which in Python ends at a depth of a thousand).
    """
    if not root.requires_grad:
        raise RuntimeError("backward: nothing this value was computed from requires a gradient "
                           "(or it was computed inside no_grad())")
    if gradient is None and root.size != 1:
        raise ValueError(f"backward: this has shape {list(root.shape)}; give its gradient, or call it on a single number")
    gradient = xp.ones_like(root.data) if gradient is None else xp.asarray(gradient, dtype=root.dtype)
    if gradient.shape != root.shape:
        raise ValueError(f"backward: gradient of shape {list(gradient.shape)} for a result of shape {list(root.shape)}")

    node = root._node
    gradients, reached = {node or root: gradient}, [(-node.number, node)] if node else []       # a heap, the youngest first
    while reached:
        _, node = heapq.heappop(reached)
        g = gradients.pop(node)
        if node.edges is None:
            raise RuntimeError("backward: this graph was released by an earlier backward(); compute the value again")
        for operand, gradient_function in node.edges:
            part = unbroadcast(gradient_function(g), operand.shape)
            if operand in gradients:        # not +=: add, for one, gives the same array g to both operands
                gradients[operand] = gradients[operand] + part
            else:
                gradients[operand] = part
                if isinstance(operand, _Node):
                    heapq.heappush(reached, (-operand.number, operand))
        node.edges = None                   # frees what the gradient functions held on to
    return list(gradients.items())          # what is left are the leaves


# %% 3. The operations
# First what they share: the table of all operations, their results, and which dtypes go together.

OPS = {}        # name -> operation; the tests read it so that none goes unchecked


def op(function):
    """Register an operation, and make its errors name it and the operands."""
    @functools.wraps(function)
    def checked(*operands, **options):
        try:
            return function(*operands, **options)
        except (IndexError, TypeError, ValueError) as error:
            kind = next(kind for kind in (IndexError, TypeError, ValueError) if isinstance(error, kind))
            raise kind(f"{function.__name__}({', '.join(map(_describe, operands))}): {error}") from error
    OPS[function.__name__] = checked
    return checked


def _describe(operand):
    if hasattr(operand, "shape"):
        return f"{operand.dtype}{list(operand.shape)}"
    if isinstance(operand, (list, tuple)) and any(hasattr(part, "shape") for part in operand):
        return f"[{', '.join(map(_describe, operand))}]"
    return repr(operand)[:40]


def result(data, *edges):
    """The Tensor of an operation's value. `edges` are (operand, function from g to the operand's gradient).

    Only edges to operands that need a gradient are kept: the gradient functions of constants are never called, and the
    arrays that only they needed are freed.
    """
    tensor = Tensor.__new__(Tensor)         # without the checks of __init__: this runs for every operation
    tensor.data = data if data.ndim else xp.asarray(data)
    tensor.grad, kept = None, ()
    if _state.recording:
        kept = tuple([(x._node or x, gradient) for x, gradient in edges if isinstance(x, Tensor) and x.requires_grad])
    tensor.requires_grad, tensor._node = bool(kept), _Node(kept, tensor.data.shape) if kept else None
    return tensor


def jointly(function, *operands):
    """The edges to operands whose gradients have much in common: `function` of g gives them all, a tuple, in one call.

    (backward() calls all edges of a result with the same g, so the first call serves the others too.)
    """
    gradients = []

    def gradient(i, g):
        if not gradients:
            gradients.append(function(g))
        return gradients[0][i]
    return [(operand, functools.partial(gradient, i)) for i, operand in enumerate(operands)]


def value_of(operand):
    return operand.data if isinstance(operand, Tensor) else operand


def arrays(*operands):
    """The operands' values, ready to be combined without changing the dtype of the floating-point ones.

    Numbers and integer arrays take the dtype of a floating-point array beside them. Lists become arrays (of float64, if there
    are fractions in them). float32 beside float64 is a TypeError.
    """
    values = [value_of(operand) for operand in operands]
    dtypes = {getattr(value, "dtype", None) for value in values}
    if len(dtypes) == 1 and None not in dtypes:
        return values                       # the usual case
    for i, value in enumerate(values):
        if isinstance(value, numpy.generic):
            values[i] = value.item()
        elif not hasattr(value, "dtype") and not isinstance(value, (int, float)):
            values[i] = xp.asarray(value)
    if not any(hasattr(value, "dtype") for value in values):
        values[0] = xp.asarray(values[0])   # numbers alone
    floats = {value.dtype for value in values if hasattr(value, "dtype") and value.dtype.kind == "f"}
    if len(floats) > 1:
        raise TypeError(f"{' and '.join(sorted(map(str, floats)))} do not mix; convert one of them with astype")
    for dtype in floats:
        values = [v.astype(dtype) if hasattr(v, "dtype") and v.dtype != dtype else v for v in values]
    return values


# First arithmetic, elementwise with broadcasting; the rules are those of a first calculus course.

@op
def add(a, b):
    x, y = arrays(a, b)
    return result(x + y, (a, lambda g: g), (b, lambda g: g))


@op
def subtract(a, b):
    x, y = arrays(a, b)
    return result(x - y, (a, lambda g: g), (b, lambda g: -g))


@op
def multiply(a, b):
    x, y = arrays(a, b)
    return result(x * y, (a, lambda g: g * y), (b, lambda g: g * x))


@op
def divide(a, b):
    x, y = arrays(a, b)
    return result(x / y, (a, lambda g: g / y), (b, lambda g: -g * (x / y) / y))


@op
def power(a, b):
    """a ** b. d/da = b a^(b-1), which is 0 at b = 0 even where a = 0. d/db = a^b log a, which is 0 at a = 0 (with b > 0)."""
    x, y = arrays(a, b)
    x = x if hasattr(x, "dtype") else xp.full((), x, dtype=xp.result_type(x, y))
    z = x ** y
    return result(z, (a, lambda g: g * y * x ** (y - (y != 0))),
                  (b, lambda g: g * z * xp.log(xp.where(x == 0, xp.ones_like(z), x))))


@op
def negative(a):
    x, = arrays(a)
    return result(-x, (a, lambda g: -g))


def elementary(name, f, of_x=None, of_y=None):
    """The operation y = f(x). Its gradient is a function of g and either x or y; the other array is not kept."""
    def operation(a):
        x, = arrays(a)
        y = f(x)
        return result(y, (a, functools.partial(of_x, x) if of_x else functools.partial(of_y, y)))
    operation.__name__ = operation.__qualname__ = name
    return op(operation)


exp = elementary("exp", lambda x: xp.exp(x), of_y=lambda y, g: g * y)
log = elementary("log", lambda x: xp.log(x), of_x=lambda x, g: g / x)
sqrt = elementary("sqrt", lambda x: xp.sqrt(x), of_y=lambda y, g: g / (2 * y))
tanh = elementary("tanh", lambda x: xp.tanh(x), of_y=lambda y, g: g * (1 - y * y))
relu = elementary("relu", lambda x: xp.maximum(x, 0), of_y=lambda y, g: g * (y > 0))
# 1 / (1 + exp(-x)), as exp(-log(1 + exp(-x))) with a logarithm that does not overflow:
sigmoid = elementary("sigmoid", lambda x: xp.exp(-xp.logaddexp(xp.zeros_like(x), -x)), of_y=lambda y, g: g * y * (1 - y))


@op
def squared_relu(a):
    """relu(x)^2 (So et al. 2021, "Primer", arXiv 2109.08668): unlike relu it has a derivative everywhere."""
    x, = arrays(a)
    y = xp.maximum(x, 0)
    return result(y * y, (a, lambda g: 2 * g * y))


@op
def gelu(a):
    """x * Phi(x) in the tanh form of Hendrycks and Gimpel 2016 (arXiv 1606.08415, section 2)."""
    x, = arrays(a)
    c = math.sqrt(2 / math.pi)
    t = xp.tanh(c * (x + 0.044715 * x * x * x))
    return result(0.5 * x * (1 + t),
                  (a, lambda g: g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))))


# Selection and shape. These move numbers without changing them (astype: but for rounding), so their gradients move g back
# the same way: what was left out gets zero, what was used twice gets a sum.

@op
def where(condition, a, b):
    """a where `condition` (boolean array) holds, else b."""
    condition = xp.asarray(value_of(condition)).astype(bool, copy=False)
    x, y = arrays(a, b)
    return result(xp.where(condition, x, y), (a, lambda g: xp.where(condition, g, 0)), (b, lambda g: xp.where(condition, 0, g)))


@op
def reshape(a, shape):
    x, = arrays(a)
    before = x.shape
    return result(x.reshape(shape), (a, lambda g: g.reshape(before)))


@op
def transpose(a, axes=None):
    """The axes in the order `axes`, reversed if it is None. Back: the inverse permutation."""
    x, = arrays(a)
    axes = list(range(x.ndim)[::-1] if axes is None else axes)
    inverse = numpy.argsort(numpy.arange(x.ndim)[axes]).tolist()            # arange: an axis may count from the end
    return result(x.transpose(axes), (a, lambda g: g.transpose(inverse)))


@op
def swapaxes(a, axis1, axis2):
    x, = arrays(a)
    return result(x.swapaxes(axis1, axis2), (a, lambda g: g.swapaxes(axis1, axis2)))


@op
def index(a, key):
    """a[key]: any of NumPy's indices. An element picked several times by an integer array gets a sum."""
    x, = arrays(a)
    parts = tuple(map(value_of, key if isinstance(key, tuple) else (key,)))
    distinct = all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)     # no array
    shape, dtype = x.shape, x.dtype

    def gradient(g):
        out = xp.zeros(shape, dtype=dtype)
        if distinct:
            out[parts] = g
        else:
            xp.add.at(out, parts, g)
        return out
    return result(x[parts], (a, gradient))


@op
def concatenate(tensors, axis=0):
    xs = arrays(*tensors)
    *cuts, _ = itertools.accumulate(x.shape[axis] for x in xs)
    return result(xp.concatenate(xs, axis=axis), *jointly(lambda g: xp.split(g, cuts, axis=axis), *tensors))


@op
def pad(a, widths):
    """Zeros around a; `widths` is ((before, after), …), one pair for each axis."""
    x, = arrays(a)
    if len(widths) != x.ndim:
        raise ValueError(f"{len(widths)} pairs of widths for {x.ndim} axes")
    inside = tuple(slice(before, before + length) for (before, _), length in zip(widths, x.shape))
    return result(xp.pad(x, widths), (a, lambda g: g[inside]))


@op
def astype(a, dtype):
    """The only way to change a floating-point dtype. The gradient comes back in the operand's own; integers have none."""
    x, = arrays(a)
    y, before = x.astype(dtype), x.dtype
    return result(y, *([(a, lambda g: g.astype(before))] if y.dtype.kind == "f" else []))


# Reductions. Every element that was summed gets the sum's g. (`sum` and `max` hide Python's own in this file.)

def _spread(shape, axis, keepdims):
    """A function that repeats the g of a reduction over `axis` along the reduced axes: an array (a view) of `shape`."""
    return lambda g: xp.broadcast_to(g if axis is None or keepdims else xp.expand_dims(g, axis), shape)


@op
def sum(a, axis=None, keepdims=False):
    """Sum over `axis` (None: all; an integer or a tuple)."""
    x, = arrays(a)
    return result(x.sum(axis=axis, keepdims=keepdims), (a, _spread(x.shape, axis, keepdims)))


@op
def mean(a, axis=None, keepdims=False):
    x, = arrays(a)
    y, spread = x.mean(axis=axis, keepdims=keepdims), _spread(x.shape, axis, keepdims)
    share = y.size / (x.size or 1)
    return result(y, (a, lambda g: spread(g * share)))


@op
def max(a, axis=None, keepdims=False):
    """Largest element over `axis`. Elements that tie share the gradient equally."""
    x, = arrays(a)
    top, spread = x.max(axis=axis, keepdims=True), _spread(x.shape, axis, keepdims)

    def gradient(g):
        chosen = (x == top).astype(x.dtype)
        return chosen * spread(g) / chosen.sum(axis=axis, keepdims=True)
    return result(top if keepdims else top.squeeze(axis), (a, gradient))


# Matrix products. With Y = X W, Y[i,j] = sum_k X[i,k] W[k,j]:
#
#     dL/dX[i,k] = sum_j g[i,j] W[k,j]:  dL/dX = g W^T          dL/dW[k,j] = sum_i X[i,k] g[i,j]:  dL/dW = X^T g

@op
def matmul(a, b):
    """a @ b as NumPy defines it: matrices, stacks of matrices (leading axes broadcast), vectors."""
    x, w = arrays(a, b)
    if not (getattr(x, "ndim", 0) and getattr(w, "ndim", 0)):
        raise ValueError("a number has no matrix product; use *")
    if x.ndim == 1:                                         # a vector on the left is a row, on the right a column
        return index(matmul(reshape(a, (1, -1)), b), (..., 0) if w.ndim == 1 else (..., 0, slice(None)))
    if w.ndim == 1:
        return index(matmul(a, reshape(b, (-1, 1))), (..., 0))
    if w.ndim == 2:
        # One matrix for the whole stack: all rows in a single large product, much faster than many small ones.
        rows, m, shape = math.prod(x.shape[:-1]), w.shape[1], x.shape
        flat = x.reshape(rows, shape[-1])
        return result((flat @ w).reshape(shape[:-1] + (m,)),
                      (a, lambda g: (g.reshape(rows, m) @ w.T).reshape(shape)),
                      (b, lambda g: flat.T @ g.reshape(rows, m)))

    def gradient_of_b(g):
        if w.strides[-2] < w.strides[-1]:       # b is a transposed view; so is its gradient, ready to be transposed back
            return (g.swapaxes(-1, -2) @ x).swapaxes(-1, -2)
        return x.swapaxes(-1, -2) @ g
    return result(x @ w, (a, lambda g: g @ w.swapaxes(-1, -2)), (b, gradient_of_b))


@op
def embedding(table, ids):
    """Rows of `table` [V, D] picked by integer `ids` [...]: [..., D]. A row picked n times gets the sum of n gradients.

    Picking rows is a product with a matrix of zeros and ones, a row for each id, so the gradient is its transpose times
    g. For a small table that product is several times faster than adding row after row, as `index` does for a large one.
    """
    x, = arrays(table)
    ids = xp.asarray(value_of(ids))
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    if x.ndim != 2 or x.shape[0] > 512:
        return index(table, ids)
    V, D = x.shape

    def gradient(g):
        picked = xp.eye(V, dtype=g.dtype)[ids.reshape(-1)]
        return picked.T @ g.reshape(ids.size, D)
    return result(x[ids], (table, gradient))


# The softmax and its relatives. With y = softmax(x), y[i] = exp(x[i]) / sum_j exp(x[j]):
#
#     log y[j] = x[j] - log sum_k exp(x[k])     d log y[j] / dx[i] = 1[i = j] - y[i]
#     dy[j]/dx[i] = y[j] (1[i = j] - y[i])      dL/dx[i] = sum_j g[j] dy[j]/dx[i] = y[i] (g[i] - sum_j g[j] y[j])
#
# Adding a constant to every x[i] changes nothing; subtracting the largest keeps exp from overflowing.

def row_sums(x):
    """Sum over the last axis, which stays with size 1: as a product with ones, a fifth of the time of NumPy's sum."""
    n = x.shape[-1]
    return (x.reshape(math.prod(x.shape[:-1]), n) @ xp.ones(n, dtype=x.dtype)).reshape(x.shape[:-1] + (1,))


def row_dots(x, y):
    """sum_j x[..., j] y[..., j]; the last axis stays with size 1."""
    return row_sums(x * y)


@op
def softmax(a, mask=None):
    """Softmax over the last axis. Where boolean `mask` (broadcast to a) is True the weight is 0, as if x were -infinity.

    A row that is masked everywhere has only zeros (the two limits keep its largest, -infinity, from being subtracted, and
    its sum, 0, from being divided by).

    >>> softmax(Tensor([[0.0, math.log(3.0)], [1000.0, 1000.0]])).numpy().round(12).tolist()
    [[0.25, 0.75], [0.5, 0.5]]
    """
    x, = arrays(a)
    limits = xp.finfo(x.dtype)
    if mask is not None:
        x = xp.where(mask, x.dtype.type(-math.inf), x)
    y = x - xp.maximum(x.max(axis=-1, keepdims=True), limits.min)
    xp.exp(y, out=y)
    y /= xp.maximum(row_sums(y), limits.tiny)
    return result(y, (a, lambda g: (g - row_dots(g, y)) * y))


@op
def log_softmax(a):
    """log softmax(x) = x - log sum_j exp(x[j]) over the last axis. Back: dL/dx[i] = g[i] - softmax(x)[i] sum_j g[j]."""
    x, = arrays(a)
    y = x - x.max(axis=-1, keepdims=True)
    y -= xp.log(row_sums(xp.exp(y)))
    return result(y, (a, lambda g: g - xp.exp(y) * row_sums(g)))


@op
def cross_entropy(logits, targets):
    """Mean over all positions of -log softmax(logits)[target], in nats.

    logits [..., V], integer targets [...]. With N positions, the g that reaches log_softmax is -1/N at each target and 0
    elsewhere, so the gradient is (softmax(logits) - onehot(target)) / N: what the model believes, minus what was true.

    >>> logits = Tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, [2])
    >>> loss.backward()
    >>> round(loss.item() / math.log(2), 12), logits.grad.tolist()      # 2 bits to guess one of four
    (2.0, [[0.25, 0.25, -0.75, 0.25]])
    """
    x, = arrays(logits)
    targets = xp.asarray(value_of(targets))
    if targets.dtype.kind not in "iu" or targets.shape != x.shape[:-1]:
        raise ValueError(f"targets must be integers of shape {list(x.shape[:-1])}, one for each row of logits")
    rows, columns = xp.arange(targets.size), targets.reshape(-1)
    log_p = log_softmax(x.reshape(targets.size, x.shape[-1])).data

    def gradient(g):
        difference = xp.exp(log_p)
        difference[rows, columns] -= 1
        difference *= g / targets.size
        return difference.reshape(targets.shape + log_p.shape[1:])
    return result(-log_p[rows, columns].mean(), (logits, gradient))


# Layer normalisation (Ba et al. 2016) gives every row of n numbers mean 0 and variance 1 (but for eps, which keeps a
# constant row from a division by 0), then a learned gain and shift. With z = (x - mean) s and s = 1 / sqrt(variance + eps):
#
#     dvariance/dx[i] = 2/n (x[i] - mean) = 2/n z[i] / s      (through the mean comes 0: the x[j] - mean of a row sum to 0)
#     ds/dx[i] = -1/2 s^3 dvariance/dx[i] = -s^2 z[i] / n
#     dz[j]/dx[i] = s (1[i = j] - 1/n) + z[j]/s ds/dx[i] = s (1[i = j] - 1/n - z[j] z[i] / n)
#     dL/dx[i] = sum_j g[j] dz[j]/dx[i] = s (g[i] - mean(g) - z[i] mean(g z))
#
# Shifting or, but for eps, stretching a row leaves z as it is, so the gradient is orthogonal to (1, …, 1) and to x - mean. Gain
# and shift are a multiplication and an addition, with the gradients of those.

@op
def normalise(a, eps=1e-5):
    """z of every row (last axis), without gain and shift."""
    x, = arrays(a)
    n = x.shape[-1] or 1
    z = x - row_sums(x) / n
    s = 1 / xp.sqrt(row_dots(z, z) / n + eps)
    z *= s
    return result(z, (a, lambda g: normalise_gradient(g, z, s, row_sums(g) / n, row_dots(g, z) / -n)))


@fused
def normalise_gradient(g, z, s, mean_g, minus_mean_g_z):
    h = z * minus_mean_g_z
    h += g
    h -= mean_g
    h *= s
    return h


@op
def layer_norm(a, gain, bias, eps=1e-5):
    """Layer normalisation over the last axis: a [..., D], gain [D], bias [D] (the shift's usual name)."""
    return normalise(a, eps) * gain + bias


@op
def linear(a, weight, bias, gain=None, shift=None, before=None):
    """(a * gain + shift) @ weight + bias for a [..., n], gain and shift [n] (or neither), weight [n, m], bias [m].

    gain and shift are those of a layer normalisation that precedes, which then only has to normalise. They are the same
    for all rows, so that the weights, a small matrix, can take them up: the result is a W' + b' with

        W' = diag(gain) W     b' = shift W + b

    before   [B, M, n], of a's dtype, put in front of a [B, T, n] (Transformer-XL's memory): gain, shift, weight and
             bias apply to it as well, the result is [B, M + T, m]. It gets no gradient itself, but counts in that of the weights
    """
    if (gain is None) != (shift is None):
        raise ValueError("gain and shift are given together or not at all")
    if gain is not None:                    # as operations, so that backward() finds all the gradients
        weight, bias = reshape(gain, (-1, 1)) * weight, linear(shift, weight, bias)
    x, w, b = arrays(a, weight, bias)
    shape, first = x.shape, 0
    if before is not None:
        if before.dtype != x.dtype:
            raise TypeError(f"{before.dtype} in front of {x.dtype}; convert one of them with astype")
        x, first = xp.concatenate([value_of(before), x], axis=1), before.shape[1]
    rows, m = math.prod(x.shape[:-1]), w.shape[1]
    flat = x.reshape(rows, x.shape[-1])
    y = flat @ w
    y += b

    def of_a(g):
        return ((g[:, first:] if first else g).reshape(math.prod(shape[:-1]), m) @ w.T).reshape(shape)
    return result(y.reshape(x.shape[:-1] + (m,)), (a, of_a), (weight, lambda g: flat.T @ g.reshape(rows, m)),
                  (bias, lambda g: xp.ones(rows, dtype=w.dtype) @ g.reshape(rows, m)))


@op
def dropout(a, p, generator):
    """Zero each element with probability p and divide the rest by 1 - p, so that the expectation stays the same.

    `generator` is one of xp.random.default_rng(...); None (not training) or p = 0 leaves a unchanged.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), not {p}")
    x, = arrays(a)
    if generator is None or p == 0:
        return a if isinstance(a, Tensor) else Tensor(x)
    factor = (generator.random(x.shape, dtype=xp.float32) >= p).astype(x.dtype) * float(1 / (1 - p))
    return result(x * factor, (a, lambda g: g * factor))


# %% 4. The notation
# NumPy's operators on Tensor, and some of its methods, are the operations above.

Tensor.__add__, Tensor.__radd__ = add, lambda self, other: add(other, self)
Tensor.__sub__, Tensor.__rsub__ = subtract, lambda self, other: subtract(other, self)
Tensor.__mul__, Tensor.__rmul__ = multiply, lambda self, other: multiply(other, self)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, lambda self, other: divide(other, self)
Tensor.__pow__, Tensor.__rpow__ = power, lambda self, other: power(other, self)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda self, other: matmul(other, self)
Tensor.__neg__, Tensor.__getitem__ = negative, index
Tensor.sum, Tensor.mean, Tensor.max, Tensor.swapaxes, Tensor.astype = sum, mean, max, swapaxes, astype
Tensor.reshape = lambda self, *shape: reshape(self, shape[0] if isinstance(shape[0], (tuple, list)) else shape)
Tensor.transpose = lambda self, *axes: transpose(self, axes[0] if axes and isinstance(axes[0], tuple) else axes or None)
Tensor.T = property(transpose)


# %% 5. The proof
# A derivative is a limit, and the limit can be tried: (f(x + eps) - f(x - eps)) / (2 eps) differs from f'(x) by
# eps^2 f'''/6 and by rounding, about 1e-16 |f| / eps. In float64 with eps = 1e-5 both are near 1e-11 where f and f''' are
# near 1, so even a small mistake shows. In float32 rounding alone would be 6e-8 / 1e-5 = 6e-3 and hide it: float32 is
# refused. (Where f has a kink, like relu at 0, there is no derivative to agree on; random inputs miss those.)

class GradientError(AssertionError):
    """backward() and finite differences disagree."""


def check_gradients(f, inputs, eps=1e-5, rtol=1e-6, atol=1e-7, samples=None, seed=0):
    """Compare backward() with central differences, element by element.

    f         function of the inputs that returns a Tensor of any shape; it must be deterministic. The check is made
              on a randomly weighted sum of its elements, in which errors do not cancel
    inputs    float64 Tensors with requires_grad: a list, or a dict of name -> Tensor (the names are for messages). Their
              `.grad` is overwritten
    samples   check that many elements of each input, chosen by `seed`, instead of all

    Returns the largest difference found. Raises GradientError with the worst element where a difference exceeds
    atol + rtol * |value|, and TypeError where an input is not float64 or does not require a gradient.
    """
    named = inputs if isinstance(inputs, dict) else {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    tensors = list(named.values())
    for name, tensor in named.items():
        if tensor.dtype != numpy.float64 or not tensor.requires_grad:
            raise TypeError(f"check_gradients: {name} must be float64 with requires_grad, is {tensor!r:.80}")
    rng = numpy.random.default_rng(seed)
    y = f(*tensors)
    weights = xp.asarray(rng.normal(size=y.shape))
    for tensor in tensors:
        tensor.grad = None
    sum(y * weights).backward()

    def value():
        with no_grad():
            return sum(f(*tensors) * weights).item()

    largest, worst, message = 0.0, 0.0, None
    for name, tensor in named.items():
        by_backward = numpy.zeros(tensor.shape) if tensor.grad is None else to_numpy(tensor.grad)
        places = list(numpy.ndindex(tensor.shape))
        if samples is not None and samples < len(places):
            places = [places[i] for i in rng.choice(len(places), samples, replace=False)]
        for place in places:
            here = tensor.data[place].item()
            tensor.data[place] = here + eps
            above = value()
            tensor.data[place] = here - eps
            below = value()
            tensor.data[place] = here
            numeric, analytic = (above - below) / (2 * eps), by_backward[place].item()
            difference = abs(numeric - analytic)
            largest = builtins.max(largest, difference)
            excess = difference - (atol + rtol * abs(numeric))
            excess = excess if excess == excess else math.inf                      # NaN is the worst
            if excess > worst:
                worst = excess
                message = (f"check_gradients: d/d({name}){list(place)}: backward() says {analytic:.10g}, "
                           f"finite differences say {numeric:.10g}")
    if message:
        raise GradientError(message)
    return largest


# %% 6. Kernels
# A GPU multiplies far faster than it reads its memory, and every operation between arrays reads and writes all of them. An
# entry has the inputs, the results and the line of CUDA's C++ that computes one element; CuPy makes a program of it when it is
# first used. T is the arrays' dtype. The function of the same name, marked `@fused`, is the same formula in NumPy (the last four
# are in txl.py); its arguments are the inputs, then the results that exist already, which are changed in place.

KERNELS = {     # name: inputs, results, what happens to one element of each
    "normalise_gradient": ("T g, T z, T s, T mean_g, T minus_mean_g_z", "T h", "h = (z * minus_mean_g_z + g - mean_g) * s"),
    "add_to_scores": ("T position, T hidden", "T scores", "scores = scores + position + hidden"),
    "exp_of_difference": ("T largest", "T scores", "scores = exp(scores - largest)"),
    "score_gradient": ("T numerators, T dots", "T d_scores", "d_scores = (d_scores - dots) * numerators"),
    "adam_update": ("T factor, float64 share_m, float64 share_v, float64 share_a, float64 v_sum, float64 eps, float64 rate, "
                    "float64 decay, T decayed", "T g, T m, T v, T w, T a",
                    "g *= factor; m += T(share_m) * (g - m); v += T(share_v) * (g * g - v); "
                    "w -= m / (sqrt(v / T(v_sum)) + T(eps)) * T(rate) + T(decay) * decayed * w; a += T(share_a) * (w - a)"),
}


@functools.cache
def _kernel(library, name):
    return library.ElementwiseKernel(*KERNELS[name], name)


# %% 7. A walk through it
# `python autograd.py` runs this section.

def walk_through():
    print("1. A gradient by hand and by backward().   loss = sum_i (w_i x_i)^2   d loss/dw_i = 2 w_i x_i^2")
    w, x = Tensor([1.0, 2.0, 3.0], requires_grad=True), Tensor([4.0, 5.0, 6.0])
    loss = ((w * x) ** 2).sum()
    loss.backward()
    print(f"   by hand      {2 * w.numpy() * x.numpy() ** 2}\n   backward()   {w.grad}")

    print("\n2. A value used twice: its gradients add.   y = w w + 3 w   dy/dw = 2 w + 3")
    w = Tensor([5.0], requires_grad=True)
    (w * w + 3 * w).backward()
    print(f"   by hand      {2 * 5.0 + 3}\n   backward()   {w.grad[0]}")

    print("\n3. Softmax and cross-entropy: what the model believes, minus what was true.")
    logits = Tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    cross_entropy(logits, [1]).backward()
    print(f"   softmax      {softmax(logits.detach()).numpy()[0].round(4)}\n   gradient     {logits.grad[0].round(4)}   target 1")

    print("\n4. The proof: finite differences against backward(), for a layer normalisation between two products.")
    rng = numpy.random.default_rng(0)
    inputs = [Tensor(rng.normal(size=shape), requires_grad=True) for shape in ((4, 3), (3, 5), (5,), (5,), (5, 2))]
    error = check_gradients(lambda x, W, gain, bias, V: layer_norm(x @ W, gain, bias) @ V, inputs)
    print(f"   largest difference over {builtins.sum(x.size for x in inputs)} numbers: {error:.1e}")
    try:
        check_gradients(lambda x: result(x.data ** 2, (x, lambda g: g * x.data)), [Tensor([3.0], requires_grad=True)])
    except GradientError as wrong:
        print(f"   and of x^2 with the factor 2 forgotten (weighted at random): {wrong}")


if __name__ == "__main__":
    walk_through()
