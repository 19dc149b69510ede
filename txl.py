# %% Transformer-XL
"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860), from the idea to generated text.

Attention, for whom it is new. Each token has a state, a vector; at first this is its
embedding, which is learned. Three learned matrices make a query of it, what the token looks
for; a key, what it offers; and a value, what it passes on. A query's dot products with all
keys up to its own are its scores. Softmax turns scores into weights. The token gets the sum
of the values, each times its weight; a fourth matrix turns this into a change of its state.
Several heads do this side by side, each with its share of the width. A layer is attention,
then a small network for each token.

The question. A language model predicts each token from the tokens before it. A Transformer
does so by attention over a window of T tokens, and a text is longer than any window. Cut
the text into segments of T, train on each by itself, and two things go wrong. Nothing
further back than T can ever be used. And the first tokens of every segment are predicted
from almost nothing, although the text before them has just been read.

The answer. Each layer keeps its inputs of the last M tokens, and attends to them in the
next segment as well. With segments of T = 3 tokens, a memory of M = 2, and _ for a space:

                           segment 1     segment 2     segment 3
    output of layer 2      .  .  .       .  .  .       .  .  O
                                            |__|_______|__|__|
    output of layer 1      .  .  .       .  m  m       o  o  o
                              |__|_______|__|__|
    embeddings             .  m  m       o  o  o       .  .  .
                           F  i  r       s  t  _       C  i  t

The state O attended to the three o of its own segment, "Cit", and to the two m on their
left, layer 2's memory. These were made one segment earlier in the same way: from the o of
their segment up to themselves, and the two m on the left of these, layer 1's memory at that
time. Information flows along all lines, gradients only within the segment being trained.

How far does O see beyond its segment? Layer 2's memory lies within segment 2. Its newest
state has seen all of that segment: 3 tokens. Layer 1's memory lies before segment 2: 2
more. So it is 3 + 2 tokens, "ir" and "st_". In general the first layer adds M. Each further
layer adds M, rounded up to whole segments.

Each token is computed once. The cost: attention over M + T keys instead of T, M states a
layer to keep, and no learning of what is good to keep.

The sections follow this example, "First_Cit". Lines behind a bar are printed by `python
txl.py`.

    1. memory   2. relative positions   3. the shift   4. attention   5. the layer
    6. the model   7. the loss   8. Adam   9. generation

    A. attention, faster   B. learned positions   C. Adam, divided among processes
    D. generation, faster   E. what layers attend to   F. what must hold
    G. the paper and other code   H. a walk through it

Letters for shapes and sizes:

    B  batch   T  queries: tokens of the segment   M  memory, in states   K = M + T  keys
    H  heads   D  d_model    d = D / H             F  d_ff    V  vocabulary    N  layers

To change …              touch …
    the positions        a subclass like LearnedPositions (B), and where that is named: Layer
                         (5), relative_positions (2), Config (6), check_config (F)
    the optimiser        a subclass of DividedAdam (C) with an `update` of its own, and the line
                         that makes it in train_shakespeare.py
    the layer            Layer (5), parameter_count (6), and CachedLayer (D), which generates
    the corpus           nothing: train_shakespeare.py --data FILE
    the precision        dtype of TransformerXL (6); to multiply in another one: `linear` and
                         `matmul` of autograd.py, and `attend` (A)
