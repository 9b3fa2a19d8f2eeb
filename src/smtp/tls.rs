//! TLS as a client: whom to trust, and in plain words why not.
//! Guarantee: every certificate is verified against the host's name and its dates, by a chain to a known authority or
//! byte for byte against one that the operator listed; there is no way round it.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, InvalidMessage, OtherError,
    RootCertStore, SignatureScheme,
};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::model::address::mask_addresses;
use crate::model::failure::{Fault, TlsFault};
use crate::model::text;

/// One destination is one server: its latest tickets are enough.
const RESUMABLE_SESSIONS: usize = 8;
/// Longest shown name out of a certificate, in bytes.
const SHOWN_NAME_MAX: usize = 200;

/// The authorities that are trusted, and the certificates that are trusted as they are.
#[derive(Clone)]
pub struct TlsRoots {
    verifier: Arc<Verifier>,
    provider: Arc<CryptoProvider>,
    warnings: Vec<String>,
    authorities: usize,
}

/// A file of extra certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the certificate file {} {fault}", path.display())]
pub struct ExtraCaError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: String,
}

/// What is known of an encrypted connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLS 1.2` or `TLS 1.3`.
    pub version: &'static str,
    /// Who issued the server's certificate, one line.
    pub issuer: String,
    /// When the server's certificate ends.
    pub expires_at: OffsetDateTime,
}

impl TlsRoots {
    /// Loads the system's roots (`SSL_CERT_FILE` and `SSL_CERT_DIR` replace them) and the extra PEM files. What of the
    /// system's roots cannot be read is a warning.
    ///
    /// # Errors
    /// When an extra file cannot be read, holds no certificate, or one that is none.
    pub fn load(extra_ca_files: &[PathBuf]) -> Result<Self, ExtraCaError> {
        let system = rustls_native_certs::load_native_certs();
        let mut warnings: Vec<String> = system.errors.iter().map(ToString::to_string).collect();
        let mut roots = RootCertStore::empty();
        let (_, unusable) = roots.add_parsable_certificates(system.certs);
        if unusable > 0 {
            warnings.push(format!("{unusable} of the system's root certificates cannot be used"));
        }
        let mut listed = HashSet::new();
        for path in extra_ca_files {
            for certificate in read_pem(path)? {
                let unusable = |error| ExtraCaError {
                    path: path.clone(),
                    fault: format!("holds a certificate that cannot be used: {error}"),
                };
                roots.add(certificate.clone()).map_err(unusable)?;
                listed.insert(certificate.to_vec());
            }
        }
        if roots.is_empty() {
            warnings
                .push("no root certificate was found: no server's certificate will be trusted".to_owned());
        }
        Ok(Self::new(roots, listed, warnings))
    }

    fn new(roots: RootCertStore, listed: HashSet<Vec<u8>>, warnings: Vec<String>) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = roots.len();
        // An empty store is the builder's only error here; then only listed certificates are trusted.
        let by_chain =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().ok();
        let verifier = Arc::new(Verifier { by_chain, listed, provider: provider.clone() });
        Self { verifier, provider, warnings, authorities }
    }

    /// What could not be loaded, one sentence each, for the log and `sendoff check`.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// How many authorities are trusted.
    pub fn authorities(&self) -> usize {
        self.authorities
    }

    /// A configuration for one destination, with a resumption cache of its own: a resumed session skips the
    /// certificate, so none may pass from one configuration version to another.
    pub(super) fn client_config(&self) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring supports TLS 1.2 and 1.3")
            .dangerous()
            .with_custom_certificate_verifier(self.verifier.clone())
            .with_no_client_auth();
        config.resumption = Resumption::in_memory_sessions(RESUMABLE_SESSIONS);
        Arc::new(config)
    }
}

impl fmt::Debug for TlsRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TlsRoots({} authorities, {} listed)", self.authorities, self.verifier.listed.len())
    }
}

fn read_pem(path: &Path) -> Result<Vec<CertificateDer<'static>>, ExtraCaError> {
    let error = |fault: String| ExtraCaError { path: path.to_owned(), fault };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|fault| error(format!("cannot be read: {fault}")))?;
    if certificates.is_empty() {
        return Err(error("holds no certificate in PEM form".to_owned()));
    }
    Ok(certificates)
}

