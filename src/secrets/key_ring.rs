//! The keys of `encryption.keys`: the first one seals, all of them open.
//! Guarantee: ids and keys are distinct, so which key opens a value is never ambiguous.

use std::fmt;

use aes_gcm::aead::Generate;
use aes_gcm::{Aes256Gcm, Key, KeyInit};
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use secrecy::zeroize::{Zeroize, Zeroizing};
use secrecy::{ExposeSecret, SecretString};

/// Octets of an AES-256 key.
const KEY_BYTES: usize = 32;
/// Longest id of a key, in bytes; its length is one byte in a sealed value.
const KEY_ID_MAX: usize = 32;

/// Standard alphabet, with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Keys by id, in the order given.
pub struct KeyRing {
    keys: Vec<RingKey>,
}

pub(super) struct RingKey {
    pub(super) id: String,
    pub(super) cipher: Aes256Gcm,
}

/// Why the items are no key ring. `position` counts from 1; the key itself is never repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A ring without a key can seal nothing.
    #[error(
        "no key is given: at least one `id:base64(32 bytes)` item is needed (`sendoff keys generate` makes one)"
    )]
    Empty,
    /// No colon between id and key. What stands there may be a key, so nothing of it is shown.
    #[error("item {position} is not of the form `id:base64(32 bytes)`")]
    Shape {
        /// Which item.
        position: usize,
    },
    /// The part before the colon may be a mistyped key, so it is not shown.
    #[error("item {position} has an id that is not 1 to 32 characters of A-Z, a-z, 0-9, `.`, `_` and `-`")]
    Id {
        /// Which item.
        position: usize,
    },
    /// The part behind the colon is not base64.
    #[error("item {position} (`{id}`) has a key that is not base64")]
    Base64 {
        /// Which item.
        position: usize,
        /// Its id.
        id: String,
    },
    /// The key is not of 32 bytes.
    #[error("item {position} (`{id}`) has a key of {bytes} bytes; it must be 32")]
    Length {
        /// Which item.
        position: usize,
        /// Its id.
        id: String,
        /// How long it is.
        bytes: usize,
    },
    /// Two keys of one id.
    #[error("item {position} repeats the id `{id}`")]
    DuplicateId {
        /// The later item.
        position: usize,
        /// The id.
        id: String,
    },
    /// One key under two ids: a rotation to it would change nothing.
    #[error("item {position} (`{id}`) has the same key as `{other}`")]
    DuplicateKey {
        /// The later item.
        position: usize,
        /// Its id.
        id: String,
        /// The earlier item's id.
        other: String,
    },
}

impl KeyRing {
    /// Reads `id:base64(32 bytes)` items; the first encrypts, all decrypt. White space around an item is ignored, for
    /// files end their lines with it.
    ///
    /// # Errors
    /// [`KeyError`] names the item by its position and, where it is certain to be one, by its id.
    pub fn parse(items: &[SecretString]) -> Result<Self, KeyError> {
        let mut keys: Vec<RingKey> = Vec::with_capacity(items.len());
        let mut seen: Vec<Zeroizing<[u8; KEY_BYTES]>> = Vec::with_capacity(items.len());
        for (position, item) in (1..).zip(items) {
            let (id, key) = parse_item(position, item.expose_secret().trim())?;
            if keys.iter().any(|other| other.id == id) {
                return Err(KeyError::DuplicateId { position, id });
            }
            if let Some(same) = seen.iter().position(|other| **other == *key) {
                return Err(KeyError::DuplicateKey { position, id, other: keys[same].id.clone() });
            }
            let mut cipher_key = Key::<Aes256Gcm>::from(*key);
            keys.push(RingKey { id, cipher: Aes256Gcm::new(&cipher_key) });
            cipher_key.as_mut_slice().zeroize();
            seen.push(key);
        }
        if keys.is_empty() { Err(KeyError::Empty) } else { Ok(Self { keys }) }
    }

    /// A new random key as an item for `encryption.keys`.
    ///
    /// # Errors
    /// When the id is not 1 to 32 characters of `[A-Za-z0-9._-]`.
    pub fn generate(id: &str) -> Result<SecretString, KeyError> {
        if !is_key_id(id) {
            return Err(KeyError::Id { position: 1 });
        }
        let mut key =
            Key::<Aes256Gcm>::try_generate().expect("the system's random source works once it has booted");
        let item = format!("{id}:{}", Zeroizing::new(BASE64.encode(key.as_slice())).as_str());
        key.as_mut_slice().zeroize();
        Ok(item.into())
    }

