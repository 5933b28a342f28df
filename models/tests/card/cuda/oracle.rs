//! KVzip+ scores of 16-bit tensors on the card, by flash attention, against those of the same numbers in f32 on the CPU.

use anyhow::Result;
use kvzap::{LayerInput, Spans, kvzip_plus};
use models::cuda;
use tch::{Device, Kind, Tensor};

#[test]
#[ignore = "needs a CUDA device"]
fn targets_on_the_card_are_those_of_the_cpu() -> Result<()> {
    let card = cuda()?;
    let spans = Spans { original: 3..150, repeat: 170..317 };
    for (kind, head_dim) in [(Kind::BFloat16, 64), (Kind::Half, 128), (Kind::BFloat16, 8)] {
        let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, card))?.f_to_kind(kind);
        let (hidden, output) = (random(&[2, 330, 96])?, random(&[96, 6 * head_dim])?);
        let [queries, keys, values] =
            [6, 2, 2].map(|heads| random(&[2, heads, 330, head_dim]).expect("room on the card"));
        let score = |device: Device, kind: Kind| -> Result<Tensor> {
            let moved = |x: &Tensor| x.to_device(device).to_kind(kind);
            let [hidden, queries, keys, values] = [&hidden, &queries, &keys, &values].map(moved);
            let (queries, keys, values) = (&queries, &keys, &values);
            let input = LayerInput { layer: 0, hidden: &hidden, queries, keys, values };
            Ok(kvzip_plus(input, &moved(&output), &spans)?.to_device(Device::Cpu))
        };
        let (found, expected) = (score(card, kind)?, score(Device::Cpu, Kind::Float)?);
        let off = (found - &expected).abs().max().double_value(&[]);
        assert!(off < 1e-4, "{kind:?} of {head_dim}: off by {off}");
    }
    Ok(())
}
