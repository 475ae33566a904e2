//! Telling peers at once that the connections of an earlier process of ours are gone.
//!
//! A process that was killed says no farewell, and its peers would wait for their idle time-out. QUIC's stateless
//! reset ends that wait: the restarted process answers a packet of a connection it does not know with a token that
//! only the holder of the same key can make. So the key comes from the identity, which outlives the process, and
//! connection ids are plain random bytes: quinn's own are keyed by process, and drops those of another key unanswered.

use super::authority::Identity;
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use std::sync::Arc;
use std::time::Duration;

/// Long enough that two connections of one endpoint never share one.
const ID_BYTES: usize = 12;

struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; ID_BYTES];
        if getrandom::fill(&mut bytes).is_err() {
            // Unique is what an id must be; the time is, and the key exchange has its own randomness.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            bytes.copy_from_slice(&now.as_nanos().to_le_bytes()[..ID_BYTES]);
        }
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// An endpoint whose peers learn at once when it has been restarted.
pub(super) fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let key = blake3::derive_key("lockstep 2026-11 stateless reset", identity.private_key().secret_der());
    let mut config = EndpointConfig::new(Arc::new(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key)));
    config.cid_generator(|| Box::new(RandomIds));
    config
}
