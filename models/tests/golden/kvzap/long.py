"""600 tokens of decoding pruned by kvpress, on the model and the MLP that make.py left here. Versions and layout: make.py.

make.py runs it last; alone it takes a minute.
"""

import json

import torch
from kvpress.presses.kvzap_press import KVzapModel
from make import HERE, VOCAB, middle, run
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

PROMPT, STEPS, WINDOW, EVERY = 130, 600, 128, 60


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(8)
    model = LlamaForCausalLM.from_pretrained(HERE / "model").eval()
    surrogate = KVzapModel.from_pretrained(HERE / "mlp").eval()
    ids = torch.randint(0, VOCAB, (PROMPT + STEPS,))
    args = (model, surrogate, ids, PROMPT, [1] * STEPS)
    threshold = middle(run(*args, -1e9, True, WINDOW)[2])
    dropped_at, logits, scores, ratio = run(*args, threshold, True, WINDOW, torch.int16)
    near, rows = (scores - threshold).abs().min().item(), list(range(0, len(logits), EVERY))
    assert near > 1e-5, f"a score lies {near} from the threshold, change the seed"
    print(f"threshold {threshold}, removed {ratio:.3f}, nearest score {near:.1e}")
    table = [{"name": "mlp_600", "surrogate": "mlp", "prompt": PROMPT, "window": WINDOW, "threshold": threshold,
              "decoding": True, "forwards": [1] * STEPS, "rows": rows, "ratio": ratio}]  # fmt: skip
    (HERE / "long.json").write_text(json.dumps(table) + "\n")
    tensors = {"ids": ids, "mlp_600.dropped_at": dropped_at, "mlp_600.logits": logits[rows].contiguous()}
    save_file(tensors, HERE / "long.safetensors")


if __name__ == "__main__":
    main()
