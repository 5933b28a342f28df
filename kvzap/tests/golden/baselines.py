"""What the other methods of kvpress score and keep, on a tiny random Qwen3.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, safetensors 0.8.0. Run `python baselines.py` here:
it writes baselines.safetensors and gates.safetensors beside itself, seeded, f32, one thread, in seconds.

The model: 3 layers, 4 query heads, 2 kv heads, head dim 16, hidden 64, theta 10000, q and k normed; 160 tokens.

baselines.safetensors
  hidden [3, 1, 160, 64], queries [3, 1, 4, 160, 16] and keys [3, 1, 2, 160, 16] rotated, values [3, 1, 2, 160, 16]
  inverse_frequencies   f32 [8] of the rotation
  {method}.scores       f32 [3, 2, 160]  what the press scores in each layer
  {method}.{ratio}      u8  [3, 2, 160]  1 where it keeps at compression ratio 0.25, 0.5, 0.9: by its own `compress` or
                        masks. adakv is over snapkv's scores; kept by duo: heads 0/1, 1/0, 2/1 stream, 4 sinks, 16 recent
gates.safetensors       Fast KVzip's gates, random: `{layer}.{name}` for each name of a published gate's state dict
"""

from pathlib import Path

import kvpress
import torch
from kvpress.presses.fastkvzip_press import FastKVzipGate
from safetensors.torch import save_file
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

HERE = Path(__file__).resolve().parent
LAYERS, HEADS, GROUP, DIM, HIDDEN, TOKENS = 3, 2, 2, 16, 64, 160
RATIOS = [0.25, 0.5, 0.9]


def model(attention):
    config = Qwen3Config(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, head_dim=DIM,
        num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(8)
    lm = Qwen3ForCausalLM(config)
    for key, weight in lm.named_parameters():
        weight.normal_(1.0, 0.3) if "norm" in key else weight.normal_(0.0, 0.15)
    return lm.eval()


def prefill(lm, ids, press=None):
    """The cache after a pass, and the calls of self-attention."""
    calls, cache = [], DynamicCache(config=lm.config)
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for layer in lm.model.layers
    ]
    if press is None:
        lm(ids, past_key_values=cache)
    else:
        with press(lm):
            lm(input_ids=ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return cache, calls


def kept(lm, ids, press, keys):
    """[L, H, T] u8: which rows of `keys` are still there, by what is left in the cache, or by the masks."""
    for layer in lm.model.layers:
        layer.self_attn.masked_key_indices = None
    cache, _ = prefill(lm, ids, press)
    out = torch.zeros(LAYERS, HEADS, TOKENS, dtype=torch.uint8)
    for layer in range(LAYERS):
        masked = lm.model.layers[layer].self_attn.masked_key_indices
        if masked is not None:
            out[layer] = 1
            out[layer, masked[1], masked[2]] = 0
            continue
        # A prefill reads no pruned cache, so keys are those of the plain pass, up to the rounding of eager attention.
        places = torch.cdist(cache.layers[layer].keys[0], keys[layer, 0]).argmin(-1)  # [H, kept]
        out[layer].scatter_(1, places, 1)
        assert out[layer].sum() == HEADS * cache.layers[layer].keys.shape[2]
    return out


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    lm, eager = model("sdpa"), model("eager")
    ids = torch.randperm(256)[None, :TOKENS]  # no token twice: in layer 0 both would have one norm
    cache, calls = prefill(lm, ids)
    tensors = {"inverse_frequencies": lm.model.rotary_emb.inv_freq.clone()}
    tensors["hidden"] = torch.stack([call["hidden_states"] for call in calls])
    queries = []
    for layer, call in zip(lm.model.layers, calls):
        attention = layer.self_attn
        q = attention.q_norm(attention.q_proj(call["hidden_states"]).view(1, TOKENS, -1, DIM)).transpose(1, 2)
        queries.append(apply_rotary_pos_emb(q, q, *call["position_embeddings"])[0])
    tensors["queries"] = torch.stack(queries)
    keys = tensors["keys"] = torch.stack([layer.keys for layer in cache.layers])
    tensors["values"] = torch.stack([layer.values for layer in cache.layers])

    presses = {
        "knorm": kvpress.KnormPress, "keydiff": kvpress.KeyDiffPress, "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress, "observed": kvpress.ObservedAttentionPress,
        "expected": lambda ratio: kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2),
        "streaming": kvpress.StreamingLLMPress, "pyramid": kvpress.PyramidKVPress,
        "adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    }  # fmt: skip
    for name, press in presses.items():
        network = eager if name == "observed" else lm
        for ratio in RATIOS:
            tensors[f"{name}.{ratio}"] = kept(network, ids, press(ratio), keys)
        if name in ("pyramid", "adakv", "streaming"):
            continue
        seen = []
        one = press(0.5)
        inner = one.score
        one.score = lambda *args: seen.append(inner(*args)) or seen[-1]
        prefill(network, ids, one)
        tensors[f"{name}.scores"] = scores = torch.cat(seen)
        for ratio in RATIOS:
            best = scores.sort(descending=True).values
            kept_here = int(TOKENS * (1 - ratio))
            gap = (best[..., kept_here - 1] - best[..., kept_here]) / best[..., kept_here].abs()
            assert gap.min() > 1e-5 or (name, ratio) == ("snapkv", 0.9), f"{name} at {ratio}: two scores lie {gap.min()} apart, change the seed"

    duo = kvpress.DuoAttentionPress(0.5)
    duo.post_init_from_model = lambda _: None
    duo.sink_size, duo.recent_size = 4, 16
    duo.streaming_mask = torch.tensor([[False, True], [True, False], [False, True]])
    tensors["duo"] = kept(lm, ids, duo, keys)

    gates, state = [], {}
    for layer in range(LAYERS):
        gate = FastKVzipGate(layer, HIDDEN, HEADS, GROUP, torch.float32)
        for name, weight in gate.named_parameters():
            weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 0.3)
        state |= {f"{layer}.{name}": weight.clone() for name, weight in gate.state_dict().items()}
        gates.append(gate)
    tensors["fast.gates"] = torch.cat([gate(hidden) for gate, hidden in zip(gates, tensors["hidden"])])
    fast = kvpress.FastKVzipPress(0.5)
    fast.gates = gates
    for ratio in RATIOS:
        fast.compression_ratio = ratio
        tensors[f"fast.{ratio}"] = kept(lm, ids, fast, keys)
    tensors["fast.scores"] = fast.score_val[:, 0]

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "baselines.safetensors")
    save_file(state, HERE / "gates.safetensors")


if __name__ == "__main__":
    main()
