//! What is said of GGUF files that cannot be read.

use crate::make::{self, F32, GgufFile, save};
use crate::{refusal, says, tensor_refusal};
use models::{Error, open};

/// The refusal of a small Llama that `spoil` has changed.
fn spoilt(spoil: impl FnOnce(&mut GgufFile)) -> Error {
    let mut file = GgufFile::llama();
    spoil(&mut file);
    refusal(&file.save().path)
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let mut file = GgufFile::llama();
    file.set("some.texts", make::texts(&["a", "b"]));
    let bytes = file.bytes();
    for length in 0..bytes.len() {
        let saved = save("cut.gguf", &bytes[..length]);
        let error = refusal(&saved.path);
        assert!(matches!(error, Error::Format { .. } | Error::Io { .. }), "{length}: {error}");
    }
    says(
        &refusal(&save("cut.gguf", &bytes[..bytes.len() - 1]).path),
        &["cut.gguf", "token_embd.weight", &format!("within the file's {} bytes", bytes.len() - 1)],
    );
}

#[test]
fn other_formats_and_versions_are_named() {
    let other = save("model.gguf", b"PK\x03\x04 and so on");
    says(&refusal(&other.path), &["model.gguf", "magic", r#""PK\x03\x04""#, "GGUF"]);
    for (version, found) in [(1, "version is 1,"), (4, "version is 4,"), (3 << 24, "(big-endian)")]
    {
        says(&spoilt(|file| file.version = version), &[found, "2 or 3"]);
    }
}

#[test]
fn hostile_counts_and_lengths_are_refused_at_once() {
    for error in [
        spoilt(|file| file.tensor_count = Some(u64::MAX)),
        spoilt(|file| file.value_count = Some(u64::MAX)),
        spoilt(|file| file.set("key", make::list(8, u64::MAX, &[]))),
        spoilt(|file| file.set("key", make::list(12, u64::MAX, &[]))),
        spoilt(|file| file.set("key", make::list(12, (1 << 61) + 1, &[]))),
        spoilt(|file| file.set("key", [&8u32.to_le_bytes()[..], &[255; 8]].concat())),
        spoilt(|file| file.set("key", make::list(9, 1, &[9; 64]))),
        spoilt(|file| file.set("key", vec![13, 0, 0, 0])),
    ] {
        assert!(matches!(error, Error::Format { .. }), "{error}");
    }
}

#[test]
fn dimensions_whose_product_wraps_are_refused() {
    const Q4_1: u32 = 3;
    for (kind, dims) in [
        (F32, vec![1 << 32, 1 << 32]),
        (F32, vec![(1 << 63) + 2, 2]),
        (F32, vec![1 << 40, 1 << 40]),
        (F32, vec![1 << 62]),
        (F32, vec![1 << 20; 4]),
        (Q4_1, vec![33, 1]),
        (Q4_1, vec![16, 2]),
    ] {
        let error = spoilt(|file| file.put_bytes("bad", &dims, kind, vec![0; 16]));
        says(&error, &["the shape of tensor bad", &dims[0].to_string(), "within the file"]);
    }
    let error = spoilt(|file| file.put_bytes("bad", &[1; 5], F32, vec![0; 4]));
    says(&error, &["tensor bad is 5", "1 to 4"]);
}

#[test]
fn tensors_lie_inside_the_file_and_once() {
    let at = |offset| {
        spoilt(|file| {
            file.put("bad", &[8], &[0.0; 8]);
            file.tensors[1].offset = Some(offset);
        })
    };
    says(&at(u64::MAX - 31), &["tensor bad", "within the file"]);
    says(&at(1 << 40), &["tensor bad", "within the file"]);
    says(&at(4), &["the offset of tensor bad", "a multiple of 32"]);
    let twice = spoilt(|file| file.tensors.push(file.tensors[0].clone()));
    says(&twice, &["tensor token_embd.weight", "twice"]);
    let twice = spoilt(|file| file.values.push(file.values[0].clone()));
    says(&twice, &["key general.architecture", "twice"]);
    says(&spoilt(|file| file.set("general.alignment", make::whole(0))), &["general.alignment"]);
    says(&spoilt(|file| file.set("general.alignment", make::whole(48))), &["general.alignment"]);
}

#[test]
fn missing_tensors_are_named() {
    let file = GgufFile::llama().save();
    let error = tensor_refusal(
        open(&file.path).unwrap(),
        "model.layers.0.self_attn.q_proj.weight",
        &[64, 64],
    );
    assert!(matches!(error, Error::MissingTensor { .. }));
    says(&error, &["model.gguf", "blk.0.attn_q.weight"]);
    says(&spoilt(|file| file.tensors.clear()), &["token_embd.weight is missing"]);
}

#[test]
fn wrong_shapes_are_named() {
    let file = GgufFile::llama().save();
    let error = tensor_refusal(open(&file.path).unwrap(), "model.embed_tokens.weight", &[9, 64]);
    assert!(matches!(error, Error::WrongShape { .. }));
    says(&error, &["model.gguf", "token_embd.weight", "[8, 64]", "[9, 64]"]);
}

#[test]
fn queries_and_keys_consist_of_whole_heads() {
    let mut file = GgufFile::llama();
    file.put("blk.0.attn_k.weight", &[64, 24], &[1.0; 64 * 24]);
    let file = file.save();
    let name = "model.layers.0.self_attn.k_proj.weight";
    let error = tensor_refusal(open(&file.path).unwrap(), name, &[24, 64]);
    says(&error, &["model.gguf", "rows of tensor blk.0.attn_k.weight is 24", "head dim 16"]);
}

#[test]
fn unreadable_types_are_named_when_they_are_needed() {
    const Q2_K: u32 = 10;
    let mut file = GgufFile::llama();
    file.put_bytes("output_norm.weight", &[64], Q2_K, vec![]);
    let file = file.save();
    let error = tensor_refusal(open(&file.path).unwrap(), "model.norm.weight", &[64]);
    assert!(matches!(error, Error::WrongDtype { .. }));
    says(&error, &["model.gguf", "output_norm.weight", "Q2_K", "Q4_K"]);
}

#[test]
fn weights_that_are_not_finite_are_named() {
    const Q8_0: u32 = 8;
    let infinity = [0x00, 0x7c];
    for (spoil, bytes) in [
        (F32, [[0; 4]; 63].concat().into_iter().chain(f32::NAN.to_le_bytes()).collect::<Vec<_>>()),
        (F32, [f32::NEG_INFINITY.to_le_bytes(); 64].concat()),
        (Q8_0, [&[0; 34][..], &infinity, &[1; 32]].concat()),
    ] {
        let mut file = GgufFile::llama();
        file.put_bytes("output_norm.weight", &[64], spoil, bytes);
        let file = file.save();
        let error = tensor_refusal(open(&file.path).unwrap(), "model.norm.weight", &[64]);
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        says(&error, &["model.gguf", "output_norm.weight"]);
    }
}

#[test]
fn what_the_architecture_lacks_is_refused() {
    let error = spoilt(|file| file.set("general.architecture", make::text("mamba")));
    assert!(matches!(error, Error::UnknownArchitecture { .. }));
    says(&error, &["model.gguf", "mamba", "llama, qwen3, olmo2"]);
    for (key, value, found) in [
        ("llama.rope.scaling.type", make::text("longrope"), "\"longrope\""),
        ("llama.rope.dimension_count", make::whole(8), "8"),
        ("llama.attention.value_length", make::whole(32), "32"),
        ("llama.expert_count", make::whole(4), "4"),
        ("split.count", make::whole(2), "2"),
    ] {
        let error = spoilt(|file| file.set(key, value));
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        says(&error, &["model.gguf", key, found]);
    }
}

#[test]
fn configs_that_no_model_has_are_refused() {
    for (key, value, part) in [
        ("llama.attention.head_count", make::whole(0), "query heads is 0"),
        (
            "llama.attention.head_count",
            make::list(4, 1, &[4, 0, 0, 0]),
            "llama.attention.head_count",
        ),
        ("llama.attention.head_count_kv", make::whole(3), "4 for 3"),
        ("llama.attention.key_length", make::whole(15), "head dim is 15"),
        ("llama.block_count", make::whole(u32::MAX), "layers is 4294967295"),
        ("llama.block_count", make::text("1"), "llama.block_count is a text"),
        ("llama.context_length", make::whole(0), "context length is 0"),
        ("llama.rope.freq_base", make::real(f32::NAN), "theta is NaN"),
        ("llama.attention.layer_norm_rms_epsilon", make::real(-1.0), "epsilon is -1"),
    ] {
        let error = spoilt(|file| file.set(key, value));
        assert!(matches!(error, Error::Format { .. }), "{error}");
        says(&error, &["model.gguf", part]);
    }
    let error = spoilt(|file| file.values.retain(|(key, _)| key != "llama.embedding_length"));
    says(&error, &["llama.embedding_length is absent"]);
}
