//! The text that conntrack(8) prints, for people: `conntrack -E`'s columns for events, `conntrack
//! -L`'s for entries of a dump. Records that conntrack does not know (gaps, the agent's own) take a
//! tag of the same width and say what they say as `key=value`.

use std::fmt::{self, Display, Formatter};
use std::io::Write;

use crate::ctnetlink::uapi::ipproto::IPPROTO_GRE;
use crate::ctnetlink::uapi::status::{IPS_ASSURED, IPS_HW_OFFLOAD, IPS_OFFLOAD, IPS_SEEN_REPLY};
use crate::ctnetlink::{Attrs, Conn, Counters, ExpectAttrs, Tuple, TupleParts, names};
use crate::flow::{AgentNote, Body, Expectation, Flow, FlowEvent, Gap, View};

use super::Format;
use super::time::Rfc3339;

#[derive(Debug, Default)]
pub struct Conntrack {
    time: Rfc3339,
}

impl Format for Conntrack {
    fn line(&mut self, view: View<'_>, out: &mut Vec<u8>) {
        // Vec never fails to write.
        let _ = match &view.record.body {
            Body::Flow(flow) => write!(out, "{}", FlowText(flow)),
            Body::Expectation(expect) => write!(out, "{}", ExpectText(expect)),
            Body::Gap(gap) => self.gap(gap, out),
            Body::Agent(note) => self.agent(note, view.record.ts, out),
        };
        while out.last() == Some(&b' ') {
            out.pop();
        }
        out.push(b'\n');
    }
}

impl Conntrack {
    fn gap(&mut self, gap: &Gap, out: &mut Vec<u8>) -> std::io::Result<()> {
        write!(out, "{:>9} cause={} ", "[GAP]", gap.cause.name())?;
        if let Some(events) = gap.events {
            write!(out, "events={events} ")?;
        }
        write!(out, "precision={} kinds=", gap.precision.name())?;
        for (index, (name, _)) in gap.kinds.iter_names().enumerate() {
            write!(out, "{}{}", if index > 0 { "," } else { "" }, name.to_ascii_lowercase())?;
        }
        let (from, to) = (self.time.write(gap.from), self.time.write(gap.to));
        write!(out, " from={} to={}", from.escape_ascii(), to.escape_ascii())
    }

    fn agent(&mut self, note: &AgentNote, ts: u64, out: &mut Vec<u8>) -> std::io::Result<()> {
        let at = self.time.write(ts);
        write!(out, "{:>9} {} ", "[AGENT]", note.action.name())?;
        if let Some(valve) = note.valve
            && let (Some(entries), Some(limit)) = (valve.entries, valve.limit)
        {
            write!(out, "entries={entries} limit={limit} ")?;
        }
        write!(out, "version={} at={}", note.version, at.escape_ascii())
    }
}

struct FlowText<'a>(&'a Flow);

impl Display for FlowText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let flow = self.0;
        let conn = &flow.conn;
        match flow.event {
            FlowEvent::New => write!(f, "{:>9} ", "[NEW]")?,
            FlowEvent::Update => write!(f, "{:>9} ", "[UPDATE]")?,
            FlowEvent::Destroy => write!(f, "{:>9} ", "[DESTROY]")?,
            FlowEvent::Snapshot => {}
        }
        protocol(f, &conn.orig)?;
        if conn.has(Attrs::TIMEOUT) {
            write!(f, "{} ", conn.timeout)?;
        }
        if let Some(state) = state(conn) {
            write!(f, "{state} ")?;
        }
        tuple(f, &conn.orig)?;
        counters(f, conn.has(Attrs::COUNTERS_ORIG), &conn.orig_counters)?;
        if conn.has(Attrs::STATUS) && conn.status & IPS_SEEN_REPLY == 0 {
            write!(f, "[UNREPLIED] ")?;
        }
        tuple(f, &conn.reply)?;
        counters(f, conn.has(Attrs::COUNTERS_REPLY), &conn.reply_counters)?;
        if conn.has(Attrs::STATUS) {
            write!(f, "{}", standing(conn.status))?;
        }
        self.marks(f)
    }
}

