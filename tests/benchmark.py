"""How fast a training step, evaluation and generation are, on fixed configurations.

    python tests/benchmark.py                       all CPU configurations
    python tests/benchmark.py small medium --json   one JSON object a line
    python tests/benchmark.py small --profile       where a step's time goes, by operation
    python tests/benchmark.py small --scaling       how a step's time grows with each dimension
                                                    and with threads
    python tests/benchmark.py small --evaluation    evaluation with memory against a sliding
                                                    window
    python tests/benchmark.py small --generate 200  characters a second, one by one, with memory
    python tests/benchmark.py nanogpt-gpu --device gpu

One step is: forward over [batch, seq_len] tokens with a full memory of mem_len states a layer,
mean cross-entropy, backward, clipping of the global gradient norm at 1, one Adam step, and the
new memory. No dropout, float32. The time is the median over the steps. `gemm_floor` is the time
that the step's matrix products alone would take at the best rate measured in this process, as a
fraction of the step's time: 1 would mean that nothing but products takes time.
"""
import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time

for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")       # before NumPy loads; --threads divides the batch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy

import autograd
import backend
import txl
from autograd import leaf_gradients, no_grad, xp
from backend import Workers, keep_freed_memory, row_parts

CONFIGS = {
    "labml": dict(vocab=65, d_model=128, n_head=4, d_ff=256, n_layer=6,
                  seq_len=2, mem_len=32, batch=32),
    "wide": dict(vocab=65, d_model=128, n_head=4, d_ff=256, n_layer=6,
                 seq_len=32, mem_len=32, batch=32),
    "small": dict(vocab=65, d_model=128, n_head=4, d_ff=512, n_layer=4,
                  seq_len=64, mem_len=64, batch=16),
    "medium": dict(vocab=65, d_model=256, n_head=8, d_ff=1024, n_layer=6,
                   seq_len=128, mem_len=128, batch=16),
    "nanogpt-gpu": dict(vocab=65, d_model=384, n_head=6, d_ff=1536, n_layer=6,
                        seq_len=256, mem_len=256, batch=64),
    "enwik8-base": dict(vocab=204, d_model=512, n_head=8, d_ff=2048, n_layer=12,
                        seq_len=512, mem_len=512, batch=22),
}


def model_of(c):
    return txl.TransformerXL(txl.Config(c["vocab"], c["n_layer"], c["n_head"], c["d_model"],
                                        c["d_ff"], c["mem_len"]))


def full_memory(c, batch):
    return [xp.zeros((batch, c["mem_len"], c["d_model"]), dtype=xp.float32)
            for _ in range(c["n_layer"])]


def synchronise():
    if hasattr(xp.module, "cuda"):
        xp.module.cuda.get_current_stream().synchronize()


def time_steps(c, threads, steps, warmup):
    """(median seconds of a training step, best rate of matrix products, peak memory in MiB)
    with that many workers."""
    model = model_of(c)
    parts = row_parts(c["batch"], threads)
    adam = txl.DividedAdam(model.parameters(), lr=1e-4, clip=1.0, parts=len(parts))
    memories = [full_memory(c, rows.stop - rows.start) for rows in parts]
    batches = numpy.random.default_rng(0).integers(
        c["vocab"], size=(warmup + steps, 2, c["batch"], c["seq_len"]))

    def forward_backward(part, step):
        rows, (tokens, targets) = parts[part], xp.asarray(batches[step])
        loss, memories[part] = txl.loss_and_memory(model, tokens[rows], targets[rows],
                                                   memories[part])
        adam.collect(part, leaf_gradients(loss * ((rows.stop - rows.start) / c["batch"])))

    times = []
    functions = [forward_backward, adam.add_up, adam.update_share, product_rate, peak_rss_mib]
    with Workers(range(len(parts)), functions) as workers:
        for step in range(warmup + steps):
            synchronise()
            start = time.perf_counter()
            workers(forward_backward, step)
            adam.step(everywhere=workers)
            synchronise()
            times.append(time.perf_counter() - start)
        memory = workers(peak_rss_mib)
        return statistics.median(times[warmup:]), sum(workers(product_rate)), sum(memory)


