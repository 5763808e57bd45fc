//! The walk over a netlink datagram: messages, and the attributes in them.
//!
//! Promises: borrows, allocates nothing, and never panics on any bytes; what cannot be walked is
//! refused with a reason and its place. Never interprets an attribute.
//!
//! Format (`linux/netlink.h`): a datagram is messages, each padded to 4 bytes; a message is `struct
//! nlmsghdr` (16 bytes, host order), for nfnetlink `struct nfgenmsg` (family, version, `res_id` in
//! network order), then attributes; an attribute is length and type (`struct nlattr`, host order,
//! the length without padding), payload, padding to 4 bytes. A nest is an attribute of attributes.

use super::event::Kind;
use super::uapi::conntrack::{exp_msg, msg};
use super::uapi::netlink::{
    NLA_HDRLEN, NLA_TYPE_MASK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_CREATE, NLM_F_MULTI, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_HDRLEN, NLMSG_MIN_TYPE, NLMSG_NOOP, NLMSG_OVERRUN, NLMSGERR_ATTR_MSG,
};
use super::uapi::nfnetlink::{NFGENMSG_LEN, NFNL_SUBSYS_CTNETLINK, NFNL_SUBSYS_CTNETLINK_EXP};

/// Why a message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// Fewer bytes are left than a `struct nlmsghdr` has.
    HeaderCut,
    /// `nlmsg_len` is smaller than its own header.
    MessageLength,
    /// `nlmsg_len` is longer than the datagram.
    MessageCut,
    /// No room for `struct nfgenmsg`.
    NfgenmsgCut,
    /// The body of an NLMSG_ERROR or NLMSG_DONE is too short.
    OutcomeCut,
    /// Fewer bytes are left than a `struct nlattr` has.
    AttributeHeaderCut,
    /// `nla_len` is smaller than its own header.
    AttributeLength,
    /// `nla_len` is longer than what encloses it.
    AttributeCut,
    /// The payload has not the size that the attribute's type has.
    PayloadLength,
    /// A tuple with an IPv4 and an IPv6 address.
    MixedFamilies,
    /// The message is not of the type that the decoder decodes.
    WrongType,
}

impl Reason {
    pub const ALL: [Reason; 11] = [
        Reason::HeaderCut,
        Reason::MessageLength,
        Reason::MessageCut,
        Reason::NfgenmsgCut,
        Reason::OutcomeCut,
        Reason::AttributeHeaderCut,
        Reason::AttributeLength,
        Reason::AttributeCut,
        Reason::PayloadLength,
        Reason::MixedFamilies,
        Reason::WrongType,
    ];

    /// For logs and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Reason::HeaderCut => "header_cut",
            Reason::MessageLength => "message_length",
            Reason::MessageCut => "message_cut",
            Reason::NfgenmsgCut => "nfgenmsg_cut",
            Reason::OutcomeCut => "outcome_cut",
            Reason::AttributeHeaderCut => "attribute_header_cut",
            Reason::AttributeLength => "attribute_length",
            Reason::AttributeCut => "attribute_cut",
            Reason::PayloadLength => "payload_length",
            Reason::MixedFamilies => "mixed_families",
            Reason::WrongType => "wrong_type",
        }
    }
}

/// A message that cannot be understood: why, and at which byte of the datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed netlink message: {} at byte {offset}", .reason.name())]
pub struct Malformed {
    pub reason: Reason,
    pub offset: u32,
}

/// What was met and not understood. Each reader has one and reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Attributes that this version does not know: skipped.
    pub unknown_attributes: u64,
    /// Messages of no type known here ([`Class::Unknown`]): skipped, counted by the reader.
    pub unknown_messages: u64,
    malformed: [u64; Reason::ALL.len()],
}

impl Tally {
    /// Counts a refusal. The `decode_*` functions do it for theirs; the caller does it for those of
    /// [`messages`] and [`Message::outcome`].
    pub fn refuse(&mut self, malformed: &Malformed) {
        self.malformed[malformed.reason as usize] += 1;
    }

