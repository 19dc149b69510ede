# %% What a GPU does in another way
"""What CUDA computes in a way of its own, each the same as a plain form.

use_device("gpu") imports this file, and nothing else does. A function of the other files that
has a form here says so in a line that begins with `if on_a_gpu()`:

    product                                        @, and @ into an array       fast.py
    scaled_sum, relu_of_sum, …                     elementwise formulas         fast.py
    dropped                                        a formula of dropout         autograd.py
    adam_update                                    Adam.update                  txl.py
    layer_norm_forward, layer_norm_backward        the same names               autograd.py
    softmax_numerators, score_gradient             the same names               fast.py
    CounterGenerator                               xp.random.default_rng        backend.py

The sections: 1. CuPy   2. products   3. elementwise formulas   4. kernels for rows
              5. random numbers
"""
import functools
import math
import os

import numpy

from backend import DeviceError, xp


# %% 1. CuPy
def start(tf32):
    """CuPy, ready to compute. DeviceError says what is missing, in a sentence."""
    if tf32:
        os.environ["CUPY_TF32"] = "1"       # CuPy reads it once, before its first product
    install = 'pip install "cupy-cuda13x[ctk]" (CUDA 13) or "cupy-cuda12x[ctk]" (CUDA 12)'
    try:
        import cupy
    except Exception as error:
        raise DeviceError(
            "--device gpu needs CuPy 14 or newer, which is not installed here or does not load: "
            f"{install}, or use --device cpu [{in_short(error)}]") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise DeviceError(
            "CuPy is installed but finds no working CUDA device: check that nvidia-smi lists a "
            "GPU and that its driver is new enough for this CuPy, or use --device cpu "
            f"[{in_short(error)}]") from error
    try:                                    # a kernel, a product and a copy to the host
        (cupy.ones((2, 2), dtype=cupy.float32) @ cupy.eye(2, dtype=cupy.float32)).get()
        if tf32:                            # for batched products too
            cublas_of(cupy).setMathMode(cupy.cuda.device.get_cublas_handle(), 3)
    except Exception as error:
        raise DeviceError(explained(error)) from error
    return cupy


def in_short(error):
    return f"{error.__class__.__name__}: {str(error)[:200]}".replace("\n", " ")


def explained(error):
    """An error of CuPy in one line: a sentence where memory is short, otherwise CuPy's words."""
    text = in_short(error)
    if any(sign in text for sign in ("OutOfMemory", "MemoryAllocation", "out of memory",
                                     "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")):
        return ("the GPU has not enough free memory: end what else runs on it (nvidia-smi lists "
                "it), or lower batch, segment, memory or model")
    return f"CuPy says {text}"


# %% 2. Products
# Attention multiplies views: heads are every H-th group of columns, and transposes. NumPy's
# matmul takes them as they are. CuPy's copies every operand that is not contiguous, and the
# result again where `out` is a view. cuBLAS itself wants no copies. It takes matrices one of
# whose axes has consecutive numbers, and a stack of them at equal steps. With [H, B, n, k]
# that is a stack for each head, or for each sequence of the batch where these are fewer.

def product(a, b, out=None, add=False):
    """a @ b for [H, B, n, k] and [H, B, k, m], views or not: into `out`, or added to it."""
    handle = xp.cuda.device.get_cublas_handle()
    tf32 = int(os.environ.get("CUPY_TF32") or 0) > 0            # as CuPy reads it
    return product_by_calls(a, b, out, add, tf32, lambda array: array.data.ptr,
                            functools.partial(cublas_of(xp.module).gemmStridedBatchedEx, handle))


def cublas_of(cupy):
    from cupy_backends.cuda.libs import cublas
    return cublas


CUDA_R_32F, CUDA_R_64F = 0, 1                               # cuBLAS' names, from its headers
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_COMPUTE_64F = 68, 77, 70
CUBLAS_GEMM_DEFAULT = -1


