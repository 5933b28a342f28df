//! A report of a few made-up runs, ours and one of kvpress's.

use super::*;
use crate::results::Journal;
use serde_json::json;
use std::fs;
use std::path::Path;

fn run(out: &Path, press: &str, removed: f64, tokens: u64, right: &dyn Fn(u64) -> bool) {
    let folder = out.join(format!("needle__{tokens}__a--<b>__{press}__{removed:.2}"));
    let settings = json!({"dataset": "needle", "data_dir": tokens.to_string(), "model": "a/<b>", "tokens": tokens});
    let mut journal =
        Journal::open(&folder, "journal.jsonl", settings.as_object().unwrap()).unwrap();
    for depth in [0, 50, 100] {
        for index in 0..20 {
            let row = Row {
                task: format!("depth_{depth:03}"),
                index,
                score: f64::from(right(index)),
                compression_ratio: removed,
                context_tokens: 40,
                kept: if removed > 0.0 { vec![vec![10, 20]; 3] } else { Vec::new() },
                together: 2,
                facts: json!({"depth": depth}).as_object().unwrap().clone(),
                ..Row::default()
            };
            journal.append(&row).unwrap();
        }
    }
}

fn made_up() -> (tempfile::TempDir, Report) {
    let folder = tempfile::tempdir().unwrap();
    for tokens in [512, 1024] {
        run(folder.path(), "no_press", 0.0, tokens, &|_| true);
        run(folder.path(), "random", 0.5, tokens, &|index| index % 2 == 0);
    }
    let theirs = folder.path().join("ruler__4096__Qwen--Qwen3-8B__knorm__0.50");
    fs::create_dir(&theirs).unwrap();
    let csv = "answer,task,predicted_answer,compression_ratio\n\"['70' '80']\",vt,it is 70,0.5\n\"['x']\",qa_1,X,0.5\n";
    fs::write(theirs.join("predictions.csv"), csv).unwrap();
    let (runs, notes) = load(&[folder.path()]).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let report = report(&runs, notes).unwrap();
    (folder, report)
}

#[test]
fn means_intervals_and_paired_differences_are_those_of_the_rows() {
    let (_folder, report) = made_up();
    let [long, needle, ruler] = &*report.benchmarks else { panic!("{report:?}") };
    let names = [long, needle, ruler].map(|benchmark| benchmark.name.as_str());
    assert_eq!(names, ["needle 1024 a/<b>", "needle 512 a/<b>", "ruler 4096 Qwen--Qwen3-8B"]);
    assert_eq!(report.maps.len(), 2, "a map a method, of both lengths");
    let lines: Vec<_> =
        needle.lines.iter().map(|line| (line.press.as_str(), line.score, line.removed)).collect();
    assert_eq!(lines, [("no_press", 100.0, 0.0), ("random", 50.0, 50.0)]);
    let random = needle.lines.iter().find(|line| line.press == "random").unwrap();
    // The mean of 60 coins: half a percent's standard error is 6.5, so about 37 to 63.
    let [low, high] = random.interval;
    assert!((34.0..41.0).contains(&low) && (59.0..66.0).contains(&high), "{low} {high}");
    assert_eq!(random.kept, vec![vec![25.0, 50.0]; 3]);
    assert_eq!((random.together, needle.lines[0].kept.len()), (2, 0));
    let difference = random.difference.unwrap();
    assert_eq!(difference.mean, -50.0);
    assert!(
        (difference.low - (low - 100.0)).abs() < 3.0
            && (difference.high - (high - 100.0)).abs() < 3.0
    );
    let full = needle.lines.iter().find(|line| line.press == "no_press").unwrap();
    assert_eq!(full.interval, [100.0, 100.0]);
    // kvpress's rows are scored again: half of vt's answers, and any letter case.
    assert_eq!(ruler.lines[0].tasks, [("qa_1".to_owned(), 100.0), ("vt".to_owned(), 50.0)].into());
    assert_eq!(report.notes.len(), 1, "no full cache beside kvpress's run: {:?}", report.notes);
}

#[test]
fn a_pair_differs_less_than_its_parts_where_the_same_samples_are_hard() {
    let rows = |right: &dyn Fn(u64) -> bool| -> Vec<Row> {
        let row = |index| Row {
            task: "t".into(),
            index,
            score: f64::from(right(index)),
            ..Row::default()
        };
        (0..100).map(row).collect()
    };
    let (one, other) = (rows(&|i| i < 50), rows(&|i| i < 52));
    let [low, high] = bootstrap::mean_of_tasks(&one);
    let paired = bootstrap::paired(&one, &other).unwrap();
    assert!(high - low > 15.0 && paired.high - paired.low < 8.0, "{low} {high} {paired:?}");
    assert_eq!(bootstrap::paired(&one, &[]), None);
}

#[test]
fn the_page_is_whole_escaped_and_needs_nothing_from_elsewhere() {
    let (_folder, report) = made_up();
    let page = report.html().unwrap();
    for wanted in [
        "<svg",
        "needle 512 a/&lt;b&gt;",
        "512",
        "knorm",
        "Grey: ",
        "NVIDIA/kvpress pull request 143",
        "depth_050",
        "layer 2, kv head 1: 50.0 % kept",
    ] {
        assert!(page.contains(wanted), "{wanted}");
    }
    assert!(!page.contains("<b>") && !page.contains("src=") && !page.contains("url("));
    assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    let markdown = report.markdown();
    assert!(markdown.contains("| random | 0.50 | 60 | 50.0 % | 50.0 |"), "{markdown}");
    let csv = String::from_utf8(report.csv().unwrap()).unwrap();
    assert!(csv.contains("ruler 4096 Qwen--Qwen3-8B,knorm,0.50,vt,2,50,50,,"), "{csv}");
    let pictures = report.pictures();
    assert!(
        pictures.iter().any(|(name, svg)| name == "needle_512_a_<b>" && svg.contains("--paper"))
    );
}

