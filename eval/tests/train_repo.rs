//! `longctx train repo` and `longctx facts`, as a user runs them: a tiny model from scratch, killed and gone on with.
#![cfg(feature = "models")]

mod common;

use common::{longctx, ok, refused};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const WORDS: [&str; 12] = [
    "river", "engine", "paper", "winter", "carries", "slowly", "the", "old", "a", "under", "seven",
    "writes",
];

/// Documents of sentences whose words do not repeat in the same order.
fn write_text(path: &Path) {
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        WORDS[(state >> 33) as usize % WORDS.len()]
    };
    let mut sentence = || (0..9).map(|_| word()).collect::<Vec<_>>().join(" ") + ". ";
    let documents = (0..40).map(|_| (0..12).map(|_| sentence()).collect::<String>());
    let lines = documents.map(|text| format!("{}\n", json!({ "text": text })));
    std::fs::write(path, lines.collect::<String>()).unwrap();
}

fn config(vocabulary: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "tie_word_embeddings": true, "eos_token_id": 0,
    })
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        write_text(&this.0.path().join("text.jsonl"));
        std::fs::write(this.0.path().join("config.json"), config(320).to_string()).unwrap();
        this
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// A model to go on with.
    fn base(&self) -> String {
        let config = self.path("config.json");
        ok(self.train("base", &["--from-scratch", &config, "--arm", "rope", "--kilotokens", "2"]));
        self.path("base")
    }

    fn train(&self, out: &str, more: &[&str]) -> Command {
        let (text, out) = (self.path("text.jsonl"), self.path(out));
        let mut command = longctx(&["train", "repo", "--text", &text, "--out", &out]);
        let length = if more.contains(&"--length") { &[][..] } else { &["--length", "192"] };
        command.args(["--rows", "2", "--warmup", "5", "--threads", "1"]).args(length).args(more);
        command
    }
}

