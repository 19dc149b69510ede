"""What the tests share: the modules under test on the path, and the device they run on.

    python -m pytest                    everything on the CPU
    python -m pytest --device gpu       the same on a CUDA GPU, through CuPy
"""
import os
import pathlib
import sys

for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    # many small products: threads inside each cost more than they give
    os.environ.setdefault(_variable, "1")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest

import autograd
import backend


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "gpu"], default="cpu",
                     help="run the tests on NumPy or CuPy")


def pytest_configure(config):
    try:
        autograd.use_device(config.getoption("--device"))
    except backend.DeviceError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(autouse=True)
def the_device_stays():
    """A test that runs the command in this process may leave another one behind."""
    module = autograd.xp.module
    yield
    autograd.xp.module = module


def pytest_report_header(config):
    return f"device: {config.getoption('--device')}"
