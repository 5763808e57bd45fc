//! The golden corpus: files of hex lines in tests/golden, one datagram a line. The bench reads it too.

#![allow(clippy::unwrap_used, dead_code)] // Test code; each of its users uses another part.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn folder() -> PathBuf {
    // From the fuzz crate the same folder is one up.
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = if package.ends_with("fuzz") { package.join("..") } else { package.to_owned() };
    package.join("tests/golden")
}

/// The corpus: name and datagrams of each file, in order of name.
pub(crate) fn corpus() -> Vec<(String, Vec<Vec<u8>>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "hex"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 15, "the corpus is not there: {paths:?}");
    paths.iter().map(|path| stem(path)).map(|name| (name.clone(), read(&name))).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_str().unwrap().to_owned()
}

/// The datagrams of one file.
pub(crate) fn read(name: &str) -> Vec<Vec<u8>> {
    let path = folder().join(format!("{name}.hex"));
    let text = fs::read_to_string(&path).unwrap();
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
