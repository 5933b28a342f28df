/// The sizes of a model that say what pruning it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers.
    pub layers: usize,
    /// The size of hidden states.
    pub hidden: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// The width of a head.
    pub head_dim: usize,
    /// The width of the MLP.
    pub intermediate: usize,
}

/// What a surrogate adds to its model, as the KVzap paper counts (arXiv 2601.07891, appendix): the
/// multiplications of linear maps alone, for each token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overhead {
    /// Numbers in the surrogate, biases too.
    pub parameters: usize,
    /// Floating-point operations of the surrogate, a token.
    pub flops: usize,
    /// Those of the model's linear maps, a token.
    pub model_flops: usize,
}

impl ModelShape {
    /// The models that NVIDIA publishes surrogates for, as `nvidia/KVzap-linear-` and
    /// `nvidia/KVzap-mlp-` with this name. An MLP there is an eighth as wide as the hidden states.
    pub const PUBLISHED: [(&str, Self); 3] = [
        ("Qwen3-8B", Self::new(36, 4096, [32, 8, 128], 12288)),
        ("Llama-3.1-8B-Instruct", Self::new(32, 4096, [32, 8, 128], 14336)),
        ("Qwen3-32B", Self::new(64, 5120, [64, 8, 128], 25600)),
    ];

    const fn new(layers: usize, hidden: usize, heads: [usize; 3], intermediate: usize) -> Self {
        let [query_heads, kv_heads, head_dim] = heads;
        Self { layers, hidden, query_heads, kv_heads, head_dim, intermediate }
    }

    /// Bytes that a token takes in the cache, for keys and values of `bytes` bytes a number.
    pub fn cache_bytes(&self, bytes: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * bytes
    }

    /// What a surrogate costs: an MLP of `width`, or a linear one.
    pub fn overhead(&self, width: Option<usize>) -> Overhead {
        let Self { layers, hidden, query_heads, kv_heads, head_dim, intermediate } = *self;
        let weights = width.map_or(hidden * kv_heads, |width| width * (hidden + kv_heads));
        let attention = 2 * hidden * (query_heads + kv_heads) * head_dim;
        Overhead {
            parameters: layers * (weights + width.unwrap_or(0) + kv_heads),
            flops: layers * 2 * weights,
            model_flops: layers * 2 * (attention + 3 * hidden * intermediate),
        }
    }
}

impl Overhead {
    /// The surrogate's operations over the model's, and so its weights over the model's.
    pub fn share(&self) -> f64 {
        self.flops as f64 / self.model_flops as f64
    }
}
