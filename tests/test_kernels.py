"""What a GPU computes in a way of its own, compared with the plain forms.

On any machine: the kernels, compiled for the processor, and a stand-in for cuBLAS (standin.py).
With CuPy and a CUDA GPU: the real ones too.
"""
import itertools
import pathlib
import re
import shutil
import subprocess

import numpy
import pytest

import autograd
import backend
import fast
import gpu
import txl
from autograd import Tensor, to_numpy, xp
from standin import CUDA, GPU, STANDINS, device, on_every_gpu

DTYPES = pytest.mark.parametrize("dtype", [numpy.float64, numpy.float32])


def close(ours, expected, dtype):
    tolerance = 1e-10 if dtype == numpy.float64 else 2e-5
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == dtype
    numpy.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


# %% Functions that have a form for a GPU

class Numbers:
    """numbers(2, 3): normal ones [2, 3], the same on every device."""

    def __init__(self, dtype):
        self.rng, self.dtype = numpy.random.default_rng(0), numpy.dtype(dtype)

    def __call__(self, *shape):
        return xp.asarray(self.rng.normal(size=shape).astype(self.dtype))


def layer_norms(x):
    for shape in [(4, 5), (2, 3, 7), (1, 1), (0, 4), (3, 200), (2, 1000)]:
        z, s = autograd.layer_norm_forward(3 * x(*shape[::-1]).T + 1, 1e-5)
        yield from (z, s, autograd.layer_norm_backward(x(*shape[::-1]).T, z, s))


def softmaxes(x):
    """Numerators and their sums; then the gradient, whose hidden places are 0."""
    for T, M, window in [(1, 0, None), (1, 5, None), (3, 0, None), (3, 2, None), (4, 4, None),
                         (3, 5, 2), (8, 0, 3), (20, 280, 290), (3, 1950, None),
                         (1, gpu.MOST_KEYS - 1, None), (1, gpu.MOST_KEYS, None)]:
        E, d_score, K = x(1, 2, T, M + T), x(1, 2, T, M + T), M + T
        mask = txl.attention_mask(T, M, window)
        minus_infinity = xp.where(mask, -numpy.inf, 0.0).astype(x.dtype)
        z = fast.softmax_numerators(E, fast.shifted_rows(x(1, 2, T, K), K), minus_infinity)
        yield from (E, z, fast.score_gradient(E, x(1, 2, T, 2)[..., :1], d_score), d_score)


def with_nan(array):
    array[0, 0] = numpy.nan             # it must not be lost: it says that a run diverges
    return array


def activations(x):
    for activation in ("relu", "squared_relu"):
        yield from fast.relu_forward(with_nan(x(4, 5)), x(5), activation)
        yield fast.relu_backward(x(4, 5), x(4, 5), activation)


def adam_steps(x):
    for options in (dict(), dict(average_over=5, weight_decay=0.2, clip=1.0)):
        w = {name: Tensor(x(*shape), True) for name, shape in (("W", (3, 4)), ("b", (5,)))}
        adam = fast.FlatAdam(w, lr=0.05, **options)
        for _ in range(4):
            for parameter in w.values():
                parameter.grad = x(*parameter.shape)
            adam.step()
        yield from adam.flat.values()


FORMS = {
    ("layer_norm_forward", "layer_norm_backward"): layer_norms,
    ("softmax_numerators", "score_gradient"): softmaxes,
    ("relu_forward", "relu_backward"): activations,
    ("scaled_sum",): lambda x: [fast.scaled_sum(x(3, 4, 6), x(6), x.dtype.type(0.7))],
    ("dropped",): lambda x: autograd.dropped(x(4, 5), x(4, 5), 0.3),
    ("update",): adam_steps}
OTHERS = {"product", "random_generator", "checked_indices"}     # have tests of their own


@DTYPES
@on_every_gpu
@pytest.mark.parametrize("names", FORMS, ids=", ".join)
def test_a_form_for_a_gpu_is_the_plain_form(names, where, dtype):
    answers = []
    for place in (where, "cpu"):
        with device(place):
            answers.append(list(map(to_numpy, FORMS[names](Numbers(dtype)))))
    for ours, expected in zip(*answers, strict=True):
        close(ours, expected, dtype)


def test_every_function_that_asks_for_a_gpu_is_compared():
    asking = set()
    for path in pathlib.Path(backend.__file__).parent.glob("*.py"):
        parts = re.split(r"\bdef (\w+)", path.read_text(encoding="utf-8"))
        asking |= {name for name, text in zip(parts[1::2], parts[2::2]) if "on_a_gpu()" in text}
    assert asking == {name for names in FORMS for name in names} | OTHERS


