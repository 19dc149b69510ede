"""Training on a small text: what it prints and writes, and how it goes on after a signal, a full
disk or a loss that is not finite."""
import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest

import train_shakespeare as command
import txl
from backend import to_numpy, xp
from runs import SCRIPT, SIZES, SMALL, TEXT, arrays, program, run, trained

FILES = ["best.npz", "checkpoint.npz", "config.json", "log.csv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "text").write_text(TEXT)
    return folder


def log_of(path):
    with open(path / "log.csv") as file:
        return list(csv.DictReader(file))


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def state_of(path):
    return command.load(path / "checkpoint.npz")[0]["state"]


# %% What it prints and writes

def test_it_prints_and_writes_a_log_and_ends_with_three_figures_and_two_checkpoints(folder):
    out = trained(folder, "run", 30).stdout
    assert f"corpus: text, {len(TEXT):,} characters, {len(set(TEXT))} different" in out
    for step in range(5, 31, 5):
        assert re.search(rf"^step +{step}/30  loss \d\.\d+  .*\d left  [\d,]+ chars/s", out, re.M)
    assert len(re.findall(r"  val \d\.\d{4}  .*\n    \S", out)) == 3            # and a sample
    nats, bits, perplexity = map(float, re.search(
        r"validation loss (\S+) nats, (\S+) bits per character, perplexity (\S+)\n"
        "after 30 steps, 0:", out).groups())
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert nats < 2.8 < math.log(len(set(TEXT)))
    assert max(len(line) for line in out.splitlines() if line.startswith("step")) <= 79
    assert names_in(folder / "run") == FILES
    rows = log_of(folder / "run")
    assert [int(row["step"]) for row in rows] == list(range(5, 31, 5))
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["model"]["d_model"] == 16 and config["settings"]["steps"] == 30
    assert {"about", "adam/first", "adam/second", "adam/average", "memory",
            "parameters/embedding"} <= set(arrays(folder / "run" / "checkpoint.npz"))


@pytest.mark.parametrize("threads, penalty", [(1, 0.0), (3, 0.1)])
def test_the_log_is_that_of_the_plain_loop(folder, threads, penalty):
    """Forward, backward, clip, Adam, the next group's segment with the group's memory, empty
    where the text begins again. What is evaluated and kept as the best is the average of the
    weights. The confidence penalty acts in training only."""
    name = f"plain{threads}"
    trained(folder, name, 60, "--log-every", 1, "--eval-every", 30, "--threads", threads,
            "--confidence-penalty", penalty)
    rows = log_of(folder / name)
    log = [(float(row["loss"]), float(row["grad_norm"])) for row in rows]
    vocabulary = "".join(sorted(set(TEXT)))
    tokens = command.encode(TEXT, vocabulary)
    streams = command.Streams(tokens[:int(0.9 * len(tokens))], 4, 16, 16, seed=1)
    # The 60 steps reach a second epoch.
    assert streams.groups > 1 and 40 < streams.groups * streams.segments_per_stream < 58
    config = txl.Config(len(vocabulary), n_layer=1, n_head=2, d_model=16, d_ff=16, mem_len=16,
                        activation="squared_relu")
    model = txl.TransformerXL(config, seed=1)
    adam = txl.Adam(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, clip=1.0,
                    average_over=100)
    memories = [None] * streams.groups
    for step in range(60):
        x, y, group, segment = streams.get_batch(step)
        loss, memories[group] = txl.loss_and_memory(
            model, x, y, memories[group] if segment else None, confidence_penalty=penalty)
        loss.backward()
        norm = adam.step(txl.warmup_cosine(step, 60, 1e-2, warmup=6, final=1e-4))
        adam.zero_grad()
        assert log[step] == pytest.approx((loss.item(), float(norm)), rel=2e-3), step
    best = arrays(folder / name / "best.npz")
    with adam.averaged():
        val_loss = command.evaluate(model, tokens[len(streams.tokens):], 4, 16, 16, 1)
        assert float(rows[-1]["val_loss"]) == pytest.approx(val_loss, rel=1e-3)
        # On a GPU these are another device's steps. Where a gradient is nearly 0, signs differ.
        for kept, array in command.parameter_arrays(model).items() if xp.module is numpy else ():
            numpy.testing.assert_allclose(best[kept], to_numpy(array), rtol=0.02, atol=2e-3)


def on_a_terminal(folder, *arguments):
    """(exit status, what was sent to the terminal, the rows that it shows at the end)."""
    ours, its = os.openpty()
    process = subprocess.Popen(program("--data", "text", *SMALL, *arguments), cwd=folder,
                               stdout=its, stderr=its)
    os.close(its)
    sent = b""
    with contextlib.suppress(OSError):                  # which is how a terminal ends
        while part := os.read(ours, 1 << 16):
            sent += part
    os.close(ours)
    sent, rows = sent.decode(), []
    for line in sent.removesuffix("\r\n").split("\r\n"):
        row = ""
        for part in line.split("\r"):                   # each is written over the last one
            row = part + row[len(part):]
        rows.append(row.rstrip())
    return process.wait(timeout=20), sent, rows


def test_on_a_terminal_the_next_line_takes_the_place_of_one_that_is_not_to_be_kept(folder):
    status, sent, rows = on_a_terminal(folder, "--out", "pty", "--steps", 20)
    assert status == 0 and "\x1b" not in sent
    steps = [row for row in rows if row.startswith("step ")]
    assert [row.split()[1] for row in steps] == ["10/20", "20/20"]
    assert all("  val " in row and "  lr " not in row for row in steps)
    assert [len(line) for line in sent.split("\r") if line.startswith("step    15/20")] == [79]
    status, _, rows = on_a_terminal(folder, "--out", "pty-diverged", "--steps", 2000,
                                    "--lr", 1e10, "--log-every", 1)
    assert status == 1 and rows[-1].startswith("train_shakespeare.py: ")


def test_what_is_no_terminal_gets_utf_8_whatever_else_is_set(folder):
    (folder / "cyrillic").write_text("Быть или не быть, вот в чём вопрос.\n" * 100, "utf-8")
    latin = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    out = run(folder, "--data", "cyrillic", "--out", "быть", *SMALL, "--steps=5", env=latin).stdout
    assert 'let it write: python train_shakespeare.py --generate "Быть или не быть' in out
    assert run(folder, "--out", "быть", "--generate", "Быть", "--length", 5,
               env=latin).stdout.startswith("Быть")
    assert "never saw 'Q'; it knows '\\n ,.Б" in run(
        folder, "--out", "быть", "--generate", "Q", env=latin, status=2).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_that_imported_numpy_first_trains_with_one_blas_thread_a_process(folder):
    code = f"""import numpy, ctypes, re, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from backend import BLAS_THREADS
from train_shakespeare import options, train
def threads(run=None):
    paths = set(re.findall(r"/\\S*(?:openblas|mkl_rt)\\S*", open("/proc/self/maps").read()))
    print("BLAS", [getattr(library, get)() for library in map(ctypes.CDLL, sorted(paths))
                   for _, get in BLAS_THREADS if hasattr(library, get)])
threads()
train(options(data="text", out="blas", steps=5, **{SIZES!r}), threads)
threads()"""
    environment = {name: value for name, value in os.environ.items()
                   if not name.endswith("_NUM_THREADS")}
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, text=True,
                         capture_output=True, check=True, timeout=60).stdout
    before, during, after = map(json.loads, re.findall("^BLAS (.*)$", out, re.M))
    assert set(during) <= {1} and after == before


