"""Tiny random Qwen3 and OLMo 2 models in the Hugging Face layout, and what transformers computes with them.

Versions, files and their tensors as in ../llama/make.py, whose functions this uses. Run `python make.py` anywhere: it
writes beside itself, seeded, f32, one thread, in seconds.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from llama.make import expected, old_spelling  # noqa: E402

CLASSES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "olmo2": (Olmo2Config, Olmo2ForCausalLM)}
# With 8 pairs and theta 500 the pairs 0-1, 2-4 and 5-7 are kept, blended and slowed; the 40 tokens are past `original`.
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 4.0, "beta_slow": 1.0}

# name: kv heads, group, head dim, hidden, theta or rope parameters, further config
CASES = {
    "qwen3": (2, 2, 16, 40, 1e6, {}),  # head dim 16 is not 40 / 4
    "qwen3_tied_sharded": (1, 4, 8, 32, 1e4, {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo2": (4, 1, 8, 32, 5e5, {"rms_norm_eps": 1e-6}),
    "olmo2_gqa_yarn_sharded": (2, 2, 16, 64, YARN, {"num_hidden_layers": 1, "max_position_embeddings": 128}),
}


def build(name, seed):
    kv_heads, group, head_dim, hidden, rope, extra = CASES[name]
    config_class, model_class = CLASSES[name.split("_")[0]]
    if not isinstance(rope, dict):
        rope = {"rope_type": "default", "rope_theta": rope}
    config = config_class(
        **{
            "vocab_size": 96,
            "hidden_size": hidden,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 256,
            "rope_parameters": dict(rope),
            "eos_token_id": 2,
            **({"head_dim": head_dim} if "qwen3" in name else {}),
            **extra,
        }
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.normal_(1.0, 0.3)  # wide: a weight on the wrong head or dimension shows
            else:
                weight.normal_(0.0, 1.2 / hidden**0.5)
    return model


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    for seed, name in enumerate(CASES, start=21):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(name, seed)
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if "sharded" in name else {}))
        if name == "olmo2":  # as the published folders have it, `head_dim` absent
            old_spelling(folder)
            config = json.loads((folder / "config.json").read_text())
            assert config["rope_scaling"].pop("rope_type") == "default" and not config["rope_scaling"]
            config["rope_scaling"] = None
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        golden = expected(model, seed)

        again = type(model).from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(again(golden["ids"][None]).logits[0], model(golden["ids"][None]).logits[0])
        if isinstance(CASES[name][4], dict):
            unscaled = {"rope_type": "default", "rope_theta": CASES[name][4]["rope_theta"]}
            plain = type(model).from_pretrained(folder, dtype=torch.float32, rope_parameters=unscaled)
            gap = (plain(golden["ids"][None]).logits[0] - golden["logits"]).abs().max()
            assert gap > 0.1, f"{name}: the scaling hardly matters ({gap})"
            print("scaled frequencies over plain:", (golden["inv_freq"] / plain.model.rotary_emb.inv_freq).tolist())
        save_file(golden, folder / "expected.safetensors")
        print(name, sum(f.stat().st_size for f in folder.iterdir()) // 1024, "KB")


if __name__ == "__main__":
    main()
