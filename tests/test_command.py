"""The command as a process, on a small text: what it prints, writes and returns."""
import contextlib
import csv
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "train_shakespeare.py"
TEXT = "".join(f"Citizen {n % 7}:\nSpeak, speak; we are all resolved.\n\n" for n in range(80))
SMALL = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--d-ff", "16",
         "--seq-len", "16", "--mem-len", "16", "--batch-size", "4", "--threads", "2",
         "--log-every", "5", "--eval-every", "10", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "text").write_text(TEXT)
    return folder


def run(folder, *arguments, status=0, **options):
    """The finished process of the command in `folder`; its exit status must be `status`."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(a if isinstance(a, bytes) else str(a) for a in arguments)],
        cwd=folder, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    return done


def trained(folder, name, steps, *more, status=0):
    return run(folder, "--data", "text", "--out", name, "--steps", steps, *SMALL, *more,
               status=status)


@pytest.fixture(scope="module")
def finished(folder):
    """A run of 30 steps: its directory and what it printed."""
    return folder / "run", trained(folder, "run", 30).stdout


def arrays(path):
    with numpy.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


# %% Training

def test_it_says_which_corpus_logs_every_few_steps_and_ends_with_three_figures(finished):
    _, out = finished
    assert f"corpus: text, {len(TEXT):,} characters, {len(set(TEXT))} different" in out
    for step in (5, 10, 15, 20, 25, 30):
        assert re.search(rf"^step +{step}/30  loss \d\.\d+  .*\d left  [\d,]+ chars/s", out,
                         re.M), step
    assert len(re.findall(r"  val \d\.\d+", out)) == 3
    nats, bits, perplexity = map(float, re.search(
        r"validation loss (\S+) nats, (\S+) bits per character, perplexity (\S+)\n"
        "after 30 steps, 0:", out).groups())
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert nats < 2.8 < math.log(len(set(TEXT)))
    assert "\r" not in out and "\x1b" not in out


def test_log_lines_and_help_fit_a_terminal_of_80_columns(folder, finished):
    _, out = finished
    help = run(folder, "--help", env={**os.environ, "COLUMNS": "80"}).stdout
    assert max(map(len, (out + help).splitlines())) <= 80


def test_it_leaves_a_log_the_configuration_and_two_checkpoints(finished):
    path, _ = finished
    names = sorted(file.name for file in path.iterdir())
    assert names == [".lock", "best.npz", "checkpoint.npz", "config.json", "log.csv"]
    with open(path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]
    assert [bool(row["val_loss"]) for row in rows] == [False, True] * 3
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    config = json.loads((path / "config.json").read_text())
    assert config["model"]["d_model"] == 16 and config["settings"]["steps"] == 30
    assert config["corpus"]["name"] == "text"
    state = arrays(path / "checkpoint.npz")
    assert {"adam/m", "adam/v", "adam/average", "memory/0/0", "memory/1/0",
            "parameters/embedding"} <= set(state)
    assert json.loads(state["meta"].item())["step"] == 30


@pytest.mark.parametrize("threads, penalty", [(1, 0.0), (3, 0.1)])
def test_the_log_is_that_of_the_plain_loop(folder, threads, penalty):
    """Forward, backward, clip, Adam, the next group's segment with the group's memory, empty
    where the text begins again. What is evaluated and kept as the best is the average of the
    weights. The confidence penalty acts in training only."""
    import train_shakespeare as command
    import txl
    from backend import to_numpy, xp
    name = f"plain{threads}"
    run(folder, "--data", "text", "--out", name, *SMALL, "--steps", "60", "--log-every", "1",
        "--eval-every", "30", "--threads", threads, "--confidence-penalty", penalty)
    with open(folder / name / "log.csv") as file:
        rows = list(csv.DictReader(file))
    log = [(float(row["loss"]), float(row["grad_norm"])) for row in rows]
    vocabulary = "".join(sorted(set(TEXT)))
    tokens = command.encode(TEXT, vocabulary)
    streams = command.Streams(tokens[:int(0.9 * len(tokens))], 4, 16, 16, seed=1)
    # the 60 steps reach a second epoch
    assert streams.groups > 1 and 40 < streams.groups * streams.segments < 58
    config = txl.Config(len(vocabulary), n_layer=1, n_head=2, d_model=16, d_ff=16, mem_len=16,
                        activation="squared_relu")
    model = txl.TransformerXL(config, seed=1)
    adam = txl.Adam(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, clip=1.0,
                    average_over=100)
    memories = [None] * streams.groups
    for step in range(60):
        x, y, group, fresh = streams.segment(step)
        loss, memories[group] = txl.loss_and_memory(
            model, x, y, None if fresh else memories[group], confidence_penalty=penalty)
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


def test_a_run_is_not_overwritten_unless_asked(folder, finished):
    before = (folder / "run" / "checkpoint.npz").read_bytes()
    assert "--resume" in trained(folder, "run", 5, status=2).stderr
    assert (folder / "run" / "checkpoint.npz").read_bytes() == before
    trained(folder, "again", 5)
    trained(folder, "again", 5, "--overwrite")


@pytest.mark.parametrize(
    "options, at",
    [([], 15), (["--positions", "learned", "--dropout", "0.2"], 15), (["--batch-size", "1"], 5)],
    ids=["sinusoid", "learned, dropout", "before every group of streams had its turn"])
def test_an_interrupted_run_resumed_ends_with_the_bits_of_an_uninterrupted_one(folder, options, at):
    name = f"resumed{len(options)}"
    trained(folder, name + "-whole", 60, *options)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--data", "text", "--out", name, "--steps", "60",
         *SMALL, *options],
        cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith(f"step {at:5}/"):
            # Ctrl-C reaches every process of the terminal
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=20) == 130 and "--resume continues" in rest
    stopped = json.loads(arrays(folder / name / "checkpoint.npz")["meta"].item())["step"]
    assert at <= stopped < 60
    run(folder, "--data", "text", "--out", name, "--resume", "--threads", "2")
    whole, resumed = (arrays(folder / path / "checkpoint.npz") for path in (name + "-whole", name))
    metas = [json.loads(state.pop("meta").item()) for state in (whole, resumed)]
    assert whole.keys() == resumed.keys()
    for key in whole:
        numpy.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)
    assert metas[0]["best"] == metas[1]["best"] and metas[0]["step"] == metas[1]["step"] == 60
    logs = [[row[:5] for row in meta["log"]] for meta in metas]  # all but tokens/s and seconds
    assert logs[0] == logs[1]


def started(folder, name, *prefix, line="step     5/"):
    """A process that trains for a long time, once it has printed the line."""
    process = subprocess.Popen(
        [*prefix, sys.executable, str(SCRIPT), "--data", "text", "--out", name, "--overwrite",
         "--steps", "100000", *SMALL], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    next(text for text in process.stdout if text.startswith(line))
    return process


def test_on_a_terminal_it_says_that_it_evaluates_and_needs_no_escape_codes(folder):
    """A terminal of 60 columns: lines that are to vanish are cut, and overwritten with spaces."""
    ours, its = os.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--data", "text", "--out", "pty",
                                "--steps", "10", *SMALL], cwd=folder, stdout=its, stderr=its,
                               env={**os.environ, "COLUMNS": "60"})
    os.close(its)
    out = b""
    with contextlib.suppress(OSError):                  # which is how a terminal ends
        while part := os.read(ours, 1 << 16):
            out += part
    os.close(ours)
    assert process.wait(timeout=20) == 0
    lines = out.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert any(re.match(r"step +10/10  loss \d\.\d+  evaluating …", line) for line in lines)
    assert " " * 59 in lines and "\x1b" not in out.decode()
    assert max(len(line) for line in lines if line.startswith("step     5/")) == 59


def test_ctrl_c_while_its_libraries_are_imported_is_quiet(folder, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, str(SCRIPT)], cwd=folder, text=True,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 130


def test_a_closed_terminal_writes_the_checkpoint_too(folder):
    process = started(folder, "hangup")
    os.killpg(process.pid, signal.SIGHUP)
    assert "stopped at step" in process.communicate(timeout=20)[0]
    assert process.returncode == 129 and (folder / "hangup" / "checkpoint.npz").exists()


def test_a_signal_that_was_ignored_before_stays_ignored(folder):
    """As with nohup, and in the background of a script."""
    process = started(folder, "nohup", "sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh")
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGINT)
    next(text for text in process.stdout if text.startswith("step    30/"))
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_two_kinds_of_signals_at_once_end_it_without_a_traceback(folder):
    for _ in range(3):
        process = started(folder, "both")
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=20)[1]
        assert process.returncode in (130, 143)


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["the process", "its group"])
def test_sigterm_writes_the_checkpoint_and_ends_with_143(folder, kill):
    process = started(folder, "term")
    began = time.monotonic()
    kill(process.pid, signal.SIGTERM)
    process.stdout.read()
    assert process.wait(timeout=20) == 143 and time.monotonic() - began < 2
    assert (folder / "term" / "checkpoint.npz").exists()


def test_a_second_ctrl_c_stops_at_once_and_leaves_no_process(folder):
    process = started(folder, "twice")
    began = time.monotonic()
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode in (-signal.SIGINT, 130) and time.monotonic() - began < 2
    process.stdout.read()       # ends when the last process that could write to it has ended
    assert time.monotonic() - began < 3


def test_a_full_disk_leaves_the_checkpoint_before_intact_and_says_so(folder):
    """As a limit on the size of files, which a checkpoint exceeds while it is being written."""
    import resource
    trained(folder, "full", 10)
    before = (folder / "full" / "checkpoint.npz").read_bytes()
    limit = len(before) // 2
    answer = run(folder, "--data", "text", "--out", "full", "--resume", "--steps", "20", status=1,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert "cannot write full/checkpoint.npz" in answer.stderr
    assert "the one before it is intact" in answer.stderr
    assert (folder / "full" / "checkpoint.npz").read_bytes() == before
    names = sorted(file.name for file in (folder / "full").iterdir())
    assert names == [".lock", "best.npz", "checkpoint.npz", "config.json", "log.csv"]
    run(folder, "--data", "text", "--out", "full", "--resume", "--steps", "20")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_does_not_end_training(folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--data", "text", "--out", "unheard", "--steps", "10",
             *SMALL],
            cwd=folder, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and (folder / "unheard" / "best.npz").exists()


def test_a_log_that_cannot_be_written_costs_a_note_and_not_the_run(folder):
    """Another program may have it open; here a directory stands in its place."""
    (folder / "no-log").mkdir()
    trained(folder, "no-log", 5)
    (folder / "no-log" / "log.csv").unlink()
    (folder / "no-log" / "log.csv").mkdir()
    out = run(folder, "--data", "text", "--out", "no-log", "--resume", "--steps", "20").stdout
    assert out.count("cannot write no-log/log.csv") == 1 and "training goes on" in out
    meta = json.loads(arrays(folder / "no-log" / "checkpoint.npz")["meta"].item())
    assert meta["step"] == 20 and len(meta["log"]) == 4


def test_a_second_run_in_the_same_directory_is_refused(folder):
    first = started(folder, "shared", line="step    10/")
    for option in ("--resume", "--overwrite"):
        answer = run(folder, "--data", "text", "--out", "shared", option, status=1).stderr
        assert "another process is training in shared" in answer
    first.kill()
    first.communicate()
    trained(folder, "shared", 5, "--overwrite")         # the lock ended with its process


def test_without_shared_memory_files_it_trains_all_the_same(folder):
    """Small containers have no /dev/shm."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\n"
         "for name in ('statvfs', 'open'):\n"
         "    def missing(path, *more, true=getattr(os, name), **options):\n"
         "        if str(path).startswith('/dev/shm'): raise FileNotFoundError(2, 'gone', path)\n"
         "        return true(path, *more, **options)\n"
         "    setattr(os, name, missing)\n"
         f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
         "import train_shakespeare\n"
         f"sys.exit(train_shakespeare.main({['--data', 'text', '--out', 'no-shm', *SMALL]!r} + "
         "['--steps', '5']))"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_file_that_waits_under_the_temporary_name_is_replaced_and_not_followed(folder):
    (folder / "linked").mkdir()
    (folder / "precious").write_text("mine")
    for name in ("best.npz", "checkpoint.npz", "log.csv", "config.json"):
        (folder / "linked" / f".{name}.tmp").symlink_to(folder / "precious")
    trained(folder, "linked", 5)
    assert (folder / "precious").read_text() == "mine"
    (folder / "lock-linked").mkdir()
    (folder / "lock-linked" / ".lock").symlink_to(folder / "precious")
    assert "cannot write to lock-linked" in trained(folder, "lock-linked", 5, status=1).stderr


