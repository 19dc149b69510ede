"""The same code on another array library: nothing hands device data to NumPy, and the numbers
are the same.

On a machine with CuPy and a CUDA GPU the tests below that need it compare CuPy with NumPy;
elsewhere they are reported as skipped. (`python -m pytest --device gpu` runs all the other
files' tests there too.) On any machine the stand-in of standin.py shows that no step mixes the
two.
"""
import contextlib
import importlib.util
import pathlib
import subprocess
import sys

import numpy
import pytest

import autograd
import backend
import standin
import txl
from autograd import Tensor, check_gradients, to_numpy, use_device, xp
from test_command import SMALL, TEXT, arrays
from test_gradients import CASES, model_of, tensors
from train_shakespeare import Streams, evaluate

RNG = numpy.random.default_rng
TESTS = pathlib.Path(__file__).resolve().parent


def cuda_device():
    if importlib.util.find_spec("cupy") is None:
        return False
    before = xp.module
    try:
        use_device("gpu")
        return True
    except backend.DeviceError:
        return False
    finally:
        xp.module = before


needs_gpu = pytest.mark.skipif(not cuda_device(), reason="needs CuPy and a CUDA GPU")


@contextlib.contextmanager
def device(name):
    """Within the block `xp` is NumPy ("cpu"), CuPy ("gpu") or the stand-in ("standin")."""
    before = xp.module
    try:
        if name == "standin":
            xp.module = standin.Library()
        else:
            use_device(name)
        yield
    finally:
        xp.module = before


@pytest.fixture
def on_the_standin():
    with device("standin"):
        yield


# %% The stand-in is strict

def test_the_standin_refuses_what_cupy_refuses(on_the_standin):
    device, host = xp.ones(3), numpy.ones(3)
    for mistake in (lambda: device + host, lambda: host + device, lambda: host @ device,
                    lambda: numpy.exp(device), lambda: numpy.asarray(device),
                    lambda: xp.exp(host), lambda: xp.concatenate([device, host]),
                    lambda: device.__setitem__(slice(None), host),
                    lambda: xp.where(host > 0, device, 0.0)):
        with pytest.raises(TypeError):
            mistake()
    assert to_numpy(device + 1).tolist() == [2, 2, 2] and type(to_numpy(device)) is numpy.ndarray
    assert isinstance(device.sum(), standin.Array)


# %% Every operation, and everything the command does

def value_and_gradients(f, inputs):
    operands = tensors(inputs)
    y = f(*operands)
    y.backward(xp.ones_like(y.data))
    return [to_numpy(y.data)] + [to_numpy(x.grad) for x in operands]


every_case = pytest.mark.parametrize("f, inputs", [case[2:] for case in CASES],
                                     ids=[f"{name}: {what}" for name, what, *_ in CASES])


@every_case
def test_operation_on_the_standin(f, inputs):
    """Value and gradients, bit for bit those of NumPy."""
    with device("cpu"):
        numpys = value_and_gradients(f, inputs)
    with device("standin"):
        ours = value_and_gradients(f, inputs)
    for mine, expected in zip(ours, numpys):
        numpy.testing.assert_array_equal(mine, expected)


@needs_gpu
@every_case
def test_operation_on_the_gpu(f, inputs, request):
    """Finite differences on the GPU, and NumPy's value and gradients (but for dropout, whose
    random numbers differ)."""
    with device("gpu"):
        check_gradients(f, tensors(inputs))
        ours = value_and_gradients(f, inputs)
    if "dropout" not in request.node.name:
        with device("cpu"):
            numpys = value_and_gradients(f, inputs)
        for mine, expected in zip(ours, numpys):
            numpy.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-12)


# %% Kernels

def relu(x):
    return numpy.maximum(x, 0)


PLAIN = {       # each formula, in NumPy
    "scaled_sum": lambda x, w, scale: ((x + w) * scale,),
    "relu_of_sum": lambda x, w, zero: (relu(x + w),),
    "relu_gradient": lambda g, y: (numpy.where(y > 0, g, 0),),
    "squared_relu_of_sum": lambda x, w, zero: (relu(x + w), relu(x + w) ** 2),
    "squared_relu_gradient": lambda g, t: (2 * g * t,),
    "dropped": lambda x, u, p, scale: (numpy.where(u < p, 0, x * scale),
                                       numpy.where(u < p, 0, scale))}


def test_every_formula_has_a_plain_form():
    assert {formula.name for formula in backend.FORMULAS} == PLAIN.keys()


