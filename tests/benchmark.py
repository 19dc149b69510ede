"""How fast a training step, evaluation and generation are.

    python tests/benchmark.py                       all CPU configurations
    python tests/benchmark.py small medium --json   one JSON object a line
    python tests/benchmark.py small --profile       where a step's time goes, by operation
    python tests/benchmark.py small --scaling       how it grows with each dimension, and threads
    python tests/benchmark.py small --evaluation    with memory, and with a sliding window
    python tests/benchmark.py small --generate 200  characters a second, one by one, with memory
    python tests/benchmark.py nanogpt-gpu --device gpu

A step is forward, backward, clipping, Adam and the new memory, where the memory is full. No
dropout, float32; the median over the steps. `gemm_floor` is the time that the step's matrix
products alone would take at the best rate measured in this process, as a part of it.
"""
import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy

import autograd
import backend
import fast
import txl
from autograd import leaf_gradients, no_grad
from backend import row_parts, xp

SIZES = ("vocab", "d_model", "n_head", "d_ff", "n_layer", "seq_len", "mem_len", "batch")
CONFIGS = {name: dict(zip(SIZES, sizes)) for name, sizes in {
    "labml": (65, 128, 4, 256, 6, 2, 32, 32), "wide": (65, 128, 4, 256, 6, 32, 32, 32),
    "small": (65, 128, 4, 512, 4, 64, 64, 16), "medium": (65, 256, 8, 1024, 6, 128, 128, 16),
    "nanogpt-gpu": (65, 384, 6, 1536, 6, 256, 256, 64),
    "enwik8-base": (204, 512, 8, 2048, 12, 512, 512, 22)}.items()}


def model_of(c):
    return fast.TransformerXL(txl.Config(c["vocab"], **{
        name: c[name] for name in ("n_layer", "n_head", "d_model", "d_ff", "mem_len")}))


def full_memory(c, batch):
    return [xp.zeros((batch, c["mem_len"], c["d_model"]), dtype=xp.float32)
            for _ in range(c["n_layer"])]


def random_tokens(c, *shape):
    return xp.asarray(numpy.random.default_rng(0).integers(c["vocab"], size=shape))


def synchronise():
    if hasattr(xp.module, "cuda"):
        xp.module.cuda.get_current_stream().synchronize()


def seconds_of(function, *arguments):
    """How long a call takes, on a GPU until it has done it."""
    synchronise()
    start = time.perf_counter()
    function(*arguments)
    synchronise()
    return time.perf_counter() - start


# %% A step

def time_steps(c, threads, args):
    """(median seconds of a training step, best rate of matrix products, peak memory in MiB)."""
    model, parts = model_of(c), row_parts(c["batch"], threads)
    adam = fast.FlatAdam(model.parameters(), lr=1e-4, clip=1.0, parts=len(parts))
    memories = [full_memory(c, rows.stop - rows.start) for rows in parts]
    tokens, targets = random_tokens(c, 2, c["batch"], c["seq_len"])

    def forward_backward(part):
        rows = parts[part]
        loss, memories[part] = txl.loss_and_memory(model, tokens[rows], targets[rows],
                                                   memories[part])
        adam.collect(part, leaf_gradients(loss * ((rows.stop - rows.start) / c["batch"])))

    def step():
        workers(forward_backward)
        adam.step(everywhere=workers)
    functions = [forward_backward, adam.add_up, adam.update_share, product_rate, peak_rss_mib]
    with backend.Workers(range(len(parts)), functions) as workers:
        times = [seconds_of(step) for _ in range(args.warmup + args.steps)]
        memory = sum(workers(peak_rss_mib))
        return statistics.median(times[args.warmup:]), sum(workers(product_rate)), memory


def product_operations(c):
    """Multiplications and additions in a step's matrix products. Each has two of its size in the
    backward pass, one for each operand; only the memory and the sinusoids need none."""
    B, T, M, D, F = (c[name] for name in ("batch", "seq_len", "mem_len", "d_model", "d_ff"))
    both = 8 * T * D * D + 4 * T * D * F + 6 * T * (M + T) * D      # attention is the last
    weights_only = 4 * B * M * D * D + 2 * (M + T) * D * D          # memory's keys, values; r
    return c["n_layer"] * (3 * B * both + 2 * weights_only) + 3 * 2 * B * T * D * c["vocab"]


def product_rate(_, size=1024):
    """Operations a second of the best float32 product, on one core (or the GPU)."""
    a = xp.ones((size, size), dtype=xp.float32)
    return 2 * size ** 3 / min(seconds_of(xp.matmul, a, a) for _ in range(12))


