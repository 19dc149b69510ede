# %% Transformer-XL
"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860), from the paper's idea to generated text, on top of autograd.py.

The question. A language model predicts each token from the tokens before it. A Transformer does so by attention
over a window of T tokens, and a text is longer than any window. Cut the text into segments of T and train on each by
itself, and two things go wrong: nothing further back than T can ever be used, and the first tokens of every segment
are predicted from almost nothing, although the text before them has just been read. Sliding the window by one token
at a time mends the second when evaluating, at the price of computing everything T times over.

(Attention, for whom it is new: each token's state, at first its embedding, a learned vector, is multiplied by three learned
matrices to give a query, what it looks for, a key, what it offers, and a value, what it passes on. A query's dot products with
all keys up to its own, divided by sqrt(d), are its scores, where d is how many numbers a query has: a dot product of two vectors
of d independent numbers of mean 0 and size 1 has a size of about sqrt(d), and a softmax of large scores is almost a choice of
one key. The softmax makes scores weights, and the token receives the values in these proportions, through a fourth matrix.
Several heads do this side by side, each with its share of the width. A layer is attention followed by a small network for each
token alone.)

The answer. Keep what entered each layer for the previous segment (the embeddings for layer 1, layer 1's output for
layer 2, …), and let the same layer attend to it in the next segment. With T = 4 tokens and a memory of M = 4 states:

                           segment 1        segment 2        segment 3
    output of layer 2      .  .  .  .       .  .  .  .       .  .  .  O
                                            |__|__|__|_______|__|__|__|
    output of layer 1      .  .  .  .       m  m  m  m       o  o  o  o
                           |__|__|__|_______|__|__|__|
    embeddings             m  m  m  m       o  o  o  o       .  .  .  .
                           F  i  r  s       t  _  C  i       t  i  z  e

The state O attended to the four o above "tize" and to the four m on their left, layer 2's memory. The newest of these m was
made one segment earlier, in the same way, from the row below: the o under it and the m on their left, layer 1's memory then.

Information flows along all lines, gradients only within the segment being trained. Every layer reaches one memory further
back: N layers see N * M tokens beyond their segment (here 2 * 4) if M, the full memory, is a multiple of T. In general it is
M + (N - 1) * T * ceil(M / T): the oldest state in memory belongs to a segment that began T * ceil(M / T) tokens back, and saw
that segment from its first token on, and the memory of that time. (With `same_length`, below, each token sees N * M back.)
Each token is still computed only once. The cost: attention over M + T keys instead of T, M states a layer to keep, segments
that must be read in the order of the text, and no learning of what would be good to keep.

It needs one change to the Transformer: positions must be *relative*. Absolute positions, 0 … T-1 in each segment, are
added to the embeddings and so are part of every state for good: those in memory would claim the same places as those of
the segment, attention could not tell them apart, and a stored state cannot be renumbered.
(Counting on through the text instead would give each place a number that training meets once in a reading, and a longer text
numbers that it never met.) How far back a key lies from a query, in contrast, does not depend on where the text was cut.

Reading order: 1. the configuration   2. positions, and the relative shift   3. relative attention
               4. the same attention, faster   5. the layer   6. memory   7. the model
               8. the loss, and what is attended to   9. Adam   10. generation   11. a walk through it

Shapes are written in comments with these letters:

    B  batch    T  queries: tokens of the segment    M  memory: states kept so far, at most mem_len    K = M + T  keys
    H  heads    D  d_model    d = D / H    F  d_ff    V  vocabulary    N  n_layer

("The authors' code" is the PyTorch half of github.com/kimiyoung/transformer-xl. It calls T `tgt_len`. Its `ext_len`, tokens at
the end of a segment to be read once more in the next, is left out; so are the adaptive softmax and embeddings, which characters
do not need. "labml" is the annotated implementation at nn.labml.ai/transformers/xl.)

