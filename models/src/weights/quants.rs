//! ggml's quantised blocks, one function each. A product is rounded before the sum, as ggml's
//! reference does it.

use super::half::half_to_f32;

/// Half scale, 16 bytes: elements 0 to 15 are the low nibbles, the rest the high ones; less 8.
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, &byte) in block[2..].iter().enumerate() {
        out[i] = d * (f32::from(byte & 15) - 8.0);
        out[i + 16] = d * (f32::from(byte >> 4) - 8.0);
    }
}

/// Half scale and minimum, nibbles as in [`q4_0`].
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, min) = (half(block, 0), half(block, 2));
    for (i, &byte) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(byte & 15) + min;
        out[i + 16] = d * f32::from(byte >> 4) + min;
    }
}

/// Half scale, 32 fifth bits, nibbles as in [`q4_0`]; less 16.
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let value =
        |nibble: u8, i: usize| d * (f32::from(nibble | ((fifth >> i & 1) as u8) << 4) - 16.0);
    for (i, &byte) in block[6..].iter().enumerate() {
        out[i] = value(byte & 15, i);
        out[i + 16] = value(byte >> 4, i + 16);
    }
}

/// Half scale, 32 signed bytes.
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(byte as i8);
    }
}

/// Half scale and minimum of all, 6-bit ones of each 32, then nibbles: 32 bytes hold 32 low ones,
/// then 32 high ones.
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scales, nibbles) = block[4..].split_at(12);
    for (pair, (bytes, out)) in nibbles.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let [(d0, m0), (d1, m1)] = [0, 1].map(|half| scale_and_min(block, scales, 2 * pair + half));
        for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
            *low = d0 * f32::from(byte & 15) - m0;
            *high = d1 * f32::from(byte >> 4) - m1;
        }
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the nibbles: bit `g` of byte `i` belongs to
/// element `i` of group `g`.
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scales, rest) = block[4..].split_at(12);
    let (fifth, nibbles) = rest.split_at(32);
    for (pair, (bytes, out)) in nibbles.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let [(d0, m0), (d1, m1)] = [0, 1].map(|half| scale_and_min(block, scales, 2 * pair + half));
        for (((&byte, &fifth), low), high) in bytes.iter().zip(fifth).zip(low).zip(high) {
            let fifth = fifth >> (2 * pair);
            *low = d0 * f32::from(byte & 15 | (fifth & 1) << 4) - m0;
            *high = d1 * f32::from(byte >> 4 | (fifth >> 1 & 1) << 4) - m1;
        }
    }
}

/// 128 bytes of low nibbles, 64 of high bit pairs, a signed scale for each 16, half scale of all;
/// less 32.
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(block, 208);
    for (part, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[64 * part..][..64], &block[128 + 32 * part..][..32]);
        let scales = &block[192 + 8 * part..][..8];
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            let low = &low[32 * (quarter % 2)..][..32];
            for (i, out) in out.iter_mut().enumerate() {
                let value =
                    low[i] >> (4 * (quarter / 2)) & 15 | (high[i] >> (2 * quarter) & 3) << 4;
                let scale = d * f32::from(scales[2 * quarter + i / 16] as i8);
                *out = scale * (f32::from(value) - 32.0);
            }
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Scale and minimum of `group`, 0 to 7, from the twelve bytes of a k-quant: four scales, four
/// minima, six bits each; the other eight have their low four bits in the last four bytes and the
/// upper two on top of the first eight.
fn scale_and_min(block: &[u8], packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (half(block, 0) * f32::from(scale), half(block, 2) * f32::from(min))
}
