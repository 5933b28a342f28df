//! What a session refuses, and that it goes back to its mark, on the tiny model of tests/golden/kvzap.

mod common;

use anyhow::Result;
use common::golden;
use models::{CausalLm, Decoder, Dense, Error, Hooks, Sampler, Sampling, Session, Weights, open};
use std::ops::ControlFlow;
use tch::{Device, Kind};

fn model() -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(open(&golden("kvzap/model"))?, Kind::Float, Device::Cpu)?)?)
}

fn session(lm: &Decoder) -> Session<'_> {
    let cache = Dense::new(lm.config().layers, 32);
    Session::new(lm, Device::Cpu, cache, Hooks::default())
}

fn write(session: &mut Session<'_>, limit: usize) -> models::Result<Vec<u32>> {
    let mut sampler = Sampler::new(Sampling::default())?;
    let each = &mut |_| ControlFlow::Continue(());
    Ok(session.generate(&mut sampler, &[], usize::MAX, limit, each)?.tokens)
}

#[test]
fn nothing_to_read_is_refused() -> Result<()> {
    let lm = model()?;
    let mut session = session(&lm);
    assert!(matches!(session.feed(&[]), Err(Error::EmptyPrompt)));
    assert!(matches!(write(&mut session, 1), Err(Error::EmptyPrompt)), "nothing to continue");
    Ok(())
}

#[test]
fn a_prompt_past_the_context_is_refused_with_both_lengths_whole_or_in_pieces() -> Result<()> {
    let lm = model()?;
    let most = lm.config().max_positions;
    let error = session(&lm).feed(&vec![1; most + 1]).unwrap_err();
    assert!(
        matches!(error, Error::ContextTooLong { wanted, limit } if (wanted, limit) == (most + 1, most))
    );
    let mut session = session(&lm);
    session.feed(&[1, 2, 3])?;
    let error = session.feed(&vec![1; most - 2]).unwrap_err();
    assert!(error.to_string().contains("shorten the text"), "{error}");
    assert!(matches!(error, Error::ContextTooLong { wanted, .. } if wanted == most + 1));
    Ok(())
}

#[test]
fn a_token_that_the_model_does_not_have_is_named() -> Result<()> {
    let lm = model()?;
    let vocabulary = lm.config().vocab_size;
    let error = session(&lm).feed(&[1, vocabulary as u32]).unwrap_err();
    assert!(matches!(error, Error::UnknownToken { id, .. } if id as usize == vocabulary));
    Ok(())
}

#[test]
fn a_session_goes_on_from_its_mark_as_if_nothing_had_followed() -> Result<()> {
    let lm = model()?;
    let mut session = session(&lm);
    assert!(matches!(session.rewind(), Err(Error::NoMark)));
    session.feed(&[5, 6, 7, 8])?;
    session.mark()?;
    let first = write(&mut session, 6)?;
    session.feed(&[9, 10])?;
    session.rewind()?;
    assert_eq!(write(&mut session, 6)?, first);
    Ok(())
}

#[test]
fn likelihoods_are_those_of_libtorchs_log_softmax_and_leave_the_tokens_read() -> Result<()> {
    let lm = model()?;
    let tokens = [7, 3, 11];
    let (mut one, mut other) = (session(&lm), session(&lm));
    one.feed(&[1, 2])?;
    other.feed(&[1, 2])?;
    let found = one.log_likelihoods(&tokens, 100)?;
    for (&token, found) in tokens.iter().zip(found) {
        let logits = tch::Tensor::from_slice(&other.logits().unwrap()[..100]);
        let wanted = logits
            .to_kind(Kind::Double)
            .log_softmax(0, Kind::Double)
            .double_value(&[i64::from(token)]);
        assert!((found - wanted).abs() < 1e-6, "{found}, wanted {wanted}");
        other.feed(&[token])?;
    }
    assert_eq!(one.logits(), other.logits());
    assert!(matches!(one.log_likelihoods(&[100], 100), Err(Error::UnknownToken { id: 100, .. })));
    assert!(matches!(session(&lm).log_likelihoods(&[1], 100), Err(Error::EmptyPrompt)));
    Ok(())
}