"""
import contextlib
import dataclasses
import math

import numpy

from autograd import (Tensor, activated, arrays, concatenate, cross_entropy, dropout,
                      embedding, fold, layer_norm, linear, no_grad, normalise, result, softmax,
                      stop_gradient)
from backend import (adam_update, gpu_form, jointly, leading_sums, on_a_gpu, op, product, row_dots,
                     row_sums, scaled_sum, shared_zeros, to_numpy, within, xp)


# %% 1. Memory
# The memory of a layer is its *input* for the last M tokens. It is stored before the layer
# runs, as plain arrays: constants, without the operations that made them.
#
# So parameters get a gradient for the use they make of memory in this segment, and none for
# having made it in an earlier one. That gradient would say what is good to store. But it
# would need the graph of the whole text. Without it the cost of a segment is constant.
#
# Memory starts empty and grows to mem_len states. With T = 3 and mem_len = 2:
#
#   |  segment   memory   how many keys its queries see   memory after
#   |  F i r     0        1, 2, 3                         i r
#   |  s t _     2        3, 4, 5                         t _
#   |  C i t     2        3, 4, 5                         i t
#
# Row b of the memory belongs to row b of the batch. So row b of the next segment must be
# the text that follows.
#
# No parameter's shape depends on M, so a model can be evaluated with a longer memory than
# it was trained with. To evaluate a text is one pass over it. Every token is computed once,
# and sees, once memory is full, at least the M tokens before it.

def update_memory(memory, x, mem_len):
    """The last mem_len states of memory and x: [B, M, D], [B, T, D] -> [B, ≤ mem_len, D].

    >>> memory, segment = numpy.array([[[1], [2], [3]]]), numpy.array([[[4], [5]]])
    >>> update_memory(memory, segment, mem_len=3)[0, :, 0].tolist()
    [3, 4, 5]
    """
    M, T = memory.shape[1], x.shape[1]
    new = min(T, mem_len)
    old = min(M, mem_len - new)
    return xp.concatenate([memory[:, M - old:], x[:, T - new:]], axis=1)        # a new array


# %% 2. Relative positions
# Attention alone does not know the order of its keys. A Transformer adds a vector for the
# place 0 … T-1 to each embedding. With memory that fails: the states of both segments would
# claim the same places, and a stored state cannot be renumbered. But how far back a key
# lies from a query does not depend on where the text was cut. That distance is what
# Transformer-XL uses.
#
# Query i (row) and key j (column) are M + i - j tokens apart. For segment 2 of the example:
#
#                      memory    segment
#                      i    r    s    t    _
#     query s          2    1    0    .    .        . the future, hidden by a mask
#     query t          3    2    1    0    .
#     query _          4    3    2    1    0
#
# The visible distances are 0 … K-1. Each distance n gets a vector R[n] of D numbers, made
# of waves:
#
#     R[n] = [sin(n w_0), sin(n w_1), …, cos(n w_0), cos(n w_1), …]     w_f = 10000^(-2f / D)
#
# Fast waves tell near distances apart, slow ones far distances (Vaswani et al. 2017,
# section 3.5). The example has D = 2, which is one wave:
#
#   |  n                 4      3      2      1      0
#   |  sin(n)        -0.76   0.14   0.91   0.84   0.00
#   |  cos(n)        -0.65  -0.99  -0.42   0.54   1.00

def sinusoid(distances, d_model, dtype=numpy.float32):
    """R of the paper: distances [K] -> [K, D]."""
    w = 10000.0 ** (-xp.arange(0, d_model, 2, dtype=numpy.float64) / d_model)
    angle = distances[:, None] * w[None, :]
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], axis=-1).astype(dtype)


def relative_positions(config, T, M, dtype):
    """R [K, D] for the distances K-1, K-2, …, 0: the order of the last query's keys.

    With config.clamp_len a larger distance counts as that one.
    """
    distances = xp.arange(M + T - 1, -1, -1)
    if config.clamp_len is not None:
        distances = xp.minimum(distances, config.clamp_len)
    if config.positions == "learned":
        return distances                            # appendix B has a table of vectors
    return Tensor(sinusoid(distances, config.d_model, dtype))


def key_distances(T, M):
    """[T, K] integers: how far back key j lies from query i; negative in the future."""
    return M + xp.arange(T)[:, None] - xp.arange(M + T)[None, :]


def hidden_keys(T, M, window=None):
    """The mask [T, K]: True where query i must not see key j.

    That is the future and, with `window`, all distances beyond it.

    >>> hidden_keys(T=3, M=2).astype(int).tolist()
    [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    """
    distance = key_distances(T, M)
    return (distance < 0) if window is None else (distance < 0) | (distance > window)


# %% 3. The shift
# Query i scores key j with a vector that belongs to their distance. There are T K pairs,
# but only K distances. So all queries are multiplied with all K vectors, in one matrix
# product. Its columns stand for distances, the same in every row: 4 3 2 1 0. Attention
# needs columns that stand for keys. For that, row i must move left by T-1-i. The last row
# stays, the first moves furthest.
#
# This needs no loop. Write the rows one behind the other, in one line. Row i begins at
# place i K. Moved left it begins at i K + T-1-i, which is T-1 + i (K-1): the first row at
# place T-1, each further one K-1 places after the one before. Here each number is a
# distance:
#
#     4 3 2 1 0             4 3 2 1 0 4 3 2 1 0 4 3 2 1 0             2 1 0 4 3
#     4 3 2 1 0     -->         ^       ^       ^             -->     3 2 1 0 4
#     4 3 2 1 0                 row 0   row 1   row 2                 4 3 2 1 0
#
# Up to its 0 each row is that of the table in section 2. Right of the 0 the next unshifted
# row begins. Those are keys in the future, which the mask hides.

@op
def rel_shift(a):
    """From columns that stand for distances to columns that stand for keys: [..., T, K].

    >>> rel_shift(Tensor([[4, 3, 2, 1, 0]] * 3)).numpy().tolist()
    [[2, 1, 0, 4, 3], [3, 2, 1, 0, 4], [4, 3, 2, 1, 0]]
    """
    x, = arrays(a)
    return result(shifted_rows(x, x.shape[-1]), (a, shift_back))


def shifted_rows(x, width):
    """[..., T, K] -> [..., T, width]: each shifted row's first numbers, a view if x allows."""
    *batch, T, K = x.shape
    line = x.reshape(*batch, T * K)
    step = line.strides[-1]
    return xp.lib.stride_tricks.as_strided(
        line[..., T - 1:], (*batch, T, width), (*line.strides[:-1], (K - 1) * step, step))


def shift_back(g):
    """The gradient of rel_shift: each goes to the place in the line its number came from.

    A row's last number and the next row's first came from one place, where gradients add.
    The line's first T-1 places were left out and get 0.
    """
    *batch, T, K = g.shape
    if T == 1:
        return g                                    # the only row is the last, which stays
    back = xp.empty((*batch, T, K), dtype=g.dtype)
    line = back.reshape(*batch, T * K)
    line[..., :T - 1] = line[..., -1] = 0           # places that no number is written to
    shifted_rows(back, K - 1)[...] = g[..., :-1]    # without the last column rows do not overlap
    line[..., T + K - 2::K - 1] += g[..., -1]       # the last column, where the next row begins
    return back


# %% 4. Attention
# With absolute positions p, query i scores key j with (x_i + p_i) W_q · (x_j + p_j) W_k,
# where x is content. Multiplied out, these are four terms (section 3.3 of the paper).
# Transformer-XL keeps all four, in every layer, and replaces what is absolute:
#
#            absolute                    relative
#     (a)    x_i W_q · x_j W_k           q · k      what i looks for, against what j offers
#     (b)    x_i W_q · p_j W_k           q · r      what i looks for, against how far away j is
#     (c)    p_i W_q · x_j W_k           u · k      what j offers, to any query
#     (d)    p_i W_q · p_j W_k           v · r      how far away j is, for any query
#
# q = x_i W_q and k = x_j W_k stay. The key's place becomes the distance n between both:
# r = R[n] W_r, with a matrix of its own. The query's place says nothing once distances are
# relative. It becomes a learned constant: u where it meets content, v where it meets
# distance. It is two vectors because what they meet comes from two matrices.
#
#     score = [ (q + u) · k + q · r + v · r ] / sqrt(d)
#
# A sum of d products of independent numbers of size 1 has a size of about sqrt(d). Divided
# by that, scores stay small. (A softmax of large scores would be almost a choice of one
# key.)
#
# The query "t" of the example, with one head of d = 2 numbers. All matrices are the
# identity. So states are queries, keys and values, and r is R[n]. q = (1, -1),
# u = (0.5, 0), v = (0, 0.5):
#
#   |  distance n        4      3      2      1      0
#   |  (b) q · r     -0.10   1.13   1.33   0.30  -1.00
#   |  (d) v · r     -0.33  -0.49  -0.21   0.27   0.50
#   |  (b) + (d)     -0.43   0.64   1.12   0.57  -0.50
#
# These columns stand for distances. "t" is row 1, which moves left by one. Then they stand
# for keys, and (a) and (c) join in:
#
#   |  key               i      r      s      t      _
#   |  (b) + (d)      0.64   1.12   0.57  -0.50
#   |  k = value     (1,0)  (0,1)  (1,1) (1,-1) (-1,1)
#   |  (a) q · k      1.00  -1.00   0.00   2.00  -2.00
#   |  (c) u · k      0.50   0.00   0.50   0.50  -0.50
#   |  score          1.51   0.08   0.76   1.41
#   |  weight         0.38   0.09   0.18   0.35   0.00
#   |  output         (0.91, -0.08)

class RelativeMultiHeadAttention:
    """Attention of a segment over the memory before it and itself (section 3.3 of the paper).

    Each head has d neighbouring columns of W_q, W_k, W_v and W_r, and d neighbouring rows
    of W_o.
    """

    def __init__(self, config, rng, dtype):
        D, H = config.d_model, config.n_head
        self.config = config
        self.W_q = weight(rng, (D, D), dtype)
        self.W_kv = weight(rng, (D, 2 * D), dtype)              # W_k, then W_v
        self.W_o = weight(rng, (D, D), dtype, scale=1 / math.sqrt(2 * config.n_layer))
        self.u = zeros((H, D // H), dtype)
        self.add_position_parameters(rng, dtype)

    def add_position_parameters(self, rng, dtype):
        D = self.config.d_model
        self.W_r, self.v = weight(rng, (D, D), dtype), zeros(self.u.shape, dtype)

    def __call__(self, x, memory, positions, mask, generator=None, norm=None):
        """x [B, T, D], memory [B, M, D] -> [B, T, D].

        positions   what `relative_positions` returns
        mask        [T, K] booleans, True where hidden
        generator   random numbers for dropout, or None
        norm        the layer normalisation of x and memory that comes first, or None
        """
        H, D = self.config.n_head, self.config.d_model
        q, kv = self.project(x, memory, norm)
        k, values = heads(kv[..., :D], H), heads(kv[..., D:], H)            # [H, B, K, d]
        weights = self.weights(heads(q, H), k, positions, mask)             # [H, B, T, K]
        weights = dropout(weights, self.config.attn_dropout, generator)
        mixed = weights @ values                                            # [H, B, T, d]
        return mixed.transpose(1, 2, 0, 3).reshape(x.shape) @ self.W_o

    def project(self, x, memory, norm):
        """Queries [B, T, D] of the segment; keys and values [B, K, 2 D] of memory and it."""
        if norm is not None:
            x, memory = norm(x), norm(memory)
        return x @ self.W_q, concatenate([memory, x], axis=1) @ self.W_kv

    def weights(self, q, k, positions, mask):
        """How much each query attends to each key."""
        H, d = self.u.shape
        r, v_r = self.position_terms(positions)             # [H, 1, d, K], [H, 1, 1, K]
        content = (q + self.u.reshape(H, 1, 1, d)) @ k.swapaxes(-1, -2)     # (a) + (c)
        position = q @ r + v_r                                              # (b) + (d)
        score = content + rel_shift(position)
        return softmax(score * (1 / math.sqrt(d)), mask)

    def position_terms(self, positions):
        """r of every distance, and (d) v · r."""
        H, d = self.u.shape
        r = (positions @ self.W_r).reshape(-1, 1, H, d).transpose(2, 1, 3, 0)
        return r, self.v.reshape(H, 1, 1, d) @ r


def heads(x, H):
    """[B, n, D] -> [H, B, n, d], a view: each head's columns become a matrix of their own."""
    return x.reshape(*x.shape[:2], H, x.shape[2] // H).transpose(2, 0, 1, 3)


# Parameters start as random numbers from NumPy's generator on every device, so that a seed
# means one model. With a standard deviation of 1 / sqrt(3 n), a product over n inputs is
# about 0.6 times the size of its input. W_o and W_2 start smaller by sqrt(2 N), as in
# GPT-2, because their results are added to a token's state 2 N times.

def weight(rng, shape, dtype, scale=1.0):
    """A parameter [inputs, …]: normal numbers of standard deviation scale / sqrt(3 inputs)."""
    values = rng.normal(size=shape) * (scale / math.sqrt(3 * shape[0]))
    return Tensor(xp.asarray(values.astype(dtype)), requires_grad=True)


def zeros(shape, dtype):
    return Tensor(xp.zeros(shape, dtype=dtype), requires_grad=True)


# %% 5. The layer
# First attention, where tokens exchange information. Then a feed-forward network, where
# each thinks for itself. Both are added to what was there. The paper normalises the sum
# (post-norm). The default here is to normalise what goes into both (pre-norm): gradients
# then reach the lowest layer undiminished, and a short warm-up is enough.

class LayerNorm:
    """layer_norm with its parameters: gain [D], bias [D]."""

    def __init__(self, config, dtype):
        self.gain = Tensor(xp.ones(config.d_model, dtype=dtype), requires_grad=True)
        self.bias = zeros(config.d_model, dtype)

    def __call__(self, x):
        return layer_norm(x, self.gain, self.bias)


class FeedForward:
    """relu(x W_1 + b_1) W_2 + b_2, or with relu(…)^2: [B, T, D] -> [B, T, D] by way of F."""

    def __init__(self, config, rng, dtype):
        D, F = config.d_model, config.d_ff
        self.dropout = config.dropout
        self.activation = config.activation
        self.W_1, self.b_1 = weight(rng, (D, F), dtype), zeros(F, dtype)
        self.W_2 = weight(rng, (F, D), dtype, scale=1 / math.sqrt(2 * config.n_layer))
        self.b_2 = zeros(D, dtype)

    def __call__(self, x, generator=None):
        hidden = activated(x, self.W_1, self.b_1, self.activation)      # relu(x W_1 + b_1)
        return linear(dropout(hidden, self.dropout, generator), self.W_2, self.b_2)


class Layer:
    """One layer: x [B, T, D] and its memory [B, M, D] -> [B, T, D]."""

    def __init__(self, config, rng, dtype):
        # FasterAttention (A) computes what RelativeMultiHeadAttention computes.
        attention = LearnedPositions if config.positions == "learned" else FasterAttention
        self.config = config
        self.attention = attention(config, rng, dtype)
        self.attention_norm = LayerNorm(config, dtype)
        self.feed_forward = FeedForward(config, rng, dtype)
        self.feed_forward_norm = LayerNorm(config, dtype)

    def __call__(self, x, memory, positions, mask, generator=None):
        p = self.config.dropout
        if self.config.pre_norm:            # x + f(norm(x)), twice
            y = self.attention(x, memory, positions, mask, generator, self.attention_norm)
            x = x + dropout(y, p, generator)
            y = self.feed_forward(self.feed_forward_norm(x), generator)
            return x + dropout(y, p, generator)
        y = self.attention(x, memory, positions, mask, generator)   # norm(x + f(x)), twice
        x = self.attention_norm(x + dropout(y, p, generator))
        y = self.feed_forward(x, generator)
        return self.feed_forward_norm(x + dropout(y, p, generator))


# %% 6. The model
@dataclasses.dataclass(frozen=True)
class Config:
    """What determines the function a model computes. ValueError names a wrong field."""
    vocab_size: int                 # V, the number of different tokens
    n_layer: int = 4                # N
    n_head: int = 4                 # H
    d_model: int = 128              # D
    d_ff: int = 512                 # F, the width of the feed-forward network
    mem_len: int = 64               # the most states that each layer keeps; 0: none
    dropout: float = 0.0            # probability of setting a number to 0 in training: of
                                    # the embeddings, of what attention and feed-forward
                                    # return, of the latter's hidden values, and of the
                                    # final states
    attn_dropout: float = 0.0       # the same for an attention weight
    pre_norm: bool = True           # x + f(norm(x)); False: the paper's norm(x + f(x))
    tie_weights: bool = False       # the output uses the embeddings (Press and Wolf 2017)
    positions: str = "sinusoid"     # R of section 2; "learned": appendix B
    clamp_len: int | None = None    # a larger distance counts as this one; None: no limit
    activation: str = "relu"        # of the feed-forward network; or "squared_relu", which is
                                    # train_shakespeare.py's default
    same_length: bool = False       # a query sees at most mem_len keys before itself; False:
                                    # the whole memory, and its segment up to itself

    def __post_init__(self):
        check_config(self)                                      # appendix F

    def parameter_count(self):
        """How many numbers a model of this configuration learns."""
        V, D, F, H = self.vocab_size, self.d_model, self.d_ff, self.n_head
        positions = D * D + D                                   # W_r, v; or table, bias
        if self.positions == "learned":
            positions = (self.clamp_len + 1) * (D + H)
        attention = 4 * D * D + D + positions                   # W_q, W_kv, W_o, u
        layer = attention + 2 * D * F + F + D + 4 * D           # W_1, W_2, b_1, b_2, norms
        output = (0 if self.tie_weights else D * V) + V + (2 * D if self.pre_norm else 0)
        return V * D + self.n_layer * layer + output


class TransformerXL:
    """The language model: `logits, memory = model(tokens, memory)`.

    dtype: float32 for speed, float64 for gradient checks. Dropout acts when, and only when,
    a call is given a generator; there is no training mode to forget.
    """

    def __init__(self, config, seed=0, dtype=numpy.float32):
        rng = numpy.random.default_rng(seed)
        V, D = config.vocab_size, config.d_model
        self.config, self.dtype = config, numpy.dtype(dtype)
        # Rows of length about 1; times sqrt(D), in the call, numbers of size about 1.
        self.embedding = weight(rng, (V, D), dtype, scale=math.sqrt(3 * V / D))
        self.layers = [Layer(config, rng, dtype) for _ in range(config.n_layer)]
        if config.pre_norm:
            self.norm = LayerNorm(config, dtype)        # post-norm layers end with theirs
        if not config.tie_weights:
            self.W_out = weight(rng, (D, V), dtype)
        self.b_out = zeros(V, dtype)

    def __call__(self, tokens, memory=None, generator=None, mem_len=None):
        """tokens [B, T] integers -> logits [B, T, V], the new memory.

        memory      N arrays [B, M, D], as the last call returned them, or None
        generator   random numbers for dropout: xp.random.default_rng(…); None: no dropout
        mem_len     states to keep, where it differs from the configuration's
        """
        config = self.config
        tokens, memory = checked_call(self, tokens, memory)         # appendix F
        (B, T), M, D = tokens.shape, memory[0].shape[1], config.d_model
        mem_len = config.mem_len if mem_len is None else mem_len
        positions = relative_positions(config, T, M, self.dtype)
        mask = hidden_keys(T, M, mem_len if config.same_length else None)

        x = embedding(self.embedding, tokens) * math.sqrt(D)        # [B, T, D]
        x = dropout(x, config.dropout, generator)
        new_memory = []
        for layer, past in zip(self.layers, memory):
            new_memory.append(update_memory(past, stop_gradient(x).data, mem_len))
            x = layer(x, past, positions, mask, generator)
        if config.pre_norm:
            x = self.norm(x)
        x = dropout(x, config.dropout, generator)
        W_out = self.embedding.T if config.tie_weights else self.W_out
        return linear(x, W_out, self.b_out), new_memory

    def empty_memory(self, batch):
        """The memory before the first segment: N arrays [batch, 0, D]."""
        empty = xp.zeros((batch, 0, self.config.d_model), dtype=self.dtype)
        return [empty for _ in self.layers]

    def __repr__(self):
        c = self.config
        return (f"TransformerXL: {c.parameter_count():,} parameters, {self.dtype}\n"
                f"    {c.n_layer} layers, {c.n_head} heads, width {c.d_model}, "
                f"feed-forward {c.d_ff} ({c.activation}), vocabulary {c.vocab_size}\n"
                f"    memory {c.mem_len}, {c.positions} positions, "
                f"{'pre' if c.pre_norm else 'post'}-norm, dropout {c.dropout:g}")

    def parameters(self):
        """{"embedding": Tensor, "layers.0.attention.W_q": …, …}, in a fixed order."""
        return dict(named_tensors(self))


def named_tensors(part, prefix=""):
    """(dotted name, Tensor) of every Tensor in an object and in its parts."""
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, list):
            for place, item in enumerate(value):
                yield from named_tensors(item, f"{prefix}{name}.{place}.")
        elif hasattr(value, "__dict__"):
            yield from named_tensors(value, f"{prefix}{name}.")


# %% 7. The loss
# The mean cross-entropy of the next token, in nats: -log of the probability that the model
# gave to what came. ln 2 nats are one bit, so bits a character = nats / ln 2. The
# perplexity exp(nats) is the number of equally likely tokens that would be as hard to guess
# from. A model that reads its text many times bets on it; a confidence penalty (see
# cross_entropy) makes bets dearer.

def loss_and_memory(model, tokens, targets, memory=None, generator=None,
                    confidence_penalty=0.0):
    """(loss in nats: a scalar Tensor, the new memory). tokens, targets [B, T]."""
    logits, memory = model(tokens, memory, generator)
    return cross_entropy(logits, targets, confidence_penalty), memory


# %% 8. Adam
class Adam:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).

        g = gradient min(1, clip / |gradient|)          |.| over all parameters together
        first += (1 - beta1) (g - first)
        second += (1 - beta2) (g^2 - second)
        w -= lr weight_decay w                          matrices W_… only
        w -= lr [first / (1 - beta1^t)] / (sqrt(second / (1 - beta2^t)) + eps)

    first and second are running means of the gradient and of its square. For a number whose
    gradient stays the same, first / sqrt(second) is near 1 or -1, whatever the gradient's
    size. Where its sign keeps changing it is near 0. So a step is seldom more than lr.

    Both means start at 0. After t steps the shares of the gradients in them sum to
    1 - beta^t, not to 1. Dividing by that makes them true averages from the first step on.

        average += max(1 / average_over, 10 / (9 + t)) (w - average)

    At a high learning rate w jitters around the path that it follows. Its running mean,
    over a tenth of the steps and at most about average_over, predicts about as well as w
    would after the learning rate had been brought down (Polyak and Juditsky 1992). Training
    does not use it. Evaluation does, with `with adam.averaged():`. Where average_over is
    None the average is w.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
                 clip=None, average_over=None):
        self.parameters, self.lr, self.betas, self.eps = parameters, lr, betas, eps
        self.weight_decay, self.clip, self.average_over = weight_decay, clip, average_over
        self.t = 0
        if len({w.dtype for w in parameters.values()}) > 1:
            raise TypeError("Adam: the parameters must have one dtype")
        self.first, self.second, self.average = (
            {name: xp.zeros_like(w.data) for name, w in parameters.items()}
            for _ in range(3))
        if not average_over:
            self.average = {name: w.data for name, w in parameters.items()}

    def step(self, lr=None):
        """Move the parameters by their `.grad`. Returns its norm before clipping."""
        self.t += 1
        moved = {name: w for name, w in self.parameters.items() if w.grad is not None}
        norm = xp.sqrt(xp.asarray(sum((w.grad * w.grad).sum() for w in moved.values())))
        lr, factor = self.lr if lr is None else lr, self.clipping(norm)
        for name, w in moved.items():
            self.update(lr, w.data, w.grad * factor, decays(name), self.first[name],
                        self.second[name], self.average[name])
        return norm

    def update(self, lr, w, g, decayed, first, second, average):
        """The formulas above, on arrays of one shape, in place."""
        beta1, beta2 = self.betas
        first += (1 - beta1) * (g - first)
        second += (1 - beta2) * (g * g - second)
        if self.weight_decay:
            w -= lr * self.weight_decay * decayed * w
        size = xp.sqrt(second / (1 - beta2 ** self.t)) + self.eps
        w -= lr / (1 - beta1 ** self.t) * first / size
        if self.average_over:
            average += self.share() * (w - average)

    def share(self):
        """Of w in its average, at step t."""
        return max(1 / self.average_over, 10 / (9 + self.t))

    def clipping(self, norm):
        if self.clip is None:
            return 1.0
        return xp.minimum(1.0, self.clip / (norm + 1e-12)).astype(norm.dtype)

    def zero_grad(self):
        for w in self.parameters.values():
            w.grad = None

    @contextlib.contextmanager
    def averaged(self):
        """Inside `with adam.averaged():` the parameters are their averages."""
        if not self.average_over:
            yield
            return
        current = {name: w.data.copy() for name, w in self.parameters.items()}
        try:
            for name, w in self.parameters.items():
                w.data[...] = self.average[name]
            yield
        finally:
            for name, w in self.parameters.items():
                w.data[...] = current[name]


def decays(name):
    """Weight decay draws the matrices W_… towards 0, nothing else."""
    return name.split(".")[-1].startswith("W")


def warmup_cosine(step, steps, peak, warmup, final):
    """The learning rate of step 0, 1, …: a line up to `peak`, half a cosine down to `final`.

    The `warmup` steps are for `second`, which the first few gradients estimate badly. The
    later fall lets the weights settle.

    >>> rates = [warmup_cosine(step, 8, peak=1.0, warmup=2, final=0.1) for step in range(9)]
    >>> [round(rate, 3) for rate in rates]
    [0.5, 1.0, 1.0, 0.94, 0.775, 0.55, 0.325, 0.16, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


# %% 9. Generation
# A new token is a segment of one: T = 1. It attends to the memory and to itself.

def generate(model, prompt, length, temperature=1.0, top_k=None, top_p=None, rng=None,
             mem_len=None):
    """Iterate over `length` tokens that continue `prompt`, a non-empty sequence of tokens.

    temperature   divides the logits: below 1 safer, above 1 more varied, 0 the likeliest
    top_k         choose among the k likeliest only
    top_p         choose among the fewest whose probabilities reach p (Holtzman et al. 2020)
    rng           numpy.random.Generator; None: seed 0
    """
    check_sampling(length, temperature, top_k, top_p, mem_len)          # appendix F
    rng = rng or numpy.random.default_rng(0)
    prompt = numpy.asarray(prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError("generate: the prompt must be a non-empty list of tokens, "
                         f"not of shape {list(prompt.shape)}")
    mem_len = model.config.mem_len if mem_len is None else mem_len
    mem_len = min(mem_len, prompt.size + length)        # there is never more to remember
    # In segments: shorter ones would take more steps, longer ones more space.
    memory, seq_len = None, min(max(1, mem_len), 256)
    for at in range(0, prompt.size, seq_len):
        with no_grad():
            segment = prompt[None, at:at + seq_len]
            logits, memory = model(segment, memory, mem_len=mem_len)
    logits = logits.data[0, -1]
    decoder = Decoder(model, memory, mem_len)           # appendix D
    for n in range(length):
        token = sample(to_numpy(logits), temperature, top_k, top_p, rng)
        yield token
        if n < length - 1:
            logits = decoder(token)     # as the model's, for [[token]] and the memory so far


def sample(logits, temperature, top_k, top_p, rng):
    """One token from logits [V] (a NumPy array), see `generate`."""
    if not numpy.isfinite(logits).all():
        raise FloatingPointError("generate: a logit is not finite; the weights are useless")
    if temperature == 0:
        return int(logits.argmax())
    order = numpy.argsort(-logits, kind="stable")[:top_k]           # the likeliest first
    logits = logits[order].astype(numpy.float64)
    up_to = numpy.exp((logits - logits.max()) / temperature).cumsum()   # up to a factor
    if top_p is not None:
        up_to = up_to[:numpy.searchsorted(up_to, top_p * up_to[-1]) + 1]
    choice = numpy.searchsorted(up_to[:-1], rng.random() * up_to[-1], side="right")
    return int(order[choice])


# %% A. The same attention, faster
# Two things are faster than in section 4. A layer normalisation's gain and bias are folded
# into the matrices behind it. And all from queries to mixed values is one operation,
# `attend`, with its gradient written by hand. Of all arrays [T, K] it keeps only E, and it
# works on a block of scores while that is in the processor's cache. A test compares values
# and gradients with section 4.
#
# Softmax divides a row by its sum z. That division can wait until the values are mixed,
# where it costs d divisions a query instead of K:
#
#     o = (E / z) values = (E values) / z        E = exp(score - the largest of the row)
#
# The gradient, from g = dL/do. Write d_x for dL/dx, and y = E / z for the weights:
#
#     d_values = y^T g = E^T (g / z)
#     d_y = g values^T
#     d_score = y (d_y - sum_k y_k d_y_k)                 the softmax
#             = E (g/z · values - g/z · o)                because sum_k y_k d_y_k = g · o
#
# The largest score cancels in E / z, so it has no gradient. With q_u = (q + u) / sqrt(d)
# and q_v = (q + v) / sqrt(d) the score is
#
#     score = q_u k^T + shift(by_distance)                by_distance = q_v r^T
#
# d_by_distance is d_score shifted back, and
#
#     d_k = d_score^T q_u                 d_q_u = d_score k
#     d_r = d_by_distance^T q_v           d_q_v = d_by_distance r
#     d_q = (d_q_u + d_q_v) / sqrt(d)
#     d_u = d_q_u / sqrt(d), summed over all queries; d_v likewise with d_q_v
#
# A block has some heads, some rows of the batch, some queries, and the keys that the last
# of these can see. It is the same problem with fewer keys, whose distances are the last
# rows of r. Blocks share keys and distances, so those gradients add up. The gradient takes
# the blocks in reverse: the last queries see all keys and write every place, earlier ones
# add to a part.

class FasterAttention(RelativeMultiHeadAttention):
    """The same results. Attention dropout, where it acts, takes the way of section 4."""

    def __call__(self, x, memory, positions, mask, generator=None, norm=None):
        if generator is not None and self.config.attn_dropout:
            return super().__call__(x, memory, positions, mask, generator, norm)
        q, kv = self.project(x, memory, norm)
        return attend(q, kv, positions @ self.W_r, self.u, self.v, mask) @ self.W_o

    def project(self, x, memory, norm):
        if norm is None:
            return x @ self.W_q, linear(x, self.W_kv, 0.0, before=memory)
        x, memory = normalise(x), normalise(memory)             # without gain and bias
        W_q, b_q = fold(norm.gain, norm.bias, self.W_q)
        W_kv, b_kv = fold(norm.gain, norm.bias, self.W_kv)
        return linear(x, W_q, b_q), linear(x, W_kv, b_kv, before=memory.data)


QUERIES, SCORES = 64, 1 << 17       # of a block: about half a megabyte of float32


def score_blocks(H, B, T, K):
    """[((heads, rows, queries), keys), …] in slices. On a GPU everything is one block."""
    h, b, t = H, B, T                       # how many a block has
    if xp.module is numpy:
        t = min(T, QUERIES)
        h = min(H, max(1, SCORES // (t * K)))
        b = min(B, max(1, SCORES // (h * t * K)))
    return [((slice(i, i + h), slice(j, j + b), slice(n, n + t)), slice(0, min(K, K - T + n + t)))
            for i in range(0, H, h) for j in range(0, B, b) for n in range(0, T, t)]


@gpu_form
def softmax_numerators(scores, position, minus_infinity):
    """E of scores + position, in place of the scores, and 0 where minus_infinity is. Returns z."""
    scores += position
    scores += minus_infinity
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    return row_sums(scores)


@gpu_form
def score_gradient(E, dots, d_score):
    """E (d_score - dots), in place of d_score. Returns the same shifted back."""
    d_score -= dots
    d_score *= E
    return shift_back(d_score)


@op
def attend(q, kv, r, u, v, mask):
    """q [B, T, D], kv [B, K, 2 D] (keys, then values), r [K, D], u and v [H, d] -> [B, T, D].

    mask [T, K] is True where a query must not see a key. The future must be hidden.
    """
    Q, KV, R, U, V = arrays(q, kv, r, u, v)
    (B, T, D), (K, _), (H, d) = Q.shape, R.shape, U.shape
    dtype, blocks = Q.dtype, score_blocks(H, B, T, K)
    scale = dtype.type(1 / math.sqrt(d))

    def flat(x):
        """[H, B, n, d] -> [H, 1, B n, d]"""
        return x.reshape(len(x), 1, -1, x.shape[-1])

    def transposed(x):
        return x.swapaxes(-1, -2)

    def empty(shape):
        return xp.empty(shape, dtype=dtype)

    q_u, q_v = (heads(scaled_sum(Q, bias.reshape(D), scale), H) for bias in (U, V))
    keys, values = heads(KV[..., :D], H), heads(KV[..., D:], H)                 # [H, B, K, d]
    R = xp.ascontiguousarray(R.reshape(K, 1, H, d).transpose(2, 1, 0, 3))       # [H, 1, K, d]
    minus_infinity = xp.where(mask, -xp.inf, 0.0).astype(dtype)
    o, z, numerators = empty(Q.shape), empty((H, B, T, 1)), []
    for block, seen in blocks:
        i, j, t = block
        E = product(q_u[block], transposed(keys[i, j, seen]))
        by_distance = product(flat(q_v[block]), transposed(R[i, :, K - seen.stop:]))
        position = shifted_rows(by_distance.reshape(E.shape), seen.stop)
        z[block] = softmax_numerators(E, position, minus_infinity[t, seen])
        product(E, values[i, j, seen], out=heads(o, H)[block])
        numerators.append(E)
    inverse_z = 1 / z
    heads(o, H)[...] *= inverse_z

    def gradients(g):
        g_z = heads(g, H) * inverse_z                                           # g / z
        g_z_o = row_dots(g_z, heads(o, H))
        d_q_u, d_q_v, d_kv, d_r = (empty(x.shape) for x in (o, o, KV, R))
        d_keys, d_values = heads(d_kv[..., :D], H), heads(d_kv[..., D:], H)
        for (block, seen), E in zip(reversed(blocks), reversed(numerators)):
            i, j, t = block
            d_score = product(g_z[block], transposed(values[i, j, seen]))
            d_by_distance = flat(score_gradient(E, g_z_o[block], d_score))
            for d_x, scores, x in ((d_values, E, g_z), (d_keys, d_score, q_u)):
                # d_x = scores^T x, or rather d_x^T = x^T scores
                product(transposed(x[block]), scores, out=transposed(d_x[i, j, seen]),
                        add=t.stop < T)
            product(d_score, keys[i, j, seen], out=heads(d_q_u, H)[block])
            near = R[i, :, K - seen.stop:]
            heads(d_q_v, H)[block] = product(d_by_distance, near).reshape(g_z[block].shape)
            product(transposed(flat(q_v[block])), d_by_distance,        # all rows share distances
                    out=transposed(d_r[i, :, K - seen.stop:]), add=t.stop < T or j.stop < B)
        d_u, d_v = (leading_sums(x, 2).reshape(H, d) * scale for x in (d_q_u, d_q_v))
        d_r = d_r.transpose(2, 1, 0, 3).reshape(K, D)
        return scaled_sum(d_q_u, d_q_v, scale), d_kv, d_r, d_u, d_v
    return result(o, *jointly(gradients, q, kv, r, u, v))


# %% B. Learned positions
# The form of labml's implementation (see G), after Shaw et al. 2018, who have terms (a) and
# (b). r is not computed from waves but looked up in a learned table. v · r is a learned
# number for each distance and head. That is more freedom at each distance. But nothing is
# known about distances that were never trained. Those beyond clamp_len use the table's last
# row.

class LearnedPositions(FasterAttention):
    """Its `positions` are distances [K]. Only `project` is that of FasterAttention."""

    __call__ = RelativeMultiHeadAttention.__call__

    def add_position_parameters(self, rng, dtype):
        (H, d), rows = self.u.shape, self.config.clamp_len + 1
        self.table = weight(rng, (rows, H, d), dtype, scale=math.sqrt(rows))
        self.bias = zeros((rows, H), dtype)

    def position_terms(self, positions):
        (H, d), K = self.u.shape, len(positions)
        r, v_r = self.table[positions], self.bias[positions]            # [K, H, d], [K, H]
        return r.transpose(1, 2, 0).reshape(H, 1, d, K), v_r.T.reshape(H, 1, 1, K)


# %% C. Adam, divided among processes
class DividedAdam(Adam):
    """Adam on flat arrays: a dozen operations on long arrays instead of a dozen a parameter.

    All parameters are moved into one array, flat["value"], of which each `.data` becomes a
    view. So are first, second and average. All processes see these arrays.

    parts   processes among which a batch is divided. Each `collect`s the gradients of its rows.
            `step` adds them up and updates the parameters, each process an equal share

    Every parameter must get a gradient from every part. Adam leaves one without alone.
    """

    def __init__(self, parameters, *arguments, parts=1, **options):
        super().__init__(parameters, *arguments, **options)
        tensors, kinds = list(parameters.values()), ("value", "first", "second", "average")
        count, dtype = sum(w.size for w in tensors), tensors[0].dtype
        self.flat = {kind: shared_zeros((count,), dtype) for kind in kinds}
        if not self.average_over:
            self.flat["average"] = self.flat["value"]
        self.gradient = shared_zeros((parts, count), dtype)
        self.decayed, self.places, self.views, end = xp.zeros(count, dtype=dtype), {}, {}, 0
        for name, w in parameters.items():
            start, end = end, end + w.size
            place = self.places[w] = slice(start, end)
            views = [self.flat[kind][place].reshape(w.shape) for kind in kinds]
            views[0][...] = w.data
            w.data, self.first[name], self.second[name], self.average[name] = views
            self.views[w], self.decayed[place] = views[0], decays(name)

    def collect(self, part, leaves):
        """Store one part's gradients, [(parameter, gradient), …]."""
        gradients = dict(leaves)
        for name, w in self.parameters.items():
            if w not in gradients:
                raise ValueError(f"DividedAdam: {name} has no gradient; Adam takes such parameters")
        xp.concatenate([gradients[w].reshape(-1) for w in self.places], out=self.gradient[part])

    def take_on(self):
        """Take on arrays that somebody has assigned to a parameter's `.data`."""
        for w, view in self.views.items():
            if w.data is not view:
                if (w.data.shape, w.data.dtype) != (view.shape, view.dtype):
                    raise ValueError("DividedAdam: a parameter was given an array of another "
                                     "shape or dtype")
                view[...], w.data = w.data, view

    def averaged(self):
        self.take_on()
        return super().averaged()

    def __reduce_ex__(self, protocol):
        raise TypeError("a DividedAdam cannot be copied: the parameters are views of its arrays")

    def step(self, lr=None, everywhere=None):
        """Adam's step. With `everywhere` the gradients have been collected already.

        everywhere(function, …) returns [function(part, …) for every part]. Without it this
        process does all parts, with the parameters' `.grad`.
        """
        self.take_on()
        if everywhere is None:
            self.collect(0, [(w, w.grad) for w in self.places if w.grad is not None])

            def everywhere(function, *arguments):
                return [function(part, *arguments) for part in range(len(self.gradient))]
        norm = xp.sqrt(xp.asarray(sum(everywhere(self.add_up))))
        lr = self.lr if lr is None else lr
        everywhere(self.update_share, self.t + 1, lr, self.clipping(norm))
        return norm

    def blocks(self, part):
        """Slices that make up one part's share; on the CPU short, for the processor's cache."""
        count, parts = self.decayed.size, len(self.gradient)
        start, end = count * part // parts, count * (part + 1) // parts
        length = 1 << 16 if xp.module is numpy else count
        return [slice(at, min(at + length, end)) for at in range(start, end, length)]

    def add_up(self, part):
        """In one share: add all parts' gradients into row 0. Returns its squares' sum."""
        squares = 0.0
        for block in self.blocks(part):
            g = self.gradient[0, block]
            for other in self.gradient[1:]:
                g += other[block]
            squares = squares + g @ g
        return squares

    def update_share(self, part, t, lr, factor):
        """Step t of one part's share, by factor times the gradient."""
        self.t = t                                      # in every process
        for block in self.blocks(part):
            g = self.gradient[0, block]
            g *= factor
            w, *means = (array[block] for array in self.flat.values())
            update = self.update_on_a_gpu if on_a_gpu() else self.update
            update(lr, w, g, self.decayed[block], *means)

    def update_on_a_gpu(self, lr, w, g, decayed, first, second, average):
        """`update` in one pass."""
        beta1, beta2 = self.betas
        share = self.share() if self.average_over else 0.0
        numbers = (1 - beta1, 1 - beta2, 1 / math.sqrt(1 - beta2 ** self.t), self.eps,
                   lr / (1 - beta1 ** self.t), lr * self.weight_decay, share)
        adam_update(g, decayed, *map(w.dtype.type, numbers), first, second, w, average)


# %% D. Generation, faster
# A state in memory is a constant. Its key does not depend on where it stands: that is in r.
# So while the parameters stay as they are, key and value of a token are constants too. They
# are kept instead of the state. r and v · r, which depend on the distance alone, are
# computed once. What is left for each token and layer is a handful of products of a vector
# with a matrix, however long the text.

class CachedLayer:
    """`layer` for one token at a time: x [D] -> [D]. It keeps keys and values.

    memory [1, M, D] is what it has in memory at first, mem_len what it keeps at most.
    """

    def __init__(self, layer, memory, mem_len):
        config, attention, dtype = layer.config, layer.attention, memory.dtype
        H, d = attention.u.shape
        self.layer, self.mem_len = layer, mem_len
        self.W_qkv = xp.concatenate([attention.W_q.data, attention.W_kv.data], axis=1)
        with no_grad():
            r, v_r = attention.position_terms(relative_positions(config, 1, mem_len, dtype))
            self.r, self.v_r = r.data[:, 0], v_r.data[:, 0]         # of distances mem_len … 0
            x = layer.attention_norm(Tensor(memory[0])).data if config.pre_norm else memory[0]
        # Room for 2 mem_len + 1 tokens. When it is full, the last mem_len move to the front.
        self.cache, self.end = xp.zeros((2, H, 2 * mem_len + 1, d), dtype=dtype), len(x)
        kv = (x @ attention.W_kv.data).reshape(self.end, 2, H, d)
        self.cache[:, :, :self.end] = kv.transpose(1, 2, 0, 3)
        self.keys, self.values = self.cache

    def __call__(self, x):
        layer = self.layer
        for f, norm in ((self.attention, layer.attention_norm),
                        (self.feed_forward, layer.feed_forward_norm)):
            x = x + f(normed(x, norm)) if layer.config.pre_norm else normed(x + f(x), norm)
        return x

    def attention(self, x):
        attention, M = self.layer.attention, self.mem_len
        H, d = attention.u.shape
        if self.end == 2 * M + 1:
            self.cache[:, :, :M] = self.cache[:, :, M + 1:]
            self.end = M
        qkv = (x @ self.W_qkv).reshape(3, H, d)
        self.cache[:, :, self.end] = qkv[1:]
        self.end += 1
        K = min(M + 1, self.end)
        seen = slice(self.end - K, self.end)
        q, k = qkv[0][:, None], self.keys[:, seen].swapaxes(1, 2)       # [H, 1, d], [H, d, K]
        score = (q + attention.u.data[:, None]) @ k                     # (a) + (c)   [H, 1, K]
        score += q @ self.r[:, :, M + 1 - K:]                           # (b)
        score += self.v_r[:, :, M + 1 - K:]                             # (d)
        weights = xp.exp((score - score.max(axis=-1, keepdims=True)) * (1 / math.sqrt(d)))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ self.values[:, seen]).reshape(H * d) @ attention.W_o.data

    def feed_forward(self, x):
        part = self.layer.feed_forward
        hidden = xp.maximum(x @ part.W_1.data + part.b_1.data, 0)
        if self.layer.config.activation == "squared_relu":
            hidden *= hidden
        return hidden @ part.W_2.data + part.b_2.data