def product_by_calls(a, b, out, add, tf32, address, gemm):
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
        product_by_calls(b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2), add,
                         tf32, address, gemm)
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
    """(step from row to row, False) of matrices whose rows are consecutive numbers, (step
    from column to column, True) of those whose columns are, or None."""
    rows, columns = x.shape[-2:]
    to_row, to_column = (stride // x.itemsize for stride in x.strides[-2:])
    if (to_column == 1 or columns <= 1) and (to_row >= columns or rows <= 1):
        return max(to_row, columns, 1), False
    if (to_row == 1 or rows <= 1) and (to_column >= rows or columns <= 1):
        return max(to_column, rows, 1), True
    return None


# %% 3. Elementwise formulas
# A GPU multiplies far faster than it reads its memory, and an operation between arrays
# reads and writes all of them. So a formula of several operations is one program here.

class Elementwise:
    """A formula for every element of its arrays.

    arrays    names of the operands: arrays, which broadcast, and numbers of their dtype
    results   names of the results; where the text changes them in place, the last operands
    text      assignments of arithmetic on these names, in CUDA's C++
    """

    def __init__(self, name, arrays, results, text):
        self.name, self.arrays, self.results = name, arrays.split(), results.split()
        self.text = text

    def __call__(self, *operands):
        return _kernel(xp.module, self)(*operands)


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
adam_formula = Elementwise(
    "adam_update", "g decayed share_1 share_2 root eps rate decay share", "first second w average",
    "first += share_1 * (g - first); second += share_2 * (g * g - second); "
    "w -= decay * decayed * w + rate * first / (sqrt(second) * root + eps); "
    "average += share * (w - average)")
FORMULAS = [scaled_sum, relu_of_sum, relu_gradient, squared_relu_of_sum, squared_relu_gradient,
            dropped]


def adam_update(adam, lr, w, g, decayed, first, second, average):
    """`adam.update` in one pass."""
    beta1, beta2 = adam.betas
    share = adam.share() if adam.average_over else 0.0
    numbers = (1 - beta1, 1 - beta2, 1 / math.sqrt(1 - beta2 ** adam.t), adam.eps,
               lr / (1 - beta1 ** adam.t), lr * adam.weight_decay, share)
    adam_formula(g, decayed, *map(w.dtype.type, numbers), first, second, w, average)


# %% 4. Kernels for rows
# What takes a row at a time, a softmax or a layer normalisation, is several passes over
# memory in array operations, and one in a kernel: a block of threads takes a row.

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
ROW_KERNEL_NAMES = ["softmax_numerators", "score_gradient", "normalised_rows",
                    "normalise_gradient"]
NUMBERS = {numpy.dtype("float32"): "float", numpy.dtype("float64"): "double"}       # in C++


@functools.cache
def _row_kernels(cupy):
    names = [f"{name}<{kind}>" for name in ROW_KERNEL_NAMES for kind in NUMBERS.values()]
    return cupy.RawModule(code=ROW_KERNELS, options=("-std=c++17",), name_expressions=names)


def for_each_row(name, rows, threads, *arguments):
    if rows:
        kind = NUMBERS[arguments[0].dtype]
        kernel = _row_kernels(xp.module).get_function(f"{name}<{kind}>")
        kernel((rows,), (threads,), arguments)


def softmax_numerators(scores, position, minus_infinity):
    *batch, T, K = scores.shape
    z = xp.empty((*batch, T, 1), dtype=scores.dtype)
    threads = max(64, 32 * math.ceil(K / (8 * 32)))
    for_each_row("softmax_numerators", z.size, threads, scores, position,
                 xp.ascontiguousarray(minus_infinity), z, numpy.int32(T), numpy.int32(K))
    return z


def score_gradient(E, dots, d_score):
    *_, T, K = d_score.shape
    back = xp.empty_like(d_score)
    for_each_row("score_gradient", dots.size, 128, d_score, E, xp.ascontiguousarray(dots), back,
                 numpy.int32(T), numpy.int32(K))
    return back


def layer_norm_forward(x, eps):
    x, length = xp.ascontiguousarray(x), x.shape[-1]
    z, s = xp.empty_like(x), xp.empty(x.shape[:-1] + (1,), dtype=x.dtype)
    for_each_row("normalised_rows", s.size, 128, x, z, s, numpy.int32(length),
                 numpy.float64(eps))
    return z, s


def layer_norm_backward(g, z, s):
    g, length = xp.ascontiguousarray(g), g.shape[-1]
    h = xp.empty_like(g)
    for_each_row("normalise_gradient", s.size, 128, g, z, s, h, numpy.int32(length))
    return h


# %% 5. Random numbers
# A generator of CuPy takes longer to initialise than dropout takes. So on a GPU number n is
# a hash of the seed and n: nothing to initialise, and the state is a count.

class CounterGenerator:
    """SplitMix64 (Steele, Lea and Flood 2014), the upper 24 bits of each number.

    seed, a list of integers, gives the same numbers again on every GPU.
    """

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
