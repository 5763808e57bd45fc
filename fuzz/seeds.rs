//! Writes each captured datagram of tests/golden as a seed to fuzz/corpus/decode.

#[path = "../tests/integration/codec/corpus.rs"]
mod corpus;

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/decode");
    fs::create_dir_all(&to)?;
    let mut written = 0;
    for (name, datagrams) in corpus::corpus() {
        for (number, datagram) in datagrams.iter().enumerate() {
            fs::write(to.join(format!("{name}-{number}")), datagram)?;
            written += 1;
        }
    }
    println!("{written} seeds in fuzz/corpus/decode");
    Ok(())
}