@pytest.mark.parametrize("option", ["-P", "-I"])
def test_it_finds_its_modules_however_python_was_told_to_look_for_them(folder, finished, option):
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    done = subprocess.run([sys.executable, option, str(SCRIPT), "--out", "run", "--generate", "C",
                           "--length", "1"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) == 3, done.stderr


def test_ctrl_c_in_the_last_evaluation_says_that_it_is_missing(folder, monkeypatch, capsys):
    """From Python: main returns, and the handlers of signals are those of before."""
    import train_shakespeare as command
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return math.nan
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "evaluate", interrupted)
    options = ["--data", "text", "--out", "last", *SMALL, "--steps", "3", "--threads", "1"]
    assert command.main(options) == 130
    assert "stopped at step 3 of 3, before its evaluation: --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    assert "validation loss" in run(folder, "--data", "text", "--out", "last", "--resume").stdout


def test_training_from_python_is_watched_and_interrupted_and_the_model_then_writes(
        folder, monkeypatch, capsys):
    """As in a notebook: options by name, no exit, the handlers of signals those of before."""
    import train_shakespeare as command
    from txl import generate
    monkeypatch.chdir(folder)
    handlers, seen = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)], []

    def watch(run):
        seen.append(run.state.step)
        if run.state.step == 15:
            signal.raise_signal(signal.SIGINT)
    args = command.options(data="text", out="watched", steps=30, overwrite=True, n_layer=1,
                           n_head=1, d_model=8, d_ff=8, seq_len=16, mem_len=16, batch_size=4,
                           log_every=5, eval_every=20, threads=2)
    assert command.train(args, watch) == 130 and seen == [5, 10, 15]
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    model, vocabulary = command.load_run("watched")
    assert len(list(generate(model, command.encode("C", vocabulary), 5))) == 5
    args = command.options(data="text", out="watched", resume=True)
    assert command.train(args, watch) == 0 and seen == [5, 10, 15, 20, 25, 30]
    with pytest.raises(command.Failure, match="--steps: 0 is out of range"):
        command.options(steps=0)
    with pytest.raises(command.Failure, match="unrecognized arguments: --step"):
        command.options(step=1)


