"""Quantised blocks with their values, and tiny models as GGUF files.

Versions: Python 3.11, gguf 0.19.0, torch 2.11.0, transformers 5.2.0, safetensors 0.8.0. Run `python make.py` after
../llama/make.py and ../families/make.py: it writes beside itself, seeded, in seconds.

blocks.safetensors, for each type T of GGUF that is read:
  T.bytes   u8  [n, bytes of a block]     random, with half scales that are finite
  T.values  f32 [n, elements of a block]  what gguf's `dequantize` makes of them
gqa2_llama31.gguf: the model of ../llama/gqa2_llama31 as llama.cpp's converter writes it: F32, q and k rows interleaved,
  `key_length`, Llama 3.1's scaling as rope_freqs.weight. transformers' own GGUF reader must give back the weights.
qwen3.gguf, olmo2.gguf: those of ../families, their tensors named by gguf's own tables.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
MODELS = {
    "gqa2_llama31": (gguf.MODEL_ARCH.LLAMA, HERE.parent / "llama"),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, HERE.parent / "families"),
    "olmo2": (gguf.MODEL_ARCH.OLMO2, HERE.parent / "families"),
}
# Type: where in a block its halves lie.
HALVES = {
    "F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def blocks():
    rng = np.random.default_rng(7)
    golden = {}
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (64 if elements == 1 else 4, size), dtype=np.uint8)
        for at in halves:
            scales = rng.normal(0, 0.1, len(data)).astype(np.float16)
            scales[0] = np.float16(3e-7)  # subnormal
            data[:, at : at + 2] = scales[:, None].view(np.uint8)
        if name == "BF16":
            data[:, 1] &= 0xBF  # no infinity, no NaN
        golden[f"{name}.bytes"] = data
        golden[f"{name}.values"] = gguf.dequantize(data, kind).astype(np.float32).reshape(len(data), elements)
        assert np.isfinite(golden[f"{name}.values"]).all(), name
    save_file(golden, HERE / "blocks.safetensors")


def interleave(rows, heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def model(name):
    arch, parent = MODELS[name]
    folder, path = parent / name, HERE / f"{name}.gguf"
    config = AutoConfig.from_pretrained(folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["< 1", "< 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)

    if config.rope_parameters["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    weights = load_file(folder / "model.safetensors")
    for hf_name, weight in weights.items():
        if arch == gguf.MODEL_ARCH.LLAMA and "q_proj" in hf_name:
            weight = interleave(weight, config.num_attention_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and "k_proj" in hf_name:
            weight = interleave(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(hf_name, (".weight", ".bias")), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    if arch != gguf.MODEL_ARCH.LLAMA:
        return  # transformers 5.2.0 takes Qwen3's head dim for 128 and does not know OLMo 2
    # A reader of its own: transformers undoes the interleaving too.
    again = AutoModelForCausalLM.from_pretrained(HERE, gguf_file=path.name, dtype=torch.float32).state_dict()
    for hf_name, weight in weights.items():
        assert np.array_equal(again[hf_name].numpy(), weight), hf_name


if __name__ == "__main__":
    disable_progress_bar()
    blocks()
    for name in MODELS:
        model(name)
    for file in sorted(HERE.iterdir()):
        print(file.name, file.stat().st_size // 1024, "KB")
