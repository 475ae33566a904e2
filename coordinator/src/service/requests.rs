//! One connection: its streams, and who may ask what.

use super::{Shared, artifacts, checkpoints, enroll, operators, refuse, session, shards};
use lockstep_common::net::{Role, peer_role};
use lockstep_common::wire::{
    FrameError, Refusal, Request, Response, read_frame, read_preamble, write_frame, write_preamble,
};
use quinn::{Connection, RecvStream, SendStream};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a peer may take to say what it wants.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Reasons for which a peer has no business here, as opposed to mistakes of those who have.
const UNINVITED: &[&str] = &[
    "malformed",
    "no_certificate",
    "not_authorised",
    "not_lockstep",
    "protocol_version",
    "silent",
    "token_expired",
    "token_unknown",
    "token_used_up",
    "unknown_worker",
];

/// A stream with a request on it.
pub(super) struct Call {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: SocketAddr,
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
}

/// What a handler says when it cannot go on: the peer is refused, or the stream broke.
pub(super) enum Stop {
    Refused(Refusal),
    Broken(FrameError),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<FrameError> for Stop {
    fn from(error: FrameError) -> Self {
        Self::Broken(error)
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(FrameError::Io(error))
    }
}

/// Serves all streams of a connection until it ends.
pub(super) async fn serve(shared: &Arc<Shared>, connection: &Connection) {
    let role = peer_role(connection);
    let peer = connection.remote_address();
    while let Ok((send, recv)) = connection.accept_bi().await {
        let call = Call { shared: shared.clone(), peer, send, recv };
        let connection = connection.clone();
        tokio::spawn(async move { call.serve(role, connection).await });
    }
}

impl Call {
    async fn serve(mut self, role: Option<Role>, connection: Connection) {
        match self.handle(role, connection).await {
            Ok(()) => {}
            Err(Stop::Refused(refusal)) => {
                if UNINVITED.contains(&refusal.reason.as_str()) {
                    self.shared.note_refusal(self.peer, &refusal);
                }
                // The peer may be gone already.
                let _ = self.answer(&Response::Refused(refusal)).await;
            }
            Err(Stop::Broken(e)) => tracing::debug!("{}: {e}", self.peer),
        }
        let _ = self.send.finish();
    }

    async fn handle(&mut self, role: Option<Role>, connection: Connection) -> Result<(), Stop> {
        write_preamble(&mut self.send).await?;
        let request = match tokio::time::timeout(REQUEST_TIME, self.read_request()).await {
            Ok(Ok(request)) => request,
            Ok(Err(e @ FrameError::Version { .. })) => return Err(refuse("protocol_version", e).into()),
            Ok(Err(e @ FrameError::NotLockstep(_))) => return Err(refuse("not_lockstep", e).into()),
            Ok(Err(e @ (FrameError::TooLarge { .. } | FrameError::Malformed(_)))) => {
                return Err(refuse("malformed", e).into());
            }
            Ok(Err(e)) => return Err(e.into()),
            Err(_) => return Err(refuse("silent", "the request did not arrive in time").into()),
        };
        match (role, request) {
            (_, Request::Enroll { token, secret, csr, host }) => {
                enroll::enroll(self, &token, &secret, &csr, &host).await
            }
            (None, _) => Err(refuse(
                "no_certificate",
                "this request needs a certificate; enrol with a token from `coordinator token new`",
            )
            .into()),
            (Some(Role::Worker(id)), Request::Session(register)) => {
                session::run(self, id, register, connection).await
            }
            (Some(Role::Worker(id)), Request::Ping) => session::ping(self, id).await,
            (Some(Role::Worker(_)), Request::Manifest { dataset }) => shards::manifest(self, dataset).await,
            (Some(Role::Worker(_)), Request::Shard { dataset, hash }) => {
                shards::shard(self, dataset, hash).await
            }
            (Some(Role::Worker(id)), Request::PutCheckpoint(head)) => checkpoints::put(self, id, head).await,
            (Some(Role::Worker(id)), Request::GetCheckpoint { job, generation, step }) => {
                checkpoints::get(self, id, job, generation, step).await
            }
            (Some(Role::Worker(id)), Request::PutArtifact { job, generation, file }) => {
                artifacts::put(self, id, job, generation, file).await
            }
            (Some(Role::Operator), request) => operators::answer(self, request).await,
            (Some(role @ (Role::Worker(_) | Role::Coordinator)), _) => {
                Err(refuse("not_authorised", format_args!("{role} may not ask for this")).into())
            }
        }
    }

    async fn read_request(&mut self) -> Result<Request, FrameError> {
        read_preamble(&mut self.recv).await?;
        read_frame(&mut self.recv).await
    }

    pub(super) async fn answer(&mut self, response: &Response) -> Result<(), FrameError> {
        write_frame(&mut self.send, response).await
    }
}