#[test]
fn results_that_cannot_be_read_are_notes_and_a_folder_of_none_is_refused() {
    let (folder, _) = made_up();
    let bad = folder.path().join("longbench__lcc__m__knorm__0.50");
    fs::create_dir(&bad).unwrap();
    fs::write(bad.join("predictions.csv"), "answers,predicted_answer\nx,x\n").unwrap();
    let (runs, notes) = load(&[folder.path()]).unwrap();
    assert_eq!((runs.len(), notes.len()), (5, 1));
    assert!(notes[0].contains("not longbench"), "{notes:?}");
    let empty = tempfile::tempdir().unwrap();
    assert!(load(&[empty.path()]).unwrap_err().to_string().contains("holds no results"));
}

#[test]
fn shards_from_several_machines_are_one_run_and_what_was_left_out_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let settings =
        json!({"dataset": "ruler", "data_dir": "512", "model": "m", "method": "full", "seed": 1});
    let machine = |name: &str, seed: u64, indices: std::ops::Range<u64>| {
        let mut settings = settings.as_object().unwrap().clone();
        settings.insert("seed".into(), seed.into());
        let run = folder.path().join(name).join("ruler__512__m__no_press__0.00");
        let mut journal = Journal::open(&run, &format!("journal-{name}.jsonl"), &settings).unwrap();
        for index in indices {
            let mut row = Row { task: "qa_2".into(), index, score: 1.0, ..Row::default() };
            row.facts.insert("paragraphs_dropped".into(), (index % 2).into());
            journal.append(&row).unwrap();
        }
        for _ in 0..2 {
            journal.refuse("qa_1", 600).unwrap(); // a run that goes on finds it again
        }
        folder.path().join(name)
    };
    let [one, two] = [machine("1-of-2", 1, 0..3), machine("2-of-2", 1, 2..6)];
    let (runs, notes) = load(&[&one, &two]).unwrap();
    assert_eq!((runs.len(), runs[0].rows.len()), (1, 6), "sample 2 is there twice");
    let report = report(&runs, notes).unwrap();
    let said = report.notes().join("\n");
    assert!(said.contains("qa_1 is left out: a sample needs about 600 tokens"), "{said}");
    assert!(said.contains("of qa_2 3 of 6 samples had no room for all their paragraphs"), "{said}");
    assert_eq!(report.notes().len(), 2, "{said}");
    assert!(report.html().unwrap().contains("qa_1 is left out"));
    let text = fs::read_to_string(runs[0].folder.join("journal-1-of-2.jsonl")).unwrap();
    assert_eq!(text.matches("refused").count(), 1);

    // Another seed is another run, and is not compared in pairs.
    let (runs, _) = load(&[&one, &machine("other", 2, 0..3)]).unwrap();
    assert_eq!(runs.len(), 2);
    let report = super::report(&runs, Vec::new()).unwrap();
    assert!(report.notes()[0].contains("seed is not the same in all runs"), "{:?}", report.notes());
    assert!(report.benchmarks[0].lines.iter().all(|line| line.difference.is_none()));
}

/// In windows of a desk and of a phone, in both schemes: nothing is wider than the window, and dark is dark.
#[test]
#[ignore = "needs chromium"]
fn a_browser_draws_the_page_in_both_schemes_and_nothing_is_cut_off() {
    let (folder, report) = made_up();
    let path = folder.path().join("report.html");
    fs::write(&path, report.html().unwrap()).unwrap();
    // Chromium's own windows are 500 wide at least: a frame is as narrow as it is told to be.
    let frame = folder.path().join("frame.html");
    let read = "const d=contentDocument,r=d.documentElement;document.title=[r.scrollWidth-r.clientWidth,\
                d.querySelectorAll('svg').length,getComputedStyle(d.body).backgroundColor].join(' ')";
    let charts = report.html().unwrap().matches("<svg").count();
    for (scheme, paper) in [(0, "rgb(21, 24, 28)"), (1, "rgb(255, 255, 255)")] {
        for width in [1280, 390] {
            let inner = "<iframe src=\"report.html\" style=\"border:0;height:900px;width:";
            fs::write(&frame, format!("{inner}{width}px\" onload=\"{read}\"></iframe>")).unwrap();
            let run = std::process::Command::new("chromium")
                .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
                .args(["--allow-file-access-from-files", "--window-size=1400,1000"])
                .args(["--enable-logging=stderr", "--log-level=0"])
                .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
                .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
                .arg(format!("file://{}", frame.display()))
                .output()
                .expect("chromium is installed");
            let page = String::from_utf8_lossy(&run.stdout);
            assert!(page.contains(&format!("<title>0 {charts} {paper}</title>")), "{page}");
            let said = String::from_utf8_lossy(&run.stderr);
            assert!(!said.contains("CONSOLE"), "{said}");
        }
    }
}
