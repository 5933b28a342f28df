//! Chat templates against `transformers`. tests/golden/tokenizer/make.py made what is expected.

use anyhow::{Context, Result};
use models::{ChatTemplate, Error, Message, RenderOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer").join(name)
}

fn template(source: &str) -> models::Result<ChatTemplate> {
    let specials = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    ChatTemplate::from_source(Path::new("some/model.gguf"), source, specials)
}

fn rendered(source: &str, message: Value) -> models::Result<String> {
    template(source)?.render(&[message], &RenderOptions::default())
}

#[test]
fn chats_are_rendered_as_by_transformers() -> Result<()> {
    let chats: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(golden("chats.json"))?)?;
    for chat in chats {
        let text = |key: &str| chat[key].as_str();
        let path =
            golden("templates").join(text("template").context("template")?).with_extension("jinja");
        let template =
            ChatTemplate::from_source(&path, &std::fs::read_to_string(&path)?, BTreeMap::new())?;
        let options = RenderOptions {
            add_generation_prompt: chat["add_generation_prompt"] == true,
            tools: Some(chat["tools"].clone()).filter(|tools| !tools.is_null()),
            variables: chat["variables"].as_object().context("variables")?.clone(),
            now: Some(
                SystemTime::UNIX_EPOCH + Duration::from_secs(chat["now"].as_u64().context("now")?),
            ),
        };
        let found = template.render(chat["messages"].as_array().context("messages")?, &options);
        match text("expected") {
            Some(wanted) => assert_eq!(found?, wanted, "{}", path.display()),
            None => assert!(matches!(found, Err(Error::Template { .. })), "{}", path.display()),
        }
    }
    Ok(())
}

#[test]
fn tojson_is_pythons() -> Result<()> {
    let value = r#"{"b":1,"a":"x<y & 'z' é — /","l":[1,2]}"#;
    let message =
        || Ok::<_, serde_json::Error>(json!({ "t": serde_json::from_str::<Value>(value)? }));
    let of = |call: &str| -> Result<String> {
        Ok(rendered(&format!("{{{{ messages[0].t | tojson{call} }}}}"), message()?)?)
    };
    let plain = r#"{"b": 1, "a": "x<y & 'z' é — /", "l": [1, 2]}"#;
    assert_eq!(of("")?, plain);
    assert_eq!(of("(ensure_ascii=false)")?, plain);
    assert_eq!(of("(ensure_ascii=true)")?, plain.replace('é', "\\u00e9").replace('—', "\\u2014"));
    let indented = "{\n    \"b\": 1,\n    \"a\": \"x<y & 'z' é — /\",\n    \"l\": [\n        1,\n        2\n    ]\n}";
    assert_eq!(of("(indent=4)")?, indented);
    assert!(of("(colour=true)").is_err());
    Ok(())
}

