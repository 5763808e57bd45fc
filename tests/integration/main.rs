//! Tests against this host's kernel. They need root and say so.

mod file_sink;
