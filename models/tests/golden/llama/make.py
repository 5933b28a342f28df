"""Tiny random Llamas in the Hugging Face layout, and what transformers computes with them.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, safetensors 0.8.0. Run `python make.py` anywhere: it writes
beside itself, seeded, f32, one thread, in seconds. Another CPU may move a logit by a few ulp.

Each folder holds a model as `save_pretrained` writes it (config.json, one safetensors file or shards with their index)
and expected.safetensors:
  ids            i64 [T]         the prompt, T = 40
  logits         f32 [T, vocab]  of every prompt position, no cache
  decode_ids     i64 [8]         the greedy continuation; decode_ids[0] follows the prompt
  decode_logits  f32 [8, vocab]  row i after decode_ids[i] was fed at position T + i, with a cache
  inv_freq       f32 [D/2]       the rotary frequencies after scaling
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
T, STEPS = 40, 8

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# With 8 pairs and theta 500 the pairs 0, 1-2 and 3-7 fall into the three branches of the rule, and T is past `original`.
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name: kv heads, group, head dim, hidden, rope, further config
CASES = {
    "gqa1": (2, 1, 16, 32, PLAIN, {}),
    "gqa2_llama31": (2, 2, 16, 32, LLAMA31, {}),  # head dim 16 is not 32 / 4
    "gqa3_tied": (3, 3, 8, 36, PLAIN, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "gqa4_biases": (1, 4, 16, 48, LLAMA31, {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    "gqa8_sharded": (2, 8, 8, 32, LLAMA31, {"num_hidden_layers": 2}),
}


def build(name, seed):
    kv_heads, group, head_dim, hidden, rope, extra = CASES[name]
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": hidden,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 256,
            "rope_parameters": dict(rope),
            **extra,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.normal_(1.0, 0.1)
            else:  # N(0, 0.15) at hidden 64: transformers' own start makes attention nearly uniform, which hides faults
                weight.normal_(0.0, 1.2 / hidden**0.5)
    return model


def expected(model, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (T,), generator=generator)
    logits = model(ids[None], use_cache=False).logits[0]
    cache = DynamicCache(config=model.config)
    last = model(ids[None], past_key_values=cache).logits[0, -1]
    decode_ids, decode_logits = [], []
    for _ in range(STEPS):
        top = last.topk(2)
        assert top.values[0] - top.values[1] > 1e-2, "a tie: greedy would depend on rounding, change the seed"
        decode_ids.append(top.indices[0])
        last = model(top.indices[:1][None], past_key_values=cache).logits[0, -1]
        decode_logits.append(last)
    return {
        "ids": ids,
        "logits": logits.contiguous(),
        "decode_ids": torch.stack(decode_ids),
        "decode_logits": torch.stack(decode_logits),
        "inv_freq": model.model.rotary_emb.inv_freq.clone(),
    }


def old_spelling(folder):
    """Rewrites config.json as the published Llama 3.1 folders have it: `rope_scaling`, top-level `rope_theta`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    for seed, name in enumerate(CASES, start=1):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(name, seed)
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if "sharded" in name else {}))
        if "sharded" in name:
            old_spelling(folder)
        golden = expected(model, seed)

        again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(again(golden["ids"][None]).logits[0], model(golden["ids"][None]).logits[0])
        if model.config.rope_parameters["rope_type"] == "llama3":
            unscaled = {"rope_type": "default", "rope_theta": LLAMA31["rope_theta"]}
            plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_parameters=unscaled)
            gap = (plain(golden["ids"][None]).logits[0] - golden["logits"]).abs().max()
            assert gap > 0.1, f"{name}: the scaling hardly matters ({gap})"
        save_file(golden, folder / "expected.safetensors")
        print(name, sum(f.stat().st_size for f in folder.iterdir()) // 1024, "KB")


if __name__ == "__main__":
    main()