# %% Stopping and going on

@pytest.mark.parametrize("options, at", [
    # The last stops before every group of streams had its turn.
    ({}, 17), (dict(positions="learned", dropout=0.2), 17), (dict(batch_size=1), 6)], ids=str)
def test_an_interrupted_run_resumed_ends_with_the_bits_of_an_uninterrupted_one(
        folder, monkeypatch, options, at):
    """The signal comes in the middle of a step, between two entries of the log."""
    monkeypatch.chdir(folder)
    settings, name = {"data": "text", "steps": 60, **SIZES, **options}, f"resumed{len(options)}"
    assert command.train(command.options(out=name + "-whole", **settings)) == 0

    def interrupted(step, *more, **named):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return txl.warmup_cosine(step, *more, **named)
    monkeypatch.setattr(command, "warmup_cosine", interrupted)
    assert command.train(command.options(out=name, **settings)) == 143
    assert state_of(folder / name)["step"] == at + 1
    assert command.train(command.options(out=name, resume=True, threads=2)) == 0
    (whole, whole_arrays), (resumed, resumed_arrays) = (
        command.load(folder / path / "checkpoint.npz") for path in (name + "-whole", name))
    for key in whole_arrays:
        numpy.testing.assert_array_equal(whole_arrays[key], resumed_arrays[key], err_msg=key)
    if "positions" in options:                  # a vector for every distance met in training
        assert whole_arrays["parameters/layers.0.attention.table"].shape == (16 + 16, 2, 8)
    for about in (whole, resumed):              # all but characters a second and seconds
        about["state"]["log"] = [entry[:5] for entry in about["state"]["log"]]
        del about["state"]["seconds"]
    assert (whole, whole_arrays.keys()) == (resumed, resumed_arrays.keys())


def test_a_finished_run_is_resumed_only_for_more_steps(folder):
    trained(folder, "longer", 10)
    assert run(folder, "--out", "longer", "--resume").stdout.splitlines() == [
        "the run in longer is at step 10 already; --steps N with a larger N trains on"]
    out = run(folder, "--out", "longer", "--resume", "--steps", 15, "--threads", 1).stdout
    assert "resumed at step 10" in out and "step    15/15" in out


