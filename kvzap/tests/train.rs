//! Samples on disk, and the fit of an MLP.
#![cfg(feature = "tch")]

use kvzap::{Error, MlpFit, MlpSettings, Rows, Samples, Surrogate, TorchSurrogate, r2};
use std::fs;
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

#[test]
fn samples_come_back_as_they_were_written_and_a_few_layers_at_a_time() {
    tch::manual_seed(1);
    let folder = tempfile::tempdir().unwrap();
    let samples = Samples::open(folder.path().join("new"), "these").unwrap();
    assert!(!samples.has(0).unwrap());
    let shard = |rows: i64| -> Rows {
        (0..3).map(|_| (random(&[rows, 8]).to_kind(Kind::BFloat16), random(&[rows, 2]))).collect()
    };
    let shards = [shard(5), shard(7)];
    for (index, rows) in shards.iter().enumerate() {
        samples.write(index, rows).unwrap();
        assert!(samples.has(index).unwrap());
    }
    for layer in 0..3 {
        let (hidden, scores) = samples.layer(layer, 0..2, Device::Cpu).unwrap();
        let all = |pick: fn(&(Tensor, Tensor)) -> &Tensor| {
            Tensor::cat(&shards.iter().map(|rows| pick(&rows[layer])).collect::<Vec<_>>(), 0)
        };
        assert_eq!(hidden, all(|row| &row.0));
        assert_eq!(scores, all(|row| &row.1));
    }
    assert_eq!(samples.layer(1, 1..2, Device::Cpu).unwrap().0, shards[1][1].0);
    assert!(matches!(samples.layer(3, 0..2, Device::Cpu), Err(Error::NoTensor { .. })));
    assert!(matches!(samples.layer(0, 0..3, Device::Cpu), Err(Error::File { .. })));
    assert!(matches!(samples.layer(0, 1..1, Device::Cpu), Err(Error::NoRows { layer: 0 })));
}

#[test]
fn samples_that_are_not_numbers_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let samples = Samples::open(folder.path(), "").unwrap();
    for wrong in [f64::NAN, f64::INFINITY, 1e5] {
        // 100,000 is finite in f32, but not in the f16 that is stored.
        let rows = vec![
            (random(&[2, 4]), random(&[2, 1])),
            (random(&[2, 4]) * 0.0 + wrong, random(&[2, 1])),
        ];
        assert!(matches!(samples.write(0, &rows), Err(Error::Rows { layer: 1 })), "{wrong}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn shards_of_other_settings_and_damaged_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let samples = Samples::open(folder.path(), "model a").unwrap();
    samples.write(0, &vec![(random(&[2, 4]), random(&[2, 1]))]).unwrap();
    let other = Samples::open(folder.path(), "model b").unwrap();
    let error = other.has(0).unwrap_err().to_string();
    for part in ["shard-00000", "model a", "model b", "a folder of its own"] {
        assert!(error.contains(part), "{error}");
    }
    let path = folder.path().join("shard-00000.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 8, 40, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(samples.has(0).is_err(), "cut to {length} bytes");
    }
    let mut hostile = whole.clone();
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, &hostile).unwrap();
    assert!(matches!(samples.has(0), Err(Error::Damaged { .. })));
}

/// Scores that no linear map gives: |x0| and x1 x2, with a large offset.
fn curved(rows: i64) -> (Tensor, Tensor) {
    let x = random(&[rows, 6]);
    let column = |index| x.select(1, index);
    let y = Tensor::stack(&[column(0).abs() - 4.0, column(1) * column(2) + 7.0], 1);
    (x, y)
}

fn fit(settings: MlpSettings, rows: &Rows) -> MlpFit {
    let mut fit = MlpFit::new(settings, rows).unwrap();
    while fit.epochs() < settings.epochs {
        fit.epoch().unwrap();
    }
    fit
}

const SMALL: MlpSettings =
    MlpSettings { width: 24, epochs: 12, batch: 64, rate: 1e-2, decay: 0.01, clip: 1.0, seed: 3 };

#[test]
fn an_mlp_learns_what_no_line_can() {
    tch::manual_seed(2);
    let rows: Rows = vec![curved(2000)];
    let surrogate = Surrogate::mlp(fit(SMALL, &rows).modules().unwrap()).unwrap();
    let scorer = TorchSurrogate::new(&surrogate, Kind::Float, Device::Cpu).unwrap();
    let (x, y) = curved(1000);
    let learned = r2(&scorer, 0, &x, &y).unwrap();
    assert!(learned.iter().all(|r2| *r2 > 0.95), "{learned:?}");
}

#[test]
fn layers_that_are_fitted_together_do_not_know_of_one_another() {
    tch::manual_seed(3);
    let rows: Rows = vec![curved(500), curved(500)];
    let together = fit(MlpSettings { epochs: 2, ..SMALL }, &rows).modules().unwrap();
    let alone = fit(
        MlpSettings { epochs: 2, ..SMALL },
        &rows[..1].iter().map(|(x, y)| (x.shallow_clone(), y.shallow_clone())).collect(),
    );
    for (a, b) in together[0].iter().zip(&alone.modules().unwrap()[0]) {
        for (a, b) in a.weight().iter().zip(b.weight()) {
            assert!((a - b).abs() < 1e-5, "{a} against {b}");
        }
    }
}

#[test]
fn an_interrupted_fit_ends_with_the_same_bits() {
    tch::manual_seed(4);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fit.safetensors");
    let rows: Rows = vec![curved(300)];
    let settings = MlpSettings { epochs: 4, ..SMALL };
    let whole = fit(settings, &rows).modules().unwrap();
    let mut first = MlpFit::new(settings, &rows).unwrap();
    first.epoch().unwrap();
    first.epoch().unwrap();
    first.save(&path).unwrap();
    let mut second = MlpFit::new(settings, &rows).unwrap();
    second.restore(&path).unwrap();
    assert_eq!(second.epochs(), 2);
    while second.epochs() < 4 {
        second.epoch().unwrap();
    }
    assert_eq!(second.modules().unwrap(), whole);
    let other = MlpSettings { width: 8, ..settings };
    assert!(matches!(MlpFit::new(other, &rows).unwrap().restore(&path), Err(Error::Shape { .. })));
}

#[test]
fn r2_is_the_squared_correlation() {
    tch::manual_seed(5);
    let (x, noise) = (random(&[400, 3]), random(&[400, 2]));
    let map = kvzap::Affine::new(vec![1.0, 2.0, -1.0, 0.5, 0.0, 3.0], vec![1.0, -2.0]).unwrap();
    let surrogate = Surrogate::linear(vec![map]).unwrap();
    let scorer = TorchSurrogate::new(&surrogate, Kind::Float, Device::Cpu).unwrap();
    let predicted = x.matmul(&Tensor::from_slice(&[1f32, 0.5, 2.0, 0.0, -1.0, 3.0]).view([3, 2]));
    let y = &predicted * -2.0 + noise * 3.0 + 100.0;
    for (head, r2) in r2(&scorer, 0, &x, &y).unwrap().into_iter().enumerate() {
        let pairs = Tensor::stack(&[predicted.select(1, head as i64), y.select(1, head as i64)], 0);
        let expected = pairs.to_kind(Kind::Double).corrcoef().double_value(&[0, 1]).powi(2);
        assert!((0.3..0.99).contains(&expected), "a blind test: {expected}");
        assert!((r2 - expected).abs() < 1e-6, "head {head}: {r2} against {expected}");
    }
}
