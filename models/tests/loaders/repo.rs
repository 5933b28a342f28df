//! RePo's `pe_config`, and the tensors that it is held to.

use crate::make::{config, safetensors, write_json, write_weights};
use crate::{refusal, says, weights};
use models::{Decoder, Error, LayerPositions, open};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

const MAPS: [(&str, [usize; 2]); 3] =
    [("gate_map", [8, 64]), ("content_map", [8, 64]), ("final_map", [2, 8])];

fn map(layer: usize, map: &str) -> String {
    format!("model.layers.{layer}.self_attn.{map}.weight")
}

/// Six layers of the small Llama with this `pe_config`, and the maps of `layers`, as far as `keep` keeps them.
fn folder_with(pe: Value, layers: &[usize], keep: impl Fn(&str) -> bool) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config["num_hidden_layers"] = json!(6);
    config["pe_config"] = pe;
    write_json(&folder.path().join("config.json"), &config);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![8, 64])];
    for &layer in layers {
        tensors.extend(MAPS.map(|(name, shape)| (map(layer, name), shape.to_vec())));
    }
    tensors.retain(|(name, _)| keep(name));
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| (name, shape, vec![0.5; shape.iter().product()]))
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, s, v)| (&n[..], &s[..], &v[..])).collect();
    write_weights(&folder.path().join("model.safetensors"), &tensors);
    folder
}

fn repo_layers(pe: Value, layers: &[usize]) -> Vec<usize> {
    let folder = folder_with(pe, layers, |_| true);
    let plan = open(folder.path()).unwrap().config().positions.clone();
    (0..6).filter(|&layer| plan[layer] == LayerPositions::Repo).collect()
}

#[test]
fn start_layers_and_lists_are_read_in_both_spellings_and_the_misspelt_one_counts() {
    for (mut pe, wanted) in [
        (json!({"dynmaic_pe_start_layer": 4}), vec![4, 5]),
        (json!({"dynamic_pe_start_layer": 4}), vec![4, 5]),
        (json!({"dynmaic_pe_start_layer": 4, "dynamic_pe_start_layer": 1}), vec![4, 5]),
        (json!({"dynmaic_pe_start_layer": 2, "dynmaic_pe_layer_ids": "1, 3,5"}), vec![3, 5]),
        (json!({"dynamic_pe_layer_ids": "0,3"}), vec![0, 3]),
        (json!({"dynmaic_pe_layer_ids": "", "dynamic_pe_layer_ids": "2"}), vec![0, 1, 2, 3, 4, 5]),
    ] {
        pe["dynamic_pe_mode"] = json!("swigluex_multihead");
        assert_eq!(repo_layers(pe.clone(), &wanted), wanted, "{pe}");
    }
}

#[test]
fn without_pe_config_and_with_mode_none_a_model_is_plain() {
    for pe in
        [json!(null), json!({}), json!({"dynamic_pe_mode": "none", "dynmaic_pe_start_layer": 2})]
    {
        assert!(repo_layers(pe, &[]).is_empty());
    }
    let nope = json!({"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": "2,5"});
    let plan = open(folder_with(nope, &[], |_| true).path()).unwrap().config().positions.clone();
    use LayerPositions::{Nope, Rope};
    assert_eq!(plan, [Rope, Rope, Nope, Rope, Rope, Nope]);
}

#[test]
fn maps_that_are_missing_or_not_planned_are_named() {
    let repo = |start: usize| json!({"dynamic_pe_mode": "swigluex_multihead", "dynmaic_pe_start_layer": start});
    for name in ["gate_map", "content_map", "final_map"] {
        let missing = map(4, name);
        let error = refusal(folder_with(repo(3), &[3, 4, 5], |tensor| tensor != missing).path());
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        says(&error, &["model.safetensors", &missing, "pe_config"]);
    }
    // The published code would take the start layer for 0 and make up the maps of the rest.
    let error = refusal(folder_with(repo(0), &[3, 4, 5], |_| true).path());
    says(&error, &[&map(0, "gate_map"), "missing"]);

    for (pe, planned) in
        [(repo(4), "[4, 5]"), (json!(null), "[]"), (json!({"dynamic_pe_mode": "nope"}), "[]")]
    {
        let error = refusal(folder_with(pe, &[3, 4, 5], |_| true).path());
        assert!(matches!(error, Error::StrayMap { .. }), "{error}");
        says(&error, &["config.json", &map(3, "gate_map"), planned]);
    }
}

