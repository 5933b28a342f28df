//! What the tests of the command share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

pub fn longctx(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longctx"));
    command.args(arguments);
    command
}

/// What a command says, which ends well.
pub fn ok(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = String::from_utf8_lossy(&stderr).into_owned();
    assert!(status.success(), "{text}");
    String::from_utf8_lossy(&stdout).into_owned() + &text
}

/// The one line in which a command refuses.
pub fn refused(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(!status.success());
    let text = String::from_utf8(stderr).unwrap();
    assert!(text.starts_with("longctx: ") && text.trim_end().lines().count() == 1, "{text}");
    text
}

/// A model of random weights with a tokenizer and a chat template, in a new folder.
pub fn tiny_model(folder: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
    fs::create_dir(folder).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(golden.join("tokenizer/tiny").join(name), folder.join(name)).unwrap();
    }
    write_weights(folder);
}

/// A Llama of chance with the tokenizer's vocabulary, the same for every test.
fn write_weights(folder: &Path) {
    // The generator that is seeded is the process's, and tests run side by side.
    static DRAWING: Mutex<()> = Mutex::new(());
    let _drawing = DRAWING.lock().unwrap_or_else(PoisonError::into_inner);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 1,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    tch::manual_seed(3);
    let random =
        |shape: &[i64]| tch::Tensor::randn(shape, (tch::Kind::Float, tch::Device::Cpu)) * 0.3;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), random(&[512, 32])),
        ("model.norm.weight".to_owned(), random(&[32]) + 1.0),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[32][..]),
            ("post_attention_layernorm", &[32]),
            ("self_attn.q_proj", &[32, 32]),
            ("self_attn.k_proj", &[32, 32]),
            ("self_attn.v_proj", &[32, 32]),
            ("self_attn.o_proj", &[32, 32]),
            ("mlp.gate_proj", &[40, 32]),
            ("mlp.up_proj", &[40, 32]),
            ("mlp.down_proj", &[32, 40]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), random(shape)));
        }
    }
    tch::Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
}
