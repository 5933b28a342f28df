//! An exponential that vectorises.

/// `a · b + c`, fused where `S` has it: on the others `f32::mul_add` is a slow call.
#[inline(always)]
pub fn mul_add<S: pulp::Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::IS_SCALAR { a * b + c } else { a.mul_add(b, c) }
}

/// e^x for x ≤ 0, within 2e-7 relative; 0 below -87, NaN for NaN.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2: 2^n through the exponent bits, e^r by the polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp<S: pulp::Simd>(x: f32) -> f32 {
    // 1.5 · 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = mul_add::<S>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<S>(n, -0.693_359_4, x);
    let r = mul_add::<S>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = mul_add::<S>(p, r, c);
    }
    let e = mul_add::<S>(p * r, r, r) + 1.0;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    if x < -87.0 { 0.0 } else { e * f32::from_bits(power) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Largest;

    impl pulp::WithSimd for Largest {
        type Output = f64;

        fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
            let points = (0..870_000).map(|i| -(i as f32) * 1e-4);
            let error = |x: f32| f64::from(exp::<S>(x)) / f64::from(x).exp() - 1.0;
            assert!(exp::<S>(f32::NAN).is_nan());
            assert_eq!(
                [exp::<S>(0.0), exp::<S>(-88.0), exp::<S>(f32::NEG_INFINITY)],
                [1.0, 0.0, 0.0]
            );
            points.map(|x| error(x).abs()).fold(0.0, f64::max)
        }
    }

    #[test]
    fn exp_is_within_its_bound_with_and_without_fused_multiply_add() {
        let errors = [pulp::Arch::Scalar.dispatch(Largest), pulp::Arch::new().dispatch(Largest)];
        println!("largest relative errors: {errors:?}");
        assert!(errors.into_iter().all(|error| error < 2e-7), "{errors:?}");
    }
}
