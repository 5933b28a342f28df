"""What kvpress says with the surrogates that this crate ships: that it loads them, and its scores.

Versions: as make.py. Run `python shipped.py` here, again after the surrogates are trained anew: it writes beside itself,
seeded, one thread, in seconds.

shipped.safetensors  hidden        f32 [1, 16, 576], numbers that bf16 holds exactly
                     {linear,mlp}  [30 layers, 1, 3, 16] scores of `hidden` in f32
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from kvpress import KVzapPress
from kvpress.presses.kvzap_press import KVzapModel
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent

disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(1)
hidden = torch.randn(1, 16, 576).bfloat16().float()
tensors = {"hidden": hidden}
for name in ["linear", "mlp"]:
    press = KVzapPress(model_type=name)
    press.kvzap_model = KVzapModel.from_pretrained(HERE.parents[1] / f"surrogates/smollm2-135m-instruct-{name}")
    layers = [SimpleNamespace(layer_idx=layer) for layer in range(len(press.kvzap_model.layers))]
    with torch.no_grad():
        tensors[name] = torch.stack([press.score(layer, hidden, None, None, None, {}) for layer in layers]).contiguous()
save_file(tensors, HERE / "shipped.safetensors")
