"""Damaged input on purpose, and sudden death: every case must end in success or in the
documented error.

    python tests/fuzz.py                10,000 damaged checkpoints, 10,000 damaged texts and
                                        argument lists
    python tests/fuzz.py --cases 500    fewer
    python tests/fuzz.py --kill 50      a run killed (SIGKILL) and resumed 50 times ends with
                                        the bits of an undisturbed one

Prints how the cases ended, the slowest and the memory taken; ends with status 1 at the first
wrong one.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_shakespeare as command

ODD = [0, -1, 1, 2.5, 1e308, 10**9, 10**30, "", "x", "1e9", None, True, [], {}, [[]],
       "é", "\x00", -0.0, 7]
ODD_ARGUMENTS = ["", "0", "-1", "1", "3", "2.5", "1e400", "nan", "inf", "-inf", "10" * 30, "x",
                 "--", "é", "\x00", "0x10", " 5", "5 ", "sinusoid", "cpu", "a/b", "1_000", "٣"]


def checkpoint(folder):
    """The bytes of a small checkpoint that can be resumed from."""
    subprocess.run([sys.executable, ROOT / "train_shakespeare.py", *small_run(folder),
                    "--steps", "3"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return (folder / "run" / "checkpoint.npz").read_bytes()


def small_run(folder):
    text = folder / "text"
    if not text.exists():
        text.write_text("".join("abcdefgh "[i * i % 9] for i in range(3000)))
    return ["--data", str(text), "--out", "run", "--n-layer", "1", "--n-head", "2",
            "--d-model", "8", "--d-ff", "8", "--seq-len", "6", "--mem-len", "5",
            "--batch-size", "4", "--log-every", "2", "--eval-every", "3", "--threads", "2"]


def damaged(data, rng):
    """Some bytes changed, cut off, repeated or removed."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 50))
        kind = rng.integers(5)
        if kind == 0:
            data[at:at + length] = rng.integers(256, size=len(data[at:at + length]),
                                                dtype=numpy.uint8).tobytes()
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at:at + length]
        else:
            del data[at:at + length]
    return bytes(data)


