//! The codec against captured datagrams, random ones, other decoders and the living kernel.

mod bed;
mod capture_golden;
mod describe;
mod golden;
