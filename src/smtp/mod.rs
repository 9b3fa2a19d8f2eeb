//! Sending: sessions with SMTP servers, and the pool that keeps them. The only folder that knows the SMTP client library.
//! Guarantee: credentials never travel in the clear unless the operator allows it, every wait has its deadline, and a
//! session about which anything is in doubt is never used again.

pub mod compose;
mod conceal;
mod connect;
mod examine;
mod offers;
mod pool;
mod reply;
mod seats;
mod session;
mod stream;
mod tls;

pub use connect::{Observer, SmtpConnector, SmtpOptions};
pub use examine::Examination;
pub use pool::{Pool, PoolLimits, PooledSession};
pub use seats::Seats;
pub use session::{Envelope, FinalDot, Session, SessionFacts};
pub use stream::Deadlines;
pub use tls::{ExtraCaError, TlsFacts, TlsRoots};
