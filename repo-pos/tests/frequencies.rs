//! Scalings of rotary embedding, and settings that must be refused.

use repo_pos::{Error, Frequencies, Precision, Yarn};

/// Plain over scaled, pair by pair: `kept` pairs as they were, then `between`, the rest by `factor`.
fn check_llama3(head_dim: usize, factor: f64, kept: usize, between: &[f64]) {
    let plain = Frequencies::plain(500_000.0, head_dim).unwrap();
    let scaled = Frequencies::llama3(500_000.0, head_dim, factor, 1.0, 4.0, 8192).unwrap();
    let ratios: Vec<_> = plain.inverse().iter().zip(scaled.inverse()).map(|(p, s)| p / s).collect();
    for (pair, ratio) in ratios.iter().enumerate() {
        let expected = match pair.checked_sub(kept) {
            None => 1.0,
            Some(n) => between.get(n).copied().unwrap_or(factor),
        };
        assert!(
            (f64::from(*ratio) / expected - 1.0).abs() < 1e-6,
            "pair {pair}: {ratio}, expected {expected}"
        );
    }

    // A GGUF file holds these ratios instead of the settings.
    let divided = Frequencies::divided(500_000.0, head_dim, &ratios).unwrap();
    for (pair, (d, s)) in divided.inverse().iter().zip(scaled.inverse()).enumerate() {
        assert!((d / s - 1.0).abs() < 2e-7, "pair {pair}: {d} from divisors, {s} from settings");
    }
}

#[test]
fn llama_3_1_8b_scales_as_published() {
    check_llama3(
        128,
        8.0,
        29,
        &[1.20748387, 1.55341463, 2.02631321, 2.69452969, 3.68425253, 5.25732659],
    );
    let scaled = Frequencies::llama3(500_000.0, 128, 8.0, 1.0, 4.0, 8192).unwrap();
    for (pair, expected) in [(29, 0.00216657076), (35, 9.55621235e-5)] {
        assert!((f64::from(scaled.inverse()[pair]) / expected - 1.0).abs() < 1e-6, "pair {pair}");
    }
}

#[test]
fn llama_3_2_1b_scales_as_published() {
    check_llama3(64, 32.0, 15, &[1.65132925, 3.2922621, 9.66672898]);
}

#[test]
fn linear_scaling_is_plain_at_positions_divided_by_the_factor() {
    let plain = Frequencies::plain(10_000.0, 16).unwrap();
    let linear = Frequencies::linear(10_000.0, 16, 4.0).unwrap();
    let (mut a, mut b) = ([1.0; 16], [1.0; 16]);
    linear.rotate(&mut a, &[4000.0], 1).unwrap();
    plain.rotate(&mut b, &[1000.0], 1).unwrap();
    assert_eq!(a, b);
}

/// Near and far, of either sign, between integers and powers of two; beside each the frequencies' own f32.
const FAR: [f32; 10] =
    [0.0, -0.1, 37.817_55, 257.0, -4095.3, 65_535.7, 131_071.0, -524_287.56, 999_999.9, 1e6];

/// The largest error of sines and cosines against f64 of the frequencies as they are.
fn largest_error(frequencies: &Frequencies) -> f64 {
    let pairs = frequencies.inverse().len();
    let mut x = [vec![1.0f32; pairs], vec![0.0; pairs]].concat().repeat(FAR.len());
    frequencies.rotate(&mut x, &FAR, FAR.len()).unwrap();
    let mut largest = 0f64;
    for (row, position) in x.chunks(2 * pairs).zip(FAR) {
        for (i, &inverse) in frequencies.inverse().iter().enumerate() {
            let (sin, cos) = (f64::from(position) * f64::from(inverse)).sin_cos();
            largest = largest.max((f64::from(row[i]) - cos).abs());
            largest = largest.max((f64::from(row[i + pairs]) - sin).abs());
        }
    }
    largest
}

#[test]
fn wide_angles_are_right_to_1e_6_where_those_of_transformers_are_not() {
    for theta in [1e4, 5e5] {
        let parity = Frequencies::plain(theta, 128).unwrap();
        assert_eq!(parity.precision(), Precision::Parity);
        let wide = parity.clone().with_precision(Precision::Wide);
        let (parity, wide) = (largest_error(&parity), largest_error(&wide));
        assert!(wide <= 1e-6, "wide: {wide:e}");
        assert!((1e-3..0.04).contains(&parity), "parity: {parity:e}");
    }
}

