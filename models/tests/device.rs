//! A machine without CUDA is told what is missing; one with a card runs on it.

use models::{Decoder, Dense, Error, Hooks, Weights, cuda, open};
mod common;
use common::{assert_close, get, golden, logits, tensors};
use tch::{Device, Kind};

#[test]
fn without_cuda_the_error_says_what_to_do() {
    match cuda() {
        Ok(device) => assert_eq!(device, Device::Cuda(0)),
        Err(error @ Error::NoCuda { .. }) => {
            assert!(error.to_string().ends_with("or use the CPU"), "{error}");
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn cuda_gives_the_logits_of_the_cpu() -> anyhow::Result<()> {
    let ids = get(&tensors("kvzap/runs.safetensors")?, "ids")?.narrow(0, 0, 200);
    let run = |device| -> anyhow::Result<_> {
        let lm = Decoder::load(&Weights::new(open(&golden("kvzap/model"))?, Kind::Float, device)?)?;
        logits(&lm, &ids.to_device(device), &mut Dense::new(3, 128), &Hooks::default())
    };
    assert_close(&run(cuda()?)?.to_device(Device::Cpu), &run(Device::Cpu)?, 1e-4, "logits");
    Ok(())
}
