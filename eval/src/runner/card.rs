//! A runner's text on a card.

use super::Runner;
use crate::Method;
use anyhow::{Context, Result};
use kvzap::{Surrogate, TorchSurrogate};
use models::{CardCache, CardText, Gates, Hooks, Model, Session, Step, TextRoom, text_cache};

/// Tokens of a question, for which there is room beside the answer.
pub(crate) const QUESTION: usize = 8192;

impl Runner<'_> {
    /// Steps run in a graph where the model, its dtype and the method allow it, and through libtorch otherwise.
    pub(super) fn on_card(
        &self,
        hooks: Hooks,
        context: usize,
    ) -> Result<(Session<'_>, Option<String>)> {
        let Model { lm, device, kind, tokenizer, .. } = self.model;
        let room = TextRoom {
            ways: 1,
            at_once: 1,
            context,
            more: QUESTION + self.limit,
            least: match self.method {
                Method::Full => context,
                _ => self.window + self.protect,
            },
            window: self.window,
            kind: *kind,
            stored: self.stored,
        };
        let resident = text_cache(lm.config(), *device, room)?;
        let gates = gates(self.model, self.surrogate, &self.method, self.while_decoding);
        let step = gates.and_then(|gates| {
            let vocabulary = tokenizer.vocab_size().min(lm.config().vocab_size);
            Step::new(lm.as_ref(), gates.as_ref(), &resident, vocabulary)
        });
        let cache = CardCache::new(resident)?;
        Ok(match step {
            Ok(step) => {
                let text = CardText::new(cache, step);
                (Session::stepping(lm.as_ref(), *device, text, hooks), None)
            }
            Err(error @ models::Error::Step { .. }) => {
                (Session::new(lm.as_ref(), *device, cache, hooks), Some(error.to_string()))
            }
            Err(error) => return Err(error).context("the card's decode step"),
        })
    }
}

/// What judges the tokens of a model's steps by `method`, if anything does.
pub(crate) fn gates(
    model: &Model,
    surrogate: Option<&Surrogate>,
    method: &Method,
    while_decoding: bool,
) -> models::Result<Option<Gates>> {
    let (threshold, surrogate) = match (method, surrogate) {
        (Method::Full, _) => return Ok(None),
        _ if !while_decoding => return Ok(None),
        (Method::Kvzap { threshold }, Some(surrogate)) => (*threshold, surrogate),
        _ => {
            return Err(models::Error::Step {
                what: "way to judge what is written but a surrogate's threshold",
                advice: "leave out --prune-while-decoding",
            });
        }
    };
    let surrogate = TorchSurrogate::new(surrogate, model.kind, model.device)?;
    Ok(Some(Gates::new(&surrogate, vec![threshold; model.lm.config().layers])))
}
