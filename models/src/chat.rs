//! From messages to a prompt, by the model's own Jinja template, as `transformers` renders it.

mod python;

use crate::error::{Error, Result};
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The templates of one model, and the special tokens they may name.
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    specials: BTreeMap<String, String>,
}

/// One turn of a conversation. Templates also accept anything else that serialises to a map with these two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// What a template is told beside the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Whether to open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// JSON schemas of functions, a list. With them the template `tool_use` is used if there is one.
    pub tools: Option<serde_json::Value>,
    /// Variables of this template alone, such as `enable_thinking`.
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// What `strftime_now` calls now, in UTC; `None` for the clock.
    pub now: Option<SystemTime>,
}

impl Message {
    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }

    /// What the model is told to be.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_owned(), content: content.into() }
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".to_owned(), content: content.into() }
    }
}

impl ChatTemplate {
    /// A model's only template. `path` says where it came from, for errors; `specials` are the variables
    /// `bos_token`, `eos_token` and so on. A template that cannot be parsed is an error here, not when rendered.
    pub fn from_source(
        path: &Path,
        source: &str,
        specials: BTreeMap<String, String>,
    ) -> Result<Self> {
        Self::new(path, [(DEFAULT.to_owned(), source.to_owned())], specials)
    }

    /// The templates of a Hugging Face folder, or `None` if it brings none.
    ///
    /// `chat_template.jinja` (with `chat_templates/*.jinja` beside it) comes before `chat_template` in
    /// tokenizer_config.json, which is a string or a list of `{"name", "template"}`. The special tokens come from
    /// tokenizer_config.json.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let config_path = folder.join("tokenizer_config.json");
        let config: serde_json::Value = match read(&config_path)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| Error::Format {
                path: config_path.clone(),
                what: "the file".to_owned(),
                wanted: "JSON".to_owned(),
                found: error.to_string(),
                advice: "fetch it again",
            })?,
            None => serde_json::Value::Null,
        };
        let specials = SPECIALS.iter().filter_map(|&name| {
            let token = &config[name];
            let token = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.to_owned(), token.to_owned()))
        });
        let specials = specials.collect();

        let file = folder.join("chat_template.jinja");
        if let Some(source) = read(&file)? {
            let mut templates = vec![(DEFAULT.to_owned(), source)];
            if let Some(source) =
                read(&folder.join("chat_templates").join(TOOL_USE).with_extension("jinja"))?
            {
                templates.push((TOOL_USE.to_owned(), source));
            }
            return Self::new(&file, templates, specials).map(Some);
        }
        let templates = match &config["chat_template"] {
            serde_json::Value::Null => return Ok(None),
            serde_json::Value::String(source) => Some(vec![(DEFAULT.to_owned(), source.clone())]),
            list => serde_json::from_value::<Vec<Named>>(list.clone())
                .ok()
                .map(|list| list.into_iter().map(|named| (named.name, named.template)).collect()),
        };
        let templates: Vec<_> = templates.ok_or_else(|| Error::Format {
            path: config_path.clone(),
            what: "chat_template".to_owned(),
            wanted: "a string, or a list of objects with name and template".to_owned(),
            found: "something else".to_owned(),
            advice: "correct it, or put the template into chat_template.jinja",
        })?;
        Self::new(&config_path, templates, specials).map(Some)
    }

    fn new(
        path: &Path,
        templates: impl IntoIterator<Item = (String, String)>,
        specials: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| Ok(write!(out, "{}", python::text(value)?)?));
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: &Value| python::text(value).map(Cow::into_owned));
        environment.add_function("raise_exception", python::raise_exception);
        // Others are of no use here, and need not parse.
        for (name, source) in
            templates.into_iter().filter(|(name, _)| [DEFAULT, TOOL_USE].contains(&name.as_str()))
        {
            environment
                .add_template_owned(name.clone(), without_generation_tags(&source))
                .map_err(|error| failed(path, &name, &error))?;
        }
        if environment.get_template(DEFAULT).is_err() {
            return Err(Error::Format {
                path: path.to_owned(),
                what: "chat_template".to_owned(),
                wanted: "a template named default".to_owned(),
                found: "none of this name".to_owned(),
                advice: "name one of its templates so",
            });
        }
        Ok(Self { path: path.to_owned(), environment, specials })
    }

    /// The prompt for `messages`: [`Message`]s, or maps with whatever more the template reads (`tool_calls`, …).
    ///
    /// It has the BOS that the template writes: encode it with [`Tokenizer::encode`](crate::Tokenizer::encode),
    /// which adds no second.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String> {
        let has_tool_use = self.environment.get_template(TOOL_USE).is_ok();
        let name = if options.tools.is_some() && has_tool_use { TOOL_USE } else { DEFAULT };
        let now = options.now;
        let strftime_now = Value::from_function(move |format: &str| {
            python::strftime(format, now.unwrap_or_else(SystemTime::now))
        });
        let mut context: BTreeMap<&str, Value> = self
            .specials
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())))
            .collect();
        context.insert("strftime_now", strftime_now);
        context.insert("messages", Value::from_serialize(messages));
        context.insert("tools", Value::from_serialize(&options.tools));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(options.add_generation_prompt));
        context.extend(
            options
                .variables
                .iter()
                .map(|(name, value)| (name.as_str(), Value::from_serialize(value))),
        );
        let context: Value = context.into_iter().collect();
        let failed = |error| failed(&self.path, name, &error);
        self.environment.get_template(name).map_err(failed)?.render(context).map_err(failed)
    }

    /// What stands before and after a question about `content`: the user's turn up to and with `content`, and from there
    /// to the assistant's turn. The question goes between, and an answer's beginning goes after the second.
    ///
    /// This is kvpress's split: no system message but the template's own, and `enable_thinking` is false.
    pub fn around(&self, content: &str) -> Result<(String, String)> {
        self.split(content, false)
    }

    /// The same for an answer before which the model thinks, if it can: `enable_thinking` is true.
    pub fn around_thinking(&self, content: &str) -> Result<(String, String)> {
        self.split(content, true)
    }

    fn split(&self, content: &str, thinking: bool) -> Result<(String, String)> {
        let mark = "#".repeat(content.chars().count() + 10); // longer than any run of # in it
        let options = RenderOptions {
            add_generation_prompt: true,
            variables: [("enable_thinking".to_owned(), thinking.into())].into_iter().collect(),
            ..Default::default()
        };
        let prompt = self.render(&[Message::user([content, &mark].concat())], &options)?;
        // The last place it fits: a content that ends in # keeps them.
        match prompt.rsplit_once(&mark) {
            Some((before, after)) if !before.contains(&mark) => {
                Ok((before.to_owned(), after.to_owned()))
            }
            _ => Err(Error::Template {
                path: self.path.clone(),
                template: DEFAULT.to_owned(),
                line: 1,
                what: "does not write a user's message once and unchanged".to_owned(),
                advice: "give the whole prompt instead",
            }),
        }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.environment.templates().map(|(name, _)| name).collect();
        f.debug_struct("ChatTemplate")
            .field("path", &self.path)
            .field("templates", &names)
            .field("specials", &self.specials)
            .finish_non_exhaustive()
    }
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
const SPECIALS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

#[derive(serde::Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// A file's text; `None` if there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::Io {
            path: path.to_owned(),
            cause,
            advice: "check its permissions and encoding",
        }),
    }
}

fn failed(path: &Path, template: &str, error: &minijinja::Error) -> Error {
    Error::Template {
        path: path.to_owned(),
        template: template.to_owned(),
        line: error.line().unwrap_or(1),
        what: match error.detail() {
            Some(detail) => format!("{} ({detail})", error.kind()),
            None => error.kind().to_string(),
        },
        advice: "give messages that it accepts, another template, or the whole prompt",
    }
}

/// Turns `{% generation %}`, with which `transformers` marks what to train on, into an `if` that is always true.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag, after)) = next_tag(rest) {
        out += before;
        let inner = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        out += &match inner.trim() {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        rest = after;
    }
    out + rest
}

/// Splits at the first `{% … %}`: up to and with `{%`, its inside, from `%}` on.
fn next_tag(source: &str) -> Option<(&str, &str, &str)> {
    let start = source.find("{%")? + 2;
    let end = start + source[start..].find("%}")?;
    Some((&source[..start], &source[start..end], &source[end..]))
}
