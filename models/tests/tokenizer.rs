//! Token ids against `transformers`, and what a tokenizer must not do. tests/golden/tokenizer/make.py made the numbers.

use anyhow::{Context, Result};
use models::{
    ChatTemplate, Error, GgufVocabulary, Message, Model, RenderOptions, Specials, Tokenizer,
};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn json(name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(golden(name))?)?)
}

fn strings() -> Result<Vec<String>> {
    let strings = json("strings.json")?;
    let text = |value: &Value| match value {
        Value::Array(pair) => Some(pair[0].as_str()?.repeat(pair[1].as_u64()? as usize)),
        value => value.as_str().map(str::to_owned),
    };
    strings
        .as_array()
        .context("a list")?
        .iter()
        .map(|value| text(value).context("a text"))
        .collect()
}

fn ids(name: &str) -> Result<Vec<Vec<u32>>> {
    Ok(serde_json::from_value(json("expected.json")?[name].clone())?)
}

/// Texts or ids of the strings for which they are not what one would think.
fn exceptions<T: serde::de::DeserializeOwned>(name: &str) -> Result<HashMap<String, T>> {
    Ok(serde_json::from_value(json("expected.json")?[name].clone())?)
}

fn tiny() -> Result<Tokenizer> {
    Ok(Tokenizer::from_file(&golden("tiny/tokenizer.json"))?)
}

/// The vocabulary of tiny/ as a GGUF file would hold it.
fn tiny_gguf(pre: &str) -> Result<GgufVocabulary> {
    let model = json("tiny/tokenizer.json")?["model"].take();
    let vocab: HashMap<String, usize> = serde_json::from_value(model["vocab"].clone())?;
    let merges: Vec<[String; 2]> = serde_json::from_value(model["merges"].clone())?;
    let mut tokens = vec![String::new(); vocab.len()];
    for (token, id) in vocab {
        tokens[id] = token;
    }
    Ok(GgufVocabulary {
        path: "tiny.gguf".into(),
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        token_types: (0..tokens.len()).map(|id| if id < 4 { 3 } else { 1 }).collect(),
        tokens,
        merges: merges.iter().map(|pair| pair.join(" ")).collect(),
        bos: Some(0),
        add_bos: None,
    })
}

#[test]
fn every_pre_tokenizer_cuts_as_transformers_does() -> Result<()> {
    for pre in ["smollm", "llama-bpe", "qwen2", "gpt-2"] {
        let tokenizer = Tokenizer::from_gguf(&tiny_gguf(pre)?)?;
        for (text, wanted) in strings()?.iter().zip(ids(pre)?) {
            assert_eq!(tokenizer.encode(text, Specials::Parse)?, wanted, "{pre}: {text:?}");
        }
    }
    Ok(())
}

#[test]
fn llama_takes_a_word_whole_that_no_merge_makes() -> Result<()> {
    for (pre, wanted) in [("smollm", 3), ("llama-bpe", 1)] {
        let mut gguf = tiny_gguf(pre)?;
        gguf.tokens.push("zyx".to_owned());
        gguf.token_types.push(1);
        assert_eq!(
            Tokenizer::from_gguf(&gguf)?.encode("zyx", Specials::Parse)?.len(),
            wanted,
            "{pre}"
        );
    }
    Ok(())
}

