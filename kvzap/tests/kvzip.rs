//! The plan of KVzip's passes, and the press against its definition in f64.

use kvzap::Rules;

#[test]
fn a_context_is_repeated_chunk_by_chunk_each_led_in_by_the_end_of_the_last() {
    let context: Vec<u32> = (100..125).collect();
    let rules = Rules { chunk: 10, ..Rules::default() };
    let passes = rules.passes(&context, 3, [&[1, 2], &[3]], &[9]);
    let chunks: Vec<_> = passes.iter().map(|pass| pass.chunk.clone()).collect();
    assert_eq!(chunks, [3..13, 13..23, 23..25]);
    let ids = |first: &[u32], before: std::ops::Range<u32>, chunk: std::ops::Range<u32>| {
        [first, &before.collect::<Vec<_>>(), &[9], &chunk.collect::<Vec<_>>()].concat()
    };
    assert_eq!(passes[0].ids, ids(&[1, 2], 0..0, 103..113));
    assert_eq!(passes[1].ids, ids(&[3], 105..113, 113..123));
    assert_eq!(passes[2].ids, ids(&[3], 115..123, 123..125));

    // A chunk shorter than eight lends what it has, and never the prefix.
    let short = Rules { chunk: 5, ..Rules::default() }.passes(&context, 3, [&[], &[]], &[]);
    assert_eq!(short[1].ids, (103..113).collect::<Vec<_>>());
    let count = |tokens, prefix| rules.passes(&context[..tokens], prefix, [&[], &[]], &[]).len();
    assert_eq!(
        [count(13, 3), count(14, 3), count(3, 3), count(3, 9), count(0, 0)],
        [1, 2, 0, 0, 0]
    );
}

#[test]
fn whose_rules_are_whose() {
    let (ours, kvpress, repository) = (Rules::default(), Rules::kvpress(), Rules::repository());
    assert_eq!((ours.chunk, kvpress.chunk, repository.chunk), (2048, 2048, 2000));
    assert_eq!(
        (ours.keep_prefix, kvpress.keep_prefix, repository.keep_prefix),
        (true, false, true)
    );
    assert_eq!((ours.sinks, kvpress.sinks, repository.sinks), (Some(4), Some(4), None));
    assert_eq!(ours.instructions, kvpress.instructions);
    assert_eq!(repository.instructions[1], format!("{} ", ours.instructions[1]));
}

#[cfg(feature = "tch")]
mod press {
    use kvzap::{Error, Kvzip, LayerInput, Pass, Rules, Scorer};
    use tch::{Device, Kind, Tensor};

    const HEADS: i64 = 2;
    const GROUP: i64 = 3;
    const DIM: i64 = 4;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// A layer of a context, and of a pass after it.
    struct Layer {
        keys: Tensor,
        values: Tensor,
        pass: [Tensor; 4], // hidden, queries, keys, values
        output_projection: Tensor,
    }

    impl Layer {
        fn new(tokens: i64, rows: i64) -> Self {
            let pass = [
                random(&[1, rows, 10]),
                random(&[1, HEADS * GROUP, rows, DIM]) * 3.0,
                random(&[1, HEADS, rows, DIM]),
                random(&[1, HEADS, rows, DIM]),
            ];
            let context = [1, HEADS, tokens, DIM];
            Self {
                keys: random(&context),
                values: random(&context),
                pass,
                output_projection: random(&[10, HEADS * GROUP * DIM]),
            }
        }

        fn input(&self, layer: usize) -> LayerInput<'_, Tensor> {
            let [hidden, queries, keys, values] = &self.pass;
            LayerInput { layer, hidden, queries, keys, values }
        }