#[test]
fn a_folders_template_file_wins_over_its_config() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    let load = || ChatTemplate::from_folder(folder.path());
    let render = |tools: Option<Value>| -> Result<String> {
        let options = RenderOptions { tools, ..Default::default() };
        Ok(load()?.context("a template")?.render(&[Message::user("hi")], &options)?)
    };
    assert!(load()?.is_none(), "an empty folder brings none");
    write("tokenizer_config.json", r#"{"bos_token": "<s>", "chat_template": null}"#)?;
    assert!(load()?.is_none(), "nor does a config without one");

    let tool_use = r#"{"name": "tool_use", "template": "tools"}"#;
    let default = r#"{"name": "default", "template": "{{ bos_token }}{{ eos_token }} list"}"#;
    let specials = r#""bos_token": {"content": "<b>", "special": true}, "eos_token": "<e>""#;
    let config = |list: &str| {
        write("tokenizer_config.json", &format!("{{{specials}, \"chat_template\": {list}}}"))
    };
    let other = r#"{"name": "rag", "template": "{% frobnicate %}"}"#;
    config(&format!("[{tool_use}, {default}, {other}]"))?;
    assert_eq!(
        (render(None)?, render(Some(json!([])))?),
        ("<b><e> list".to_owned(), "tools".to_owned())
    );
    config(&format!("[{tool_use}]"))?;
    assert!(matches!(load(), Err(Error::Format { .. })), "no default");
    for wrong in ["7", r#"[{"name": "default"}]"#, "{"] {
        config(wrong)?;
        assert!(matches!(load(), Err(Error::Format { .. })), "{wrong}");
    }
    config(r#""config {{ bos_token }}""#)?;
    assert_eq!(
        (render(None)?, render(Some(json!([])))?),
        ("config <b>".to_owned(), "config <b>".to_owned())
    );

    write("chat_template.jinja", "file {{ bos_token }}\n")?;
    assert_eq!(render(None)?, "file <b>");
    std::fs::create_dir(folder.path().join("chat_templates"))?;
    write("chat_templates/tool_use.jinja", "tool file")?;
    assert_eq!(
        (render(None)?, render(Some(json!([])))?),
        ("file <b>".to_owned(), "tool file".to_owned())
    );
    std::fs::remove_file(folder.path().join("tokenizer_config.json"))?;
    assert_eq!(render(None)?, "file ");
    Ok(())
}

#[test]
fn what_a_template_may_not_do_is_an_error_with_file_template_and_line() {
    for (source, line, wanted) in [
        ("a\n{% frobnicate x %}", 2, "frobnicate"),
        ("a\n\n{{ messages | frobnicate }}", 3, "frobnicate"),
        ("a\n{{ messages[0].content.frobnicate() }}", 2, "frobnicate"),
        ("{{ unclosed", 1, "unexpected"),
        ("{% if true %}", 1, "unexpected"),
        ("\n{{ frobnicate(1) }}", 2, "frobnicate"),
        ("{% include 'other' %}", 1, "other"),
        ("\n{{ raise_exception('only users, please') }}", 2, "only users, please"),
        ("{{ strftime_now('%Q') }}", 1, "%Q"),
        ("{{ messages[0].nothing | tojson }}", 1, "undefined"),
    ] {
        let error = rendered(source, json!({"role": "user", "content": "hi"})).expect_err(source);
        let text = error.to_string();
        assert!(
            matches!(error, Error::Template { line: found, .. } if found == line),
            "{source}: {text}"
        );
        assert!(text.starts_with("some/model.gguf: chat template default, line "), "{text}");
        assert!(text.contains(wanted) && text.contains("; "), "{text}");
    }
}

#[test]
fn the_prompt_is_split_behind_the_context() -> Result<()> {
    let chatml = template(&std::fs::read_to_string(golden("templates/chatml.jinja"))?)?;
    for content in
        ["", "one", "a # b ## c", "###############", "<|im_end|>", "\u{6f22}\u{5b57} ", "{{ x }}"]
    {
        let (before, after) = chatml.around(content)?;
        assert!(before.ends_with(&format!("<|im_start|>user\n{content}")), "{before}");
        assert_eq!(after, "<|im_end|>\n<|im_start|>assistant\n");
    }
    let thinking = template(&std::fs::read_to_string(golden("templates/thinking.jinja"))?)?;
    let (before, after) = thinking.around(" context ")?;
    assert_eq!(before, "<|im_start|>user\n context ");
    assert_eq!(after, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    let (_, after) = thinking.around_thinking(" context ")?;
    assert_eq!(after, "<|im_end|>\n<|im_start|>assistant\n");
    let header = template(&std::fs::read_to_string(golden("templates/header.jinja"))?)?;
    let (before, after) = header.around(" context ")?;
    assert!(before.starts_with("<s>") && before.ends_with("\n\ncontext "), "{before}");
    assert_eq!(after, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");

    for source in [
        "nothing",
        "{{ messages[0].content * 2 }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
    ] {
        assert!(
            matches!(template(source)?.around("context"), Err(Error::Template { .. })),
            "{source}"
        );
    }
    Ok(())
}

#[test]
fn dates_are_the_calendars() -> Result<()> {
    let template = template("{{ strftime_now('%Y-%m-%d %H:%M:%S %A %b %y%%') }}")?;
    for (seconds, wanted) in [
        (0, "1970-01-01 00:00:00 Thursday Jan 70%"),
        (951_782_399, "2000-02-28 23:59:59 Monday Feb 00%"),
        (951_782_400, "2000-02-29 00:00:00 Tuesday Feb 00%"),
        (1_735_689_599, "2024-12-31 23:59:59 Tuesday Dec 24%"),
        (4_107_542_400, "2100-03-01 00:00:00 Monday Mar 00%"),
    ] {
        let now = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let options = RenderOptions { now, ..Default::default() };
        assert_eq!(template.render::<Message>(&[], &options)?, wanted);
    }
    Ok(())
}
