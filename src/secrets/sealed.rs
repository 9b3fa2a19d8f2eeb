//! A sealed value: its bytes, and what it is bound to.
//! Guarantee: purpose, format version, key id, owner and field are authenticated, so that no two different contexts have
//! the same associated data: no purpose begins another, and what follows it comes with its length.
//!
//! Bytes of format 1: `1`, length of the key id, key id, 12 bytes of nonce, ciphertext, 16 bytes of tag.

use aes_gcm::aead::array::Array;
use aes_gcm::aead::{AeadInOut, Generate};
use aes_gcm::{Nonce, Tag};
use secrecy::zeroize::{Zeroize, Zeroizing};
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use super::key_ring::{KeyRing, is_key_id};
use crate::model::organization::OrganizationId;

const FORMAT: u8 = 1;
/// 96 bits, random (NIST SP 800-38D section 8.2.2): safe for 2^32 values under one key.
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// First in the associated data: what is sealed for one purpose does not open for another, even under the same key.
const CREDENTIAL: &[u8] = b"sendoff/smtp-credential";
const LETTER: &[u8] = b"sendoff/dead-letter";

/// Which secret of an organization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// The SMTP user name.
    Username,
    /// The SMTP password.
    Password,
}

impl Field {
    fn as_str(self) -> &'static str {
        match self {
            Self::Username => "username",
            Self::Password => "password",
        }
    }
}

/// Which part of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LetterField {
    /// The publisher's bytes.
    Body,
    /// The publisher's properties.
    Properties,
}

impl LetterField {
    fn as_str(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Properties => "properties",
        }
    }
}

/// What a sealed value belongs to; it opens nowhere else.
#[derive(Debug, Clone, Copy)]
pub enum Context<'a> {
    /// An SMTP credential.
    Credential {
        /// Whose.
        organization: &'a OrganizationId,
        /// Which column.
        field: Field,
    },
    /// Content of a dead letter.
    Letter {
        /// The archive's name of the letter.
        letter: Uuid,
        /// Which column.
        field: LetterField,
    },
}

/// Why a value does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It names a key that this ring lacks: the worker's settings are at fault, not the value.
    #[error("sealed under the key `{id}`, which is not in encryption.keys")]
    UnknownKey {
        /// The key's id.
        id: String,
    },
    /// Changed, moved from another owner or field, or sealed under another key of the same id.
    #[error("does not open: changed, moved from elsewhere, or sealed under another key of this id")]
    Tampered,
    /// Not a sealed value of a known format.
    #[error("is not a sealed value of a known format")]
    Format,
}

/// Why a value was not sealed anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResealError {
    /// It does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What was sealed anew did not open as what it was: a fault of this machine's.
    #[error("could not be sealed so that it opens again: this machine's memory may be at fault")]
    Unverified,
}

struct Parts<'a> {
    key_id: &'a str,
    nonce: [u8; NONCE_BYTES],
    ciphertext: &'a [u8],
    tag: [u8; TAG_BYTES],
}

impl KeyRing {
    /// Seals a secret under the first key, with a nonce from the system's random source.
    pub fn seal(&self, context: Context<'_>, plaintext: &SecretString) -> Vec<u8> {
        self.seal_bytes(context, plaintext.expose_secret().as_bytes())
    }

    /// The same for any bytes. It takes about a millisecond for each MiB, so large ones do not belong on an async thread.
    pub fn seal_bytes(&self, context: Context<'_>, plaintext: &[u8]) -> Vec<u8> {
        let key = self.sealing_key();
        let nonce = Nonce::try_generate().expect("the system's random source works once it has booted");
        let mut sealed = header(&key.id);
        sealed.extend_from_slice(&nonce);
        let start = sealed.len();
        sealed.reserve_exact(plaintext.len() + TAG_BYTES);
        sealed.extend_from_slice(plaintext);
        let tag = key
            .cipher
            .encrypt_inout_detached(&nonce, &associated_data(&key.id, context), (&mut sealed[start..]).into())
            .expect("a value in memory is far below the cipher's limit of 64 GiB");
        sealed.extend_from_slice(&tag);
        sealed
    }

