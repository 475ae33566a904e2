//! Join tokens: a short-lived secret together with the fingerprint of the cluster's CA.
//!
//! Whoever joins with a token knows that it talks to the right coordinator before it says anything secret, and the
//! coordinator knows that the joiner was invited. The text form is `lks1.` and base64url of
//! id (8 bytes) ‖ secret (32) ‖ BLAKE3 of the CA certificate (32) ‖ check (4).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

const PREFIX: &str = "lks1.";
const BODY_BYTES: usize = 8 + 32 + 32;

/// A join token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Its public name, under which the coordinator keeps it.
    pub id: [u8; 8],
    /// What proves it.
    pub secret: [u8; 32],
    /// BLAKE3 of the CA's certificate, DER.
    pub ca: [u8; 32],
}

/// Why a text is not a token.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "this is not a whole join token (they start with `{PREFIX}`); copy it again, or make one with `coordinator token new`"
)]
pub struct BadToken;

impl Token {
    /// A new random token that pins the CA certificate `ca_der`.
    pub fn generate(ca_der: &[u8]) -> Result<Self, getrandom::Error> {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut secret)?;
        Ok(Self { id, secret, ca: *blake3::hash(ca_der).as_bytes() })
    }

    /// The public name as text.
    pub fn id_hex(&self) -> String {
        hex::encode(self.id)
    }

    /// What the coordinator keeps instead of the secret.
    pub fn secret_hash(secret: &[u8; 32]) -> [u8; 32] {
        *blake3::hash(secret).as_bytes()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut body = [&self.id[..], &self.secret, &self.ca].concat();
        body.extend_from_slice(&blake3::hash(&body).as_bytes()[..4]);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(body))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, secret hidden)", self.id_hex())
    }
}

impl FromStr for Token {
    type Err = BadToken;

    fn from_str(s: &str) -> Result<Self, BadToken> {
        let encoded = s.trim().strip_prefix(PREFIX).ok_or(BadToken)?;
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| BadToken)?;
        if bytes.len() != BODY_BYTES + 4 {
            return Err(BadToken);
        }
        let (body, check) = bytes.split_at(BODY_BYTES);
        if blake3::hash(body).as_bytes()[..4] != *check {
            return Err(BadToken);
        }
        let part = |from: usize, to: usize| body.get(from..to).ok_or(BadToken);
        Ok(Self {
            id: part(0, 8)?.try_into().map_err(|_| BadToken)?,
            secret: part(8, 40)?.try_into().map_err(|_| BadToken)?,
            ca: part(40, 72)?.try_into().map_err(|_| BadToken)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_form_and_any_changed_letter_is_noticed() {
        let token = Token::generate(b"ca").unwrap();
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        for i in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            assert!(String::from_utf8(bytes).unwrap().parse::<Token>().is_err(), "letter {i}");
        }
        assert!(text[..text.len() - 1].parse::<Token>().is_err());
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
    }
}
