//! The tch side, held to the plain one and to transformers.
#![cfg(feature = "tch")]

mod common;

use common::{assert_close, golden, golden_f32, module, wave};
use repo_pos::{
    Array, Error, Frequencies, Precision, Repo, Repositioner, Rotary, RoundZ, TorchModule,
    TorchRepo, Yarn, rotate,
};
use tch::{Device, Kind, Tensor};

fn tensor(data: &[f32], shape: &[i64]) -> Tensor {
    Tensor::from_slice(data).reshape(shape)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).contiguous().view(-1)).unwrap()
}

fn rotary(theta: f64, head_dim: usize) -> Rotary {
    Rotary::new(&Frequencies::plain(theta, head_dim).unwrap(), Device::Cpu).unwrap()
}

#[test]
fn the_golden_positions_and_rotations() {
    let repo = Repo::new(vec![None, Some(module())]).unwrap();
    let repo = TorchRepo::new(&repo, Kind::Float, Device::Cpu).unwrap();
    let hidden = tensor(&wave(1, 80, 1.0), &[1, 5, 16]);
    assert!(repo.positions(0, &hidden).unwrap().is_none());
    let positions = repo.positions(1, &hidden).unwrap().unwrap();
    assert_eq!(positions.size(), [1, 2, 5]);
    assert_close("positions", &values(&positions), &golden("layer.positions"), 1e-5);

    let (cos, sin) = rotary(500_000.0, 8).angles(&positions).unwrap();
    for name in ["q", "k"] {
        let x = tensor(&golden_f32(&format!("layer.{name}")), &[1, 2, 5, 8]);
        let found = values(&rotate(&x, &cos, &sin).unwrap());
        assert_close(name, &found, &golden(&format!("layer.rotated_{name}")), 1e-5);
    }
}

#[test]
fn rotation_is_that_of_transformers_in_f32_and_bf16() {
    let positions = tensor(&golden_f32("rotation.positions"), &[1, 1, 8]);
    let (cos, sin) = rotary(500_000.0, 64).angles(&positions).unwrap();
    let x = tensor(&golden_f32("rotation.x"), &[1, 2, 8, 64]);
    let found = rotate(&x, &cos, &sin).unwrap();
    assert_eq!(found.kind(), Kind::Float);
    assert_close("f32", &values(&found), &golden("rotation.out"), 1e-6);

    let found = rotate(&x.to_kind(Kind::BFloat16), &cos, &sin).unwrap();
    assert_eq!(found.kind(), Kind::BFloat16);
    // One rounding fewer than theirs: a step of bf16 below one.
    assert_close("bf16", &values(&found), &golden("rotation.out_bf16"), 0.004);
}

#[test]
fn cosines_are_of_the_f32_product_however_far() {
    let frequencies = Frequencies::plain(500_000.0, 128).unwrap();
    let positions = [40.0, 257.0, 2_000.0, 15_962.0, 131_071.0, -37.8, 0.0, 1e6];
    let (cos, sin) = rotary(500_000.0, 128).angles(&tensor(&positions, &[1, 1, 8])).unwrap();
    assert_eq!(cos.size(), [1, 1, 8, 64]);
    let inverse = frequencies.inverse();
    let angles = positions.iter().flat_map(|z| inverse.iter().map(move |i| f64::from(z * i)));
    let (sines, cosines): (Vec<_>, Vec<_>) = angles.map(f64::sin_cos).unzip();
    assert_close("cosine", &values(&cos), &cosines, 1e-6);
    assert_close("sine", &values(&sin), &sines, 1e-6);
}

#[test]
fn yarn_and_wide_angles_are_those_of_the_plain_side() {
    let positions = [0.0, -0.1, 37.8, -4095.3, 131_071.0, 999_999.9];
    let yarn = Frequencies::yarn(500_000.0, 128, Yarn::new(4.0, 4096)).unwrap();
    for frequencies in [yarn.clone(), yarn.with_precision(Precision::Wide)] {
        let rotary = Rotary::new(&frequencies, Device::Cpu).unwrap();
        let (cos, sin) = rotary.angles(&tensor(&positions, &[1, 1, 6])).unwrap();
        assert_eq!((cos.kind(), sin.kind()), (Kind::Float, Kind::Float));
        let mut x = [[1.0; 64], [0.0; 64]].concat().repeat(6);
        frequencies.rotate(&mut x, &positions, 6).unwrap();
        let plain = |from: usize| -> Vec<f64> {
            x.chunks(128).flat_map(|row| row[from..from + 64].iter().map(|&x| x.into())).collect()
        };
        assert_close("cosine", &values(&cos), &plain(0), 1e-6);
        assert_close("sine", &values(&sin), &plain(64), 1e-6);
        let (cos, sin) = frequencies.angles(&positions);
        assert_close("cosine alone", &cos, &plain(0), 0.0);
        assert_close("sine alone", &sin, &plain(64), 0.0);
    }
}

