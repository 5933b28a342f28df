//! What is said of Hugging Face folders that cannot be read.

use crate::make::{config_with, folder, safetensors, write_json, write_typed};
use crate::{refusal, says, tensor_refusal};
use models::{Error, open};
use safetensors::Dtype;
use serde_json::{Value, json};

fn with_config(changes: Value) -> Error {
    refusal(folder(&config_with(changes)).path())
}

fn with_weights(bytes: &[u8]) -> Error {
    let folder = folder(&config_with(json!({})));
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    refusal(folder.path())
}

fn with_index(index: Value) -> Error {
    let folder = folder(&config_with(json!({})));
    write_json(&folder.path().join("model.safetensors.index.json"), &index);
    refusal(folder.path())
}

#[test]
fn every_cut_of_the_weights_is_refused() {
    let folder = folder(&config_with(json!({})));
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = refusal(folder.path());
        assert!(matches!(error, Error::Format { .. } | Error::Io { .. }), "{length}: {error}");
    }
    says(&refusal(folder.path()), &["model.safetensors", "2048 bytes", "2047 bytes"]);
}

#[test]
fn hostile_headers_are_refused() {
    let header = |shape: &str, from: u64, to: u64| {
        let header =
            format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#);
        safetensors(&header, &[0; 16])
    };
    // Sizes that are right one by one, and an end so late that no header can be added to it.
    let size = (1u64 << 61) - 1;
    let late: Vec<String> = (0..8)
        .map(|i| {
            let offsets = [i * size, (i + 1) * size];
            format!(r#""x{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":{offsets:?}}}"#)
        })
        .collect();
    for bytes in [
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        [&1_000_000u64.to_le_bytes()[..], b"{}"].concat(),
        safetensors("{", &[]),
        safetensors("[]", &[]),
        safetensors("{}", &[0; 16]),
        safetensors(&format!("{{{}}}", late.join(",")), &[0; 16]),
        header("[4]", 0, 32),
        header("[4]", 16, 0),
        header("[5]", 0, 16),
        header("[4294967296,4294967296]", 0, 16),
        header("[9223372036854775810,2]", 0, 16),
        header("[1099511627776,1099511627776]", 0, 0),
        header("[4611686018427387904]", 0, 0),
        header("[-4]", 0, 16),
    ] {
        let error = with_weights(&bytes);
        assert!(matches!(error, Error::Format { .. }), "{error}");
        says(&error, &["model.safetensors", "fetch the file again"]);
    }
}

#[test]
fn indexes_are_not_believed() {
    for file in ["../model.safetensors", "/etc/passwd", "a/../../b", "", "."] {
        let error = with_index(json!({"weight_map": {"x": file}}));
        assert!(matches!(error, Error::OutsideFolder { .. }), "{file}: {error}");
        says(&error, &["model.safetensors.index.json", &format!("{file:?}"), "outside the folder"]);
    }
    let error =
        with_index(json!({"weight_map": {"x": "shard.safetensors", "y": "shard.safetensors"}}));
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
    says(&error, &["shard.safetensors", "tensor x", "not there"]);
    let error = with_index(json!({"weight_map": {"x": "model.safetensors"}}));
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
    says(&error, &["model.safetensors", "tensor x"]);
    says(
        &with_index(json!({"weight_map": {"x": 1}})),
        &["index.json", "the file of x is 1", "a string"],
    );
    says(&with_index(json!({"weight_map": []})), &["index.json", "weight_map is []", "an object"]);
    says(&with_index(json!({})), &["index.json", "weight_map is absent"]);
}

#[test]
fn missing_tensors_wrong_shapes_and_dtypes_are_named() {
    let folder = folder(&config_with(json!({})));
    let read = |name, shape: &[i64]| tensor_refusal(open(folder.path()).unwrap(), name, shape);
    let error = read("model.norm.weight", &[64]);
    assert!(matches!(error, Error::MissingTensor { .. }));
    says(&error, &["model.safetensors", "model.norm.weight", "config.json"]);
    for shape in [&[9, 64][..], &[8], &[8, 64, 1], &[64, 8]] {
        let error = read("model.embed_tokens.weight", shape);
        assert!(matches!(error, Error::WrongShape { .. }));
        says(
            &error,
            &["model.safetensors", "model.embed_tokens.weight", "[8, 64]", &format!("{shape:?}")],
        );
    }
    let weights = [("x", Dtype::I64, vec![1], vec![0; 8])];
    write_typed(&folder.path().join("model.safetensors"), &weights);
    let error = read("x", &[1]);
    assert!(matches!(error, Error::WrongDtype { .. }));
    says(&error, &["model.safetensors", "tensor x", "I64", "BF16"]);
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let folder = folder(&config_with(json!({})));
    for (dtype, bytes) in [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::F32, f32::INFINITY.to_le_bytes().to_vec()),
        (Dtype::F16, half::f16::NEG_INFINITY.to_le_bytes().to_vec()),
        (Dtype::BF16, half::bf16::NAN.to_le_bytes().to_vec()),
    ] {
        write_typed(&folder.path().join("model.safetensors"), &[("x", dtype, vec![1], bytes)]);
        let error = tensor_refusal(open(folder.path()).unwrap(), "x", &[1]);
        assert!(matches!(error, Error::NotFinite { .. }), "{dtype}: {error}");
        says(&error, &["model.safetensors", "tensor x"]);
    }
}

