//! The types in which files store weights.

use super::half::half_to_f32;
use super::quants;

/// How numbers are stored. Quantised ones come in blocks that share a scale, after ggml's
/// `ggml-quants.c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "their names in the GGUF format")]
pub(crate) enum Encoding {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// All of them, for error texts.
pub(crate) const READABLE: &str =
    "F32, F16, BF16, and in GGUF Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K, Q6_K";

impl Encoding {
    /// Elements and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    /// Bytes of a row of `elements`, a multiple of the block.
    pub(crate) fn bytes(self, elements: usize) -> usize {
        let (per_block, bytes) = self.block();
        elements / per_block * bytes
    }

    /// Bytes of a tensor, its innermost dimension last; `None` if that is no multiple of the block
    /// or the bytes are beyond counting.
    pub(crate) fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (per_block, bytes) = self.block();
        if !shape.last().copied().unwrap_or(1).is_multiple_of(per_block) {
            return None;
        }
        let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n))?;
        (elements / per_block).checked_mul(bytes)
    }

    /// Decodes whole blocks: `bytes` holds what `out` asks for.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => blocks::<4, 1>(bytes, out, |b, out| out[0] = f32::from_le_bytes(*b)),
            Self::F16 => {
                blocks::<2, 1>(bytes, out, |b, out| out[0] = half_to_f32(u16::from_le_bytes(*b)))
            }
            Self::BF16 => blocks::<2, 1>(bytes, out, |b, out| {
                out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }),
            Self::Q4_0 => blocks(bytes, out, quants::q4_0),
            Self::Q4_1 => blocks(bytes, out, quants::q4_1),
            Self::Q5_0 => blocks(bytes, out, quants::q5_0),
            Self::Q8_0 => blocks(bytes, out, quants::q8_0),
            Self::Q4_K => blocks(bytes, out, quants::q4_k),
            Self::Q5_K => blocks(bytes, out, quants::q5_k),
            Self::Q6_K => blocks(bytes, out, quants::q6_k),
        }
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (bytes, out) = (bytes.as_chunks::<BYTES>().0, out.as_chunks_mut::<ELEMENTS>().0);
    bytes.iter().zip(out).for_each(|(bytes, out)| decode(bytes, out));
}

#[cfg(test)]
mod tests {
    use super::Encoding;
    use safetensors::SafeTensors;

    #[test]
    fn every_block_is_what_ggufs_own_reader_makes_of_it() {
        use Encoding::*;
        let golden = include_bytes!("../../tests/golden/gguf/blocks.safetensors");
        let golden = SafeTensors::deserialize(golden).unwrap();
        for encoding in [F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K, Q6_K] {
            let bytes = golden.tensor(&format!("{encoding:?}.bytes")).unwrap();
            let wanted = golden.tensor(&format!("{encoding:?}.values")).unwrap();
            let wanted: Vec<f32> = wanted
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|value| f32::from_le_bytes(*value))
                .collect();
            assert_eq!(encoding.bytes(wanted.len()), bytes.data().len(), "{encoding:?}");
            let mut values = vec![f32::NAN; wanted.len()];
            encoding.decode(bytes.data(), &mut values);
            assert_eq!(values, wanted, "{encoding:?}");
        }
    }
}
