//! One table of decisions.
