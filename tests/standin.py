"""Two stand-ins for CuPy on machines without a GPU: NumPy behind arrays as strict as CuPy's.

A CuPy array does not mix with a NumPy array and is not converted to one unless asked, by
`.get()`. Code that passes device data to `numpy` by mistake works on the CPU and fails on the
GPU. With these libraries in the place of `xp` it fails on any machine.

    Library     what it computes is NumPy's result, bit for bit
    Cuda        has CuPy's name, so that everything goes the way of a GPU: it compiles the
                kernels for the processor, and has a few lines in the place of cuBLAS

`with device("standin")` and `with device("cuda")` compute by them; "cpu" and "gpu" are real.
"""
import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest

import backend
import gpu
from backend import use_device, xp


# %% Strict arrays

def unwrap(value, where):
    """The NumPy value of an argument; a NumPy array among the arguments is refused."""
    if isinstance(value, Array):
        return value._values
    if isinstance(value, numpy.ndarray) and value.ndim:
        raise TypeError(f"stand-in: {where} got a NumPy array; CuPy would refuse it")
    if isinstance(value, (list, tuple)):
        return type(value)(unwrap(part, where) for part in value)
    return value


def wrap(value):
    """Arrays and NumPy's scalars as stand-in arrays (CuPy's reductions give 0-d arrays)."""
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return Array(numpy.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(wrap, value))
    return value


class Array:
    """An array of the pretended device."""

    __array_ufunc__ = None

    def __init__(self, values):
        self._values = values

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion of a device array to NumPy; use .get()")

    def get(self):
        return self._values.copy()

    T = property(lambda self: Array(self._values.T))
    data = property(lambda self: SimpleNamespace(ptr=self._values.ctypes.data))

    def __iter__(self):
        return map(wrap, self._values)

    def __getitem__(self, key):
        return wrap(self._values[unwrap(key, "indexing")])

    def __setitem__(self, key, value):
        self._values[unwrap(key, "indexing")] = unwrap(value, "assignment")


PYTHONS = "__len__", "__bool__", "__int__", "__float__", "item", "tolist"


def _forward(name):
    def method(self, *arguments, **options):
        arguments = [unwrap(argument, name) for argument in arguments]
        if any(hasattr(argument, "_node") for argument in arguments):
            return NotImplemented                       # `array + Tensor` is the Tensor's business
        options = {key: unwrap(value, name) for key, value in options.items()}
        answer = getattr(self._values, name)(*arguments, **options)
        if name.startswith("__i") and name != "__invert__":
            if answer is not self._values:  # NumPy gives a scalar where a 0-d array was meant
                self._values[...] = answer
            return self
        return answer if name in PYTHONS else wrap(answer)
    return method


for _name in "shape ndim size dtype itemsize strides base".split():
    setattr(Array, _name, property(lambda self, name=_name: getattr(self._values, name)))
for _name in ("add sub mul truediv pow mod matmul radd rsub rmul rtruediv rpow rmatmul iadd isub "
              "imul itruediv neg invert or and eq ne lt le gt ge").split():
    setattr(Array, f"__{_name}__", _forward(f"__{_name}__"))
for _name in (*PYTHONS, *"sum mean max min any all reshape squeeze transpose swapaxes astype "
              "copy argmax cumsum".split()):
    setattr(Array, _name, _forward(_name))
Array.__hash__ = None


class Function:
    """A function of NumPy, applied to stand-in arrays. transfers: and to what is no array yet."""

    def __init__(self, function, transfers=False):
        self.function, self.transfers = function, transfers

    def __call__(self, *arguments, **options):
        name = self.function.__name__
        arguments = [getattr(argument, "_values", argument) if self.transfers else
                     unwrap(argument, name) for argument in arguments]
        out = options.get("out")
        options = {key: unwrap(value, name) for key, value in options.items()}
        answer = self.function(*arguments, **options)
        return out if out is not None else wrap(answer)

    def __getattr__(self, name):                        # numpy.add.at and the like
        return Function(getattr(self.function, name))


class Library:
    """The module: what NumPy has, with stand-in arrays in and out."""

    random = SimpleNamespace(default_rng=lambda seed: SimpleNamespace(
        random=Function(numpy.random.default_rng(seed).random)))
    lib = SimpleNamespace(stride_tricks=SimpleNamespace(
        as_strided=Function(numpy.lib.stride_tricks.as_strided)))

    def __getattr__(self, name):
        value = getattr(numpy, name)
        if isinstance(value, type) or not callable(value):
            return value                                # dtypes, constants, finfo
        return Function(value, transfers=name in ("asarray", "array"))


