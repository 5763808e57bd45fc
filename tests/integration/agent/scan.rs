//! Reads a file of a million records in seconds, and lets no error through.
//!
//! No JSON parser in an unoptimised test could do that, so a flow's line is compared with the text
//! that it must contain, built anew from the generator's own flow; every line that is no such flow
//! goes through serde_json.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::generator::{Flow, Flows};
use crate::lab::records;

/// What stands in the file about flows `0..count` of a generator.
#[derive(Debug)]
pub(super) struct Scan {
    /// By flow: the record's number, 0 where there is none.
    pub(super) new: Vec<u64>,
    pub(super) destroy: Vec<u64>,
    /// All that is neither.
    pub(super) others: Vec<Value>,
    pub(super) records: u64,
}

impl Scan {
    /// Panics on a line that is torn, on a number that is not the next one, on a flow that is not
    /// the generator's, on one that comes or goes twice, on a `new` behind its `destroy`.
    pub(super) fn of(path: &Path, flows: &Flows, count: u32) -> Self {
        let size = count as usize;
        let mut scan =
            Scan { new: vec![0; size], destroy: vec![0; size], others: Vec::new(), records: 0 };
        records::each_line(path, |line| {
            scan.records += 1;
            scan.line(line, flows);
            Ok(())
        })
        .expect("whole lines");
        scan
    }

    fn line(&mut self, line: &str, flows: &Flows) {
        assert!(line.starts_with("{\"schema\":1,") && line.ends_with('}'), "{line}");
        let seq = number(line, "\"seq\":").unwrap_or_else(|| panic!("no seq: {line}"));
        assert_eq!(seq, self.records, "{line}");
        let event = text(line, "\"event\":").unwrap_or_else(|| panic!("no event: {line}"));
        if !matches!(event, "new" | "destroy") {
            self.others.push(serde_json::from_str(line).expect("JSON"));
            return;
        }
        let index = index_of(line).unwrap_or_else(|| panic!("not the generator's: {line}"));
        let flow = flows.flow(index);
        assert!(line.contains(&expected(&flow)), "{} is not in {line}", expected(&flow));
        let place = index as usize;
        assert_eq!(self.destroy[place], 0, "flow {index} had ended: {line}");
        if event == "new" {
            assert_eq!(self.new[place], 0, "flow {index} came twice: {line}");
            self.new[place] = seq;
        } else {
            self.destroy[place] = seq;
        }
    }

    pub(super) fn news(&self) -> u64 {
        self.new.iter().filter(|seq| **seq > 0).count() as u64
    }

    pub(super) fn destroys(&self) -> u64 {
        self.destroy.iter().filter(|seq| **seq > 0).count() as u64
    }

    /// What gap records say of events of this kind alone: how many, and whether all say `exact`.
    pub(super) fn lost(&self, kind: &str) -> (u64, bool) {
        let (mut lost, mut exact) = (0, true);
        for gap in self.others.iter().filter(|record| record["event"] == "gap") {
            let kinds = gap["gap_kinds"].as_array().expect("kinds");
            if !kinds.iter().any(|of| of == kind) {
                continue;
            }
            assert_eq!(kinds.len(), 1, "nobody can tell which: {gap}");
            lost += gap["gap_events"].as_u64().unwrap_or_else(|| panic!("no count: {gap}"));
            exact &= gap["gap_precision"] == "exact";
        }
        (lost, exact)
    }

    /// The agent's own records.
    pub(super) fn notes(&self) -> Vec<&str> {
        let notes = self.others.iter().filter_map(|record| record["agent_action"].as_str());
        notes.collect()
    }
}

/// The original tuple and the protocol as a record must write them.
fn expected(flow: &Flow) -> String {
    format!(
        "\"family\":\"ipv4\",\"proto\":{},\"proto_name\":\"udp\",\"src_ip\":\"{}\",\
         \"src_port\":{},\"dst_ip\":\"{}\",\"dst_port\":{},",
        flow.proto, flow.src.ip, flow.src.port, flow.dst.ip, flow.dst.port
    )
}

/// The generator numbers its flows in the last three bytes of the source address.
pub(super) fn index_of(line: &str) -> Option<u32> {
    let mut bytes = text(line, "\"src_ip\":")?.strip_prefix("10.")?.split('.');
    let mut index = 0;
    for _ in 0..3 {
        index = index << 8 | u32::from(bytes.next()?.parse::<u8>().ok()?);
    }
    bytes.next().is_none().then_some(index)
}

fn number(line: &str, key: &str) -> Option<u64> {
    let rest = &line[line.find(key)? + key.len()..];
    let end = rest.find([',', '}'])?;
    rest[..end].parse().ok()
}

fn text<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let rest = line[line.find(key)? + key.len()..].strip_prefix('"')?;
    rest.split('"').next()
}

/// Follows a file that grows, to know when what is waited for is there.
#[derive(Debug)]
pub(super) struct Tail {
    reader: BufReader<File>,
    line: Vec<u8>,
    needle: &'static [u8],
    pub(super) seen: u64,
}

impl Tail {
    /// Counts the lines with `needle` within their first 64 bytes, where `event` stands.
    pub(super) fn new(path: &Path, needle: &'static str) -> Self {
        let file = File::open(path).expect("the sink has opened its file");
        Tail {
            reader: BufReader::with_capacity(1 << 20, file),
            line: Vec::new(),
            needle: needle.as_bytes(),
            seen: 0,
        }
    }

    /// Reads up to the end of what is there now.
    pub(super) fn advance(&mut self) -> u64 {
        loop {
            let read = self.reader.by_ref().read_until(b'\n', &mut self.line).expect("a file");
            if self.line.last() == Some(&b'\n') {
                let head = &self.line[..self.line.len().min(64)];
                let found = head.windows(self.needle.len()).any(|at| at == self.needle);
                self.seen += u64::from(found);
                self.line.clear();
            }
            if read == 0 {
                return self.seen;
            }
        }
    }

    /// Waits until there are `count`; gives up when nothing has been added for `quiet`.
    pub(super) fn wait_for(&mut self, count: u64, quiet: Duration) -> u64 {
        let (mut last, mut moved) = (self.advance(), Instant::now());
        while last < count && moved.elapsed() < quiet {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.advance();
            if now != last {
                (last, moved) = (now, Instant::now());
            }
        }
        last
    }
}
