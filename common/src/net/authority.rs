//! The cluster's certificate authority and the identities that it signs.

use super::NetError;
use crate::durable;
use crate::ids::WorkerId;
use quinn::Connection;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// What the holder of a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The coordinator.
    Coordinator,
    /// A worker.
    Worker(WorkerId),
    /// A person or script that controls jobs.
    Operator,
}

impl Role {
    /// The DNS name in the certificate, which is also the server name that a client asks for.
    pub fn server_name(self) -> String {
        match self {
            Self::Coordinator => "coordinator.lockstep".to_owned(),
            Self::Worker(WorkerId(n)) => format!("w{n}.worker.lockstep"),
            Self::Operator => "operator.lockstep".to_owned(),
        }
    }

    fn from_server_name(name: &str) -> Option<Self> {
        match name {
            "coordinator.lockstep" => Some(Self::Coordinator),
            "operator.lockstep" => Some(Self::Operator),
            _ => name.strip_suffix(".worker.lockstep")?.parse().ok().map(Self::Worker),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("the coordinator"),
            Self::Worker(id) => write!(f, "worker {id}"),
            Self::Operator => f.write_str("an operator"),
        }
    }
}

/// The role in the certificate that a peer has proved to hold; `None` if it showed none.
pub fn peer_role(connection: &Connection) -> Option<Role> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    role_of(chain.first()?)
}

fn role_of(certificate: &CertificateDer<'_>) -> Option<Role> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        x509_parser::extensions::GeneralName::DNSName(name) => Role::from_server_name(name),
        _ => None,
    })
}

fn bad(e: impl fmt::Display) -> NetError {
    NetError::Certificate(e.to_string())
}

/// Reads a PEM file.
fn read_pem(path: &Path) -> Result<String, NetError> {
    let bytes = durable::read(path)?;
    String::from_utf8(bytes).map_err(|_| bad(format_args!("`{}` is not a PEM file", path.display())))
}

/// Certificates count from a day ago, so that a newcomer whose clock is behind is not refused.
fn validity(params: &mut CertificateParams, years: u64) {
    const DAY: Duration = Duration::from_secs(86_400);
    let now = SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * 365 * years as u32).into();
}

/// The cluster's certificate authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the authority in `folder`, or makes it there if the folder has none.
    pub fn open(folder: &Path) -> Result<Self, NetError> {
        let (certificate_path, key_path) = (folder.join("ca.pem"), folder.join("ca.key"));
        if certificate_path.exists() {
            return Self::from_pem(&read_pem(&certificate_path)?, &read_pem(&key_path)?);
        }
        durable::create_dir_all(folder)?;
        let (certificate, key) = Self::generate()?;
        // The key first: a certificate without its key would be taken for a whole authority.
        durable::write_atomic_private(&key_path, key.as_bytes())?;
        durable::write_atomic_private(&certificate_path, certificate.as_bytes())?;
        Self::from_pem(&certificate, &key)
    }

    /// A new authority that is gone with this value: its key is written nowhere.
    pub fn ephemeral() -> Result<Self, NetError> {
        let (certificate, key) = Self::generate()?;
        Self::from_pem(&certificate, &key)
    }

    /// A new certificate and its key, PEM.
    fn generate() -> Result<(String, String), NetError> {
        let key = KeyPair::generate().map_err(bad)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Lockstep cluster CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, 20);
        let certificate = params.self_signed(&key).map_err(bad)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    fn from_pem(certificate: &str, key: &str) -> Result<Self, NetError> {
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(bad)?;
        let key = KeyPair::from_pem(key).map_err(bad)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(bad)?;
        Ok(Self { certificate, issuer })
    }

    /// The authority's certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Signs the public key of a signing request (DER) for `role`. Nothing else in the request counts.
    pub fn sign(&self, csr: &[u8], role: Role) -> Result<Vec<u8>, NetError> {
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
            .map_err(bad)?;
        self.certify(&request.public_key, role)
    }

    fn certify(&self, key: &impl PublicKeyData, role: Role) -> Result<Vec<u8>, NetError> {
        let mut params = CertificateParams::new([role.server_name()]).map_err(bad)?;
        params.distinguished_name.push(DnType::CommonName, role.server_name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        validity(&mut params, 5);
        Ok(params.signed_by(key, &self.issuer).map_err(bad)?.der().to_vec())
    }

    /// A new key with a certificate for `role`.
    pub fn issue(&self, role: Role) -> Result<Identity, NetError> {
        let request = SigningRequest::new()?;
        let certificate = self.certify(&request.key, role)?;
        Ok(request.complete(certificate, self.certificate.to_vec()))
    }
}