    /// The ids, the sealing key's first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.id.as_str())
    }

    /// Id of the key that seals.
    pub fn sealing_id(&self) -> &str {
        &self.sealing_key().id
    }

    pub(super) fn sealing_key(&self) -> &RingKey {
        self.keys.first().expect("a key ring is never empty")
    }

    pub(super) fn find(&self, id: &str) -> Option<&RingKey> {
        self.keys.iter().find(|key| key.id == id)
    }
}

/// Shows the ids alone.
impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRing")?;
        f.debug_list().entries(self.ids()).finish()
    }
}

/// Whether a text may name a key.
pub(super) fn is_key_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=KEY_ID_MAX).contains(&id.len()) && id.bytes().all(allowed)
}

fn parse_item(position: usize, item: &str) -> Result<(String, Zeroizing<[u8; KEY_BYTES]>), KeyError> {
    let (id, encoded) = item.split_once(':').ok_or(KeyError::Shape { position })?;
    if !is_key_id(id) {
        return Err(KeyError::Id { position });
    }
    let id = id.to_owned();
    let Ok(bytes) = BASE64.decode(encoded).map(Zeroizing::new) else {
        return Err(KeyError::Base64 { position, id });
    };
    match <[u8; KEY_BYTES]>::try_from(bytes.as_slice()) {
        Ok(key) => Ok((id, Zeroizing::new(key))),
        Err(_) => Err(KeyError::Length { position, id, bytes: bytes.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONES: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    const TWOS: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";

    fn parse(items: &[&str]) -> Result<KeyRing, KeyError> {
        let items: Vec<SecretString> = items.iter().map(|item| SecretString::from(*item)).collect();
        KeyRing::parse(&items)
    }

    #[test]
    fn the_first_key_seals_and_all_are_known() {
        let ring =
            parse(&[&format!("2026-11:{ONES}"), &format!(" old:{} \n", TWOS.trim_end_matches('='))]).unwrap();
        assert_eq!(ring.sealing_id(), "2026-11");
        assert_eq!(ring.ids().collect::<Vec<_>>(), ["2026-11", "old"]);
    }

    #[test]
    fn what_is_no_key_ring_is_refused_by_position_and_id() {
        let (id, other) = (String::from("b"), String::from("a"));
        let first = format!("a:{ONES}");
        for (items, error) in [
            (vec![], KeyError::Empty),
            (vec![first.clone(), TWOS.to_owned()], KeyError::Shape { position: 2 }),
            (vec![format!(":{ONES}")], KeyError::Id { position: 1 }),
            (vec![format!("a b:{ONES}")], KeyError::Id { position: 1 }),
            (vec![format!("{}:{ONES}", "k".repeat(33))], KeyError::Id { position: 1 }),
            (vec![first.clone(), "b:?".to_owned()], KeyError::Base64 { position: 2, id: id.clone() }),
            (
                vec![first.clone(), "b:AQEB".to_owned()],
                KeyError::Length { position: 2, id: id.clone(), bytes: 3 },
            ),
            (
                vec![first.clone(), format!("a:{TWOS}")],
                KeyError::DuplicateId { position: 2, id: other.clone() },
            ),
            (vec![first.clone(), format!("b:{ONES}")], KeyError::DuplicateKey { position: 2, id, other }),
        ] {
            let items: Vec<&str> = items.iter().map(String::as_str).collect();
            assert_eq!(parse(&items).map(|_| ()), Err(error));
        }
    }

    #[test]
    fn errors_and_debug_show_no_key() {
        for items in [vec![ONES], vec!["a:AQEBAQ"], vec!["AQEB+AQEB:AQEB"], vec!["a:AQEB!AQEB"]] {
            let error = parse(&items).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("AQEB"), "{error}");
        }
        let ring = parse(&[&format!("a:{ONES}"), &format!("b:{TWOS}")]).unwrap();
        assert_eq!(format!("{ring:?}"), r#"KeyRing["a", "b"]"#);
    }

    #[test]
    fn generated_keys_are_accepted_and_differ() {
        let [one, two] = ["a", "b"].map(|id| KeyRing::generate(id).unwrap());
        assert!(KeyRing::parse(&[one, two]).is_ok());
        assert!(KeyRing::generate("a:b").is_err());
    }
}
