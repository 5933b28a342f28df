//! Eight-bit floats: a sign, four bits of exponent, three of mantissa, no infinities (OCP 8-bit floating point, E4M3).

/// The largest, 1.75 · 2^8.
const MOST: f32 = 448.0;

/// An eight-bit float, of which a row shares a scale. The one pattern of its format that is no number is never written:
/// what is not finite in a row goes to the scale.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct E4m3(pub u8);

/// What a row is divided by to use all of the range, and multiplied by when it is read. It is its reciprocal that the row
/// is multiplied by, here as on the card, so that the bits are the same. NaN if an element is not
/// finite, so that all of the row is NaN then.
#[inline(always)]
pub fn scale(row: &[f32]) -> f32 {
    let most = row.iter().fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
    // NaN compares false above, and comes through here, as does an infinity.
    let odd = if row.iter().all(|x| x.is_finite()) { 0.0 } else { f32::NAN };
    // The least that has a reciprocal; under it, a row is 0.
    (if most / MOST < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { most / MOST }) + odd
}

impl E4m3 {
    /// To the nearest, ties to even; beyond the largest to the largest, and NaN to 0.
    #[inline(always)]
    pub fn narrow(x: f32) -> Self {
        let size = x.abs();
        let bits = if size >= MOST {
            0x7e
        } else if size >= 0.015_625 {
            let bits = size.to_bits();
            // 20 of the 23 bits of mantissa go, half of what they could be rounds up; f32's exponent is 120 higher.
            (((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)) as u8
        } else {
            (size * 512.0).round_ties_even() as u8
        };
        Self(bits | (x.to_bits() >> 24 & 0x80) as u8)
    }

    /// Without branches, and without arithmetic on subnormal floats: as for f16, in `storage.rs`.
    #[inline(always)]
    pub fn widen(self) -> f32 {
        let bits = u32::from(self.0);
        let normal = f32::from_bits(((bits & 0x7f) << 20) + (120 << 23));
        // A subnormal 2^-6 m was read as 2^-7 (1 + m), so this is what it is; for all others this is no less.
        let subnormal = normal + normal - 0.015_625;
        let wide = if subnormal < normal { subnormal } else { normal };
        f32::from_bits(wide.to_bits() | (bits & 0x80) << 24)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format's definition, in f64.
    fn value(bits: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0);
        let size = if exponent == 0 {
            mantissa * 2f64.powi(-6)
        } else {
            (1.0 + mantissa) * 2f64.powi(exponent - 7)
        };
        if bits < 0x80 { size } else { -size }
    }

    #[test]
    fn every_pattern_has_its_value() {
        for bits in (0..=255u8).filter(|bits| bits & 0x7f != 0x7f) {
            assert_eq!(f64::from(E4m3(bits).widen()), value(bits), "{bits:#04x}");
            assert_eq!(E4m3::narrow(E4m3(bits).widen()), E4m3(bits), "{bits:#04x}");
        }
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_then_to_the_even() {
        for bits in 0..0x7eu8 {
            let (low, high) = (E4m3(bits).widen(), E4m3(bits + 1).widen());
            let middle = (low + high) / 2.0; // exact: f32 has bits enough
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            for sign in [0, 0x80] {
                let signed = |x: f32| if sign == 0 { x } else { -x };
                assert_eq!(E4m3::narrow(signed(middle)), E4m3(even | sign), "{middle}");
                assert_eq!(E4m3::narrow(signed(middle.next_down())), E4m3(bits | sign));
                assert_eq!(E4m3::narrow(signed(middle.next_up())), E4m3((bits + 1) | sign));
            }
        }
        assert_eq!([449.0, f32::INFINITY].map(E4m3::narrow), [E4m3(0x7e); 2]);
    }

    #[test]
    fn a_scale_uses_the_range_and_takes_what_is_not_finite() {
        assert_eq!(scale(&[1.0, -896.0, 3.0]), 2.0);
        assert_eq!(E4m3::narrow(0.0 / scale(&[0.0; 4])), E4m3(0));
        assert!(scale(&[1e-40; 4]) >= f32::MIN_POSITIVE);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(scale(&[1.0, odd, 2.0]).is_nan());
        }
        assert!(scale(&[f32::MAX, f32::MIN]).is_finite());
    }
}
