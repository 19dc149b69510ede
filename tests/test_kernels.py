"""What a GPU runs in place of array operations, compared with these on any machine.

The kernels' text is C++. Compiled for the processor, with one thread to a block, it computes what
it computes on a GPU, but for the order of sums. cuBLAS is replaced by a few lines that follow its
documentation: matrices column by column, read from plain addresses. With `--device gpu` the real
kernels and cuBLAS run instead.
"""
import ctypes
import itertools
import shutil
import subprocess

import numpy
import pytest

import autograd
import backend
import txl
from autograd import to_numpy, xp

RNG = numpy.random.default_rng
DTYPES = pytest.mark.parametrize("dtype", [numpy.float64, numpy.float32])


def close(ours, expected, dtype):
    tolerance = 1e-10 if dtype == numpy.float64 else 2e-5
    numpy.testing.assert_allclose(to_numpy(ours), to_numpy(expected), rtol=tolerance,
                                  atol=tolerance)


# %% Products of views

def stack(rng, shape, layout, dtype):
    """Random numbers [H, B, n, k] as a view of one of the kinds that attention multiplies."""
    H, B, n, k = shape
    if layout == "heads":                               # every H-th group of columns
        x = rng.normal(size=(B, n, H * k)).reshape(B, n, H, k).transpose(2, 0, 1, 3)
    elif layout == "transposed":
        x = rng.normal(size=(H, B, k, n)).swapaxes(-1, -2)
    elif layout == "transposed heads":
        x = rng.normal(size=(B, k, H * n)).reshape(B, k, H, n).transpose(2, 0, 3, 1)
    elif layout == "part":                              # of a larger array
        x = rng.normal(size=(H + 1, B, n + 3, k + 2))[1:, :, 2:n + 2, :k]
    elif layout == "repeated":
        x = numpy.broadcast_to(rng.normal(size=(H, 1, n, k)), shape)
    elif layout == "gaps":                              # no axis has consecutive numbers
        x = rng.normal(size=(H, B, n, 2 * k))[..., ::2]
    else:
        x = rng.normal(size=shape)
    return same_layout(x, dtype)


