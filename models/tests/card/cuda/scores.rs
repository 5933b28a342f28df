//! A linear surrogate's scores that come with the norm before a prompt's projections, held to those that libtorch makes of what the norm gives.

use crate::{load, random_surrogate, wide_with};
use anyhow::Result;
use kvzap::{LayerInput, Scorer, Threshold, TorchSurrogate};
use models::{CausalLm, Dense, Hooks, Pruning, Random, Source, cuda};
use serde_json::json;
use tch::{Kind, Tensor};

/// A surrogate that shows its maps alone, or its scores alone.
struct Half(TorchSurrogate, bool);

impl Scorer<Tensor> for Half {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        assert!(!self.1, "no kernel took the maps");
        self.0.score(input)
    }

    fn maps(&self, layer: usize) -> &[(Tensor, Tensor)] {
        if self.1 { self.0.maps(layer) } else { &[] }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn scores_that_come_with_the_norm_drop_the_same_tokens() -> Result<()> {
    let (folder, device, kind) = (tempfile::tempdir()?, cuda()?, Kind::BFloat16);
    // Of the texts the last warp has a part.
    for hidden_size in [256, 544, 576] {
        wide_with(folder.path(), json!({"hidden_size": hidden_size}))?;
        let lm = load(Source::Random(Random::open(folder.path(), 3)?), kind, device)?;
        let ids = Tensor::f_arange(3 * 333, (Kind::Int64, device))?.f_multiply_scalar(7919)?;
        let ids = ids.f_remainder(490)?.f_view([3, 333])?;
        let surrogate = random_surrogate(lm.config(), 0)?;
        let read = |by_maps| -> Result<(Tensor, Vec<Tensor>)> {
            let hooks = Hooks::pruning(Pruning {
                scorer: Box::new(Half(TorchSurrogate::new(&surrogate, kind, device)?, by_maps)),
                policy: Box::new(Threshold::new(0.0)?),
                while_decoding: true,
            });
            let mut cache = Dense::new(lm.config().layers, 128);
            let hidden = lm.forward(&ids, &mut cache, &hooks)?.f_to_kind(Kind::Float)?;
            let masked = |layer| Ok(cache.masked(layer)?.expect("it has been read"));
            Ok((hidden, (0..3).map(masked).collect::<Result<_>>()?))
        };
        let ((expected, apart), (found, dropped)) = (read(false)?, read(true)?);
        // Sums in another order, which bf16 rounds: 2^-8 of numbers up to some 4, layer after layer.
        let off = (found - &expected).f_abs()?.f_max()?.f_double_value(&[])?;
        assert!(off < 0.2, "{hidden_size}: hidden states off by {off}");
        for (layer, (a, b)) in apart.iter().zip(&dropped).enumerate() {
            let mean = |x: &Tensor| x.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            let (share, other) = (mean(a), mean(&a.f_logical_xor(b)?));
            assert!((0.02..0.6).contains(&share), "{hidden_size}: {layer} drops {share}");
            assert!(other < 1e-2, "{hidden_size}: {layer}, {other} otherwise");
        }
    }
    Ok(())
}
