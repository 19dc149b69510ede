# %% The backend: NumPy or CuPy, and the processes that share the work
"""Where arrays are computed: on the CPU by NumPy, or on a GPU by CuPy.

Nothing here is needed to understand the paper or the gradients. The other files rely on:

    xp                      the array library: numpy, or cupy after use_device("gpu")
    gpu                     the module gpu.py, after use_device("gpu")
    to_numpy(x)             x as a NumPy array
    row_sums(x)             x.sum(axis=-1, keepdims=True)
    row_dots(x, y)          (x * y).sum(axis=-1, keepdims=True)
    leading_sums(x, n)      x.sum(axis=the first n axes)
    random_generator(seed)  xp.random.default_rng(seed)
    shared_zeros(shape, t)  xp.zeros(shape, t), which forked processes share
    workers(f, x)           [f(part, x) for part in parts]

The sections: 1. the device   2. sums   3. processes
"""
import contextlib
import ctypes
import functools
import math
import mmap
import multiprocessing
import os
import re
import signal
import sys

import numpy


# %% 1. The device
class _Chosen:
    """Stands for a module that is chosen later: xp.exp is numpy.exp or cupy.exp."""

    module = None

    def __getattr__(self, name):
        return getattr(self.module, name)


xp, gpu = _Chosen(), _Chosen()
xp.module = numpy           # CuPy has NumPy's interface: what is written against xp runs on both


class DeviceError(RuntimeError):
    """What was asked of the machine cannot be had. The message says what to do, in a sentence."""


def use_device(name, tf32=False):
    """Compute on "cpu" (NumPy) or "gpu" (CuPy) from now on. Existing arrays stay where they are.

    tf32   let the GPU round the factors of float32 products to 10 bits, which is faster

    Raises DeviceError when CuPy or a CUDA device is missing, ValueError for any other name.
    """
    if name not in ("cpu", "gpu"):
        raise ValueError(f"use_device: the device is 'cpu' or 'gpu', not {name!r}")
    if name == "cpu":
        xp.module = numpy
    else:
        import gpu as module
        gpu.module, xp.module = module, module.start(tf32)


def on_a_gpu():
    """True where CuPy computes."""
    return xp.module.__name__ == "cupy"


@contextlib.contextmanager
def computing_on_the_cpu():
    """Inside `with computing_on_the_cpu():` that is the device."""
    before, xp.module = xp.module, numpy
    try:
        yield
    finally:
        xp.module = before


def to_numpy(array):
    """The same values as a NumPy array: a copy from the GPU, or the array itself on the CPU."""
    return array.get() if hasattr(array, "get") else array


def random_generator(seed):
    """A generator whose `random(shape, dtype)` are numbers in [0, 1). seed: a list of integers."""
    return gpu.CounterGenerator(seed) if on_a_gpu() else xp.random.default_rng(seed)


# %% 2. Sums
# A product with ones takes a fifth of the time of NumPy's sum over a short last axis, half
# of that over leading axes, and on a GPU a small part of the time of CuPy's.

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


# %% 3. Processes
# NumPy works on one core at a time in everything but large matrix products. So the rows of
# a batch are divided among processes. They are copies of this one, made by fork, and each
# builds and walks a graph of its own. (Threads would do without copies, but they take turns
# at Python's lock: two threads need 1.2 to 2.4 times as long as two processes.)
#
# Parameters and gradients are arrays of `shared_zeros`, which all processes see. No locks
# are needed, because in a call each process writes its own share only, and the next call
# begins when all have answered.

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"        # microseconds of time, of every so many

# Ctrl-C, a request to end, and a terminal that was closed (unknown on Windows).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)]


def can_divide():
    """True where work can be divided: on the CPU under Linux. Elsewhere fork is missing or
    unsafe, and a GPU takes a whole batch at once."""
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
    """The rows of a batch, divided among processes as evenly as it goes: a list of slices."""
    parts = min(threads, batch_size) if can_divide() else 1
    edges = [batch_size * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


def shared_zeros(shape, dtype):
    """Zeros that processes forked from this one see as well: what one writes, all read."""
    if xp.module is not numpy:
        return xp.zeros(shape, dtype=dtype)             # on a GPU there is one process
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * numpy.dtype(dtype).itemsize or 1)
    return numpy.frombuffer(memory, dtype=dtype, count=count).reshape(shape)


class Workers(contextlib.AbstractContextManager):
    """Calls a function for several parts at once: the first part here, each other in a process.

        with Workers([rows_0, rows_1], [evaluate]) as workers:
            losses = workers(evaluate, mem_len)     # evaluate(rows_0, mem_len), and of rows_1

    Each process keeps its variables between calls. Others see only `shared_zeros` arrays.
    The first exception of a part is raised here, once all have answered. A process that has
    ended is a DeviceError.
    """

    def __init__(self, parts, functions):
        self.parts, self.functions = list(parts), list(functions)
        self.processes, self.pipes = [], []
        self.blas = one_blas_thread() if can_divide() else contextlib.nullcontext()
        self.blas.__enter__()
        for part in self.parts[1:]:
            fork = multiprocessing.get_context("fork")
            pipe, its_end = fork.Pipe()
            self.pipes.append(pipe)
            process = fork.Process(target=self._serve, args=(part, its_end), daemon=True)
            process.start()
            self.processes.append(process)
            its_end.close()

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
        except (EOFError, OSError) as error:
            raise DeviceError("a worker process has ended unexpectedly; most often the system "
                              "had no memory left") from error
        except BaseException:               # Ctrl-C: the answers would come at the next call
            self.close()
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
        self.blas.__exit__(*exception)


BLAS_THREADS = [(f"{library}_set_num_threads{suffix}", f"{library}_get_num_threads{suffix}")
                for library in ("scipy_openblas", "openblas") for suffix in ("64_", "")
                ] + [("MKL_Set_Num_Threads", "MKL_Get_Max_Threads")]


@contextlib.contextmanager
def one_blas_thread():
    """Inside the block NumPy's matrix library uses one thread: the processes take the cores.

    OPENBLAS_NUM_THREADS would do so too, but only if it was set before NumPy was imported.
    """
    given_back = []
    with contextlib.suppress(OSError):                  # of what is not Linux
        with open("/proc/self/maps") as file:
            paths = set(re.findall("/.*(?:openblas|mkl_rt).*", file.read()))
        for library in map(ctypes.CDLL, paths):
            for names in BLAS_THREADS:
                if all(hasattr(library, name) for name in names):
                    set_threads, get_threads = (getattr(library, name) for name in names)
                    given_back.append((set_threads, get_threads()))
                    set_threads(1)
    try:
        yield
    finally:
        for set_threads, count in given_back:
            set_threads(count)


def tune_malloc():
    """Tell the C library's malloc to keep freed memory for the next array.

    A training step allocates the same few hundred arrays again and again. By default glibc
    returns every large one to the kernel, and page faults cost more than arithmetic. With
    this a step of the default model takes 0.88 of the time. Without glibc it does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Older releases refuse more than 32 MiB (mallopt then returns 0).
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
