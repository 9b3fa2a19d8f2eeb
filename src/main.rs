//! The `sendoff` program.
fn main() {}