def normed(x, norm, eps=1e-5):
    """`norm`, a LayerNorm, of one row [D], without a graph."""
    z = x - x.sum() / len(x)
    z /= xp.sqrt(z @ z / len(x) + eps)
    return z * norm.gain.data + norm.bias.data


class Decoder:
    """A model that reads token by token: decoder(token) gives the logits [V].

    It begins with what the model has read before: `memory`, N arrays [1, M, D], M at most
    mem_len. The weights must stay as they are meanwhile. Its size is constant, however much
    it reads.
    """

    def __init__(self, model, memory, mem_len):
        self.model = model
        self.layers = [CachedLayer(*pair, mem_len) for pair in zip(model.layers, memory)]
        self.W_out = model.embedding.data.T if model.config.tie_weights else model.W_out.data

    def __call__(self, token):
        model = self.model
        x = model.embedding.data[token] * math.sqrt(model.config.d_model)
        for layer in self.layers:
            x = layer(x)
        x = normed(x, model.norm) if model.config.pre_norm else x
        return x @ self.W_out + model.b_out.data


# %% E. What layers attend to
def attention_weights(model, tokens, memory):
    """How much each query of tokens [B, T] attends to each key: of each layer [H, B, T, K].

    `memory` holds N arrays [B, M, D]. With same_length M must be at least T, and a query
    sees M keys.
    """
    tokens, memory = checked_call(model, tokens, memory)
    T, M, config, found = tokens.shape[1], memory[0].shape[1], model.config, []
    window = max(M, T)          # so many states are kept that the segment's inputs are among them
    with no_grad():
        _, inputs = model(tokens, memory, mem_len=window)
        positions = relative_positions(config, T, M, model.dtype)
        mask = hidden_keys(T, M, window if config.same_length else None)
        for layer, past, x in zip(model.layers, memory, inputs):
            norm = layer.attention_norm if config.pre_norm else None
            q, kv = layer.attention.project(x[:, x.shape[1] - T:], past, norm)
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


