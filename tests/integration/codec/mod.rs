//! The codec against captured datagrams, random ones, other decoders and the living kernel.

mod bed;
mod capture_golden;
mod corpus;
mod describe;
mod encode;
mod golden;
mod live;
mod mutations;
mod oracles;
mod properties;