impl FlowText<'_> {
    fn marks(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let conn = &self.0.conn;
        if conn.has(Attrs::MARK) {
            write!(f, "mark={} ", conn.mark)?;
        }
        if let Some(rare) = &self.0.rare
            && !rare.secctx.is_empty()
        {
            write!(f, "secctx={} ", rare.secctx)?;
        }
        if conn.has(Attrs::ZONE) {
            write!(f, "zone={} ", conn.zone)?;
        }
        if conn.orig.has(TupleParts::ZONE) {
            write!(f, "zone-orig={} ", conn.orig.zone)?;
        }
        if conn.reply.has(TupleParts::ZONE) {
            write!(f, "zone-reply={} ", conn.reply.zone)?;
        }
        if conn.has(Attrs::START | Attrs::STOP) {
            // The difference of whole seconds, as conntrack(8) computes it.
            let seconds = (conn.stop / 1_000_000_000).saturating_sub(conn.start / 1_000_000_000);
            write!(f, "delta-time={seconds} ")?;
        }
        if let Some(rare) = &self.0.rare
            && !rare.helper.is_empty()
        {
            write!(f, "helper={} ", rare.helper)?;
        }
        if conn.has(Attrs::USE) {
            write!(f, "use={} ", conn.use_count)?;
        }
        Ok(())
    }
}

/// The offloaded states take the place of `[ASSURED]`.
fn standing(status: u32) -> &'static str {
    if status & IPS_HW_OFFLOAD != 0 {
        "[HW_OFFLOAD] "
    } else if status & IPS_OFFLOAD != 0 {
        "[OFFLOAD] "
    } else if status & IPS_ASSURED != 0 {
        "[ASSURED] "
    } else {
        ""
    }
}

fn state(conn: &Conn) -> Option<&'static str> {
    if conn.has(Attrs::TCP_STATE) {
        return names::tcp_state(conn.tcp.state);
    }
    if conn.has(Attrs::SCTP_STATE) {
        return names::sctp_state(conn.sctp_state);
    }
    conn.has(Attrs::DCCP_STATE).then(|| names::dccp_state(conn.dccp_state)).flatten()
}

fn protocol(f: &mut Formatter<'_>, tuple: &Tuple) -> fmt::Result {
    if !tuple.has(TupleParts::PROTO) {
        return Ok(());
    }
    write!(f, "{:<8} {} ", names::conntrack_protocol(tuple.proto), tuple.proto)
}

fn tuple(f: &mut Formatter<'_>, tuple: &Tuple) -> fmt::Result {
    if tuple.has(TupleParts::SRC | TupleParts::DST) {
        write!(f, "src={} dst={} ", tuple.src(), tuple.dst())?;
    }
    if tuple.has(TupleParts::ICMP) {
        let (kind, code, id) = (tuple.icmp_type, tuple.icmp_code, tuple.icmp_id);
        return write!(f, "type={kind} code={code} id={id} ");
    }
    if !tuple.has(TupleParts::SRC_PORT | TupleParts::DST_PORT) {
        return Ok(());
    }
    if tuple.proto == IPPROTO_GRE {
        return write!(f, "srckey=0x{:x} dstkey=0x{:x} ", tuple.src_port, tuple.dst_port);
    }
    write!(f, "sport={} dport={} ", tuple.src_port, tuple.dst_port)
}

fn counters(f: &mut Formatter<'_>, present: bool, counters: &Counters) -> fmt::Result {
    if !present {
        return Ok(());
    }
    write!(f, "packets={} bytes={} ", counters.packets, counters.bytes)
}

struct ExpectText<'a>(&'a Expectation);

impl Display for ExpectText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let expect = self.0;
        write!(f, "{:>9} ", if expect.destroyed { "[DESTROY]" } else { "[NEW]" })?;
        if expect.present.contains(ExpectAttrs::TIMEOUT) {
            write!(f, "{} ", expect.timeout)?;
        }
        write!(f, "proto={} ", expect.tuple.proto)?;
        tuple(f, &expect.tuple)?;
        if expect.present.contains(ExpectAttrs::MASK) {
            write!(f, "mask-src={} mask-dst={} ", expect.mask.src(), expect.mask.dst())?;
            write!(f, "sport={} dport={} ", expect.mask.src_port, expect.mask.dst_port)?;
        }
        if expect.present.contains(ExpectAttrs::MASTER) {
            let master = &expect.master;
            write!(f, "master-src={} master-dst={} ", master.src(), master.dst())?;
            write!(f, "sport={} dport={} ", master.src_port, master.dst_port)?;
        }
        if expect.present.contains(ExpectAttrs::CLASS) {
            write!(f, "class={} ", expect.class)?;
        }
        if !expect.helper.is_empty() {
            write!(f, "helper={} ", expect.helper)?;
        }
        Ok(())
    }
}