def started(folder, name, prefix=()):
    """A process that trains for a long time, once it has printed the line of step 5. os.killpg
    reaches all its processes, as Ctrl-C does, also where tests in the background ignore that."""
    def heed():
        for which in (signal.SIGINT, signal.SIGHUP):
            signal.signal(which, signal.SIG_DFL)
    process = subprocess.Popen(
        [*prefix, *program("--data", "text", "--out", name, "--steps", 100_000, *SMALL)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed)
    next(text for text in process.stdout if text.startswith("step     5/"))
    return process


@pytest.mark.parametrize("kill, name, times", [
    ("kill", "SIGTERM", 1), ("killpg", "SIGINT", 1), ("killpg", "SIGTERM", 1),
    ("killpg", "SIGHUP", 1), ("killpg", "SIGHUP", 2)])
def test_the_first_signal_writes_the_checkpoint(folder, kill, name, times):
    """To the process or to its group. A terminal that is closed may say so twice: the system
    does, and the shell on its own behalf."""
    out, which = f"{kill}-{name}-{times}", getattr(signal, name)
    process = started(folder, out)
    began = time.monotonic()
    for _ in range(times):
        getattr(os, kill)(process.pid, which)
        time.sleep(0.001)
    assert "stopped at step" in process.communicate(timeout=20)[0]
    assert process.returncode == 128 + which and time.monotonic() - began < 10
    assert state_of(folder / out)["step"] >= 5


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_signal_stops_at_once_and_leaves_no_process(folder, second):
    process = started(folder, "second-" + second)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, getattr(signal, second))
    _, error = process.communicate(timeout=20)      # ends with the last of its processes
    assert "Traceback" not in error and time.monotonic() - began < 10
    assert process.returncode in (130, 143, -signal.SIGTERM)


def test_a_signal_that_was_ignored_before_stays_ignored(folder):
    """As with nohup, and in the background of a script."""
    process = started(folder, "nohup", prefix=["sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh"])
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGINT)
    next(text for text in process.stdout if text.startswith("step    30/"))
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_training_from_python_is_watched_and_interrupted_and_resumed(folder, monkeypatch):
    """As in a notebook: no exit, and the handlers of signals are those of before. A directory
    that vanishes meanwhile is made again."""
    monkeypatch.chdir(folder)
    handlers, seen = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)], []

    def watch(run):
        seen.append(run.state.step)
        if run.state.step == 5:
            shutil.rmtree(run.out)
        if run.state.step == 15:
            signal.raise_signal(signal.SIGTERM)
    args = command.options(data="text", out="watched", steps=30, **SIZES)
    assert command.train(args, watch) == 143 and seen == [5, 10, 15]
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    assert command.train(command.options(out="watched", resume=True), watch) == 0
    assert seen == [5, 10, 15, 20, 25, 30] and names_in(folder / "watched") == FILES


# %% Files

def test_a_run_is_not_overwritten_unless_asked_and_then_nothing_of_it_is_left(folder):
    for name in FILES:
        (folder / f"only-{name}").mkdir()
        (folder / f"only-{name}" / name).write_text("mine")
        error = trained(folder, f"only-{name}", 5, status=2).stderr
        assert "already holds a run" in error and "--overwrite" in error
        assert (folder / f"only-{name}" / name).read_text() == "mine"
    trained(folder, "only-best.npz", 1, "--overwrite", "--lr=1e39", status=1)      # no new best
    assert names_in(folder / "only-best.npz") == ["config.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_leaves_the_checkpoint_before_intact_and_says_so(folder):
    """As a limit on the size of files, which a checkpoint exceeds while it is being written."""
    import resource
    trained(folder, "full", 10)
    before = (folder / "full" / "checkpoint.npz").read_bytes()
    limit = len(before) // 2
    error = run(folder, "--out", "full", "--resume", "--steps", 20, status=1,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).stderr
    assert "cannot write full/checkpoint.npz" in error and "the one before it is intact" in error
    assert (folder / "full" / "checkpoint.npz").read_bytes() == before
    assert names_in(folder / "full") == FILES
    run(folder, "--out", "full", "--resume", "--steps", 20)


@pytest.mark.parametrize("redirection", ["| head -n 1", ">/dev/full", ">&-"])
def test_training_goes_on_when_nobody_reads_its_output(folder, redirection):
    name = "unread" + redirection[1]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh",
         *program("--data", "text", "--out", name, "--steps", 10, *SMALL)],
        cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and state_of(folder / name)["step"] == 10


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder):
    trained(folder, "diverged", 10)
    path = folder / "diverged" / "checkpoint.npz"
    about, state = command.load(path)
    state["adam/first"][...] = 3e38             # the next update is infinite
    command.save(path, about, state)
    before = path.read_bytes()
    error = run(folder, "--out", "diverged", "--resume", "--steps", 30, status=1).stderr
    assert "not finite at step 15" in error and "lower --lr" in error
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", ["--lr=1e39", "--weight-decay=1e308"])
def test_weights_that_are_not_finite_are_not_saved(folder, option):
    """The loss of the last step is that before its update."""
    error = trained(folder, "infinite" + option, 1, option, status=1).stderr
    assert "not finite at step 1" in error and "lower --lr or --weight-decay" in error
    assert names_in(folder / ("infinite" + option)) == ["config.json"]