# %% F. What a configuration and a call must hold
def check_config(config):
    """ValueError names a field that is wrong."""
    for field in dataclasses.fields(config):
        kind, value = field.type, getattr(config, field.name)
        kind = int | float if kind is float else kind
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{field.name} must be {kind}, not {value!r}")
    for names, holds, what in (
            ("vocab_size n_layer n_head d_model d_ff", lambda n: n >= 1, "at least 1"),
            ("mem_len clamp_len", lambda n: n is None or n >= 0, "at least 0"),
            ("dropout attn_dropout", lambda p: 0 <= p < 1, "in [0, 1)"),
            ("positions", ("sinusoid", "learned").__contains__, "'sinusoid' or 'learned'"),
            ("activation", ("relu", "squared_relu").__contains__, "'relu', 'squared_relu'")):
        for name in names.split():
            if not holds(getattr(config, name)):
                raise ValueError(f"{name} must be {what}, not {getattr(config, name)!r}")
    if config.d_model % (2 * config.n_head):
        raise ValueError(f"d_model must be a multiple of 2 * n_head = {2 * config.n_head}, "
                         f"not {config.d_model}")
    if config.positions == "learned" and config.clamp_len is None:
        raise ValueError("positions='learned' needs clamp_len: the table has one row for each "
                         "distance 0 … clamp_len")