    pub fn refused(&self, reason: Reason) -> u64 {
        self.malformed[reason as usize]
    }

    pub fn refused_total(&self) -> u64 {
        self.malformed.iter().sum()
    }
}

/// What kind of message it is, by type and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A conntrack entry or event: `decode_conn`.
    Conn(Kind),
    /// An expectation: `decode_expect`.
    Expect { destroyed: bool },
    /// `IPCTNL_MSG_CT_GET_STATS_CPU`: `decode_stats_cpu`.
    StatsCpu,
    /// `IPCTNL_MSG_CT_GET_STATS`: `decode_stats`.
    Stats,
    /// `IPCTNL_MSG_EXP_GET_STATS_CPU`: `decode_expect_stats`.
    ExpectStatsCpu,
    /// NLMSG_DONE: the end of a dump, which may have failed: [`Message::outcome`].
    Done,
    /// NLMSG_ERROR, also the ack: [`Message::outcome`].
    Error,
    /// NLMSG_NOOP.
    Noop,
    /// NLMSG_OVERRUN.
    Overrun,
    /// Not known here: skip it and count it in [`Tally::unknown_messages`].
    Unknown,
}

/// How a request or dump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// A positive errno; 0 is success.
    pub errno: i32,
    /// The kernel's own words (`NLMSGERR_ATTR_MSG`), if it gave some.
    pub text: Option<&'a [u8]>,
}

/// One netlink message.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub message_type: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// `nlmsg_pid`.
    pub portid: u32,
    /// `nfgen_family`; 0 in netlink's own messages, as the next two.
    pub family: u8,
    pub version: u8,
    pub res_id: u16,
    /// What follows the headers.
    pub payload: &'a [u8],
    /// Where `payload` begins in the datagram.
    pub offset: u32,
}

impl<'a> Message<'a> {
    pub fn class(&self) -> Class {
        let [command, subsystem] = self.message_type.to_le_bytes();
        match (subsystem, command) {
            (NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_NEW) => Class::Conn(self.new_kind()),
            (NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_DELETE) => Class::Conn(Kind::Destroy),
            (NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET_STATS_CPU) => Class::StatsCpu,
            (NFNL_SUBSYS_CTNETLINK, msg::IPCTNL_MSG_CT_GET_STATS) => Class::Stats,
            // The kernel answers IPCTNL_MSG_EXP_GET_STATS_CPU with the right command and the wrong
            // subsystem (ctnetlink_exp_stat_fill_info); nothing else is sent with this number, as
            // IPCTNL_MSG_CT_GET_CTRZERO is only ever a request.
            (
                NFNL_SUBSYS_CTNETLINK | NFNL_SUBSYS_CTNETLINK_EXP,
                exp_msg::IPCTNL_MSG_EXP_GET_STATS_CPU,
            ) => Class::ExpectStatsCpu,
            (NFNL_SUBSYS_CTNETLINK_EXP, exp_msg::IPCTNL_MSG_EXP_NEW) => {
                Class::Expect { destroyed: false }
            }
            (NFNL_SUBSYS_CTNETLINK_EXP, exp_msg::IPCTNL_MSG_EXP_DELETE) => {
                Class::Expect { destroyed: true }
            }
            _ => self.own_class(),
        }
    }

    /// IPCTNL_MSG_CT_NEW is three things. Entries of a dump, and the answer to a single GET, are
    /// NLM_F_MULTI (ctnetlink_fill_info); events never are.
    fn new_kind(&self) -> Kind {
        if self.flags & NLM_F_MULTI != 0 {
            return Kind::Entry;
        }
        if self.flags & NLM_F_CREATE != 0 { Kind::New } else { Kind::Update }
    }

