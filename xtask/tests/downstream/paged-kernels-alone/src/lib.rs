//! An engine that keeps its cache with us and decides by itself what goes.

use paged_kernels::{CacheShape, Dtype, PagedAttention, Result, View, ViewMut};

/// One layer, one head, rows of one element, a window of one token.
pub const SHAPE: CacheShape = CacheShape {
    layers: 1,
    kv_heads: 1,
    query_heads: 1,
    head_dim: 1,
    page_size: 16,
    window: 1,
    pages: 4,
    dtype: Dtype::F32,
};

/// Attends from a token after a prompt, all keys being alike: the mean of the values that live.
pub fn mean(
    cache: &mut impl PagedAttention,
    prompt: &[f32],
    drops: &[bool],
    new: f32,
) -> Result<f32> {
    let sequence = cache.allocate()?;
    let (n, keys) = (prompt.len(), vec![1.0; prompt.len()]);
    let prompt = View::new(prompt, [1, n, 1])?;
    cache.fill(sequence, 0, View::new(&keys[..], [1, n, 1])?, prompt, drops)?;
    cache.begin_step(&[(sequence, 1)])?;
    let (one, row, mut out) = ([1, 1, 1], [1.0], [0.0]);
    cache.append(0, View::new(&row[..], one)?, View::new(&[new][..], one)?, &[false])?;
    cache.attend(0, View::new(&row[..], one)?, 1.0, ViewMut::new(&mut out[..], one)?, None)?;
    cache.release(sequence)?;
    Ok(out[0])
}

#[test]
fn what_was_dropped_is_not_attended() {
    let mut cache = paged_kernels::Cpu::new(SHAPE).unwrap();
    let drops = [true, false, true]; // the last is still in the window of the new token
    assert_eq!(mean(&mut cache, &[100.0, 2.0, 6.0], &drops, 4.0).unwrap(), 4.0);
    assert_eq!(mean(&mut cache, &[100.0, 2.0, 6.0], &[false; 3], 4.0).unwrap(), 28.0);
    assert_eq!(cache.stats().pages_used, 0);
}