    /// Opens a secret, as the field that the context names.
    ///
    /// # Errors
    /// [`OpenError`]: a missing key is told apart from a value that is wrong.
    pub fn open(&self, context: Context<'_>, sealed: &[u8]) -> Result<SecretString, OpenError> {
        match String::from_utf8(self.open_bytes(context, sealed)?) {
            Ok(plaintext) => Ok(plaintext.into()),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(OpenError::Format)
            }
        }
    }

    /// The same for any bytes.
    ///
    /// # Errors
    /// Those of [`KeyRing::open`], but any content will do.
    pub fn open_bytes(&self, context: Context<'_>, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
        let parts = Parts::split(sealed).ok_or(OpenError::Format)?;
        let key =
            self.find(parts.key_id).ok_or_else(|| OpenError::UnknownKey { id: parts.key_id.to_owned() })?;
        let mut buffer = parts.ciphertext.to_vec();
        key.cipher
            .decrypt_inout_detached(
                &Array(parts.nonce),
                &associated_data(parts.key_id, context),
                buffer.as_mut_slice().into(),
                &Tag::from(parts.tag),
            )
            .map_err(|_| OpenError::Tampered)?;
        Ok(buffer)
    }

    /// The same value under the first key, opened once more and compared; `None` where the first key sealed it already,
    /// which is told by its header alone.
    ///
    /// # Errors
    /// [`ResealError`]
    pub fn reseal(&self, context: Context<'_>, sealed: &[u8]) -> Result<Option<Vec<u8>>, ResealError> {
        let parts = Parts::split(sealed).ok_or(OpenError::Format)?;
        if parts.key_id == self.sealing_id() {
            return Ok(None);
        }
        let plaintext = Zeroizing::new(self.open_bytes(context, sealed)?);
        let anew = self.seal_bytes(context, &plaintext);
        self.verify(context, &anew, &plaintext)?;
        Ok(Some(anew))
    }

    fn verify(&self, context: Context<'_>, sealed: &[u8], plaintext: &[u8]) -> Result<(), ResealError> {
        match self.open_bytes(context, sealed).map(Zeroizing::new) {
            Ok(again) if **again == *plaintext => Ok(()),
            Ok(_) | Err(_) => Err(ResealError::Unverified),
        }
    }
}

impl<'a> Parts<'a> {
    fn split(sealed: &'a [u8]) -> Option<Self> {
        let (&[format, id_length], rest) = sealed.split_first_chunk()?;
        let (key_id, rest) = rest.split_at_checked(usize::from(id_length))?;
        let key_id = std::str::from_utf8(key_id).ok().filter(|id| is_key_id(id))?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let (ciphertext, tag) = rest.split_last_chunk()?;
        (format == FORMAT).then_some(Self { key_id, nonce: *nonce, ciphertext, tag: *tag })
    }
}

fn header(key_id: &str) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    push_with_length(&mut bytes, key_id.as_bytes());
    bytes
}

fn associated_data(key_id: &str, context: Context<'_>) -> Vec<u8> {
    let (purpose, owner, field) = match &context {
        Context::Credential { organization, field } => {
            (CREDENTIAL, organization.as_str().as_bytes(), field.as_str())
        }
        Context::Letter { letter, field } => (LETTER, &letter.as_bytes()[..], field.as_str()),
    };
    let mut data = purpose.to_vec();
    data.extend_from_slice(&header(key_id));
    push_with_length(&mut data, owner);
    push_with_length(&mut data, field.as_bytes());
    data
}

