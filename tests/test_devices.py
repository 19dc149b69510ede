"""The same code on another array library: nothing hands device data to NumPy, and the numbers
are the same. On any machine by the stand-ins of standin.py; with CuPy and a CUDA GPU by these
too, with `--device gpu` or without. (It makes the other files' tests run on the GPU.)
"""
import json
import signal

import numpy
import pytest

import fast
import train_shakespeare
import txl
from autograd import Tensor, check_gradients, to_numpy
from backend import xp
from runs import SIZES, TEXT, arrays
from standin import CUDA, GPU, Array, device, on_every_gpu
from test_gradients import CASES, answers, each, tensors

RNG = numpy.random.default_rng
EVERYWHERE = pytest.mark.parametrize("where", ["standin", CUDA, GPU])


# %% The stand-in is strict

def test_the_standin_refuses_what_cupy_refuses():
    with device("standin"):
        ours, host = xp.ones(3), numpy.ones(3)
        for mistake in (lambda: ours + host, lambda: host + ours, lambda: host @ ours,
                        lambda: numpy.exp(ours), lambda: numpy.asarray(ours),
                        lambda: xp.exp(host), lambda: xp.concatenate([ours, host]),
                        lambda: ours.__setitem__(slice(None), host),
                        lambda: xp.where(host > 0, ours, 0.0)):
            with pytest.raises(TypeError):
                mistake()
        assert to_numpy(ours + 1).tolist() == [2, 2, 2] and type(to_numpy(ours)) is numpy.ndarray
        assert isinstance(ours.sum(), Array)


# %% Every operation

@EVERYWHERE
@each(CASES)
def test_operation(f, inputs, where, request):
    """Finite differences, and on transposed memory NumPy's value and gradients: on the stand-in
    bit for bit. (CuPy's generator has other numbers for dropout.)"""
    def on_transposed_memory():
        return answers(f, [Tensor(xp.asarray(x.data.T, order="C").T, True)
                           for x in tensors(inputs)])
    with device(where):
        check_gradients(f, tensors(inputs))
        ours = on_transposed_memory()
    with device("cpu"):
        numpys = on_transposed_memory()
    rtol, atol = (0, 0) if where == "standin" else (1e-10, 1e-12)
    if where != "gpu" or "dropout" not in request.node.name:
        for mine, expected in zip(ours, numpys):
            numpy.testing.assert_allclose(mine, expected, rtol, atol)


# %% Training, evaluation, generation

MODELS = [(fast, dict()), (fast, dict(positions="learned", clamp_len=6)),
          (fast, dict(pre_norm=False)), (fast, dict(same_length=True, clamp_len=3)),
          (fast, dict(activation="squared_relu", tie_weights=True)),
          (fast, dict(dropout=0.2, attn_dropout=0.1)), (txl, dict())]


def everything(module, options, dtype):
    """Logits, loss, memory, gradients, weights after Adam, an evaluation and a generated text,
    all as NumPy values."""
    config = txl.Config(7, n_layer=2, n_head=2, d_model=8, d_ff=12, mem_len=4, **options)
    model = module.TransformerXL(config, seed=3, dtype=dtype)
    optimiser = fast.FlatAdam if module is fast else txl.Adam
    adam = optimiser(model.parameters(), lr=1e-2, weight_decay=0.1, clip=0.5, average_over=9)
    text = RNG(0).integers(7, size=200)
    streams = train_shakespeare.Streams(text, batch_size=3, seq_len=4, mem_len=4, seed=1)
    memory, out = None, {}
    for step in range(3):
        tokens, targets, _, _ = streams.get_batch(step * streams.groups)
        generator = xp.random.default_rng([1, step]) if config.dropout else None
        loss, memory = txl.loss_and_memory(model, tokens, targets, memory, generator, 0.1)
        loss.backward()
        for name, parameter in model.parameters().items():
            out[f"gradient {step} {name}"] = to_numpy(parameter.grad)
        out[f"loss {step}"], out[f"norm {step}"] = loss.numpy(), to_numpy(adam.step())
        adam.zero_grad()
    for name, parameter in model.parameters().items():
        out[f"weight {name}"] = parameter.numpy()
        out[f"average {name}"] = to_numpy(adam.average[name])
    out.update({f"memory {i}": to_numpy(m) for i, m in enumerate(memory)})
    out["logits"] = model(tokens, memory)[0].numpy()
    out["evaluation"] = train_shakespeare.evaluate(model, text[:90], 2, 4, 8, threads=1)
    out["text"] = list(txl.generate(model, [1, 2, 3, 4, 5, 6], 12, rng=RNG(2)))
    return out


