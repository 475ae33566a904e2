//! Enrolment: a certificate for a token.

use super::hub::Hub;
use super::requests::{Call, Stop};
use super::{Shared, refuse};
use crate::store::{StoreError, TokenRecord};
use lockstep_common::net::Role;
use lockstep_common::token::Token;
use lockstep_common::wire::{Refusal, Response, TokenPurpose};

/// Answers an enrolment. The token's use is durable before the certificate is handed out.
pub(super) async fn enroll(
    call: &mut Call,
    token: &str,
    secret: &[u8; 32],
    csr: &[u8],
    host: &str,
) -> Result<(), Stop> {
    let shared = call.shared.clone();
    let host: String = host.chars().filter(|c| !c.is_control()).take(255).collect();
    let (token, secret) = (token.to_owned(), *secret);
    // On the hub, so that two enrolments at once cannot both take the last use.
    let purpose = shared.hub.call(move |hub| spend(hub, &token, &secret)).await??;
    let worker = match purpose {
        TokenPurpose::Operator => None,
        TokenPurpose::Worker => {
            let host = host.clone();
            Some(
                shared
                    .hub
                    .call(move |hub| {
                        let now_ms = hub.now_ms();
                        hub.core.handle_enrolled(host, now_ms)
                    })
                    .await?,
            )
        }
    };
    let role = worker.map_or(Role::Operator, Role::Worker);
    let certificate = shared.authority.sign(csr, role).map_err(|e| refuse("malformed", e))?;
    tracing::info!("{host} at {} enrolled as {role}", call.peer);
    call.answer(&Response::Enrolled { certificate, worker }).await?;
    Ok(())
}

/// Checks a token and takes one of its uses.
fn spend(hub: &mut Hub, id: &str, secret: &[u8; 32]) -> Result<TokenPurpose, Refusal> {
    const AGAIN: &str = "make a new one with `coordinator token new`";
    let failed = |e: StoreError| refuse("store", e);
    let unknown = || refuse("token_unknown", format_args!("the token is not of this coordinator; {AGAIN}"));
    if id.len() > 64 {
        return Err(unknown());
    }
    let record = hub.store.token(id).map_err(failed)?.ok_or_else(unknown)?;
    // The comparison of two `blake3::Hash` takes the same time wherever they differ.
    let shown = blake3::Hash::from_bytes(Token::secret_hash(secret));
    if shown != blake3::Hash::from_bytes(record.secret_hash) {
        return Err(unknown());
    }
    let now_ms = hub.now_ms();
    if record.expires_ms <= now_ms {
        return Err(refuse("token_expired", format_args!("the token has expired; {AGAIN}")));
    }
    let Some(uses_left) = record.uses_left.checked_sub(1) else {
        return Err(refuse("token_used_up", format_args!("the token has been used up; {AGAIN}")));
    };
    let purpose = record.purpose;
    hub.store.put_token(id, &TokenRecord { uses_left, ..record }, now_ms).map_err(failed)?;
    Ok(purpose)
}

/// Makes a token and returns its text.
pub(crate) async fn new_token(
    shared: &Shared,
    purpose: TokenPurpose,
    ttl_s: u64,
    uses: u32,
) -> Result<String, Refusal> {
    let token = Token::generate(shared.authority.certificate())
        .map_err(|e| refuse("randomness", format_args!("the system gives no random numbers: {e}")))?;
    let (id, text) = (token.id_hex(), token.to_string());
    let secret_hash = Token::secret_hash(&token.secret);
    let keep = move |hub: &mut Hub| {
        let now_ms = hub.now_ms();
        let expires_ms = now_ms.saturating_add(ttl_s.saturating_mul(1000));
        let record = TokenRecord { purpose, secret_hash, expires_ms, uses_left: uses };
        hub.store.put_token(&id, &record, now_ms).map_err(|e| refuse("store", e))
    };
    shared.hub.call(keep).await??;
    Ok(text)
}
