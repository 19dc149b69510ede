# %% Transformer-XL
"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860), from the paper's idea to generated text, on top of autograd.py.

The question. A language model predicts each token from the tokens before it. A Transformer does so by attention
over a window of T tokens, and a text is longer than any window. Cut the text into segments of T and train on each by
itself, and two things go wrong: nothing further back than T can ever be used, and the first tokens of every segment
are predicted from almost nothing, although the text before them has just been read. Sliding the window by one token
at a time mends the second when evaluating, at the price of computing everything T times over.

The answer. Keep what entered each layer for the previous segment (the embeddings for layer 1, layer 1's output for
layer 2, …), and let the same layer attend to it in the next segment. With T = 4 tokens and a memory of M = 4 states:

                  segment 1        segment 2        segment 3
    layer 2       .  .  .  .       .  .  .  .       .  .  .  O     this state
                                   |__|__|__|_______|__|__|__|
    layer 1       .  .  .  .       m  m  m  m       o  o  o  o     attends to these: o in its own segment, m in memory.
                  |__|__|__|_______|__|__|__|
    embeddings    m  m  m  m       o  o  o  o       .  .  .  .     The last m attended to these when it was computed.
                  F  i  r  s       t  _  C  i       t  i  z  e

Values flow along all lines, gradients only along those within a segment. Every layer reaches one memory further back,
so N layers see about N * M tokens beyond their segment (here 2 * 4), and each token is still computed only once. The
cost: attention over M + T keys instead of T, M states a layer to keep, and no learning of what would be good to keep.

It needs one change to the Transformer: positions must be *relative*. If a token carried its absolute position in the
segment, 0 … T-1, then memory and segment would both claim 0 … T-1 and attention could not tell them apart. How far
back a key lies from a query, in contrast, does not depend on where the text was cut.

Where this differs from the paper: pre-norm layers are the default, post-norm is an option. Where it differs from the
authors' code (github.com/kimiyoung/transformer-xl): the memory has n_layer entries, not n_layer + 1 (nothing attends to
the last layer's output); u and v are each layer's own, not shared by all; with `same_length` a query sees itself and
mem_len keys, one more than there; R gets no dropout; `rel_shift` is a view; adaptive softmax and embeddings, which
characters do not need, are left out. As there, embeddings are multiplied by sqrt(D). "labml" is the annotated
implementation at nn.labml.ai/transformers/xl.

Reading order: 1. the configuration   2. positions, and the relative shift   3. relative attention
               4. the layer   5. memory   6. the model   7. the loss   8. Adam   9. generation

Shapes are written in comments with these letters:

    B  batch    T  queries: tokens of the segment    M  memory: states there are now, 0 … mem_len    K = M + T  keys
    H  heads    D  d_model                           d = D / H                                       V  vocabulary

