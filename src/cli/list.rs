use std::io::{self, Write};

use clap::{Args, ValueEnum};

use crate::agent::identity::of_this_run;
use crate::capture::{Item, RawBatch};
use crate::config::Config;
use crate::control::{Control, DumpEnd, Error, Family, Incomplete};
use crate::flow::{FieldSet, Identity, Record, View};
use crate::format::{Format, FormatKind};
use crate::pipeline::{Decoder, Filter};

use super::output::{fail, finish};
use super::{Exit, NetnsArgs, OutputArgs, OutputFormat, ask};

/// List the connections that there are now, as conntrack -L does
///
/// A dump of the kernel's table. It is no picture of one moment: connections come and go while it is
/// read. An incomplete one is printed as far as it goes and ends with exit code 1.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  sudo conntrail list
      All connections, in conntrack's columns
  sudo conntrail list -f ipv6 -o json
      Those of IPv6, as JSON")]
pub(super) struct ListArgs {
    /// Only of this IP version
    #[arg(short, long, value_enum, value_name = "FAMILY")]
    family: Option<FamilyArg>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    netns: NetnsArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FamilyArg {
    Ipv4,
    Ipv6,
}

pub(super) fn list(args: &ListArgs) -> Exit {
    if let Err(exit) = args.netns.enter() {
        return exit;
    }
    let mut printer = match Printer::new(args) {
        Ok(printer) => printer,
        Err(error) => return fail(Exit::Failure, &error),
    };
    let family = match args.family {
        None => Family::Both,
        Some(FamilyArg::Ipv4) => Family::Ipv4,
        Some(FamilyArg::Ipv6) => Family::Ipv6,
    };
    let end = match ask(dump(family, &mut printer)) {
        Ok(end) => end,
        Err(exit) => return exit,
    };
    match (printer.written, end.why) {
        // It was stopped because printing failed.
        (Err(error), _) => finish(Err(error)),
        (Ok(()), None) => Exit::Success,
        (Ok(()), Some(why)) => fail(Exit::Failure, &incomplete(&why)),
    }
}

fn incomplete(why: &Incomplete) -> String {
    format!("the list may not be complete: {why}")
}

async fn dump(family: Family, printer: &mut Printer) -> Result<DumpEnd, Error> {
    Control::connect()?.dump_conntrack(family, async |batch| printer.print(batch)).await
}

/// Decodes, formats and prints batches of a dump.
struct Printer {
    decoder: Decoder,
    format: Box<dyn Format>,
    identity: Identity,
    seq: u64,
    records: Vec<Record>,
    out: Vec<u8>,
    written: io::Result<()>,
}

impl Printer {
    fn new(args: &ListArgs) -> io::Result<Self> {
        let agent = Config::default().agent_name;
        let (identity, ids) = of_this_run(&agent, args.netns.netns.as_deref())?;
        let kind = match args.output.output {
            OutputFormat::Text => FormatKind::Conntrack,
            OutputFormat::Json => FormatKind::Json,
        };
        Ok(Printer {
            decoder: Decoder::new(ids, Filter::default(), true, false),
            format: kind.build(FieldSet::FULL),
            identity,
            seq: 1,
            records: Vec::new(),
            out: Vec::new(),
            written: Ok(()),
        })
    }

    /// Gives the buffer back, or nothing when nobody reads any more.
    fn print(&mut self, batch: RawBatch) -> Option<RawBatch> {
        let item = Item::Snapshot(batch);
        self.decoder.item(&item, &mut self.records);
        self.out.clear();
        for record in self.records.drain(..) {
            let view = View { identity: &self.identity, seq: self.seq, record: &record };
            self.format.line(view, &mut self.out);
            self.seq += 1;
        }
        let mut stdout = io::stdout().lock();
        self.written = stdout.write_all(&self.out).and_then(|()| stdout.flush());
        match item {
            Item::Snapshot(mut batch) if self.written.is_ok() => {
                batch.clear();
                Some(batch)
            }
            _ => None,
        }
    }
}