def peak_rss_mib(_=None):
    """Of this process. (What processes share, like Python itself, counts for each of them.)"""
    import resource
    unit = 1024 if sys.platform != "darwin" else 1024 ** 2
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def print_row(name, args):
    c = CONFIGS[name]
    row = {"program": f"{xp.module.__name__} {xp.module.__version__}", "config": name}
    if args.generate:
        model, prompt = model_of(c), [0] * c["mem_len"]
        list(txl.generate(model, prompt, 3))                # warm up
        seconds = seconds_of(lambda: list(txl.generate(model, prompt, args.generate)))
        row["generated_tokens_per_s"] = round(args.generate / seconds, 1)
        row["peak_rss_mib"] = peak_rss_mib()
    else:
        seconds, rate, memory = time_steps(c, args.threads, args)
        row["ms_per_step"] = round(seconds * 1e3, 2)
        row["tokens_per_s"] = round(c["batch"] * c["seq_len"] / seconds, 1)
        row["gemm_floor"] = round(product_operations(c) / rate / seconds, 3)
        row["peak_rss_mib"] = memory
    if args.device == "gpu":
        row["peak_gpu_mib"] = round(xp.get_default_memory_pool().total_bytes() / 2 ** 20)
    print(json.dumps(row) if args.json else
          "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


# %% Where the time goes

def print_profile(name, args):
    """A step of one worker's share of the batch: each operation without those it calls."""
    c, spent, running = CONFIGS[name], {}, []       # running: [name, seconds in what it calls]

    def timed(name, function):
        def run(*arguments, **options):
            running.append([name, 0.0])
            start = time.perf_counter()
            answer = function(*arguments, **options)
            synchronise()
            seconds = time.perf_counter() - start
            calls, before = spent.get(name, (0, 0.0))
            spent[name] = calls + 1, before + seconds - running.pop()[1]
            if running:
                running[-1][1] += seconds
            return answer
        return run

    def record(value, *edges, plain=autograd.record):
        name = f"{running[-1][0]}, backward"
        return plain(value, *((operand, timed(name, vjp)) for operand, vjp in edges))
    replaced = {operation: timed(name, operation) for name, operation in autograd.OPS.items()}
    replaced.update({autograd.record: record,
                     txl.update_memory: timed("new memory", txl.update_memory)})
    model, share = model_of(c), row_parts(c["batch"], args.threads)[0].stop
    adam, memory = fast.FlatAdam(model.parameters(), lr=1e-4, clip=1.0), full_memory(c, share)
    tokens, targets = random_tokens(c, 2, share, c["seq_len"])
    with contextlib.ExitStack() as patches:
        for owner in (autograd, txl, fast, autograd.Tensor):
            for attribute, value in list(vars(owner).items()):
                if callable(value) and value in replaced:
                    patches.enter_context(mock.patch.object(owner, attribute, replaced[value]))
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                spent.clear()
            loss, memory = timed("model", txl.loss_and_memory)(model, tokens, targets, memory)
            adam.zero_grad()
            timed("walking the graph", loss.backward)()
            timed("Adam", adam.step)()
    total = sum(seconds for _, seconds in spent.values())
    print(f"{name}: {total / args.steps * 1e3:.1f} ms a step for one worker's rows")
    for what, (calls, seconds) in sorted(spent.items(), key=lambda item: -item[1][1]):
        if seconds > total / 500:
            print(f"    {what:24} {calls / args.steps:5.0f} calls "
                  f"{seconds / args.steps * 1e3:9.2f} ms {100 * seconds / total:5.1f} %")


# %% How it grows

def print_scaling(name, args):
    """Time of a step when one dimension changes and the others stay."""
    print(f"{name:12}{'':>8}{'ms a step':>12}{'us a token':>12}")
    for what, values in [("mem_len", [0, 64, 128, 256, 512, 1024]),
                         ("seq_len", [16, 32, 64, 128, 256]), ("batch", [4, 8, 16, 32, 64]),
                         ("threads", [n for n in (1, 2, 4, 8) if n <= backend.core_count()])]:
        for value in values:
            c = {"threads": args.threads, **CONFIGS[name], what: value}
            ms = 1e3 * time_steps(c, c["threads"], args)[0]
            print(f"{what:12}{value:8}{ms:12.1f}{1e3 * ms / c['batch'] / c['seq_len']:12.1f}")


def print_evaluation(name, args, seq_len=64):
    """The paper's Table 9 on this model: time a token, with memory and with a window that slides
    by one token. Both see `length` tokens back. The window is computed anew for every token."""
    c, model = CONFIGS[name], model_of(CONFIGS[name])

    def microseconds(count, memory, mem_len):
        tokens = random_tokens(c, 1, count)
        with no_grad():
            return 1e6 * statistics.median(
                seconds_of(lambda: model(tokens, memory, mem_len=mem_len)) for _ in range(5))
    print(f"{name:12}{'memory, us':>14}{'window, us':>14}{'times as fast':>16}")
    for length in (64, 128, 256, 512, 1024):
        memory = full_memory({**c, "mem_len": length}, 1)
        by_memory = microseconds(seq_len, memory, length) / seq_len
        by_window = microseconds(length, None, 0)
        print(f"{length:12}{by_memory:14.1f}{by_window:14.1f}{by_window / by_memory:16.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=f"of {', '.join(CONFIGS)}",
                        default=["labml", "wide", "small", "medium"])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    for name, default in dict(steps=15, warmup=3, threads=2, generate=0).items():
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default)
    for name in ("tf32", "profile", "scaling", "evaluation", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.configs) - CONFIGS.keys():
        parser.error(f"no configuration {min(unknown)!r}; there are {', '.join(CONFIGS)}")
    backend.use_device(args.device, args.tf32)
    backend.tune_malloc()
    args.threads = args.threads if args.device == "cpu" else 1
    report = (print_profile if args.profile else print_scaling if args.scaling else
              print_evaluation if args.evaluation else print_row)
    with backend.one_blas_thread():             # --threads divides the batch among processes
        for name in args.configs:
            report(name, args)


if __name__ == "__main__":
    main()