def check_sampling(length, temperature, top_k, top_p, mem_len):
    """ValueError names an option of `generate` that is wrong."""
    for name, value, holds, what in (
            ("length", length, length >= 0, "at least 0"),
            ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
            ("mem_len", mem_len, mem_len is None or mem_len >= 0, "at least 0")):
        if not holds:
            raise ValueError(f"generate: {name} must be {what}, not {value!r}")


def checked_call(model, tokens, memory):
    """A call's tokens as an array, and its memory; ValueError where a shape is wrong."""
    tokens = tokens.data if isinstance(tokens, Tensor) else tokens
    tokens = tokens if hasattr(tokens, "dtype") else numpy.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError("tokens must be integers [batch, seq_len] and not empty, "
                         f"not {tokens.dtype}{list(tokens.shape)}")
    within(tokens, model.config.vocab_size)
    tokens = xp.asarray(tokens)
    B, N, D = len(tokens), model.config.n_layer, model.config.d_model
    memory = model.empty_memory(B) if memory is None else memory
    if len(memory) != N or any(past.shape != (B, memory[0].shape[1], D) for past in memory):
        raise ValueError(f"memory must be {N} arrays [{B}, M, {D}], "
                         f"not {[list(past.shape) for past in memory]}")
    return tokens, memory


