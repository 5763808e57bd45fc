//! The codec against captured datagrams, random ones, other decoders and the living kernel.

// Helpers of tests, which clippy does not take for tests; what they print says how much was compared.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

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
