"""The KVzip+ target that KVzap trains on (arXiv 2601.07891, section 3), on a text that stands twice in a sequence.

    s+[h, i] = max over g, j of  attention[g, j, i] * |W_O^(g) v_i| / |hidden_j|

i: tokens of the first copy, j: of the second, softmax over the whole sequence, hidden: output of input_layernorm,
g: query heads of kv head h, W_O^(g): the D columns of o_proj that read query head g. Taken in f64 from the model's f32
queries, keys, values and hidden states, and held against the model's own attention. Tensors of target.safetensors:
  ids         i64 [T]           5 ids, the text (40), 7 ids, the text again, 3 ids
  original, repeat  i64 [2]     begin and end of the two copies
  log_target  f32 [L, H, 40]    log s+ by the whole model
  layer 1 alone, f32: hidden [1, T, d], queries [1, Hq, T, D] and keys [1, H, T, D] rotated, values [1, H, T, D],
                      o_proj [d, Hq * D]
"""

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def target(model, ids):
    """Returns the tensors of target.safetensors."""
    dim, hidden_size = model.config.head_dim, model.config.hidden_size
    heads = model.config.num_key_value_heads
    text = ids[:40]
    ids = torch.cat([ids[100:105], text, ids[105:112], text, ids[112:115]])
    original, repeat = slice(5, 45), slice(52, 92)
    calls = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for layer in model.model.layers
    ]
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("eager")
    attentions = model(ids[None], past_key_values=cache, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()

    targets, tensors = [], {}
    for index, (layer, call, attention) in enumerate(zip(model.model.layers, calls, attentions)):
        hidden, o_proj = call["hidden_states"], layer.self_attn.o_proj.weight
        queries = layer.self_attn.q_proj(hidden).view(1, len(ids), -1, dim).transpose(1, 2)
        queries = apply_rotary_pos_emb(queries, queries, *call["position_embeddings"])[0]
        keys, values = cache.layers[index].keys, cache.layers[index].values
        if index == 1:
            tensors = {"hidden": hidden, "queries": queries, "keys": keys, "values": values, "o_proj": o_proj}

        q, k, v = queries[0].double(), keys[0].double(), values[0].double()
        score = torch.einsum("hgid,hjd->hgij", q.view(heads, -1, len(ids), dim), k) / dim**0.5
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        weight = score.masked_fill(~causal, -torch.inf).softmax(dim=-1)
        assert (weight.flatten(0, 1) - attention[0]).abs().max() < 1e-5
        wide = torch.einsum("dhge,hie->hgid", o_proj.double().view(hidden_size, heads, -1, dim), v).norm(dim=-1)
        weight = weight * wide[:, :, None] / hidden[0].double().norm(dim=-1)[None, None, :, None]
        targets.append(weight[:, :, repeat, original].amax(dim=(1, 2)).log())
    tensors["log_target"] = torch.stack(targets).float()
    tensors |= {"ids": ids, "original": torch.tensor([5, 45]), "repeat": torch.tensor([52, 92])}
    return {key: value.detach().contiguous() for key, value in tensors.items()}