#[test]
fn tokenizer_json_gives_the_ids_of_transformers_and_ignores_truncation_and_padding() -> Result<()> {
    let tokenizer = tiny()?;
    for (text, wanted) in strings()?.iter().zip(ids("tiny")?) {
        assert_eq!(tokenizer.encode_prompt(text)?, wanted, "{text:?}");
        assert_eq!(tokenizer.encode(text, Specials::Parse)?, wanted[1..], "{text:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn the_default_model_reads_and_writes_as_transformers_does() -> Result<()> {
    let cache = match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME")?).join(".cache"),
    };
    let file = cache.join("longctx/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let Model { tokenizer, template, .. } =
        Model::load(&file, tch::Kind::BFloat16, tch::Device::Cpu)?;

    let (as_text, decoded) = (exceptions::<Vec<u32>>("text")?, exceptions::<String>("decoded")?);
    for (index, (text, wanted)) in strings()?.iter().zip(ids("smollm2")?).enumerate() {
        let index = index.to_string();
        assert_eq!(tokenizer.encode(text, Specials::Parse)?, wanted, "{text:?}");
        assert_eq!(tokenizer.encode_prompt(text)?, wanted, "SmolLM2 adds no BOS: {text:?}");
        assert_eq!(
            &tokenizer.encode(text, Specials::Text)?,
            as_text.get(&index).unwrap_or(&wanted),
            "{text:?}"
        );
        assert_eq!(
            &tokenizer.decode(&wanted, true)?,
            decoded.get(&index).unwrap_or(text),
            "{text:?}"
        );
    }
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.special_ids(), (0..17).collect::<Vec<_>>());

    let (before, after) = template.context("a template")?.around("Hi")?;
    assert!(before.starts_with("<|im_start|>system\nYou are a helpful AI assistant"), "{before}");
    assert!(before.ends_with("<|im_start|>user\nHi"), "{before}");
    assert_eq!(after, "<|im_end|>\n<|im_start|>assistant\n");
    Ok(())
}

#[test]
fn a_prompt_has_exactly_one_bos_whoever_writes_it() -> Result<()> {
    let (tokenizer, bos) = (tiny()?, 0);
    let count = |ids: &[u32]| ids.iter().filter(|&&id| id == bos).count();

    let template = ChatTemplate::from_folder(&golden("tiny"))?.context("a template")?;
    let prompt = template.render(&[Message::user("hello")], &RenderOptions::default())?;
    let templated = tokenizer.encode(&prompt, Specials::Parse)?;
    assert_eq!((templated[0], count(&templated)), (bos, 1));

    let raw = tokenizer.encode_prompt("hello")?;
    assert_eq!((raw[0], count(&raw)), (bos, 1));

    for (pre, add_bos, wanted) in [
        ("smollm", None, 0),
        ("smollm", Some(true), 1),
        ("llama-bpe", None, 1),
        ("llama-bpe", Some(false), 0),
        ("llama-bpe", Some(true), 1),
    ] {
        let tokenizer = Tokenizer::from_gguf(&GgufVocabulary { add_bos, ..tiny_gguf(pre)? })?;
        assert_eq!(count(&tokenizer.encode_prompt("hello")?), wanted, "{pre} {add_bos:?}");
        assert_eq!(count(&tokenizer.encode("hello", Specials::Parse)?), 0, "{pre} {add_bos:?}");
    }
    Ok(())
}

#[test]
fn special_tokens_in_foreign_text_are_text_but_user_defined_ones_match() -> Result<()> {
    let tokenizer = tiny()?;
    let (end, tool) = (tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<tool>"));
    let has = |ids: &[u32], id: Option<u32>| ids.iter().any(|&other| Some(other) == id);
    let text = "a<|im_end|>b<tool>c";
    let parsed = tokenizer.encode(text, Specials::Parse)?;
    assert!(has(&parsed, end) && has(&parsed, tool));
    let plain = tokenizer.encode(text, Specials::Text)?;
    assert!(!has(&plain, end) && has(&plain, tool));
    assert_eq!(tokenizer.decode(&plain, true)?, text);
    assert_eq!(tokenizer.decode(&parsed, true)?, "ab<tool>c");

    let mut gguf = tiny_gguf("smollm")?;
    gguf.token_types[3] = 4;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    assert!(has(&tokenizer.encode(text, Specials::Text)?, end));
    assert_eq!(tokenizer.special_ids(), [0, 1, 2]);
    Ok(())
}

#[test]
fn ids_beyond_the_vocabulary_and_unused_ones_decode_to_nothing() -> Result<()> {
    let mut gguf = tiny_gguf("qwen2")?;
    let used = gguf.tokens.len();
    gguf.tokens.extend((used..used + 9).map(|id| format!("[PAD{id}]")));
    gguf.token_types.extend([5; 9]);
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    assert_eq!(tokenizer.vocab_size(), used);

    let mut ids = tokenizer.encode("caf\u{e9}", Specials::Parse)?;
    ids.extend([used as u32, used as u32 + 8, 151_935, u32::MAX]);
    assert_eq!(tokenizer.decode(&ids, false)?, "caf\u{e9}");
    let mut stream = tokenizer.stream();
    let text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
    assert_eq!((text.as_str(), stream.finish()), ("caf\u{e9}", None));
    Ok(())
}

#[test]
fn a_stream_writes_what_decode_writes_and_never_half_a_character() -> Result<()> {
    let tokenizer = tiny()?;
    let mut held_back = 0;
    for text in strings()? {
        let ids = tokenizer.encode(&text, Specials::Parse)?;
        let mut stream = tokenizer.stream();
        let pieces: Vec<_> = ids.iter().map(|&id| stream.push(id)).collect();
        held_back += pieces.iter().filter(|piece| piece.is_none()).count();
        for piece in pieces.iter().flatten() {
            assert!(!piece.is_empty(), "{text:?}");
            assert!(!piece.contains('\u{fffd}') || text.contains('\u{fffd}'), "{text:?}");
        }
        let streamed: String = pieces.into_iter().flatten().chain(stream.finish()).collect();
        assert_eq!(streamed, tokenizer.decode(&ids, true)?, "{text:?}");
    }
    assert!(
        held_back > 1000,
        "the strings have characters of many tokens, but only {held_back} waited"
    );
    Ok(())
}

#[test]
fn a_stream_does_not_wait_for_bytes_that_will_never_be_a_character() -> Result<()> {
    let tokenizer = tiny()?;
    let emoji = tokenizer.encode("\u{1f600}", Specials::Parse)?;
    assert_eq!(emoji.len(), 4);

    let mut stream = tokenizer.stream();
    assert_eq!(emoji[..3].iter().filter_map(|&id| stream.push(id)).count(), 0);
    assert_eq!(stream.finish().as_deref(), Some("\u{fffd}"));

    let mut stream = tokenizer.stream();
    let pieces: Vec<_> = (0..100).filter_map(|_| stream.push(emoji[1])).collect();
    assert!(pieces.len() > 90, "only {} pieces of 100 stray bytes", pieces.len());

    let mut stream = tokenizer.stream();
    let broken = [emoji[0], emoji[1], tokenizer.token_to_id("a").context("a")?];
    assert_eq!(broken.map(|id| stream.push(id)).concat_pieces(), "\u{fffd}a");
    Ok(())
}

/// A tokenizer of `tokens`, the first of them special, with these decoders.
fn with_decoders(tokens: &[&str], decoders: Value) -> Result<Tokenizer> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), id.into())).collect();
    let special = serde_json::json!({
        "id": 0, "content": tokens[0], "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false
    });
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [special],
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
        "decoder": {"type": "Sequence", "decoders": decoders}
    });
    std::fs::write(&path, file.to_string())?;
    Ok(Tokenizer::from_file(&path)?)
}

