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
    an Elementwise formula     its text, in NumPy
    workers(f, x)              [f(part, x) for part in parts]
    row_parts(n, threads)      the rows 0 … n-1 in as many slices
    keep_freed_memory()        nothing that a result would show

The sections: 1. the device   2. operands   3. sums along rows   4. elementwise formulas
              5. worker processes
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
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            "--device gpu needs CuPy, which is not installed here (or does not load): "
            'pip install "cupy-cuda13x[ctk]" (CUDA 13) or "cupy-cuda12x[ctk]" (CUDA 12), '
            f"or use --device cpu [{error.__class__.__name__}]") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            "CuPy is installed but finds no working CUDA device: check that nvidia-smi lists a GPU "
            "and that its driver is new enough for this CuPy, or use --device cpu "
            f"[{error}]") from error
    try:                                    # random numbers, a product and a copy to the host
        numbers = cupy.random.default_rng(0).random((2, 2), dtype=cupy.float32)
        (numbers @ cupy.ones((2, 2), dtype=cupy.float32)).get()
    except Exception as error:              # a library that does not load, a kernel, …
        reason = f"{error.__class__.__name__}: {str(error)[:100]}".replace("\n", " ")
        raise DeviceError(
            "CuPy finds the GPU but cannot compute on it; most often it was built for another CUDA "
            'than the driver supports: reinstall it as "cupy-cuda13x[ctk]" or "cupy-cuda12x[ctk]", '
            f"or use --device cpu [{reason}]") from error
    return cupy


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
    array = xp.asarray(data)
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


# %% 3. Sums along rows
# A product with ones takes a fifth of the time of NumPy's sum over a short last axis.

def row_sums(x):
    """Sum over the last axis, which stays with size 1."""
    rows, length = math.prod(x.shape[:-1]), x.shape[-1]
    sums = x.reshape(rows, length) @ xp.ones(length, dtype=x.dtype)
    return sums.reshape(x.shape[:-1] + (1,))


def row_dots(x, y):
    """sum_j x[..., j] y[..., j]; the last axis stays with size 1."""
    return row_sums(x * y)


# %% 4. Elementwise formulas
# A GPU multiplies far faster than it reads its memory, and an operation between arrays
# reads and writes all of them. So a formula of several operations is one program there.

class Elementwise:
    """A formula for every element of its arrays, written once for NumPy and for a GPU.

    arrays    names of the arrays that are read; they broadcast
    y         name of the result. Where the text changes it in place, it is the last argument
    text      assignments of arithmetic on these names, which is Python and CUDA's C++ at once
    """

    def __init__(self, name, arrays, y, text):
        self.name, self.arrays, self.y, self.text = name, arrays.split(), y, text
        self.code = compile(text, name, "exec")

    def __call__(self, *operands):
        if xp.module is not numpy:
            return _kernel(xp.module, self)(*operands)
        names = dict(zip([*self.arrays, self.y], operands))
        exec(self.code, names)
        return names[self.y]


@functools.cache
def _kernel(library, formula):
    """The formula as a program of CuPy, which compiles it when it is first used."""
    inputs = ", ".join(f"T {name}" for name in formula.arrays)
    return library.ElementwiseKernel(inputs, f"T {formula.y}", formula.text, formula.name)


normalise_gradient = Elementwise(
    "normalise_gradient", "g z s mean_g minus_mean_g_z", "h",
    "h = z * minus_mean_g_z; h += g; h -= mean_g; h *= s")
add_to_scores = Elementwise(
    "add_to_scores", "position minus_infinity", "scores",
    "scores += position; scores += minus_infinity")
score_gradient = Elementwise(
    "score_gradient", "numerators dots", "d_scores",
    "d_scores -= dots; d_scores *= numerators")
FORMULAS = [normalise_gradient, add_to_scores, score_gradient]


# %% 5. Worker processes
# NumPy works on one core at a time in everything but large matrix products. So the rows of
# a batch are divided among processes. They are copies of this one, made by fork, and each
# builds and walks a graph of its own. (Threads would do without copies, but they take turns
# at Python's lock: two threads need 1.2 to 2.4 times as long as two processes.)
#
# Parameters and gradients are arrays of `shared_zeros`, which all processes see. No locks
# are needed: the arrays change only during a call, each process writes its own share, and
# the next call begins when all have answered.

def can_divide():
    """True where work can be divided: on the CPU under Linux. Elsewhere fork is missing or unsafe,
    and a GPU takes a whole batch at once."""
    return xp.module is numpy and sys.platform.startswith("linux")


def row_parts(batch_size, threads):
    """The rows of a batch, divided among workers as evenly as it goes: a list of slices."""
    parts = min(threads, batch_size) if can_divide() else 1
    edges = [batch_size * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


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
        for which in (signal.SIGINT, signal.SIGTERM):
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
