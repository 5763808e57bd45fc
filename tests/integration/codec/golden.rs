//! Captured datagrams decode to what was seen to be right. The snapshots stand beside them.

use std::fs;
use std::path::{Path, PathBuf};

use conntrail::ctnetlink::{Tally, messages};

use super::describe::describe;

pub(super) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The corpus: name and datagrams of each file, in order of name.
pub(super) fn corpus() -> Vec<(String, Vec<Vec<u8>>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "hex"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 15, "the corpus is not there: {paths:?}");
    paths.iter().map(|path| (stem(path), read(path))).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_str().unwrap().to_owned()
}

fn read(path: &Path) -> Vec<Vec<u8>> {
    let text = fs::read_to_string(path).unwrap();
    let datagrams: Vec<Vec<u8>> =
        text.lines().filter(|line| !line.starts_with('#')).map(from_hex).collect();
    assert!(!datagrams.is_empty(), "{} has no datagrams", path.display());
    datagrams
}

fn from_hex(line: &str) -> Vec<u8> {
    assert!(line.len().is_multiple_of(2), "half a byte in {line}");
    (0..line.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&line[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn captured_datagrams_decode_to_their_snapshots() {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(folder());
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let _guard = settings.bind_to_scope();
    for (name, datagrams) in corpus() {
        let mut tally = Tally::default();
        let mut lines = Vec::new();
        for datagram in &datagrams {
            for message in messages(datagram) {
                lines.push(describe(&message.unwrap(), &mut tally));
            }
        }
        assert_eq!(tally, Tally::default(), "{name} has something that is not understood");
        insta::assert_snapshot!(name, lines.join("\n"));
    }
}
