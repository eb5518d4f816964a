"""The forward pass of a T5X Switch Transformer in float64 NumPy, written for reading: one row, one token at a time.

It shares nothing with the model under test but parameter names and `ModelConfig`. Kernels are [in, out].
"""

import numpy as np

# The distance at which each bucket of relative positions begins.
HALF_BUCKETS = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]  # encoder: 16 to each side
CAUSAL_BUCKETS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]  # decoder


def bucket(query: int, key: int, bidirectional: bool) -> int:
    begins = np.array(HALF_BUCKETS if bidirectional else CAUSAL_BUCKETS)
    distance = abs(query - key) if bidirectional else max(query - key, 0)
    return int(np.sum(begins <= distance)) - 1 + (16 if bidirectional and key > query else 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, params):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params["scale"]


def mlp(x, kernels):
    """relu(x wi) wo, or gelu(x wi_0) * (x wi_1) wo."""
    k = {name: kernels[name]["kernel"] for name in kernels}
    if "wi" in k:
        return np.maximum(x @ k["wi"], 0) @ k["wo"]
    u = x @ k["wi_0"]
    gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    return gelu * (x @ k["wi_1"]) @ k["wo"]


def attention(x, memory, visible, params, config, rel_embedding=None, bidirectional=False):
    """One row: x [queries, d], memory [keys, d], visible bool [queries, keys]; rel_embedding [heads, buckets]."""
    query, key, value = (
        (y @ params[name]["kernel"]).reshape(len(y), config.num_heads, config.head_dim)
        for y, name in ((x, "query"), (memory, "key"), (memory, "value"))
    )
    heads = []
    for h in range(config.num_heads):
        scores = query[:, h] @ key[:, h].T
        if rel_embedding is not None:
            for i in range(len(x)):
                for j in range(len(memory)):
                    scores[i, j] += rel_embedding[h, bucket(i, j, bidirectional)]
        # In float32 the mask's -1e10 absorbs all else: a query that sees nothing attends uniformly.
        scores = np.where(visible, scores, -1e10)
        heads.append(softmax(scores) @ value[:, h])
    return np.concatenate(heads, -1) @ params["out"]["kernel"]


def slots(choices, probabilities, groups, capacity, experts, prioritized):
    """Which choices find a slot: choices [tokens, k], first-choice probabilities [tokens] -> bool [tokens, k]."""
    tokens, top_k = choices.shape
    kept = np.zeros(choices.shape, bool)
    size = tokens // groups
    for group in range(groups):
        members = list(range(group * size, (group + 1) * size))
        if prioritized:
            members.sort(key=lambda t: -probabilities[t])
        used = np.zeros(experts, int)
        for choice in range(top_k):
            for token in members:
                expert = choices[token, choice]
                kept[token, choice] = used[expert] < capacity
                used[expert] += 1
    return kept


