"""golden.safetensors: RePo's golden layer and rotary embedding as transformers computes it.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, safetensors 0.8.0. Run `python make.py` here: it writes beside
itself, without chance.

layer.*  one layer of RePo (arXiv 2512.14391, section 3) on OLMo 2: 5 tokens, hidden 16, 2 heads of 8, width 2,
         intermediate 24, theta 500000, epsilon 1e-6; weights and input are formulas (`wave`). Computed here in f64, and
         held below to numbers that github.com/SakanaAI/repo at 1508a73 gave within 1e-6 in f32. All f64:
         positions [2, 5], q and k [2, 5, 8] before rotation, rotated_q and rotated_k after it, scores and
         probabilities [2, 5, 5], attention [5, 16] after o_proj, out [5, 16]; the same with positions 0..4: rope.*
layer.positions_bf16 f32 [2, 5]  the same with weights, input and every step in bf16
inverse.*  transformers' inverse frequencies f32 [head_dim / 2]; the names say what they are made of; YaRN's attention
           factors beside them: scale.yarn.* f32 [1]; its cosines and sines: yarn.cos and yarn.sin f32 [4, 64]
rotation.*  transformers' Llama rotation, head_dim 64, theta 500000: positions f32 [8], x [2, 8, 64], out f32 and
            out_bf16 (of x in bf16, stored as f32)
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, rotate_half

THETA, EPSILON = 500000.0, 1e-6


def wave(t, *shape, scale=1.0):
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(1.7 * t + 0.731 * n).reshape(shape)


def norm(x, t):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * (1 + wave(t, 16, scale=0.1))


def silu(x):
    return x * torch.sigmoid(x)


def heads(x):
    return x.reshape(5, 2, 8).transpose(0, 1)


def rotated(x, positions):
    angles = positions[..., None] * THETA ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + rotate_half(x) * angles.sin()


def layer(prefix, positions=None):
    x = wave(1, 5, 16)
    if positions is None:
        gate, content, final = wave(2, 2, 16, scale=0.8), wave(3, 2, 16, scale=0.8), wave(4, 2, 2, scale=2.0)
        positions = (silu(x @ gate.T) * (x @ content.T) @ final.T).T
    square = {name: wave(t, 16, 16, scale=0.3) for t, name in zip(range(5, 9), "qkvo")}
    q, k = heads(norm(x @ square["q"].T, 9)), heads(norm(x @ square["k"].T, 10))
    rotated_q, rotated_k = rotated(q, positions), rotated(k, positions)
    scores = rotated_q @ rotated_k.transpose(1, 2) / math.sqrt(8)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    probabilities = (scores + mask).softmax(-1)
    attention = (probabilities @ heads(x @ square["v"].T)).transpose(0, 1).reshape(5, 16) @ square["o"].T
    x = x + norm(attention, 11)
    gate, up, down = wave(13, 24, 16, scale=0.3), wave(14, 24, 16, scale=0.3), wave(15, 16, 24, scale=0.3)
    out = x + norm((silu(x @ gate.T) * (x @ up.T)) @ down.T, 12)
    names = "positions q k rotated_q rotated_k scores probabilities attention out".split()
    values = (positions, q, k, rotated_q, rotated_k, scores, probabilities, attention, out)
    return {f"{prefix}.{name}": value.contiguous() for name, value in zip(names, values)}


def rotary(head_dim, theta, **scaling):
    rope = {"rope_type": "default", "rope_theta": theta, **scaling}
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=rope)
    return LlamaRotaryEmbedding(config)


def llama3(factor):
    shape = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **shape}


def yarn(head_dim, theta, factor, original, **changes):
    return rotary(head_dim, theta, rope_type="yarn", factor=factor, original_max_position_embeddings=original, **changes)


def rotation():
    positions = torch.tensor([0, 1, 257, 15962, 131071, -37.8175, 0.1, 300.25])
    x, module = wave(16, 1, 2, 8, 64).float(), rotary(64, THETA)
    out = {"rotation.positions": positions, "rotation.x": x[0].contiguous()}
    for name, kind in (("out", torch.float32), ("out_bf16", torch.bfloat16)):
        y = x.to(kind)
        cos, sin = module(y, positions[None])
        out[f"rotation.{name}"] = apply_rotary_pos_emb(y, y, cos, sin)[0][0].float().contiguous()
    return out


golden = layer("layer") | layer("rope", torch.arange(5, dtype=torch.float64).expand(2, 5)) | rotation()
golden |= {
    "inverse.plain.1e4.64": rotary(64, 10000.0).inv_freq,
    "inverse.plain.1e5.64": rotary(64, 100000.0).inv_freq,
    "inverse.plain.5e5.128": rotary(128, 500000.0).inv_freq,
    "inverse.plain.1e6.80": rotary(80, 1000000.0).inv_freq,
    "inverse.linear.1e4.64.3": rotary(64, 10000.0, rope_type="linear", factor=3.0).inv_freq,
    "inverse.llama3.5e5.128.8": rotary(128, 500000.0, **llama3(8.0)).inv_freq,
    "inverse.llama3.5e5.64.32": rotary(64, 500000.0, **llama3(32.0)).inv_freq,
}
for name, module in {
    "5e5.128.2": yarn(128, THETA, 2.0, 4096),
    "5e5.128.4": yarn(128, THETA, 4.0, 4096),
    "1e4.64.8": yarn(64, 10000.0, 8.0, 2048, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=0.5),
    "1e6.8.40": yarn(8, 1000000.0, 40.0, 32),
}.items():
    golden[f"inverse.yarn.{name}"] = module.inv_freq
    golden[f"scale.yarn.{name}"] = torch.tensor([module.attention_scaling], dtype=torch.float32)
positions = torch.tensor([[3.5, -37.8175, 4095.0, 15000.25]])
golden["yarn.cos"], golden["yarn.sin"] = (x[0, :, :64].contiguous() for x in yarn(128, THETA, 4.0, 4096)(positions, positions))

# As the published code computes them in a bf16 model: each map's output is rounded, and so is their product.
half = lambda *args, **scale: wave(*args, **scale).float().bfloat16()  # noqa: E731
x, gate, content = half(1, 5, 16), half(2, 2, 16, scale=0.8), half(3, 2, 16, scale=0.8)
gated = torch.nn.functional.silu(x @ gate.T) * (x @ content.T)
golden["layer.positions_bf16"] = (gated @ half(4, 2, 2, scale=2.0).T).T.float().contiguous()

PUBLISHED = {
    "layer.positions": [-37.817552747, 3.331321071, 0.156508951, -1.343220638, 14.013732899, -14.361358680],
    "layer.rotated_q": {8: [-0.393361955, 1.391460308, 1.252142318, 0.450491094, 0.616187654]},
    "layer.rotated_k": {72: [-0.041187081, -1.307175075, -1.345876601, -1.096367882, -0.470361102]},
    "layer.scores": {45: [0.863294152, 0.492901027, 1.458403233, 0.666021934, -0.600607533]},
    "layer.probabilities": {45: [0.219491234, 0.151550540, 0.397987810, 0.180195086, 0.050775330]},
    "layer.attention": {64: [-1.676188200, -2.587380960, -1.659169570, 0.448567926, 2.237412412]},
    "layer.out": {64: [-3.019558501, -3.576276813, -0.846517171, 1.966650260, 2.413580953]},
    "rope.scores": {20: [-1.186878496, -0.172380166, 1.346472444, 1.573126856, -0.585164487]},
}
for name, rows in PUBLISHED.items():
    for start, row in (rows if isinstance(rows, dict) else {0: rows}).items():
        found = golden[name].flatten()[start : start + len(row)]
        torch.testing.assert_close(found, torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-8)
assert abs(golden["layer.out"].sum() + 6.332793506) < 1e-8

save_file(golden, Path(__file__).resolve().parent / "golden.safetensors")
