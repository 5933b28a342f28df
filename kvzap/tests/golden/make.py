"""Small random surrogates as kvpress saves them, and the scores that kvpress gives with them.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, safetensors 0.8.0. Run `python make.py` here:
it writes beside itself, seeded, one thread, in seconds.

linear/, mlp/        surrogates of 2 layers, hidden 48, 3 kv heads (mlp: width 6), saved in float32 and bfloat16
scores.safetensors   hidden            f32 [2, 7, 48], numbers that bf16 holds exactly
                     {linear,mlp}.f32  [2 layers, 2, 3, 7] scores of `hidden` in f32
                     {linear,mlp}.bf16 the same of `hidden` in bf16
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from kvpress import KVzapPress
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
LAYERS, HIDDEN, HEADS = 2, 48, 3

disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
hidden = torch.randn(2, 7, HIDDEN).bfloat16().float()
tensors = {"hidden": hidden}
for name, width, saved in [("linear", None, torch.float32), ("mlp", 6, torch.bfloat16)]:
    model = KVzapModel(KVzapConfig(input_dim=HIDDEN, output_dim=HEADS, hidden_dim=width, n_modules=LAYERS))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3)
    model.to(saved).save_pretrained(HERE / name)
    for key, dtype in [("f32", torch.float32), ("bf16", torch.bfloat16)]:
        press = KVzapPress(model_type=name)
        press.kvzap_model = KVzapModel.from_pretrained(HERE / name)
        layers = [SimpleNamespace(layer_idx=layer) for layer in range(LAYERS)]
        with torch.no_grad():
            scores = [press.score(layer, hidden.to(dtype), None, None, None, {}) for layer in layers]
        tensors[f"{name}.{key}"] = torch.stack(scores).contiguous()
save_file(tensors, HERE / "scores.safetensors")
