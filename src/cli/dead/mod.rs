//! `sendoff dead`: the archive of dead letters, looked at and worked on.
//! Guarantee: no address and nothing of a body is shown unless asked for with --reveal, and no control character ever
//! reaches the terminal.

mod filter;