# %% G. The paper and other code
# "The authors' code" is the PyTorch half of github.com/kimiyoung/transformer-xl, "labml"
# the annotated implementation at nn.labml.ai/transformers/xl.
#
#     here                        the authors' code               labml
#     u and v in every layer      one pair for all layers         in every layer
#     W_r R, or learned (B)       W_r R; dropout acts on R too    learned
#     pre-norm, or post-norm      post-norm, or pre-norm          pre-norm
#     N memories                  N + 1; the last is not used     N
#     T; no ext_len               tgt_len; ext_len tokens at a    T
#                                 segment's end are read again
#     same_length: mem_len keys   one key less                    none
#     before a query
#     rel_shift reads rows of     rows of K from place T on,      T more columns, for distances
#     the line from T-1 on,       after a column of zeros: the    below 0; lined up with the
#     K-1 apart                   same up to each row's 0         first query, not the last
#     one softmax                 adaptive softmax and            one softmax
#                                 embeddings, for words


# %% H. A walk through it
# `python txl.py` runs this section.

def running_example():
    """The numbers of section 4 for all three queries of segment 2, as NumPy arrays by name.

        states [K, D], q [T, d], u, v [d], R [K, D] for the distances K-1, …, 0
        a, b, c, d [T, K]     the terms of the score; their columns stand for keys
        by_distance [T, K]    (b) + (d) before the shift; its columns stand for distances
        hidden, score, weights [T, K], output [T, D]
    """
    T, M, float64 = 3, 2, numpy.float64
    config = Config(vocab_size=8, n_layer=1, n_head=1, d_model=2, d_ff=2, mem_len=M)
    attention = RelativeMultiHeadAttention(config, numpy.random.default_rng(0), float64)
    for W in (attention.W_q, attention.W_kv, attention.W_r, attention.W_o):
        W.data[...] = xp.tile(xp.eye(2), W.shape[1] // 2)
    states = numpy.array([[1., 0], [0, 1], [1, 1], [1, -1], [-1, 1]])       # of i r s t _
    q, k, u, v = states[M:], states, numpy.array([0.5, 0]), numpy.array([0, 0.5])
    attention.u.data[...], attention.v.data[...] = xp.asarray(u), xp.asarray(v)
    positions, mask = relative_positions(config, T, M, float64), hidden_keys(T, M)
    x, R = Tensor(xp.asarray(states[None])), positions.numpy()
    weights = attention.weights(heads(x[:, M:], 1), heads(x, 1), positions, mask)
    output = attention(x[:, M:], x[:, :M], positions, mask)

    def shifted(scores):
        return rel_shift(xp.asarray(scores)).numpy()
    b, d = q @ R.T, numpy.tile(R @ v, (T, 1))
    terms = dict(a=q @ k.T, b=shifted(b), c=numpy.tile(k @ u, (T, 1)), d=shifted(d))
    return dict(terms, states=states, q=q, u=u, v=v, R=R, by_distance=b + d,
                hidden=to_numpy(mask), score=sum(terms.values()) / math.sqrt(2),
                weights=weights.numpy()[0, 0], output=output.numpy()[0])


def print_example():
    """The running example: the lines behind a bar in the text above."""
    text, T, M, example = "First_Cit", 3, 2, running_example()
    tokens = numpy.array([[sorted(set(text)).index(letter) for letter in text]])
    config = Config(vocab_size=8, n_layer=1, n_head=1, d_model=2, d_ff=2, mem_len=M)
    model, memory = TransformerXL(config), None
    print("   |  segment   memory   how many keys its queries see   memory after")
    for at in range(0, len(text), T):
        before = 0 if memory is None else memory[0].shape[1]
        seen = (~to_numpy(hidden_keys(T, before))).sum(axis=1)
        _, memory = model(xp.asarray(tokens[:, at:at + T]), memory)
        kept = text[at + T - memory[0].shape[1]:at + T]
        print(f"   |  {' '.join(text[at:at + T]):10}{before:<9}"
              f"{', '.join(map(str, seen)):32}{' '.join(kept)}")

    def row(name, values, form="7.2f"):
        print(f"   |  {name:12}" + "".join(f"{value:{form}}" for value in values))

    distances, t, seen = range(T + M - 1, -1, -1), 1, slice(4)      # row t, and the keys it sees
    q, v, k, R = example["q"][t], example["v"], example["states"], example["R"]
    print()
    row("n", distances, "7")
    row("sin(n)", R[:, 0])
    row("cos(n)", R[:, 1])
    print()
    row("distance n", distances, "7")
    row("(b) q · r", R @ q)
    row("(d) v · r", R @ v)
    row("(b) + (d)", example["by_distance"][t])
    print()
    row("key", text[1:6], ">7")
    row("(b) + (d)", (example["b"] + example["d"])[t, seen])
    row("k = value", (f"({x:.0f},{y:.0f})" for x, y in k), ">7")
    row("(a) q · k", example["a"][t])
    row("(c) u · k", example["c"][t])
    row("score", example["score"][t, seen])
    row("weight", example["weights"][t])
    print("   |  output         ({:.2f}, {:.2f})".format(*example["output"][t]))


def walk_through():
    print("1. The running example.")
    print_example()

    print("\n2. One pass over 12 tokens, and three over 4 with the memory of those before.")
    config = Config(vocab_size=5, n_layer=2, n_head=2, d_model=16, d_ff=32, mem_len=8)
    model = TransformerXL(config, dtype=numpy.float64)
    text = numpy.random.default_rng(0).integers(5, size=(1, 12))
    whole, memory, pieces, alone = model(text)[0].numpy(), None, [], []
    for at in range(0, 12, 4):
        logits, memory = model(text[:, at:at + 4], memory)
        pieces.append(logits.numpy())
        alone.append(model(text[:, at:at + 4])[0].numpy())
    with_memory, without = (abs(whole - numpy.concatenate(logits, axis=1)).max()
                            for logits in (pieces, alone))
    print(f"   largest difference with memory {with_memory:.0e}, without {without:.2f}")

    print("\n3. A tiny model learns four lines by heart, in segments of 16, memory 16.")
    verse = ("Shall I compare thee to a summer's day?\n"
             "Thou art more lovely and more temperate:\n"
             "Rough winds do shake the darling buds of May,\n"
             "And summer's lease hath all too short a date;\n")
    letters = sorted(set(verse))
    tokens = numpy.array([letters.index(letter) for letter in verse * 2])
    config = Config(len(letters), n_layer=2, n_head=2, d_model=32, d_ff=64, mem_len=16)
    model, memory = TransformerXL(config, seed=1), None
    adam = Adam(model.parameters(), clip=1.0)
    for step in range(501):
        at = step * 16 % len(verse)
        inputs, targets = tokens[None, at:at + 16], tokens[None, at + 1:at + 17]
        loss, memory = loss_and_memory(model, inputs, targets, memory)
        loss.backward()
        adam.step(warmup_cosine(step, 500, 1e-2, 20, 1e-4))
        adam.zero_grad()
        if step % 100 == 0:
            print(f"   step {step:3}   loss {loss.item():.3f}")
    line = verse.index("\n") + 1
    told = generate(model, tokens[:line], len(verse) - line - 1, temperature=0)
    told = "".join(letters[token] for token in told).replace("\n", "\n       ")
    print(f"   told the first line, it goes on:\n       {told}")


if __name__ == "__main__":
    walk_through()
