# %% The backend: NumPy or CuPy, and what makes either fast
"""Where and how arrays are computed.

Nothing in this file is needed to understand the paper or the gradients. Each name has a
plain meaning, and the other files rely on no more than that:

    xp                         the array library: numpy, or cupy after use_device("gpu")
    to_numpy(x)                x as a NumPy array
    numeric_array(x, …)        xp.asarray(x)
    first_gradient(y, g)       g, or 1 where it is None
    jointly(f, a, b, …)        (a, lambda g: f(g)[0]), (b, lambda g: f(g)[1]), …
    shared_zeros(shape, t)     xp.zeros(shape, t)
    op(f)                      f, with errors that name it
    same_dtype(values)         the values as arrays of one dtype
    row_sums(x)                x.sum(axis=-1, keepdims=True)
    row_dots(x, y)             (x * y).sum(axis=-1, keepdims=True)
    leading_sums(x, n)         x.sum(axis=the first n axes)
    product(a, b, out, add)    a @ b, into `out` or added to it
    an Elementwise formula     its text, in NumPy
    activate(x, b, name)       t = relu(x + b), and that or its square
    drop(x, u, p)              x factor and factor, where factor = (u >= p) / (1 - p)
    @gpu_form                  the function below it, as it stands
    random_generator(seed)     xp.random.default_rng(seed)
    within(ids, n)             an IndexError where an id is not one of 0 … n-1
    workers(f, x)              [f(part, x) for part in parts]
    core_count()               os.cpu_count(), or fewer
    row_parts(n, threads)      the rows 0 … n-1 in as many slices
    keep_freed_memory()        nothing that a result would show

The sections: 1. the device   2. operands   3. sums   4. elementwise formulas   5. products
              6. kernels for rows   7. random numbers   8. worker processes
"""
import contextlib
import ctypes
import functools
import math
import mmap
import multiprocessing
import os
import signal
import sys

import numpy


# %% 1. The device
class _ArrayLibrary:
    """`xp`: the array library of the current device; `xp.exp` is numpy.exp or cupy.exp.

    CuPy has NumPy's interface. So everything else in this project is written once, against
    `xp`.
    """

    module = numpy

    def __getattr__(self, name):
        return getattr(self.module, name)


xp = _ArrayLibrary()


class DeviceError(RuntimeError):
    """What was asked of the machine cannot be had. The message says what to do, in a sentence."""


def use_device(name, tf32=False):
    """Compute on "cpu" (NumPy) or "gpu" (CuPy) from now on. Existing arrays stay where they are.

    tf32   let the GPU round the factors of float32 products to 10 bits, which is faster

    Raises DeviceError when CuPy or a CUDA device is missing, ValueError for any other name.
    """
    if name not in ("cpu", "gpu"):
        raise ValueError(f"use_device: the device is 'cpu' or 'gpu', not {name!r}")
    xp.module = numpy if name == "cpu" else _cupy(tf32)


def _cupy(tf32):
    if tf32:
        os.environ["CUPY_TF32"] = "1"       # CuPy reads it once, before its first product
    install = 'pip install "cupy-cuda13x[ctk]" (CUDA 13) or "cupy-cuda12x[ctk]" (CUDA 12)'
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"--device gpu needs CuPy, which is not installed here (or does not load): {install}, "
            f"or use --device cpu [{error.__class__.__name__}]") from error
    except Exception as error:              # an old CuPy under a new NumPy, …
        raise DeviceError(
            f"CuPy does not load with this NumPy ({_in_short(error)}): remove every cupy package "
            f"and reinstall, {install}, or use --device cpu") from error
    if int(cupy.__version__.split(".")[0]) < 14:
        raise DeviceError(f"CuPy {cupy.__version__} is too old, it mixes dtypes in other ways: "
                          f"14 or newer is needed, {install}, or use --device cpu")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            "CuPy is installed but finds no working CUDA device: check that nvidia-smi lists a "
            "GPU and that its driver is new enough for this CuPy, or use --device cpu "
            f"[{error}]") from error
    try:                                    # a kernel, a product and a copy to the host
        (cupy.ones((2, 2), dtype=cupy.float32) @ cupy.eye(2, dtype=cupy.float32)).get()
        if tf32:                            # for batched products too
            _cublas(cupy).setMathMode(cupy.cuda.device.get_cublas_handle(), 3)
    except Exception as error:
        raise DeviceError(what_a_gpu_says(error) or (
            "CuPy finds the GPU but cannot compute on it; most often it was built for another "
            f"CUDA than the driver supports: reinstall, {install}, or use --device cpu "
            f"[{_in_short(error)}]")) from error
    return cupy


