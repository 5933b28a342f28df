//! What a session refuses, and that it goes back to its mark, on the tiny model of tests/golden/kvzap.

mod common;

use anyhow::Result;
use common::golden;
use models::{
    CausalLm, Decoder, Dense, Error, Hooks, KvCache, Sampler, Sampling, Session, Steps, Usage,
    Weights, open,
};
use std::ops::ControlFlow;
use tch::{Device, Kind, Tensor};

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

/// A machine that takes its own steps, made of a session's.
struct Machine<'m>(&'m Decoder, Dense, Vec<f32>);

impl Steps for Machine<'_> {
    fn step(&mut self, token: u32, sampler: &mut Sampler) -> models::Result<u32> {
        let token = Tensor::from_slice(&[i64::from(token)]).unsqueeze(0);
        let hidden = self.0.forward(&token, &mut self.1, &Hooks::default())?;
        self.2 = Vec::try_from(self.0.logits(&hidden)?.reshape([-1]))?;
        sampler.sample(&self.2[..100])
    }

    fn scores(&self) -> models::Result<Vec<f32>> {
        Ok(self.2.clone())
    }
}

impl KvCache for Machine<'_> {
    fn tokens(&self) -> usize {
        self.1.tokens()
    }
    fn window(&self) -> usize {
        self.1.window()
    }
    fn begin(&mut self, tokens: usize) -> models::Result<()> {
        self.1.begin(tokens)
    }
    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> models::Result<Tensor> {
        self.1.attend(layer, queries, keys, values, drops)
    }
    fn usage(&self) -> Usage {
        self.1.usage()
    }
    fn mark(&mut self) -> models::Result<()> {
        self.1.mark()
    }
    fn rewind(&mut self) -> models::Result<()> {
        self.1.rewind()
    }
}

#[test]
fn a_machine_that_takes_its_own_steps_writes_what_the_model_does() -> Result<()> {
    let lm = model()?;
    let machine = Machine(&lm, Dense::new(lm.config().layers, 32), Vec::new());
    let mut stepping = Session::stepping(&lm, Device::Cpu, machine, Hooks::default());
    let mut plain = session(&lm);
    let warm = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
    let run = |session: &mut Session<'_>| -> Result<_> {
        session.feed(&[1, 2, 3])?;
        session.mark()?;
        let mut all = Vec::new();
        for (question, stop) in [(&[4, 5][..], None), (&[6][..], None), (&[4, 5][..], Some(3))] {
            session.rewind()?;
            session.feed(question)?;
            for sampling in [Sampling::default(), warm.clone()] {
                let mut sampler = Sampler::new(sampling)?;
                let mut count = 0;
                let mut ends = |_| {
                    count += 1;
                    if Some(count) == stop {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                };
                let written = session.generate(&mut sampler, &[9], 100, 12, &mut ends)?;
                all.push((
                    written,
                    session.cache().tokens(),
                    session.logits().map(<[f32]>::to_vec),
                ));
                session.feed(&[7])?;
            }
        }
        let likely = session.log_likelihoods(&[7, 3], 100)?;
        Ok((all, likely))
    };
    assert_eq!(run(&mut stepping)?, run(&mut plain)?);
    Ok(())
}