@EVERYWHERE
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
@pytest.mark.parametrize("module, options", MODELS, ids=[
    f"{module.__name__} {options}" for module, options in MODELS])
def test_all_that_a_model_does_is_what_it_does_on_numpy(module, options, dtype, where):
    """From one seed: on the stand-in with the same bits.

    On a GPU in float32 only the first loss and its gradient are compared: where a gradient is
    nearly 0, rounding decides its sign, and Adam makes a whole step of it.
    """
    if where == "gpu" and "dropout" in options:
        pytest.skip("CuPy's generator has other numbers")
    with device("cpu"):
        numpys = everything(module, options, dtype)
    with device(where):
        ours = everything(module, options, dtype)
    rtol = 0 if where == "standin" else 1e-10 if dtype == numpy.float64 else 1e-4
    for name, expected in numpys.items():
        if rtol < 1e-4 or name.startswith(("loss 0", "norm 0", "gradient 0")):
            atol = rtol * max(numpy.abs(expected).max(), 1e-3)
            numpy.testing.assert_allclose(ours[name], expected, rtol, atol, err_msg=name)


# %% The command

def outcome(folder):
    """A checkpoint's arrays, its lowest loss, and its log without times."""
    found = arrays(folder / "checkpoint.npz")
    state = json.loads(found.pop("about").item())["state"]
    return {**found, "best": state["best"], "log": [entry[:5] for entry in state["log"]]}


def train(where, watch=None, **given):
    """The status of a run. where: what its --device gpu is."""
    with device(where):
        return train_shakespeare.train(train_shakespeare.options(**given), watch)


def test_a_run_moves_between_devices_and_ends_with_the_same_bits(tmp_path, capsys):
    """Trained, resumed on the other device and evaluated, in both directions."""
    (tmp_path / "text").write_text(TEXT)
    new = dict(SIZES, threads=1, data=tmp_path / "text", steps=10, dropout=0.1,
               confidence_penalty=0.1)
    outcomes = []
    for name, first, second in [("a", "cpu", "cpu"), ("b", "gpu", "cpu"), ("c", "cpu", "gpu")]:
        out = tmp_path / name
        assert train("standin", device=first, out=out, **new) == 0
        assert train("standin", device=second, out=out, threads=1, steps=20, resume=True) == 0
        with device("standin"):
            train_shakespeare.main(["--eval", f"--device={second}", f"--out={out}", "--threads=1"])
        table = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[-5:]]
        outcomes.append({**outcome(out), "table": table})
    for its in outcomes[1:]:
        numpy.testing.assert_equal(its, outcomes[0])


@on_every_gpu
def test_a_run_on_a_gpu_that_is_interrupted_and_resumed_ends_with_the_same_bits(where, tmp_path):
    """With the GPU's own random numbers."""
    def interrupt(run):
        if run.state.step == 5:
            signal.raise_signal(signal.SIGINT)
    (tmp_path / "text").write_text(TEXT)
    new = dict(SIZES, device="gpu", data=tmp_path / "text", steps=10, dropout=0.1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(where, out=whole, **new) == 0
    assert train(where, interrupt, out=parts, **new) == 128 + signal.SIGINT
    assert train(where, out=parts, device="gpu", resume=True) == 0
    numpy.testing.assert_equal(outcome(parts), outcome(whole))
