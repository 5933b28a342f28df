//! IEEE half precision, without a branch, so that loops over it vectorise.

/// The value of the half with these bits.
pub(super) fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Read as f32, the magnitude is 2^112 too small, also where it is subnormal; infinity and NaN
    // need f32's exponent.
    let finite = f32::from_bits(magnitude) * 2f32.powi(112);
    let special = magnitude | 0x7f80_0000;
    let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite.to_bits() };
    f32::from_bits(magnitude | u32::from(bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_half_is_what_the_half_crate_makes_of_it() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (super::half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{bits:#06x}"
            );
        }
    }
}
