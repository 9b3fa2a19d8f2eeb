//! Sendoff: a background email worker. Jobs come from RabbitMQ and leave through each organization's own SMTP server.
//!
//! The folders are the outside systems plus one core:
//!
//! - [`model`] is pure: what a job is, what can go wrong, what is decided about it. It imports nothing of the crate, and
//!   neither do the leaves [`clock`], [`shutdown`] and [`fault`]. The leaves [`settings`] and [`telemetry`] know the model only.
//! - [`broker`] (lapin), [`store`] (sqlx), [`secrets`] (aes-gcm), [`egress`] (hickory-resolver, sockets) and [`smtp`]
//!   (lettre) each know one outside library, and import only [`model`], the leaves [`clock`], [`shutdown`] and
//!   [`settings`], and each other in two places: `smtp` dials through `egress`, `store` seals with `secrets`.
//! - [`delivery`], [`control`] and [`dead_letters`] are the only places where two outside systems meet. They do not import
//!   each other.
//! - [`rotation`] walks what the store has sealed, for [`cli`].
//! - [`parts`] builds adapters from the settings, for [`cli`] and [`app`].
//! - [`cli`] and [`http`] stand in front; [`app`] composes the worker, and only `main` imports it.
//!
//! A test in `tests/it/rules.rs` fails on an import that breaks these rules.

pub mod app;
pub mod broker;
pub mod cli;
pub mod clock;
pub mod control;
pub mod dead_letters;
pub mod delivery;
pub mod egress;
pub mod fault;
pub mod http;
pub mod model;
pub mod parts;
pub mod rotation;
pub mod secrets;
pub mod settings;
pub mod shutdown;
pub mod smtp;
pub mod store;
pub mod telemetry;