fn push_with_length(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.push(u8::try_from(text.len()).expect("key ids, owners and fields are at most 64 bytes long"));
    bytes.extend_from_slice(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = " pässword\u{1f511} with spaces ";

    fn ring(ids: &[&str]) -> KeyRing {
        let items: Vec<SecretString> = ids.iter().map(|id| KeyRing::generate(id).unwrap()).collect();
        KeyRing::parse(&items).unwrap()
    }

    fn organization(text: &str) -> OrganizationId {
        OrganizationId::parse(text).unwrap()
    }

    fn password(organization: &OrganizationId) -> Context<'_> {
        Context::Credential { organization, field: Field::Password }
    }

    #[test]
    fn a_resealed_value_that_is_not_what_it_was_is_not_taken() {
        let (keys, acme) = (ring(&["k1"]), organization("acme"));
        let sealed = keys.seal_bytes(password(&acme), b"as it was");
        assert!(keys.verify(password(&acme), &sealed, b"as it was").is_ok());
        let mut broken = sealed.clone();
        *broken.last_mut().unwrap() ^= 1;
        for (sealed, plaintext) in [(&sealed, b"otherwise"), (&broken, b"as it was")] {
            let verified = keys.verify(password(&acme), sealed, plaintext);
            assert!(matches!(verified, Err(ResealError::Unverified)), "{verified:?}");
        }
    }

    #[test]
    fn a_value_opens_where_it_was_sealed_and_is_unchanged() {
        let (ring, acme) = (ring(&["a"]), organization("acme"));
        for plaintext in ["", SECRET, &"x".repeat(2000)] {
            let sealed = ring.seal(password(&acme), &plaintext.into());
            assert_eq!(ring.open(password(&acme), &sealed).unwrap().expose_secret(), plaintext);
        }
    }

    #[test]
    fn two_seals_of_one_value_have_nothing_in_common_but_the_header() {
        let (ring, acme) = (ring(&["a"]), organization("acme"));
        let [one, two] = [(); 2].map(|()| ring.seal(password(&acme), &SECRET.into()));
        assert_eq!(one[..3], two[..3]);
        assert_ne!(one[3..15], two[3..15]);
        assert_ne!(one[15..], two[15..]);
        assert!(!one.windows(8).any(|window| SECRET.as_bytes().windows(8).any(|part| part == window)));
    }

    #[test]
    fn a_value_moved_to_another_organization_or_field_does_not_open() {
        let (ring, acme, other) = (ring(&["a"]), organization("acme"), organization("acm"));
        let sealed = ring.seal(password(&acme), &SECRET.into());
        assert_eq!(ring.open(password(&other), &sealed).unwrap_err(), OpenError::Tampered);
        let username = Context::Credential { organization: &acme, field: Field::Username };
        assert_eq!(ring.open(username, &sealed).unwrap_err(), OpenError::Tampered);
    }

    #[test]
    fn an_integer_and_its_text_are_the_same_organization_here_too() {
        let ring = ring(&["a"]);
        let sealed = ring.seal(password(&OrganizationId::from_integer(42)), &SECRET.into());
        assert!(ring.open(password(&organization("42")), &sealed).is_ok());
    }

    #[test]
    fn no_flipped_bit_and_no_missing_byte_goes_unnoticed() {
        let (ring, acme) = (ring(&["key-a", "key-c"]), organization("acme"));
        let sealed = ring.seal(password(&acme), &SECRET.into());
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(ring.open(password(&acme), &changed).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(ring.open(password(&acme), &sealed[..length]).is_err(), "{length} bytes");
        }
        let longer = [sealed.as_slice(), &[0]].concat();
        assert_eq!(ring.open(password(&acme), &longer).unwrap_err(), OpenError::Tampered);
    }

    #[test]
    fn a_missing_key_is_told_apart_from_a_wrong_one() {
        let acme = organization("acme");
        let sealed = ring(&["a"]).seal(password(&acme), &SECRET.into());
        let missing = ring(&["b"]).open(password(&acme), &sealed).unwrap_err();
        assert_eq!(missing, OpenError::UnknownKey { id: "a".into() });
        assert_eq!(ring(&["a"]).open(password(&acme), &sealed).unwrap_err(), OpenError::Tampered);
        assert_eq!(ring(&["a"]).open(password(&acme), b"plaintext").unwrap_err(), OpenError::Format);
    }

    #[test]
    fn an_older_key_still_opens_after_a_new_one_is_put_first() {
        let acme = organization("acme");
        let [old, new] = ["old", "new"].map(|id| KeyRing::generate(id).unwrap());
        let before = KeyRing::parse(std::slice::from_ref(&old)).unwrap();
        let after = KeyRing::parse(&[new, old]).unwrap();
        let sealed = before.seal(password(&acme), &SECRET.into());
        assert_eq!(after.open(password(&acme), &sealed).unwrap().expose_secret(), SECRET);
        let missing = before.open(password(&acme), &after.seal(password(&acme), &SECRET.into())).unwrap_err();
        assert_eq!(missing, OpenError::UnknownKey { id: "new".into() });
    }

    #[test]
    fn a_value_is_sealed_anew_under_the_first_key_once_and_only_where_it_opens() {
        let acme = organization("acme");
        let [old, new] = ["old", "new"].map(|id| KeyRing::generate(id).unwrap());
        let before = KeyRing::parse(std::slice::from_ref(&old)).unwrap();
        let both = KeyRing::parse(&[new.clone(), old]).unwrap();
        let after = KeyRing::parse(&[new]).unwrap();
        let sealed = before.seal(password(&acme), &SECRET.into());
        let anew = both.reseal(password(&acme), &sealed).unwrap().expect("it was under the older key");
        assert_eq!(after.open(password(&acme), &anew).unwrap().expose_secret(), SECRET);
        assert_eq!(both.reseal(password(&acme), &anew), Ok(None));
        let missing = ResealError::Open(OpenError::UnknownKey { id: "old".into() });
        assert_eq!(after.reseal(password(&acme), &sealed), Err(missing));
        let elsewhere = Context::Credential { organization: &acme, field: Field::Username };
        assert_eq!(both.reseal(elsewhere, &sealed), Err(OpenError::Tampered.into()));
        assert_eq!(both.reseal(password(&acme), b"plaintext"), Err(OpenError::Format.into()));
    }

    #[test]
    fn a_credential_that_an_earlier_version_sealed_still_opens() {
        const KEY: &str = "k1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
        const SEALED: &str = "01026b31000102030405060708090a0bd3d3fb52458c34cbdfe01655c06dfd671c4bf0a94168f8";
        let ring = KeyRing::parse(&[KEY.into()]).unwrap();
        let bytes: Vec<u8> = (0..SEALED.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&SEALED[at..at + 2], 16).unwrap())
            .collect();
        assert_eq!(ring.open(password(&organization("acme")), &bytes).unwrap().expose_secret(), "hunter2");
    }

    #[test]
    fn a_letters_content_opens_only_as_the_same_field_of_the_same_letter() {
        let ring = ring(&["a"]);
        let context = |letter, field| Context::Letter { letter: Uuid::from_u128(letter), field };
        let awkward: [&[u8]; 3] = [b"", b"\0\xff{\0", &[0xfe; 70_000]];
        for plaintext in awkward {
            let sealed = ring.seal_bytes(context(1, LetterField::Body), plaintext);
            assert_eq!(ring.open_bytes(context(1, LetterField::Body), &sealed).unwrap(), plaintext);
            for elsewhere in [context(2, LetterField::Body), context(1, LetterField::Properties)] {
                assert_eq!(ring.open_bytes(elsewhere, &sealed).unwrap_err(), OpenError::Tampered);
            }
        }
    }

    #[test]
    fn a_letters_content_and_a_credential_do_not_open_as_each_other() {
        let (ring, letter) = (ring(&["a"]), Uuid::from_bytes(*b"sixteen-bytes-ok"));
        let acme = organization("sixteen-bytes-ok");
        let body = Context::Letter { letter, field: LetterField::Body };
        let sealed = ring.seal_bytes(body, b"secret");
        assert_eq!(ring.open_bytes(password(&acme), &sealed).unwrap_err(), OpenError::Tampered);
        let sealed = ring.seal(password(&acme), &SECRET.into());
        assert_eq!(ring.open_bytes(body, &sealed).unwrap_err(), OpenError::Tampered);
    }

    #[test]
    fn an_opened_value_prints_nothing() {
        let (ring, acme) = (ring(&["a"]), organization("acme"));
        let opened = ring.open(password(&acme), &ring.seal(password(&acme), &SECRET.into())).unwrap();
        assert!(!format!("{opened:?}").contains("word"));
    }
}
