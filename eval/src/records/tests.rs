use super::*;
use serde_json::json;
use std::fs;

fn published() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/published")
}

#[test]
fn a_data_set_is_named_by_its_file_or_by_the_folder_of_its_parts() {
    for (path, wanted) in [
        ("ruler/4096.jsonl", "4096"),
        ("ruler/4096", "4096"),
        ("ruler/4096/test-00000-of-00002.parquet", "4096"),
        ("hotpotqa_e.jsonl", "hotpotqa_e"),
        ("test-0-of-2.jsonl", "test-0-of-2"),
        ("test-00000-of-00002.parquet", "published"),
    ] {
        assert_eq!(name(&published().join(path)), wanted, "{path}");
    }
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_holds_what_json_lines_hold() {
    for set in ["ruler/4096", "longbench/hotpotqa"] {
        let lines = read(&published().join(format!("{set}.jsonl"))).unwrap();
        assert_eq!(read(&published().join(set)).unwrap(), lines, "{set}");
        assert!(lines.len() > 1);
    }
    let parts = files(&published().join("ruler/4096")).unwrap();
    assert_eq!(parts.iter().map(|part| read(part).unwrap().len()).collect::<Vec<_>>(), [5, 4]);
}

#[cfg(feature = "parquet")]
#[test]
fn a_folder_of_folders_is_as_many_data_sets() {
    let names = |path: &str| {
        let sets = sets(&published().join(path)).unwrap();
        sets.iter().map(|set| name(set)).collect::<Vec<_>>()
    };
    assert_eq!(names("longbench/hotpotqa"), ["hotpotqa"]);
    let error = format!("{:#}", sets(&published().join("longbench")).unwrap_err());
    assert!(error.contains("are both a data set hotpotqa; remove or rename one"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lcc.jsonl"), "{}\n").unwrap();
    fs::create_dir(folder.path().join("hotpotqa")).unwrap();
    let part = "hotpotqa/test-00000-of-00001.parquet";
    fs::copy(published().join("longbench").join(part), folder.path().join(part)).unwrap();
    let found = sets(folder.path()).unwrap();
    assert_eq!(found, [folder.path().join("hotpotqa"), folder.path().join("lcc.jsonl")]);
    assert_eq!(names("ruler/4096.jsonl"), ["4096"]);
    let error = format!("{:#}", files(&published()).unwrap_err());
    assert!(error.contains("it has folders: give one of longbench, ruler"), "{error}");
}

#[cfg(feature = "parquet")]
#[test]
fn broken_parquet_is_an_error_that_names_the_file_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.parquet");
    let whole =
        fs::read(published().join("longbench/hotpotqa/test-00000-of-00001.parquet")).unwrap();
    let mut refused = 0;
    let mut check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        if let Err(error) = read(&path) {
            let error = format!("{error:#}");
            assert!(
                error.contains("broken.parquet") && error.contains("fetch it again"),
                "{error}"
            );
            refused += 1;
        }
    };
    for length in (0..whole.len()).step_by(37) {
        check(&whole[..length]);
    }
    for at in (0..whole.len()).step_by(5) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        check(&bytes);
    }
    check(b"version https://git-lfs.github.com/spec/v1\n");
    assert!(refused > whole.len() / 37, "{refused}");
}

#[test]
fn what_is_no_file_of_samples_is_refused_with_what_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("a.csv"), "x").unwrap();
    fs::write(path("empty.jsonl"), "\n").unwrap();
    for (name, wanted) in [
        ("a.csv", "its name must end in .jsonl"),
        ("", "holds no samples; fetch it again"),
        ("nowhere", "is it there, and may you read it?"),
    ] {
        let error = format!("{:#}", read(&path(name)).unwrap_err());
        assert!(error.contains(wanted), "{name}: {error}");
    }
    fs::remove_file(path("empty.jsonl")).unwrap();
    assert!(read(folder.path()).unwrap_err().to_string().contains("holds no files that end in"));
}

#[test]
fn records_of_the_same_text_are_a_group() {
    let texts = [json!("a"), json!("b"), json!("a"), json!(null), json!(null)];
    let records: Vec<Record> =
        texts.into_iter().map(|text| Record::from_iter([("context".to_owned(), text)])).collect();
    assert_eq!(groups(&records, "context"), [0, 1, 0, 3, 3]);
}
