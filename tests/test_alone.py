"""What needs what: autograd.py and txl.py are complete by themselves, and a CPU needs no gpu.py."""
import functools
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that runs one of three files that have no others beside them."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("autograd.py", "txl.py", "backend.py"):
        shutil.copy(ROOT / name, folder)
    return functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True,
                             timeout=300)


def test_autograd_alone_trains_and_proves_its_gradients(alone):
    """The gradient of training is that by hand, in each of four steps, and a wrong one is seen."""
    done = alone([sys.executable, "autograd.py"])
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.split() for line in done.stdout.splitlines() if "by hand" in line]
    assert len(steps) == 4 and all(words[-4].rstrip(",") == words[-1] for words in steps)
    assert "check_gradients: d/d(input 0)[0]: backward() says" in done.stdout


def test_txl_alone_shows_the_example_the_memory_and_a_verse_learned_by_heart(alone):
    done = alone([sys.executable, "txl.py"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "   |  output         (0.91, -0.08)\n" in done.stdout
    assert "largest difference with memory" in done.stdout
    assert done.stdout.rstrip().endswith("And summer's lease hath all too short a date;")


def imported(names):
    """Which of the other modules `import names` brings in, in the project's directory."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; print(*sys.modules)"], cwd=ROOT,
        capture_output=True, text=True, check=True, timeout=60)
    others = {"fast", "gpu", "plots", "train_shakespeare", "cupy", "matplotlib"}
    return others & set(done.stdout.split())


def test_the_model_imports_nothing_faster_and_on_the_cpu_nothing_imports_the_gpu():
    assert imported("autograd, txl") == set()
    assert imported("train_shakespeare") == {"train_shakespeare", "fast", "plots"}
