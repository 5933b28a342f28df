//! What is read from GGUF files.

use crate::make::{self, GgufFile};
use crate::{golden, values, weights};
use models::{RopeScaling, Source, Weights, Yarn, open};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

#[test]
fn a_gguf_file_gives_the_weights_that_it_was_converted_from() {
    let folder = golden("llama/gqa2_llama31");
    let gguf = golden("gguf/gqa2_llama31.gguf");
    let bf16 = Weights::new(open(&gguf).unwrap(), Kind::BFloat16, Device::Cpu).unwrap();
    let (gguf, folder_weights) = (weights(&gguf), weights(&folder));
    let original: HashMap<_, _> =
        Tensor::read_safetensors(folder.join("model.safetensors")).unwrap().into_iter().collect();
    assert_eq!(original.len(), 21);
    for (name, original) in &original {
        assert!(gguf.source().has(name), "{name}");
        let shape = original.size();
        assert_eq!(&folder_weights.tensor(name, &shape).unwrap(), original, "{name}");
        assert_eq!(&gguf.tensor(name, &shape).unwrap(), original, "{name}");
        assert_eq!(bf16.tensor(name, &shape).unwrap(), original.to_kind(Kind::BFloat16), "{name}");
    }
    // What is not Llama's is in neither.
    assert!(!gguf.source().has("rope_freqs.weight") && !gguf.source().has("blk.0.attn_q.weight"));
}

#[test]
fn a_gguf_file_gives_the_config_that_it_was_converted_from() {
    let mut gguf = open(&golden("gguf/gqa2_llama31.gguf")).unwrap().config().clone();
    let mut folder = open(&golden("llama/gqa2_llama31")).unwrap().config().clone();
    assert_eq!((gguf.head_dim, gguf.hidden_size / gguf.query_heads), (16, 8));
    assert_eq!((&gguf.eos_tokens[..], &folder.eos_tokens[..]), (&[2, 5][..], &[2][..]));
    assert_eq!(
        folder.rope_scaling,
        RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 32 }
    );
    let RopeScaling::Divisors(divisors) = &gguf.rope_scaling else {
        panic!("{:?}", gguf.rope_scaling)
    };
    assert_eq!(divisors.len(), 8);
    assert!((divisors[0] - 1.0).abs() < 1e-6 && (divisors[7] - 8.0).abs() < 1e-5, "{divisors:?}");
    assert!((gguf.norm_epsilon - folder.norm_epsilon).abs() < 1e-12);
    // The rest is the same.
    gguf.norm_epsilon = folder.norm_epsilon;
    gguf.eos_tokens.clone_from(&folder.eos_tokens);
    folder.rope_scaling = gguf.rope_scaling.clone();
    assert_eq!(gguf, folder);
}

/// Row `r` of the file holds `r`.
fn numbered(kv_heads: u32, query_heads: u32, head_dim: u32) -> Weights {
    let mut file = GgufFile::llama();
    file.set("llama.attention.head_count", make::whole(query_heads));
    file.set("llama.attention.head_count_kv", make::whole(kv_heads));
    file.set("llama.attention.key_length", make::whole(head_dim));
    let rows = kv_heads * head_dim;
    let numbers: Vec<f32> = (0..rows).flat_map(|row| [row as f32; 64]).collect();
    file.put("blk.0.attn_k.weight", &[64, rows.into()], &numbers);
    file.put("blk.0.attn_v.weight", &[64, rows.into()], &numbers);
    let numbers: Vec<f32> = (0..rows).map(|row| row as f32).collect();
    file.put("blk.0.attn_k.bias", &[rows.into()], &numbers);
    let saved = file.save();
    weights(&saved.path)
}

#[test]
fn rows_of_keys_are_put_back_by_their_own_heads() {
    // (heads, head dim): (our row, the file's row)
    for (kv_heads, query_heads, head_dim, wanted) in [
        (
            8,
            32,
            128,
            &[(0, 0), (1, 2), (16, 32), (64, 1), (65, 3), (127, 127), (128, 128), (192, 129)][..],
        ),
        (3, 9, 64, &[(1, 2), (32, 1), (63, 63), (64, 64), (96, 65)]),
    ] {
        let weights = numbered(kv_heads, query_heads, head_dim);
        let rows = i64::from(kv_heads * head_dim);
        let keys = weights.tensor("model.layers.0.self_attn.k_proj.weight", &[rows, 64]).unwrap();
        let bias = weights.tensor("model.layers.0.self_attn.k_proj.bias", &[rows]).unwrap();
        let untouched =
            weights.tensor("model.layers.0.self_attn.v_proj.weight", &[rows, 64]).unwrap();
        for &(ours, theirs) in wanted {
            assert_eq!(values(&keys.get(ours)), [theirs as f32; 64], "row {ours}");
            assert_eq!(bias.double_value(&[ours]), f64::from(theirs), "bias {ours}");
            assert_eq!(untouched.double_value(&[ours, 0]), ours as f64);
        }
    }
}

