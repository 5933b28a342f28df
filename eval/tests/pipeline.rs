//! `longctx generate` beside kvpress's pipeline: the same answers, word for word, and as much removed.
#![cfg(feature = "models")]

mod common;

use anyhow::{Context, Result};
use common::longctx;
use models::{Specials, Tokenizer};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn generate(model: &Path, arguments: &[&str]) -> Result<Value> {
    let mut command = longctx(&["generate", "--json", "--model"]);
    let output = command.arg(model).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).with_context(|| said.into_owned())
}

fn texts(answers: &Value) -> Vec<&str> {
    answers.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn questions_about_a_pruned_context_get_the_answers_that_kvpress_gives() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = std::fs::read(here.join("tests/golden/pipeline/pipeline.json"))?;
    let golden: Value = serde_json::from_slice(&golden)?;
    let model =
        std::env::var("LONGCTX_MODEL").context("`cargo xtask ci` names the default model")?;
    let tokens = golden["tokens"].to_string();
    for case in golden["cases"].as_array().context("cases")? {
        let name = case["name"].as_str().context("a name")?;
        let context = case["context"].as_str().or(golden["context"].as_str());
        let mut arguments =
            vec!["--max-tokens", &tokens, "--prompt", context.context("a context")?];
        let threshold = case["threshold"].to_string();
        let surrogate: PathBuf;
        if let Some(kind) = case["surrogate"].as_str() {
            surrogate = here.join(format!("../kvzap/surrogates/smollm2-135m-instruct-{kind}"));
            arguments.extend(["--surrogate", surrogate.to_str().context("UTF-8")?]);
            arguments.extend(["--threshold", &threshold]);
        }
        let questions = texts(&case["questions"]);
        for question in questions.iter().filter(|question| !question.is_empty()) {
            arguments.extend(["--question", question]);
        }
        let found = generate(model.as_ref(), &arguments)?;
        let answers = found["answers"].as_array().context("answers")?;
        let answers: Vec<_> = answers.iter().filter_map(|answer| answer["text"].as_str()).collect();
        assert_eq!(answers, texts(&case["answers"]), "{name}");
        let [found, wanted] = [&found["removed"], &case["removed"]].map(|share| share.as_f64());
        let [found, wanted] = [found.context("removed")?, wanted.context("removed")?];
        assert!((found - wanted).abs() < 1e-3, "{name}: removed {found}, kvpress {wanted}");
    }
    Ok(())
}

#[test]
fn a_model_without_a_template_reads_a_prompt_after_the_bos_that_its_tokenizer_adds() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("model");
    common::tiny_model(&model);
    std::fs::remove_file(model.join("chat_template.jinja"))?;
    let tokenizer = Tokenizer::from_file(&model.join("tokenizer.json"))?;
    let prompt = "once upon a time";
    let wanted = tokenizer.encode(&format!("<s>{prompt}"), Specials::Parse)?.len();
    let found = generate(&model, &["--prompt", prompt, "--max-tokens", "1"])?;
    assert_eq!(found["context_tokens"], wanted);
    Ok(())
}
