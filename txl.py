# %% Transformer-XL
"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860), from the idea to generated text.

This file and autograd.py are the complete algorithm. Everything else here is efficiency or
convenience: fast.py computes the same faster, train_shakespeare.py is a command around it.

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

Read it from the top. Layer 2 computed O from five states: the three o below it, of its own
segment, and the two m to their left, its memory. Layer 1 had computed these m one segment
earlier, the newer one again from five states: three o of that segment and two m before it,
the memory of layer 1 at that time. Numbers flow along all lines, gradients only within the
segment being trained.

How far does O see beyond its segment? Through layer 2's memory to its oldest m, 2 tokens
back. But that state, like every state, has seen its own segment from the start: 3 tokens
back. And layer 1 had a memory before that: 2 more. So it is 5 tokens, "ir" and "st_". In
general the top layer reaches M tokens back, and each layer below rounds that up to whole
segments and adds M:

    reach(1 layer) = M          reach(n layers) = T ceil(reach(n-1 layers) / T) + M

Each token is computed once. The cost: attention over M + T keys instead of T, M states a
layer to keep, and no learning of what is good to keep.

The sections follow this example, "First_Cit". Lines behind a bar are printed by `python
txl.py`.

    1. memory   2. relative positions   3. the shift   4. attention   5. the layer
    6. the model   7. the loss   8. Adam   9. generation
    10. the paper and other code   11. a walk through it

Letters for shapes and sizes:

    B  batch   T  queries: tokens of the segment   M  memory, in states   K = M + T  keys
    H  heads   D  d_model    d = D / H             F  d_ff    V  vocabulary    N  layers

To change …              touch …
    the positions        a subclass like LearnedPositions (4), and where that is named: Layer
                         (5), relative_positions (2), Config (6); fast.py: Layer
    the layer            Layer (5); fast.py: Layer, and CachedLayer, which generates
    the optimiser        Adam.update (8), which fast.py uses as well
    the precision        dtype of TransformerXL (6)
"""
import contextlib
import dataclasses
import math

import numpy

from autograd import (OPS, Tensor, checked_indices, concatenate, cross_entropy, dropout, embedding,
                      layer_norm, no_grad, softmax)
from backend import to_numpy, xp

# What to know of these: `xp` is NumPy, or CuPy on a GPU. A Tensor is an array, .data, that
# knows how it was computed from others. loss.backward() gives every parameter, a Tensor made
# with requires_grad, its .grad: d(loss)/d(parameter). A plain array is a constant.


# %% 1. Memory
# The paper's recurrence (section 3.2) is two lines. h is the input of a layer for a segment,
# h' that for the segment before. SG(…), stop-gradient, makes a constant of its argument, and
# [ , ] joins along the text:
#
#     queries            =  h W_q                          from the segment alone
#     keys and values    =  [SG(h'), h] W_k, … W_v         from memory and the segment
#
# In this file's letters: q = x W_q and k = [memory, x] W_k, with x [B, T, D] and memory
# [B, M, D], a plain array. It is the last M of the layer's *inputs*, because that is what
# keys and values are made of (normalised first, with pre-norm: section 5). The layer's
# outputs are the next layer's inputs, and kept there.
# Keys and values themselves are not stored, because training changes W_k and W_v: made from
# stored inputs, they have the weights of now. Only the inputs are as old as their segment.
#
# Parameters get a gradient for the use they make of memory in this segment, and none for
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
# Memory loses nothing: while it covers all that was read, one pass over a whole text and
# passes over its segments give the same logits. `python txl.py` shows it. They differ by
# rounding at most, 1e-15; without memory by 0.23.
#
# Row b of the memory belongs to row b of the batch. So row b of the next segment must be
# the text that follows. A text is cut into B long rows, and a segment is T columns of them:
#
#     F i r | s t _ | C i t | i z e | n : _ | …       row 1, in segments 1, 2, 3, …
#     W o u | l d _ | y o u | _ p r | o c e | …       row 2: another place in the text
#
# (Section 11 has a loop that trains like that.) No parameter's shape depends on M, so a model
# can be evaluated with a longer memory than it was trained with. A text is evaluated segment
# by segment. Every token is computed once, and sees at least the M tokens before it, once
# memory is full.

def update_memory(memory, x, mem_len):
    """The last mem_len states of memory and x: [B, M, D], [B, T, D] -> [B, ≤ mem_len, D].

    >>> memory, segment = numpy.array([[[1], [2], [3]]]), numpy.array([[[4], [5]]])
    >>> update_memory(memory, segment, mem_len=3)[0, :, 0].tolist()
    [3, 4, 5]
    """
    both = xp.concatenate([memory, x], axis=1)
    return both[:, max(0, both.shape[1] - mem_len):]


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

    config is the Config of section 6. With clamp_len a larger distance counts as that one.
    """
    distances = xp.arange(M + T - 1, -1, -1)
    if config.clamp_len is not None:
        distances = xp.minimum(distances, config.clamp_len)
    if config.positions == "learned":
        return distances                    # LearnedPositions (4) has a table of vectors
    return Tensor(sinusoid(distances, config.d_model, dtype))


