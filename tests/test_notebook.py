"""transformer_xl.ipynb: its code cells run from top to bottom, it is stored with the outputs of
one whole run, and these are what the code gives.

python tests/notebook.py runs it in a real kernel, with real pictures.
"""
import contextlib
import io
import re
import sys
import types

import numpy
import pytest

import backend
import gpu
import notebook
import standin
from backend import on_a_gpu


class Anything:
    """Stands in for pictures and for Jupyter where they are not installed."""

    def __getattr__(self, name):
        if name.startswith("__"):           # NumPy asks for __array_struct__ and its like
            raise AttributeError(name)
        return Anything()

    def __call__(self, *arguments, **options):
        return Anything()

    def subplots(self, rows=1, columns=1, **options):
        return numpy.full((rows, columns), Anything(), dtype=object).squeeze()[()]


def run_cells(folder, device):
    """[what a code cell printed, …], of all code cells run with short settings."""
    settings, printed, namespace = notebook.short_settings(folder, device), [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(backend.xp, "module", backend.xp.module)         # the cells change it
        for name in ("matplotlib", "matplotlib.pyplot", "IPython", "IPython.display"):
            module = types.ModuleType(name)
            module.__getattr__ = lambda attribute: Anything()
            patch.setitem(sys.modules, name, module)
        for source, tags, _ in notebook.code_cells():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(source, namespace)
            printed.append(out.getvalue())
            if "settings" in tags:
                exec(settings, namespace)
    return printed


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return run_cells(tmp_path_factory.mktemp("notebook"), "gpu" if on_a_gpu() else "cpu")


def stored_text(cell):
    """What a cell printed when the notebook was stored."""
    return "".join("".join(output["text"]) for output in cell["outputs"]
                   if output["output_type"] == "stream")


def test_every_code_cell_runs_from_top_to_bottom(printed):
    assert len(printed) == len(notebook.code_cells()) > 15


def test_the_device_is_one_line_to_change(tmp_path, monkeypatch):
    """To "gpu": here the stand-in that is as strict as CuPy about NumPy's arrays."""
    asked = []
    monkeypatch.setattr(gpu, "start", lambda tf32: asked.append(tf32) or standin.Library())
    run_cells(tmp_path, "gpu")
    assert len(asked) > 3


def test_the_stored_figures_are_those_that_the_code_gives(printed):
    """Of the cells that train nothing, measure no time and print no rounding errors."""
    same = 0
    for (source, tags, cell), now in zip(notebook.code_cells(), printed):
        if "varies" in tags:
            assert bool(stored_text(cell)) == bool(now), source
        else:
            assert stored_text(cell) == now, source
            same += bool(now)
    assert same


def test_it_is_stored_whole_and_in_order_without_an_error_and_is_small():
    cells = [cell for _, _, cell in notebook.code_cells()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}          # no "error"
    drawn = [any("image/png" in output.get("data", {}) for output in cell["outputs"])
             for cell in cells]
    assert drawn == ["figure" in source or "attempt(" in source
                     for source, _, _ in notebook.code_cells()]
    assert notebook.NOTEBOOK.stat().st_size < 1_500_000


def test_it_is_stored_as_a_reader_will_see_it():
    """With the real corpus, and without warnings or the paths of whoever stored it."""
    outputs = [output for _, _, cell in notebook.code_cells() for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} == {None, "stdout"}       # not "stderr"
    text = "".join(stored_text(cell) for _, _, cell in notebook.code_cells())
    assert "corpus: Tiny Shakespeare, 1,115,394 characters" in text
    assert not re.search(r"(?<![\w.])/\w+/", text)
