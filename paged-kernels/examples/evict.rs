//! Page tables of two heads that keep different tokens, after a prefill and while decoding.

use paged_kernels::{CacheShape, Dtype, PagedAttention, Reference, Sequence, View};

const WINDOW: usize = 4;

fn print(cache: &Reference, text: Sequence, when: &str) -> paged_kernels::Result<()> {
    println!("{when}");
    for (head, table) in cache.tables(text, 0)?.iter().enumerate() {
        let pages = table.pages().iter().map(|page| page.to_string()).collect::<Vec<_>>();
        let recent = table.recent().map(|recent| {
            let mark = if recent.drop { "-" } else { "" };
            format!("{}{mark}", recent.slot.index())
        });
        let recent = recent.collect::<Vec<_>>().join(" ");
        println!(
            "  head {head}: {:>2} rows in pages [{}], newest in slots {recent}",
            table.len(),
            pages.join(" ")
        );
    }
    let stats = cache.stats();
    println!("  {} pages, {} bytes (peak {})", stats.pages_used, stats.bytes, stats.peak_bytes);
    Ok(())
}

fn main() -> paged_kernels::Result<()> {
    let (layers, kv_heads, query_heads, head_dim) = (1, 2, 2, 8);
    let (page_size, window, pages, dtype) = (4, WINDOW, 64, Dtype::F32);
    let shape =
        CacheShape { layers, kv_heads, query_heads, head_dim, page_size, window, pages, dtype };
    let mut cache = Reference::new(shape)?;
    let rows = [0.0; 2 * 24 * 8];

    println!(
        "a slot marked - goes to the next new token once it is older than the window of {WINDOW}\n"
    );
    let full = cache.allocate()?;
    let prompt = View::new(&rows[..], [2, 24, 8])?;
    cache.fill(full, 0, prompt, prompt, &[false; 48])?;
    print(&cache, full, "24 tokens, all kept")?;
    cache.release(full)?;

    // Head 0 keeps one token in three, head 1 what is in the window.
    let drops = (0..48).map(|i| i >= 24 || i % 3 > 0).collect::<Vec<_>>();
    let text = cache.allocate()?;
    cache.fill(text, 0, prompt, prompt, &drops)?;
    print(&cache, text, "24 tokens, head 0 keeps one in three, head 1 the window alone")?;

    for tokens in [1, 1, 6, 1] {
        cache.begin_step(&[(text, tokens)])?;
        let new = View::new(&rows[..2 * tokens * 8], [2, tokens, 8])?;
        let drops = (0..2 * tokens).map(|i| i >= tokens).collect::<Vec<_>>();
        cache.append(0, new, new, &drops)?;
        print(&cache, text, &format!("a step of {tokens}: kept by head 0, dropped by head 1"))?;
    }
    Ok(())
}
