"""Run transformer_xl.ipynb in a real kernel (needs nbclient, ipykernel and matplotlib).

    python tests/notebook.py                with few steps on a small text
    python tests/notebook.py --store        with its own settings; stores the outputs in it
"""
import json
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "transformer_xl.ipynb"
TEXT = "".join(f"ROMEO:\nSpeak, citizen {n % 7}; we are all resolved.\n\n" for n in range(600))


def code_cells():
    """(source, tags, cell) of the notebook's code cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", []), cell)
            for cell in cells if cell["cell_type"] == "code"]


def short_settings(folder, device="cpu"):
    """What to run after the cell with the settings: few steps, on a text in the folder."""
    text = pathlib.Path(folder, "text")
    text.write_text(TEXT)
    return f"DEVICE, DATA, STEPS, TRY_STEPS = {device!r}, {str(text)!r}, 6, 20\nuse_device(DEVICE)"


def execute(notebook, folder):
    """Run a notebook's cells in a kernel that begins in the folder."""
    import nbclient
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}}).execute()


def run_short():
    import nbformat
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        at = next(i for i, cell in enumerate(notebook.cells)
                  if "settings" in cell.metadata.get("tags", []))
        new = nbformat.v4.new_code_cell
        notebook.cells.insert(at + 1, new(short_settings(folder)))
        notebook.cells.insert(0, new(f"import sys\nsys.path.insert(0, {str(ROOT)!r})"))
        execute(notebook, folder)
    print(f"every cell of {NOTEBOOK.name} has run")


def store():
    import nbformat
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook, ROOT)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)            # when it ran
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    store() if sys.argv[1:] == ["--store"] else run_short()