/// A key that waits for its certificate.
pub struct SigningRequest {
    key: KeyPair,
    der: Vec<u8>,
}

impl SigningRequest {
    /// A new key and a request to sign it.
    pub fn new() -> Result<Self, NetError> {
        let key = KeyPair::generate().map_err(bad)?;
        let der = CertificateParams::default().serialize_request(&key).map_err(bad)?.der().to_vec();
        Ok(Self { key, der })
    }

    /// The request, DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The identity, once the certificate is there.
    pub fn complete(self, certificate: Vec<u8>, ca: Vec<u8>) -> Identity {
        Identity { certificate: certificate.into(), key: self.key.serialize_der(), ca: ca.into() }
    }
}

/// A certificate with its private key, and the authority that it belongs to.
#[derive(Clone)]
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
    ca: CertificateDer<'static>,
}

impl Identity {
    /// What this identity is, by its own certificate.
    pub fn role(&self) -> Option<Role> {
        role_of(&self.certificate)
    }

    /// The authority's certificate, DER.
    pub fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// The chain shown to peers: the certificate and its authority, which an enrolling peer checks by hash.
    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone(), self.ca.clone()]
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    /// Stores the identity as `NAME.pem` (certificate, authority) and `NAME.key` in `folder`.
    pub fn save(&self, folder: &Path, name: &str) -> Result<(), NetError> {
        durable::create_dir_all(folder)?;
        let pem = |label: &str, der: &[u8]| rcgen_pem(label, der);
        let key = pem("PRIVATE KEY", &self.key);
        durable::write_atomic_private(&folder.join(format!("{name}.key")), key.as_bytes())?;
        let chain = pem("CERTIFICATE", &self.certificate) + &pem("CERTIFICATE", &self.ca);
        durable::write_atomic_private(&folder.join(format!("{name}.pem")), chain.as_bytes())?;
        Ok(())
    }

    /// Loads what [`Self::save`] stored; `None` if there is nothing.
    pub fn load(folder: &Path, name: &str) -> Result<Option<Self>, NetError> {
        let (chain_path, key_path) = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
        if !chain_path.exists() {
            return Ok(None);
        }
        let pem = durable::read(&chain_path)?;
        let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map_err(bad)?;
        let [certificate, ca] = chain.try_into().map_err(|chain: Vec<_>| {
            bad(format!("{}: {} certificates instead of 2", chain_path.display(), chain.len()))
        })?;
        let key_pem = durable::read(&key_path)?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(&key_pem).map_err(bad)?.secret_pkcs8_der().to_vec();
        Ok(Some(Self { certificate, key, ca }))
    }
}

fn rcgen_pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let encoded = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in encoded.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn identities_survive_the_disk_and_say_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path()).unwrap();
        let again = Authority::open(folder.path()).unwrap();
        let mode = std::fs::metadata(folder.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(authority.certificate(), again.certificate());
        for role in [Role::Coordinator, Role::Operator, Role::Worker(WorkerId(12))] {
            let identity = again.issue(role).unwrap();
            identity.save(folder.path(), "me").unwrap();
            let loaded = Identity::load(folder.path(), "me").unwrap().unwrap();
            assert_eq!(loaded.role(), Some(role));
            assert_eq!(loaded.chain(), identity.chain());
        }
        assert!(Identity::load(folder.path(), "nobody").unwrap().is_none());
    }

    #[test]
    fn a_signing_request_gets_the_role_of_the_signer_and_never_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path()).unwrap();
        let request = SigningRequest::new().unwrap();
        let certificate = authority.sign(request.der(), Role::Worker(WorkerId(3))).unwrap();
        let identity = request.complete(certificate, authority.certificate().to_vec());
        assert_eq!(identity.role(), Some(Role::Worker(WorkerId(3))));
        assert!(authority.sign(b"nonsense", Role::Operator).is_err());
    }
}
