# %% Pictures of a run: its loss, and what its layers attend to
"""What a model attends to, as numbers and as pictures. matplotlib is needed for pictures only.

    attention_weights       of one call of the model, every weight
    attention_by_distance   the mean weight of the key 0, 1, … tokens back
    mean_attention          that over many segments of a text
    line_attention          the weights in one line of a text

    draw_loss, draw_distances, draw_heads    draw into given axes
    pictures                the three pictures of `train_shakespeare.py --plot`
"""
import math
import re
import warnings

import numpy

from autograd import no_grad
from backend import to_numpy, xp
from txl import attention_mask, heads, key_distances, relative_positions


# %% 1. Attention, as numbers
def attention_weights(model, tokens, memory):
    """How much each query of tokens [B, T] attends to each key: of each layer [H, B, T, K].

    `memory` holds N arrays [B, M, D]. With same_length M must be at least T, and a query
    sees M keys.
    """
    T, M, config, found = tokens.shape[1], memory[0].shape[1], model.config, []
    window = max(M, T)          # so many states are kept that the segment's inputs are among them
    with no_grad():
        _, inputs = model(tokens, memory, mem_len=window)
        positions = relative_positions(config, T, M, model.dtype)
        mask = attention_mask(T, M, window if config.same_length else None)
        for layer, past, x in zip(model.layers, memory, inputs):
            x = x[:, x.shape[1] - T:]
            if config.pre_norm:
                x, past = layer.attention_norm(x), layer.attention_norm(past)
            q, kv = layer.attention.project(x, past)
            q, k = heads(q, config.n_head), heads(kv[..., :config.d_model], config.n_head)
            found.append(layer.attention.weights(q, k, positions, mask).data)
    return found


def attention_by_distance(model, tokens, memory):
    """How far back each layer looks: [N, K], the mean weight of keys 0, 1, … tokens back.

    The mean is over heads, sequences and those queries that have so many keys before them.
    """
    T, M = tokens.shape[1], memory[0].shape[1]
    distance = key_distances(T, M)
    means = [weights.mean(axis=(0, 1)) for weights in attention_weights(model, tokens, memory)]
    return numpy.array([[mean[distance == n].mean().item() for n in range(M + T)]
                        for mean in means])


def mean_attention(model, tokens, seq_len, mem_len):
    """`attention_by_distance`, the mean over up to twenty segments with a full memory."""
    span = seq_len * (1 + math.ceil(mem_len / seq_len))     # to fill the memory, and one more
    B = max(1, min(16, len(tokens) // span))
    length = len(tokens) // B
    rows, memory, found = tokens[:B * length].reshape(B, length), model.empty_memory(B), []
    for at in range(0, length - seq_len + 1, seq_len):
        segment = xp.asarray(rows[:, at:at + seq_len])
        if memory[0].shape[1] == mem_len:
            found.append(attention_by_distance(model, segment, memory))
        if len(found) == 20:
            break
        with no_grad():
            _, memory = model(segment, memory, mem_len=mem_len)
    if not found:
        raise ValueError(f"the text is too short for {seq_len} characters behind a memory of "
                         f"{mem_len}: give a smaller memory")
    return sum(found) / len(found)


def line_attention(model, vocabulary, tokens, layer=-1, memory=32, longest=40):
    """What a layer attends to in a line of a text: (keys, queries, weights [H, T, K]).

    `queries` is the line, `keys` the characters in memory before it and the line. It is the first
    line of a good length, or `longest` characters of a text without lines. The weights are NumPy's.
    """
    text = "".join(vocabulary[token] for token in tokens[:20_000])
    memory = min(memory, len(text) // 2)
    lines = re.finditer(rf"(?<=\n)[^\n]{{{longest // 2},{longest}}}(?=\n)", text)
    start, end = next((line.span() for line in lines if line.start() >= memory),
                      (memory, memory + longest))
    read, segment = (xp.asarray(tokens[None, part])
                     for part in (slice(start - memory, start), slice(start, end)))
    with no_grad():
        states = model(read, mem_len=memory)[1] if memory else model.empty_memory(1)
    weights = to_numpy(attention_weights(model, segment, states)[layer])[:, 0]
    return text[start - memory:end], text[start:end], weights


# %% 2. Pictures
def draw_loss(axes, log):
    """The losses of a run's log, a list of dicts, over the minutes."""
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
        return [{" ": "·", "\n": "↵", "\t": "→"}.get(character, character) for character in text]

    edge = len(keys) - len(queries)                         # memory is on the left of it
    for head, (axes, of_head) in enumerate(zip(all_axes, weights), start=1):
        axes.imshow(of_head ** 0.5, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.axvline(edge - 0.5, color="tab:red")
        axes.set_xticks(range(len(keys)), shown(keys))
        axes.set_yticks(range(len(queries)), shown(queries))
        axes.tick_params(length=0, labelsize=7, labelfontfamily="monospace")
        axes.set(title=f"head {head}", xlabel="key: memory | segment", ylabel="query")


def pictures(log, model, vocabulary, tokens, seq_len, mem_len):
    """(file name, figure) of three pictures, one after the other."""
    from matplotlib.figure import Figure
    warnings.filterwarnings("ignore", "Glyph")          # a character that the font lacks
    axes = Figure(figsize=(8, 4.5)).subplots()
    draw_loss(axes, log)
    yield "loss.png", axes.figure
    axes = Figure(figsize=(8, 4.5)).subplots()
    draw_distances(axes, mean_attention(model, tokens, seq_len, mem_len), seq_len, mem_len)
    yield "attention.png", axes.figure
    config = model.config
    columns = min(2, config.n_head)
    figure = Figure(figsize=(8 * columns, 4.3 * -(-config.n_head // columns)), layout="constrained")
    figure.suptitle(f"What the heads of layer {config.n_layer} attend to in one line "
                    "(colour: square root of the weight)")
    draw_heads(figure.subplots(-(-config.n_head // columns), columns, squeeze=False).flat,
               *line_attention(model, vocabulary, tokens, memory=min(32, mem_len)))
    yield "line.png", figure