@on_every_gpu
def test_a_loss_that_is_not_finite_is_not_lost(where):
    config = txl.Config(5, n_layer=1, n_head=1, d_model=4, d_ff=4, mem_len=0)
    names = "embedding", "layers.0.attention.W_kv", "layers.0.feed_forward.W_1"
    for name, value in itertools.product(names, (numpy.nan, numpy.inf)):
        with device(where), numpy.errstate(all="ignore"):
            model = fast.TransformerXL(config)
            model.parameters()[name].data[0, 0] = value
            loss, _ = txl.loss_and_memory(model, [[0, 1]], [[1, 2]])
            assert not numpy.isfinite(loss.item())


# %% Products of views

LAYOUTS = {         # views [H, B, n, k] of the kinds that attention multiplies
    "plain": lambda x, H, B, n, k: x(H, B, n, k),
    "heads": lambda x, H, B, n, k: x(B, n, H * k).reshape(B, n, H, k).transpose(2, 0, 1, 3),
    "transposed": lambda x, H, B, n, k: x(H, B, k, n).swapaxes(-1, -2),
    "heads.T": lambda x, H, B, n, k: x(B, k, H * n).reshape(B, k, H, n).transpose(2, 0, 3, 1),
    "part": lambda x, H, B, n, k: x(H + 1, B, n + 3, k + 2)[1:, :, 2:n + 2, :k],
    "repeated": lambda x, H, B, n, k: xp.broadcast_to(x(H, 1, n, k), (H, B, n, k)),
    "a column, repeated": lambda x, H, B, n, k: xp.broadcast_to(x(H, B, n, 1), (H, B, n, k)),
    "no consecutive numbers": lambda x, H, B, n, k: x(H, B, n, 2 * k)[..., ::2]}
SIZES = [(2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (2, 2, 1, 3, 4), (2, 2, 3, 1, 4), (2, 2, 3, 4, 1),
         (2, 1, 1, 1, 3), (0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5),
         (2, 2, 3, 4, 0), (1, 4, 7, 2, 1), (3, 2, 4, 5, 6), (3, 1, 4, 5, 6)]


@DTYPES
@pytest.mark.parametrize("where", ["cpu", CUDA, GPU])
@pytest.mark.parametrize("H, B, n, k, m", SIZES)
def test_a_product_of_views_is_the_product(H, B, n, k, m, where, dtype):
    """Of every layout with every other: new, into a view, and added to a view."""
    with device(where):
        x = Numbers(dtype)
        for a_layout, b_layout in itertools.product(LAYOUTS.values(), repeat=2):
            a, b = a_layout(x, H, B, n, k), b_layout(x, H, B, k, m)
            ab = to_numpy(a) @ to_numpy(b)
            close(to_numpy(fast.product(a, b)), ab, dtype)
            for name, add in itertools.product(("heads", "heads.T", "part"), (0, 1)):
                out = LAYOUTS[name](x, H, B, n, m)
                expected = ab + (to_numpy(out) if add else 0)
                assert fast.product(a, b, out=out, add=add) is out
                close(to_numpy(out), expected, dtype)


# %% Random numbers

def splitmix64(start, count):
    """SplitMix64 in Python's integers."""
    for n in range(1, count + 1):
        x = (start + n * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        yield x ^ x >> 31


@on_every_gpu
def test_random_numbers_are_the_upper_bits_of_splitmix64(where):
    """Whose reference (Vigna's splitmix64.c) begins like this for the seed 0."""
    assert list(splitmix64(0, 3)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    with device(where):
        generator, other = backend.random_generator([1, 2, 3]), backend.random_generator([1, 2, 4])
        assert other.start != generator.start
        expected = [(x >> 40) / 2**24 for x in splitmix64(generator.start, 1000)]
        ours = to_numpy(generator.random((10, 60), numpy.float32)).ravel().tolist()
        ours += to_numpy(generator.random((400,), numpy.float32)).tolist()      # it goes on
    assert ours == expected


# %% CUDA itself

@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_every_kernel(tmp_path):
    text, cupy = gpu.ROW_KERNELS, STANDINS["cuda"]
    for name, kind in itertools.product(gpu.ROW_KERNEL_NAMES, ("float", "double")):
        text += f"auto {name}_{kind} = {name}<{kind}>;\n"       # makes one of the template
    for formula in [*gpu.FORMULAS, gpu.adam_formula]:
        text += gpu._kernel(cupy, formula).text
    text += gpu.CounterGenerator.kernel(cupy).text
    (tmp_path / "kernels.cu").write_text(text)
    done = subprocess.run(["nvcc", "-std=c++17", "-ptx", "-o", tmp_path / "kernels.ptx",
                           tmp_path / "kernels.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = re.findall(r"\.entry (\w+)", (tmp_path / "kernels.ptx").read_text())
    assert len(entries) == 2 * (len(gpu.ROW_KERNEL_NAMES) + len(gpu.FORMULAS) + 2), entries
