//! What is read from Hugging Face folders.

use crate::make::{config_with, folder, write_json, write_typed, write_weights};
use crate::{golden, says, tensor_refusal, values, weights};
use models::{Config, Error, RopeScaling, open};
use safetensors::Dtype;
use serde_json::{Value, json};

fn config(changes: Value) -> Config {
    open(folder(&config_with(changes)).path()).unwrap().config().clone()
}

#[test]
fn shards_are_read_as_their_index_says() {
    let weights = weights(&golden("llama/gqa8_sharded"));
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        assert!(weights.tensor(name, &[96, 32]).is_ok(), "{name}");
    }
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.mlp.up_proj.weight");
        assert!(weights.tensor(&name, &[40, 32]).is_ok(), "{name}");
    }
    assert_eq!(weights.config().group(), 8);
}

#[test]
fn only_the_files_of_the_index_are_opened() {
    let folder = folder(&config_with(json!({})));
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("consolidated.safetensors"), b"cut off").unwrap();
    write_weights(
        &at("first.safetensors"),
        &[("model.embed_tokens.weight", &[8, 64], &[7.0; 512])],
    );
    write_weights(&at("second.safetensors"), &[("model.norm.weight", &[64], &[3.0; 64])]);
    write_json(
        &at("model.safetensors.index.json"),
        &json!({"metadata": {}, "weight_map": {
            "model.embed_tokens.weight": "first.safetensors", "model.norm.weight": "second.safetensors"
        }}),
    );
    let weights = weights(folder.path());
    assert_eq!(values(&weights.tensor("model.embed_tokens.weight", &[8, 64]).unwrap()), [7.0; 512]);
    assert_eq!(values(&weights.tensor("model.norm.weight", &[64]).unwrap()), [3.0; 64]);
}

#[test]
fn files_without_an_index_are_read_if_they_share_nothing() {
    let folder = folder(&config_with(json!({})));
    let at = |name: &str| folder.path().join(name);
    std::fs::rename(at("model.safetensors"), at("a.safetensors")).unwrap();
    write_weights(&at("b.safetensors"), &[("model.norm.weight", &[64], &[3.0; 64])]);
    assert!(weights(folder.path()).tensor("model.norm.weight", &[64]).is_ok());
    std::fs::copy(at("a.safetensors"), at("b.safetensors")).unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::DuplicateTensor { .. }));
    says(&error, &["model.embed_tokens.weight", "a.safetensors", "b.safetensors", "index.json"]);
}

#[test]
fn halves_become_the_same_numbers() {
    let folder = folder(&config_with(json!({})));
    let numbers = [0.0, -0.5, 1.5, 6.103_515_6e-5, -3.0];
    let f16 = numbers.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let bf16 = numbers.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    write_typed(
        &folder.path().join("model.safetensors"),
        &[("f16", Dtype::F16, vec![5], f16), ("bf16", Dtype::BF16, vec![5, 1], bf16)],
    );
    let weights = weights(folder.path());
    assert_eq!(values(&weights.tensor("f16", &[5]).unwrap()), numbers);
    assert_eq!(values(&weights.tensor("bf16", &[5, 1]).unwrap()), numbers);
}

#[test]
fn the_head_dim_is_the_configs_where_that_is_given() {
    assert_eq!(config(json!({})).head_dim, 16);
    let given = config(json!({"head_dim": 32}));
    assert_eq!((given.head_dim, given.hidden_size, given.query_heads), (32, 64, 4));
}

#[test]
fn an_output_layer_in_the_weights_is_used_whatever_the_flag_says() {
    let with_head = |flag: bool| {
        let folder = folder(&config_with(json!({"tie_word_embeddings": flag})));
        write_weights(
            &folder.path().join("model.safetensors"),
            &[
                ("model.embed_tokens.weight", &[8, 64], &[1.0; 512]),
                ("lm_head.weight", &[8, 64], &[2.0; 512]),
            ],
        );
        open(folder.path()).unwrap()
    };
    let (flag, no_flag) = (with_head(true), with_head(false));
    assert!(!flag.config().tied_embeddings && !no_flag.config().tied_embeddings);
    assert!(no_flag.notes().is_empty());
    assert!(flag.notes()[0].contains("config.json") && flag.notes()[0].contains("lm_head.weight"));

    assert!(config(json!({})).tied_embeddings);
    let neither = folder(&config_with(json!({"tie_word_embeddings": false})));
    let error = tensor_refusal(open(neither.path()).unwrap(), "lm_head.weight", &[8, 64]);
    assert!(matches!(error, Error::MissingTensor { .. }));
    says(&error, &["model.safetensors", "lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn end_tokens_are_those_of_the_generation_config() {
    for (own, generation, wanted) in [
        (json!(2), Some(json!({"eos_token_id": [2, 5]})), vec![2, 5]),
        (json!([2, 3]), Some(json!({"eos_token_id": 5})), vec![5]),
        (json!([2, 3]), Some(json!({"eos_token_id": null})), vec![2, 3]),
        (json!(2), Some(json!({})), vec![2]),
        (json!(2), None, vec![2]),
        (json!(null), None, vec![]),
    ] {
        let folder = folder(&config_with(json!({"eos_token_id": own})));
        if let Some(generation) = generation {
            write_json(&folder.path().join("generation_config.json"), &generation);
        }
        let config = open(folder.path()).unwrap().config().clone();
        assert_eq!((config.eos_tokens, config.bos_token), (wanted, Some(1)));
    }
}

#[test]
fn rope_scaling_is_read_in_every_spelling() {
    let llama3 = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    });
    let named = |key: &str, name: &str| {
        let mut scaling = llama3.clone();
        scaling[key] = json!(name);
        scaling
    };
    let mut with_theta = named("rope_type", "llama3");
    with_theta["rope_theta"] = json!(500_000.0);
    let wanted = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192 };
    for changes in [
        json!({"rope_theta": 500_000, "rope_scaling": named("rope_type", "llama3")}),
        json!({"rope_theta": 500_000.0, "rope_scaling": named("type", "llama3")}),
        json!({"rope_parameters": with_theta}),
        json!({"rope_theta": 1.0, "rope_parameters": with_theta, "rope_scaling": null}),
    ] {
        let config = config(changes);
        assert_eq!((config.rope_theta, config.rope_scaling), (500_000.0, wanted.clone()));
    }
    for (changes, wanted) in [
        (json!({}), RopeScaling::None),
        (json!({"rope_scaling": {"rope_type": "default"}}), RopeScaling::None),
        (json!({"rope_parameters": {"rope_theta": 1e4}}), RopeScaling::None),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2}}),
            RopeScaling::Linear { factor: 2.0 },
        ),
    ] {
        assert_eq!(config(changes).rope_scaling, wanted);
    }
}

#[test]
fn biases_are_those_of_the_config() {
    let config = config(json!({"attention_bias": true}));
    assert!(config.attention_bias && config.output_bias && !config.mlp_bias);
}