@pytest.mark.parametrize("where", ["cpu", "standin", pytest.param("gpu", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("formula", backend.FORMULAS, ids=lambda formula: formula.name)
def test_a_formula_is_its_plain_form(formula, dtype, where):
    """On numbers of both signs in [4, 1, 3] and, one axis broadcast, [4, 5, 1] arrays; `zero`,
    `scale` and `p` are numbers."""
    rng, numbers = RNG(0), {"zero": 0, "scale": 0.7, "p": 0.3}
    operands = [numpy.dtype(dtype).type(numbers[name]) if name in numbers
                else rng.uniform(-2, 2, ((4, 1, 3), (4, 5, 1))[n % 2]).astype(dtype)
                for n, name in enumerate(formula.arrays)]
    expected = PLAIN[formula.name](*operands)
    with device(where):
        theirs = [xp.array(operand) if operand.ndim else operand for operand in operands]
        answers = formula(*theirs)
        answers = answers if isinstance(answers, tuple) else (answers,)
        answers, after = [to_numpy(x) for x in answers], [to_numpy(x) for x in theirs if x.ndim]
    assert len(answers) == len(expected) == len(formula.results)
    tolerance = dict(rtol=1e-12) if dtype == "float64" else dict(rtol=1e-5, atol=1e-6)
    for ours, plain in zip(answers, expected):
        assert ours.dtype == dtype
        numpy.testing.assert_allclose(*numpy.broadcast_arrays(ours, plain), **tolerance)
    for before, unchanged in zip((x for x in operands if x.ndim), after):
        numpy.testing.assert_array_equal(before, unchanged)


# %% Training, evaluation, generation

OPTIONS = [dict(), dict(positions="learned", clamp_len=6), dict(pre_norm=False, tie_weights=True),
           dict(same_length=True, clamp_len=3, activation="squared_relu"),
           dict(dropout=0.2, attn_dropout=0.1)]


def everything(options, dtype=numpy.float64):
    """Logits, loss, memory, gradients, weights after Adam, an evaluation and a generated text,
    all as NumPy values."""
    config = txl.Config(vocab_size=7, n_layer=2, n_head=2, d_model=8, d_ff=12, mem_len=4, **options)
    model = txl.TransformerXL(config, seed=3, dtype=dtype)
    adam = txl.Adam(model.parameters(), lr=1e-2, weight_decay=0.1, clip=0.5)
    text = RNG(0).integers(7, size=200)
    streams, memory, out = Streams(text, batch_size=3, seq_len=4, mem_len=4, seed=1), None, {}
    for step in range(3):
        tokens, targets, _, _ = streams.segment(step * streams.groups)
        generator = xp.random.default_rng([1, step]) if options.get("dropout") else None
        loss, memory = txl.loss_and_memory(model, tokens, targets, memory, generator)
        loss.backward()
        for name, parameter in model.parameters().items():
            out[f"gradient {step} {name}"] = to_numpy(parameter.grad)
        out[f"loss {step}"], out[f"norm {step}"] = loss.numpy(), to_numpy(adam.step())
        adam.zero_grad()
    for name, parameter in model.parameters().items():
        out[f"weight {name}"] = parameter.numpy()
    out.update({f"memory {i}": to_numpy(m) for i, m in enumerate(memory)})
    out["logits"] = model(tokens, memory)[0].numpy()
    out["evaluation"] = evaluate(model, text[:90], 2, 4, 8, threads=1)
    out["text"] = list(txl.generate(model, [1, 2, 3, 4, 5, 6], 12, rng=RNG(2)))
    return out


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_evaluation_and_generation_on_the_standin_are_those_of_numpy(options, dtype):
    with device("standin"):
        ours = everything(options, dtype)
    with device("cpu"):
        numpys = everything(options, dtype)
    assert ours.keys() == numpys.keys()
    for name in ours:
        numpy.testing.assert_array_equal(ours[name], numpys[name], err_msg=name)


COMMAND = """import sys; sys.path[:0] = sys.argv[1:3]
import backend, standin, train_shakespeare
backend._cupy = lambda tf32: standin.Library()
sys.exit(train_shakespeare.main(sys.argv[3:]))"""


def test_a_run_moves_between_devices_and_ends_with_the_same_bits(tmp_path):
    """Trained, resumed on the other device, evaluated and continued, in both directions and on
    one device alone."""
    (tmp_path / "text").write_text(TEXT)

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(TESTS.parent), str(TESTS), "--data", "text",
             *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout
    outcomes = []
    for name, first, second in [("a", "cpu", "cpu"), ("b", "gpu", "cpu"),
                                ("c", "cpu", "gpu"), ("d", "gpu", "gpu")]:
        command("--device", first, "--out", name, "--steps", "10", *SMALL, "--dropout", "0.1",
                "--confidence-penalty", "0.1", "--threads", "1")
        command("--device", second, "--out", name, "--steps", "20", "--threads", "1", "--resume")
        state = arrays(tmp_path / name / "checkpoint.npz")
        del state["meta"]                                                       # it has the times
        table = command("--device", second, "--out", name, "--eval",
                        "--threads", "1").splitlines()[1:]
        table = [line.split()[:4] for line in table]            # without characters a second
        written = command("--device", second, "--out", name, "--generate", "Citizen",
                          "--length", "20")
        outcomes.append((state, table, written))
    (state, table, written), *others = outcomes
    assert len(table) == 6 and len(written) == len("Citizen") + 20 + 1
    for its_state, its_table, its_text in others:
        assert its_state.keys() == state.keys() and its_table == table and its_text == written
        for key in state:
            numpy.testing.assert_array_equal(its_state[key], state[key], err_msg=key)


def test_gradient_check_on_the_standin(on_the_standin):
    model, tokens, memory = model_of({}, 2, n_layer=1)
    check_gradients(lambda *_: txl.loss_and_memory(model, tokens[:, :-1], tokens[:, 1:], memory)[0],
                    model.parameters(), samples=2)


# %% CuPy itself

@needs_gpu
@pytest.mark.parametrize("dtype, rtol", [(numpy.float64, 1e-10), (numpy.float32, 1e-4)],
                         ids=["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_cupy_agrees_with_numpy(options, dtype, rtol):
    """From one seed: the same weights, loss, every gradient and Adam's steps.

    (Dropout's random numbers differ. In float32 only the first loss and its gradient are compared:
    where a gradient is nearly 0, rounding decides its sign, and Adam makes a whole step of it.)
    """
    answers = []
    for name in ("cpu", "gpu"):
        with device(name):
            answers.append(everything(options, dtype))
    for name, expected in answers[0].items():
        first = name.startswith(("loss 0", "norm 0", "gradient 0"))
        if name == "text" or dtype == numpy.float32 and not first:
            continue
        scale = numpy.abs(expected).max()
        numpy.testing.assert_allclose(answers[1][name], expected, rtol=rtol,
                                      atol=rtol * max(scale, 1e-3), err_msg=name)