def _in_short(error):
    return f"{error.__class__.__name__}: {str(error)[:100]}".replace("\n", " ")


def what_a_gpu_says(error):
    """A sentence for an error of CuPy that has a known cause; otherwise None."""
    text = f"{error.__class__.__name__} {error}"
    if any(sign in text for sign in ("OutOfMemory", "MemoryAllocation", "out of memory",
                                     "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")):
        return ("the GPU has not enough free memory: end what else runs on it (nvidia-smi lists "
                "it), or lower batch, segment, memory or model")
    if isinstance(error, OSError) and error.filename:
        return (f"CuPy cannot keep its compiled kernels in {error.filename}: set the environment "
                "variable CUPY_CACHE_DIR to a directory that can be written")
    return None


def on_a_gpu():
    """True where CuPy computes."""
    return xp.module.__name__ == "cupy"


@contextlib.contextmanager
def computing_on(name):
    """Inside `with computing_on("cpu"):` that is the device."""
    before = xp.module
    use_device(name)
    try:
        yield
    finally:
        xp.module = before


def to_numpy(array):
    """The same values as a NumPy array: a copy from the GPU, or the array itself on the CPU."""
    return array.get() if hasattr(array, "get") else array


def shared_zeros(shape, dtype):
    """Zeros that processes forked from this one see as well: what one of them writes, all read."""
    if xp.module is not numpy:
        return xp.zeros(shape, dtype=dtype)             # on a GPU there is one process
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * numpy.dtype(dtype).itemsize or 1)
    return numpy.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


# %% 2. Operands
# What keeps an operation's operands honest: they have one floating-point dtype, and an
# error says which operation it was and what it was given.

OPS = {}        # name -> operation; the tests read it so that none goes unchecked


def op(function):
    """Register an operation, and make its errors name it and its operands."""
    @functools.wraps(function)
    def checked(*operands, **options):
        try:
            return function(*operands, **options)
        except (IndexError, TypeError, ValueError) as error:
            kinds = IndexError, TypeError, ValueError
            kind = next(kind for kind in kinds if isinstance(error, kind))
            given = ", ".join(map(_describe, operands))
            raise kind(f"{function.__name__}({given}): {error}") from error
    OPS[function.__name__] = checked
    return checked


def _describe(operand):
    if hasattr(operand, "shape"):
        return f"{operand.dtype}{list(operand.shape)}"
    if isinstance(operand, (list, tuple)) and any(hasattr(part, "shape") for part in operand):
        return f"[{', '.join(map(_describe, operand))}]"
    return repr(operand)[:40]


def numeric_array(data, requires_grad):
    """A Tensor's data as an array: xp.asarray(data), if that is an array of numbers."""
    if hasattr(data, "requires_grad"):
        raise TypeError("Tensor: the data is a Tensor already; "
                        "use .detach() for the same value without history")
    try:
        array = xp.asarray(data)
    except ValueError as error:             # CuPy says so of a string
        raise TypeError(f"Tensor: numbers expected ({error})") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"Tensor: numbers expected, not dtype {array.dtype}")
    if requires_grad and array.dtype.kind != "f":
        raise TypeError(f"Tensor: only floating-point values have a gradient, not {array.dtype}")
    return array


def first_gradient(root, gradient):
    """Where backward() begins: 1 for a single number, or the given gradient of a Tensor."""
    if not root.requires_grad:
        raise RuntimeError("backward: nothing this value was computed from requires a gradient "
                           "(or it was computed inside no_grad())")
    if gradient is None and root.size != 1:
        raise ValueError(f"backward: this has shape {list(root.shape)}; give its gradient, "
                         "or call it on a single number")
    if gradient is None:
        return xp.ones_like(root.data)
    gradient = xp.asarray(gradient, dtype=root.dtype)
    if gradient.shape != root.shape:
        raise ValueError(f"backward: gradient of shape {list(gradient.shape)} "
                         f"for a result of shape {list(root.shape)}")
    return gradient