def product_operations(c):
    """Multiplications and additions in a step's matrix products.

    Each product of the forward pass has two of its size in the backward pass, one for each
    operand; only the memory and the sinusoids need none.
    """
    B, T, M, D, F = (c[name] for name in ("batch", "seq_len", "mem_len", "d_model", "d_ff"))
    K = M + T
    both = 2 * B * T * D * D + 2 * B * T * D * D            # queries, attention output
    both += 2 * 2 * B * T * D * F                           # feed-forward
    both += 2 * 2 * B * T * D * D                           # keys and values of the segment
    both += 3 * 2 * B * T * K * D                           # q k, q r, weights times values
    weights_only = 2 * 2 * B * M * D * D + 2 * K * D * D    # keys and values of the memory; r
    return c["n_layer"] * (3 * both + 2 * weights_only) + 3 * 2 * B * T * D * c["vocab"]


def product_rate(_, size=1024, repeats=12):
    """Operations a second of the best float32 product, on one core (or the GPU)."""
    a, b, c = (xp.ones((size, size), dtype=xp.float32) for _ in range(3))
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        xp.matmul(a, b, out=c)
        synchronise()
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


def generated_per_second(c, length):
    model = model_of(c)
    list(txl.generate(model, [0] * c["mem_len"], 3))                          # warm up
    start = time.perf_counter()
    list(txl.generate(model, [0] * c["mem_len"], length))
    return length / (time.perf_counter() - start)


def peak_rss_mib(_=None):
    """Of this process. (What processes share, like Python itself, counts for each of them.)"""
    import resource
    unit = 1024 if sys.platform != "darwin" else 1024 ** 2
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


# %% Where the time goes

def profile(c, threads, steps, warmup):
    """{name: [calls, seconds]} a step, of one worker's share of the batch: each operation
    without those it calls."""
    spent, running = {}, []     # running: [name, seconds in what it calls], the innermost last

    def timed(name, function):
        @functools.wraps(function)
        def run(*arguments, **options):
            running.append([name, 0.0])
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                synchronise()
                seconds = time.perf_counter() - start
                entry = spent.setdefault(name, [0, 0.0])
                entry[0] += 1 / steps
                entry[1] += (seconds - running.pop()[1]) / steps
                if running:
                    running[-1][1] += seconds
        return run

    plain = autograd.result

    def result(data, *edges):
        name = f"{running[-1][0]}, backward"
        return plain(data, *((operand, timed(name, gradient)) for operand, gradient in edges))
    replaced = [(owner, attribute, value, timed(name, value))
                for name, operation in backend.OPS.items()
                for owner in (autograd, txl, autograd.Tensor)
                for attribute, value in vars(owner).items() if value is operation]
    replaced += [(autograd, "result", plain, result), (txl, "result", plain, result),
                 (txl, "update_memory", txl.update_memory, timed("new memory", txl.update_memory))]
    for owner, attribute, _, timed_one in replaced:
        setattr(owner, attribute, timed_one)

    model, share = model_of(c), row_parts(c["batch"], threads)[0].stop
    adam = txl.DividedAdam(model.parameters(), lr=1e-4, clip=1.0)
    memory = full_memory(c, share)
    walk, forward, step_of_adam = (
        timed(*pair) for pair in (("walking the graph", leaf_gradients),
                                  ("model", txl.loss_and_memory), ("Adam", adam.step)))
    for step in range(warmup + steps):
        if step == warmup:
            spent.clear()
        tokens, targets = xp.asarray(numpy.random.default_rng(step).integers(
            c["vocab"], size=(2, share, c["seq_len"])))
        loss, memory = forward(model, tokens, targets, memory)
        for parameter, gradient in walk(loss):
            parameter.grad = gradient
        step_of_adam()
    for owner, attribute, value, _ in replaced:
        setattr(owner, attribute, value)
    return spent


def print_profile(name, spent):
    total = sum(seconds for _, seconds in spent.values())
    print(f"{name}: {total * 1e3:.1f} ms a step for one worker's rows")
    for what, (calls, seconds) in sorted(spent.items(), key=lambda item: -item[1][1]):
        if seconds > total / 500:
            print(f"    {what:24} {calls:5.0f} calls {seconds * 1e3:9.2f} ms "
                  f"{100 * seconds / total:5.1f} %")


# %% How it grows

