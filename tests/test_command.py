"""The command around training: its options, what a finished run is good for, and that whatever
goes wrong is said in one line."""
import math
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy
import pytest

import backend
import gpu
import train_shakespeare as command
import txl
from runs import SMALL, TEXT, program, run, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the text, a run of 30 steps on it, and one whose weights are useless."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "text").write_text(TEXT)
    trained(folder, "run", 30)
    about, its = command.load(folder / "run" / "best.npz")
    its["parameters/norm.gain"][...] = its["parameters/W_out"][...] = 1e30
    command.save(folder / "useless" / "best.npz", about, its)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Calls the command in this process, in `folder`, and returns what it printed: its output,
    or where it does not end with 0 its one line."""
    monkeypatch.chdir(folder)

    def call(*arguments, status=0):
        capsys.readouterr()
        assert command.main(list(map(str, arguments))) == status
        out, error = capsys.readouterr()
        if status == 0:
            return out
        assert error.startswith("train_shakespeare.py: ") and error.count("\n") == 1, error
        return error
    return call


# %% Evaluation

def table(text):
    return {int(line.split()[0]): [float(figure.replace(",", "")) for figure in line.split()[1:]]
            for line in text.splitlines()[2:]}


def test_eval_gives_the_loss_of_the_best_model_with_several_memories(folder, call):
    rows = table(call("--out", "run", "--eval"))
    assert list(rows) == [0, 8, 16, 32, 64]     # 0, 1/2, 1, 2 and 4 times the trained length
    about, _ = command.load(folder / "run" / "checkpoint.npz")
    assert rows[16][0] == pytest.approx(about["state"]["best"], abs=2e-4)
    for nats, bits, perplexity, _ in rows.values():
        assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)


def test_a_run_remembers_where_its_text_is(folder, call, monkeypatch, tmp_path):
    (folder / "moved").write_text(TEXT)
    call("--data", "moved", "--out", "reader", "--steps", 5, *SMALL)
    monkeypatch.chdir(tmp_path)
    reader = folder / "reader"
    assert "characters of moved" in call("--out", reader, "--eval")
    call("--out", reader, "--resume", "--steps", 10)
    (folder / "moved").write_text(TEXT.upper())
    for option in ("--resume", "--eval"):
        error = call("--out", reader, option, status=2)
        assert "reads moved" in error and "another text: name it with --data FILE" in error


def test_another_text_is_evaluated_whole_and_never_trained_on(folder, call):
    (folder / "other").write_text(TEXT[:1500])
    out = call("--data", "other", "--out", "run", "--eval", "--eval-mem-len", 16)
    assert "step 30, 1,499 characters of other\n" in out
    model, vocabulary = command.load_run(folder / "run")
    nats = command.evaluate(model, command.encode(TEXT[:1500], vocabulary), 4, 16, 16, 1)
    assert list(table(out)) == [16] and table(out)[16][0] == pytest.approx(nats, abs=1e-4)
    error = call("--data", "other", "--out", "run", "--resume", status=2)
    assert "reads text" in error and "leave out --data" in error


# %% Writing

def test_generate_continues_a_text_with_the_seed_as_the_model_of_load_run_does(folder, call):
    def text(*options):
        return call("--out", "run", "--generate", "Citizen", "--length", 60, *options)
    first = text("--seed", 3)
    assert first.startswith("Citizen") and len(first) == 7 + 60 + 1
    assert first == text("--seed", 3) != text("--seed", 4)
    model, vocabulary = command.load_run(str(folder / "run"))
    tokens = txl.generate(model, command.encode("Citizen", vocabulary), 60, temperature=0)
    assert ("Citizen" + "".join(vocabulary[token] for token in tokens) + "\n"
            == text("--temperature", 0) == text("--top-k", 1) == text("--top-p", 1e-9)
            == text("--temperature", 1e-320))


def test_what_is_written_has_the_context_of_training_also_without_memory(folder, call):
    """The last query of a segment has seen memory and the segment before it. A sample and a
    text have that context, too: more than the last character."""
    out = call("--data", "text", "--out", "no-memory", "--steps", 30, *SMALL, "--mem-len", 0)
    assert list(table(call("--out", "no-memory", "--eval"))) == [0]
    model, vocabulary = command.load_run("no-memory")
    assert model.config.mem_len == 0 + 16 - 1
    assert command.load_run("run")[0].config.mem_len == 16 + 16 - 1

    def sample(**options):
        tokens = txl.generate(model, [0], 160, 0.8, **options)
        text = "".join(vocabulary[token] for token in tokens).strip()
        return "\n    " + text.replace("\n", "\n    ") + "\n"
    assert sample() in out and sample(mem_len=0) not in out

    def after(prompt, *options):
        return call("--out", "no-memory", "--generate", prompt, "--length", 40,
                    *options).removeprefix(prompt)
    assert after("zzzz:") != after("Citizen 0:")
    assert after("zzzz:", "--eval-mem-len", 0) == after("Citizen 0:", "--eval-mem-len", 0)


def test_the_last_line_is_a_command_that_runs(folder, call):
    out = call("--data", "text", "--out", "last", "--steps", 5, *SMALL)
    last = out.splitlines()[-1].removeprefix("let it write: python train_shakespeare.py ")
    assert call(*shlex.split(last), "--length", 5).startswith("Citizen 0:")


def test_a_reader_that_ends_early_is_no_error(folder):
    done = subprocess.run(
        ["sh", "-c", '"$@" | head -c 20', "sh",
         *program("--out", "run", "--generate", "Citizen", "--length", 9999)],
        cwd=folder, capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 20 and done.stdout.startswith("Citizen") and not done.stderr


def test_plot_draws_three_pictures_or_says_that_matplotlib_is_missing(folder, call, monkeypatch):
    with monkeypatch.context() as without:
        for name in ("matplotlib", "matplotlib.figure"):
            without.setitem(sys.modules, name, None)
        assert "pip install matplotlib" in call("--out", "run", "--plot", status=1)
    pytest.importorskip("matplotlib")
    call("--out", "run", "--plot")
    for picture in ("loss.png", "attention.png", "line.png"):
        assert (folder / "run" / picture).read_bytes().startswith(b"\x89PNG")


# %% Options

def test_options_from_python_are_those_of_the_command(folder):
    """None and False mean "not given", zero is a number, and _ is as good as - in a name."""
    assert command.options(steps=None, resume=False, out=None) == command.options()
    args = command.options(mem_len=0, temperature=0.0, length=0, seed=0, eval=True)
    assert (args.mem_len, args.temperature, args.length, args.seed) == (0, 0, 0, 0)
    with pytest.raises(command.Failure, match="argument: --step=1; perhaps --steps"):
        command.options(step=1)
    args = command.parse_arguments(["--n_layer", "3", "--d_model=8", "--generate=a_b --c_d"])
    assert (args.n_layer, args.d_model, args.generate) == (3, 8, "a_b --c_d")
    assert "--n-layer N" in run(folder, "--help").stdout


def test_a_tilde_is_the_home_directory(folder, call, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    call("--data=~/text", "--out=~/home", "--steps=5", *SMALL)
    assert not (folder / "~").exists() and (folder / "home" / "checkpoint.npz").exists()
    assert command.load_run("~/home")[1] == "".join(sorted(set(TEXT)))


# %% What goes wrong is said in one line

@pytest.mark.parametrize("arguments, status, message", [
    ("--steps 0", 2, "--steps: 0 is out of range"),
    ("--n-head 3", 2, "d-model must be a multiple"),
    ("--step 7", 2, "unrecognized argument: --step; perhaps --steps"),
    ("--resume --eval", 2, "not allowed with"),
    ("--out run --eval --mem-len 7", 2, "--mem-len 16, not 7: leave it out"),
    ("--out run --plot --seed 7", 2, "--seed 1, not 7: leave it out"),
    ("--out run --generate x --lr 1", 2, "--lr 0.01, not 1.0: leave it out"),
    ("--out run --resume --d-model 32", 2, "--d-model 16, not 32: leave it out"),
    ("--out run --generate ''", 2, "at least one character"),
    ("--out run --generate Cit#é", 2, "never saw '#', 'é'; it knows"),
    ("--out run --eval --data strange", 2, "never saw 'ü'; it knows"),
    (f"--mem-len {2**63}", 2, "--mem-len: 9223372036854775808 is out of range"),
    ("--seq-len 100000", 1, "too few for a batch: lower --batch-size or --seq-len"),
    ("--data nowhere", 1, "nowhere: No such file"),
    ("--data single", 1, "single symbol"),
    ("--data short", 1, "too short to train on"),
    ("--data latin", 1, "not UTF-8, from offset 3 on"),
    ("--out text", 1, "text/"),
    ("--out useless --eval", 1, "the loss is not finite"),
    ("--out useless --generate C", 1, "a logit is not finite"),
    ("--out ~no_such_user/x --eval", 1, "no_such_user/x/checkpoint.npz: train first"),
    (f"--out 'two\nlines{300 * '.'}' --eval", 1, "File name too long"),
])
def test_a_mistake_gets_one_line_that_names_it(folder, call, arguments, status, message):
    (folder / "single").write_text("a" * 5000)
    (folder / "short").write_text("abcabc")
    (folder / "strange").write_text("ü" + TEXT)
    (folder / "latin").write_bytes("caf\xe9".encode("latin-1") * 99)
    shutil.rmtree(folder / "unused", ignore_errors=True)
    arguments = shlex.split(arguments)
    if not {"--eval", "--plot", "--generate", "--resume"} & set(arguments):
        arguments = ["--data", "text", "--out", "unused", *SMALL, "--steps", "2", *arguments]
    assert message in call(*arguments, status=status)
    assert not (folder / "unused").exists()


def test_a_checkpoint_that_is_none_or_half_of_one_or_foreign_is_refused(folder, call):
    (folder / "spoiled").mkdir()
    path = folder / "spoiled" / "checkpoint.npz"

    class Trap:
        def __reduce__(self):
            return (folder / "unpickled").mkdir, ()

    def is_refused():
        for option in (["--resume"], ["--generate", "C"]):
            error = call("--out", "spoiled", *option, status=1)
            assert "is no checkpoint of this program, or damaged" in error
    for data in (b"", b"PK\x03\x04 not really", (folder / "run" / "best.npz").read_bytes()[:-99]):
        path.write_bytes(data)
        is_refused()
    for contents in ({"x": numpy.zeros(3)}, {"about": numpy.array([Trap()])},
                     {"about": numpy.array("[]")}, {"about": numpy.array('{"settings": {}}')}):
        numpy.savez(path, **contents)
        is_refused()
    assert not (folder / "unpickled").exists()
    shutil.copy(folder / "run" / "best.npz", path)              # which holds no state of training
    assert "checkpoint.npz" in call("--out", "spoiled", "--resume", "--steps", 40, status=1)


def test_of_a_changed_model_the_first_parameter_that_does_not_fit_is_named(folder, call):
    about, whole = command.load(folder / "run" / "checkpoint.npz")
    b_out, W_out = (whole[f"parameters/{name}"] for name in ("b_out", "W_out"))
    for change, message in (({"b_new": b_out}, "b_new is .* there, missing here"),
                            ({"b_out": None}, "b_out is missing there"),
                            ({"W_out": W_out.T}, r"W_out is .*30, 16.* there, .*16, 30.* here")):
        its = {**whole, **{f"parameters/{name}": array for name, array in change.items()}}
        command.save(folder / "changed" / "checkpoint.npz", about,
                     {name: array for name, array in its.items() if array is not None})
        for option in (["--resume", "--steps", 40], ["--generate", "C"]):
            assert re.search(f"does not fit this program: parameters/{message}",
                             call("--out", "changed", *option, status=1))


class OutOfMemoryError(MemoryError):
    __module__ = "cupy.cuda.memory"


def cupy(error, devices):
    """A CuPy that sees so many devices, and fails with `error` there or in its first kernel."""
    def fail(*_, **__):
        raise error
    runtime = types.SimpleNamespace(getDeviceCount=lambda: devices or fail())
    return types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime), ones=fail,
                                 float32="float32")


@pytest.mark.parametrize("module, message", [
    (None, "not installed here or does not load: pip install .*cupy-cuda13x"),
    (cupy(RuntimeError("cudaErrorNoDevice"), 0), "finds no working CUDA device.*NoDevice"),
    (cupy(OutOfMemoryError("512 bytes"), 1), "not enough free memory.*nvidia-smi"),
    (cupy(OSError("libnvrtc.so.13:\nnot found"), 1), "CuPy says OSError: libnvrtc.so.13: not"),
], ids=["no CuPy", "no device", "no memory", "CuPy's own words"])
def test_what_is_wrong_with_a_gpu_is_said_in_a_sentence(call, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(backend.gpu, "module", None)
    error = call("--device", "gpu", "--data", "text", "--out", "unused", *SMALL, status=1)
    assert re.search(message, error), error


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "not enough memory: lower the sizes of"),
    (OutOfMemoryError("512 bytes"), "the GPU has not enough free memory")], ids=["CPU", "GPU"])
def test_too_little_memory_in_a_step_is_one_line(call, monkeypatch, error, message):
    def fails(args):
        raise error
    monkeypatch.setattr(backend.gpu, "module", gpu)
    monkeypatch.setattr(command, "train", fails)
    assert message in call("--out", "unused", status=1)
