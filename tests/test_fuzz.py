"""A slice of tests/fuzz.py: damaged checkpoints, texts and arguments, and runs that are killed."""
import io
import json
import resource
import zipfile

import numpy
import pytest

import fuzz
import train_shakespeare as command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return fuzz.checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def altered(checkpoint, path, change, without=None):
    """The path of a checkpoint file whose meta has gone through `change`, without one of its
    arrays."""
    with numpy.load(io.BytesIO(checkpoint)) as file:
        arrays = {name: array for name, array in file.items() if name != without}
    meta = json.loads(arrays["meta"].item())
    change(meta)
    numpy.savez(path, **{**arrays, "meta": numpy.array(json.dumps(meta))})
    return path


@pytest.mark.parametrize("cases", [fuzz.checkpoints, fuzz.inputs])
def test_damaged_input_ends_in_success_or_in_one_line(cases, tmp_path):
    ends, slowest = fuzz.run(cases(400, seed=1, folder=tmp_path))
    assert ends["accepted"] > 10 and ends["refused"] > 100
    assert slowest < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    assert fuzz.kill_and_resume(3, seed=1, folder=tmp_path) > 0


@pytest.mark.parametrize("field, value", [
    ("n_layer", 10**9), ("d_model", 10**6), ("mem_len", 10**30)])
def test_a_checkpoint_cannot_declare_a_model_larger_than_itself(
        field, value, checkpoint, run_folder):
    def enlarge(meta):
        meta["model"][field] = value
        if field in meta["settings"]:
            meta["settings"][field] = value
    with pytest.raises(command.Failure):
        fuzz.load_checkpoint(altered(checkpoint, run_folder / "checkpoint.npz", enlarge))


@pytest.mark.parametrize("meta, without", [
    ({"seconds": 10**400}, None), ({"loss_sum": 1e308}, None), ({"grad_norm": 10**30}, None),
    ({"best": True}, None), ({"step": 0}, None), ({"log": [[0] * 7]}, None),
    ({"log": [["1"] + [0.5] * 6]}, None), ({"log": {}}, None), ({"log": ""}, None),
    ({}, "memory/0/0")])
def test_a_checkpoint_without_what_training_needs_is_not_resumed(
        meta, without, checkpoint, run_folder):
    odd = altered(checkpoint, run_folder / "checkpoint.npz", lambda old: old.update(meta), without)
    with pytest.raises(command.Failure, match="is not a checkpoint of this program"):
        fuzz.load_checkpoint(odd)


@pytest.mark.parametrize("meta", [
    {"corpus": {"name": 1, "sha256": ""}}, {"corpus": {}}, {"step": -1}, {"step": 2.0},
    {"step": True}, {"step": None}, {"vocabulary": "ba"}, {"settings": {}}, {"model": {}},
    {"version": 1}], ids=str)
def test_a_checkpoint_that_is_wrong_in_itself_is_refused(meta, checkpoint, tmp_path):
    wrong = altered(checkpoint, tmp_path / "wrong.npz", lambda old: old.update(meta))
    with pytest.raises(command.Failure, match="is not a checkpoint of this program"):
        command.load(wrong)


def test_a_checkpoint_cannot_unpack_to_more_than_its_size(tmp_path):
    """Neither by compression nor by listing one part of the file again and again."""
    packed, array = io.BytesIO(), io.BytesIO()
    numpy.savez_compressed(packed, zeros=numpy.zeros(1000, numpy.float32))
    with pytest.raises(ValueError, match="declares more than it holds"):
        command.read_arrays(packed.getvalue())
    numpy.save(array, numpy.zeros(1000, numpy.float32))
    listed = io.BytesIO()
    with zipfile.ZipFile(listed, "w") as file:
        file.writestr("zeros.npy", array.getvalue())
        file.filelist.extend(file.filelist * 99)
    with pytest.raises(ValueError, match="declares more than it holds"):
        command.read_arrays(listed.getvalue())


def test_a_checkpoint_of_small_numbers_cannot_declare_a_larger_model(checkpoint, run_folder):
    """Bytes are counted, not numbers: arrays of one byte or none each are refused."""
    for dtype in (numpy.int8, numpy.dtype("V0")):
        with numpy.load(io.BytesIO(checkpoint)) as file:
            arrays = {name: array if name == "meta" else numpy.zeros(array.shape, dtype)
                      for name, array in file.items()}
        numpy.savez(run_folder / "checkpoint.npz", **arrays)
        with pytest.raises(command.Failure, match="is not a checkpoint of this program"):
            command.load(run_folder / "checkpoint.npz")