def same_layout(x, dtype):
    """The numbers in a dtype and on the device, with the same strides in elements."""
    extent = 1 + sum((size - 1) * stride // x.itemsize
                     for size, stride in zip(x.shape, x.strides) if size)
    y = xp.zeros(max(extent, 1), dtype=dtype)
    view = xp.lib.stride_tricks.as_strided(
        y, x.shape, [stride // x.itemsize * y.itemsize for stride in x.strides])
    view[...] = xp.asarray(x.astype(dtype))
    return view


LAYOUTS = ["plain", "heads", "transposed", "transposed heads", "part", "repeated", "gaps"]
SIZES = [(2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (2, 2, 1, 3, 4), (2, 2, 3, 1, 4), (2, 2, 3, 4, 1),
         (2, 1, 1, 1, 3), (0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5),
         (2, 2, 3, 4, 0), (1, 4, 7, 2, 1), (3, 2, 4, 5, 6), (3, 1, 4, 5, 6)]


def gemm_of_the_documentation(b_transposed, a_transposed, m, n, k, one, b, kind, b_step, b_next,
                              a, _, a_step, a_next, old, out, __, out_step, out_next, count,
                              compute, algorithm):
    """cublasGemmStridedBatchedEx: out = one * op(b) op(a) + old * out, all column by column."""
    number = {backend.CUDA_R_32F: ctypes.c_float, backend.CUDA_R_64F: ctypes.c_double}[kind]

    def matrix(address, rows, columns, step, transposed=False):
        assert step >= max(1, columns if transposed else rows)
        if transposed:
            return matrix(address, columns, rows, step).T
        memory = numpy.ctypeslib.as_array((number * (step * (columns - 1) + rows))
                                          .from_address(address))
        size = memory.itemsize
        return numpy.lib.stride_tricks.as_strided(memory, (rows, columns), (size, size * step))
    factor, keep = (number.from_address(address).value for address in (one, old))
    size = ctypes.sizeof(number)
    for i in range(count):
        left = matrix(b + i * b_next * size, m, k, b_step, b_transposed)
        right = matrix(a + i * a_next * size, k, n, a_step, a_transposed)
        target = matrix(out + i * out_next * size, m, n, out_step)
        target[...] = factor * (left @ right) + (keep * target if keep else 0)


@DTYPES
@pytest.mark.parametrize("way", ["cuBLAS", "as computed here"])
@pytest.mark.parametrize("H, B, n, k, m", SIZES)
def test_a_product_of_views_is_the_product(H, B, n, k, m, way, dtype):
    """Of every layout with every other, new, into a view, and added to a view."""
    if way == "cuBLAS":
        def product(a, b, out=None, add=False):
            return backend._product(a, b, out, add, False, lambda x: x.ctypes.data,
                                    gemm_of_the_documentation)
        if xp.module is not numpy:
            return                                      # the real one is tested there
    else:
        product = backend.product
    rng = RNG(0)
    for a_layout, b_layout in itertools.product(LAYOUTS, LAYOUTS):
        a, b = stack(rng, (H, B, n, k), a_layout, dtype), stack(rng, (H, B, k, m), b_layout, dtype)
        ab = to_numpy(a) @ to_numpy(b)
        close(product(a, b), ab, dtype)
        for out_layout in ("heads", "transposed heads", "part"):
            for add in (False, True):
                out = stack(rng, (H, B, n, m), out_layout, dtype)
                expected = ab + (to_numpy(out) if add else 0)
                assert product(a, b, out=out, add=add) is out
                close(out, expected, dtype)


# %% Kernels for rows

SIGNATURES = {      # T: pointer to numbers, i: integer, d: float64
    "softmax_numerators": "TTTTii", "score_gradient": "TTTTii", "normalised_rows": "TTTid",
    "normalise_gradient": "TTTTi"}

ONE_THREAD = r"""
#include <cmath>
using std::exp; using std::sqrt;
struct Place { unsigned x; };
static Place blockIdx = {0}, threadIdx = {0}, blockDim = {1};
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)
static void __syncthreads() {}
template <typename T> T __shfl_xor_sync(unsigned, T x, int) { return x; }
"""


def on_the_processor(folder):
    """A C library with every kernel for float and double, one thread to a block."""
    text = ONE_THREAD + backend.ROW_KERNELS
    for one, more in (("mine[8]", "mine[2048]"), ("n < 8", "n < 2048")):    # keys of a thread
        assert one in text
        text = text.replace(one, more)
    for (name, signature), kind in itertools.product(SIGNATURES.items(), ("float", "double")):
        types = [{"T": f"{kind}*", "i": "int", "d": "double"}[letter] for letter in signature]
        declared = ", ".join(f"{type} a{n}" for n, type in enumerate(types))
        given = ", ".join(f"a{n}" for n, _ in enumerate(types))
        text += (f'extern "C" void {name}_{kind}(int rows, {declared}) {{ for (blockIdx.x = 0; '
                 f"blockIdx.x < (unsigned)rows; blockIdx.x++) {name}<{kind}>({given}); }}\n")
    text += ('extern "C" void uniform(unsigned long long start, float* out, int count) { '
             "typedef float T; for (long long i = 0; i < count; i++) { float& y = out[i]; "
             + backend.CounterGenerator.HASH + "; } }\n")
    (folder / "kernels.cpp").write_text(text)
    subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror",
                    "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if xp.module is not numpy:
        return None                                     # the GPU runs them
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    return on_the_processor(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(library, monkeypatch):
    """The kernels' forms, which run on the processor where there is no GPU."""
    if library is not None:
        def for_each_row(name, rows, threads, *arguments):
            kind = "float" if arguments[0].dtype == numpy.float32 else "double"
            assert len(arguments) == len(SIGNATURES[name])
            given = [ctypes.c_void_p(x.ctypes.data) if x.ndim else
                     ctypes.c_int(x) if x.dtype == numpy.int32 else ctypes.c_double(x)
                     for x in arguments]
            getattr(library, f"{name}_{kind}")(int(rows), *given)
        monkeypatch.setattr(backend, "_for_each_row", for_each_row)
    return backend.KERNEL_FORMS


@pytest.fixture
def way_of_a_gpu(kernels, monkeypatch):
    """A function after whose call NumPy's arrays go the way that a GPU's go."""
    if xp.module is not numpy:
        pytest.skip("on a GPU all other tests go this way")

    def product(a, b, out=None, add=False):
        return backend._product(a, b, out, add, False, lambda x: x.ctypes.data,
                                gemm_of_the_documentation)

    def begin():
        monkeypatch.setattr(backend, "on_a_gpu", lambda: True)
        monkeypatch.setattr(txl, "product", product)
    return begin


def plain(name):
    return backend.PLAIN_FORMS[name]


def test_every_kernel_has_a_plain_form():
    assert backend.KERNEL_FORMS.keys() == backend.PLAIN_FORMS.keys() == SIGNATURES.keys()


@DTYPES
@pytest.mark.parametrize("T, M, window", [(1, 0, None), (1, 5, None), (3, 0, None), (3, 2, None),
                                          (4, 4, None), (3, 5, 2), (8, 0, 3), (20, 280, 290),
                                          (3, 1950, None)])
def test_the_softmax_of_shifted_scores(kernels, T, M, window, dtype):
    """Numerators and their sums; then the gradient, whose hidden places are 0."""
    rng, K = RNG(1), M + T
    scores, by_distance, d_score = (rng.normal(size=(2, 3, T, K)).astype(dtype) for _ in range(3))
    mask = to_numpy(txl.hidden_keys(T, M, window))
    minus_infinity = xp.asarray(numpy.where(mask, -numpy.inf, 0).astype(dtype))
    dots = rng.normal(size=(2, 3, T, 1)).astype(dtype)
    answers = []
    for forms in ({name: plain(name) for name in kernels}, kernels):
        E, d = xp.array(scores), xp.array(d_score)
        position = txl.shifted_rows(xp.array(by_distance), K)
        z = forms["softmax_numerators"](E, position, minus_infinity)
        back = forms["score_gradient"](E, xp.asarray(dots), d)
        answers.append((E, z, d, back))
    for ours, expected in zip(*reversed(answers)):
        assert ours.shape == expected.shape and ours.dtype == dtype
        close(ours, expected, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 7), (1, 1), (0, 4), (3, 200)])
def test_normalised_rows_and_their_gradient(kernels, shape, dtype):
    rng = RNG(2)
    x, g = (xp.asarray(rng.normal(1, 2, size=shape).astype(dtype)) for _ in range(2))
    z, s = kernels["normalised_rows"](x, 1e-5)
    for ours, expected in zip((z, s), plain("normalised_rows")(x, 1e-5)):
        assert ours.shape == expected.shape and ours.dtype == dtype
        close(ours, expected, dtype)
    close(kernels["normalise_gradient"](g, z, s), plain("normalise_gradient")(g, z, s), dtype)


@pytest.mark.parametrize("options", [dict(), dict(pre_norm=False), dict(same_length=True),
                                     dict(positions="learned", clamp_len=6),
                                     dict(activation="squared_relu", tie_weights=True)], ids=str)
def test_a_model_by_the_way_of_a_gpu(way_of_a_gpu, options):
    """Loss and gradients: kernels, cuBLAS' calls and all that chooses them, on NumPy's arrays."""
    config = txl.Config(7, n_layer=2, n_head=2, d_model=8, d_ff=12, mem_len=4, **options)
    tokens, targets = RNG(3).integers(7, size=(2, 3, 5))
    memory = [RNG(4).normal(size=(3, 4, 8)) for _ in range(2)]
    answers = []
    for gpu in (False, True):
        if gpu:
            way_of_a_gpu()
        model = txl.TransformerXL(config, seed=1, dtype=numpy.float64)
        loss, new = txl.loss_and_memory(model, tokens, targets, memory)
        loss.backward()
        answers.append([loss.data, *new, *(w.grad for w in model.parameters().values())])
    for ours, expected in zip(*answers):
        numpy.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_attention_on_transposed_arrays_by_the_way_of_a_gpu(way_of_a_gpu):
    """Results have the layout that cuBLAS wants, whatever that of the operands is."""
    arrays = [RNG(5).normal(size=shape[::-1]).T for shape in
              ((2, 3, 8), (2, 5, 16), (5, 8), (2, 4), (2, 4))]
    mask, answers = txl.hidden_keys(3, 2), []
    for gpu in (False, True):
        if gpu:
            way_of_a_gpu()
        inputs = [autograd.Tensor(x, requires_grad=True) for x in arrays]
        y = txl.attend(*inputs, mask)
        y.sum().backward()
        answers.append([y.data, *(x.grad for x in inputs)])
    for ours, expected in zip(*answers):
        numpy.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_numbers_that_kernels_do_not_know_take_the_plain_form(way_of_a_gpu):
    way_of_a_gpu()
    z = autograd.normalise(autograd.Tensor(xp.asarray([[1, 2, 4]])))
    numpy.testing.assert_allclose(z.numpy().mean(), 0, atol=1e-12)


def test_more_keys_than_a_block_can_take_and_empty_rows_are_left_to_the_plain_form():
    wide, none = xp.zeros((1, 1, 1, backend.MOST_KEYS + 1)), xp.zeros((2, 0))
    assert backend.softmax_numerators(wide, wide, wide[0, 0]) is NotImplemented
    assert backend.normalised_rows(none, 1e-5) is NotImplemented
    assert autograd.normalise(none).shape == (2, 0)


@DTYPES
@pytest.mark.parametrize("average_over, weight_decay", [(None, 0.0), (5, 0.2)])
def test_adam_in_one_pass_is_adam(average_over, weight_decay, dtype, monkeypatch):
    rng, answers = RNG(6), []
    start = {"W": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    gradients = [{name: rng.normal(size=x.shape) for name, x in start.items()} for _ in range(4)]
    for one_pass in (False, True):
        monkeypatch.setattr(txl, "on_a_gpu", lambda: one_pass)
        w = {name: autograd.Tensor(xp.asarray(x.astype(dtype)), requires_grad=True)
             for name, x in start.items()}
        adam = txl.DividedAdam(w, lr=0.05, weight_decay=weight_decay, clip=1.0,
                               average_over=average_over)
        for step in gradients:
            for name, g in step.items():
                w[name].grad = xp.asarray(g.astype(dtype))
            adam.step()
        assert all(array.dtype == dtype for array in adam.flat.values())
        answers.append([to_numpy(array) for array in adam.flat.values()])
    for ours, expected in zip(*reversed(answers)):
        close(ours, expected, dtype)


# %% Random numbers

def splitmix64(start, count):
    """SplitMix64 in Python's integers."""
    for n in range(1, count + 1):
        x = (start + n * backend.CounterGenerator.GOLDEN) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        yield x ^ x >> 31


def test_the_hash_is_splitmix64(library):
    """The reference's first numbers for seed 0 (Vigna's splitmix64.c), and the kernel's."""
    assert list(splitmix64(0, 3)) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    generator = backend.CounterGenerator([1, 2, 3])
    start = generator.start
    expected = [(x >> 40) / 2**24 for x in splitmix64(start, 1000)]
    if library is None:
        ours = to_numpy(generator.random((10, 60), numpy.float32)).ravel().tolist()
        ours += to_numpy(generator.random((400,), numpy.float32)).tolist()      # it goes on
    else:
        ours = numpy.zeros(1000, dtype=numpy.float32)
        library.uniform(ctypes.c_ulonglong(start), ctypes.c_void_p(ours.ctypes.data), 1000)
    numpy.testing.assert_array_equal(ours, numpy.array(expected, dtype=numpy.float32))
    assert 0 <= min(expected) and max(expected) < 1 and abs(numpy.mean(expected) - 0.5) < 0.02
    assert backend.CounterGenerator([1, 2, 4]).start != start


# %% CUDA itself

@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_the_kernels(tmp_path):
    text = backend.ROW_KERNELS
    for (name, signature), kind in itertools.product(SIGNATURES.items(), ("float", "double")):
        start = text.index(f"void {name}(") + len(f"void {name}(")
        declared = text[start:text.index(")", start)].split(",")
        types = [" ".join(part.split()[:-1]).replace("T", kind) for part in declared]
        assert len(types) == len(signature)
        text += f"template __global__ void {name}<{kind}>({', '.join(types)});\n"
    text += ("__global__ void uniform(unsigned long long start, float* out) { typedef float T; "
             "long long i = threadIdx.x; float& y = out[i]; "
             + backend.CounterGenerator.HASH + "; }\n")
    text += backend.LARGER
    for formula, kind in itertools.product((*backend.FORMULAS, backend.adam_update),
                                           ("float", "double")):
        names = [f"const T {name}" for name in formula.arrays]
        names += [f"T& {name}" for name in formula.results]
        text += (f"__global__ void {formula.name}_{kind}({kind}* all) {{ typedef {kind} T; "
                 + " ".join(f"{name} = *all++;" for name in names) + f" {formula.text}; }}\n")
    (tmp_path / "kernels.cu").write_text(text)
    done = subprocess.run(["nvcc", "-std=c++17", "-ptx", "-o", tmp_path / "kernels.ptx",
                           tmp_path / "kernels.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ptx = (tmp_path / "kernels.ptx").read_text()
    assert all(ptx.count(f"{len(name)}{name}") >= 2 for name in SIGNATURES)