From autograd.py: `xp` is NumPy or CuPy. A Tensor is an array, `.data`, with a gradient. `result(y, (x, f))` is the Tensor of an
operation's value y, whose gradient g goes on to x as f(g); `jointly` lists the pairs (x, f) of several x whose gradients one
function computes. `arrays(…)` are an operation's operands as arrays; `@op` lists it for the tests, `@fused` marks formulas that
a GPU computes in one pass. `linear(x, W, b, before=m)` is [m, x] W + b, with m, which gets no gradient, in front of x along
time. `row_sums` and `row_dots` sum over the last axis, which stays with size 1: one array, or the product of two.
`shared_zeros` are zeros that several processes see.
"""
import contextlib
import dataclasses
import math

import numpy

from autograd import (Tensor, arrays, cross_entropy, dropout, embedding, fused, jointly, layer_norm, linear, no_grad, normalise,
                      op, relu, result, row_dots, row_sums, shared_zeros, softmax, squared_relu, stop_gradient, to_numpy, xp)


# %% 1. The configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """What determines the function a model computes. ValueError names the field that is wrong."""
    vocab_size: int                 # V, the number of different tokens
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    d_ff: int = 512
    mem_len: int = 64               # most states each layer keeps of the past; 0: none
    dropout: float = 0.0            # probability that, in training, a number of the embeddings, of the output of attention and
                                    # feed-forward, of the latter's hidden values or of the final states is set to 0
    attn_dropout: float = 0.0       # probability of dropping an attention weight
    pre_norm: bool = True           # x + f(norm(x)), for which a short warm-up is enough; False: the paper's norm(x + f(x))
    tie_weights: bool = False       # True: the output layer uses the embedding table (Press and Wolf 2017)
    positions: str = "sinusoid"     # the paper's; "learned": a learned vector and bias for each distance (after Shaw et al. 2018)
    clamp_len: int | None = None    # a larger distance is treated as this one; None: no limit. "learned" has a table of
                                    # clamp_len + 1 rows and so needs it
    activation: str = "relu"        # of the feed-forward's hidden values; "squared_relu": its square (So et al. 2021)
    same_length: bool = False       # True: a query sees itself and at most the mem_len keys before it, so that with a full
                                    # memory all see as many (the authors' code: one key less). False: the whole memory and
                                    # all of its segment before it

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind, value = int | float if field.type is float else field.type, getattr(self, field.name)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{field.name} must be {getattr(kind, '__name__', kind)}, not {value!r}")
        for name, least in dict(vocab_size=1, n_layer=1, n_head=1, d_model=1, d_ff=1, mem_len=0, clamp_len=0).items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model must be a multiple of 2 * n_head = {2 * self.n_head}, not {self.d_model}")
        for name in ("dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name, choices in (("positions", ("sinusoid", "learned")), ("activation", ("relu", "squared_relu"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        if self.positions == "learned" and self.clamp_len is None:
            raise ValueError("positions='learned' needs clamp_len: the table has one row for each distance 0 … clamp_len")

    def parameter_count(self):
        """How many numbers a model of this configuration learns."""
        V, D, F, H = self.vocab_size, self.d_model, self.d_ff, self.n_head
        distances = D * D + D if self.positions == "sinusoid" else (self.clamp_len + 1) * (D + H)   # W_r, v; table, bias
        layer = 4 * D * D + D + distances + 2 * D * F + F + D + 4 * D   # W_q, W_kv, W_o, u; W_1, W_2, b_1, b_2, two norms
        return V * D + self.n_layer * layer + (2 * D if self.pre_norm else 0) + (0 if self.tie_weights else D * V) + V


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
# The distances of visible keys are 0 … K-1, and each stands on a diagonal. One vector for each, r in section 3, is enough.

def sinusoid(distances, d_model, dtype=numpy.float32):
    """R of the paper: [K] distances -> [K, d_model], sines then cosines of geometrically slower waves.

    R[x] = [sin(x w_0), sin(x w_1), …, cos(x w_0), cos(x w_1), …]   w_n = 10000 ^ (-2n / d_model)

    (Vaswani et al. 2017, section 3.5, there with sines and cosines alternating; the matrix W_r of section 3 can undo any order.)
    """
    w = 10000.0 ** (-xp.arange(0, d_model, 2, dtype=numpy.float64) / d_model)
    angle = distances[:, None] * w[None, :]
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], axis=-1).astype(dtype)


def relative_positions(config, T, M, dtype):
    """Attention's position input, for the distances K-1, K-2, …, 0 (clamped): in the order of the last query's keys.

    Sinusoids R [K, D] as a Tensor; for learned positions the distances themselves [K], to look up in a table.
    """
    distances = xp.arange(M + T - 1, -1, -1)
    if config.clamp_len is not None:
        distances = xp.minimum(distances, config.clamp_len)
    return distances if config.positions == "learned" else Tensor(sinusoid(distances, config.d_model, dtype))


def rel_shift(x):
    """From columns that count distance to columns that count keys: [..., T, K] -> [..., T, K].

    Query i scores key j with the vector r of their distance, M + i - j. There are T * K pairs but only K distances, so all
    queries are multiplied with all K vectors in one matrix product. Its columns stand for distances, the same in every row:

        row i:   [K-1, K-2, …, 2, 1, 0]

    Row i has to move left by T-1-i places, so that distance 0 arrives at its own key j = M + i. This needs no loop. Write the
    rows one behind the other, in one line: row i begins at place i K of it. Moved left by T-1-i, it begins with what stands
    T-1-i places later, at i K + T-1-i = T-1 + i (K-1): the first row at T-1, and each further one K-1 places after the one
    before. For T = 3, K = 5 (each number a distance):

        4 3 2 1 0             4 3 2 1 0 4 3 2 1 0 4 3 2 1 0             2 1 0 4 3
        4 3 2 1 0     -->         ^       ^       ^             -->     3 2 1 0 4
        4 3 2 1 0                 row 0   row 1   row 2                 4 3 2 1 0

    Up to its 0, each row is that of the table at the head of this section. Right of the zeros, where the table has dots,
    the next unshifted row begins. Those are keys in the future, which attention hides: weight 0, gradient 0.

    (The authors' code puts a column of zeros in front, drops the first T numbers of the line and reads rows of K: the
    same numbers up to each row's distance 0, other rubbish beyond it. labml makes T columns more, for distances below 0 too,
    lines them up with the first query instead of the last and moves row i right by i, so its `shift_right` drops the end.)

    >>> rel_shift(Tensor([[4, 3, 2, 1, 0]] * 3)).numpy().tolist()
    [[2, 1, 0, 4, 3], [3, 2, 1, 0, 4], [4, 3, 2, 1, 0]]
    """
    return result(_rows_from_line(x.data, x.shape[-1]), (x, _shift_back))


def _rows_from_line(x, n):
    """[..., T, K] arrays -> [..., T, n]: the first n numbers of each shifted row; a view where x is contiguous."""
    *batch, T, K = x.shape
    line = x.reshape(*batch, T * K)
    step = line.strides[-1]
    return xp.lib.stride_tricks.as_strided(line[..., T - 1:], (*batch, T, n), (*line.strides[:-1], (K - 1) * step, step))


def _shift_back(g):
    """The gradient of rel_shift: that of every number goes to the place in the line from which it came. The last of a row and
    the first of the next came from the same one, so there the gradients add; the line's first T-1 were left out and get 0."""
    *batch, T, K = g.shape
    if T == 1:
        return g                                        # a single query is at the end of its row already
    x = xp.empty((*batch, T, K), dtype=g.dtype)
    line = x.reshape(*batch, T * K)
    line[..., :T - 1] = line[..., -1] = 0               # the last: for the sum below
    _rows_from_line(x, K - 1)[...] = g[..., :-1]        # without their last number the rows do not overlap
    line[..., T + K - 2::K - 1] += g[..., -1]
    return x


def key_distances(T, M):
    """[T, K] integers: how far back key j lies from query i, M + i - j; negative in the future."""
    return M + xp.arange(T)[:, None] - xp.arange(M + T)[None, :]


