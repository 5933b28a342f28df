"""RePo (arXiv 2512.14391) on tiny models, written from the paper: an OLMo 2 checkpoint as published, and overlays for GQA.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, safetensors 0.8.0. Run `python make.py` anywhere, after
../llama/make.py and ../families/make.py: it writes beside itself, seeded, in seconds. The network below is f64 and shares
no code with transformers, which it is held to where positions are plain.

olmo2/  config.json as the published checkpoints have it, weights in one shard, position maps of layers 2 and 3 in another
expected.safetensors, of ids i64 [40] in one pass and then next i64 [8], a token at a time:
  V.logits f32 [40, 64], V.decode f32 [8, 64]   for the variants V of variants.json
  repo.positions f32 [2, 4, 48]                 of layers 2 and 3
  dropped.decode f32 [8, 64]                    after tokens 0..31 with (3 token + 5 head + 7 layer) % 4 == 0 left the cache
variants.json  V: what it changes in config.json (null takes a field away), and how far positions move to the index
NAME.repo.safetensors  an overlay for ../llama/gqa2_llama31 and ../families/qwen3: one position a kv head from layer 1 on; in
  qwen3's a changed norm too. NAME.logits and NAME.decode of ids % 96 and next % 96 in expected.safetensors
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
HIDDEN, HEADS, LAYERS, WIDTH = 32, 4, 4, 4
MAPS = ("gate_map", "content_map", "final_map")


def pe_config(mode, start, ids):
    """Both spellings, as the published configs write them; their code reads the misspelt one."""
    return {
        "dynamic_pe_mode": mode,
        "dynmaic_pe_start_layer": start,
        "dynamic_pe_start_layer": start,
        "dynmaic_pe_layer_ids": ids,
        "dynamic_pe_layer_ids": ids,
        "dynamic_pe_init_pdrop": 1.0,
        "dynamic_pe_dropout_anneal_step": 0,
        "model_type": "",
    }


CONFIG = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 3,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "olmo2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "pad_token_id": 1,
    "pe_config": pe_config("swigluex_multihead", 2, ""),
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": True,
    "vocab_size": 64,
}


def yarn(factor):
    return {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 16}}


VARIANTS = {
    "repo": ({}, 0.0),
    "yarn2": (yarn(2.0), 0.0),
    "yarn4": (yarn(4.0), 0.0),
    "half": ({}, 0.5),
    "plain": ({"pe_config": None}, 0.0),
    "nope": ({"pe_config": pe_config("nope", 2, "")}, 0.0),
    "r2n1": ({"pe_config": pe_config("nope", 0, "2")}, 0.0),
    "n2r1": ({"pe_config": pe_config("nope", 0, "0,1,3")}, 0.0),
}


def norm(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def frequencies(theta, head_dim, scaling):
    """Radians a step of each pair, and what cosines and sines are multiplied by."""
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None or scaling["rope_type"] == "default":
        return plain, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    turns = original * plain / (2 * math.pi)
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / factor * (1 - keep), 1.0
    pair = lambda n: head_dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1).double()
    return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1


class Network:
    def __init__(self, config, weights, plan, towards=0.0):
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.config, self.plan, self.towards = config, plan, towards
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        theta = config.get("rope_theta") or rope["rope_theta"]
        self.inverse, self.scale = frequencies(theta, self.head_dim, rope)
        self.post_norm = "Olmo2" in config["architectures"][0]
        self.rows = [[] for _ in plan]  # rotated keys and values, [kv heads, tokens, head dim]
        self.positions = [[] for _ in plan]
        self.seen = 0

    def rotated(self, x, positions):
        angles = positions[..., None] * self.inverse  # [heads or 1, tokens, pairs]
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, layer, h, hidden_rows):
        name = f"model.layers.{layer}.self_attn."
        get = lambda part: self.weights[f"{name}{part}.weight"]  # noqa: E731
        q, k, v = (h @ get(f"{part}_proj").T for part in "qkv")
        epsilon = self.config["rms_norm_eps"]
        if self.post_norm:
            q, k = norm(q, get("q_norm"), epsilon), norm(k, get("k_norm"), epsilon)
        q, k, v = (x.reshape(len(h), -1, self.head_dim).transpose(0, 1) for x in (q, k, v))
        if not self.post_norm and f"{name}q_norm.weight" in self.weights:
            q, k = norm(q, get("q_norm"), epsilon), norm(k, get("k_norm"), epsilon)
        index = torch.arange(self.seen, self.seen + len(h), dtype=torch.float64)[None]
        positions = index
        if self.plan[layer] == "repo":
            gated = silu(h @ get("gate_map").T) * (h @ get("content_map").T)
            positions = (1 - self.towards) * (gated @ get("final_map").T).T + self.towards * index
            self.positions[layer].append(positions)
        group = self.heads // self.kv_heads
        if self.plan[layer] != "nope":
            k = self.rotated(k, positions)
            if self.plan[layer] == "repo":
                positions = positions.repeat_interleave(group, 0)
            q = self.rotated(q, positions)
        self.rows[layer].append((k, v))
        k, v = (torch.cat(x, 1).repeat_interleave(group, 0) for x in zip(*self.rows[layer]))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.head_dim)
        later = torch.ones(len(h), k.shape[1], dtype=torch.bool).triu(self.seen + 1)
        scores = scores.masked_fill(later, -torch.inf)
        if hidden_rows is not None:  # [layers, kv heads, tokens]
            gone = hidden_rows[layer].repeat_interleave(group, 0)[:, None]
            scores[..., : gone.shape[-1]].masked_fill_(gone, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(h), -1)
        return mixed @ get("o_proj").T

    def mlp(self, layer, h):
        get = lambda part: self.weights[f"model.layers.{layer}.mlp.{part}_proj.weight"]  # noqa: E731
        return (silu(h @ get("gate").T) * (h @ get("up").T)) @ get("down").T

    def forward(self, ids, hidden_rows=None):
        x = self.weights["model.embed_tokens.weight"][ids]
        epsilon = self.config["rms_norm_eps"]
        for layer in range(len(self.plan)):
            norms = lambda part: self.weights[f"model.layers.{layer}.{part}_layernorm.weight"]  # noqa: B023, E731
            if self.post_norm:
                x = x + norm(self.attention(layer, x, hidden_rows), norms("post_attention"), epsilon)
                x = x + norm(self.mlp(layer, x), norms("post_feedforward"), epsilon)
            else:
                x = x + self.attention(layer, norm(x, norms("input"), epsilon), hidden_rows)
                x = x + self.mlp(layer, norm(x, norms("post_attention"), epsilon))
        self.seen += len(ids)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return norm(x, self.weights["model.norm.weight"], epsilon) @ head.T


def plan(config, layers):
    """Which layers have what, by the published rule: the listed ones (none listed: all) from the start layer on."""
    pe = config.get("pe_config") or pe_config("none", 0, "")
    mode = {"none": "rope", "nope": "nope", "swigluex_multihead": "repo"}[pe["dynamic_pe_mode"]]
    ids = [int(i) for i in pe["dynmaic_pe_layer_ids"].split(",") if i]
    chosen = [i >= pe["dynmaic_pe_start_layer"] and (not ids or i in ids) for i in range(layers)]
    return [mode if yes else "rope" for yes in chosen]


def base_weights():
    weights, out = {}, 1.2 / HIDDEN**0.5
    shapes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "gate": (40, 32), "up": (40, 32), "down": (32, 40)}
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = torch.randn(64, HIDDEN) * out
    weights["model.norm.weight"] = 1 + 0.3 * torch.randn(HIDDEN)
    for layer in range(LAYERS):
        for part, shape in shapes.items():
            owner = "self_attn" if part in "qkvo" else "mlp"
            weights[f"model.layers.{layer}.{owner}.{part}_proj.weight"] = torch.randn(shape) * out
        for part in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"):
            weights[f"model.layers.{layer}.{part}.weight"] = 1 + 0.3 * torch.randn(HIDDEN)
    return weights


def maps(layers, hidden, width, heads, last):
    shapes = {"gate_map": (width, hidden), "content_map": (width, hidden), "final_map": (heads, width)}
    scale = {"gate_map": hidden**-0.5, "content_map": hidden**-0.5, "final_map": last}
    return {
        f"model.layers.{layer}.self_attn.{part}.weight": torch.randn(shape) * scale[part]
        for layer in layers
        for part, shape in shapes.items()
    }


def fingerprint(path):
    """Of the base, as overlays name it: see models/src/overlay.rs."""
    digest = hashlib.sha256()
    header, _, data = (path.read_bytes()[8:], None, None)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    tensors, data = json.loads(header[:length]), header[length:]
    for name in sorted(tensors.keys() - {"__metadata__"}):
        start, end = tensors[name]["data_offsets"]
        shape = ",".join(map(str, tensors[name]["shape"]))
        assert end - start <= 3 * 16384, "larger ones are sampled"
        digest.update(f"{name} {tensors[name]['dtype']} [{shape}]\n".encode())
        digest.update(data[start:end])
    return digest.hexdigest()


def run(network, ids, tokens):
    whole = network.forward(ids)
    steps = [network.forward(token[None]) for token in tokens]
    return whole.float().contiguous(), torch.cat(steps).float().contiguous()


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    folder = HERE / "olmo2"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base, learned = base_weights(), maps((2, 3), HIDDEN, WIDTH, HEADS, 1.5)
    shards = {"model-00001-of-00002.safetensors": base, "model-00002-of-00002.safetensors": learned}
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")

    ids, tokens = torch.randint(0, 64, (40,)), torch.randint(0, 64, (8,))
    golden = {"ids": ids, "next": tokens}
    for name, (changes, towards) in VARIANTS.items():
        config = CONFIG | changes
        network = Network(config, base | learned, plan(config, LAYERS), towards)
        golden[f"{name}.logits"], golden[f"{name}.decode"] = run(network, ids, tokens)
        if name == "repo":
            positions = torch.stack([torch.cat(network.positions[layer], 1) for layer in (2, 3)])
            golden["repo.positions"] = positions.float().contiguous()
            print("positions from", positions.min().item(), "to", positions.max().item())
            whole = Network(config, base | learned, plan(config, LAYERS)).forward(torch.cat([ids, tokens]))
            assert (whole[-8:] - golden["repo.decode"]).abs().max() < 1e-5, "decode is not prefill"
        else:
            gap = (golden[f"{name}.logits"] - golden["repo.logits"]).abs().max()
            assert gap > 0.1, f"{name} hardly differs from repo ({gap})"
    variants = {name: {"config": changes, "toward_index": towards} for name, (changes, towards) in VARIANTS.items()}
    (HERE / "variants.json").write_text(json.dumps(variants, indent=1) + "\n")

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(theirs(ids[None]).logits[0], golden["plain.logits"], rtol=0, atol=2e-5), "not OLMo 2"

    network = Network(CONFIG, base | learned, plan(CONFIG, LAYERS))
    network.forward(ids)
    layer, head, token = torch.meshgrid(torch.arange(LAYERS), torch.arange(HEADS), torch.arange(40), indexing="ij")
    dropped = ((3 * token + 5 * head + 7 * layer) % 4 == 0) & (token < 32)
    golden["dropped.decode"] = torch.cat([network.forward(t[None], dropped) for t in tokens]).float().contiguous()
    assert (golden["dropped.decode"] - golden["repo.decode"]).abs().max() > 0.1

    for name, parent in (("gqa2_llama31", "llama"), ("qwen3", "families")):
        path = HERE.parent / parent / name
        config, weights = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
        plain = Network(config, weights, ["rope", "rope"]).forward(ids % 96)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert torch.allclose(theirs(ids[None] % 96).logits[0].double(), plain, rtol=0, atol=1e-4), name
        overlay = maps([1], config["hidden_size"], 5, config["num_key_value_heads"], 12.0)
        if name == "qwen3":
            changed = "model.layers.1.self_attn.q_norm.weight"
            overlay[changed] = weights[changed] * 1.5
        metadata = {
            "format": "longctx-repo",
            "base": fingerprint(path / "model.safetensors"),
            "pe_config": json.dumps(pe_config("swigluex_multihead", 1, "")),
        }
        save_file(overlay, HERE / f"{name}.repo.safetensors", metadata=metadata)
        network = Network(config, weights | overlay, ["rope", "repo"])
        golden[f"{name}.logits"], golden[f"{name}.decode"] = run(network, ids % 96, tokens % 96)
        assert (golden[f"{name}.logits"] - plain).abs().max() > 0.1, f"{name}: positions hardly matter"
    save_file(golden, HERE / "expected.safetensors")
    for file in sorted(HERE.rglob("*.*")):
        print(file.relative_to(HERE), file.stat().st_size // 1024, "KB")


if __name__ == "__main__":
    main()
