//! What is Qwen3's and OLMo 2's own in what is read and refused.

use crate::make::{self, GgufFile, config_with, folder, write_weights};
use crate::{golden, refusal, says, weights};
use models::{Architecture, Config, Decoder, Error, RopeScaling, Yarn, open};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn config(changes: Value) -> Config {
    open(folder(&config_with(changes)).path()).unwrap().config().clone()
}

/// Loads a folder of tests/golden/families whose tensors `change` has kept, renamed or cut.
fn load_with(
    name: &str,
    change: impl Fn(&str, Vec<usize>, Vec<f32>) -> Option<(Vec<usize>, Vec<f32>)>,
) -> models::Result<Decoder> {
    let from = golden(&format!("families/{name}"));
    let to = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let tensors: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .filter_map(|(name, view)| {
            let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let (shape, values) = change(name, view.shape().to_vec(), values)?;
            Some((name.to_owned(), shape, values))
        })
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, s, v)| (&n[..], &s[..], &v[..])).collect();
    write_weights(&to.path().join("model.safetensors"), &tensors);
    Decoder::load(&weights(to.path()))
}

#[test]
fn the_families_are_known_by_either_name() {
    for (name, model_type, wanted) in [
        ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
        ("Olmo2ForCausalLM", "olmo2", Architecture::Olmo2),
    ] {
        assert_eq!(config(json!({"architectures": [name]})).architecture, wanted);
        let unnamed = config(json!({"architectures": null, "model_type": model_type}));
        assert_eq!(unnamed.architecture, wanted);
    }
}

#[test]
fn what_a_config_leaves_out_is_its_own_familys() {
    let qwen3 = config(json!({"architectures": ["Qwen3ForCausalLM"]}));
    assert_eq!((qwen3.head_dim, qwen3.max_positions, qwen3.norm_epsilon), (128, 32_768, 1e-6));
    let olmo2 = config(json!({"architectures": ["Olmo2ForCausalLM"]}));
    assert_eq!((olmo2.head_dim, olmo2.max_positions, olmo2.norm_epsilon), (16, 2048, 1e-5));
}

#[test]
fn norms_of_queries_and_keys_that_are_missing_or_of_another_width_are_named() {
    for (model, width) in [("qwen3", 16), ("olmo2", 32)] {
        assert!(load_with(model, |_, shape, values| Some((shape, values))).is_ok());
        for norm in ["q_norm", "k_norm"] {
            let tensor = format!("model.layers.1.self_attn.{norm}.weight");
            let error =
                load_with(model, |name, shape, values| (name != tensor).then_some((shape, values)))
                    .unwrap_err();
            assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
            says(&error, &["model.safetensors", &tensor]);

            let error = load_with(model, |name, shape, values| {
                Some(if name == tensor { (vec![4], values[..4].to_vec()) } else { (shape, values) })
            })
            .unwrap_err();
            assert!(matches!(error, Error::WrongShape { .. }), "{error}");
            says(&error, &["model.safetensors", &tensor, "[4]", &format!("[{width}]")]);
        }
    }
    let error = load_with("olmo2", |name, shape, values| {
        (!name.contains("post_feedforward_layernorm")).then_some((shape, values))
    });
    says(&error.unwrap_err(), &["model.layers.0.post_feedforward_layernorm.weight"]);
}

#[test]
fn windows_in_place_of_the_whole_text_are_refused() {
    for (changes, parts) in [
        (json!({"use_sliding_window": true}), ["use_sliding_window", "true"]),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            ["layer_types", "sliding_attention"],
        ),
    ] {
        let error = refusal(folder(&config_with(changes)).path());
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        says(&error, &["config.json", parts[0], parts[1]]);
    }
    let full = json!({"layer_types": ["full_attention"], "use_sliding_window": false});
    assert_eq!(config(full).layers, 1);
}

#[test]
fn yarn_is_read_with_what_the_paper_leaves_open() {
    let yarn = |settings: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0});
        settings.as_object().unwrap().iter().for_each(|(key, value)| rope[key] = value.clone());
        config(json!({"rope_scaling": rope, "max_position_embeddings": 4096}))
    };
    let paper = yarn(json!({"original_max_position_embeddings": 4096}));
    assert_eq!(paper.rope_scaling, RopeScaling::Yarn(Yarn::new(4.0, 4096)));
    assert_eq!(paper.max_positions, 16_384, "what YaRN stretches to");
    assert_eq!(yarn(json!({})).rope_scaling, paper.rope_scaling);
    let short = yarn(json!({"original_max_position_embeddings": 512}));
    assert_eq!(short.max_positions, 4096, "the config's where that is more");
    let full =
        yarn(json!({"beta_fast": 8, "beta_slow": 2, "truncate": false, "attention_factor": 0.5}));
    let wanted = Yarn {
        beta_fast: 8.0,
        beta_slow: 2.0,
        truncate: false,
        attention_factor: 0.5,
        ..Yarn::new(4.0, 4096)
    };
    assert_eq!(full.rope_scaling, RopeScaling::Yarn(wanted));
    let RopeScaling::Yarn(both) = yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).rope_scaling
    else {
        panic!("not YaRN")
    };
    assert_eq!(both.attention_factor, 1.0);

    let error = refusal(folder(&config_with(json!({"rope_scaling": {"type": "yarn"}}))).path());
    says(&error, &["config.json", "factor is absent"]);
}

#[test]
fn gguf_files_of_the_families_give_the_weights_of_their_folders() {
    for name in ["qwen3", "olmo2"] {
        let gguf = weights(&golden(&format!("gguf/{name}.gguf")));
        let folder = golden(&format!("families/{name}"));
        let [mut a, mut b] = [gguf.config().clone(), open(&folder).unwrap().config().clone()];
        assert!((a.norm_epsilon - b.norm_epsilon).abs() < 1e-12);
        for config in [&mut a, &mut b] {
            (config.norm_epsilon, config.bos_token) = (0.0, None);
            config.eos_tokens.clear();
        }
        assert_eq!(a, b);
        let tensors = tch::Tensor::read_safetensors(folder.join("model.safetensors")).unwrap();
        for (name, wanted) in tensors {
            assert_eq!(gguf.tensor(&name, &wanted.size()).unwrap(), wanted, "{name}");
        }
    }
}

#[test]
fn a_gguf_file_of_another_family_reads_its_own_keys() {
    let mut file = GgufFile::llama();
    file.set("general.architecture", make::text("qwen3"));
    says(&refusal(&file.save().path), &["qwen3.embedding_length is absent"]);
    for key in ["block_count", "context_length", "feed_forward_length", "attention.head_count"] {
        file.set(&format!("qwen3.{key}"), make::whole(4));
    }
    file.set("qwen3.embedding_length", make::whole(64));
    file.set("qwen3.attention.layer_norm_rms_epsilon", make::real(1e-6));
    assert_eq!(open(&file.save().path).unwrap().config().architecture, Architecture::Qwen3);
    file.set("qwen3.attention.sliding_window", make::whole(4096));
    says(&refusal(&file.save().path), &["qwen3.attention.sliding_window", "4096"]);
}