def jointly(function, *operands):
    """The pairs (operand, its gradient function) where `function` of g returns all gradients.

    backward() calls all gradient functions of a result with the same g. So the first call
    serves the others.
    """
    gradients = []

    def gradient(i, g):
        if not gradients:
            gradients.append(function(g))
        return gradients[0][i]
    return [(operand, functools.partial(gradient, i)) for i, operand in enumerate(operands)]


def same_dtype(values):
    """The values, ready to be combined without changing the dtype of a floating-point array.

    Numbers and integer arrays take the dtype of a floating-point array beside them. Lists
    become arrays, of float64 where they hold fractions. float32 beside float64 is a
    TypeError.
    """
    dtypes = {getattr(value, "dtype", None) for value in values}
    if len(dtypes) == 1 and None not in dtypes:
        return values                       # the usual case
    for i, value in enumerate(values):
        if isinstance(value, numpy.generic):
            values[i] = value.item()
        elif not hasattr(value, "dtype") and not isinstance(value, (int, float)):
            values[i] = xp.asarray(value)
            if values[i].dtype.kind not in "fiub":
                raise TypeError(f"numbers expected, not {value!r:.40}")
    if not any(hasattr(value, "dtype") for value in values):
        values[0] = xp.asarray(values[0])   # numbers alone
    with_dtype = [value for value in values if hasattr(value, "dtype")]
    floats = {value.dtype for value in with_dtype if value.dtype.kind == "f"}
    if len(floats) > 1:
        names = " and ".join(sorted(map(str, floats)))
        raise TypeError(f"{names} do not mix; convert one of them with astype")
    for dtype in floats:
        values = [value.astype(dtype) if hasattr(value, "dtype") and value.dtype != dtype else value
                  for value in values]
    return values