#[test]
fn modes_and_lists_that_mean_nothing_are_refused() {
    for mode in ["swiglu", "swigluex", "continuous", "cope", "SEXMH"] {
        let error = refusal(folder_with(json!({"dynamic_pe_mode": mode}), &[], |_| true).path());
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        says(&error, &["config.json", "pe_config.dynamic_pe_mode", mode, "swigluex_multihead"]);
    }
    for ids in ["6", "1,x", "-1"] {
        let pe = json!({"dynamic_pe_mode": "nope", "dynmaic_pe_layer_ids": ids});
        let error = refusal(folder_with(pe, &[], |_| true).path());
        assert!(matches!(error, Error::Format { .. }), "{error}");
        says(&error, &["config.json", "dynmaic_pe_layer_ids", ids, "0 to 5"]);
    }
    let error = refusal(folder_with(json!("repo"), &[], |_| true).path());
    says(&error, &["config.json", "pe_config", "an object"]);
    let pe = json!({"dynamic_pe_mode": "nope", "dynmaic_pe_start_layer": "5"});
    says(&refusal(folder_with(pe, &[], |_| true).path()), &["dynmaic_pe_start_layer is \"5\""]);
}

/// A weight file of zeros that takes no room.
fn sparse(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let (mut at, mut header) = (0, serde_json::Map::new());
    for (name, shape) in tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let mut file = File::create(path).unwrap();
    let header = safetensors(&Value::from(header).to_string(), &[]);
    file.write_all(&header).unwrap();
    file.set_len((header.len() + at) as u64).unwrap();
}

/// The published checkpoints: `SakanaAI/RePo-OLMo2-1B-stage2-L5`, and the 7B of the scripts.
#[test]
fn the_published_layouts_are_read() {
    for (layers, hidden, heads, start) in [(16, 2048, 16, 5), (32, 4096, 32, 10)] {
        let folder = tempfile::tempdir().unwrap();
        write_json(
            &folder.path().join("config.json"),
            &json!({
                "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_size": hidden,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
                "intermediate_size": 8192, "vocab_size": 100_352, "rope_theta": 500_000, "rope_scaling": null,
                "max_position_embeddings": 65_536, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
                "eos_token_id": 100_257, "pad_token_id": 100_277,
                "pe_config": {
                    "dynamic_pe_mode": "swigluex_multihead",
                    "dynmaic_pe_start_layer": start, "dynamic_pe_start_layer": start,
                    "dynmaic_pe_layer_ids": "", "dynamic_pe_layer_ids": "",
                    "dynamic_pe_init_pdrop": 1.0, "dynamic_pe_dropout_anneal_step": 0, "model_type": ""
                }
            }),
        );
        let width = hidden / 8;
        let tensors: Vec<_> = (start..layers)
            .flat_map(|layer| {
                [
                    (map(layer, "gate_map"), vec![width, hidden]),
                    (map(layer, "content_map"), vec![width, hidden]),
                    (map(layer, "final_map"), vec![heads, width]),
                ]
            })
            .collect();
        sparse(&folder.path().join("model.safetensors"), &tensors);
        let weights = weights(folder.path());
        let plan = &weights.config().positions;
        assert_eq!(plan.len(), layers);
        for (layer, &positions) in plan.iter().enumerate() {
            let wanted = if layer < start { LayerPositions::Rope } else { LayerPositions::Repo };
            assert_eq!(positions, wanted, "layer {layer}");
        }
        let last = weights.tensor(&map(layers - 1, "final_map"), &[heads as i64, width as i64]);
        assert!(last.is_ok());
    }
}

#[test]
fn maps_of_another_shape_are_named() {
    use crate::golden;
    // (which map, its shape instead): rows of final_map are kv heads, all of one width.
    for (name, shape) in [("final_map", [8, 4]), ("content_map", [5, 32]), ("gate_map", [0, 32])] {
        let folder = tempfile::tempdir().unwrap();
        let from = golden("repo/olmo2");
        for entry in std::fs::read_dir(&from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let maps = [("gate_map", [4, 32]), ("content_map", [4, 32]), ("final_map", [4, 4])];
        let tensors: Vec<_> = [2, 3]
            .iter()
            .flat_map(|&layer| {
                maps.map(|(part, usual)| {
                    let shape = if layer == 3 && part == name { shape } else { usual };
                    (map(layer, part), shape.to_vec(), vec![0.1; shape[0] * shape[1]])
                })
            })
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(n, s, v)| (&n[..], &s[..], &v[..])).collect();
        write_weights(&folder.path().join("model-00002-of-00002.safetensors"), &tensors);
        let error = Decoder::load(&weights(folder.path())).unwrap_err();
        assert!(matches!(error, Error::WrongShape { .. }), "{error}");
        says(&error, &["model-00002-of-00002.safetensors", &map(3, name), &format!("{shape:?}")]);
    }
}