        /// The score of token `i` of the chunk `first..last`, in loops over `sinks` tokens, the
        /// chunk and the pass's own.
        fn definition(&self, head: i64, i: i64, sinks: i64, chunk: (i64, i64), plus: bool) -> f64 {
            let [hidden, queries, keys, _] = &self.pass;
            let dot = |a: &Tensor, b: &Tensor| {
                (a * b).to_kind(Kind::Double).sum(Kind::Double).double_value(&[])
            };
            let mut best = 0.0_f64;
            for g in 0..GROUP {
                let head_of_queries = head * GROUP + g;
                for j in 0..queries.size()[2] {
                    let query = queries.get(0).get(head_of_queries).get(j);
                    let logit = |key: Tensor| (dot(&query, &key) / (DIM as f64).sqrt()).exp();
                    let of_context = |k| logit(self.keys.get(0).get(head).get(k));
                    let sum: f64 = (0..sinks).chain(chunk.0..chunk.1).map(of_context).sum::<f64>()
                        + (0..=j).map(|k| logit(keys.get(0).get(head).get(k))).sum::<f64>();
                    let mut weight = of_context(i) / sum;
                    if plus {
                        let slice = self.output_projection.narrow(1, head_of_queries * DIM, DIM);
                        let wide = slice.matmul(&self.values.get(0).get(head).get(i));
                        weight *= wide.norm().double_value(&[])
                            / hidden.get(0).get(j).norm().double_value(&[]);
                    }
                    best = best.max(weight);
                }
            }
            best
        }
    }

    #[test]
    fn scores_are_their_definition() {
        tch::manual_seed(4);
        let prefix = 6;
        let layers = [Layer::new(20, 7), Layer::new(20, 7)];
        for (rules, sinks) in [(Rules::default(), [4, 4]), (Rules::repository(), [6, 6])] {
            for plus in [false, true] {
                let projections =
                    layers.iter().map(|layer| layer.output_projection.shallow_clone());
                let kvzip = if plus {
                    Kvzip::plus(rules.clone(), prefix, projections.collect())
                } else {
                    Kvzip::new(rules.clone(), prefix)
                };
                for layer in &layers {
                    kvzip.context(&layer.keys, &layer.values).unwrap();
                }
                let scorer: Box<dyn Scorer<Tensor> + Send> = Box::new(kvzip.clone());
                for (chunk, sinks) in [(6, 13), (13, 20)].into_iter().zip(sinks) {
                    kvzip.begin(&Pass {
                        ids: Vec::new(),
                        chunk: chunk.0 as usize..chunk.1 as usize,
                    });
                    for (index, layer) in layers.iter().enumerate() {
                        let of_pass = scorer.score(layer.input(index)).unwrap();
                        assert_eq!(of_pass.size(), [1, HEADS, 7]);
                        assert_eq!(
                            of_pass.isinf().all().int64_value(&[]),
                            1,
                            "nothing of a pass goes"
                        );
                        let scores = &kvzip.scores().unwrap()[index];
                        for (head, i) in
                            (0..HEADS).flat_map(|head| (chunk.0..chunk.1).map(move |i| (head, i)))
                        {
                            let (found, wanted) = (
                                scores.double_value(&[0, head, i]),
                                layer.definition(head, i, sinks, chunk, plus),
                            );
                            assert!((found / wanted - 1.0).abs() < 1e-5, "{found} {wanted}");
                        }
                    }
                }
                let kept = kvzip.scores().unwrap()[0].isinf().sum(Kind::Int64).int64_value(&[]);
                assert_eq!(kept, HEADS * 6, "the prefix stays");
            }
        }
    }

    #[test]
    fn fewer_sinks_than_the_rule_has_are_before_a_chunk_at_the_beginning() {
        tch::manual_seed(8);
        let layer = Layer::new(9, 3);
        let kvzip = Kvzip::new(Rules::kvpress(), 2);
        kvzip.context(&layer.keys, &layer.values).unwrap();
        kvzip.begin(&Pass { ids: Vec::new(), chunk: 2..9 });
        let _ = kvzip.score(layer.input(0)).unwrap();
        let scores = kvzip.scores().unwrap().remove(0);
        let wanted = layer.definition(1, 5, 2, (2, 9), false);
        assert!((scores.double_value(&[0, 1, 5]) / wanted - 1.0).abs() < 1e-5);
        assert_eq!(scores.isinf().sum(Kind::Int64).int64_value(&[]), HEADS * 4, "kvpress's sinks");
    }

    #[test]
    fn passes_without_a_context_or_a_chunk_of_it_are_refused() {
        let layer = Layer::new(9, 3);
        let kvzip = Kvzip::new(Rules::default(), 0);
        assert!(matches!(kvzip.score(layer.input(0)), Err(Error::Layer { layer: 0, layers: 0 })));
        kvzip.context(&layer.keys, &layer.values).unwrap();
        assert!(matches!(kvzip.score(layer.input(0)), Err(Error::Chunk { tokens: 9, .. })));
        kvzip.begin(&Pass { ids: Vec::new(), chunk: 4..10 });
        let error = kvzip.score(layer.input(0)).unwrap_err().to_string();
        assert!(error.contains("4..10 of 9 tokens") && error.contains("begin"), "{error}");
        let other = Layer { keys: random(&[1, 3, 9, DIM]), ..Layer::new(9, 3) };
        assert!(matches!(
            kvzip.context(&other.keys, &other.values),
            Err(Error::Shape { name: "values", .. })
        ));
        let plus = Kvzip::plus(Rules::default(), 0, vec![random(&[10, 5])]);
        plus.context(&layer.keys, &layer.values).unwrap();
        plus.begin(&Pass { ids: Vec::new(), chunk: 0..9 });
        let error = plus.score(layer.input(0)).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "output_projection", .. }), "{error}");
    }
}
