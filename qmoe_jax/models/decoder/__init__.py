"""What decoder-only mixtures of experts share: layers, routing, stack, cache, generation, the streamed pass, the task.

A family of these is a folder of its own beside this one, which tells

    config.py     the architecture: fields, how config.json tells them, published sizes
    model.py      one decoder layer: which attention and which router it has
    __init__.py   FAMILY, a `family.DecoderFamily`, with its table of names

All are pre-norm with RMSNorm and rotary positions, as in Hugging Face's modules, whose names parameters keep:

    tokens -> embed_tokens -> layers -> norm -> lm_head
    layer:  x + self_attn(input_layernorm(x)),  then  x + mlp(post_attention_layernorm(x))
    mlp:    a gated MLP, or experts with their router, and possibly a shared expert beside them
"""
