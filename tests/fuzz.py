"""Damaged input and sudden death: each case must end in success, or in one line that says why not.

    python tests/fuzz.py                10,000 damaged checkpoints, texts and lists of arguments
    python tests/fuzz.py --kill 50      a run that is killed (SIGKILL) and resumed 50 times ends
                                        with the bits of an undisturbed one
"""
import argparse
import collections
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import train_shakespeare as command
from runs import SIZES, SMALL, TEXT, program, run, trained

ODD = ["", "0", "-1", "1", "3", "2.5", "1e400", "nan", "-inf", "10" * 30, "x", "--", "é", "\x00",
       "0x10", " 5", "sinusoid", "cpu", "a/b", "~x/y", "1_000", "٣"]


def damaged(data, rng):
    """Some bytes changed, cut off, repeated or removed; as often near the end as anywhere."""
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(max(0, len(data) - 3000) * rng.integers(2), len(data) + 1))
        end = at + int(rng.integers(1, 50))
        piece = data[at:end]
        data = [data[:at] + rng.bytes(len(piece)) + data[end:], data[:at],
                data[:at] + piece + data[at:], data[:at] + data[end:]][rng.integers(4)]
    return data


def checkpoints(count, rng, folder):
    """Continue from a damaged checkpoint, as --resume does. Every tenth is whole."""
    (folder / "text").write_text(TEXT)
    trained(folder, "whole", 3)
    data, path = (folder / "whole" / "checkpoint.npz").read_bytes(), folder / "checkpoint.npz"
    for n in range(count):
        path.write_bytes(damaged(data, rng) if n % 10 else data)
        yield lambda: command.Run(command.options(resume=True, out=folder))


def texts(count, rng, folder):
    """Begin to train on a damaged text."""
    path = folder / "damaged"
    for _ in range(count):
        path.write_bytes(damaged("To be, or not to be: that is it. é\r\n".encode() * 20, rng))
        yield lambda: command.Run(command.options(
            data=path, out=folder / "new", **{**SIZES, "seq_len": rng.integers(1, 40)}))


def arguments(count, rng, folder):
    options = [f"--{name.replace('_', '-')}" for name in command.SETTINGS] + (
        "--resume --eval --plot --generate --length --top-p --device --out --data --what".split())
    for _ in range(count):
        argv = [str(rng.choice(words)) for _ in range(rng.integers(1, 6))
                for words in (options, ODD)]
        yield lambda: command.parse_arguments(argv)


def outcomes(cases):
    """How often cases are accepted and refused. Any exception but a Failure comes through."""
    ends = collections.Counter()
    for case in cases:
        try:
            case()
            ends["accepted"] += 1
        except command.Failure:                 # main makes one line of it
            ends["refused"] += 1
    return ends


def kill_and_resume(times, rng, folder):
    """Kill a run at random moments and resume it; its end has the bits of a run that was left
    alone. Returns the kills."""
    (folder / "text").write_text(TEXT)
    steps, out, kills = 60 * times, folder / "run", 0
    checkpoint = out / "checkpoint.npz"
    while kills < times:
        before = checkpoint.stat().st_mtime_ns if kills else 0
        process = subprocess.Popen(
            program("--out", "run", "--steps", steps,
                    *(["--resume"] if kills else ["--data", "text", *SMALL])),
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (checkpoint.exists()
                                              and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)                   # until it has written a checkpoint of its own
        time.sleep(rng.random() * 0.2)
        process.kill()
        error = process.communicate()[1]        # ends with the last of its processes
        if process.returncode == 0:
            break                               # it was finished before
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
        command.load_run(out)
        assert all(line.count(b",") == 6 for line in (out / "log.csv").read_bytes().splitlines())
    run(folder, "--out", "run", "--steps", steps, "--resume")
    trained(folder, "alone", steps)
    (about, arrays), (_, expected) = (command.load(folder / name / "checkpoint.npz")
                                      for name in ("run", "alone"))
    assert about["state"]["step"] == steps and arrays.keys() == expected.keys()
    for name in expected:
        numpy.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    return kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in (("--cases", 10_000), ("--seed", 0), ("--kill", 0)):
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    rng = numpy.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if args.kill:
            print("killed and resumed:", kill_and_resume(args.kill, rng, folder))
        for cases in () if args.kill else (checkpoints, texts, arguments):
            print(cases.__name__, dict(outcomes(cases(args.cases, rng, folder))))