# %% CUDA on the processor
# A block's threads are fibers, which run one after another, each up to the next place where it
# waits: for its warp, 32 threads, which goes on when all are there, or for the whole block.

WORDS = r"""
#include <cmath>
#include <cstddef>
using std::exp; using std::sqrt;
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
"""
THREADS = r"""
#include <csetjmp>
#include <cstdlib>
#include <functional>
#include <ucontext.h>
struct Place { unsigned x; };
static Place blockIdx, blockDim, threadIdx;
static jmp_buf rounds, thread[1024];
static double slot[1024];
static unsigned begun, unfinished;
static bool in_warp;
static std::function<void()> kernel;

static void wait(bool warp) {
    in_warp = warp;
    if (!_setjmp(thread[threadIdx.x])) _longjmp(rounds, 1);
}
static void __syncthreads() { wait(false); }

template <typename T> T __shfl_xor_sync(unsigned, T x, int step) {
    slot[threadIdx.x] = x;
    wait(true);
    T y = slot[threadIdx.x ^ step];
    wait(true);
    return y;
}

static void life() {
    for (;; __syncthreads()) kernel(), unfinished--;        // one block after another
}

static void run_until_it_waits() {
    static ucontext_t start;
    static char stack[1024][1 << 15];
    if (_setjmp(rounds)) return;
    if (threadIdx.x < begun) _longjmp(thread[threadIdx.x], 1);
    getcontext(&start);
    start.uc_stack.ss_sp = stack[begun++];
    start.uc_stack.ss_size = sizeof stack[0];
    makecontext(&start, life, 0);
    setcontext(&start);
}

template <typename... P>
static void launch(void (*function)(P...), unsigned blocks, unsigned threads, void** given) {
    blockDim.x = threads;
    kernel = [=]<size_t... I>(std::index_sequence<I...>) {
        return [=] { function(*(P*)given[I]...); };         // its arguments, one by one
    }(std::index_sequence_for<P...>());
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (unfinished = threads; unfinished;) {
            if (unfinished != threads) abort();     // a thread waits for one that has ended
            for (unsigned warp = 0; warp < threads; warp += 32)
                do for (threadIdx.x = warp; threadIdx.x < warp + 32; threadIdx.x++)
                    run_until_it_waits();
                while (in_warp);
        }
}
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux",
                                    reason="needs g++ and Linux")


def compiled(text):
    """The C library of a C++ text."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/library.so"
        subprocess.run(["g++", *"-std=c++20 -O1 -U_FORTIFY_SOURCE -Wall -Werror -shared".split(),
                        *"-fPIC -x c++ - -o".split(), library], input=text, text=True, check=True)
        return ctypes.CDLL(library)


def pointers(arrays):
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


class RawModule:
    """Kernels for blocks of threads. As for cuLaunchKernel, arguments are places in memory."""

    def __init__(self, code, options, name_expressions):
        self.entries = {name: f"kernel_{n}" for n, name in enumerate(name_expressions)}
        self.library = compiled(WORDS + THREADS + code + "".join(
            f'extern "C" void {entry}(unsigned blocks, unsigned threads, void** given) {{ '
            f"launch({name}, blocks, threads, given); }}\n"
            for name, entry in self.entries.items()))

    def get_function(self, name):
        def kernel(grid, block, arguments):
            assert grid > (0,) and block[0] in range(32, 1025, 32)
            values = [numpy.array(x.data.ptr if isinstance(x, Array) else unwrap(x, name))
                      for x in arguments]
            given = (ctypes.c_void_p * len(values))(*pointers(values))
            getattr(self.library, self.entries[name])(*grid, *block, given)
        return kernel


