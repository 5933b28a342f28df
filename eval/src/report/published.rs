//! Published points of RULER-4096, to stand in grey behind ours. Where the share removed was not told, a point is left out.

/// A result of others.
#[derive(Debug)]
pub struct Published {
    pub press: &'static str,
    /// Percent removed.
    pub x: f64,
    /// Percent right, the mean of 13 tasks.
    pub y: f64,
    pub source: &'static str,
}

const LEADERBOARD: &str = "the kvpress leaderboard (RULER 4096), as copied by third parties";
const PAPER: &str = "KVzap, arXiv 2601.07891, table 2";
const COMPACTOR: &str = "NVIDIA/kvpress pull request 143";
const KVZIP: &str = "NVIDIA/kvpress pull request 93";

type Points = &'static [(&'static str, f64, f64, &'static str)];

const QWEN3_8B: Points = &[
    ("no_press", 0.0, 95.32, LEADERBOARD),
    ("kvzap_mlp -4", 74.0, 95.09, PAPER),
    ("kvzip", 87.5, 92.24, LEADERBOARD),
    ("kvzip", 96.875, 19.85, LEADERBOARD),
    ("knorm", 25.0, 87.2, LEADERBOARD),
    ("knorm", 50.0, 68.3, LEADERBOARD),
    ("knorm", 75.0, 32.6, LEADERBOARD),
    ("knorm", 87.5, 8.9, LEADERBOARD),
    ("compactor", 25.0, 92.6, COMPACTOR),
    ("compactor", 50.0, 85.0, COMPACTOR),
    ("compactor", 75.0, 72.3, COMPACTOR),
    ("compactor", 95.0, 51.7, COMPACTOR),
];

const LLAMA_31_8B: Points = &[
    ("no_press", 0.0, 95.69, PAPER),
    ("kvzap_linear -7", 68.0, 95.55, PAPER),
    ("kvzip", 25.0, 95.5, KVZIP),
    ("kvzip", 50.0, 95.5, KVZIP),
    ("kvzip", 70.0, 95.3, KVZIP),
    ("kvzip", 80.0, 94.9, KVZIP),
    ("kvzip", 90.0, 90.5, KVZIP),
    ("compactor", 25.0, 94.0, COMPACTOR),
    ("compactor", 50.0, 87.7, COMPACTOR),
    ("compactor", 75.0, 77.8, COMPACTOR),
    ("compactor", 95.0, 63.5, COMPACTOR),
];

/// Those of the same model at the same length.
pub fn of(benchmark: &str) -> Vec<Published> {
    let points = match benchmark {
        name if !name.starts_with("ruler 4096") => &[][..],
        name if name.contains("Qwen3-8B") => QWEN3_8B,
        name if name.contains("Llama-3.1-8B-Instruct") => LLAMA_31_8B,
        _ => &[],
    };
    points.iter().map(|&(press, x, y, source)| Published { press, x, y, source }).collect()
}