def within(ids, count):
    """IndexError unless all integers in `ids` are among 0 … count-1.

    NumPy would count negative ones from the end, and CuPy wraps those that are too large. What is
    on a GPU already is not looked at: that would wait for it.
    """
    if hasattr(ids, "get") and on_a_gpu():
        return
    ids = to_numpy(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        wrong = ids[(ids < 0) | (ids >= count)].flat[0]
        raise IndexError(f"{wrong} is not one of 0 … {count - 1}")


# %% 3. Sums
# A product with ones takes a fifth of the time of NumPy's sum over a short last axis, half of that
# over leading axes, and on a GPU a small part of the time of CuPy's. The ones are made once a size.

@functools.lru_cache(maxsize=64)
def _ones(library, count, dtype):
    return library.ones(count, dtype=dtype)


def row_sums(x):
    """Sum over the last axis, which stays with size 1."""
    rows, length = math.prod(x.shape[:-1]), x.shape[-1]
    sums = x.reshape(rows, length) @ _ones(xp.module, length, x.dtype)
    return sums.reshape(x.shape[:-1] + (1,))


def row_dots(x, y):
    """sum_j x[..., j] y[..., j]; the last axis stays with size 1."""
    return row_sums(x * y)


def leading_sums(x, count):
    """Sum over the first `count` axes."""
    rows, shape = math.prod(x.shape[:count]), x.shape[count:]
    sums = _ones(xp.module, rows, x.dtype) @ x.reshape(rows, math.prod(shape))
    return sums.reshape(shape)


# %% 4. Elementwise formulas
# A GPU multiplies far faster than it reads its memory, and an operation between arrays
# reads and writes all of them. So a formula of several operations is one program there.

class Elementwise:
    """A formula for every element of its arrays, written once for NumPy and for a GPU.

    arrays    names of the operands: arrays, which broadcast, and numbers of their dtype
    results   names of the results; where the text changes them in place, the last operands
    text      assignments of arithmetic on these names, which is Python and CUDA's C++ at once
    """

    def __init__(self, name, arrays, results, text):
        self.name, self.arrays, self.results = name, arrays.split(), results.split()
        self.text, self.code = text, compile(text, name, "exec")
        self.operands = self.arrays + self.results

    def __call__(self, *operands):
        if xp.module is not numpy:
            return _kernel(xp.module, self)(*operands)
        names = dict(zip(self.operands, operands), larger=numpy.maximum, sqrt=numpy.sqrt)
        exec(self.code, names)
        answers = tuple(names[name] for name in self.results)
        return answers[0] if len(answers) == 1 else answers


# CUDA's own max loses NaN, which must not be lost: it is how a run that diverges is noticed.
LARGER = """
template <typename T> __device__ T larger(T a, T b) { return a > b || a != a ? a : b; }
"""


@functools.cache
def _kernel(library, formula):
    """The formula as a program of CuPy, which compiles it when it is first used."""
    arrays, results = (", ".join(f"T {name}" for name in names)
                       for names in (formula.arrays, formula.results))
    return library.ElementwiseKernel(arrays, results, formula.text, formula.name,
                                     preamble=LARGER)


scaled_sum = Elementwise("scaled_sum", "x w scale", "y", "y = (x + w) * scale")
relu_of_sum = Elementwise("relu_of_sum", "x w zero", "y", "y = larger(x + w, zero)")
relu_gradient = Elementwise("relu_gradient", "g y", "h", "h = g * (y > 0)")
squared_relu_of_sum = Elementwise("squared_relu_of_sum", "x w zero", "t y",
                                  "t = larger(x + w, zero); y = t * t")
squared_relu_gradient = Elementwise("squared_relu_gradient", "g t", "h", "h = 2 * g * t")
dropped = Elementwise("dropped", "x u p scale", "y factor",
                      "factor = (u >= p) * scale; y = x * factor")
adam_update = Elementwise(
    "adam_update", "g decayed share_1 share_2 root eps rate decay share", "first second w average",
    "first += share_1 * (g - first); second += share_2 * (g * g - second); "
    "w -= decay * decayed * w + rate * first / (sqrt(second) * root + eps); "
    "average += share * (w - average)")
FORMULAS = [scaled_sum, relu_of_sum, relu_gradient, squared_relu_of_sum, squared_relu_gradient,
            dropped]


def activate(x, bias, name):
    """(relu(x + bias), and that or its square: the activation `name`). x may be overwritten."""
    if xp.module is numpy:
        x += bias
        t = numpy.maximum(x, 0, out=x)
        return t, t if name == "relu" else t * t
    if name == "squared_relu":
        return squared_relu_of_sum(x, bias, x.dtype.type(0))
    y = relu_of_sum(x, bias, x.dtype.type(0))
    return y, y


def activation_gradient(g, t, name):
    """g times the derivative of the activation, where t is relu(x + bias)."""
    return (relu_gradient if name == "relu" else squared_relu_gradient)(g, t)


def drop(x, u, p):
    """(x * factor, factor), where factor = (u >= p) / (1 - p), for float32 numbers u."""
    if x.dtype == u.dtype:
        return dropped(x, u, x.dtype.type(p), x.dtype.type(1 / (1 - p)))
    factor = (u >= p).astype(x.dtype) * float(1 / (1 - p))
    return x * factor, factor


# %% 5. Products
# Attention multiplies views: heads are every H-th group of columns, and transposes. NumPy's matmul
# takes them as they are. CuPy's copies every operand that is not contiguous, and the result again
# where `out` is a view. cuBLAS itself wants no copies. It takes matrices one of whose axes has
# consecutive numbers, and a stack of them at equal steps. With [H, B, n, k] that is a stack for
# each head, or for each sequence of the batch where these are fewer.

def product(a, b, out=None, add=False):
    """a @ b for [H, B, n, k] and [H, B, k, m], views or not: into `out`, or added to it."""
    if on_a_gpu() and a.dtype in (numpy.float32, numpy.float64):
        cublas = _cublas(xp.module)
        handle = xp.module.cuda.device.get_cublas_handle()
        tf32 = int(os.environ.get("CUPY_TF32") or 0) > 0        # as CuPy reads it
        return _product(a, b, out, add, tf32, lambda array: array.data.ptr,
                        functools.partial(cublas.gemmStridedBatchedEx, handle))
    if not add:
        return xp.matmul(a, b, out=out)
    ab, target = a @ b, out
    if out.strides[-2] < out.strides[-1]:       # along consecutive numbers: three times as fast
        ab, target = ab.swapaxes(-1, -2), out.swapaxes(-1, -2)
    target += ab
    return out


def _cublas(cupy):
    from cupy_backends.cuda.libs import cublas
    return cublas


CUDA_R_32F, CUDA_R_64F = 0, 1                               # cuBLAS' names, from its headers
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F = 68, 77, 70
CUBLAS_GEMM_DEFAULT = -1


def _product(a, b, out, add, tf32, address, gemm):
    """`product` by calls of cuBLAS, one a head or one a sequence.

    cuBLAS reads matrices column by column: what is [n, m] to us is the transpose, [m, n], to it.
    So it is asked for out^T = b^T a^T, and each matrix is as it wants it already.
    """
    (H, B, n, k), m = a.shape, b.shape[-1]
    if out is None:
        out = xp.empty((H, B, n, m), dtype=a.dtype)
    if not out.size or not k:
        if not add:
            out[...] = 0
        return out
    if _layout(out)[1]:                                     # its columns are consecutive
        _product(b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2), add, tf32,
                 address, gemm)
        return out
    a, b = (x if _layout(x) else xp.ascontiguousarray(x) for x in (a, b))
    (a_step, a_transposed), (b_step, b_transposed), (out_step, _) = map(_layout, (a, b, out))
    kind, compute = CUDA_R_64F, CUBLAS_COMPUTE_64F
    if a.dtype == numpy.float32:
        kind = CUDA_R_32F
        compute = CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else CUBLAS_COMPUTE_32F
    factors = numpy.array([1, 1 if add else 0], dtype=a.dtype)      # of the product, and of out
    one, old = (factors.ctypes.data + i * factors.itemsize for i in (0, 1))
    calls, stacked = (0, 1) if H <= B else (1, 0)           # axes
    a_next, b_next, out_next = (x.strides[stacked] // x.itemsize for x in (a, b, out))
    for call in range(min(H, B)):
        a_at, b_at, out_at = (address(x) + call * x.strides[calls] for x in (a, b, out))
        gemm(int(b_transposed), int(a_transposed), m, n, k, one,
             b_at, kind, b_step, b_next, a_at, kind, a_step, a_next, old,
             out_at, kind, out_step, out_next, max(H, B), compute, CUBLAS_GEMM_DEFAULT)
    return out


def _layout(x):
    """(step from row to row, False) of matrices whose rows are consecutive numbers, (step from
    column to column, True) of those whose columns are, or None."""
    rows, columns = x.shape[-2:]
    to_row, to_column = (stride // x.itemsize for stride in x.strides[-2:])
    if (to_column == 1 or columns <= 1) and (to_row >= columns or rows <= 1):
        return max(to_row, columns, 1), False
    if (to_row == 1 or rows <= 1) and (to_column >= rows or columns <= 1):
        return max(to_column, rows, 1), True
    return None


# %% 6. Kernels for rows
# What takes a row at a time, a softmax or a layer normalisation, is several passes over memory in
# array operations, and one in a kernel: a block of threads takes a row. Each kernel computes what
# the function of the same name in autograd.py or txl.py computes, which is marked `@gpu_form`.

KERNEL_FORMS, PLAIN_FORMS = {}, {}      # by name; the tests compare the two


def kernel_form(function):
    """What a GPU computes in the place of the plain form; NotImplemented where it cannot."""
    KERNEL_FORMS[function.__name__] = function
    return function


def gpu_form(plain):
    """The plain function; on a GPU its kernel form."""
    PLAIN_FORMS[plain.__name__] = plain
    kernel = KERNEL_FORMS[plain.__name__]

    @functools.wraps(plain)
    def function(*arguments):
        floats = on_a_gpu() and arguments[0].dtype in (numpy.float32, numpy.float64)
        answer = kernel(*arguments) if floats else NotImplemented
        return plain(*arguments) if answer is NotImplemented else answer
    return function


ROW_KERNELS = r"""
// The sum, or the largest, of the x of all threads in a block.
template <typename T> __device__ T of_block(T x, bool largest, T* shared) {
    for (int step = (blockDim.x < 32 ? blockDim.x : 32) / 2; step; step /= 2) {
        T y = __shfl_xor_sync(0xffffffff, x, step);
        x = largest ? (x > y ? x : y) : x + y;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[0];
    int warps = (blockDim.x + 31) / 32;
    for (int warp = 1; warp < warps; warp++)
        x = largest ? (x > shared[warp] ? x : shared[warp]) : x + shared[warp];
    return x;
}

// A row is a query: scores = exp(scores + position - largest), 0 where hidden, and their sum z.
// position is shifted: its rows begin keys - 1 numbers apart. A thread takes up to 8 keys.
template <typename T> __global__ __launch_bounds__(1024) void softmax_numerators(
        T* scores, const T* position, const T* minus_infinity, T* z, int queries, int keys) {
    __shared__ T shared[32];
    long long row = blockIdx.x;
    int query = row % queries;
    T* score = scores + row * keys;
    const T* shifted = position + row / queries * queries * keys + (long long)query * (keys - 1);
    const T* hidden = minus_infinity + (long long)query * keys;
    T mine[8], largest = -1e30, sum = 0;
    for (int n = 0; n < 8; n++) {
        int key = threadIdx.x + n * blockDim.x;
        mine[n] = key < keys && hidden[key] == 0 ? score[key] + shifted[key] : (T)-1e30;
        largest = largest > mine[n] ? largest : mine[n];
    }
    largest = of_block(largest, true, shared);
    for (int n = 0; n < 8; n++) {
        int key = threadIdx.x + n * blockDim.x;
        if (key < keys) {
            T numerator = hidden[key] == 0 ? exp(mine[n] - largest) : (T)0;
            score[key] = numerator;
            sum += numerator;
        }
    }
    sum = of_block(sum, false, shared);
    if (threadIdx.x == 0) z[row] = sum;
}

// A row is a query: d_score = numerators * (d_score - dots), and the same shifted back.
template <typename T> __global__ void score_gradient(
        T* d_score, const T* numerators, const T* dots, T* back, int queries, int keys) {
    long long row = blockIdx.x;
    int shift = queries - 1 - (int)(row % queries);
    T dot = dots[row];
    for (int key = threadIdx.x; key < keys; key += blockDim.x) {
        T numerator = numerators[row * keys + key];
        T d = numerator == 0 ? (T)0 : numerator * (d_score[row * keys + key] - dot);
        d_score[row * keys + key] = d;
        if (key + shift < keys) back[row * keys + key + shift] = d;
        if (key < shift) back[row * keys + key] = 0;
    }
}

// z = (x - mean) s, s = 1 / sqrt(variance + eps)
template <typename T> __global__ void normalised_rows(
        const T* x, T* z, T* s, int length, double eps) {
    __shared__ T shared[32];
    long long at = (long long)blockIdx.x * length;
    T sum = 0, squares = 0;
    for (int j = threadIdx.x; j < length; j += blockDim.x) sum += x[at + j];
    T mean = of_block(sum, false, shared) / length;
    for (int j = threadIdx.x; j < length; j += blockDim.x)
        squares += (x[at + j] - mean) * (x[at + j] - mean);
    T scale = 1 / sqrt(of_block(squares, false, shared) / length + (T)eps);
    for (int j = threadIdx.x; j < length; j += blockDim.x) z[at + j] = (x[at + j] - mean) * scale;
    if (threadIdx.x == 0) s[blockIdx.x] = scale;
}

// h = s (g - mean(g) - z mean(g z))
template <typename T> __global__ void normalise_gradient(
        const T* g, const T* z, const T* s, T* h, int length) {
    __shared__ T shared[32];
    long long at = (long long)blockIdx.x * length;
    T sum = 0, dot = 0;
    for (int j = threadIdx.x; j < length; j += blockDim.x) {
        sum += g[at + j];
        dot += g[at + j] * z[at + j];
    }
    sum = of_block(sum, false, shared) / length;
    dot = of_block(dot, false, shared) / length;
    T scale = s[blockIdx.x];
    for (int j = threadIdx.x; j < length; j += blockDim.x)
        h[at + j] = (g[at + j] - sum - z[at + j] * dot) * scale;
}
"""
MOST_KEYS = 8 * 1024                        # 8 for each of the most threads that a block may have


@functools.cache
def _row_kernels(cupy):
    names = [f"{name}<{kind}>" for name in KERNEL_FORMS for kind in ("float", "double")]
    return cupy.RawModule(code=ROW_KERNELS, options=("-std=c++17",), name_expressions=names)


def _for_each_row(name, rows, threads, *arguments):
    kind = "float" if arguments[0].dtype == numpy.float32 else "double"
    if rows:
        kernel = _row_kernels(xp.module).get_function(f"{name}<{kind}>")
        kernel((rows,), (threads,), arguments)


@kernel_form
def softmax_numerators(scores, position, minus_infinity):
    *batch, T, K = scores.shape
    if K > MOST_KEYS:
        return NotImplemented
    z = xp.empty((*batch, T, 1), dtype=scores.dtype)
    threads = max(64, 32 * math.ceil(K / (8 * 32)))
    _for_each_row("softmax_numerators", z.size, threads, scores, position,
                  xp.ascontiguousarray(minus_infinity), z, numpy.int32(T), numpy.int32(K))
    return z


@kernel_form
def score_gradient(numerators, dots, d_score):
    *_, T, K = d_score.shape
    back = xp.empty_like(d_score)
    _for_each_row("score_gradient", dots.size, 128, d_score, numerators,
                  xp.ascontiguousarray(dots), back, numpy.int32(T), numpy.int32(K))
    return back


@kernel_form
def normalised_rows(x, eps):
    x, length = xp.ascontiguousarray(x), x.shape[-1]
    if not length:
        return NotImplemented
    z, s = xp.empty_like(x), xp.empty(x.shape[:-1] + (1,), dtype=x.dtype)
    _for_each_row("normalised_rows", s.size, 128, x, z, s, numpy.int32(length),
                  numpy.float64(eps))
    return z, s


@kernel_form
def normalise_gradient(g, z, s):
    g, length = xp.ascontiguousarray(g), g.shape[-1]
    if not length:
        return NotImplemented
    h = xp.empty_like(g)
    _for_each_row("normalise_gradient", s.size, 128, g, z, s, h, numpy.int32(length))
    return h


# %% 7. Random numbers
# A generator of CuPy takes longer to initialise than dropout takes. So on a GPU number n is a hash
# of the seed and n: nothing to initialise, and the state is a count.

def random_generator(seed):
    """A generator whose `random(shape, dtype)` are numbers in [0, 1).

    seed, a list of integers, gives the same numbers again on the same kind of device.
    """
    return CounterGenerator(seed) if on_a_gpu() else xp.random.default_rng(seed)


class CounterGenerator:
    """SplitMix64 (Steele, Lea and Flood 2014), the upper 24 bits of each number."""

    GOLDEN = 0x9E3779B97F4A7C15
    HASH = ("unsigned long long x = start + (i + 1) * 0x9E3779B97F4A7C15ULL; "
            "x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL; "
            "x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL; "
            "y = T((x ^ (x >> 31)) >> 40) / T(16777216)")

    def __init__(self, seed):
        self.start = int(numpy.random.SeedSequence(seed).generate_state(1, numpy.uint64)[0])

    def random(self, shape, dtype):
        y = xp.empty(shape, dtype=dtype)
        self.kernel(xp.module)(numpy.uint64(self.start), y)
        self.start = (self.start + y.size * self.GOLDEN) % 2**64
        return y

    @staticmethod
    @functools.cache
    def kernel(cupy):
        return cupy.ElementwiseKernel("uint64 start", "T y", CounterGenerator.HASH, "uniform")


# %% 8. Worker processes
# NumPy works on one core at a time in everything but large matrix products. So the rows of
# a batch are divided among processes. They are copies of this one, made by fork, and each
# builds and walks a graph of its own. (Threads would do without copies, but they take turns
# at Python's lock: two threads need 1.2 to 2.4 times as long as two processes.)
#
# Parameters and gradients are arrays of `shared_zeros`, which all processes see. No locks
# are needed: the arrays change only during a call, each process writes its own share, and
# the next call begins when all have answered.

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"        # microseconds of time, of every so many


def can_divide():
    """True where work can be divided: on the CPU under Linux. Elsewhere fork is missing or unsafe,
    and a GPU takes a whole batch at once."""
    return xp.module is numpy and sys.platform.startswith("linux")


def core_count():
    """The cores that this process may use: its affinity, and the quota of a container."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):      # no file or "max 100000": no quota
        with open(CPU_QUOTA) as file:
            quota, period = map(int, file.read().split())
        count = min(count, max(1, math.ceil(quota / period)))
    return count


def row_parts(batch_size, threads):
    """The rows of a batch, divided among workers as evenly as it goes: a list of slices."""
    parts = min(threads, batch_size) if can_divide() else 1
    edges = [batch_size * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


# Ctrl-C, a request to end, and a terminal that was closed.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)]


class Workers(contextlib.AbstractContextManager):
    """Calls a function for several parts at once: the first part here, each other in a process.

        with Workers([rows_0, rows_1], [evaluate]) as workers:
            losses = workers(evaluate, mem_len)     # evaluate(rows_0, mem_len), and of rows_1

    Each process keeps its variables between calls. Others see only `shared_zeros` arrays.
    Arguments and results are plain data or arrays. The first exception of a part is raised
    here, once all parts have answered. A process that has ended is a DeviceError.
    """

    def __init__(self, parts, functions):
        self.parts, self.functions = list(parts), list(functions)
        self.processes, self.pipes = [], []
        if len(self.parts) > 1 and not can_divide():
            raise ValueError("Workers: there can be only one part here")
        fork = multiprocessing.get_context("fork") if len(self.parts) > 1 else None
        try:
            for part in self.parts[1:]:
                pipe, its_pipe = fork.Pipe()
                self.pipes.append(pipe)
                process = fork.Process(target=self._serve, args=(part, its_pipe), daemon=True)
                process.start()
                self.processes.append(process)
                its_pipe.close()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise DeviceError(f"cannot start a worker process ({error.strerror}): "
                                  "lower --threads") from error
            raise

    def _serve(self, part, pipe):
        """The life of a process: answer until the pipe is closed at the other end."""
        for which in STOP_SIGNALS:
            signal.signal(which, signal.SIG_IGN)    # meant for the first process
        for other in self.pipes:            # copied by fork: while one is open here,
            other.close()                   # a pipe would never look closed
        with contextlib.suppress(EOFError, OSError):
            while True:
                index, arguments = pipe.recv()
                pipe.send(self._answer(self.functions[index], part, arguments))

    @staticmethod
    def _answer(function, part, arguments):
        try:
            return function(part, *arguments), None
        except Exception as error:
            return None, error

    def __call__(self, function, *arguments):
        """[function(part, *arguments) for part in parts]; `function` is one of the given ones."""
        index = self.functions.index(function)      # functions do not travel, numbers do
        try:
            for pipe in self.pipes:
                pipe.send((index, arguments))
            answers = [self._answer(function, self.parts[0], arguments)]
            answers += [pipe.recv() for pipe in self.pipes]
        except BaseException as error:      # Ctrl-C too: the answers would come next time
            self.close()
            if isinstance(error, (EOFError, OSError)):
                raise DeviceError("a worker process has ended unexpectedly; most often the system "
                                  "had no memory left") from error
            raise
        for _, error in answers:
            if error is not None:
                raise error
        return [answer for answer, _ in answers]

    def close(self):
        """End the processes, also in the middle of their work."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    def __exit__(self, *exception):
        self.close()


def keep_freed_memory():
    """Tell the C library's malloc to keep freed memory for the next array.

    A training step allocates the same few hundred arrays again and again. By default glibc
    returns every large one to the kernel, and the page faults cost more than the
    arithmetic. With this a step of the default model takes 0.88 of the time. Without glibc
    it does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Older releases refuse more than 32 MiB (mallopt then returns 0).
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