#[test]
fn head_dims_without_pairs_are_refused() {
    for head_dim in [0, 1, 63] {
        let error = Frequencies::plain(10_000.0, head_dim).unwrap_err();
        assert!(matches!(error, Error::HeadDim(found) if found == head_dim), "{error}");
    }
}

#[test]
fn settings_that_are_not_positive_numbers_are_refused_by_name() {
    let refused = |result: repo_pos::Result<Frequencies>, expected: &str| match result {
        Err(Error::Setting { name, .. }) => assert_eq!(name, expected),
        other => panic!("{expected}: {other:?}"),
    };
    for bad in [f64::NAN, f64::INFINITY, 0.0, -8.0, 1e300, 1e-300] {
        refused(Frequencies::plain(bad, 64), "theta");
        refused(Frequencies::linear(1e4, 64, bad), "factor");
        refused(Frequencies::llama3(bad, 64, 8.0, 1.0, 4.0, 8192), "theta");
        refused(Frequencies::llama3(1e4, 64, bad, 1.0, 4.0, 8192), "factor");
        refused(Frequencies::llama3(1e4, 64, 8.0, bad, 4.0, 8192), "low_freq_factor");
        refused(Frequencies::llama3(1e4, 64, 8.0, 1.0, bad, 8192), "high_freq_factor");
    }
    refused(Frequencies::llama3(1e4, 64, 8.0, 4.0, 4.0, 8192), "high_freq_factor");
    refused(Frequencies::llama3(1e4, 64, 8.0, 1.0, 4.0, 0), "original_max_position_embeddings");
}

#[test]
fn divisors_of_another_model_are_refused() {
    let error = Frequencies::divided(1e4, 64, &[1.0; 64]).unwrap_err();
    assert!(matches!(error, Error::DivisorCount { expected: 32, found: 64 }), "{error}");
    for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
        let error = Frequencies::divided(1e4, 4, &[1.0, bad]).unwrap_err();
        assert!(matches!(error, Error::Divisor { index: 1, .. }), "{error}");
    }
}

/// Angles in bf16 would use 256 and 15,936; a fast sine is off by 0.01 at 131,071.
#[test]
fn far_positions_keep_their_angles() {
    let frequencies = Frequencies::plain(500_000.0, 128).unwrap();
    for (position, cos) in [(257.0, 0.819306), (15_962.0, -0.908016)] {
        let mut x = [0.0; 128];
        x[0] = 1.0;
        frequencies.rotate(&mut x, &[position], 1).unwrap();
        assert!((x[0] - cos).abs() < 1e-6, "cos {position} is {}", x[0]);
    }
    for position in [40.0, 2_000.0, 16_000.0, 131_071.0] {
        let mut x = [1.0; 128];
        x[64..].fill(0.0);
        frequencies.rotate(&mut x, &[position], 1).unwrap();
        for (pair, &inverse) in frequencies.inverse().iter().enumerate() {
            let (sin, cos) = f64::from(position * inverse).sin_cos();
            assert!((f64::from(x[pair]) - cos).abs() < 1e-6, "cosine at {position}, pair {pair}");
            assert!(
                (f64::from(x[64 + pair]) - sin).abs() < 1e-6,
                "sine at {position}, pair {pair}"
            );
        }
    }
}

#[test]
fn yarns_settings_are_checked_by_name() {
    let paper = Yarn::new(4.0, 4096);
    let refused = |theta, yarn| match Frequencies::yarn(theta, 64, yarn).unwrap_err() {
        Error::Setting { name, .. } => name,
        other => panic!("{other}"),
    };
    for (yarn, name) in [
        (Yarn { factor: 0.0, ..paper }, "factor"),
        (Yarn { factor: f64::NAN, ..paper }, "factor"),
        (Yarn { original: 0, ..paper }, "original_max_position_embeddings"),
        (Yarn { beta_fast: -1.0, ..paper }, "beta_fast"),
        (Yarn { beta_slow: f64::INFINITY, ..paper }, "beta_slow"),
        (Yarn { beta_fast: 1.0, ..paper }, "beta_fast"),
        (Yarn { attention_factor: 1e300, ..paper }, "attention_factor"),
    ] {
        assert_eq!(refused(5e5, yarn), name);
    }
    assert_eq!(refused(1.0, paper), "theta");
    assert_eq!(Yarn::new(1.0, 4096).attention_factor, 1.0);
}