def groups_and_capacity(tokens, config, factor):
    groups = max(tokens // config.router_group_size, config.num_experts)
    while tokens % groups or groups % config.num_experts:
        groups += 1
    return groups, max(round(factor * (tokens // groups) / config.num_experts), config.min_expert_capacity)


def moe(x, params, config, factor, decoder):
    """x [batch, length, d]; factor None: no token is dropped."""
    batch, length, width = x.shape
    experts_choose = config.experts_choose is not None and not decoder
    if factor is not None or experts_choose:
        extra = range(config.num_experts)
        more_length = next(n for n in extra if batch * (length + n) % config.num_experts == 0)
        more_batch = next(n for n in extra if (batch + n) * length % config.num_experts == 0)
        if more_batch * length < more_length * batch:
            x = np.concatenate([x, np.zeros((more_batch, length, width))])
        else:
            x = np.concatenate([x, np.zeros((batch, more_length, width))], 1)
    flat = x.reshape(-1, width)
    probabilities = softmax(flat @ params["router"]["router_weights"]["w"]["kernel"])
    if experts_choose:
        groups, capacity = groups_and_capacity(len(flat), config, config.experts_choose)
        y, size = np.zeros_like(flat), len(flat) // groups
        for group in range(groups):
            for expert in range(config.num_experts):
                kernels = {name: {"kernel": p["kernel"][expert]} for name, p in params["expert"].items()}
                members = range(group * size, (group + 1) * size)
                for token in sorted(members, key=lambda t: -probabilities[t, expert])[:capacity]:
                    y[token] += probabilities[token, expert] * mlp(flat[token], kernels)
        return y.reshape(x.shape)[:batch, :length]
    choices = np.argsort(-probabilities, -1, kind="stable")[:, : config.top_k]
    kept = np.ones(choices.shape, bool)
    if factor is not None:
        groups, capacity = groups_and_capacity(len(flat), config, factor)
        prioritized = config.top_k > 1 and not decoder
        kept = slots(choices, probabilities.max(-1), groups, capacity, config.num_experts, prioritized)
    y = np.zeros_like(flat)
    for token in range(len(flat)):
        for expert in choices[token][kept[token]]:
            kernels = {name: {"kernel": p["kernel"][expert]} for name, p in params["expert"].items()}
            y[token] += probabilities[token, expert] * mlp(flat[token], kernels)
    return y.reshape(x.shape)[:batch, :length]


def stack(x, name, params, config, mask, self_visible, factor, encoded=None, cross_visible=None):
    """All layers of 'encoder' or 'decoder': x [batch, length, d], mask [batch, length] of the sub-layers' inputs."""
    mask = mask[..., None]
    encoder = name == "encoder"
    first = "attention" if encoder else "self_attention"
    sparse = config.encoder_sparse_layers if encoder else config.decoder_sparse_layers
    for i in range(config.num_encoder_layers if encoder else config.num_decoder_layers):
        p = params[f"layers_{i}"]
        relpos = (p if config.relpos_per_layer else params)["relpos_bias"]["rel_embedding"]
        h = norm(x, p[f"pre_{first}_layer_norm"]) * mask
        rows = zip(h, self_visible, strict=True)
        x = x + np.stack([attention(row, row, see, p[first], config, relpos, encoder) for row, see in rows])
        if not encoder:
            h = norm(x, p["pre_cross_attention_layer_norm"]) * mask
            rows = zip(h, encoded, cross_visible, strict=True)
            q = p["encoder_decoder_attention"]
            x = x + np.stack([attention(row, memory, see, q, config) for row, memory, see in rows])
        h = norm(x, p["pre_mlp_layer_norm"]) * mask
        x = x + (moe(h, p["mlp"], config, factor, not encoder) if i in sparse else mlp(h, p["mlp"]))
    return norm(x, params[f"{name}_norm"]) * mask


def forward(params, config, encoder_tokens, inputs, targets, factor=None):
    """Encoder output and logits, float64. Tokens are int [batch, length], 0 is padding."""
    params = float64(params)
    embedding = params["token_embedder"]["embedding"]
    real = encoder_tokens > 0
    see = real[:, :, None] & real[:, None, :]
    encoded = stack(embedding[encoder_tokens], "encoder", params["encoder"], config, real, see, factor)

    mask = inputs > 0
    mask[:, 0] = True
    mask[:, :-1] |= inputs[:, 1:] > 0
    predicted = targets > 0
    causal = np.tril(np.ones((inputs.shape[1],) * 2, bool))
    see = causal & predicted[:, :, None] & predicted[:, None, :]
    cross = predicted[:, :, None] & real[:, None, :]
    y = stack(embedding[inputs], "decoder", params["decoder"], config, mask, see, factor, encoded, cross)
    if config.tied:
        return encoded, y @ embedding.T / np.sqrt(config.d_model)
    return encoded, y @ params["decoder"]["logits_dense"]["kernel"]


def float64(tree):
    return {k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def cross_entropy(logits, targets):
    """Summed over the targets > 0 of each row: float64 [batch]."""
    log_p = np.log(softmax(np.asarray(logits, np.float64)))
    at_target = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    return -np.sum(at_target * (np.asarray(targets) > 0), -1)
