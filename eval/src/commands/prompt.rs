//! The text that a command reads.

use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::PathBuf;

/// Where it comes from.
#[derive(clap::Args, Debug)]
pub struct PromptArgs {
    /// The prompt
    #[arg(long, conflicts_with = "file")]
    prompt: Option<String>,
    /// A file that holds the prompt; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl PromptArgs {
    /// The text; an error where there is none.
    pub fn read(&self) -> Result<String> {
        let text = match (&self.prompt, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) if path.as_os_str() == "-" => {
                let mut text = String::new();
                std::io::stdin()
                    .read_to_string(&mut text)
                    .context("standard input is not UTF-8; convert it, or give --file a file")?;
                text
            }
            (None, Some(path)) => std::fs::read_to_string(path).with_context(|| {
                let path = path.display();
                format!(
                    "cannot read {path}; --file takes a file of UTF-8 text, or - for standard input"
                )
            })?,
            (None, None) => bail!("nothing to read: give --prompt TEXT or --file FILE"),
        };
        if text.trim().is_empty() {
            bail!("the prompt is empty; give --prompt TEXT or --file FILE");
        }
        Ok(text)
    }
}