From autograd.py: `xp` is NumPy or CuPy. A Tensor is an array with a gradient. `result(y, (x, f))` makes the Tensor of an
operation with value y whose gradient g goes on to x as f(g). `linear(x, W, b, gain, shift)` is (x * gain + shift) W + b.
"""
import dataclasses
import math

import numpy

from autograd import (Tensor, concatenate, cross_entropy, dropout, embedding, layer_norm, linear, no_grad,
                      normalise, relu, result, softmax, stop_gradient, to_numpy, xp)


# %% 1. The configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """What determines the function a model computes. ValueError names the field that is wrong.

    vocab_size    V, the number of different tokens
    mem_len       most states each layer keeps of the past; 0: none
    dropout       probability of dropping an element of the embeddings, of the output of attention and feed-forward, of the
                  feed-forward's hidden values and of the final states
    attn_dropout  probability of dropping an attention weight
    pre_norm      True: x + f(norm(x)), which trains well without a long warm-up. False: norm(x + f(x)), the paper's
    tie_weights   the output layer uses the embedding table (Press and Wolf 2017)
    positions     "sinusoid": the paper's. "learned": a learned vector and bias for each distance (Shaw et al. 2018)
    clamp_len     distances beyond this count as this; None: as they are. "learned" needs it: its table has
                  clamp_len + 1 rows
    same_length   True: each query sees itself and at most the mem_len keys before it, the last of a segment no more than
                  the first. False: the whole memory and all of its segment before it, so that late queries see more
    """
    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 512
    mem_len: int = 64
    dropout: float = 0.0
    attn_dropout: float = 0.0
    pre_norm: bool = True
    tie_weights: bool = False
    positions: str = "sinusoid"
    clamp_len: int | None = None
    same_length: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model must be a multiple of 2 * n_head = {2 * self.n_head}, not {self.d_model}")
        if self.mem_len < 0:
            raise ValueError(f"mem_len must not be negative, is {self.mem_len}")
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.positions not in ("sinusoid", "learned"):
            raise ValueError(f"positions must be 'sinusoid' or 'learned', not {self.positions!r}")
        if self.clamp_len is not None and self.clamp_len < 0:
            raise ValueError(f"clamp_len must not be negative, is {self.clamp_len}")
        if self.positions == "learned" and self.clamp_len is None:
            raise ValueError("positions='learned' needs clamp_len: the table has one row for each distance 0 … clamp_len")


# %% 2. Positions, and the relative shift
# A key's distance from a query is how many tokens back it lies: 0 for the query's own token, 1 for the one before.
# With M states of memory in front of T tokens, query i (row) and key j (column) are M + i - j apart. T = 3, M = 2:
#
#                   keys:   memory      segment
#                          j=0  j=1   j=2  j=3  j=4
#     query i=0             2    1     0    .    .          . the future, hidden by the mask
#     query i=1             3    2     1    0    .
#     query i=2             4    3     2    1    0
#
# The distances of visible keys are 0 … K-1, and each stands on a diagonal. A vector for each distance is enough.

def sinusoid(distances, d_model, dtype=numpy.float32):
    """R of the paper: [K] distances -> [K, d_model], sines then cosines of geometrically slower waves.

    R[x] = [sin(x w_0), sin(x w_1), …, cos(x w_0), cos(x w_1), …]   w_n = 10000 ^ (-2n / d_model)

    (Vaswani et al. 2017, section 3.5, with sines and cosines in two blocks instead of alternating, as the authors'
    code has them; the order is the same for every row, and W_r can undo any order.)
    """
    w = 10000.0 ** (-xp.arange(0, d_model, 2, dtype=numpy.float64) / d_model)
    angle = distances[:, None] * w[None, :]
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], axis=-1).astype(dtype)


def relative_positions(config, T, M, dtype):
    """Attention's position input, for the distances K-1, K-2, …, 0 in this order (clamped).

    Sinusoids R [K, D] as a Tensor; for learned positions the distances themselves [K], to look up in the table.
    """
    distances = xp.arange(M + T - 1, -1, -1)
    if config.clamp_len is not None:
        distances = xp.minimum(distances, config.clamp_len)
    return distances if config.positions == "learned" else Tensor(sinusoid(distances, config.d_model, dtype))


def rel_shift(x):
    """From columns that count distance to columns that count keys: [..., T, K] -> [..., T, K].

    Query i needs, for key j, the score of distance M + i - j. A vector for each of the T * K pairs (i, j) would have to
    be computed or fetched; but there are only K distances, so attention makes K vectors once and scores all queries
    against them in one matrix product. The scores then stand in the wrong columns:

        row i:   [K-1, K-2, …, 2, 1, 0]         the distance that each column stands for, the same in every row

    What row i wants is that list moved left by T-1-i places, so that distance 0 arrives at its own key j = M + i.
    Moving each row by another amount sounds like a loop. It is none: read the rows off in one line, start at place
    T-1, and begin every new row only K-1 places after the one before: row i begins where it always did, at i K, plus
    T-1-i. For T = 3, K = 5 (each number a distance):

        4 3 2 1 0                 row 0 begins here
        4 3 2 1 0     -->     4 3 2 1 0 4 3 2 1 0 4 3 2 1 0     -->     2 1 0 4 3
        4 3 2 1 0                 ^-------^-------^                     3 2 1 0 4
                                          row 1   row 2                 4 3 2 1 0

    The numbers below and on the diagonal are those of the picture above. Beyond it, where that has dots, stands the
    beginning of the next row. Those are keys in the future, which attention hides, so it does not matter what they are.

    (The authors' code puts a column of zeros in front, drops the first T numbers of the line and reads rows of K: the
    same numbers up to the diagonal, other rubbish beyond it, and a copy; this is a view. labml's `shift_right` drops the
    last row where the authors' code drops the first because its table of positions runs the other way.)

    Back: every number goes to the place in the line from which it came. The last of a row and the first of the next
    came from the same one, so there the gradients add.
    """
    *batch, T, K = x.shape
    if T == 1:
        return x                                        # a single query is at the end of its row already
    data = x.data.reshape(*batch, T * K)
    step = data.strides[-1]
    rows = xp.lib.stride_tricks.as_strided(data[..., T - 1:], x.shape, (*data.strides[:-1], (K - 1) * step, step))

    def gradient(g):
        line = xp.zeros_like(data)
        line[..., T - 1:T * K - 1] = g[..., :-1].reshape(*batch, T * (K - 1))
        line[..., T + K - 2::K - 1] += g[..., -1]
        return line.reshape(x.shape)
    return result(rows, (x, gradient))


def hidden_keys(T, M, window=None):
    """[T, K] booleans: True where query i must not see key j: the future and, with `window`, distances beyond it."""
    distance = M + xp.arange(T)[:, None] - xp.arange(M + T)[None, :]
    return (distance < 0) if window is None else (distance < 0) | (distance > window)


# %% 3. Relative attention
# A Transformer with absolute positions scores query i against key j with (x_i + p_i) W_q · (x_j + p_j) W_k, where x
# is content and p position. Multiplied out, that is four terms (the paper's A^abs, section 3.3). Transformer-XL keeps
# the four and replaces what is absolute in each (A^rel):
#
#            absolute                    relative
#     (a)    x_i W_q · x_j W_k           q · k      content: what i looks for against what j offers
#     (b)    x_i W_q · p_j W_k           q · r      what i looks for against how far away j is
#     (c)    p_i W_q · x_j W_k           u · k      what j offers, to any query: some keys always matter
#     (d)    p_i W_q · p_j W_k           v · r      how far away j is, for any query: near ones matter more
#
# q = x_i W_q and k = x_j W_k stay. p_j W_k becomes r = R[distance] W_r: the sinusoid of the distance from i to j, through a
# matrix of its own. p_i W_q, the query's own position, becomes a learned constant: where a query stands says nothing
# once distances are relative. It is u where it meets content and v where it meets distance. Summed, each score takes
# two products instead of four:
#
#     score = [ (q + u) · k + (q + v) · r ] / sqrt(d)         (a) + (c) and (b) + (d)
#
# `positions="learned"` (Shaw et al. 2018; labml's form) differs in r and in (d): r is not computed from sinusoids but
# looked up in a learned table, and v · r is a learned number for each distance and head. More freedom at each
# distance, but nothing is known about distances that were never trained; those beyond clamp_len use its last row.

class RelativeMultiHeadAttention:
    """Attention of a segment over itself and the memory before it, with relative positions (section 3.3).

    W_q, W_k, W_v, W_o [D, D]   queries, keys, values, output; head h has columns h*d … (h+1)*d
    u [H, d]                    (c)
    sinusoid:  W_r [D, D], v [H, d]                                 (b), (d)
    learned:   table [clamp_len + 1, H, d], bias [clamp_len + 1, H]   (b), (d)
    """

    def __init__(self, config, rng, dtype):
        D, H = config.d_model, config.n_head
        self.config = config
        self.W_q, self.W_k, self.W_v = (weight(rng, (D, D), dtype) for _ in range(3))
        self.W_o = weight(rng, (D, D), dtype, scale=1 / math.sqrt(2 * config.n_layer))
        self.u = zeros((H, D // H), dtype)
        if config.positions == "sinusoid":
            self.W_r = weight(rng, (D, D), dtype)
            self.v = zeros((H, D // H), dtype)
        else:
            rows = config.clamp_len + 1
            self.table = weight(rng, (rows, H, D // H), dtype, scale=math.sqrt(rows))     # looked up, not summed over
            self.bias = zeros((rows, H), dtype)

    def __call__(self, x, memory, positions, mask, generator=None, norm=None):
        """x [B, T, D], memory [B, M, D] -> [B, T, D].

        positions   what `relative_positions` returns
        mask        [T, K] booleans, True where hidden
        generator   random numbers for dropout, or None
        norm        LayerNorm whose gain and bias x and memory still lack, or None
        """
        B, T, D = x.shape
        H, d, K = self.config.n_head, D // self.config.n_head, memory.shape[1] + T

        # Queries come from the segment, keys and values from memory and segment joined: h~ = [SG(m) o h], section 3.2.
        # Projected apart and then joined, because only the segment's half has a gradient to send further back.
        def project(states, W):
            return states @ W if norm is None else linear(states, W, 0.0, norm.gain, norm.bias)

        def from_both(W):
            return concatenate([project(memory, W), project(x, W)], axis=1).reshape(B, K, H, d)
        k = from_both(self.W_k).transpose(2, 0, 3, 1)                              # [H, B, d, K]
        values = from_both(self.W_v).transpose(2, 0, 1, 3)                         # [H, B, K, d]
        # The factor 1/sqrt(d) of the scores goes to W_q, u and v, which have fewer elements.
        scale = 1 / math.sqrt(d)
        q = project(x, self.W_q * scale).reshape(B, T, H, d)

        # The heads stand in front, so that r, which is the same for all B sequences, takes one product for each head.
        content = (q + self.u * scale).transpose(2, 0, 1, 3) @ k                   # (a) + (c)   [H, B, T, K]
        position = self.position_scores(q.transpose(2, 0, 1, 3).reshape(H, B * T, d), positions, scale)
        position = rel_shift(position.reshape(H, B, T, K))                         # (b) + (d)   [H, B, T, K]

        attention = softmax(content + position, mask)                              # [H, B, T, K]
        attention = dropout(attention, self.config.attn_dropout, generator)
        mixed = (attention @ values).transpose(1, 2, 0, 3).reshape(B, T, D)        # [H, B, T, d] -> [B, T, D]
        return mixed @ self.W_o

    def position_scores(self, q, positions, scale):
        """Terms (b) + (d), a column for each distance: scaled q [H, B*T, d] -> [H, B*T, K]."""
        H, _, d = q.shape
        if self.config.positions == "learned":
            r = self.table[positions].transpose(1, 2, 0)                           # [H, d, K]
            return q @ r + (self.bias[positions] * scale).T.reshape(H, 1, -1)
        r = (positions @ self.W_r).reshape(-1, H, d).transpose(1, 2, 0)            # [H, d, K]
        return (q + (self.v * scale).reshape(H, 1, d)) @ r


# The parameters start as random numbers from NumPy's generator on every device, so that a seed means the same model
# on the CPU and on the GPU. With the spread 1/sqrt(3 n) a product over n inputs is about 0.6 times the size of its input;
# what is added to the residual stream 2 * n_layer times starts smaller by sqrt(2 * n_layer) (as in GPT-2).

def weight(rng, shape, dtype, scale=1.0):
    """A parameter [inputs, …] of normal numbers with standard deviation scale / sqrt(3 * inputs)."""
    return Tensor(xp.asarray((rng.normal(size=shape) * (scale / math.sqrt(3 * shape[0]))).astype(dtype)), True)


def zeros(shape, dtype):
    return Tensor(xp.zeros(shape, dtype=dtype), requires_grad=True)


def ones(shape, dtype):
    return Tensor(xp.ones(shape, dtype=dtype), requires_grad=True)


# %% 4. The layer
# Attention, where tokens exchange information, then a feed-forward network, where each thinks for itself. Both are
# added to what was there, so that a layer starts out close to doing nothing and gradients have a straight way down.

class LayerNorm:
    """layer_norm with its parameters: gain [D], bias [D]."""

    def __init__(self, config, dtype):
        self.gain, self.bias = ones(config.d_model, dtype), zeros(config.d_model, dtype)

    def __call__(self, x):
        return layer_norm(x, self.gain, self.bias)


class FeedForward:
    """relu(x W_1 + b_1) W_2 + b_2, position by position: [B, T, D] -> [B, T, D] through [B, T, d_ff]."""

    def __init__(self, config, rng, dtype):
        D, F = config.d_model, config.d_ff
        self.dropout = config.dropout
        self.W_1, self.b_1 = weight(rng, (D, F), dtype), zeros(F, dtype)
        self.W_2, self.b_2 = weight(rng, (F, D), dtype, scale=1 / math.sqrt(2 * config.n_layer)), zeros(D, dtype)

    def __call__(self, x, generator=None, norm=None):
        gain_and_bias = () if norm is None else (norm.gain, norm.bias)
        hidden = dropout(relu(linear(x, self.W_1, self.b_1, *gain_and_bias)), self.dropout, generator)
        return linear(hidden, self.W_2, self.b_2)


class Layer:
    """One layer: x [B, T, D] and its memory [B, M, D] -> [B, T, D]."""

    def __init__(self, config, rng, dtype):
        self.config = config
        self.attention = RelativeMultiHeadAttention(config, rng, dtype)
        self.attention_norm = LayerNorm(config, dtype)
        self.feed_forward = FeedForward(config, rng, dtype)
        self.feed_forward_norm = LayerNorm(config, dtype)

    def __call__(self, x, memory, positions, mask, generator=None):
        p = self.config.dropout
        if self.config.pre_norm:
            # Memory holds what entered the layer, so it is normalised like the segment: x and memory are one text.
            # norm(x) is written in two halves, normalise here and gain and bias in `linear`.
            x = x + dropout(self.attention(normalise(x), normalise(memory), positions, mask, generator,
                                           self.attention_norm), p, generator)
            return x + dropout(self.feed_forward(normalise(x), generator, self.feed_forward_norm), p, generator)
        x = self.attention_norm(x + dropout(self.attention(x, memory, positions, mask, generator), p, generator))
        return self.feed_forward_norm(x + dropout(self.feed_forward(x, generator), p, generator))


# %% 5. Memory
# The memory of a layer is the *input* of that layer for the last M tokens: what its keys and values were computed
# from. It is stored before the layer runs, as plain arrays without history. Keeping the history would be exact, and would
# keep the graph of the whole text alive. Without it a segment's cost is constant, and states in memory are constants: no
# gradient reaches the layers and embeddings that made them, only the parameters that use them now.
#
#     before     [ m m m m m m ]              M = 6 states of the past
#     segment                   [ h h h h ]   T = 4 new inputs of this layer
#     after              [ m m h h h h ]      the last M of both
#
# No parameter's shape depends on M, so a model trained with one memory length can be evaluated with another, longer one.
# And evaluating a text is one pass over it: every token is computed once and yet sees (once memory is full, and without
# `same_length`) M or more tokens before it, where a window slid by one token would be computed anew for each of them.

def update_memory(memory, h, mem_len):
    """The last mem_len of [memory o h]: [B, M, D], [B, T, D] -> [B, min(M + T, mem_len), D], a new array."""
    M, T = memory.shape[1], h.shape[1]
    new = min(T, mem_len)
    old = min(M, mem_len - new)
    return xp.concatenate([memory[:, M - old:], h[:, T - new:]], axis=1)


# %% 6. The model
class TransformerXL:
    """The language model: `logits, memory = model(tokens, memory)`.

    config   Config
    seed     of the initial weights
    dtype    float32 for speed, float64 for truth (gradient checks)

    Dropout acts when, and only when, a call is given a generator; there is no training mode to forget.
    """

    def __init__(self, config, seed=0, dtype=numpy.float32):
        rng = numpy.random.default_rng(seed)
        V, D = config.vocab_size, config.d_model
        self.config, self.dtype = config, numpy.dtype(dtype)
        self.embedding = weight(rng, (V, D), dtype, scale=math.sqrt(V / D) * math.sqrt(3))     # rows of length about 1
        self.layers = [Layer(config, rng, dtype) for _ in range(config.n_layer)]
        if config.pre_norm:
            self.norm = LayerNorm(config, dtype)        # post-norm layers end with theirs
        if not config.tie_weights:
            self.W_out = weight(rng, (D, V), dtype)
        self.b_out = zeros(V, dtype)

    def parameters(self):
        """Dotted name -> Tensor, in a fixed order: {"embedding": …, "layers.0.attention.W_q": …, …}."""
        return dict(named_tensors(self))

    def empty_memory(self, batch):
        """The memory before the first segment: n_layer arrays [batch, 0, D]."""
        return [xp.zeros((batch, 0, self.config.d_model), dtype=self.dtype) for _ in self.layers]

    def __call__(self, tokens, memory=None, generator=None, mem_len=None):
        """tokens [B, T] integers, memory (n_layer arrays [B, M, D], or None) -> logits [B, T, V], new memory.

        generator   random numbers for dropout (xp.random.default_rng(…)) while training, None otherwise
        mem_len     states to keep, where it differs from the configuration's
        """
        config = self.config
        tokens = tokens.data if isinstance(tokens, Tensor) else xp.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers [batch, seq_len], not {tokens.dtype}{list(tokens.shape)}")
        B, T = tokens.shape
        memory = self.empty_memory(B) if memory is None else memory
        if len(memory) != config.n_layer or any(m.shape != (B, memory[0].shape[1], config.d_model) for m in memory):
            raise ValueError(f"memory must be {config.n_layer} arrays [{B}, M, {config.d_model}], "
                             f"not {[list(m.shape) for m in memory]}")
        mem_len = config.mem_len if mem_len is None else mem_len
        M = memory[0].shape[1]

        positions = relative_positions(config, T, M, self.dtype)
        mask = hidden_keys(T, M, mem_len if config.same_length else None)

        h = embedding(self.embedding, tokens) * math.sqrt(config.d_model)          # [B, T, D]
        h = dropout(h, config.dropout, generator)
        new_memory = []
        for layer, m in zip(self.layers, memory):
            new_memory.append(update_memory(m, stop_gradient(h).data, mem_len))
            h = layer(h, Tensor(m), positions, mask, generator)
        if config.pre_norm:
            h = self.norm(h)
        h = dropout(h, config.dropout, generator)
        return linear(h, self.embedding.T if config.tie_weights else self.W_out, self.b_out), new_memory


def named_tensors(part, prefix=""):
    """(dotted name, Tensor) of every Tensor in an object's attributes and in those of its parts."""
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        for key, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if hasattr(item, "__dict__"):
                yield from named_tensors(item, f"{prefix}{name}." if key is None else f"{prefix}{name}.{key}.")


# %% 7. The loss
# The model's loss is the mean cross-entropy of the next token, in nats: -log of the probability it gave to what came.
# ln 2 nats are one bit, so bits per character = nats / ln 2; perplexity = exp(nats), the number of equally likely
# tokens that would be as hard to guess from.

def loss_and_memory(model, tokens, targets, memory=None, generator=None):
    """(mean cross-entropy in nats: a scalar Tensor, the new memory). tokens, targets [B, T]."""
    logits, memory = model(tokens, memory, generator)
    return cross_entropy(logits, targets), memory


# %% 8. Adam
class Adam:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019) and clipping.

    m and v (here not memory and the v of attention) are running means of the gradient and of its square; m / sqrt(v) is of
    about size 1 for every parameter, whatever the scale of its gradient, and a step of about size lr. Both start at 0 and so are too small at first: after t steps
    the weights of the running mean sum to 1 - beta^t, not 1. Dividing by that sum (the bias correction) makes them
    true averages from the first step on.

        g = gradient * min(1, clip / |gradient|)       |.| the global norm, over all parameters together
        m = beta1 m + (1 - beta1) g                    v = beta2 v + (1 - beta2) g^2
        w = w - lr [ m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w ]

    Weight decay applies to the matrices W only, not to embeddings, gains and biases. It stands outside the moments:
    as part of g it would be divided by sqrt(v) and fade where gradients are large.

    The parameters are moved into one flat array, of which each `.data` becomes a view, so that a step is a dozen
    operations on long arrays instead of a dozen for each parameter.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=None):
        self.parameters, self.lr, self.betas, self.eps, self.clip = list(parameters.values()), lr, betas, eps, clip
        self.value = xp.concatenate([p.data.reshape(-1) for p in self.parameters])
        self.decay = xp.concatenate(
            [xp.full(p.size, weight_decay * name.split(".")[-1].startswith("W"), dtype=p.dtype)
             for name, p in parameters.items()])
        self.m, self.v = xp.zeros_like(self.value), xp.zeros_like(self.value)
        self.t = 0
        end = 0
        for p in self.parameters:
            start, end = end, end + p.size
            p.data = self.value[start:end].reshape(p.shape)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def step(self, lr=None):
        """Update the parameters from their `.grad`; returns the gradient's norm before clipping, a 0-d array."""
        lr = self.lr if lr is None else lr
        self.t += 1
        g = xp.concatenate([xp.zeros(p.size, dtype=p.dtype) if p.grad is None else p.grad.reshape(-1)
                            for p in self.parameters])
        norm = xp.asarray(xp.sqrt(g @ g))
        if self.clip is not None:
            g *= xp.minimum(1.0, self.clip / (norm + 1e-12)).astype(g.dtype)
        # On the CPU in blocks that stay in the cache from one operation to the next: 0.6 of the time for 5 million numbers.
        block = 1 << 16 if xp.module is numpy else g.size
        for start in range(0, g.size, block):
            self._update(g, slice(start, start + block), lr)
        return norm

    def _update(self, gradient, part, lr):
        g, m, v, w, decay = (array[part] for array in (gradient, self.m, self.v, self.value, self.decay))
        beta1, beta2 = self.betas
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        step = m / (1 - beta1 ** self.t)
        step /= xp.sqrt(v / (1 - beta2 ** self.t)) + self.eps
        w -= lr * (step + decay * w)