def test_generation_interrupted_from_python_returns_130(folder, finished, monkeypatch, capsys):
    import train_shakespeare as command

    def interrupted(*arguments):
        yield 1
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(command, "generate", interrupted)
    assert command.main(["--out", str(folder / "run"), "--generate", "C"]) == 130
    assert capsys.readouterr().out == "C" + sorted(set(TEXT))[1] + "\n"


def test_sigterm_while_pip_downloads_ends_pip_and_leaves_nothing_behind(folder, tmp_path):
    """pip is a program that writes down its process number and never answers."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)")
    (tmp_path / "tmp").mkdir()
    program = ("import sys, train_shakespeare as command\n"
               f"command.HERE = command.pathlib.Path({str(tmp_path)!r})\n"
               "def unreachable(): raise command.Failure('no network')\n"
               "command.download_tiny_shakespeare = unreachable\n"
               "sys.exit(command.main(['--out', 'unused']))")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, env={
            **os.environ, "TMPDIR": str(tmp_path / "tmp"),
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{SCRIPT.parent}"})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) == 143
    with pytest.raises(ProcessLookupError):
        for _ in range(500):                            # until the system has cleared it away
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.01)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_name_of_two_lines_is_told_in_one(folder):
    (folder / "two\nlines").write_bytes(b"\xff")
    answer = run(folder, "--data", "two\nlines", "--out", "unused", status=1)
    assert "two lines is not UTF-8" in answer.stderr


def test_resume_refuses_what_would_make_another_run(folder, finished):
    answer = run(folder, "--data", "text", "--out", "run", "--resume", "--d-model", "32", status=2)
    assert "--d-model 16, not 32" in answer.stderr
    (folder / "other").write_text(TEXT + "more")
    answer = run(folder, "--data", "other", "--out", "run", "--resume", status=2)
    assert "reads text" in answer.stderr
    answer = run(folder, "--data", "text", "--out", "nowhere", "--resume", status=1)
    assert "nothing to resume" in answer.stderr


def test_a_finished_run_is_resumed_only_for_more_steps(folder, finished):
    before = (folder / "run" / "checkpoint.npz").read_bytes()
    answer = run(folder, "--data", "text", "--out", "run", "--resume").stdout
    assert answer.splitlines() == [
        "the run in run is at step 30 already; --steps N with a larger N trains on"]
    assert (folder / "run" / "checkpoint.npz").read_bytes() == before


def test_without_memory_it_trains_and_evaluates_too(folder):
    out = trained(folder, "no-memory", 5, "--mem-len", "0").stdout
    assert "characters a step, memory 0\n" in out
    answer = run(folder, "--data", "text", "--out", "no-memory", "--eval").stdout
    assert [line.split()[0] for line in answer.splitlines()[2:]] == ["0"]


def test_learned_positions_have_a_vector_for_every_distance_met_in_training(folder):
    trained(folder, "learned", 5, "--positions", "learned", "--mem-len", "24")
    table = arrays(folder / "learned" / "checkpoint.npz")["parameters/layers.0.attention.table"]
    assert table.shape == (16 + 24, 2, 8)


def test_resume_may_train_longer(folder):
    trained(folder, "longer", 10)
    out = run(folder, "--data", "text", "--out", "longer", "--resume", "--steps", "15",
              "--threads", "1").stdout
    assert "resumed at step 10" in out and "step    15/15" in out


def test_the_same_seed_gives_the_same_bits_and_another_does_not(folder):
    for name, seed in (("seed-a", 5), ("seed-b", 5), ("seed-c", 6)):
        trained(folder, name, 5, "--seed", seed, "--dropout", "0.1")
    a, b, c = (arrays(folder / f"seed-{x}" / "checkpoint.npz")["parameters/embedding"]
               for x in "abc")
    assert (a == b).all() and (a != c).any()


def test_a_checkpoint_that_is_none_or_only_half_of_one_is_refused_in_one_line(folder, finished):
    def spoiled(name, change):
        (folder / name).mkdir(exist_ok=True)
        state = arrays(folder / "run" / "checkpoint.npz")
        meta = json.loads(state.pop("meta").item())
        change(meta, state)
        numpy.savez(folder / name / "checkpoint.npz", meta=numpy.array(json.dumps(meta)), **state)
        return run(folder, "--data", "text", "--out", name, "--resume", "--steps", "40",
                   status=1).stderr
    assert "format version 1" in spoiled("version", lambda meta, state: meta.update(version=1))
    assert "damaged ('log')" in spoiled("no-log", lambda meta, state: meta.pop("log"))
    assert "adam/m is missing" in spoiled("no-adam", lambda meta, state: state.pop("adam/m"))
    assert "settings are missing" in spoiled(
        "settings", lambda meta, state: meta["settings"].pop("lr"))
    assert "vocabulary" in spoiled("vocabulary", lambda meta, state: meta.update(vocabulary="ab"))
    assert "are not those of its model" in spoiled(
        "parameter", lambda meta, state: state.pop("parameters/b_out"))
    assert "embedding is missing or has the wrong shape" in spoiled(
        "shape", lambda meta, state: state.update(
            {"parameters/embedding": state["parameters/embedding"].T}))
    assert "its model is not that of its settings" in spoiled(
        "layers", lambda meta, state: meta["settings"].update(n_layer=7))
    assert "not finite" in spoiled(
        "nan", lambda meta, state: state["parameters/b_out"].fill(numpy.nan))
    pickled = folder / "pickled"
    pickled.mkdir(exist_ok=True)
    numpy.savez(pickled / "checkpoint.npz", meta=numpy.array([{"version": 2}], dtype=object))
    answer = run(folder, "--data", "text", "--out", "pickled", "--resume", status=1)
    assert "not a checkpoint" in answer.stderr


def test_overwriting_a_run_leaves_nothing_of_the_old_one(folder):
    trained(folder, "old", 10)
    trained(folder, "old", 5, "--overwrite", "--eval-every", "100")
    assert json.loads(arrays(folder / "old" / "best.npz")["meta"].item())["step"] == 5


# %% A trained model

def test_a_memory_longer_than_the_text_is_evaluated_with_what_there_is(folder, finished):
    longer, whole = (run(folder, "--data", "text", "--out", "run", "--eval",
                         "--eval-mem-len", M).stdout.split()[-4]
                     for M in (10**9 - 1, len(TEXT)))
    assert longer == whole


def test_a_closed_output_is_no_error(folder, finished):
    done = subprocess.run(
        f"'{sys.executable}' '{SCRIPT}' --data text --out run --eval --eval-mem-len 16 >&-",
        shell=True, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_eval_gives_the_loss_of_the_best_checkpoint(folder, finished):
    _, out = finished
    best = min(float(value) for value in re.findall(r"  val (\d\.\d+)", out))
    def table(*options):
        lines = run(folder, "--data", "text", "--out", "run", "--eval",
                    *options).stdout.splitlines()[2:]
        return {int(line.split()[0]): [float(figure.replace(",", ""))
                                       for figure in line.split()[1:]] for line in lines}
    rows = table()
    assert list(rows) == [0, 8, 16, 32, 64]     # 0, 1/2, 1, 2 and 4 times the trained length
    assert rows[16][0] == pytest.approx(best, abs=2e-4)
    for nats, bits, perplexity, speed in rows.values():
        assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
        assert speed > 0
    assert list(table("--eval-mem-len", "5")) == [5]
    assert rows[16][0] != table("--temperature", "2")[16][0] < math.log(65)
    uniform = table("--temperature", "1e9", "--eval-mem-len", "16")[16][0]
    assert uniform == pytest.approx(math.log(len(set(TEXT))), abs=1e-4)


def test_generate_continues_the_text_and_repeats_with_the_seed(folder, finished):
    def text(*options):
        return run(folder, "--out", "run", "--generate", "Citizen", "--length", "60",
                   *options).stdout
    first = text("--seed", "3")
    assert first.startswith("Citizen") and len(first) == 7 + 60 + 1
    assert first == text("--seed", "3") != text("--seed", "4")
    assert (text("--temperature", "0") == text("--top-k", "1") == text("--top-p", "1e-9")
            == text("--temperature", "1e-320"))


def test_eval_without_data_refuses_the_usual_text_for_a_run_on_another(folder, finished,
                                                                       monkeypatch, capsys):
    import train_shakespeare as command
    usual = TEXT.upper().encode()
    monkeypatch.setattr(command, "tiny_shakespeare", None)          # nothing is downloaded first
    for option in ("--eval", "--resume"):
        assert command.main(["--out", str(folder / "run"), option]) == 2
        assert "reads text (SHA-256" in capsys.readouterr().err
    monkeypatch.setattr(command, "tiny_shakespeare", lambda: usual)
    monkeypatch.setitem(command.TINY, "sha256", hashlib.sha256(usual).hexdigest())
    with pytest.raises(command.Failure, match="name that text"):
        command.find_text(command.options(eval=True, out="run"), {"corpus": {
            "name": "nine plays", "sha256": command.PLAYS["sha256"]}}, another=True)
    (folder / "shorter").write_text(TEXT[:-500])
    done = run(folder, "--data", "shorter", "--out", "run", "--eval")       # named: with a note
    assert "was trained on text, this is shorter" in done.stderr


def test_a_run_is_loaded_with_one_call(folder, finished):
    from train_shakespeare import encode, load_run
    from txl import generate
    for directory in (folder / "run", str(folder / "run")):
        model, vocabulary = load_run(directory)
        tokens = generate(model, encode("Citizen", vocabulary), 20, temperature=0)
        text = "".join(vocabulary[token] for token in tokens)
        printed = run(folder, "--out", "run", "--generate", "Citizen", "--length", "20",
                      "--temperature", "0").stdout
        assert printed == "Citizen" + text + "\n"


def test_weights_that_are_finite_but_useless_give_an_error_or_short_figures(folder, finished):
    """1e30 times 1e30: the loss is not finite. 1e20 in b_out: it is, and absurd."""
    for name, change, status in (
            ("nonsense", {"norm.gain": 1e30, "W_out": 1e30}, 1),
            ("absurd", {"b_out": numpy.linspace(0, 1e20, len(set(TEXT)))}, 0)):
        state = arrays(folder / "run" / "best.npz")
        for parameter, value in change.items():
            state["parameters/" + parameter][...] = value
        (folder / name).mkdir()
        numpy.savez(folder / name / "best.npz", **state)
        done = run(folder, "--data", "text", "--out", name, "--eval", status=status)
        assert "e+19" in done.stdout if status == 0 else "not finite" in done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert "not finite" in run(folder, "--out", "nonsense", "--generate", "C", status=1).stderr


def test_eval_on_a_text_with_characters_the_model_never_saw_is_one_line(folder, finished):
    (folder / "strange").write_text(TEXT + "ü")
    answer = run(folder, "--data", "strange", "--out", "run", "--eval", status=2)
    assert "never saw 'ü'" in answer.stderr


@pytest.mark.parametrize("text, prompt", [
    (TEXT, "Citizen 0:"), ("\ufeff\n \n" + TEXT, "Citizen 0:"),
    ("import os\r\n\r\nprint('\x1b[31m')\r\n" * 100, "import os"),
    ("a sentence that is longer than a prompt needs to be. " * 50, "a sentence that is"),
    ("--- \n---\ntitle: x\n" * 200, "title: x"), ("🙂🙃\n" * 900, "🙂🙃"),
    ("\x00\x01\x01\x00" * 900, "\x01")],
    ids=["Shakespeare", "byte order mark", "code", "one long line", "dashes", "emoji",
         "nothing to show"])
def test_the_last_line_proposes_the_texts_first_words_as_a_prompt(text, prompt):
    import train_shakespeare as command

    class Run:
        vocabulary = "".join(sorted(set(text.removeprefix("\ufeff"))))
        streams = command.argparse.Namespace(
            tokens=command.encode(text.removeprefix("\ufeff"), vocabulary))
    assert command.first_words(Run) == prompt


def test_the_last_line_is_a_command_that_runs(folder, finished):
    _, out = finished
    words = shlex.split(out.splitlines()[-1].split(": ", 1)[1])
    done = subprocess.run([sys.executable, str(SCRIPT), *words[2:], "--length", "5"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Citizen 0:")


def test_control_characters_of_a_text_do_not_reach_the_terminal_with_a_sample(folder):
    (folder / "control").write_bytes("a\r\n\x1b[2J\x9b".encode() * 600)
    out = run(folder, "--data", "control", "--out", "control-run", "--steps", "20", *SMALL).stdout
    assert "[2J" in out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


def test_generate_lists_characters_the_model_never_saw(folder, finished):
    answer = run(folder, "--out", "run", "--generate", "Cit#é", status=2)
    assert "never saw '#', 'é'" in answer.stderr
    assert "never saw" in run(folder, "--out", "run", "--generate", b"\xff", status=2).stderr


def test_plot_draws_three_pictures_or_says_that_matplotlib_is_missing(folder, finished):
    environment = dict(os.environ, PYTHONPATH=str(folder / "without"))
    (folder / "without").mkdir()
    (folder / "without" / "matplotlib.py").write_text("raise ImportError")
    answer = run(folder, "--out", "run", "--plot", env=environment, status=1)
    assert "pip install matplotlib" in answer.stderr
    try:
        import matplotlib
    except ImportError:
        return          # the sentence above is then all there is to test
    run(folder, "--data", "text", "--out", "run", "--plot")
    for picture in ("loss.png", "attention.png", "line.png"):
        assert (folder / "run" / picture).read_bytes().startswith(b"\x89PNG")
        (folder / "run" / picture).unlink()


# %% What goes wrong is said in one line

@pytest.mark.parametrize("arguments, status, message", [
    (["--steps", "0"], 2, "--steps: 0 is out of range: at least 1"),
    (["--steps", "-5"], 2, "--steps"),
    (["--batch-size", "many"], 2, "'many' is not a whole number"),
    (["--lr", "nan"], 2, "--lr"),
    (["--lr", "inf"], 2, "--lr"),
    (["--dropout", "1"], 2, "--dropout: 1 is out of range"),
    (["--n-head", "3"], 2, "d-model must be a multiple"),
    (["--device", "tpu"], 2, "--device"),
    (["--unknown"], 2, "unrecognized arguments: --unknown"),
    (["--step", "7"], 2, "unrecognized arguments: --step"),
    (["--top-p", "1.5"], 2, "more than 0 and at most 1"),
    (["--eval", "--mem-len", "7"], 2, "--mem-len has no effect with --eval"),
    (["--eval", "--temperature", "0"], 2, "at least 0.01"),
    (["--generate", "x", "--lr", "1"], 2, "--lr has no effect with --generate"),
    (["--resume", "--eval"], 2, "not allowed with"),
    (["--seq-len", "100000"], 1, "lower --batch-size or --seq-len"),
    (["--data", "nowhere"], 1, "cannot read nowhere: No such file"),
    (["--data", "."], 1, "is a directory"),
    (["--data", "single"], 1, "single symbol"),
    (["--data", "/dev/zero"], 1, "/dev/zero is no regular file"),
    (["--data", "fifo"], 1, "fifo is no regular file"),
    (["--data", ""], 2, "--data: a name is needed"),
    (["--out", ""], 2, "--out: a name is needed"),
    (["--d-model", "65536", "--d-ff", "262144", "--n-layer", "1000"], 2, "lower --batch-size"),
    (["--out", "text"], 1, "cannot write to text"),
    (["--out", "/proc/self/fd"], 1, "cannot write to /proc/self/fd"),
    (["--out", "two\nlines" + 300 * "."], 1, "name too long"),
    (["--out", "empty", "--eval"], 1, "no checkpoint in empty"),
    (["--out", "empty", "--plot"], 1, "no checkpoint in empty"),
    (["--out", "garbage", "--eval"], 1, "is not a checkpoint of this program"),
    (["--out", "garbage", "--generate", ""], 1, "is not a checkpoint of this program"),
])
def test_bad_input_gets_one_line_that_names_it(folder, arguments, status, message):
    (folder / "single").write_text("a" * 5000)
    if not (folder / "fifo").exists():
        os.mkfifo(folder / "fifo")
    (folder / "garbage").mkdir(exist_ok=True)
    (folder / "garbage" / "checkpoint.npz").write_bytes(b"PK\x03\x04 not really")
    data = [] if "--data" in arguments else ["--data", "text"]
    small = [] if {"--eval", "--plot", "--generate"} & set(arguments) else SMALL + ["--steps", "2"]
    out = [] if "--out" in arguments else ["--out", "unused"]
    assert message in run(folder, *small, *data, *out, *arguments, status=status).stderr
    assert not (folder / "unused").exists()


def test_a_machine_without_a_gpu_gets_one_sentence(folder):
    (folder / "no-cupy").mkdir(exist_ok=True)
    (folder / "no-cupy" / "cupy.py").write_text("raise ImportError")
    environment = dict(os.environ, PYTHONPATH=str(folder / "no-cupy"))
    answer = run(folder, "--device", "gpu", "--data", "text", "--out", "unused",
                 env=environment, status=1).stderr
    assert "pip install" in answer and "cupy-cuda13x" in answer


CUPY = """
import types
__version__ = "14.2.0"
float32 = "float32"
class CUDARuntimeError(RuntimeError): pass
class OutOfMemoryError(MemoryError): pass
runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1)
cuda = types.SimpleNamespace(runtime=runtime)
def ones(*_, **__): {ones}
"""


@pytest.mark.parametrize("cupy, message", [
    ("raise AttributeError('numpy has no attribute product')", "does not load with this NumPy"),
    ("raise ValueError('numpy.dtype size changed')", "does not load with this NumPy"),
    (CUPY.replace("14.2.0", "13.6.0"), "CuPy 13.6.0 is too old.*14 or newer"),
    (CUPY.format(ones="raise OutOfMemoryError('Out of memory allocating 512 bytes')"),
     "not enough free memory.*nvidia-smi"),
    (CUPY.format(ones="raise CUDARuntimeError('cudaErrorMemoryAllocation: out of memory')"),
     "not enough free memory"),
    (CUPY.format(ones="raise PermissionError(13, 'Permission denied', '/root/.cupy')"),
     "compiled kernels in /root/.cupy.*CUPY_CACHE_DIR"),
    (CUPY.format(ones="raise OSError('libnvrtc.so.13 not found')"), "built for another CUDA"),
], ids=["old CuPy", "changed NumPy", "CuPy 13", "no memory", "no memory in CUDA", "no cache",
        "another CUDA"])
def test_what_is_wrong_with_a_gpu_is_said_in_a_sentence(folder, tmp_path, cupy, message):
    """A cupy that fails as real ones do."""
    (tmp_path / "cupy.py").write_text(cupy)
    answer = run(folder, "--device", "gpu", "--data", "text", "--out", "unused",
                 env=dict(os.environ, PYTHONPATH=str(tmp_path)), status=1).stderr
    assert re.search(message, answer), answer


def test_a_gpu_that_has_no_memory_left_in_a_step_is_one_line(folder, monkeypatch, capsys):
    import train_shakespeare as command

    class OutOfMemoryError(MemoryError):            # CuPy's
        pass
    for error in (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), OutOfMemoryError("Out of memory")):
        def fails(args):
            raise error
        monkeypatch.setattr(command, "train", fails)
        assert command.main(["--out", str(folder / "unused")]) == 1
        assert "the GPU has not enough free memory" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(folder):
    trained(folder, "diverged", 10)
    state = arrays(folder / "diverged" / "checkpoint.npz")
    state["adam/m"][...] = 3e38         # the next update is infinite
    numpy.savez(folder / "diverged" / "checkpoint.npz", **state)
    before = (folder / "diverged" / "checkpoint.npz").read_bytes()
    answer = run(folder, "--data", "text", "--out", "diverged", "--resume", "--steps", "30",
                 status=1, env={**os.environ, "PYTHONWARNINGS": "ignore"}).stderr
    assert "not finite at step 15" in answer and "lower --lr" in answer
    assert (folder / "diverged" / "checkpoint.npz").read_bytes() == before


def test_a_run_that_diverges_is_told_which_option_to_lower(folder):
    for option, value in (("--lr", "1e39"), ("--weight-decay", "1e308")):
        answer = run(folder, "--data", "text", "--out", "infinite" + option, *SMALL,
                     "--steps", "1", option, value, status=1).stderr
        assert f"lower {option} than" in answer


def test_an_error_repeats_little_of_a_long_file(folder, finished):
    for name, change in (("long-error", {"log": "x" * 100_000}), ("long-key", {"vocabulary": ""})):
        state = arrays(folder / "run" / "checkpoint.npz")
        meta = {**json.loads(state["meta"].item()), **change, "settings": {"x" * 100_000: 1}}
        state["meta"] = numpy.array(json.dumps(meta))
        (folder / name).mkdir()
        numpy.savez(folder / name / "checkpoint.npz", **state)
        answer = run(folder, "--data", "text", "--out", name, "--resume", status=1).stderr
        assert len(answer) < 1100
    (folder / "many").write_text("".join(map(chr, range(256, 50_000))) * 2)
    answer = run(folder, "--data", "many", "--out", "run", "--eval", status=2).stderr
    assert "never saw" in answer and len(answer) < 1100


def test_weights_that_are_not_finite_are_not_saved(folder):
    """The loss of the last step is that before its update."""
    answer = run(folder, "--data", "text", "--out", "infinite", *SMALL, "--steps", "1",
                 "--lr", "1e39", status=1).stderr
    assert "not finite at step 1" in answer
    assert not (folder / "infinite" / "checkpoint.npz").exists()
    assert not (folder / "infinite" / "best.npz").exists()


@pytest.mark.parametrize("name", ["best.npz", "log.csv", "config.json"])
def test_a_single_file_of_a_run_is_not_overwritten_either(folder, name):
    (folder / name.split(".")[0]).mkdir()
    file = folder / name.split(".")[0] / name
    file.write_text("mine")
    answer = trained(folder, file.parent, 5, status=2).stderr
    assert "already holds a run: replace it with --overwrite" in answer and "--resume" not in answer
    assert file.read_text() == "mine"


def test_training_goes_on_when_nobody_reads_its_output_any_more(folder):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--data", "text", "--out", "piped", "--steps", "40", *SMALL],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 0 and process.stderr.read() == ""
    assert json.loads(arrays(folder / "piped" / "checkpoint.npz")["meta"].item())["step"] == 40


def test_help_shows_every_option_with_its_default(folder):
    out = run(folder, "--help").stdout
    for option in ("--device", "--data", "--out", "--resume", "--steps", "--batch-size",
                   "--seq-len", "--mem-len", "--eval-mem-len", "--n-layer", "--n-head",
                   "--d-model", "--d-ff", "--dropout", "--confidence-penalty", "--lr",
                   "--weight-decay", "--seed", "--threads", "--eval", "--generate", "--length",
                   "--temperature", "--top-k", "--top-p", "--plot"):
        assert option in out
    assert "default: 64" in out and "default: 0.003" in out


def test_a_last_step_that_was_logged_but_not_evaluated_is_evaluated_when_resumed(folder):
    """A run that ends at step 7 is evaluated there; here its log forgets the evaluation, as if it
    had been stopped after the log line, and --steps lowered since."""
    trained(folder, "lowered", 7)
    path = folder / "lowered" / "checkpoint.npz"
    state = arrays(path)
    meta = json.loads(state["meta"].item())
    loss = meta["log"][-1][1]
    meta["log"][-1][2] = None
    state["meta"] = numpy.array(json.dumps(meta))
    numpy.savez(path, **state)
    out = run(folder, "--data", "text", "--out", "lowered", "--resume").stdout
    assert "validation loss" in out and len(re.findall("^step +7/7", out, re.M)) == 1
    log = json.loads(arrays(path)["meta"].item())["log"]
    assert [row[0] for row in log] == [5, 7] and log[-1][2] is not None
    assert log[-1][1] == pytest.approx(loss, rel=1e-5)
