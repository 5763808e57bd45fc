//! Native JSON: flat, one object a line, the fields of the table in its order, absent when unknown.
//!
//! Written by hand, not by serde_json, because this is the agent's hottest code: a record's keys and
//! shape are constant, so most of it is copying prepared bytes. Tests read it back with serde_json.

use std::net::Ipv6Addr;
use std::ops::Range;

use crate::flow::View;
use crate::flow::fields::{self, Field, FieldSet, Ip, Visitor};

use super::Format;
use super::time::Rfc3339;

/// Longer than nearly all records, so that one check makes room for the whole of one.
const TYPICAL: usize = 1200;

#[derive(Debug)]
pub struct Json {
    fields: FieldSet,
    time: Rfc3339,
    lists: Lists,
}

impl Json {
    pub fn new(fields: FieldSet) -> Self {
        Json { fields, time: Rfc3339::default(), lists: Lists::default() }
    }
}

impl Format for Json {
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>) {
        out.reserve(TYPICAL);
        let start = out.len();
        fields::visit(
            &view,
            self.fields,
            &mut Writer { out, time: &mut self.time, lists: &mut self.lists },
        );
        // Each key brings its comma; the first one becomes the brace. `schema` is always there.
        out[start] = b'{';
        out.extend_from_slice(b"}\n");
    }
}

/// Lists of words, ready with their key. A flow's status has few values, and writing its seven words
/// one by one took a tenth of a record's time.
#[derive(Debug)]
struct Lists {
    slots: [Option<List>; 64],
}

impl Default for Lists {
    fn default() -> Self {
        Lists { slots: [const { None }; 64] }
    }
}

#[derive(Debug)]
struct List {
    field: &'static Field,
    bits: u32,
    text: Vec<u8>,
}

impl Lists {
    #[inline]
    fn get(
        &mut self,
        field: &'static Field,
        bits: u32,
        names: impl Iterator<Item = &'static str>,
    ) -> &[u8] {
        // Fibonacci hashing: the status bits that differ are in the middle of the word.
        let slot = &mut self.slots[(bits.wrapping_mul(0x9e37_79b9) >> 26) as usize];
        let hit =
            slot.as_ref().is_some_and(|list| list.bits == bits && std::ptr::eq(list.field, field));
        if !hit {
            *slot = None;
        }
        &slot.get_or_insert_with(|| List { field, bits, text: list_text(field, names) }).text
    }
}

#[cold]
fn list_text(field: &'static Field, names: impl Iterator<Item = &'static str>) -> Vec<u8> {
    let quoted: Vec<_> = names.map(|name| format!("\"{name}\"")).collect();
    format!("{}[{}]", field.json_key, quoted.join(",")).into_bytes()
}

struct Writer<'a> {
    out: &'a mut Vec<u8>,
    time: &'a mut Rfc3339,
    lists: &'a mut Lists,
}

impl Writer<'_> {
    #[inline(always)]
    fn key(&mut self, field: &'static Field) {
        self.out.extend_from_slice(field.json_key.as_bytes());
    }

    #[inline(always)]
    fn number(&mut self, value: u64) {
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    #[inline(always)]
    fn quoted(&mut self, value: &[u8]) {
        self.out.push(b'"');
        self.out.extend_from_slice(value);
        self.out.push(b'"');
    }
}