def key_distances(T, M):
    """[T, K] integers: how far back key j lies from query i; negative in the future."""
    return M + xp.arange(T)[:, None] - xp.arange(M + T)[None, :]


def attention_mask(T, M, window=None):
    """[T, K] booleans: True where query i must not see key j.

    That is the future and, with `window`, all distances beyond it.

    >>> attention_mask(T=3, M=2).astype(int).tolist()
    [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    """
    distance = key_distances(T, M)
    return (distance < 0) if window is None else (distance < 0) | (distance > window)


# %% 3. The shift
# Query i scores key j with a vector that belongs to their distance. There are T K pairs,
# but only K distances. So all queries are multiplied with all K vectors, in one matrix
# product. Its columns stand for distances, the same in every row: 4 3 2 1 0. Attention
# needs columns that stand for keys. To the last query the keys are at just these distances,
# so its row stays. Query i comes T-1-i tokens earlier, so every key is that much nearer, and
# row i must move left by T-1-i.
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
# row begins. Those are keys in the future, which the mask hides. The shifted rows are K long
# and begin K-1 apart: the last number of each is also the first of the next.

def rel_shift(a):
    """From columns that stand for distances to columns that stand for keys: [..., T, K].

    >>> rel_shift(Tensor([[4, 3, 2, 1, 0]] * 3)).numpy().tolist()
    [[2, 1, 0, 4, 3], [3, 2, 1, 0, 4], [4, 3, 2, 1, 0]]
    """
    *batch, T, K = a.shape
    if T == 1:
        return a                                                    # the last row stays
    line = a.reshape(*batch, T * K)[..., T - 1:]
    rows = line[..., :-1].reshape(*batch, T, K - 1)                 # without their last numbers
    last = concatenate([rows[..., 1:, :1], line[..., -1:, None]], axis=-2)
    return concatenate([rows, last], axis=-1)


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
# r = R[n] W_r, with a matrix of its own. The query's place no longer occurs by itself. A
# learned constant replaces it: u where it meets content, v where it meets distance. These are
# two vectors, because what they meet comes from two matrices.
#
#     score = [ (q + u) · k + q · r + v · r ] / sqrt(d)
#
# A sum of d products of independent numbers of size 1 has a size of about sqrt(d). Divided
# by that, scores stay small. (A softmax of large scores would be almost a choice of one key,
# with hardly a gradient for the others.)
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
#
# Parameters start as random numbers from NumPy's generator on every device, so that a seed
# means one model. Multiplied with a matrix of n rows whose numbers have the standard deviation
# s, a vector of numbers of size 1 becomes one of size sqrt(n) s. As in PyTorch's layers
# s = 1 / sqrt(3 n). W_o here and W_2 in section 5 start smaller by sqrt(2 N), as in GPT-2,
# because their results are added to a token's state 2 N times.

