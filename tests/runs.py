"""Small runs of the command as processes, for the tests of what it prints, writes and returns."""
import pathlib
import subprocess
import sys

import numpy

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "train_shakespeare.py"
TEXT = "".join(f"Citizen {n % 7}:\nSpeak, speak; we are all resolved.\n\n" for n in range(80))
SIZES = dict(n_layer=1, n_head=2, d_model=16, d_ff=16, seq_len=16, mem_len=16, batch_size=4,
             threads=2, log_every=5, eval_every=10, lr=1e-2)
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]


def program(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(folder, *arguments, status=0, **options):
    """The finished process of the command. One that ends with another status than 0 says so
    in one line."""
    done = subprocess.run(program(*arguments), cwd=folder, capture_output=True,
                          encoding="utf-8", timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        assert done.stderr.startswith("train_shakespeare.py: ") and done.stderr.count("\n") == 1
    return done


def trained(folder, name, steps, *more, **options):
    return run(folder, "--data", "text", "--out", name, "--steps", steps, *SMALL, *more, **options)


def arrays(path):
    with numpy.load(path, allow_pickle=False) as file:
        return dict(file)
