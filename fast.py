# %% The same model, faster
"""What computes the same as txl.py, in less time. A test compares the two models whole.

    here                      the plain form                               where
    linear                    a @ W + b; concatenate([before, a]) @ W + b  autograd.py
    linear_relu               relu(a @ W + b)                              txl.py, FeedForward
    fold                      layer_norm(x, gain, bias) @ W                txl.py, Layer
    fused_attention           weights and values of attention              txl.py, 4.
    Layer, TransformerXL      the same names                               txl.py, 5. and 6.
    CachedDecoder             TransformerXL.decoder                        txl.py, 6.
    FlatAdam                  Adam                                         txl.py, 8.

The sections: 1. products   2. attention   3. layer and model   4. generation   5. Adam
"""
import math

import numpy

import txl
from autograd import arrays, dropout, joint_edges, layer_norm, no_grad, op, record, reshape
from backend import gpu, leading_sums, on_a_gpu, row_dots, row_sums, shared_zeros, xp
from txl import decays, heads, relative_positions


# %% 1. Products
@op
def linear(a, weight, bias, before=None):
    """a @ weight + bias; with `before` concatenate([before, a], axis=1) @ weight + bias.

    a [..., n], weight [n, m], bias [m]. It saves an array: the bias is added in place.

    before   a constant [B, M, n], whose rows come before those of a [B, T, n]: the memory of
             Transformer-XL. They count in the gradients of weight and bias. It saves the
             product that would be the gradient of `before`
    """
    x, w, b = arrays(a, weight, bias)
    shape, M = x.shape, 0
    if before is not None:
        M = before.shape[1]
        x = xp.concatenate(arrays(before, x), axis=1)
    rows, m = math.prod(x.shape[:-1]), w.shape[1]
    flat = x.reshape(rows, x.shape[-1])
    y = flat @ w
    y += b

    def vjp_of_a(g):
        g = g[:, M:] if M else g
        return (g.reshape(math.prod(shape[:-1]), m) @ w.T).reshape(shape)
    return record(y.reshape(x.shape[:-1] + (m,)), (a, vjp_of_a),
                  (weight, lambda g: flat.T @ g.reshape(rows, m)), (bias, lambda g: g))


@op
def linear_relu(a, weight, bias, activation="relu"):
    """relu(a @ weight + bias), or squared_relu(…). It saves three arrays of the result's size."""
    x, w, b = arrays(a, weight, bias)
    rows, shape = math.prod(x.shape[:-1]), x.shape
    flat = x.reshape(rows, shape[-1])
    t, y = relu_forward(flat @ w, b, activation)

    def vjp(g):
        h = relu_backward(g.reshape(t.shape), t, activation)
        return (h @ w.T).reshape(shape), flat.T @ h, h
    return record(y.reshape(shape[:-1] + w.shape[1:]), *joint_edges(vjp, a, weight, bias))


def relu_forward(x, bias, activation):
    """t = relu(x + bias), and that or its square. x may be overwritten."""
    if on_a_gpu():
        formula = gpu.relu_of_sum if activation == "relu" else gpu.squared_relu_of_sum
        answer = formula(x, bias, x.dtype.type(0))
        return (answer, answer) if activation == "relu" else answer
    x += bias
    t = xp.maximum(x, 0, out=x)
    return t, t if activation == "relu" else t * t


def relu_backward(g, t, activation):
    """g times the derivative of the activation, where t is relu(x + bias)."""
    if on_a_gpu():
        return (gpu.relu_gradient if activation == "relu" else gpu.squared_relu_gradient)(g, t)
    return g * (t > 0) if activation == "relu" else 2 * g * t


def fold(norm, weight):
    """(W', b') with z @ W' + b' = (z * gain + bias) @ weight, for a LayerNorm's gain and bias.

        W' = diag(gain) weight          b' = bias weight

    Gain and bias are the same for all rows. So the matrix that multiplies next can absorb
    them. It saves two passes over the rows, and two in the gradient.
    """
    return reshape(norm.gain, (-1, 1)) * weight, norm.bias @ weight


def product(a, b, out=None, add=False):
    """a @ b for [H, B, n, k] and [H, B, k, m], views or not: into `out`, or added to it."""
    if on_a_gpu():
        return gpu.product(a, b, out, add)
    if not add:
        return xp.matmul(a, b, out=out)
    ab, target = a @ b, out
    if out.strides[-2] < out.strides[-1]:       # along consecutive numbers: three times as fast
        ab, target = ab.swapaxes(-1, -2), out.swapaxes(-1, -2)
    target += ab
    return out


def scaled_sum(x, w, scale):
    if on_a_gpu():
        return gpu.scaled_sum(x, w, scale)
    return (x + w) * scale