def hidden_keys(T, M, window=None):
    """[T, K] booleans: True where query i must not see key j: the future and, with `window`, distances beyond it.

    >>> hidden_keys(T=3, M=2).astype(int).tolist()
    [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    """
    distance = key_distances(T, M)
    return (distance < 0) if window is None else (distance < 0) | (distance > window)


# %% 3. Relative attention
# A Transformer with absolute positions scores query i against key j with (x_i + p_i) W_q · (x_j + p_j) W_k, where x
# is content and p position (added once, to the embeddings). Multiplied out, that is four terms (the paper's A^abs, its
# section 3.3). Transformer-XL keeps the four, in every layer, and replaces what is absolute in each (A^rel):
#
#            absolute                    relative
#     (a)    x_i W_q · x_j W_k           q · k      content: what i looks for against what j offers
#     (b)    x_i W_q · p_j W_k           q · r      what i looks for against how far away j is
#     (c)    p_i W_q · x_j W_k           u · k      what j offers, to any query: some keys may always matter
#     (d)    p_i W_q · p_j W_k           v · r      how far away j is, for any query: near ones may matter more
#
# q = x_i W_q and k = x_j W_k stay. p_j W_k becomes r = R[distance] W_r: the sinusoid of the distance from i to j, through a
# matrix of its own. p_i W_q, the query's own position, becomes a learned constant: where a query stands says nothing
# once distances are relative. It is u where it meets content and v where it meets distance: two, because what they meet
# comes from two matrices, W_k and W_r. (Here every layer has its own u and v; in the authors' code all share one pair.)
# Summed, each score takes two products instead of four:
#
#     score = [ (q + u) · k + (q + v) · r ] / sqrt(d)         (a) + (c) and (b) + (d)
#
# `positions="learned"` (labml's form, after Shaw et al. 2018, who have (a) and (b) only) differs in r and in (d): r is not
# computed from sinusoids but looked up in a learned table, and v · r is a learned number for each distance and head. More
# freedom at each distance, but nothing is known about distances that were never trained; those beyond clamp_len use the
# table's last row (which is trained only if distances in training reach it).