#[derive(Debug)]
struct Verifier {
    by_chain: Option<Arc<WebPkiServerVerifier>>,
    /// DER of the certificates in the extra files.
    listed: HashSet<Vec<u8>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let by_chain = match &self.by_chain {
            Some(webpki) => {
                webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            None => Err(CertificateError::UnknownIssuer.into()),
        };
        let verified = match by_chain {
            Err(_) if self.listed.contains(end_entity.as_ref()) => {
                verify_listed(end_entity, server_name, now).map(|()| ServerCertVerified::assertion())
            }
            Err(rustls::Error::InvalidCertificate(error)) => Err(error),
            other => return other,
        };
        verified.map_err(|why| Refused::new(why, end_entity).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate that was not accepted, with what it says of itself: nobody can ask for it once the handshake failed.
#[derive(Debug)]
struct Refused {
    why: CertificateError,
    /// As shown: one bounded line each.
    issuer: String,
    names: String,
    is_self_signed: bool,
}

impl Refused {
    fn new(why: CertificateError, certificate: &CertificateDer<'_>) -> Self {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
            return Self { why, issuer: String::new(), names: String::new(), is_self_signed: false };
        };
        let mut names = alternative_names(&parsed);
        if names.is_empty() {
            names = common_names(&parsed);
        }
        let is_self_signed = parsed.issuer().as_raw() == parsed.subject().as_raw();
        Self {
            why,
            issuer: shown(&parsed.issuer().to_string()),
            names: shown(&names.join(", ")),
            is_self_signed,
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.why.fmt(f)
    }
}

impl std::error::Error for Refused {}

impl From<Refused> for rustls::Error {
    fn from(refused: Refused) -> Self {
        CertificateError::Other(OtherError(Arc::new(refused))).into()
    }
}

/// Text out of a certificate, made fit to show.
fn shown(text: &str) -> String {
    text::bounded(&mask_addresses(&text::single_line(text)), SHOWN_NAME_MAX)
}

/// The operator vouches for this very certificate: its dates and its name remain to be checked.
fn verify_listed(
    certificate: &CertificateDer<'_>,
    server_name: &ServerName<'_>,
    now: UnixTime,
) -> Result<(), CertificateError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let not_after = unix_time(parsed.validity().not_after.timestamp());
    let not_before = unix_time(parsed.validity().not_before.timestamp());
    if now > not_after {
        return Err(CertificateError::ExpiredContext { time: now, not_after });
    }
    if now < not_before {
        return Err(CertificateError::NotValidYetContext { time: now, not_before });
    }
    let names = alternative_names(&parsed);
    if names.is_empty() {
        let names: Vec<String> = common_names(&parsed);
        if names.iter().any(|name| common_name_fits(name, server_name)) {
            return Ok(());
        }
        return Err(not_valid_for(server_name, names));
    }
    let fits = ParsedCertificate::try_from(certificate)
        .is_ok_and(|certificate| verify_server_name(&certificate, server_name).is_ok());
    if fits { Ok(()) } else { Err(not_valid_for(server_name, names)) }
}

fn not_valid_for(server_name: &ServerName<'_>, presented: Vec<String>) -> CertificateError {
    CertificateError::NotValidForNameContext { expected: server_name.to_owned(), presented }
}

fn unix_time(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

fn alternative_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let shown = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => ip_address(bytes).map(|ip| ip.to_string()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(shown).collect()
}

fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn common_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok())
        .map(str::to_owned)
        .collect()
}

fn common_name_fits(common_name: &str, server_name: &ServerName<'_>) -> bool {
    match server_name {
        ServerName::DnsName(host) => common_name.eq_ignore_ascii_case(host.as_ref()),
        ServerName::IpAddress(ip) => common_name.parse().is_ok_and(|name: IpAddr| name == IpAddr::from(*ip)),
        _ => false,
    }
}

/// What is known of a connection whose handshake is done.
pub(super) fn facts(connection: &rustls::ClientConnection) -> Option<TlsFacts> {
    let version = match connection.protocol_version()? {
        rustls::ProtocolVersion::TLSv1_2 => "TLS 1.2",
        rustls::ProtocolVersion::TLSv1_3 => "TLS 1.3",
        _ => return None,
    };
    let (_, certificate) = X509Certificate::from_der(connection.peer_certificates()?.first()?).ok()?;
    let issuer = shown(&certificate.issuer().to_string());
    Some(TlsFacts { version, issuer, expires_at: certificate.validity().not_after.to_datetime() })
}

/// A host name that is no DNS name to X.509, one with an underscore say.
pub(super) fn no_certificate_possible() -> Fault {
    Fault::Tls { kind: TlsFault::Name, detail: "no certificate can be for this host name".to_owned() }
}

/// Why a handshake failed: a fault of TLS in words for the admin, or a lost connection.
pub(super) fn handshake_fault(error: &io::Error, host: &str) -> Fault {
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return Fault::Lost;
    };
    let (kind, detail) = match error {
        rustls::Error::InvalidCertificate(error) => certificate_fault(error, host),
        // The first byte of any text is no type of TLS record.
        rustls::Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => {
            let words = "the server did not answer in TLS: is this the port for another TLS mode?";
            (TlsFault::NotTls, words.to_owned())
        }
        rustls::Error::AlertReceived(alert) => alert_fault(*alert),
        rustls::Error::PeerIncompatible(why) => {
            let words = "the server's TLS is too old or too unusual";
            (TlsFault::Version, format!("{words} ({why:?}); TLS 1.2 or newer is needed"))
        }
        other => (TlsFault::Other, shown(&format!("the handshake failed: {other}"))),
    };
    Fault::Tls { kind, detail }
}

