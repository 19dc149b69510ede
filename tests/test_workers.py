"""Workers, processes that share what is meant to be shared; threads of the matrix library."""
import ctypes
import os
import pathlib
import re
import signal

import numpy
import pytest

import backend
from autograd import Tensor, leaf_gradients, tanh
from backend import DeviceError, Workers, one_blas_thread, row_parts, shared_zeros, xp

pytestmark = pytest.mark.skipif(xp.module is not numpy,
                                reason="a GPU takes the whole batch at once")


def gradient_by_parts(parts):
    """(loss, gradient) of a small sum of squares whose rows are divided among workers."""
    rng = numpy.random.default_rng(0)
    x, w = rng.normal(size=(12, 3)), Tensor(rng.normal(size=(3, 2)), requires_grad=True)
    gradients = shared_zeros((len(parts), 3, 2), numpy.float64)

    def work(rows):
        loss = (tanh(x[rows] @ w) ** 2).sum()
        (_, gradients[parts.index(rows)]), = leaf_gradients(loss)
        return loss.item()
    with Workers(parts, [work]) as workers:
        return sum(workers(work)), gradients.sum(axis=0)


def test_workers_give_the_gradient_of_one_graph_and_the_same_bits_every_time():
    parts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    loss, gradient = gradient_by_parts(parts)
    whole, expected = gradient_by_parts([slice(0, 12)])
    numpy.testing.assert_allclose(gradient, expected, rtol=1e-12)
    numpy.testing.assert_allclose(loss, whole, rtol=1e-12)
    numpy.testing.assert_array_equal(gradient_by_parts(parts)[1], gradient)


def test_a_worker_keeps_what_it_did_and_shares_only_shared_arrays():
    own, shared = numpy.zeros(3), shared_zeros((3,), numpy.float64)

    def add(part, n):
        own[part] += n
        shared[part] += n
        return own[part]
    with Workers(range(3), [add]) as workers:
        assert workers(add, 1) == [1, 1, 1] and workers(add, 2) == [3, 3, 3]
    assert own.tolist() == [3, 0, 0] and shared.tolist() == [3, 3, 3]       # part 0 is this process


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_of_a_worker_reaches_the_caller_and_the_next_call_works(bad):
    def invert(part, bad):
        return 1 / (part - bad)
    with Workers(range(3), [invert]) as workers:
        with pytest.raises(ZeroDivisionError):
            workers(invert, bad)
        assert workers(invert, -1) == [1, 1 / 2, 1 / 3]


@pytest.mark.parametrize("end", [lambda: os._exit(1), lambda: lambda: None],
                         ids=["a process dies", "an answer cannot travel"])
def test_an_answer_that_does_not_come_is_one_clear_error(end):
    def work(part):
        return end() if part else None
    with Workers(range(2), [work]) as workers:
        with pytest.raises(DeviceError, match="worker process has ended unexpectedly"):
            workers(work)


def test_an_answer_may_be_larger_than_a_pipe_holds():
    def large(part):
        return numpy.full(1 << 20, part)
    with Workers(range(3), [large]) as workers:
        assert [answer[-1] for answer in workers(large)] == [0, 1, 2]


def test_rows_are_divided_evenly_and_where_there_is_no_fork_not_at_all(monkeypatch):
    assert row_parts(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert row_parts(2, 8) == [slice(0, 1), slice(1, 2)]
    monkeypatch.setattr("sys.platform", "darwin")
    assert row_parts(7, 3) == [slice(0, 7)]


@pytest.mark.parametrize("quota, cores", [
    ("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1),
    ("9900000 100000", 4), ("nonsense", 4), (None, 4)], ids=str)
def test_the_quota_of_a_container_limits_the_cores(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(backend.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(backend, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert backend.core_count() == cores


def test_workers_do_not_mind_signals_meant_for_the_first_process():
    def signalled(part):
        if part == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return part
    with Workers(range(2), [signalled]) as workers:
        assert workers(signalled) == [0, 1]


def test_no_worker_outlives_its_block_or_an_interrupted_call():
    def interrupt(part):
        if part == 0:
            raise KeyboardInterrupt
    with Workers(range(3), [interrupt]) as workers:
        with pytest.raises(KeyboardInterrupt):
            workers(interrupt)
        assert not any(process.is_alive() for process in workers.processes)
    with Workers(range(3), []) as workers:
        assert all(process.is_alive() for process in workers.processes)
    assert workers.processes and not any(process.is_alive() for process in workers.processes)


# %% The threads of the matrix library

def test_in_a_block_and_in_workers_the_matrix_library_has_one_thread():
    """Although NumPy has been imported before; and afterwards as many as before."""
    maps = pathlib.Path("/proc/self/maps")
    loaded = re.findall("/.*openblas.*", maps.read_text()) if maps.exists() else []
    libraries = map(ctypes.CDLL, set(loaded))
    threads = [[getattr(library, name) for name in names] for library in libraries
               for names in backend.BLAS_THREADS if hasattr(library, names[0])]
    if not threads:
        pytest.skip("needs Linux and a NumPy with OpenBLAS")

    def count(part=None):
        return max(get_threads() for _, get_threads in threads)
    with one_blas_thread():             # which brings back what the other tests have
        for set_threads, _ in threads:
            set_threads(2)
        counts = [count()]
        with one_blas_thread():
            counts.append(count())
        counts.append(count())
        with Workers(range(3), [count]) as workers:
            counts.append(workers(count))
        counts.append(count())
    assert counts == [2, 1, 2, [1, 1, 1], 2]
