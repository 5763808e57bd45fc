use clap::Args;

use crate::flow::schema;

use super::output::print;
use super::{Exit, OutputFormat};

/// Print what a record may hold: a JSON Schema, or a text for people
///
/// Each field with its type, unit, meaning and the netlink attribute that it comes from.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  conntrail schema > conntrail.schema.json
      For validators and code generators
  conntrail schema -o text | less
      To read")]
pub(super) struct SchemaArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Json, value_name = "FORMAT")]
    output: OutputFormat,
}

pub(super) fn schema(args: &SchemaArgs) -> Exit {
    let text = match args.output {
        OutputFormat::Text => schema::text(),
        OutputFormat::Json => format!("{:#}\n", schema::json_schema()),
    };
    print(text.into_bytes())
}
