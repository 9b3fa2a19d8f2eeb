//! Integration tests against real services.

mod configs;
mod support {
    pub mod dns;
}