def altered(data, rng):
    """A whole npz file of which one thing is not what it should be."""
    with numpy.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    names = sorted(arrays)
    name = names[rng.integers(len(names))]
    kind = rng.integers(7)
    if kind < 4:
        meta = json.loads(arrays["meta"].item())
        place = meta
        while True:                                     # any value, however deep
            key = (list(place)[rng.integers(len(place))] if isinstance(place, dict)
                   else int(rng.integers(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        place[key] = ODD[rng.integers(len(ODD))]
        arrays["meta"] = numpy.array(json.dumps(meta))
    elif kind == 4:
        del arrays[name]
    elif kind == 5:
        arrays[name] = [arrays[name].astype(str), numpy.zeros((0, 3)),
                        arrays[name].reshape(-1)[:1], arrays[name].T[None],
                        numpy.array(["x"], dtype=object)][rng.integers(5)]
    else:
        arrays[name] = (numpy.full_like(arrays[name], numpy.nan)
                        if arrays[name].dtype.kind == "f" else arrays[name])
    buffer = io.BytesIO()
    numpy.savez(buffer, **arrays)
    data = buffer.getvalue()
    if rng.random() < 0.3:              # a header that declares an enormous or a negative array
        data = data.replace(b"(8, ", b"(" + [b"9", b"-"][rng.integers(2)] + b", ", 1)
        data = data.replace(b"'<f4'", b"'<f9'", rng.integers(2))
    return data


def load_checkpoint(path):
    """Continue from it, as --resume does. It lies in a run's directory as checkpoint.npz."""
    text = small_run(path.parents[1])[1]
    command.Run(command.parse_arguments(["--resume", "--data", text, "--out", str(path.parent)]))


def checkpoints(count, seed, folder):
    rng, data = numpy.random.default_rng(seed), checkpoint(folder)
    path = folder / "run" / "checkpoint.npz"
    for n in range(count):
        path.write_bytes((damaged, altered)[n % 2](data, rng))
        yield lambda: load_checkpoint(path)


def inputs(count, seed, folder):
    """Texts and argument lists, in turns."""
    rng, path = numpy.random.default_rng(seed), folder / "damaged.txt"
    options = [f"--{name.replace('_', '-')}" for name in command.SETTINGS] + [
        "--resume", "--eval", "--plot", "--generate", "--length", "--top-p", "--device",
        "--threads", "--out", "--data", "--what"]
    for n in range(count):
        if n % 2:
            path.write_bytes(damaged(
                "To be, or not to be: that is the question. é\r\n".encode() * 20, rng))

            def read(size=int(rng.integers(1, 40))):
                text, corpus = command.find_corpus(path)
                vocabulary = "".join(sorted(set(text)))
                training, held_out = command.split(command.encode(text, vocabulary))
                command.Streams(training, size, size, size, 1).segment(0)
            yield read
        else:
            arguments = [str(part) for _ in range(rng.integers(1, 6))
                         for part in (options[rng.integers(len(options))],
                                      ODD_ARGUMENTS[rng.integers(len(ODD_ARGUMENTS))])]
            yield lambda: command.parse_arguments(arguments)


def run(cases):
    """{how a case ended: how often}, and the seconds of the slowest. Any other exception than
    Failure comes through."""
    ends, slowest = collections.Counter(), 0.0
    for case in cases:
        start = time.perf_counter()
        try:
            with contextlib.redirect_stderr(io.StringIO()), numpy.errstate(all="ignore"):
                case()
            ends["accepted"] += 1
        except command.Failure as failure:
            assert "\n" not in str(failure), failure
            ends["refused"] += 1
        except SystemExit as error:                     # argparse
            assert error.code in (0, 2), error.code
            ends["refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return ends, slowest


def kill_and_resume(times, seed, folder):
    """Kill a run at random moments and resume it; its end has the bits of a run that was left
    alone. Returns the kills."""
    program = [sys.executable, ROOT / "train_shakespeare.py", *small_run(folder),
               "--steps", str(30 * times)]
    rng, out, kills = numpy.random.default_rng(seed), folder / "run", 0
    quiet = dict(cwd=folder, stdout=subprocess.DEVNULL)
    while kills < times:
        checkpoint = out / "checkpoint.npz"
        before = checkpoint.stat().st_mtime_ns if kills else 0
        process = subprocess.Popen(program + ["--resume"] * (kills > 0),
                                   stderr=subprocess.PIPE, **quiet)
        while process.poll() is None and not (checkpoint.exists()
                                              and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)                   # until it has written a checkpoint of its own
        time.sleep(rng.random() * 0.2)
        process.kill()
        error = process.communicate()[1]
        if process.returncode == 0:
            break                                       # it was finished before
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
        load_checkpoint(checkpoint)
        command.load(out / "best.npz")
        json.loads((out / "config.json").read_text())
        assert all(line.count(",") == 6 for line in (out / "log.csv").read_text().splitlines())
    subprocess.run(program + ["--resume"], check=True, **quiet)
    subprocess.run(program + ["--out", "alone"], check=True, **quiet)
    ends = []
    for name in ("run", "alone"):
        meta, arrays = command.load(folder / name / "checkpoint.npz")
        rows = [row[:5] for row in meta["log"]]         # without speed and seconds
        ends.append({**arrays, "step": meta["step"], "best": meta["best"],
                     "log": numpy.array(rows, dtype=float)})
    for name in ends[0].keys() | ends[1].keys():
        numpy.testing.assert_array_equal(ends[0][name], ends[1][name], err_msg=name)
    return kills


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill", type=int, metavar="TIMES")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if args.kill:
            kills = kill_and_resume(args.kill, args.seed, folder)
            print(f"killed and resumed {kills} times: no file was torn, and the end has "
                  "the bits of an undisturbed run")
            return
        for what, cases in (("checkpoints", checkpoints), ("texts and arguments", inputs)):
            ends, slowest = run(cases(args.cases, args.seed, folder))
            mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{what}: {dict(ends)}, the slowest {slowest:.3f} s, "
                  f"memory so far at most {mebibytes} MiB", flush=True)
            assert slowest < 1 and mebibytes < 1024


if __name__ == "__main__":
    main()