# %% 2. Attention
# All from queries to mixed values is one operation, with its gradient written by hand. Of
# all arrays [T, K] it keeps only E, and it works on a block of scores while that is in the
# processor's cache.
#
# Softmax divides a row by its sum z. That division can wait until the values are mixed,
# where it costs d divisions a query instead of K. For one query, with E[j] = exp(score[j] -
# the largest score):
#
#     o = sum_j (E[j] / z) values[j] = (sum_j E[j] values[j]) / z
#
# The gradient, from g = dL/do. Write d_x for dL/dx, and y[j] = E[j] / z for the weights:
#
#     d_values[j] = y[j] g                                summed over the queries
#     d_y[j]      = g · values[j]
#     d_score[j]  = y[j] (d_y[j] - sum_k y[k] d_y[k])     the softmax
#                 = E[j] (g/z · values[j] - g/z · o)      because sum_k y[k] d_y[k] = g · o
#
# The largest score cancels in E[j] / z, so it has no gradient. For all queries at once, as
# matrices, with q_u = (q + u) / sqrt(d) and q_v = (q + v) / sqrt(d), the score is
#
#     score = q_u k^T + shift(by_distance)                by_distance = q_v r^T
#
# and with d_by_distance, which is d_score shifted back:
#
#     d_values = E^T (g / z)              d_score = E (g/z values^T - g/z · o)
#     d_k = d_score^T q_u                 d_q_u = d_score k
#     d_r = d_by_distance^T q_v           d_q_v = d_by_distance r
#     d_q = (d_q_u + d_q_v) / sqrt(d)
#     d_u = d_q_u / sqrt(d), summed over all queries; d_v likewise with d_q_v
#
# A block has some heads, some rows of the batch and some queries. It needs only the keys
# that its last query sees. They begin at the first key, so the block's scores are the first
# columns. The last query's distances to them end, like all distances, with 0: they are the
# last rows of r. So a block is attention with a smaller K. Blocks share keys and distances,
# so their gradients add up. The gradient takes the blocks in reverse: the last queries see
# all keys and write every place, earlier ones add to a part.

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


def shifted_rows(x, width):
    """rel_shift's first columns, [..., T, K] -> [..., T, width], without a copy if x allows.

    In the line of section 3 of txl.py, row i begins at T-1 + i (K-1).
    """
    *batch, T, K = x.shape
    line = x.reshape(*batch, T * K)
    step = line.strides[-1]
    return xp.lib.stride_tricks.as_strided(
        line[..., T - 1:], (*batch, T, width), (*line.strides[:-1], (K - 1) * step, step))