fn alert_fault(alert: AlertDescription) -> (TlsFault, String) {
    match alert {
        AlertDescription::HandshakeFailure
        | AlertDescription::ProtocolVersion
        | AlertDescription::InsufficientSecurity => {
            let words = format!("the server ended the handshake ({alert:?}); TLS 1.2 or newer is needed");
            (TlsFault::Version, words)
        }
        other => (TlsFault::Other, format!("the server ended the handshake ({other:?})")),
    }
}

fn certificate_fault(error: &CertificateError, host: &str) -> (TlsFault, String) {
    let refused = match error {
        CertificateError::Other(OtherError(inner)) => inner.downcast_ref::<Refused>(),
        _ => None,
    };
    let Some(refused) = refused else {
        return (TlsFault::Other, shown(&format!("the server's certificate cannot be accepted: {error}")));
    };
    let names = &refused.names;
    let for_names = if names.is_empty() { "for no host".to_owned() } else { format!("for {names}") };
    match &refused.why {
        CertificateError::ExpiredContext { not_after, .. } => {
            let expired = format!("the server's certificate, {for_names}, expired on {}", day(*not_after));
            (TlsFault::Expired, expired)
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            let begins = day(*not_before);
            let early = format!("the server's certificate, {for_names}, is not valid before {begins}");
            (TlsFault::NotYetValid, early)
        }
        CertificateError::NotValidForNameContext { .. } => {
            (TlsFault::Name, format!("the server's certificate is {for_names}, not for {host}"))
        }
        CertificateError::UnknownIssuer | CertificateError::Other(_) if refused.is_self_signed => {
            let words = format!("the server's certificate, {for_names}, is self-signed and not trusted here");
            (TlsFault::UnknownIssuer, words)
        }
        CertificateError::UnknownIssuer => {
            let words = format!(
                "the server's certificate, {for_names}, does not come from an authority that is trusted here, but from {}",
                refused.issuer
            );
            (TlsFault::UnknownIssuer, words)
        }
        other => {
            let words = format!("the server's certificate, {for_names}, cannot be accepted: {other}");
            (TlsFault::Other, text::bounded(&text::single_line(&words), 2 * SHOWN_NAME_MAX))
        }
    }
}

fn day(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(at) => at.date().to_string(),
        Err(_) => "a date beyond all calendars".to_owned(),
    }
}