    fn own_class(&self) -> Class {
        match self.message_type {
            NLMSG_DONE => Class::Done,
            NLMSG_ERROR => Class::Error,
            NLMSG_NOOP => Class::Noop,
            NLMSG_OVERRUN => Class::Overrun,
            _ => Class::Unknown,
        }
    }

    /// The attributes of the message.
    pub fn attributes(&self) -> Attributes<'a> {
        Attributes { rest: self.payload, offset: self.offset }
    }

    /// What an NLMSG_DONE or NLMSG_ERROR says. A DONE without a body is a success.
    pub fn outcome(&self) -> Result<Outcome<'a>, Malformed> {
        let done = self.message_type == NLMSG_DONE;
        if done && self.payload.is_empty() {
            return Ok(Outcome { errno: 0, text: None });
        }
        let cut = Malformed { reason: Reason::OutcomeCut, offset: self.offset };
        let (code, rest) = self.payload.split_first_chunk::<4>().ok_or(cut)?;
        // The kernel writes -errno; wrapping, as i32::MIN has no positive.
        let errno = i32::from_ne_bytes(*code).wrapping_neg();
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return Ok(Outcome { errno, text: None });
        }
        let echo = if done { 0 } else { self.echo_length(rest).ok_or(cut)? };
        let rest = rest.get(echo..).ok_or(cut)?;
        let mut attributes = Attributes { rest, offset: self.offset + 4 + echo as u32 };
        let mut text = None;
        while let Some(attribute) = attributes.advance()? {
            if attribute.kind == NLMSGERR_ATTR_MSG {
                text = Some(attribute.text());
            }
        }
        Ok(Outcome { errno, text })
    }

    /// How much of the failed request stands in an NLMSG_ERROR: its header, and unless
    /// NLM_F_CAPPED, the rest of it.
    fn echo_length(&self, rest: &[u8]) -> Option<usize> {
        if self.flags & NLM_F_CAPPED != 0 {
            return Some(NLMSG_HDRLEN);
        }
        let length = u32::from_ne_bytes(*rest.first_chunk::<4>()?) as usize;
        Some(align(length.max(NLMSG_HDRLEN)))
    }
}

/// The messages of one datagram. The first that cannot be walked ends the walk, as nothing says
/// where the next one begins.
pub fn messages(datagram: &[u8]) -> Messages<'_> {
    Messages { rest: datagram, offset: 0 }
}

/// See [`messages`].
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
    offset: u32,
}

impl<'a> Messages<'a> {
    #[inline]
    fn take(&mut self) -> Result<Message<'a>, Reason> {
        let (header, _) = self.rest.split_first_chunk::<NLMSG_HDRLEN>().ok_or(Reason::HeaderCut)?;
        let [l0, l1, l2, l3, t0, t1, f0, f1, s0, s1, s2, s3, p0, p1, p2, p3] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let message_type = u16::from_ne_bytes([t0, t1]);
        if length < NLMSG_HDRLEN {
            return Err(Reason::MessageLength);
        }
        let whole = self.rest.get(..length).ok_or(Reason::MessageCut)?;
        let mut message = Message {
            message_type,
            flags: u16::from_ne_bytes([f0, f1]),
            seq: u32::from_ne_bytes([s0, s1, s2, s3]),
            portid: u32::from_ne_bytes([p0, p1, p2, p3]),
            family: 0,
            version: 0,
            res_id: 0,
            payload: &whole[NLMSG_HDRLEN..],
            offset: self.offset + NLMSG_HDRLEN as u32,
        };
        if message_type >= NLMSG_MIN_TYPE {
            let (nfgenmsg, payload) =
                message.payload.split_first_chunk::<NFGENMSG_LEN>().ok_or(Reason::NfgenmsgCut)?;
            message.family = nfgenmsg[0];
            message.version = nfgenmsg[1];
            message.res_id = u16::from_be_bytes([nfgenmsg[2], nfgenmsg[3]]);
            message.payload = payload;
            message.offset += NFGENMSG_LEN as u32;
        }
        // The last message of a datagram may lack its padding.
        let next = align(length).min(self.rest.len());
        self.rest = &self.rest[next..];
        self.offset += next as u32;
        Ok(message)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let offset = self.offset;
        Some(self.take().map_err(|reason| {
            self.rest = &[];
            Malformed { reason, offset }
        }))
    }
}