def warmup_cosine(step, steps, peak, warmup, final):
    """Learning rate of step 0, 1, …: a line up to `peak` over `warmup` steps, then half a cosine down to `final`.

    The warm-up is for v, which the first few gradients estimate badly; the decay lets the weights settle.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


# %% 9. Generation
# Each new token is one call with T = 1: its keys are the memory and itself. The window never has to be computed
# again, and the text may be of any length.

def generate(model, prompt, length, temperature=1.0, top_k=None, top_p=None, rng=None, mem_len=None):
    """Iterate over `length` tokens that continue `prompt` (a non-empty sequence of tokens).

    temperature   divides the logits; below 1 safer, above 1 more varied, 0: always the likeliest token
    top_k         choose among the k likeliest only
    top_p         choose among the fewest tokens whose probabilities reach p only (nucleus; Holtzman et al. 2020)
    rng           numpy.random.Generator; None: seed 0
    """
    rng = rng or numpy.random.default_rng(0)
    mem_len = model.config.mem_len if mem_len is None else mem_len
    prompt = numpy.asarray(prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"generate: the prompt must be a non-empty list of tokens, not of shape {list(prompt.shape)}")
    memory = None
    for segment in numpy.split(prompt, range(max(1, mem_len), prompt.size, max(1, mem_len))):
        with no_grad():
            logits, memory = model(xp.asarray(segment[None]), memory, mem_len=mem_len)
    for _ in range(length):
        token = sample(to_numpy(logits.data[0, -1]), temperature, top_k, top_p, rng)
        yield token
        with no_grad():
            logits, memory = model(xp.asarray([[token]]), memory, mem_len=mem_len)


def sample(logits, temperature, top_k, top_p, rng):
    """One token from logits [V] (a NumPy array), see `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    order = numpy.argsort(-logits, kind="stable")[:top_k]           # likeliest first
    logits = logits[order].astype(numpy.float64)
    p = numpy.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_p is not None:
        p = p[:numpy.searchsorted(p.cumsum(), top_p) + 1]
        p /= p.sum()
    return int(order[rng.choice(len(p), p=p)])
