//! `coordinator token` and `coordinator login`.

use crate::cli::TokenCommand;
use crate::client::{Client, login as client_login};
use crate::data_dir::DataDir;
use crate::output::{hint, say, say_json};
use anyhow::{Result, bail};
use lockstep_common::token::Token;
use lockstep_common::wire::{Request, Response, TokenPurpose};
use serde_json::json;

pub(super) async fn run(dir: &DataDir, command: &TokenCommand) -> Result<()> {
    let TokenCommand::New { ttl, uses, operator, json } = command;
    let purpose = if *operator { TokenPurpose::Operator } else { TokenPurpose::Worker };
    let client = Client::connect(dir).await?;
    let request = Request::NewToken { purpose, ttl_s: ttl.as_secs(), uses: *uses };
    let Response::Token { token } = client.ask(&request).await? else {
        bail!("the coordinator gave no token")
    };
    let address = dir.endpoint().map_or_else(|| "HOST:7777".to_owned(), |e| e.advertised);
    if json.json {
        say_json(
            &json!({ "token": token, "coordinator": address, "purpose": purpose, "ttl_s": ttl.as_secs(), "uses": uses }),
        );
        return Ok(());
    }
    say(&token);
    match purpose {
        TokenPurpose::Worker => hint(format_args!("worker join --coordinator {address} --token {token}")),
        TokenPurpose::Operator => {
            hint(format_args!("coordinator login --coordinator {address} --token {token}"))
        }
    }
    Ok(())
}

pub(super) async fn login(dir: &DataDir, coordinator: &str, token: &str) -> Result<()> {
    let token: Token = token.parse()?;
    client_login(dir, coordinator, &token, host_name()).await?;
    say(format_args!("logged in to {coordinator}"));
    hint("`coordinator jobs` lists its jobs");
    Ok(())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