impl std::iter::FusedIterator for Messages<'_> {}

/// One attribute (`struct nlattr`).
#[derive(Clone, Copy, Debug)]
pub struct Attribute<'a> {
    /// `nla_type` without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
    pub kind: u16,
    pub payload: &'a [u8],
    /// Where `payload` begins in the datagram.
    pub offset: u32,
}

impl<'a> Attribute<'a> {
    /// The attributes inside a nest.
    #[inline]
    pub fn nested(&self) -> Attributes<'a> {
        Attributes { rest: self.payload, offset: self.offset }
    }

    #[inline]
    pub fn malformed(&self, reason: Reason) -> Malformed {
        Malformed { reason, offset: self.offset }
    }

    /// The payload, if it has exactly `N` bytes.
    #[inline]
    pub fn array<const N: usize>(&self) -> Result<[u8; N], Malformed> {
        self.payload.try_into().map_err(|_| self.malformed(Reason::PayloadLength))
    }

    #[inline]
    pub fn u8(&self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    #[inline]
    pub fn be16(&self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    #[inline]
    pub fn be32(&self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline]
    pub fn be64(&self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string without its final NUL (NLA_NUL_STRING).
    #[inline]
    pub fn text(&self) -> &'a [u8] {
        self.payload.strip_suffix(&[0]).unwrap_or(self.payload)
    }
}

/// The walk over attributes.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
    offset: u32,
}

impl<'a> Attributes<'a> {
    /// The next attribute. Not an `Iterator`: `?` in a `while let` is what a decoder needs.
    #[inline]
    pub fn advance(&mut self) -> Result<Option<Attribute<'a>>, Malformed> {
        let Some((header, _)) = self.rest.split_first_chunk::<NLA_HDRLEN>() else {
            return self.end();
        };
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let Some(payload) = self.rest.get(NLA_HDRLEN..length) else {
            return Err(self.bad_length(length));
        };
        let attribute = Attribute { kind, payload, offset: self.offset + NLA_HDRLEN as u32 };
        // The last attribute of a nest may lack its padding.
        let next = align(length).min(self.rest.len());
        self.rest = &self.rest[next..];
        self.offset += next as u32;
        Ok(Some(attribute))
    }

    #[inline]
    fn end(&self) -> Result<Option<Attribute<'a>>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        Err(Malformed { reason: Reason::AttributeHeaderCut, offset: self.offset })
    }

    #[cold]
    fn bad_length(&self, length: usize) -> Malformed {
        let reason =
            if length < NLA_HDRLEN { Reason::AttributeLength } else { Reason::AttributeCut };
        Malformed { reason, offset: self.offset }
    }
}

