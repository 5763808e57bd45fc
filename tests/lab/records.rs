//! Reads what the agent wrote: a file of JSON records, and the files it was rotated into.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Result;

/// All uncompressed files whose name starts with that of `path`: the file and its rotations.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let folder = path.parent().ok_or("a file has a folder")?;
    let name = path.file_name().ok_or("a file has a name")?.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&*name) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Calls `line` with each line of each file. A last line without an end is an error: it is torn.
pub(crate) fn each_line(path: &Path, mut line: impl FnMut(&str) -> Result<()>) -> Result<()> {
    for file in files(path)? {
        let mut reader = BufReader::with_capacity(1 << 20, File::open(&file)?);
        let mut text = String::new();
        while reader.read_line(&mut text)? > 0 {
            let whole = text.strip_suffix('\n');
            line(whole.ok_or_else(|| format!("{}: torn line {text:?}", file.display()))?)?;
            text.clear();
        }
    }
    Ok(())
}

/// All records of a file of JSON lines.
pub(crate) fn read(path: &Path) -> Result<Vec<Value>> {
    let mut records = Vec::new();
    each_line(path, |line| {
        records.push(serde_json::from_str(line).map_err(|error| format!("{error} in {line}"))?);
        Ok(())
    })?;
    Ok(records)
}
