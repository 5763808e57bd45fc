//! Writes nfnetlink requests: header, `struct nfgenmsg`, attributes and nests, padded to 4 bytes.

use super::netlink::Raw;
use crate::ctnetlink::uapi::netlink::{NLA_F_NESTED, NLM_F_REQUEST, NLMSG_ALIGNTO};
use crate::ctnetlink::uapi::nfnetlink::NFNETLINK_V0;

/// A request under construction.
#[derive(Debug)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// `flags` beside `NLM_F_REQUEST`; `res_id` is 0 for everything but batch markers.
    pub(super) fn new(message_type: u16, flags: u16, family: u8, res_id: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&message_type.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // Sequence number and port are set when it is sent.
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&[family, NFNETLINK_V0]);
        bytes.extend_from_slice(&res_id.to_be_bytes());
        Writer(bytes)
    }

    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).expect("our attributes are short");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(NLMSG_ALIGNTO), 0);
    }

    pub(super) fn put_be32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// A string with its final NUL, as nf_tables wants it.
    pub(super) fn put_str(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes);
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.put(kind | NLA_F_NESTED, &[]);
        inner(self);
        let length = u16::try_from(self.0.len() - start).expect("our attributes are short");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub(super) fn finish(mut self) -> Raw {
        let length = u32::try_from(self.0.len()).expect("our requests are short");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        Raw::new(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctnetlink::messages;

    #[test]
    fn what_is_written_can_be_walked() {
        let mut writer = Writer::new(0x0a03, 4, 1, 10);
        writer.nest(7, |w| {
            w.put_str(1, "ab");
            w.put_be32(2, 5);
        });
        writer.put(9, &[1]);
        let raw = writer.finish();
        let all: Vec<_> = messages(raw.bytes()).collect();
        let message = all[0].as_ref().unwrap();
        assert_eq!((all.len(), message.message_type, message.flags), (1, 0x0a03, 5));
        assert_eq!((message.family, message.res_id), (1, 10));
        let mut attributes = message.attributes();
        let nest = attributes.advance().unwrap().unwrap();
        assert_eq!((nest.kind, nest.payload.len()), (7, 8 + 8));
        assert_eq!(&nest.payload[4..8], b"ab\0\0");
        let last = attributes.advance().unwrap().unwrap();
        assert_eq!((last.kind, last.payload), (9, &[1][..]));
        assert!(attributes.advance().unwrap().is_none());
        assert_eq!(raw.bytes().len() % 4, 0);
    }
}
