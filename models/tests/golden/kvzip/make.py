"""KVzip (arXiv 2505.23416) and KVzip+ as kvpress scores and prunes a tiny random Llama.

Versions: Python 3.11, torch 2.11.0, transformers 5.2.0, kvpress 0.5.5, safetensors 0.8.0. Run `python make.py` here:
it writes beside itself, seeded, f32, one thread, in a minute.

model/             Llama: 2 layers, 4 query heads, 2 kv heads, head dim 8, hidden 32, vocab 64, tied, theta 10000
kvzip.json         first, next, suffix: ids of the two instructions and of what the template puts after the user's text;
                   cases: {name, tokens, prefix, chunk, plus}. The context is ids[..tokens]
kvzip.safetensors  ids     i64 [2500]
                   {name}.scores         f32 [L, H, tokens]  0 in the prefix, sinks not yet protected
                   {name}.exact          f32 [L, H, tokens]  the same, all computed in f64 and rounded at last
                   {name}.{ratio}        u8 [L, H, tokens]   1 where kvpress masks, its budget over the model
                   {name}.{ratio}.layer  the same, its budget in each layer
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from kvpress import KVzipPress
from kvpress.presses import kvzip_press
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
LAYERS, HEADS, VOCAB = 2, 2, 64
RATIOS = [0.1, 0.25, 0.5, 0.9]
SUFFIX = "<end>\n<assistant>"


class Tokenizer:
    """A byte is an id: kvpress asks for no more of a tokenizer than this."""

    chat_template = "yes"

    def __init__(self, prefix):
        self.prefix = "p" * prefix

    def encode(self, text, return_tensors, add_special_tokens):
        assert return_tensors == "pt" and not add_special_tokens
        return torch.tensor([[7 * byte % VOCAB for byte in text.encode()]], dtype=torch.long)

    def apply_chat_template(self, messages, **_):
        return self.prefix + messages[0]["content"] + SUFFIX


def model():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, head_dim=8,
        num_attention_heads=4, num_key_value_heads=HEADS, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    lm = LlamaForCausalLM(config)
    for key, weight in lm.named_parameters():
        weight.normal_(1.0, 0.1) if "norm" in key else weight.normal_(0.0, 0.25)
    return lm.eval()


def run(lm, ids, prefix, chunk, plus, ratio, layerwise):
    """The scores before sinks are protected, and what is masked."""
    kvzip_press.AutoTokenizer.from_pretrained = lambda _: Tokenizer(prefix)
    press = KVzipPress(ratio, layerwise, kvzip_plus_normalization=plus, chunk_size=chunk)
    scores, inner = [], press.compress_post
    press.compress_post = lambda lm: (scores.append(press.score_val[:, 0].clone()), inner(lm))
    with press(lm):
        lm(input_ids=ids, past_key_values=DynamicCache(config=lm.config))
    masked = torch.zeros(LAYERS, HEADS, ids.shape[1], dtype=torch.uint8)
    for layer in range(LAYERS):
        indices = lm.model.layers[layer].self_attn.masked_key_indices
        masked[layer, indices[1], indices[2]] = 1
    return scores[0], masked


def exact(lm, *case):
    """The scores by the same code in f64, where transformers' norm would go by way of f32."""
    norm, LlamaRMSNorm.forward = LlamaRMSNorm.forward, lambda norm, x: norm.weight * x / (
        x.square().mean(-1, keepdim=True) + norm.variance_epsilon
    ).sqrt()
    torch.set_default_dtype(torch.float64)
    scores, _ = run(copy.deepcopy(lm).double(), *case, 0.5, False)
    torch.set_default_dtype(torch.float32)
    LlamaRMSNorm.forward = norm
    return scores.float()


@torch.no_grad()
def main():
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    lm, ids = model(), torch.randint(0, VOCAB, (1, 2500))
    shutil.rmtree(HERE / "model", ignore_errors=True)
    lm.save_pretrained(HERE / "model")
    tensors, cases = {"ids": ids[0]}, []
    for tokens, prefix, chunk in [(60, 2, 2048), (300, 20, 2048), (300, 20, 100), (2500, 3, 2048)]:
        for plus in [False, True]:
            name = f"{tokens}_{chunk}" + ("_plus" if plus else "")
            cases.append({"name": name, "tokens": tokens, "prefix": prefix, "chunk": chunk, "plus": plus})
            for ratio in RATIOS:
                for layerwise in [False, True]:
                    scores, masked = run(lm, ids[:, :tokens], prefix, chunk, plus, ratio, layerwise)
                    tensors[f"{name}.{ratio}" + (".layer" if layerwise else "")] = masked
                    for one in scores if layerwise else [scores]:
                        ordered = one[..., 4:].flatten().sort().values
                        gap = ordered.diff()[int(one.numel() * ratio) - 1] / ordered[int(one.numel() * ratio)]
                        assert gap > 1e-5, f"{name} at {ratio}: two scores lie {gap} apart, change the seed"
            tensors[f"{name}.scores"] = scores
            tensors[f"{name}.exact"] = exact(lm, ids[:, :tokens], prefix, chunk, plus)
    encode = lambda text: Tokenizer(0).encode(text, "pt", False)[0].tolist()
    table = {
        "first": encode("\n\nRepeat the previous context exactly."),
        "next": encode("\n\nRepeat the part of the previous context exactly, starting with"),
        "suffix": encode(SUFFIX),
        "cases": cases,
    }
    (HERE / "kvzip.json").write_text(json.dumps(table, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "kvzip.safetensors")


if __name__ == "__main__":
    main()