def weight(rng, shape, size, dtype):
    """A parameter [inputs, …] of normal numbers whose standard deviation is `size`."""
    return Tensor(xp.asarray((rng.normal(size=shape) * size).astype(dtype)), requires_grad=True)


def zeros(shape, dtype):
    return Tensor(xp.zeros(shape, dtype=dtype), requires_grad=True)


class RelativeMultiHeadAttention:
    """Attention of a segment over the memory before it and itself (section 3.3 of the paper).

    Each head has d neighbouring columns of W_q, W_k, W_v and W_r, and d neighbouring rows
    of W_o.
    """

    def __init__(self, config, rng, dtype):
        D, H, size = config.d_model, config.n_head, 1 / math.sqrt(3 * config.d_model)
        self.config = config
        self.W_q = weight(rng, (D, D), size, dtype)
        self.W_kv = weight(rng, (D, 2 * D), size, dtype)            # W_k, then W_v
        self.W_o = weight(rng, (D, D), size / math.sqrt(2 * config.n_layer), dtype)
        self.u = zeros((H, D // H), dtype)
        self.add_position_parameters(rng, dtype)

    def add_position_parameters(self, rng, dtype):
        D = self.config.d_model
        self.W_r = weight(rng, (D, D), 1 / math.sqrt(3 * D), dtype)
        self.v = zeros(self.u.shape, dtype)

    def __call__(self, x, memory, positions, mask, generator=None):
        """x [B, T, D], memory [B, M, D] -> [B, T, D].

        positions   what `relative_positions` returns
        mask        [T, K] booleans, True where hidden
        generator   random numbers for dropout, or None
        """
        q, kv = self.project(x, memory)
        return self.mixed_values(q, kv, positions, mask, generator) @ self.W_o

    def project(self, x, memory):
        """Queries [B, T, D] of the segment; keys and values [B, K, 2 D] of memory and it."""
        return x @ self.W_q, concatenate([memory, x], axis=1) @ self.W_kv

    def mixed_values(self, q, kv, positions, mask, generator):
        """What each query gets: the values, each times its weight. [B, T, D]"""
        H, D = self.config.n_head, self.config.d_model
        k, values = heads(kv[..., :D], H), heads(kv[..., D:], H)            # [H, B, K, d]
        weights = self.weights(heads(q, H), k, positions, mask)             # [H, B, T, K]
        mixed = dropout(weights, self.config.attn_dropout, generator) @ values
        return mixed.transpose(1, 2, 0, 3).reshape(q.shape)

    def weights(self, q, k, positions, mask):
        """How much each query attends to each key."""
        H, d = self.u.shape
        r, v_r = self.position_terms(positions)             # [H, 1, d, K], [H, 1, 1, K]
        content = (q + self.u.reshape(H, 1, 1, d)) @ k.swapaxes(-1, -2)     # (a) + (c)
        position = q @ r + v_r                                              # (b) + (d)
        score = content + rel_shift(position)
        return softmax(score * (1 / math.sqrt(d)), mask)

    def position_terms(self, positions):
        """r of every distance, as columns for q @ r, and (d) v · r."""
        H, d = self.u.shape
        r = (positions @ self.W_r).reshape(-1, 1, H, d).transpose(2, 1, 3, 0)
        return r, self.v.reshape(H, 1, 1, d) @ r


def heads(x, H):
    """[B, n, D] -> [H, B, n, d]: each head's columns become a matrix of their own.

    The head comes first, because r is the same for all rows of the batch: a product with
    [H, 1, d, K] repeats it along B.
    """
    return x.reshape(*x.shape[:2], H, x.shape[2] // H).transpose(2, 0, 1, 3)


class LearnedPositions(RelativeMultiHeadAttention):
    """Another form of r, that of labml's implementation, after Shaw et al. 2018.

    r is not computed from waves but looked up in a learned table, and v · r is a learned
    number for each distance and head. That is more freedom at each distance. But nothing is
    known about distances that were never trained: those beyond clamp_len use the last row.
    """

    def add_position_parameters(self, rng, dtype):
        (H, d), rows = self.u.shape, self.config.clamp_len + 1
        self.table = weight(rng, (rows, H, d), 1 / math.sqrt(3), dtype)
        self.bias = zeros((rows, H), dtype)

    def position_terms(self, positions):
        """Here `positions` are distances [K]."""
        (H, d), K = self.u.shape, len(positions)
        r, v_r = self.table[positions], self.bias[positions]            # [K, H, d], [K, H]
        return r.transpose(1, 2, 0).reshape(H, 1, d, K), v_r.T.reshape(H, 1, 1, K)


# %% 5. The layer
# First attention, where tokens exchange information. Then a feed-forward network, on each
# token by itself. Both are added to what was there. The paper normalises the sum (post-norm).
# The default here is to normalise what goes into both (pre-norm), because gradients then
# reach the lowest layer undiminished, and a short warm-up is enough:
#
#     pre-norm      y = x + attention(norm(x), norm(memory))      y + feed_forward(norm(y))
#     post-norm     y = norm(x + attention(x, memory))            norm(y + feed_forward(y))
#
# Memory holds what enters the layer. With pre-norm that is not normalised, so it is
# normalised each time it is used, with the gain and bias of that time.

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
        D, F, self.config = config.d_model, config.d_ff, config
        self.W_1, self.b_1 = weight(rng, (D, F), 1 / math.sqrt(3 * D), dtype), zeros(F, dtype)
        self.W_2 = weight(rng, (F, D), 1 / math.sqrt(3 * F * 2 * config.n_layer), dtype)
        self.b_2 = zeros(D, dtype)

    def __call__(self, x, generator=None):
        activation = OPS[self.config.activation]                    # relu or squared_relu
        hidden = activation(x @ self.W_1 + self.b_1)
        return dropout(hidden, self.config.dropout, generator) @ self.W_2 + self.b_2


class Layer:
    """One layer: x [B, T, D] and its memory [B, M, D] -> [B, T, D]."""

    Attention = {"sinusoid": RelativeMultiHeadAttention, "learned": LearnedPositions}
    FeedForward = FeedForward           # fast.py has others here

    def __init__(self, config, rng, dtype):
        self.config = config
        self.attention = self.Attention[config.positions](config, rng, dtype)
        self.attention_norm = LayerNorm(config, dtype)
        self.feed_forward = self.FeedForward(config, rng, dtype)
        self.feed_forward_norm = LayerNorm(config, dtype)

    def __call__(self, x, memory, positions, mask, generator=None):
        p = self.config.dropout
        if self.config.pre_norm:            # x + f(norm(x)), twice
            y = self.attention_after_norm(x, memory, positions, mask, generator)
            x = x + dropout(y, p, generator)
            y = self.feed_forward(self.feed_forward_norm(x), generator)
            return x + dropout(y, p, generator)
        y = self.attention(x, memory, positions, mask, generator)   # norm(x + f(x)), twice
        x = self.attention_norm(x + dropout(y, p, generator))
        y = self.feed_forward(x, generator)
        return self.feed_forward_norm(x + dropout(y, p, generator))

    def attention_after_norm(self, x, memory, positions, mask, generator):
        norm = self.attention_norm
        return self.attention(norm(x), norm(memory), positions, mask, generator)


# %% 6. The model
# From tokens to logits, in the letters of the call below:
#
#     x = embedding[tokens] sqrt(D)
#     x = layer(x, its memory), for each of N layers      and x joins the layer's memory
#     logits = norm(x) W_out + b_out

@dataclasses.dataclass(frozen=True)
class Config:
    """What determines the function a model computes. ValueError names a wrong field."""
    vocab_size: int                 # V, the number of different tokens
    n_layer: int = 4                # N
    n_head: int = 4                 # H
    d_model: int = 128              # D, a multiple of 2 H: waves come in pairs
    d_ff: int = 512                 # F, the width of the feed-forward network
    mem_len: int = 64               # the most states that each layer keeps; 0: none
    dropout: float = 0.0            # probability of setting a number to 0 in training: of
                                    # the embeddings, of what attention and feed-forward
                                    # return, of the latter's hidden values, and of the
                                    # final states
    attn_dropout: float = 0.0       # the same for an attention weight
    pre_norm: bool = True           # x + f(norm(x)); False: the paper's norm(x + f(x))
    tie_weights: bool = False       # the output uses the embeddings (Press and Wolf 2017)
    positions: str = "sinusoid"     # R of section 2; "learned": LearnedPositions
    clamp_len: int | None = None    # a larger distance counts as this one; None: no limit
    activation: str = "relu"        # of the feed-forward network; or "squared_relu", which is
                                    # train_shakespeare.py's default
    same_length: bool = False       # a query sees at most mem_len keys before itself; False:
                                    # the whole memory, and its segment up to itself

    def __post_init__(self):
        for names, holds, what in (
                ("vocab_size n_layer n_head d_model d_ff", lambda n: n >= 1, "at least 1"),
                ("mem_len", lambda n: n >= 0, "at least 0"),
                ("clamp_len", lambda n: n is None or n >= 0, "at least 0, or None"),
                ("dropout attn_dropout", lambda p: 0 <= p < 1, "in [0, 1)"),
                ("d_model", lambda n: n % (2 * self.n_head) == 0,
                 f"a multiple of 2 * n_head = {2 * self.n_head}"),
                ("positions", ("sinusoid", "learned").__contains__, "'sinusoid' or 'learned'"),
                ("activation", ("relu", "squared_relu").__contains__, "'relu', 'squared_relu'")):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")
        if self.positions == "learned" and self.clamp_len is None:
            raise ValueError("positions='learned' needs clamp_len: the table has one row for "
                             "each distance 0 … clamp_len")


class TransformerXL:
    """The language model: `logits, memory = model(tokens, memory)`.

    dtype: float32 for speed, float64 for gradient checks. Dropout acts when, and only when,
    a call is given a generator; there is no training mode to forget.
    """

    Layer = Layer                       # fast.py has another here

    def __init__(self, config, seed=0, dtype=numpy.float32):
        rng = numpy.random.default_rng(seed)
        V, D = config.vocab_size, config.d_model
        self.config, self.dtype = config, numpy.dtype(dtype)
        # Rows of length 1, so that the logits start small where tie_weights uses them there.
        self.embedding = weight(rng, (V, D), 1 / math.sqrt(D), dtype)
        self.layers = [self.Layer(config, rng, dtype) for _ in range(config.n_layer)]
        if config.pre_norm:
            self.norm = LayerNorm(config, dtype)        # post-norm layers end with theirs
        if not config.tie_weights:
            self.W_out = weight(rng, (D, V), 1 / math.sqrt(3 * D), dtype)
        self.b_out = zeros(V, dtype)

    def __call__(self, tokens, memory=None, generator=None, mem_len=None):
        """tokens [B, T] integers -> logits [B, T, V], the new memory.

        memory      N arrays [B, M, D], as the last call returned them, or None
        generator   random numbers for dropout: xp.random.default_rng(…); None: no dropout
        mem_len     states to keep, where it differs from the configuration's
        """
        config, D = self.config, self.config.d_model
        tokens = checked_indices(tokens, "tokens", config.vocab_size)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError("tokens must be [batch, seq_len] and not empty, not "
                             f"{list(tokens.shape)}; tokens[None] makes a batch of one row")
        B, T = tokens.shape
        memory = self.empty_memory(B) if memory is None else memory
        M = memory[0].shape[1]
        mem_len = config.mem_len if mem_len is None else mem_len
        positions = relative_positions(config, T, M, self.dtype)
        mask = attention_mask(T, M, mem_len if config.same_length else None)

        x = self.embed(tokens) * math.sqrt(D)               # [B, T, D], numbers of size 1
        x = dropout(x, config.dropout, generator)
        new_memory = []
        for layer, past in zip(self.layers, memory, strict=True):
            new_memory.append(update_memory(past, x.data, mem_len))     # .data: SG
            x = layer(x, past, positions, mask, generator)
        if config.pre_norm:
            x = self.norm(x)
        x = dropout(x, config.dropout, generator)
        W_out = self.embedding.T if config.tie_weights else self.W_out
        return x @ W_out + self.b_out, new_memory

    def embed(self, tokens):
        return embedding(self.embedding, tokens)

    def empty_memory(self, batch):
        """The memory before the first segment: N arrays [batch, 0, D]."""
        empty = xp.zeros((batch, 0, self.config.d_model), dtype=self.dtype)
        return [empty for _ in self.layers]

    def parameters(self):
        """{"embedding": Tensor, "layers.0.attention.W_q": …, …}, in a fixed order."""
        return dict(named_tensors(self))

    def parameter_count(self):
        return sum(w.size for w in self.parameters().values())

    def decoder(self, memory, mem_len):
        """A function: token -> logits [V] of what follows it. It reads on behind `memory`."""
        def read(token):
            nonlocal memory
            with no_grad():
                logits, memory = self([[token]], memory, mem_len=mem_len)
            return logits.data[0, -1]
        return read


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
# from.
#
# What memory is worth: 0.06 nats per character of Shakespeare that the model was not trained
# on. These are the default of train_shakespeare.py, with segments and memory of 64, 5 minutes
# on two cores, and a model without memory that had as much time (seeds differ by 0.01):
#
#     trained and evaluated without memory                       1.538
#     trained with memory, evaluated with 0, 32, 64, 256         1.606, 1.484, 1.481, 1.481
#
# A model that reads its text many times becomes too sure of what it has seen. A confidence
# penalty (see cross_entropy) makes being sure cost something; without it the loss is plain.

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

    While the learning rate is high, w jitters around the path that it follows. Its running
    mean, over a tenth of the steps and at most about average_over, predicts about as well as
    w would if the learning rate were brought down now (Polyak and Juditsky 1992). Training
    does not use it. Evaluation does, with `with adam.averaged():`. Where average_over is
    None there is no average, and that block changes nothing.

    parameters is {name: Tensor}, as model.parameters() returns it.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
                 clip=None, average_over=None):
        if not isinstance(parameters, dict):
            raise TypeError("Adam: give {name: Tensor}; only those named W… decay")
        self.parameters, self.lr, self.betas, self.eps = parameters, lr, betas, eps
        self.weight_decay, self.clip, self.average_over = weight_decay, clip, average_over
        self.t = 0
        self.first, self.second = ({name: xp.zeros_like(w.data) for name, w in
                                    self.parameters.items()} for _ in range(2))
        self.average = {name: w.data.copy() for name, w in self.parameters.items()}

    def step(self, lr=None):
        """Move the parameters by their `.grad`. Returns its norm before clipping.

        A parameter whose grad is None stays as it is.
        """
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
        """Forget the gradients: backward() adds to what is there."""
        for w in self.parameters.values():
            w.grad = None

    @contextlib.contextmanager
    def averaged(self):
        """Inside `with adam.averaged():` the parameters are their averages."""
        current = {name: w.data.copy() for name, w in self.parameters.items()}
        try:
            for name, w in self.parameters.items():
                if self.average_over:
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
# A new token is a segment of one: T = 1. It attends to the memory and to itself, and joins
# the memory. So each costs the same, however long the text. (The keys of the whole memory are
# made anew for each token here. fast.py keeps them, because the weights no longer change.)

def generate(model, prompt, length, temperature=1.0, top_k=None, top_p=None, rng=None,
             mem_len=None):
    """Iterate over `length` tokens that continue `prompt`, a non-empty sequence of tokens.

    temperature   divides the logits: below 1 safer, above 1 more varied, 0 the likeliest
    top_k         choose among the k likeliest only
    top_p         choose among the fewest whose probabilities reach p (Holtzman et al. 2020)
    rng           numpy.random.Generator; None: seed 0
    mem_len       states to keep, where it differs from the configuration's. M + T - 1 shows
                  each token as much as the last query of a segment saw in training
    """
    if not temperature >= 0 or top_k is not None and top_k < 1 or (
            top_p is not None and not 0 < top_p <= 1):
        raise ValueError("generate: temperature must be at least 0, top_k at least 1, top_p in "
                         f"(0, 1], not {temperature}, {top_k}, {top_p}")
    rng, prompt = rng or numpy.random.default_rng(0), numpy.asarray(prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError("generate: the prompt must be a non-empty list of tokens, "
                         f"not of shape {list(prompt.shape)}")
    mem_len = model.config.mem_len if mem_len is None else mem_len
    mem_len = min(mem_len, prompt.size + length)        # there is never more to remember
    memory, seq_len = None, min(max(1, mem_len), 256)   # of the prompt: scores take T K space
    for at in range(0, prompt.size, seq_len):
        with no_grad():
            logits, memory = model(prompt[None, at:at + seq_len], memory, mem_len=mem_len)
    logits, read = logits.data[0, -1], model.decoder(memory, mem_len)
    for n in range(length):
        token = sample(to_numpy(logits), temperature, top_k, top_p, rng)
        yield token
        if n < length - 1:
            logits = read(token)


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


# %% 10. The paper and other code
# "The authors' code" is the PyTorch half of github.com/kimiyoung/transformer-xl, "labml"
# the annotated implementation at nn.labml.ai/transformers/xl.
#
#     here                        the authors' code               labml
#     u and v in every layer      one pair for all layers         in every layer
#     W_r R, or learned           W_r R; dropout acts on R too    learned
#     pre-norm, or post-norm      post-norm, or pre-norm          pre-norm
#     N memories                  N + 1; the last is not used     N
#     T; no ext_len               tgt_len; ext_len tokens at a    T
#                                 segment's end are read again
#     same_length: mem_len keys   one key less                    none
#     before a query
#     the shift begins at place   a column of zeros before the    T more columns, for distances
#     T-1 of the line             line, begins at place T: the    below 0; lined up with the
#                                 same up to each row's 0         first query, not the last
#     one softmax                 adaptive softmax and            one softmax
#                                 embeddings, for words


# %% 11. A walk through it
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
    positions, mask = relative_positions(config, T, M, float64), attention_mask(T, M)
    x, memory, R = Tensor(states[None, M:]), Tensor(states[None, :M]), positions.numpy()
    q_0, k_0 = (heads(Tensor(xp.asarray(y[None])), 1) for y in (q, k))
    weights = attention.weights(q_0, k_0, positions, mask)
    output = attention(x, memory, positions, mask)

    def shifted(scores):
        return rel_shift(Tensor(scores)).numpy()
    b, d = q @ R.T, numpy.tile(R @ v, (T, 1))
    terms = dict(a=q @ k.T, b=shifted(b), c=numpy.tile(k @ u, (T, 1)), d=shifted(d))
    return dict(terms, states=states, q=q, u=u, v=v, R=R, by_distance=b + d,
                hidden=to_numpy(mask), score=sum(terms.values()) / math.sqrt(2),
                weights=weights.numpy()[0, 0], output=output.numpy()[0])


def in_segments(model, tokens, T, carry=True):
    """Logits [length, V] of tokens [1, length], read in segments of T, and the last memory."""
    memory, parts = None, []
    for at in range(0, tokens.shape[1], T):
        logits, memory = model(tokens[:, at:at + T], memory if carry else None)
        parts.append(logits.numpy()[0])
    return numpy.concatenate(parts), memory


def print_example():
    """The running example: the lines behind a bar in the text above."""
    text, T, M, e, t = "First_Cit", 3, 2, running_example(), 1        # t: the row of "t"
    print("   |  segment   memory   how many keys its queries see   memory after")
    places, memory = numpy.arange(len(text))[None, :, None], numpy.zeros((1, 0, 1), int)
    for at in range(0, len(text), T):
        seen = (~attention_mask(T, memory.shape[1])).sum(axis=1)
        line = f"   |  {' '.join(text[at:at + T]):10}{memory.shape[1]:<9}"
        memory = update_memory(memory, places[:, at:at + T], M)
        print(f"{line}{', '.join(map(str, seen)):32}{' '.join(text[i] for i in memory.flat)}")
    q, v, k, R, seen = e["q"][t], e["v"], e["states"], e["R"], slice(4)
    for name, values in (
            ("", ()), ("n", range(4, -1, -1)), ("sin(n)", R[:, 0]), ("cos(n)", R[:, 1]),
            ("", ()), ("distance n", range(4, -1, -1)), ("(b) q · r", R @ q),
            ("(d) v · r", R @ v), ("(b) + (d)", e["by_distance"][t]),
            ("", ()), ("key", text[1:6]), ("(b) + (d)", (e["b"] + e["d"])[t, seen]),
            ("k = value", [f"({x:.0f},{y:.0f})" for x, y in k]), ("(a) q · k", e["a"][t]),
            ("(c) u · k", e["c"][t]), ("score", e["score"][t, seen]), ("weight", e["weights"][t])):
        cells = (f"{x:7.2f}" if isinstance(x, float) else f"{x:>7}" for x in values)
        print(f"   |  {name:12}{''.join(cells)}" if name else "")
    print("   |  output         ({:.2f}, {:.2f})".format(*e["output"][t]))


def walk_through():
    print("1. The running example.")
    print_example()

    print("\n2. One pass over 12 tokens, and three over 4 with the memory of those before.")
    config = Config(vocab_size=5, n_layer=2, n_head=2, d_model=16, d_ff=32, mem_len=8)
    model = TransformerXL(config, dtype=numpy.float64)
    tokens = numpy.random.default_rng(0).integers(5, size=(1, 12))
    whole = model(tokens)[0].numpy()[0]
    with_memory, without = (abs(whole - in_segments(model, tokens, 4, carry)[0]).max()
                            for carry in (True, False))
    print(f"   largest difference with memory {with_memory:.0e}, without {without:.2f}")

    print("\n3. A tiny model learns four lines by heart, in segments of 16, memory 16.")
    verse = ("Shall I compare thee to a summer's day?\n"
             "Thou art more lovely and more temperate:\n"
             "Rough winds do shake the darling buds of May,\n"
             "And summer's lease hath all too short a date;\n")
    letters = sorted(set(verse))
    tokens = numpy.array([letters.index(letter) for letter in verse])
    B, T = 4, 16
    text = numpy.tile(tokens, 7)                # cut into B rows, each a contiguous text
    rows = text[:len(text) // B * B].reshape(B, -1)
    config = Config(len(letters), n_layer=2, n_head=2, d_model=32, d_ff=64, mem_len=16)
    model, memory, at = TransformerXL(config, seed=1), None, 0
    adam = Adam(model.parameters(), clip=1.0)
    for step in range(301):
        if at + T + 1 > rows.shape[1]:          # the end of the rows: begin again
            memory, at = None, 0
        loss, memory = loss_and_memory(model, rows[:, at:at + T], rows[:, at + 1:at + T + 1],
                                       memory)  # of the segment before, row by row
        adam.zero_grad()
        loss.backward()
        adam.step(warmup_cosine(step, 300, peak=1e-2, warmup=20, final=1e-4))
        at += T
        if step % 100 == 0:
            print(f"   step {step:3}   loss {loss.item():.3f}")
    line = verse.index("\n") + 1
    told = generate(model, tokens[:line], len(verse) - line - 1, temperature=0)
    told = "".join(letters[token] for token in told).replace("\n", "\n       ")
    print(f"   told the first line, it goes on:\n       {told}")


if __name__ == "__main__":
    walk_through()