#[test]
fn what_the_architecture_lacks_is_refused() {
    for changes in [
        json!({"architectures": ["Qwen2ForCausalLM"]}),
        json!({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}),
        json!({"architectures": null, "model_type": "mamba"}),
    ] {
        let error = with_config(changes);
        assert!(matches!(error, Error::UnknownArchitecture { .. }), "{error}");
        says(&error, &["config.json", "LlamaForCausalLM, Qwen3ForCausalLM, Olmo2ForCausalLM"]);
    }
    for (changes, parts) in [
        (json!({"rope_scaling": {"rope_type": "foo"}}), ["rope_scaling.rope_type", "foo"]),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2}}),
            ["rope_scaling.rope_type", "dynamic"],
        ),
        (
            json!({"rope_parameters": {"rope_type": "longrope"}}),
            ["rope_parameters.rope_type", "longrope"],
        ),
        (json!({"hidden_act": "gelu"}), ["hidden_act", "gelu"]),
        (json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "1"]),
        (json!({"quantization_config": {"quant_method": "gptq"}}), ["quantization_config", "gptq"]),
    ] {
        let error = with_config(changes);
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        says(&error, &["config.json", parts[0], parts[1]]);
    }
}

#[test]
fn configs_that_no_model_has_are_refused() {
    for (changes, part) in [
        (json!({"hidden_size": null}), "hidden_size is absent"),
        (json!({"hidden_size": "64"}), "hidden_size is \"64\""),
        (json!({"hidden_size": -64}), "hidden_size is -64"),
        (json!({"hidden_size": 1u64 << 40}), "hidden size is 1099511627776"),
        (json!({"num_attention_heads": 0}), "query heads is 0"),
        (json!({"num_key_value_heads": 3}), "4 for 3"),
        (json!({"num_key_value_heads": 0}), "key/value heads is 0"),
        (json!({"head_dim": 15}), "head dim is 15"),
        (json!({"rms_norm_eps": -1.0}), "epsilon is -1"),
        (json!({"rope_theta": 0}), "theta is 0"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id is \"</s>\""),
        (json!({"eos_token_id": [1, -1]}), "eos_token_id is [1,-1]"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings is 1"),
        (json!({"architectures": null}), "architectures is absent"),
        (json!({"architectures": [7]}), "architectures is [7]"),
        (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.rope_type is absent"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "low_freq_factor is absent",
        ),
    ] {
        let error = with_config(changes);
        assert!(matches!(error, Error::Format { .. }), "{error}");
        says(&error, &["config.json", part]);
    }
}

#[test]
fn missing_and_broken_files_are_named() {
    let folder = folder(&config_with(json!({})));
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), b"x").unwrap();
    says(&refusal(folder.path()), &["model.safetensors", "fetch the weights as safetensors"]);
    std::fs::write(folder.path().join("config.json"), b"{\"hidden_size\": NaN}").unwrap();
    says(&refusal(folder.path()), &["config.json", "a JSON object", "line 1"]);
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    says(&refusal(folder.path()), &["config.json", "No such file"]);
}
