"""A slice of fuzz.py: damaged checkpoints, texts and arguments, and a run that is killed."""
import numpy
import pytest

import fuzz


@pytest.mark.parametrize("cases", [fuzz.checkpoints, fuzz.texts, fuzz.arguments])
def test_damaged_input_ends_in_success_or_in_one_line(cases, tmp_path):
    ends = fuzz.outcomes(cases(300, numpy.random.default_rng(1), tmp_path))
    assert ends["refused"] > 100 and ends["accepted"] > 10


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    assert fuzz.kill_and_resume(3, numpy.random.default_rng(1), tmp_path) > 0
