//! The field table as a JSON Schema (2020-12) and as a text for people.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::fields::{FIELDS, Field, FieldType, SCHEMA};

/// Fields of the table that every record has, whatever it is.
const IN_EVERY_RECORD: [&str; 7] = ["schema", "event", "ts", "agent", "epoch", "seq", "netns"];

/// The schema of one line of native JSON with all fields.
pub fn json_schema() -> Value {
    let properties: Map<_, _> =
        FIELDS.iter().map(|field| (field.name.to_owned(), property(field))).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "conntrail record",
        "description": "One line of conntrail's native JSON. A field that is not known is absent.",
        "type": "object",
        "required": IN_EVERY_RECORD,
        "properties": properties,
        "additionalProperties": false,
    })
}

fn property(field: &Field) -> Value {
    let mut property = of_type(field.ty);
    if field.name == "schema" {
        property.insert("const".to_owned(), SCHEMA.into());
    }
    property.insert("description".to_owned(), description(field).into());
    Value::Object(property)
}

fn of_type(ty: FieldType) -> Map<String, Value> {
    let schema = match ty {
        FieldType::Uint => json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX }),
        FieldType::Int => json!({ "type": "integer" }),
        FieldType::Time => json!({ "type": "string", "format": "date-time" }),
        FieldType::Ip => json!({
            "type": "string",
            "anyOf": [{ "format": "ipv4" }, { "format": "ipv6" }],
        }),
        FieldType::Text => json!({ "type": "string" }),
        FieldType::Hash => json!({ "type": "string", "pattern": "^[0-9a-f]{16}$" }),
        FieldType::Flag => json!({ "type": "boolean" }),
        FieldType::Words => json!({ "type": "array", "items": { "type": "string" } }),
        FieldType::Numbers => {
            json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } })
        }
    };
    match schema {
        Value::Object(map) => map,
        _ => unreachable!("each arm is an object"),
    }
}

fn description(field: &Field) -> String {
    let mut text = field.doc.to_owned();
    if !field.unit.is_empty() {
        let _ = write!(text, " Unit: {}.", field.unit);
    }
    if !field.source.is_empty() {
        let _ = write!(text, " From {}.", field.source);
    }
    text
}

/// One field a paragraph, in the order of a record.
pub fn text() -> String {
    let mut text = String::new();
    for field in FIELDS {
        // A String takes whatever is written to it.
        let _ =
            writeln!(text, "{} ({})\n    {}", field.name, type_name(field.ty), description(field));
    }
    text
}

fn type_name(ty: FieldType) -> &'static str {
    match ty {
        FieldType::Uint => "unsigned integer",
        FieldType::Int => "integer",
        FieldType::Time => "RFC 3339 time",
        FieldType::Ip => "IP address",
        FieldType::Text => "text",
        FieldType::Hash => "16 hexadecimal digits",
        FieldType::Flag => "true",
        FieldType::Words => "list of words",
        FieldType::Numbers => "list of numbers",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::flow::testing::{any_record, identity};
    use crate::flow::{FieldSet, View};
    use crate::format::FormatKind;

    #[test]
    fn every_field_of_the_table_is_in_both_and_nothing_else() {
        let schema = json_schema();
        let properties = schema["properties"].as_object().unwrap();
        assert_eq!(properties.len(), FIELDS.len());
        let text = text();
        for field in FIELDS {
            assert!(properties.contains_key(field.name), "{}", field.name);
            assert!(text.contains(&format!("{} (", field.name)), "{}", field.name);
        }
    }

    proptest! {
        #[test]
        fn any_record_has_what_the_schema_requires(record in any_record()) {
            let mut line = Vec::new();
            let view = View { identity: &identity(), seq: 1, record: &record };
            // Whatever is selected: these name a record.
            let fields = FieldSet::list([]).unwrap();
            FormatKind::Json.build(fields).line(view, &mut line);
            let record: Value = serde_json::from_slice(&line).unwrap();
            for name in IN_EVERY_RECORD {
                prop_assert!(record.get(name).is_some(), "{} in {}", name, record);
            }
        }
    }
}
