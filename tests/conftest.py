"""What the tests share: the modules under test on the path, and the device they run on.

    python -m pytest                    everything on the CPU
    python -m pytest --device gpu       the same on a CUDA GPU, through CuPy
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest

import backend


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "gpu"], default="cpu",
                     help="run the tests on NumPy or CuPy")


def pytest_configure(config):
    try:
        backend.use_device(config.getoption("--device"))
    except backend.DeviceError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session", autouse=True)
def many_small_products_need_no_threads():
    with backend.one_blas_thread():
        yield


@pytest.fixture(autouse=True)
def the_device_stays():
    """A test that runs the command in this process may leave another one behind."""
    module = backend.xp.module
    yield
    backend.xp.module = module