def print_scaling(c, threads, steps, warmup):
    """Time of a step when one dimension changes and the others stay."""
    print(f"{'':12}{'':>8}{'ms a step':>12}{'us a token':>12}")
    for what, values in [("mem_len", [0, 64, 128, 256, 512, 1024]),
                         ("seq_len", [16, 32, 64, 128, 256]), ("batch", [4, 8, 16, 32, 64]),
                         ("threads", [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)])]:
        for value in values:
            changed = {**c, what: value} if what != "threads" else c
            seconds, _, _ = time_steps(changed, value if what == "threads" else threads,
                                       steps, warmup)
            tokens = changed["batch"] * changed["seq_len"]
            print(f"{what:12}{value:8}{seconds * 1e3:12.1f}{seconds / tokens * 1e6:12.1f}",
                  flush=True)


def print_evaluation(c, seq_len=64):
    """The paper's Table 9 on this model: seconds a token, with memory and with a window that
    slides by one token.

    Both see `length` tokens back. With memory, segments of seq_len are read one after another,
    and each token costs one step. The window is computed anew for every token, for the
    prediction at its end.
    """
    def seconds(tokens, memory, mem_len):
        with no_grad():
            times = []
            for _ in range(5):
                synchronise()
                start = time.perf_counter()
                model(tokens, memory, mem_len=mem_len)[0].numpy()
                times.append(time.perf_counter() - start)
            return statistics.median(times[1:])
    print(f"{'attention length':>18}{'memory, us':>14}{'window, us':>14}{'times as fast':>16}")
    model = model_of(c)
    for length in (64, 128, 256, 512, 1024):
        segment = xp.asarray(numpy.random.default_rng(0).integers(c["vocab"], size=(1, seq_len)))
        window = xp.asarray(numpy.random.default_rng(0).integers(c["vocab"], size=(1, length)))
        by_memory = seconds(segment, full_memory({**c, "mem_len": length}, 1), length) / seq_len
        by_window = seconds(window, None, 0)
        print(f"{length:18}{by_memory * 1e6:14.1f}{by_window * 1e6:14.1f}"
              f"{by_window / by_memory:16.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG",
                        help=f"of {', '.join(CONFIGS)} (default: those for the CPU)")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--tf32", action="store_true",
                        help="on a GPU: faster, less exact float32 products")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", type=int, metavar="LENGTH",
                        help="time generation instead of training")
    parser.add_argument("--profile", action="store_true", help="time each operation of a step")
    parser.add_argument("--scaling", action="store_true", help="time steps of other sizes")
    parser.add_argument("--evaluation", action="store_true",
                        help="time evaluation with memory against a sliding window")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object a line instead of a table")
    args = parser.parse_args()
    for name in args.configs:
        if name not in CONFIGS:
            parser.error(f"no configuration {name!r}; there are {', '.join(CONFIGS)}")
    autograd.use_device(args.device, args.tf32)
    keep_freed_memory()
    threads = args.threads if args.device == "cpu" else 1
    program = f"{xp.module.__name__} {xp.module.__version__}"
    header = None
    for name in args.configs or ["labml", "wide", "small", "medium"]:
        c = CONFIGS[name]
        if args.profile:
            print_profile(name, profile(c, threads, args.steps, args.warmup))
            continue
        if args.scaling or args.evaluation:
            print(name)
            if args.scaling:
                print_scaling(c, threads, args.steps, args.warmup)
            else:
                print_evaluation(c)
            continue
        row = {"program": program, "config": name}
        if args.generate:
            row["generated_tokens_per_s"] = round(generated_per_second(c, args.generate), 1)
        else:
            seconds, rate, memory = time_steps(c, threads, args.steps, args.warmup)
            row["ms_per_step"] = round(seconds * 1e3, 2)
            row["tokens_per_s"] = round(c["batch"] * c["seq_len"] / seconds, 1)
            row["gemm_floor"] = round(product_operations(c) / rate / seconds, 3)
        row["peak_rss_mib"] = peak_rss_mib() if args.generate else memory
        if args.device == "gpu":
            row["peak_gpu_mib"] = round(xp.get_default_memory_pool().total_bytes() / 2 ** 20)
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            if header is None:
                header = "  ".join(f"{key:>{max(len(key), 12)}}" for key in row)
                print(header)
            print("  ".join(f"{value!s:>{max(len(key), 12)}}" for key, value in row.items()),
                  flush=True)


if __name__ == "__main__":
    main()