#[test]
fn a_tensor_larger_than_what_is_decoded_at_once_comes_whole() {
    let (rows, columns) = (1000, 1000u64); // shares of threads and chunks that do not come out even
    let numbers: Vec<f32> = (0..rows * columns).map(|n| n as f32).collect();
    let mut file = GgufFile::llama();
    file.put("output.weight", &[columns, rows], &numbers);
    let saved = file.save();
    let read = weights(&saved.path).tensor("lm_head.weight", &[1000, 1000]).unwrap();
    assert!(values(&read) == numbers);
}

#[test]
fn the_head_dim_is_the_key_length_where_that_is_given() {
    let mut file = GgufFile::llama();
    assert_eq!(open(&file.save().path).unwrap().config().head_dim, 16);
    file.set("llama.attention.key_length", make::whole(32));
    assert_eq!(open(&file.save().path).unwrap().config().head_dim, 32);
}

#[test]
fn what_tensors_there_are_says_what_is_tied_and_biased() {
    let mut file = GgufFile::llama();
    let plain = open(&file.save().path).unwrap().config().clone();
    assert!(
        plain.tied_embeddings && !plain.attention_bias && !plain.output_bias && !plain.mlp_bias
    );
    for name in
        ["output.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias"]
    {
        file.put(name, &[1], &[0.0]);
    }
    let full = open(&file.save().path).unwrap().config().clone();
    assert!(!full.tied_embeddings && full.attention_bias && full.output_bias && full.mlp_bias);
}

#[test]
fn rope_scaling_is_read_from_the_metadata_too() {
    let mut file = GgufFile::llama();
    file.set("llama.rope.scaling.type", make::text("linear"));
    file.set("llama.rope.scaling.factor", make::real(4.0));
    let config = open(&file.save().path).unwrap().config().clone();
    assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(config.rope_theta, 10_000.0);

    // YaRN as llama.cpp has it: what it is told to multiply scores with comes on top of the paper's.
    let mut file = GgufFile::llama();
    file.set("llama.rope.scaling.type", make::text("yarn"));
    file.set("llama.rope.scaling.factor", make::real(4.0));
    file.set("llama.rope.scaling.original_context_length", make::whole(64));
    file.set("llama.context_length", make::whole(64));
    let config = |file: &GgufFile| open(&file.save().path).unwrap().config().clone();
    let paper = Yarn::new(4.0, 64);
    assert_eq!(config(&file).rope_scaling, RopeScaling::Yarn(paper));
    assert_eq!(config(&file).max_positions, 256, "the folder's rule");
    file.set("llama.rope.scaling.attn_factor", make::real(0.5));
    let RopeScaling::Yarn(found) = config(&file).rope_scaling else { panic!("no YaRN") };
    assert!((found.attention_factor - 0.5 * paper.attention_factor).abs() < 1e-12, "{found:?}");
}

#[test]
fn metadata_are_read_by_type() {
    let mut file = GgufFile::llama();
    file.version = 2;
    file.set("a.text", make::text("hé"));
    file.set("a.flag", make::flag(true));
    file.set("some.texts", make::texts(&["a", "", "Ġb"]));
    file.set("some.i32", make::list(5, 2, &[1, 0, 0, 0, 255, 255, 255, 255]));
    file.set("some.f32", make::list(6, 1, &1.5f32.to_le_bytes()));
    let saved = file.save();
    let Source::Gguf(gguf) = open(&saved.path).unwrap() else { panic!("not a GGUF file") };
    let metadata = gguf.metadata();
    assert_eq!(metadata.text("a.text").unwrap(), Some("hé"));
    assert_eq!(metadata.flag("a.flag").unwrap(), Some(true));
    assert_eq!(metadata.texts("some.texts").unwrap(), Some(vec!["a", "", "Ġb"]));
    assert_eq!(metadata.i32s("some.i32").unwrap(), Some(vec![1, -1]));
    assert_eq!(metadata.f32s("some.f32").unwrap(), Some(vec![1.5]));
    assert_eq!(metadata.token("llama.block_count").unwrap(), Some(1));
    assert_eq!(metadata.text("not.there").unwrap(), None);
    crate::says(&metadata.text("a.flag").unwrap_err(), &["model.gguf", "a.flag", "true", "a text"]);
    crate::says(&metadata.i32s("some.f32").unwrap_err(), &["some.f32", "a list of i32"]);
}