impl Visitor for Writer<'_> {
    #[inline(always)]
    fn uint(&mut self, field: &'static Field, value: u64) {
        self.key(field);
        self.number(value);
    }

    fn int(&mut self, field: &'static Field, value: i64) {
        self.key(field);
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    #[inline]
    fn time(&mut self, field: &'static Field, nanoseconds: u64) {
        self.key(field);
        let mut quoted = [b'"'; 32];
        quoted[1..31].copy_from_slice(&self.time.write(nanoseconds));
        self.out.extend_from_slice(&quoted);
    }

    #[inline]
    fn ip(&mut self, field: &'static Field, value: &Ip) {
        self.key(field);
        self.out.push(b'"');
        if value.v6 {
            ipv6(value.bytes, self.out);
        } else {
            ipv4(value.bytes, self.out);
        }
        self.out.push(b'"');
    }

    fn text(&mut self, field: &'static Field, value: &str) {
        self.key(field);
        self.out.push(b'"');
        escape(value.as_bytes(), self.out);
        self.out.push(b'"');
    }

    #[inline(always)]
    fn word(&mut self, field: &'static Field, value: &[u8]) {
        self.key(field);
        self.quoted(value);
    }

    #[inline]
    fn hash(&mut self, field: &'static Field, value: u64) {
        self.key(field);
        let mut digits = [b'"'; 18];
        for (index, byte) in value.to_be_bytes().into_iter().enumerate() {
            digits[1 + 2 * index] = HEX[usize::from(byte >> 4)];
            digits[2 + 2 * index] = HEX[usize::from(byte & 15)];
        }
        self.out.extend_from_slice(&digits);
    }

    fn flag(&mut self, field: &'static Field, value: bool) {
        self.key(field);
        self.out.extend_from_slice(if value { b"true" } else { b"false" });
    }

    #[inline]
    fn words(
        &mut self,
        field: &'static Field,
        bits: u32,
        names: impl Iterator<Item = &'static str>,
    ) {
        let list = self.lists.get(field, bits, names);
        self.out.extend_from_slice(list);
    }

    fn numbers(&mut self, field: &'static Field, value: &mut dyn Iterator<Item = u64>) {
        self.key(field);
        self.out.push(b'[');
        for (index, number) in value.enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            self.number(number);
        }
        self.out.push(b']');
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// `"255."`-like text of each byte and its length.
static OCTETS: [([u8; 4], u8); 256] = {
    let mut table = [([b'.'; 4], 0); 256];
    let mut value = 0;
    while value < 256 {
        let (text, len) = &mut table[value];
        let mut at = 0;
        if value >= 100 {
            text[at] = b'0' + (value / 100) as u8;
            at += 1;
        }
        if value >= 10 {
            text[at] = b'0' + (value / 10 % 10) as u8;
            at += 1;
        }
        text[at] = b'0' + (value % 10) as u8;
        *len = at as u8 + 2;
        value += 1;
    }
    table
};

#[inline]
fn ipv4(bytes: [u8; 16], out: &mut Vec<u8>) {
    let mut text = [0; 19];
    let mut at = 0;
    for octet in &bytes[..4] {
        let (digits, len) = &OCTETS[usize::from(*octet)];
        text[at..at + 4].copy_from_slice(digits);
        at += usize::from(*len);
    }
    // Without the last dot.
    out.extend_from_slice(&text[..at - 1]);
}

/// RFC 5952: lower case, no leading zeros, the first longest run of two or more zero groups as `::`,
/// and IPv4-mapped addresses with their dotted end. By hand, as `Display` took 100 ns an address.
fn ipv6(bytes: [u8; 16], out: &mut Vec<u8>) {
    let address = Ipv6Addr::from(bytes);
    if let Some(mapped) = address.to_ipv4_mapped() {
        let mut padded = [0; 16];
        padded[..4].copy_from_slice(&mapped.octets());
        out.extend_from_slice(b"::ffff:");
        return ipv4(padded, out);
    }
    let groups = address.segments();
    let zeros = longest_zeros(&groups);
    let mut text = [0; 40];
    let mut at = 0;
    let mut index = 0;
    while index < 8 {
        if index == zeros.start && zeros.len() > 1 {
            text[at..at + 2].copy_from_slice(b"::");
            at += 2;
            index = zeros.end;
            continue;
        }
        if index > 0 && (index != zeros.end || zeros.len() < 2) {
            text[at] = b':';
            at += 1;
        }
        at += hex_group(groups[index], &mut text[at..]);
        index += 1;
    }
    out.extend_from_slice(&text[..at]);
}

fn longest_zeros(groups: &[u16; 8]) -> Range<usize> {
    let (mut longest, mut run) = (0..0, 0..0);
    for (index, group) in groups.iter().enumerate() {
        if *group != 0 {
            run = index + 1..index + 1;
            continue;
        }
        run.end = index + 1;
        if run.len() > longest.len() {
            longest = run.clone();
        }
    }
    longest
}

#[inline]
fn hex_group(group: u16, out: &mut [u8]) -> usize {
    let digits = 4 - (group | 1).leading_zeros() as usize / 4;
    for (index, digit) in out.iter_mut().enumerate().take(digits) {
        *digit = HEX[usize::from(group >> (4 * (digits - 1 - index)) & 15)];
    }
    digits
}

/// RFC 8259, section 7: quotes, backslashes and control characters.
fn escape(text: &[u8], out: &mut Vec<u8>) {
    let special = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
    // Names of hosts and helpers have none of them.
    if !text.iter().any(|byte| special(*byte)) {
        return out.extend_from_slice(text);
    }
    for &byte in text {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0..0x20 => {
                let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&digits);
            }
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;
    use crate::flow::fields::{FIELDS, FieldType};
    use crate::flow::testing::{any_record, identity, masqueraded};
    use crate::flow::{Identity, Record};

    fn line(fields: FieldSet, identity: &Identity, record: &Record) -> String {
        let mut out = Vec::new();
        Json::new(fields).line(View { identity, seq: 7, record }, &mut out);
        String::from_utf8(out).unwrap()
    }

    fn object(line: &str) -> Map<String, Value> {
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn a_masqueraded_flow_reads_as_the_documentation_shows_it() {
        insta::assert_snapshot!(line(FieldSet::FULL, &identity(), &masqueraded()));
    }

    #[test]
    fn text_that_is_no_word_is_escaped() {
        let identity = Identity { agent: "a\"b\\c\n\u{1}é".to_owned(), ..identity() };
        let object = object(&line(FieldSet::FULL, &identity, &masqueraded()));
        assert_eq!(object["agent"], identity.agent);
    }

    fn fits(ty: FieldType, value: &Value) -> bool {
        match ty {
            FieldType::Uint => value.is_u64(),
            FieldType::Int => value.is_i64() || value.is_u64(),
            FieldType::Time => {
                value.as_str().is_some_and(|text| text.parse::<jiff::Timestamp>().is_ok())
            }
            FieldType::Ip => {
                value.as_str().is_some_and(|text| text.parse::<std::net::IpAddr>().is_ok())
            }
            FieldType::Text => value.is_string(),
            FieldType::Hash => value
                .as_str()
                .is_some_and(|text| text.len() == 16 && u64::from_str_radix(text, 16).is_ok()),
            FieldType::Flag => value.is_boolean(),
            FieldType::Words => {
                value.as_array().is_some_and(|list| list.iter().all(Value::is_string))
            }
            FieldType::Numbers => {
                value.as_array().is_some_and(|list| list.iter().all(Value::is_u64))
            }
        }
    }

    proptest! {
        #[test]
        fn addresses_are_written_as_the_standard_library_does(
            groups in proptest::array::uniform8(prop_oneof![Just(0_u16), any::<u16>()]), v4: [u8; 4],
        ) {
            let v6 = Ipv6Addr::from(groups);
            let mapped = std::net::Ipv4Addr::from(v4).to_ipv6_mapped();
            for address in [v6, mapped, Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST] {
                let mut out = Vec::new();
                ipv6(address.octets(), &mut out);
                prop_assert_eq!(String::from_utf8(out).unwrap(), address.to_string());
            }
            let mut padded = [0; 16];
            padded[..4].copy_from_slice(&v4);
            let mut out = Vec::new();
            ipv4(padded, &mut out);
            prop_assert_eq!(String::from_utf8(out).unwrap(), std::net::Ipv4Addr::from(v4).to_string());
        }

        #[test]
        fn any_record_is_one_line_of_json_with_the_tables_types(record in any_record()) {
            let text = line(FieldSet::FULL, &identity(), &record);
            prop_assert_eq!(text.matches('\n').count(), 1);
            prop_assert_eq!(&text[text.len() - 2..], "}\n");
            for (name, value) in object(&text) {
                let field = FIELDS.iter().find(|field| field.name == name).unwrap();
                prop_assert!(fits(field.ty, &value), "{}: {}", name, value);
            }
            // No key stands twice: a map would hide it.
            let keys = FIELDS.iter().map(|field| text.matches(field.json_key).count());
            prop_assert_eq!(keys.sum::<usize>() + 1, object(&text).len());
        }

        #[test]
        fn a_selection_leaves_fields_out_and_changes_none(
            record in any_record(), picked in proptest::sample::subsequence(
                FIELDS.iter().map(|field| field.name).collect::<Vec<_>>(), 0..FIELDS.len())
        ) {
            let full = object(&line(FieldSet::FULL, &identity(), &record));
            let set = FieldSet::list(picked.iter().copied()).unwrap();
            let some = object(&line(set, &identity(), &record));
            for (name, value) in &some {
                prop_assert_eq!(Some(value), full.get(name));
            }
            for name in picked {
                prop_assert_eq!(some.contains_key(name), full.contains_key(name));
            }
        }

        #[test]
        fn the_audit_selection_never_tells_a_destination(record in any_record()) {
            let object = object(&line(FieldSet::audit(), &identity(), &record));
            let keys: BTreeSet<_> = object.keys().map(String::as_str).collect();
            for key in ["dst_ip", "dst_port", "nat_dst_ip", "community_id", "master_dst_ip"] {
                prop_assert!(!keys.contains(key));
            }
        }
    }
}