class ElementwiseKernel:
    """A formula for every element: `text` is CUDA's C++, for float and double."""

    def __init__(self, inputs, results, operation, name, preamble=""):
        self.name, self.inputs = name, inputs.count(",") + 1
        self.types = dict(parameter.split()[::-1]
                          for parameter in f"{inputs}, {results}".split(", "))
        declared = ", ".join(f"{'const ' * (n < self.inputs)}{type}& {name}"
                             for n, (name, type) in enumerate(self.types.items()))
        self.text = (f"namespace {name}_ {{ typedef unsigned long long uint64; {preamble}\n"
                     "template <typename T> __device__ void of("
                     f"ptrdiff_t i, {declared}) {{ {operation}; }}\n")
        for kind in ("float", "double"):
            taken = ", ".join(f"{type}* {name}" for name, type in self.types.items())
            self.text += (
                f'extern "C" __global__ void {name}_{kind}(ptrdiff_t count, '
                f"{taken.replace('T*', kind + '*')}) {{ for (ptrdiff_t i = 0; i < count; i++) "
                f"of<{kind}>(i, {', '.join(f'{name}[i]' for name in self.types)}); }}\n")
        self.text += "}\n"

    @functools.cached_property
    def library(self):
        return compiled(WORDS + self.text)

    def __call__(self, *operands):
        assert len(operands) in (self.inputs, len(self.types)), self.name
        operands = [unwrap(operand, self.name) for operand in operands]
        dtype, = {x.dtype for x, type in zip(operands, self.types.values())
                  if type == "T" and hasattr(x, "dtype")}
        shape = numpy.broadcast_shapes(*map(numpy.shape, operands))
        results = operands[self.inputs:] or [
            numpy.empty(shape, dtype) for _ in range(len(self.types) - self.inputs)]
        assert all(result.shape == shape for result in results), self.name
        taken = [numpy.broadcast_to(numpy.asarray(x, dtype if type == "T" else type), shape)
                 for x, type in zip(operands[:self.inputs], self.types.values())]
        taken = list(map(numpy.ascontiguousarray, taken + results))
        getattr(self.library, f"{self.name}_{gpu.NUMBERS[dtype]}")(
            ctypes.c_ssize_t(results[0].size), *pointers(taken))
        for result, changed in zip(results, taken[self.inputs:]):
            result[...] = changed
        return wrap(results[0] if len(results) == 1 else tuple(results))


def gemm(handle, b_transposed, a_transposed, m, n, k, one, b, kind, b_step, b_next,
         a, a_kind, a_step, a_next, old, out, out_kind, out_step, out_next, count, compute, _):
    """cublasGemmStridedBatchedEx: out = one * op(b) op(a) + old * out, all column by column."""
    number = {gpu.CUDA_R_32F: ctypes.c_float, gpu.CUDA_R_64F: ctypes.c_double}[kind]
    assert handle == "handle" and a_kind == out_kind == kind
    assert (compute == gpu.CUBLAS_COMPUTE_64F) == (kind == gpu.CUDA_R_64F)

    def matrix(address, rows, columns, step, transposed=False):
        if transposed:
            return matrix(address, columns, rows, step).T
        assert step >= max(1, rows)
        memory = (number * (step * (columns - 1) + rows)).from_address(address)
        return numpy.ndarray((rows, columns), number, memory, strides=(size, size * step))
    size = ctypes.sizeof(number)
    factor, keep = (number.from_address(address).value for address in (one, old))
    for i in range(count):
        left = matrix(b + i * b_next * size, m, k, b_step, b_transposed)
        right = matrix(a + i * a_next * size, k, n, a_step, a_transposed)
        target = matrix(out + i * out_next * size, m, n, out_step)
        target[...] = factor * (left @ right) + (keep * target if keep else 0)


class Cuda(Library):
    """The module under CuPy's name, with what gpu.py needs of CuPy."""

    __name__ = "cupy"
    RawModule, ElementwiseKernel = RawModule, ElementwiseKernel
    cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: "handle"))


# %% Where the tests compute

STANDINS = {"standin": Library(), "cuda": Cuda()}


@contextlib.contextmanager
def device(name):
    """Inside the block the device is "cpu", "gpu", or a stand-in, which use_device takes for it."""
    before, library = (xp.module, backend.gpu.module), STANDINS.get(name)
    pretended = mock.patch.multiple(
        gpu, start=lambda tf32: library,
        cublas_of=lambda cupy: SimpleNamespace(gemmStridedBatchedEx=gemm))
    with pretended if library else contextlib.nullcontext():
        try:
            use_device("cpu" if name == "cpu" else "gpu")
            yield
        finally:
            xp.module, backend.gpu.module = before


def there_is_a_gpu():
    try:
        with device("gpu"):
            return True
    except backend.DeviceError:
        return False


CUDA = pytest.param("cuda", marks=needs_compiler)
GPU = pytest.param("gpu", marks=pytest.mark.skipif(not there_is_a_gpu(),
                                                   reason="needs CuPy and a CUDA GPU"))
on_every_gpu = pytest.mark.parametrize("where", [CUDA, GPU])