class RelativeMultiHeadAttention:
    """Attention of a segment over itself and the memory before it, with relative positions (the paper's section 3.3).

    Each head has d neighbouring columns of W_q, W_k, W_v and W_r, and d neighbouring rows of W_o.
    """

    def __init__(self, config, rng, dtype):
        D, H = config.d_model, config.n_head
        self.config = config
        self.W_q, self.W_kv = weight(rng, (D, D), dtype), weight(rng, (D, 2 * D), dtype)        # W_kv: W_k, then W_v
        self.W_o = weight(rng, (D, D), dtype, scale=1 / math.sqrt(2 * config.n_layer))          # output
        self.u = zeros((H, D // H), dtype)                                                      # (c)
        if config.positions == "sinusoid":
            self.W_r = weight(rng, (D, D), dtype)                                               # (b), (d)
            self.v = zeros((H, D // H), dtype)                                                  # (d)
        else:
            rows = config.clamp_len + 1
            self.table = weight(rng, (rows, H, D // H), dtype, scale=math.sqrt(rows))           # (b), as if for one input
            self.bias = zeros((rows, H), dtype)                                                 # (d)

    def __call__(self, x, memory, positions, mask, generator=None, norm=None):
        """x [B, T, D], memory [B, M, D] -> [B, T, D].

        positions   what `relative_positions` returns
        mask        [T, K] booleans, True where hidden
        generator   random numbers for dropout, or None
        norm        LayerNorm to apply to x and memory first, or None
        """
        q, kv = self.project(x, memory, norm)
        if self.config.positions == "sinusoid" and (generator is None or self.config.attn_dropout == 0):
            mixed = attend(q, kv, positions @ self.W_r, self.u, self.v, mask)      # the same, faster: section 4 below
        else:
            mixed = self.mix(q, kv, positions, mask, generator)
        return mixed @ self.W_o

    def project(self, x, memory, norm):
        """Queries [B, T, D] of the segment; keys and values [B, K, 2 D] of h~ = [SG(m) o h] (the paper's section 3.2):
        memory, with stopped gradient, then the segment, joined (o) along time."""
        gain_and_bias = ()
        if norm is not None:
            # In two halves: `normalise` gives every row mean 0 and variance 1; `linear` multiplies by gain and adds bias, and
            # their gradients, memory's share included, come from that of the weights, not from one of memory.
            x, memory, gain_and_bias = normalise(x), normalise(memory), (norm.gain, norm.bias)
        return linear(x, self.W_q, 0.0, *gain_and_bias), linear(x, self.W_kv, 0.0, *gain_and_bias, before=memory)

    def mix(self, q, kv, positions, mask, generator):
        """What each query finds: the values, weighted by attention. [B, T, D], [B, K, 2 D] -> [B, T, D]."""
        attention = dropout(self.weights(q, kv, positions, mask), self.config.attn_dropout, generator)
        values = heads(kv[..., q.shape[-1]:], self.config.n_head)
        return (attention @ values).transpose(1, 2, 0, 3).reshape(q.shape)         # [H, B, T, d] -> [B, T, D]

    def weights(self, q, kv, positions, mask):
        """How much each query attends to each key, for every head: [B, T, D], [B, K, 2 D] -> [H, B, T, K]."""
        (B, T, D), K, (H, d) = q.shape, kv.shape[1], self.u.shape
        q, k = heads(q, H), heads(kv[..., :D], H)                                  # [H, B, T, d], [H, B, K, d]
        content = (q + self.u.reshape(H, 1, 1, d)) @ k.swapaxes(-1, -2)            # (a) + (c)   [H, B, T, K]
        r, term_d = self.distance_terms(positions)
        position = q.reshape(H, B * T, d) @ r + term_d                             # (b) + (d), a column for each distance
        position = rel_shift(position.reshape(H, B, T, K))                         # a column for each key   [H, B, T, K]
        return softmax((content + position) * (1 / math.sqrt(d)), mask)

    def distance_terms(self, positions):
        """For every distance: r [H, d, K], which (b) is made with, and (d) [H, 1, K]."""
        H, d = self.u.shape
        if self.config.positions == "learned":
            return self.table[positions].transpose(1, 2, 0), self.bias[positions].T.reshape(H, 1, -1)
        r = (positions @ self.W_r).reshape(-1, H, d).transpose(1, 2, 0)
        return r, self.v.reshape(H, 1, d) @ r


def heads(x, H):
    """[B, n, D] -> [H, B, n, d], a view. Heads are in front so that r, the same for all B, takes one product a head."""
    return x.reshape(*x.shape[:2], H, x.shape[2] // H).transpose(2, 0, 1, 3)


# The parameters start as random numbers from NumPy's generator on every device, so that a seed means the same model
# on the CPU and on the GPU. With the spread 1/sqrt(3 n) a product over n inputs is about 0.6 times the size of its input;
# W_o and W_2, whose results are added to the token's state 2 * N times in all, start smaller by sqrt(2 N) (as in GPT-2).

def weight(rng, shape, dtype, scale=1.0):
    """A parameter [inputs, …] of normal numbers with standard deviation scale / sqrt(3 * inputs)."""
    return Tensor(xp.asarray((rng.normal(size=shape) * (scale / math.sqrt(3 * shape[0]))).astype(dtype)), True)


def zeros(shape, dtype):
    return Tensor(xp.zeros(shape, dtype=dtype), requires_grad=True)


# %% 4. The same attention, faster
# `attend` below computes what `mix` above computes with sinusoids and no attention dropout (a test compares the two), in half
# of the time: with its gradient written out by hand it keeps no [T, K] array but the softmax's numerators, and a block of
# scores is worked on while it is in the processor's cache. Skip it when reading for the first time.
#
# Softmax normalises a row by its sum z. That division commutes with the product with the values, so it is done there,
# on d numbers a query instead of K:    o = (E / z) values = (E values) / z    with  E = exp(score - largest of the row)
# (Subtracting the largest keeps exp from overflowing and cancels in E / z, so it has no gradient.)
#
# The gradient, from g, the gradient of o, with y = E / z the attention:
#
#     d_values = y^T g = E^T (g / z)
#     d_score_j = y_j (d_y_j - sum_k y_k d_y_k)       with  d_y_j = g · values_j,   from the softmax
#     the sum is g · o,  so  d_score_j = E_j (g/z · values_j - g/z · o)
#
# (d_x is the gradient of x.) With score = (q + u) k^T + shift(by_distance) and by_distance = (q + v) r^T, d_by_distance is
# d_score shifted back, and
#
#     d_k = d_score^T (q + u)     d_(q+u) = d_score k     d_r = d_by_distance^T (q + v)     d_(q+v) = d_by_distance r
#
# d_q is the sum of d_(q+u) and d_(q+v), d_u the first of them summed over all queries, d_v the second. In the code
# q_u and q_v are (q + u) / sqrt(d) and (q + v) / sqrt(d): d_k and d_r contain the factor, d_q, d_u and d_v get it at the end.
#
# The queries n … n+t-1 see the first M + n + t keys, so a block of them is the same problem with fewer keys, whose distances
# are the last rows of r. Blocks share keys and distances: these gradients add up. The last queries, which see all keys, come
# first: their d_keys and d_values are written into new arrays, and those of earlier queries added to a part of them.

QUERIES, SCORES = 64, 1 << 17       # of a block, at most: half a megabyte of float32 (more, if one head and sequence have more)


@op
def attend(q, kv, r, u, v, hidden):
    """Relative attention: q [B, T, D], kv [B, K, 2 D] (keys, then values), r [K, D], u and v [H, d] -> [B, T, D].

    hidden [T, K] is True where a query must not see a key.
    """
    Q, KV, R, U, V = arrays(q, kv, r, u, v)
    (B, T, D), (K, _), (H, d) = Q.shape, R.shape, U.shape
    scale = 1 / math.sqrt(d)

    def rows(x):
        """[H, b, n, d] -> [H, b*n, d]"""
        return x.reshape(len(x), -1, x.shape[-1])

    t, h, b = T, H, B
    if xp.module is numpy:                              # on a GPU everything is one block
        t = min(T, QUERIES)
        h = min(H, max(1, SCORES // (t * K)))
        b = min(B, max(1, SCORES // (h * t * K)))
    # A block: some heads, some rows of the batch, some queries, and the keys that the last of these can see.
    blocks = [((slice(i, i + h), slice(j, j + b), slice(n, n + t)), slice(0, min(K, K - T + n + t)))
              for i in range(0, H, h) for j in range(0, B, b) for n in range(0, T, t)]

    q_u, q_v = (heads((Q + bias.reshape(D)) * scale, H) for bias in (U, V))        # [H, B, T, d]
    keys, values = heads(KV[..., :D], H), heads(KV[..., D:], H)
    R = xp.ascontiguousarray(R.reshape(K, H, d).transpose(1, 0, 2))                # [H, K, d]
    minus_infinity = xp.where(hidden, -xp.inf, 0.0).astype(Q.dtype)
    o, z, numerators = xp.empty_like(Q), xp.empty((H, B, T, 1), dtype=Q.dtype), []
    for block, seen in blocks:
        i, j, n = block
        E = q_u[block] @ keys[i, j, seen].swapaxes(-1, -2)
        by_distance = rows(q_v[block]) @ R[i, K - seen.stop:].swapaxes(-1, -2)
        add_to_scores(_rows_from_line(by_distance.reshape(E.shape), seen.stop), minus_infinity[n, seen], E)
        exp_of_difference(E.max(axis=-1, keepdims=True), E)
        z[block] = row_sums(E)
        xp.matmul(E, values[i, j, seen], out=heads(o, H)[block])
        numerators.append(E)
    inverse_z = 1 / z
    heads(o, H)[...] *= inverse_z

    def gradients(g):
        g_z = heads(g, H) * inverse_z                                              # g / z   [H, B, T, d]
        g_z_dot_o = row_dots(g_z, heads(o, H))
        d_q_u, d_q_v, d_kv, d_r = xp.empty_like(o), xp.empty_like(o), xp.empty_like(KV), xp.zeros_like(R)
        d_keys, d_values = heads(d_kv[..., :D], H), heads(d_kv[..., D:], H)
        for (block, seen), E in zip(reversed(blocks), reversed(numerators)):
            i, j, n = block
            d_score = g_z[block] @ values[i, j, seen].swapaxes(-1, -2)
            score_gradient(E, g_z_dot_o[block], d_score)
            for d_x, scores, x in ((d_values, E, g_z), (d_keys, d_score, q_u)):
                # E^T x as (x^T E)^T: to transpose is to copy for CuPy, and E is much larger than x.
                if n.stop >= T:
                    xp.matmul(x[block].swapaxes(-1, -2), scores, out=d_x[i, j].swapaxes(-1, -2))
                else:
                    d_x[i, j, seen] += (x[block].swapaxes(-1, -2) @ scores).swapaxes(-1, -2)
            xp.matmul(d_score, keys[i, j, seen], out=heads(d_q_u, H)[block])
            d_by_distance = rows(_shift_back(d_score))
            heads(d_q_v, H)[block] = (d_by_distance @ R[i, K - seen.stop:]).reshape(g_z[block].shape)
            d_r[i, K - seen.stop:] += (rows(q_v[block]).swapaxes(-1, -2) @ d_by_distance).swapaxes(-1, -2)
        all_queries = xp.full(B * T, scale, dtype=o.dtype)                         # a product with it is a sum, scaled
        d_u, d_v = ((all_queries @ x.reshape(B * T, D)).reshape(H, d) for x in (d_q_u, d_q_v))
        return (d_q_u + d_q_v) * scale, d_kv, d_r.transpose(1, 0, 2).reshape(K, D), d_u, d_v
    return result(o, *jointly(gradients, q, kv, r, u, v))


@fused
def add_to_scores(position, hidden, scores):
    scores += position
    scores += hidden


@fused
def exp_of_difference(largest, scores):
    scores -= largest
    xp.exp(scores, out=scores)


@fused
def score_gradient(numerators, dots, d_scores):
    d_scores -= dots
    d_scores *= numerators


# %% 5. The layer
# Attention, where tokens exchange information, then a feed-forward network, where each thinks for itself. Both are
# added to what was there, so that in a pre-norm model gradients reach the lowest layer undiminished.

class LayerNorm:
    """layer_norm with its parameters: gain [D], bias [D]."""

    def __init__(self, config, dtype):
        self.gain, self.bias = Tensor(xp.ones(config.d_model, dtype=dtype), True), zeros(config.d_model, dtype)

    def __call__(self, x):
        return layer_norm(x, self.gain, self.bias)


class FeedForward:
    """relu(x W_1 + b_1) W_2 + b_2 (or with relu(…)^2), position by position: [B, T, D] -> [B, T, D] through [B, T, F]."""

    def __init__(self, config, rng, dtype):
        D, F = config.d_model, config.d_ff
        self.dropout = config.dropout
        self.activation = relu if config.activation == "relu" else squared_relu
        self.W_1, self.b_1 = weight(rng, (D, F), dtype), zeros(F, dtype)
        self.W_2, self.b_2 = weight(rng, (F, D), dtype, scale=1 / math.sqrt(2 * config.n_layer)), zeros(D, dtype)

    def __call__(self, x, generator=None):
        hidden = self.activation(linear(x, self.W_1, self.b_1))
        return linear(dropout(hidden, self.dropout, generator), self.W_2, self.b_2)


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
            # Memory holds what entered the layer, so it is normalised like the segment: the two are one text.
            x = x + dropout(self.attention(x, memory, positions, mask, generator, self.attention_norm), p, generator)
            return x + dropout(self.feed_forward(self.feed_forward_norm(x), generator), p, generator)
        x = self.attention_norm(x + dropout(self.attention(x, memory, positions, mask, generator), p, generator))
        return self.feed_forward_norm(x + dropout(self.feed_forward(x, generator), p, generator))


# %% 6. Memory
# The memory of a layer is the *input* of that layer for the last M tokens: what its keys and values were computed from. It is
# stored before the layer runs, as plain arrays without history (the operations that made them): constants. Parameters get a
# gradient for the use they make of memory in this segment, none for having made it in an earlier one. Such a gradient would say
# what would have been good to store, but for it the graph of the whole text would have to stay alive; without it a segment's
# cost is constant. (Memory was made by the parameters of some updates ago, from memory that was older still: while training it
# is a little out of date.)
#
# Memory starts empty, grows to mem_len states a layer and stays there. Row b of it belongs to row b of the batch, so row b
# of the next segment must be the text that follows.
#
#     before     [ m m m m m m ]              M = 6 states of the past
#     segment                   [ h h h h ]   T = 4 new inputs of this layer
#     after              [ m m h h h h ]      the last M of both
#
# No parameter's shape depends on M, and there is an r for every distance, so a model can be evaluated with a longer memory than
# it was trained with. Evaluating a text is one pass over it: every token is computed once and yet sees, once memory is full,
# at least the M tokens before it. A window slid by one token computes M + 1 tokens for each.
#
# There are N memories. (The authors' code keeps N + 1; nothing attends to the last layer's output.)

def update_memory(memory, h, mem_len):
    """The last mem_len of [memory o h]: [B, M, D], [B, T, D] -> [B, min(M + T, mem_len), D], a new array.

    >>> memory, segment = numpy.array([[[1], [2], [3]]]), numpy.array([[[4], [5]]])
    >>> update_memory(memory, segment, mem_len=3)[0, :, 0].tolist()
    [3, 4, 5]
    """
    M, T = memory.shape[1], h.shape[1]
    new = min(T, mem_len)
    old = min(M, mem_len - new)
    return xp.concatenate([memory[:, M - old:], h[:, T - new:]], axis=1)


# %% 7. The model
class TransformerXL:
    """The language model: `logits, memory = model(tokens, memory)`. dtype: float32 for speed, float64 for gradient checks.

    Dropout acts when, and only when, a call is given a generator; there is no training mode to forget.
    """

    def __init__(self, config, seed=0, dtype=numpy.float32):
        rng = numpy.random.default_rng(seed)
        V, D = config.vocab_size, config.d_model
        self.config, self.dtype = config, numpy.dtype(dtype)
        self.embedding = weight(rng, (V, D), dtype, scale=math.sqrt(3 * V / D))     # rows of length about 1
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

        # Rows of length about 1, times sqrt(D): numbers of size about 1. (The authors' dropout acts on R as well.)
        h = embedding(self.embedding, tokens) * math.sqrt(config.d_model)          # [B, T, D]
        h = dropout(h, config.dropout, generator)
        new_memory = []
        for layer, m in zip(self.layers, memory):
            new_memory.append(update_memory(m, stop_gradient(h).data, mem_len))    # SG(h), without history
            h = layer(h, m, positions, mask, generator)
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


# %% 8. The loss, and what is attended to
# The model's loss is the mean cross-entropy of the next token, in nats: -log of the probability it gave to what came.
# ln 2 nats are one bit, so bits per character = nats / ln 2; perplexity = exp(nats), the number of equally likely
# tokens that would be as hard to guess from.

def loss_and_memory(model, tokens, targets, memory=None, generator=None):
    """(mean cross-entropy in nats: a scalar Tensor, the new memory). tokens, targets [B, T]."""
    logits, memory = model(tokens, memory, generator)
    return cross_entropy(logits, targets), memory


def attention_by_distance(model, tokens, memory):
    """How far back each layer looks: mean attention weights [n_layer, K], element n for the key n tokens back.

    The mean is over heads, sequences and those queries of `tokens` [B, T] that have so many before them; `memory` as in a call
    of model.
    (With same_length a query sees the max(M, T) keys before it here: for what the model sees, give mem_len >= T states.)
    """
    T = tokens.shape[1]
    M, config, rows = memory[0].shape[1], model.config, []
    with no_grad():
        _, inputs = model(tokens, memory, mem_len=max(M, T))    # the end of each layer's new memory is its input
        positions = relative_positions(config, T, M, model.dtype)
        mask = hidden_keys(T, M, max(M, T) if config.same_length else None)
        distance = key_distances(T, M)
        for layer, m, h in zip(model.layers, memory, inputs):
            q, kv = layer.attention.project(h[:, h.shape[1] - T:], m, layer.attention_norm if config.pre_norm else None)
            weights = layer.attention.weights(q, kv, positions, mask).data.mean(axis=(0, 1))       # [T, K]
            rows.append([weights[distance == n].mean().item() for n in range(M + T)])
    return numpy.array(rows)


# %% 9. Adam
class Adam:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019) and clipping.

    m and v (neither the m of memory nor attention's v) are running means of the gradient and of its square; m / sqrt(v) is near 1
    or -1 for a parameter whose gradient stays the same and near 0 where its sign keeps changing, whatever the gradient's
    size, so a step is seldom more than lr. Both means start at 0 and so are too small at first: the weights of the gradients
    in them sum to 1 - beta^t after t steps, not to 1. Dividing by that sum (the bias correction) makes them true averages
    from the first step on.

        g = gradient * min(1, clip / |gradient|)       |.| the global norm, over all parameters together
        m = beta1 m + (1 - beta1) g                    v = beta2 v + (1 - beta2) g^2
        w = w - lr [ m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w ]

    Weight decay draws the matrices W_… (nothing else) towards 0. It stands outside the means: as part of g it would be divided
    by sqrt(v) and fade where gradients are large.

        a = a + max(1 / average_over, 10 / (9 + t)) (w - a)        (after w)

    At a high learning rate the weights jitter around the path they follow. a is their running mean: the newest w counts 1/n
    with n = (9 + t) / 10, at most average_over, which gives two thirds of the weight to the last n steps or so. (At t = 1
    a becomes w, so nothing of the zeros it starts from is left.) a predicts about as well as w would after the learning rate
    had been brought down (Polyak and Juditsky 1992). Training does not use it; evaluation does, `with adam.averaged():`.
    average_over=None: a is w.

    The parameters are moved into one flat array, of which each `.data` becomes a view, so that a step is a dozen
    operations on long arrays instead of a dozen for each parameter.

    parts   processes among which a batch is divided. Each `collect`s the gradients of its rows of the batch
            into its row of `gradient`. In `step` the rows are added up and the numbers updated, each process doing an equal
            share of the parameters
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=None, average_over=None,
                 parts=1):
        self.parameters, self.lr, self.betas, self.eps, self.clip = list(parameters.values()), lr, betas, eps, clip
        self.weight_decay, self.average_over, self.t = weight_decay, average_over, 0
        n, dtype = sum(p.size for p in self.parameters), self.parameters[0].dtype
        self.value, self.m, self.v = (shared_zeros((n,), dtype) for _ in range(3))
        self.average = shared_zeros((n,), dtype) if average_over else self.value
        self.gradient = shared_zeros((parts, n), dtype)
        self.decayed = xp.concatenate([xp.full(p.size, name.split(".")[-1].startswith("W"), dtype=dtype)
                                       for name, p in parameters.items()])
        self.places, end = {}, 0
        for p in self.parameters:
            start, end = end, end + p.size
            self.places[p] = slice(start, end)
            self.value[start:end] = p.data.reshape(-1)
            p.data = self.value[start:end].reshape(p.shape)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def collect(self, part, leaves):
        """Make [(parameter, its gradient), …] the gradients of one part of the batch; the others are zero."""
        if len(leaves) < len(self.places):
            self.gradient[part] = 0
        for p, g in leaves:
            self.gradient[part, self.places[p]] = g.reshape(-1)

    def step(self, lr=None, everywhere=None):
        """Update the parameters; returns the gradient's norm before clipping, a 0-d array.

        The gradients are those of the parameters' `.grad`; or, with `everywhere`, those that were `collect`ed.
        everywhere(function, …) calls function(part, …) for every part and returns the list of results.
        """
        if everywhere is None:
            self.collect(0, [(p, p.grad) for p in self.parameters if p.grad is not None])

            def everywhere(function, *arguments):
                return [function(part, *arguments) for part in range(len(self.gradient))]
        self.t += 1
        norm = xp.sqrt(xp.asarray(sum(everywhere(self.add_up))))
        factor = 1.0 if self.clip is None else xp.minimum(1.0, self.clip / (norm + 1e-12)).astype(norm.dtype)
        everywhere(self.update, self.t, self.lr if lr is None else lr, factor)
        return norm

    def blocks(self, part):
        """Slices that make up one part's share of the parameters; on the CPU short, so that a block stays in the cache
        from one operation to the next (with 5 million parameters a step takes 0.7 of the time)."""
        n, parts = self.value.size, len(self.gradient)
        start, end = n * part // parts, n * (part + 1) // parts
        length = 1 << 16 if xp.module is numpy else n
        return [slice(at, min(at + length, end)) for at in range(start, end, length)]

    def add_up(self, part):
        """Of one part's share: add the gradients of all parts into row 0 and return the sum of their squares."""
        squares = 0.0
        for block in self.blocks(part):
            g = self.gradient[0, block]
            for other in self.gradient[1:]:
                g += other[block]
            squares = squares + g @ g
        return squares

    def update(self, part, t, lr, factor):
        """Of one part's share: step t of the formulas above."""
        beta1, beta2 = self.betas
        share_a = max(1 / self.average_over, 10 / (9 + t)) if self.average_over else 0.0
        for block in self.blocks(part):
            views = (array[block] for array in (self.decayed, self.gradient[0], self.m, self.v, self.value, self.average))
            adam_update(factor, 1 - beta1, 1 - beta2, share_a, 1 - beta2 ** t, self.eps, lr / (1 - beta1 ** t),
                        lr * self.weight_decay, *views)

    @contextlib.contextmanager
    def averaged(self):
        """Inside `with adam.averaged():` the parameters are their averages (zeros before the first step)."""
        current = self.value.copy()
        self.value[...] = self.average
        try:
            yield
        finally:
            self.value[...] = current


@fused
def adam_update(factor, share_m, share_v, share_a, v_sum, eps, rate, decay, decayed, g, m, v, w, a):
    """The formulas of Adam's docstring, in place; the call in `update` says what the arguments are."""
    g *= factor
    m += share_m * (g - m)
    v += share_v * (g * g - v)
    step = m / (xp.sqrt(v / v_sum) + eps) * rate
    if decay:
        step += decay * decayed * w
    w -= step
    if share_a:
        a += share_a * (w - a)


def warmup_cosine(step, steps, peak, warmup, final):
    """Learning rate of step 0, 1, …: a line up to `peak` over `warmup` steps, then half a cosine down to `final`.

    The warm-up is for v, which the first few gradients estimate badly; the later fall lets the weights settle.

    >>> [round(warmup_cosine(step, 8, peak=1.0, warmup=2, final=0.1), 3) for step in range(9)]
    [0.5, 1.0, 1.0, 0.94, 0.775, 0.55, 0.325, 0.16, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


# %% 10. Generation
# A new token is a segment of one: T = 1, and it attends to the memory and itself. A state in memory is a constant, and so
# are its key and its value while the weights stay as they are. (A key holds no position, r does, so it stays right
# while the text moves on.) Key and value are kept instead of the state; r = R W_r and the term v · r, which depend on the
# distance alone, are computed once. What is left for each token and layer is a handful of products of a vector with a
# matrix, however long the text. Up to rounding the logits are the model's own.

class CachedLayer:
    """`layer` for one token at a time: h [D] -> [D]. It keeps keys and values of mem_len tokens, at first `memory` [1, M, D]."""

    def __init__(self, layer, memory, mem_len):
        config, attention, dtype = layer.config, layer.attention, memory.dtype
        H, d = attention.u.shape
        self.layer, self.mem_len = layer, mem_len
        self.W_qkv = xp.concatenate([attention.W_q.data, attention.W_kv.data], axis=1)
        with no_grad():
            terms = attention.distance_terms(relative_positions(config, 1, mem_len, dtype))    # of distances mem_len … 0
            self.r, self.term_d = (term.data for term in terms)                    # [H, d, mem_len + 1], [H, 1, mem_len + 1]
            h = layer.attention_norm(Tensor(memory[0])).data if config.pre_norm else memory[0]
        # Room for twice the memory and one: when it is full, the latter half moves to the front.
        self.cache, self.end = xp.zeros((2, H, 2 * mem_len + 1, d), dtype=dtype), len(h)
        self.cache[:, :, :self.end] = (h @ attention.W_kv.data).reshape(self.end, 2, H, d).transpose(1, 2, 0, 3)
        self.keys, self.values = self.cache

    def __call__(self, h):
        layer = self.layer
        for f, norm in ((self.attention, layer.attention_norm), (self.feed_forward, layer.feed_forward_norm)):
            h = h + f(normed(h, norm)) if layer.config.pre_norm else normed(h + f(h), norm)
        return h

    def attention(self, h):
        attention, M = self.layer.attention, self.mem_len
        H, d = attention.u.shape
        if self.end == 2 * M + 1:
            self.cache[:, :, :M], self.end = self.cache[:, :, M + 1:], M
        qkv = (h @ self.W_qkv).reshape(3, H, d)
        self.cache[:, :, self.end] = qkv[1:]
        self.end += 1
        K = min(M + 1, self.end)
        seen = slice(self.end - K, self.end)
        q = qkv[0][:, None]                                                                   # [H, 1, d]
        scores = (q + attention.u.data[:, None]) @ self.keys[:, seen].swapaxes(1, 2)          # (a) + (c)   [H, 1, K]
        scores += q @ self.r[:, :, M + 1 - K:]                                                # (b)
        scores += self.term_d[:, :, M + 1 - K:]                                               # (d)
        weights = xp.exp((scores - scores.max(axis=-1, keepdims=True)) * (1 / math.sqrt(d)))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ self.values[:, seen]).reshape(H * d) @ attention.W_o.data

    def feed_forward(self, h):
        part = self.layer.feed_forward
        hidden = xp.maximum(h @ part.W_1.data + part.b_1.data, 0)
        if self.layer.config.activation == "squared_relu":
            hidden *= hidden
        return hidden @ part.W_2.data + part.b_2.data


def normed(h, norm, eps=1e-5):
    """`norm`, a LayerNorm, of one row [D], without a graph."""
    z = h - h.sum() / len(h)
    z /= xp.sqrt(z @ z / len(h) + eps)
    return z * norm.gain.data + norm.bias.data


class Decoder:
    """A model that reads token by token: `logits = decoder(token)`, [V], as those of `model`, fed one token at a time.

    It begins with what `model` has read before (`memory`, n_layer arrays [1, M, D], M at most mem_len). The weights must stay as
    they are meanwhile; it takes the same space however much it reads.
    """

    def __init__(self, model, memory, mem_len):
        self.model, config = model, model.config
        self.layers = [CachedLayer(layer, m, mem_len) for layer, m in zip(model.layers, memory)]
        self.W_out = model.embedding.data.T if config.tie_weights else model.W_out.data

    def __call__(self, token):
        model = self.model
        h = model.embedding.data[token] * math.sqrt(model.config.d_model)
        for layer in self.layers:
            h = layer(h)
        return (normed(h, model.norm) if model.config.pre_norm else h) @ self.W_out + model.b_out.data


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
    mem_len = min(mem_len, prompt.size + length)            # there will never be more to remember
    memory = None                       # the prompt in segments as long as memory: little space, few steps
    for segment in numpy.split(prompt, range(max(1, mem_len), prompt.size, max(1, mem_len))):
        with no_grad():
            logits, memory = model(xp.asarray(segment[None]), memory, mem_len=mem_len)
    decoder, logits = Decoder(model, memory, mem_len), logits.data[0, -1]
    for n in range(length):
        token = sample(to_numpy(logits), temperature, top_k, top_p, rng)
        yield token
        if n < length - 1:
            logits = decoder(token)


def sample(logits, temperature, top_k, top_p, rng):
    """One token from logits [V] (a NumPy array), see `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    order = numpy.argsort(-logits, kind="stable")[:top_k]           # likeliest first
    logits = logits[order].astype(numpy.float64)
    p = numpy.exp((logits - logits.max()) / temperature).cumsum()   # cumulative, up to a factor
    if top_p is not None:
        p = p[:numpy.searchsorted(p, top_p * p[-1]) + 1]
    return int(order[numpy.searchsorted(p[:-1], rng.random() * p[-1], side="right")])


# %% 11. A walk through it
# `python txl.py` runs this section.

def walk_through():
    print("1. The relative shift. Every row of the scores counts distances; shifted, column j is key j.   T = 3, M = 2")
    scores = Tensor(numpy.tile([4.0, 3.0, 2.0, 1.0, 0.0], (3, 1)))
    for before, after, hidden in zip(scores.numpy(), rel_shift(scores).numpy(), hidden_keys(3, 2)):
        print("  ", *(f"{n:.0f}" for n in before), "  -->  ", *("." if h else f"{n:.0f}" for n, h in zip(after, hidden)))

    print("\n2. One pass over 12 tokens, and three passes over 4 with the memory of those before: the same logits.")
    model = TransformerXL(Config(vocab_size=5, n_layer=2, n_head=2, d_model=16, d_ff=32, mem_len=8), dtype=numpy.float64)
    text = numpy.random.default_rng(0).integers(5, size=(1, 12))
    whole, memory, pieces = model(text)[0].numpy(), None, []
    for at in range(0, 12, 4):
        logits, memory = model(text[:, at:at + 4], memory)
        pieces.append(logits.numpy())
    alone = numpy.concatenate([model(text[:, at:at + 4])[0].numpy() for at in range(0, 12, 4)], axis=1)
    print(f"   largest difference with memory {abs(whole - numpy.concatenate(pieces, axis=1)).max():.0e}, "
          f"without {abs(whole - alone).max():.2f}")

    print("\n3. A tiny model learns four lines by heart, in segments of 16 with a memory of 16.")
    verse = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" \
            "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date;\n"
    letters = sorted(set(verse))
    tokens = numpy.array([letters.index(letter) for letter in verse * 2])
    model = TransformerXL(Config(len(letters), n_layer=2, n_head=2, d_model=32, d_ff=64, mem_len=16), seed=1)
    adam, memory = Adam(model.parameters(), clip=1.0), None
    for step in range(501):
        at = step * 16 % len(verse)
        loss, memory = loss_and_memory(model, tokens[None, at:at + 16], tokens[None, at + 1:at + 17], memory)
        loss.backward()
        adam.step(warmup_cosine(step, 500, 1e-2, 20, 1e-4))
        adam.zero_grad()
        if step % 100 == 0:
            print(f"   step {step:3}   loss {loss.item():.3f}")
    line = verse.index("\n") + 1
    told = generate(model, tokens[:line], len(verse) - line - 1, temperature=0)
    print("   told the first line, it goes on:\n       " + "".join(letters[token] for token in told).replace("\n", "\n       "))


if __name__ == "__main__":
    walk_through()