def shift_back(g):
    """The VJP of rel_shift: each number goes to the place in the line that it came from.

    A row's last number and the next row's first came from one place, where gradients add
    (in attention the former is a key in the future, whose gradient is 0). The line's first
    T-1 places were left out and get 0.
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


def softmax_numerators(scores, position, minus_infinity):
    """E of scores + position, in place of the scores, and 0 where minus_infinity is. Returns z."""
    if on_a_gpu() and scores.shape[-1] <= gpu.MOST_KEYS:
        return gpu.softmax_numerators(scores, position, minus_infinity)
    scores += position
    scores += minus_infinity
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    return row_sums(scores)


def score_gradient(E, dots, d_score):
    """E (d_score - dots), in place of d_score. Returns the same shifted back."""
    if on_a_gpu():
        return gpu.score_gradient(E, dots, d_score)
    d_score -= dots
    d_score *= E
    return shift_back(d_score)


@op
def fused_attention(q, kv, r, u, v, mask):
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

    def vjp(g):
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
    return record(o, *joint_edges(vjp, q, kv, r, u, v))


# %% 3. Layer and model
class Projection:
    """An attention's queries, keys and values, made with fewer and smaller products.

    `norm` is the LayerNorm that x and memory still lack, or None.
    """

    def __call__(self, x, memory, positions, mask, generator=None, norm=None):
        q, kv = self.project(x, memory, norm)
        return self.mixed_values(q, kv, positions, mask, generator) @ self.W_o

    def project(self, x, memory, norm=None):
        if norm is None:
            return x @ self.W_q, linear(x, self.W_kv, 0.0, before=memory)
        W_q, b_q = fold(norm, self.W_q)
        W_kv, b_kv = fold(norm, self.W_kv)
        x, memory = layer_norm(x), layer_norm(memory)               # without gain and bias
        return linear(x, W_q, b_q), linear(x, W_kv, b_kv, before=memory.data)


class FusedAttention(Projection, txl.RelativeMultiHeadAttention):
    """With attention dropout, where it acts, the weights are computed step by step."""

    def mixed_values(self, q, kv, positions, mask, generator):
        if generator is not None and self.config.attn_dropout:
            return super().mixed_values(q, kv, positions, mask, generator)
        return fused_attention(q, kv, positions @ self.W_r, self.u, self.v, mask)


class LearnedPositions(Projection, txl.LearnedPositions):
    pass


class FeedForward(txl.FeedForward):
    def __call__(self, x, generator=None):
        hidden = linear_relu(x, self.W_1, self.b_1, self.config.activation)
        return linear(dropout(hidden, self.config.dropout, generator), self.W_2, self.b_2)


class Layer(txl.Layer):
    Attention = {"sinusoid": FusedAttention, "learned": LearnedPositions}
    FeedForward = FeedForward

    def attention_after_norm(self, x, memory, positions, mask, generator):
        return self.attention(x, memory, positions, mask, generator, self.attention_norm)


class TransformerXL(txl.TransformerXL):
    """The same parameters under the same names, so the same checkpoints."""

    Layer = Layer

    def embed(self, tokens):
        """Of a small vocabulary, as a product P @ embedding: a row of P has a 1 at its token.

        So the gradient is P^T g, a product several times as fast as the sums of `embedding`.
        """
        V = self.config.vocab_size
        if V > 512:
            return super().embed(tokens)
        return xp.eye(V, dtype=self.dtype)[tokens] @ self.embedding

    def decoder(self, memory, mem_len):
        return CachedDecoder(self, memory, mem_len)


# %% 4. Generation
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
            x = layer.attention_norm(memory[0]).data if config.pre_norm else memory[0]
        # Room for 2 mem_len + 1 tokens. When it is full, the last mem_len move to the front.
        self.cache, self.end = xp.zeros((2, H, 2 * mem_len + 1, d), dtype=dtype), len(x)
        kv = (x @ attention.W_kv.data).reshape(self.end, 2, H, d)
        self.cache[:, :, :self.end] = kv.transpose(1, 2, 0, 3)
        self.keys, self.values = self.cache

    def __call__(self, x):
        layer = self.layer
        for f, norm in ((self.attention, layer.attention_norm),
                        (self.feed_forward, layer.feed_forward_norm)):
            if layer.config.pre_norm:
                x = x + f(layer_norm_of_one(x, norm))
            else:
                x = layer_norm_of_one(x + f(x), norm)
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


def layer_norm_of_one(x, norm, eps=1e-5):
    """`norm`, a LayerNorm, of one row [D], without a graph."""
    z = x - x.sum() / len(x)
    z /= xp.sqrt(z @ z / len(x) + eps)
    return z * norm.gain.data + norm.bias.data


class CachedDecoder:
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
        x = layer_norm_of_one(x, model.norm) if model.config.pre_norm else x
        return x @ self.W_out + model.b_out.data


# %% 5. Adam
class FlatAdam(txl.Adam):
    """Adam on flat arrays: a dozen operations on long arrays instead of a dozen a parameter.

    All parameters are moved into one array, flat["value"], of which each `.data` becomes a
    view. So are first, second and average. All processes see these arrays.

    parts   processes among which a batch is divided. Each `collect`s the gradients of its rows.
            `step` adds them up and updates the parameters, each process an equal share

    Every parameter must get a gradient from every part. Adam leaves one without alone.
    """

    def __init__(self, parameters, *arguments, parts=1, **options):
        super().__init__(parameters, *arguments, **options)
        tensors = list(self.parameters.values())
        (dtype,), sizes = {w.dtype for w in tensors}, [w.size for w in tensors]
        self.flat = {kind: shared_zeros((sum(sizes),), dtype)
                     for kind in ("value", "first", "second", "average")}
        self.gradient = shared_zeros((parts, sum(sizes)), dtype)
        self.decayed = xp.concatenate([xp.full(w.size, decays(name), dtype=dtype)
                                       for name, w in self.parameters.items()])
        ends = numpy.cumsum(sizes).tolist()
        parts = [xp.split(array, ends[:-1]) for array in self.flat.values()]
        for name, w, *four in zip(self.parameters, tensors, *parts):
            value, first, second, average = (part.reshape(w.shape) for part in four)
            value[...] = average[...] = w.data
            w.data, self.first[name], self.second[name] = value, first, second
            self.average[name] = average
        self.views = [w.data for w in tensors]

    def collect(self, part, leaves):
        """Store one part's gradients, [(parameter, gradient), …]."""
        gradients = dict(leaves)
        for name, w in self.parameters.items():
            if w not in gradients:
                raise ValueError(f"FlatAdam: {name} has no gradient; Adam takes such parameters")
        xp.concatenate([gradients[w].reshape(-1) for w in self.parameters.values()],
                       out=self.gradient[part])

    def step(self, lr=None, everywhere=None):
        """Adam's step. With `everywhere` the gradients have been collected already.

        everywhere(function, …) returns [function(part, …) for every part]. Without it this
        process does all parts, with the parameters' `.grad`.
        """
        for (name, w), view in zip(self.parameters.items(), self.views):
            if w.data is not view:
                raise ValueError(f"FlatAdam: {name} was given another array, which would not be "
                                 "trained: assign its numbers, .data[...] = …")
        if everywhere is None:
            self.collect(0, [(w, w.grad) for w in self.parameters.values() if w.grad is not None])

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
            self.update(lr, w, g, self.decayed[block], *means)

    def update(self, lr, w, g, decayed, first, second, average):
        if on_a_gpu():
            return gpu.adam_update(self, lr, w, g, decayed, first, second, average)
        return super().update(lr, w, g, decayed, first, second, average)
