"""The worked examples: those in docstrings, and the one that runs through txl.py."""
import doctest
import pathlib

import numpy
import pytest

import autograd
import txl

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def on_the_cpu():
    autograd.xp.module = numpy          # conftest.py sets it back


@pytest.mark.parametrize("module, least", [(autograd, 10), (txl, 5)], ids=["autograd", "txl"])
def test_worked_examples_in_docstrings(module, least):
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried >= least


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
            assert (e["b"] + e["d"])[i, j] == e["by_distance"][i, 4 - (2 + i - j)]


def test_the_running_example_in_the_text_is_what_it_prints(capsys):
    """Lines behind a bar: those of the comments are those of the walk, in the same order."""
    text = (ROOT / "txl.py").read_text(encoding="utf-8").splitlines()
    told = [line[1:].rstrip() for line in text if line.startswith("#   |  ")]
    txl.print_example()
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line]
    assert told == printed and len(told) > 15