#[test]
fn the_plain_and_the_tch_side_agree_in_batches_and_groups() {
    let frequencies = Frequencies::plain(10_000.0, 6).unwrap();
    let data = wave(3, 2 * 6 * 3 * 6, 1.0);
    // As a model hands it over: a transposed view, [batch, heads, tokens, head_dim].
    let x = tensor(&data, &[2, 6, 3, 6]).transpose(1, 2).contiguous().transpose(1, 2);
    for rows in [1, 2, 3, 6] {
        let positions = wave(4, 2 * rows * 3, 40.0);
        let mut plain = data.clone();
        frequencies.rotate(&mut plain, &positions, 3).unwrap();
        let plain: Vec<_> = plain.into_iter().map(f64::from).collect();
        let positions = tensor(&positions, &[2, rows as i64, 3]);
        let (cos, sin) = rotary(10_000.0, 6).angles(&positions).unwrap();
        let found = rotate(&x, &cos, &sin).unwrap();
        assert_eq!(found.size(), [2, 6, 3, 6]);
        assert_close(&format!("{rows} rows"), &values(&found), &plain, 1e-6);
    }
}

#[test]
fn a_bf16_model_may_keep_accurate_positions() {
    let repo = Repo::new(vec![Some(module())]).unwrap();
    let hidden = wave(1, 80, 1.0);
    let rounded = tensor(&hidden, &[1, 5, 16]).to_kind(Kind::BFloat16);
    let array = Array::new(values(&rounded), [1, 5, 16]).unwrap();
    let exact = module().positions(&array).unwrap();
    let exact: Vec<_> = exact.data().iter().map(|&z| z.into()).collect();

    let maps =
        |round: RoundZ| TorchRepo::new(&repo, round.kind(Kind::BFloat16), Device::Cpu).unwrap();
    let found = maps(RoundZ::None);
    let found = found.positions(0, &rounded).unwrap().unwrap();
    assert_eq!(found.kind(), Kind::Float);
    assert_close("maps in f32", &values(&found), &exact, 1e-4);

    let coarse = maps(RoundZ::ModelDtype);
    let coarse = coarse.positions(0, &rounded).unwrap().unwrap();
    assert_eq!(coarse.kind(), Kind::Float);
    assert_ne!(values(&coarse), values(&found));
    assert_eq!(values(&coarse), values(&coarse.to_kind(Kind::BFloat16)));
    assert_eq!(values(&coarse), golden_f32("layer.positions_bf16"), "those of the published code");
}

#[test]
fn positions_that_were_rounded_are_refused() {
    let positions = Tensor::zeros([1, 1, 4], (Kind::BFloat16, Device::Cpu));
    let error = rotary(1e4, 8).angles(&positions).unwrap_err();
    assert!(matches!(error, Error::PositionKind(Kind::BFloat16)), "{error}");
}

#[test]
fn angles_in_a_models_dtype_are_rounded_once() {
    let plain = Frequencies::plain(10_000.0, 16).unwrap();
    let yarn = Frequencies::yarn(10_000.0, 16, Yarn::new(4.0, 4096)).unwrap();
    let positions = tensor(&[0.0, -0.1, 37.8, -4095.3], &[1, 1, 4]);
    for frequencies in [plain.clone(), yarn, plain.with_precision(Precision::Wide)] {
        let rotary = Rotary::new(&frequencies, Device::Cpu).unwrap();
        let (cos, sin) = rotary.angles(&positions).unwrap();
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let wanted = (cos.to_kind(kind), sin.to_kind(kind));
            assert_eq!(rotary.angles_in(&positions, kind).unwrap(), wanted, "{kind:?}");
        }
        let narrow = positions.to_kind(Kind::BFloat16);
        let error = rotary.angles_in(&narrow, Kind::BFloat16).unwrap_err();
        assert!(matches!(error, Error::PositionKind(Kind::BFloat16)), "{error}");
    }
}

#[test]
fn shapes_that_disagree_are_refused_by_name() {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let name = |error| match error {
        Error::Shape { name, .. } => name,
        other => panic!("{other}"),
    };
    let rotated = |x: &[i64], cos: &[i64], sin: &[i64]| {
        rotate(&zeros(x), &zeros(cos), &zeros(sin)).map(|_| ()).map_err(name)
    };
    let (x, angles) = ([2, 4, 3, 8], [1, 1, 3, 4]);
    assert_eq!(rotated(&x, &angles, &angles), Ok(()));
    assert_eq!(rotated(&x, &angles, &[1, 1, 3, 8]), Err("sine"));
    assert_eq!(rotated(&x[1..], &angles, &angles), Err("x"));
    // libtorch would stretch a single token or pair over all without a word.
    for wrong in [[3, 1, 3, 4], [1, 3, 3, 4], [1, 0, 3, 4], [1, 1, 1, 4], [1, 1, 3, 1]] {
        assert_eq!(rotated(&x, &wrong, &wrong), Err("angles"), "{wrong:?}");
    }

    let new = |gate: &[i64], content: &[i64], last: &[i64]| {
        TorchModule::new(&zeros(gate), &zeros(content), &zeros(last)).map_err(name)
    };
    assert_eq!(new(&[16], &[16], &[2, 2]).err(), Some("gate map"));
    assert_eq!(new(&[0, 16], &[0, 16], &[2, 0]).err(), Some("gate map"));
    assert_eq!(new(&[2, 16], &[16, 2], &[2, 2]).err(), Some("content map"));
    assert_eq!(new(&[2, 16], &[2, 16], &[2, 3]).err(), Some("final map"));
    let module = new(&[2, 16], &[2, 16], &[3, 2]).unwrap();
    assert_eq!(module.positions(&zeros(&[1, 5, 8])).err().map(name), Some("hidden"));

    let other = new(&[1, 8], &[1, 8], &[3, 1]).unwrap();
    let error = TorchRepo::from_layers(vec![Some(module), None, Some(other)]).unwrap_err();
    assert!(matches!(error, Error::Layers { layer: 2, .. }), "{error}");
}
