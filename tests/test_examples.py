"""What the files show when they are run or read: the worked examples in docstrings and the
walks through them."""
import doctest
import functools
import pathlib
import subprocess
import sys

import numpy
import pytest

import autograd
import txl

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def on_the_cpu():
    autograd.xp.module = numpy          # conftest.py sets it back


@pytest.mark.parametrize("module, least", [(autograd, 8), (txl, 4)], ids=["autograd", "txl"])
def test_worked_examples_in_docstrings(module, least):
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried >= least


@functools.cache
def walk_through(file):
    return subprocess.run([sys.executable, file], cwd=ROOT, check=True, capture_output=True,
                          text=True, timeout=60).stdout


def test_the_walk_through_autograd():
    out = walk_through("autograd.py")
    assert out.count("[ 32. 100. 216.]") == 2
    assert "check_gradients: d/d(input 0)[0]: backward() says" in out


def test_the_walk_through_the_model():
    out = walk_through("txl.py")
    assert "largest difference with memory" in out
    assert out.rstrip().endswith("And summer's lease hath all too short a date;")


def test_the_running_example_is_section_4_in_numpy():
    """The terms add up to the score, softmax makes weights of it, the weights mix the states."""
    e = txl.running_example()
    score = (e["a"] + e["b"] + e["c"] + e["d"]) / numpy.sqrt(2)
    weights = numpy.where(e["hidden"], 0, numpy.exp(score))
    weights /= weights.sum(axis=1, keepdims=True)
    numpy.testing.assert_allclose(e["score"], score, rtol=1e-12)
    numpy.testing.assert_allclose(e["weights"], weights, rtol=1e-12)
    numpy.testing.assert_allclose(e["output"], weights @ e["states"], rtol=1e-12)
    for i in range(3):                                  # the columns of (b) + (d) are distances
        for j in range(3 + i):
            distance = 2 + i - j
            assert (e["b"] + e["d"])[i, j] == e["by_distance"][i, 4 - distance]


def test_the_running_example_in_the_text_is_what_it_prints():
    """Lines behind a bar: those of the comments are those of the walk, in the same order."""
    text = (ROOT / "txl.py").read_text(encoding="utf-8").splitlines()
    told = [line[1:].rstrip() for line in text if line.startswith("#   |  ")]
    printed = [line.rstrip() for line in walk_through("txl.py").splitlines()
               if line.startswith("   |  ")]
    assert told == printed and len(told) > 15
