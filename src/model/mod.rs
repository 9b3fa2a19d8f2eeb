//! The pure core: what a job is, what can go wrong, and what is decided about it. No IO, no async, no clock of its own.