#[test]
fn a_stream_does_not_lose_the_space_after_a_skipped_token() -> Result<()> {
    let decoders = serde_json::json!([{"type": "Metaspace", "replacement": "\u{2581}"}]);
    let tokenizer = with_decoders(&["<s>", "\u{2581}a"], decoders)?;
    let mut stream = tokenizer.stream();
    assert_eq!([0, 1, 1, 0, 0, 1].map(|id| stream.push(id)).concat_pieces(), "a a a");
    Ok(())
}

#[test]
fn a_stream_keeps_runs_of_byte_fallback_together_and_goes_on_after_a_broken_one() -> Result<()> {
    let decoders = serde_json::json!([{"type": "ByteFallback"}, {"type": "Fuse"}]);
    let tokenizer = with_decoders(&["<s>", "<0xE2>", "<0x82>", "<0xAC>", "a"], decoders)?;
    let mut stream = tokenizer.stream();
    let euros = [1, 2, 3, 1, 2, 3, 4, 1, 2, 3];
    assert_eq!(euros.map(|id| stream.push(id)).concat_pieces(), "\u{20ac}\u{20ac}a\u{20ac}");
    let broken = [4, 1, 2, 3, 2, 4, 2, 2, 2, 2, 2, 4];
    let wanted = "a\u{20ac}\u{fffd}a\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}a";
    assert_eq!(broken.map(|id| stream.push(id)).concat_pieces(), wanted);
    assert_eq!([1, 2].map(|id| stream.push(id)).concat_pieces(), "");
    assert_eq!(stream.finish().as_deref(), Some("\u{fffd}\u{fffd}"));
    Ok(())
}

trait ConcatPieces {
    fn concat_pieces(self) -> String;
}

impl<const N: usize> ConcatPieces for [Option<String>; N] {
    fn concat_pieces(self) -> String {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn a_vocabulary_that_cannot_be_right_is_refused_with_file_and_advice() -> Result<()> {
    type Spoil = fn(&mut GgufVocabulary);
    let cases: [(&str, Spoil); 9] = [
        ("tokenizer.ggml.pre foo is not supported", |v| v.pre = Some("foo".into())),
        ("tokenizer.ggml.pre (missing) is not supported", |v| v.pre = None),
        ("tokenizer.ggml.model llama is not supported", |v| v.model = "llama".into()),
        ("token types", |v| v.token_types.clear()),
        ("merge \"ab\" is not two tokens", |v| v.merges.push("ab".into())),
        ("out of vocabulary", |v| v.merges.push("a \u{6f22}".into())),
        ("out of vocabulary", |v| v.tokens.truncate(300)),
        ("names none", |v| (v.add_bos, v.bos) = (Some(true), None)),
        ("BOS is 9999", |v| (v.add_bos, v.bos) = (Some(true), Some(9999))),
    ];
    for (wanted, spoil) in cases {
        let mut vocabulary = tiny_gguf("smollm")?;
        spoil(&mut vocabulary);
        if wanted == "out of vocabulary" {
            vocabulary.token_types.truncate(vocabulary.tokens.len());
        }
        let error = Tokenizer::from_gguf(&vocabulary).expect_err(wanted);
        assert!(matches!(
            error,
            Error::Tokenizer { .. } | Error::Unsupported { .. } | Error::Format { .. }
        ));
        let text = error.to_string();
        assert!(
            text.starts_with("tiny.gguf: ") && text.contains(wanted) && text.contains("; "),
            "{text}"
        );
    }
    Ok(())
}

#[test]
fn a_tokenizer_file_that_is_missing_or_broken_is_a_typed_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    assert!(matches!(Tokenizer::from_file(&path), Err(Error::Io { .. })));
    let whole = std::fs::read_to_string(golden("tiny/tokenizer.json"))?;
    for broken in ["", "{}", "[1]", &whole[..whole.len() / 2], &whole.replace("\"BPE\"", "\"Foo\"")]
    {
        std::fs::write(&path, broken)?;
        let error = Tokenizer::from_file(&path).expect_err("broken");
        assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
        assert!(error.to_string().contains("tokenizer.json: "), "{error}");
    }
    Ok(())
}