/// NLMSG_ALIGN and NLA_ALIGN.
#[inline]
fn align(length: usize) -> usize {
    // Lengths come from a u32: on 32 bits this could wrap, and a saturated one is cut by its user.
    length.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `nlmsghdr` in this host's order.
    fn header(length: u32, message_type: u16, flags: u16) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&message_type.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes
    }

    fn refusal(bytes: &[u8]) -> Malformed {
        let mut walk = messages(bytes);
        let malformed = walk.find_map(Result::err).unwrap();
        assert!(walk.next().is_none(), "a refusal ends the walk");
        malformed
    }

    #[test]
    fn nothing_has_no_messages() {
        assert!(messages(&[]).next().is_none());
    }

    #[test]
    fn a_cut_datagram_is_refused_with_reason_and_place() {
        let noop = header(16, NLMSG_NOOP, 0);
        let cut_header = [&noop[..], &noop[..15]].concat();
        assert_eq!(refusal(&cut_header), Malformed { reason: Reason::HeaderCut, offset: 16 });
        let too_short = header(15, NLMSG_NOOP, 0);
        assert_eq!(refusal(&too_short), Malformed { reason: Reason::MessageLength, offset: 0 });
        let too_long = header(u32::MAX, NLMSG_NOOP, 0);
        assert_eq!(refusal(&too_long), Malformed { reason: Reason::MessageCut, offset: 0 });
        let no_nfgenmsg = [header(19, 0x100, 0), vec![0; 3]].concat();
        assert_eq!(refusal(&no_nfgenmsg), Malformed { reason: Reason::NfgenmsgCut, offset: 0 });
    }

    #[test]
    fn the_last_message_may_lack_its_padding() {
        let bytes = [header(17, NLMSG_NOOP, 0), vec![1]].concat();
        let all: Vec<_> = messages(&bytes).map(Result::unwrap).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].class(), all[0].payload), (Class::Noop, &[1u8][..]));
    }

    #[test]
    fn done_carries_its_errno() {
        let success = header(16, NLMSG_DONE, 0);
        let message = messages(&success).next().unwrap().unwrap();
        assert_eq!(message.class(), Class::Done);
        assert_eq!(message.outcome(), Ok(Outcome { errno: 0, text: None }));

        let failed = [header(20, NLMSG_DONE, 0), (-105i32).to_ne_bytes().to_vec()].concat();
        let message = messages(&failed).next().unwrap().unwrap();
        assert_eq!(message.outcome(), Ok(Outcome { errno: 105, text: None }));

        let cut = [header(18, NLMSG_DONE, 0), vec![0, 0]].concat();
        let message = messages(&cut).next().unwrap().unwrap();
        assert_eq!(message.outcome().unwrap_err().reason, Reason::OutcomeCut);
    }

    #[test]
    fn an_error_carries_errno_and_the_kernels_words() {
        let echo = [header(20, 0x101, 0), vec![0; 4]].concat();
        let words = [&[12, 0, 1, 0][..], b"no such\0"].concat();
        for (flags, echoed) in
            [(NLM_F_ACK_TLVS, &echo[..]), (NLM_F_ACK_TLVS | NLM_F_CAPPED, &echo[..16])]
        {
            let body = [&(-22i32).to_ne_bytes()[..], echoed, &words].concat();
            let bytes = [header(16 + body.len() as u32, NLMSG_ERROR, flags), body].concat();
            let message = messages(&bytes).next().unwrap().unwrap();
            assert_eq!(message.class(), Class::Error);
            let expected = Outcome { errno: 22, text: Some(b"no such") };
            assert_eq!(message.outcome(), Ok(expected));
        }
    }

    #[test]
    fn an_error_whose_echo_is_longer_than_itself_is_refused() {
        let body = [(-22i32).to_ne_bytes().to_vec(), header(u32::MAX, 0x101, 0)].concat();
        let bytes = [header(36, NLMSG_ERROR, NLM_F_ACK_TLVS), body].concat();
        let message = messages(&bytes).next().unwrap().unwrap();
        assert_eq!(message.outcome().unwrap_err().reason, Reason::OutcomeCut);
    }

    #[test]
    fn flags_in_an_attributes_type_are_not_part_of_it() {
        let bytes = [header(28, 0x100, 0), vec![0; 4], vec![5, 0, 7, 0xc0, 9, 0, 0, 0]].concat();
        let message = messages(&bytes).next().unwrap().unwrap();
        let attribute = message.attributes().advance().unwrap().unwrap();
        assert_eq!((attribute.kind, attribute.u8()), (7, Ok(9)));
    }

    #[test]
    fn every_reason_is_listed_at_its_own_place() {
        for (place, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
        }
    }
}
