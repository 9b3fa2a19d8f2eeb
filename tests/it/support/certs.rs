//! Certificates for the tests' and the demo's servers, made on the spot.
//! Guarantee: each kind differs from a good one in the one point that its name says.
#![allow(dead_code, reason = "each program that includes this file uses a part of it")]

use std::io::Write;
use std::sync::Arc;

use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// A certification authority of one's own.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A server's certificate with its key.
pub struct ServerCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    pem: String,
}

impl Authority {
    /// An authority of that common name.
    pub fn new(common_name: &str) -> Self {
        let mut params = named(common_name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = new_key();
        let certificate = params.self_signed(&key).expect("valid parameters");
        Self { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    /// The authority's own certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A good certificate for host names and IP addresses.
    pub fn issue(&self, names: &[&str]) -> ServerCertificate {
        self.sign(named(names.first().copied().unwrap_or("nobody"), names))
    }

    /// One that ran out on 1 January 2020.
    pub fn issue_expired(&self, names: &[&str]) -> ServerCertificate {
        let mut params = named(names.first().copied().unwrap_or("nobody"), names);
        params.not_after = date_time_ymd(2020, 1, 1);
        self.sign(params)
    }

    /// One that begins on 1 January 2999.
    pub fn issue_for_later(&self, names: &[&str]) -> ServerCertificate {
        let mut params = named(names.first().copied().unwrap_or("nobody"), names);
        params.not_before = date_time_ymd(2999, 1, 1);
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> ServerCertificate {
        let key = new_key();
        let certificate = params.signed_by(&key, &self.issuer).expect("valid parameters");
        ServerCertificate::new(&certificate, &key)
    }
}

impl ServerCertificate {
    /// As `openssl req -x509 -subj /CN=…` makes it: version 3, basic constraints CA:TRUE; with `-addext
    /// subjectAltName=…` where names are given.
    pub fn self_signed(common_name: &str, alternative_names: &[&str]) -> Self {
        Self::sign_itself(named(common_name, alternative_names))
    }

    /// The same, run out on 1 January 2020.
    pub fn self_signed_expired(common_name: &str, alternative_names: &[&str]) -> Self {
        let mut params = named(common_name, alternative_names);
        params.not_after = date_time_ymd(2020, 1, 1);
        Self::sign_itself(params)
    }

    fn sign_itself(mut params: CertificateParams) -> Self {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.use_authority_key_identifier_extension = true;
        let key = new_key();
        let certificate = params.self_signed(&key).expect("valid parameters");
        Self::new(&certificate, &key)
    }

    fn new(certificate: &Certificate, key: &KeyPair) -> Self {
        Self { chain: vec![certificate.der().clone()], key: key.serialize_der(), pem: certificate.pem() }
    }

    /// The certificate, without its key.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// What a server presents it with.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()));
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("ring has them")
                .with_no_client_auth()
                .with_single_cert(self.chain.clone(), key)
                .expect("the key belongs to the certificate");
        Arc::new(config)
    }
}

/// A file with that content, gone when the value is dropped.
pub fn pem_file(pem: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(pem.as_bytes()).expect("a writable file");
    file
}

fn new_key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn named(common_name: &str, alternative_names: &[&str]) -> CertificateParams {
    let names: Vec<String> = alternative_names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("valid names");
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}
