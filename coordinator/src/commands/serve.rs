//! `coordinator serve`.

use crate::cli::ServeArgs;
use crate::data_dir::DataDir;
use crate::output::{hint, note, say};
use crate::service::{Options, Scope, Service, new_token};
use anyhow::{Context, Result};
use lockstep_common::wire::TokenPurpose;
use tokio::signal::unix::{SignalKind, signal};

const TOKEN_TTL_S: u64 = 3600;
const TOKEN_USES: u32 = 16;

pub(super) async fn serve(dir: DataDir, args: &ServeArgs) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let first_start = !dir.store().exists();
    let root = dir.root().display().to_string();
    let service =
        Service::start(Options { dir, listen: args.listen, http: args.http, scope: Scope::All }).await?;
    let address = service.advertised();
    say(format_args!("coordinator on {}, metrics on http://{}/metrics", service.address(), service.http()));
    if first_start {
        let token = new_token(&service.shared, TokenPurpose::Worker, TOKEN_TTL_S, TOKEN_USES).await;
        let token = token.map_err(|refusal| anyhow::anyhow!(refusal.message))?;
        say(format_args!(
            "\nOn each worker's host (the token is good for an hour and {TOKEN_USES} workers):"
        ));
        say(format_args!("  worker join --coordinator {address} --token {token}\n"));
        hint(format_args!("`coordinator --data-dir {root} token new` makes another token"));
        hint(format_args!("`coordinator --data-dir {root} submit JOB.toml` puts a job in the queue"));
    } else {
        hint(format_args!("`coordinator --data-dir {root} token new` prints how workers join"));
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    note("stopping; running jobs go on without a coordinator until the next one");
    service.stop().await;
    Ok(())
}