/// Starts a command, and kills it once a file is there.
fn kill_when_there(mut command: Command, file: &str) {
    let (mut child, start) = (command.spawn().unwrap(), Instant::now());
    while !Path::new(file).exists() && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_training_that_is_killed_goes_on_to_the_same_bytes_and_its_model_is_measured() {
    let place = Place::new();
    let (config, tokenizer) = (place.path("config.json"), place.path("whole/tokenizer.json"));
    let scratch = ["--from-scratch", &config, "--kilotokens", "30", "--save-every", "10"];
    ok(place.train("whole", &scratch));
    let loss = place.json("whole/loss.json");
    let points = loss.as_array().unwrap();
    let text = |point: &Value| point["text"].as_f64().unwrap();
    assert!(text(&points[points.len() - 1]) < 0.9 * text(&points[0]), "{loss}");
    assert!(place.read("whole/loss.svg").starts_with(b"<svg"));
    assert!(
        !Path::new(&place.path("whole/state.safetensors")).exists(),
        "its state is cleared away"
    );

    let again = [&scratch[..], &["--tokenizer", &tokenizer]].concat();
    kill_when_there(place.train("killed", &again), &place.path("killed/state.safetensors"));
    assert!(
        !Path::new(&place.path("killed/training.json")).exists(),
        "it was killed too late to tell"
    );
    let other = refused(place.train("killed", &[&again[..], &["--rate", "0.5"]].concat()));
    assert!(other.contains("other settings") && other.contains("state.safetensors"), "{other}");
    let said = ok(place.train("killed", &again));
    assert!(said.contains("goes on after step"), "{said}");
    assert!(place.read("killed/model.safetensors") == place.read("whole/model.safetensors"));
    assert_eq!(place.json("killed/loss.json"), loss);
    let done = refused(place.train("killed", &again));
    assert!(done.contains("this training is done"), "{done}");

    // The control has the same rows: what it lost first, before anything was learned, is nearly the same.
    ok(place.train("control", &[&again[..], &["--arm", "rope"]].concat()));
    let first = |name: &str| text(&place.json(name)[0]);
    assert!((first("control/loss.json") - text(&points[0])).abs() < 0.02);

    let measure = |model: &str| {
        let (model, facts) = (place.path(model), place.path(&format!("{model}/facts.json")));
        let text = place.path("text.jsonl");
        let mut command = longctx(&["facts", "measure", "--model", &model, "--text", &text]);
        command.args([
            "--contexts",
            "1024",
            "2048",
            "--samples",
            "2",
            "--threads",
            "1",
            "--output",
            &facts,
        ]);
        ok(command);
        facts
    };
    let files = ["whole", "control"].map(measure);
    let measured = place.json("whole/facts.json");
    assert_eq!((&measured["arm"], &measured["seed"]), (&json!("repo"), &json!(1)));
    assert!(measured["cells"].as_array().unwrap().len() >= 3, "{measured}");
    let mut compare = longctx(&["facts", "compare"]);
    let (rows, picture) = (place.path("rows.json"), place.path("rows.svg"));
    compare.args(&files).args(["--output", &rows, "--picture", &picture]);
    std::fs::write(&rows, r#"[{"experiment": "other"}, {"experiment": "facts"}]"#).unwrap();
    compare.args(["--course", &place.path("course.svg")]);
    let tables = ok(compare);
    assert!(tables.contains("points ahead") && tables.contains("perplexity"), "{tables}");
    assert!(place.read("rows.svg").starts_with(b"<svg"));
    assert!(place.read("course.svg").starts_with(b"<svg"));
    let rows = place.json("rows.json");
    assert_eq!(rows[0], json!({"experiment": "other"}), "rows of other experiments stay");
    assert_eq!(rows[1]["arm"], "repo", "those of this one are made anew");
    let row = |row: &&Value| row["against"] == "rope" && row["context"] == "outside";
    assert!(rows.as_array().unwrap().iter().any(|r| row(&r)), "{rows}");
    let wrong = refused(longctx(&["facts", "compare", &place.path("rows.json")]));
    assert!(wrong.contains("facts measure writes; give the file that its --output"), "{wrong}");
}

#[test]
fn a_model_is_gone_on_with_and_its_overlay_is_read() {
    let place = Place::new();
    let base = place.base();
    for train in ["maps", "qk", "low-rank", "everything"] {
        let more =
            ["--model", &base, "--train", train, "--kilotokens", "2", "--rank", "2", "--recompute"];
        ok(place.train(train, &more));
        let overlay = place.path(&format!("{train}/repo.safetensors"));
        let mut measure = longctx(&["facts", "measure", "--model", &base, "--repo", &overlay]);
        measure.args(["--samples", "1"]);
        measure.args(["--text", &place.path("text.jsonl"), "--contexts", "1024", "--threads", "1"]);
        measure.args(["--output", &place.path("facts.json")]);
        ok(measure);
    }
    let nothing = ["--model", &base, "--train", "maps", "--arm", "rope"];
    let text = refused(place.train("nothing", &nothing));
    assert!(text.contains("nothing would be trained"), "{text}");
    let long = refused(place.train("long", &["--model", &base, "--length", "4096"]));
    assert!(long.contains("the model reads 4096"), "{long}");
    let diverged = ["--model", &base, "--arm", "rope", "--kilotokens", "30", "--rate", "1e30"];
    let text = refused(place.train("diverged", &diverged));
    assert!(text.contains("NaN or infinite") && text.contains("smaller --rate"), "{text}");
    assert!(!Path::new(&place.path("diverged/repo.safetensors")).exists());
}

/// What a model of learned positions costs, and what it knows when its own surrogate forgets for it.
#[test]
fn a_twin_is_timed_beside_its_index_and_asked_when_much_is_forgotten() {
    let place = Place::new();
    let (config, text) = (place.path("config.json"), place.path("text.jsonl"));
    let scratch = ["--from-scratch", &config, "--kilotokens", "2"];
    ok(place.train("slowed", &[&scratch[..], &["--arm", "slowed"]].concat()));
    ok(place.train("rope", &[&scratch[..], &["--arm", "rope"]].concat()));
    let [slowed, rope] = ["slowed", "rope"].map(|name| place.path(name));
    let cost = place.path("cost.json");
    let bench = ["bench", "--positions", "--context", "64", "--decode", "2", "--threads", "1"];
    let timed = ["--model", &slowed, "--repeat", "3", "--results", &cost];
    ok(longctx(&[&bench[..], &timed].concat()));
    ok(longctx(&[&bench[..], &timed].concat()));
    let rows = place.json("cost.json");
    let of = |what: &str| rows.as_array().unwrap().iter().filter(|r| r["what"] == what).count();
    let counts = ["numbers", "prefill", "decode step"].map(of);
    assert_eq!(counts, [1, 1, 1], "a second run takes the first's place: {rows}");
    let maps = rows[0]["learned"].as_f64().unwrap() - rows[0]["index"].as_f64().unwrap();
    assert_eq!(maps, (2 * (2 * 4 * 32 + 2 * 4)) as f64, "two layers' maps, an eighth wide");
    let none = refused(longctx(&[&bench[..], &["--model", &rope]].concat()));
    assert!(none.contains("no learned positions") && none.contains("pe_config"), "{none}");

    let [passages, kvzap, curve] =
        ["passages.jsonl", "slowed/kvzap", "slowed/curve.json"].map(|name| place.path(name));
    let drawn = ["--passages", "9", "--tokens", "256", "--output", &passages];
    ok(longctx(
        &[&["facts", "passages", "--model", &slowed, "--text", &text][..], &drawn].concat(),
    ));
    let lines = String::from_utf8(place.read("passages.jsonl")).unwrap();
    assert!(lines.lines().count() == 9 && lines.contains(" of "), "{lines}");
    let pieces = ["--pieces", "8", "--held-out", "2", "--tokens", "64", "--rows", "32"];
    let on = ["--model", &slowed, "--threads", "1"];
    let fit = ["train", "kvzap", "--text", &text, &passages, "--out", &kvzap];
    ok(longctx(&[&fit[..], &on, &pieces].concat()));
    let asked = ["curve", "--surrogate", &kvzap, "--documents", &text, "--task", "facts"];
    let ways = ["--remove", "0.5", "--method", "kvzap", "random", "--samples", "9"];
    let written = ["--tokens", "1024", "--json", &curve];
    ok(longctx(&[&asked[..], &on, &ways, &written].concat()));

    let rows = place.path("rows.json");
    std::fs::write(&rows, r#"[{"experiment": "other"}]"#).unwrap();
    let picture = place.path("forgotten.svg");
    let table =
        ok(longctx(&["facts", "forgetting", &curve, "--output", &rows, "--picture", &picture]));
    assert!(table.contains("slowed") && table.contains("50 % gone"), "{table}");
    assert!(place.read("forgotten.svg").starts_with(b"<svg"));
    let rows = place.json("rows.json");
    assert_eq!(rows[0], json!({"experiment": "other"}));
    let row = |method: &str| {
        let rows = rows.as_array().unwrap();
        rows.iter()
            .find(|row| row["method"] == method)
            .unwrap_or_else(|| panic!("{rows:?}"))
            .clone()
    };
    let found = row("kvzap");
    let said = ["arm", "seed", "removed", "n"].map(|name| found[name].clone());
    assert_eq!(said, [json!("slowed"), json!(1), json!(0.5), json!(9)]);
    assert_eq!(row("full")["removed"], 0.0);
    let wrong = refused(longctx(&["facts", "forgetting", &place.path("slowed/training.json")]));
    assert!(wrong.contains("is not what longctx curve --json writes; give"), "{wrong}");
}

/// The bytes of an overlay's tensors, without the header, whose metadata have no order.
fn numbers(place: &Place, of: &str) -> Vec<u8> {
    let bytes = place.read(&format!("{of}/repo.safetensors"));
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

#[test]
fn arms_side_by_side_learn_what_each_learns_alone() {
    let place = Place::new();
    let base = place.base();
    let upper = ["--model", &base, "--train", "qk", "--train-from", "1", "--first-layer", "1"];
    let way = ["--settling", "0.3", "--text-every", "2", "--kilotokens", "16"];
    let some = [&upper[..], &way, &["--save-every", "5"]].concat();
    let both = [&some[..], &["--arm", "rope", "slowed"]].concat();
    // Killed when one arm's state is there and the other's perhaps not.
    kill_when_there(place.train("both", &both), &place.path("both/rope/state.safetensors"));
    assert!(!Path::new(&place.path("both/slowed/training.json")).exists());
    let said = ok(place.train("both", &both));
    assert!(said.contains("rope goes on after step"), "{said}");
    for arm in ["rope", "slowed"] {
        ok(place.train(arm, &[&some[..], &["--arm", arm]].concat()));
        assert!(numbers(&place, &format!("both/{arm}")) == numbers(&place, arm), "{arm}");
    }
    // Interrupted once more, when one arm's result was written: that stays, and the other is made again.
    let written = place.read("both/rope/training.json");
    std::fs::remove_dir_all(place.path("both/slowed")).unwrap();
    let other = refused(place.train("both", &[&both[..], &["--clip", "2"]].concat()));
    assert!(other.contains("rope/training.json is there"), "{other}");
    let said = ok(place.train("both", &both));
    assert!(said.contains("rope is done"), "{said}");
    assert!(numbers(&place, "both/slowed") == numbers(&place, "slowed"));
    assert!(place.read("both/rope/training.json") == written);
    let done = refused(place.train("both", &both));
    assert!(done.contains("this training is done"), "{done}");
    let at_once = [&upper[..], &["--text-every", "2", "--kilotokens", "16", "--arm", "slowed"]];
    ok(place.train("unsettled", &at_once.concat()));
    assert!(numbers(&place, "unsettled") != numbers(&place, "slowed"));
    let untrained = ["--model", &base, "--train-from", "2", "--first-layer", "1"];
    let text = refused(place.train("untrained", &untrained));
    assert!(text.contains("would stay as they begin"), "{text}");
    let twice = refused(place.train("twice", &[&some[..], &["--arm", "rope", "rope"]].concat()));
    assert!(twice.contains("give each once"), "{twice}");
    let own = ["--arm", "r2n1", "--layers", "1"];
    let own = refused(place.train("own", &[&["--model", &base][..], &own].concat()));
    assert!(own.contains("arm r2n1 has layers of its own"), "{own}");
    for (flag, layers) in [("--layers", &["1", "9"][..]), ("--first-layer", &["9"])] {
        let above = ["--model", &base, "--arm", "slowed", flag];
        let above = refused(place.train("above", &[&above[..], layers].concat()));
        assert!(above.contains(&format!("{flag} 9: the model has")), "{above}");
    }
}
