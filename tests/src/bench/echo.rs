//! A bare NATS responder, and a client for it.

use std::process::Command;

use uuid::Uuid;

use super::installation::Installation;
use crate::Process;

/// A bare NATS responder in a child process.
pub struct Echo {
    pub subject: String,
    client: async_nats::Client,
    _process: Process,
}

#[derive(Clone)]
pub struct EchoClient {
    subject: String,
    client: async_nats::Client,
}

impl Echo {
    pub async fn start(installation: &Installation, bytes: usize) -> Self {
        // A subject to which the client may send requests.
        let subject = format!("qry.echo.{}", Uuid::now_v7().simple());
        let url = installation.system.stack.url("NATS_OPERATOR_URL");
        let mut command = Command::new(std::env::current_exe().expect("the program's own path"));
        // The URL contains a password, so it goes into the environment, not onto the command line.
        command.env("NATS_URL", url).args(["--echo", &subject, "--echo-bytes", &bytes.to_string()]);
        let echo =
            Self { subject, client: installation.system.client.nats().clone(), _process: Process::start(&mut command) };
        let client = echo.clone_client();
        crate::eventually("the echo answers", async || client.try_request().await.then_some(())).await;
        echo
    }

    pub fn clone_client(&self) -> EchoClient {
        EchoClient { subject: self.subject.clone(), client: self.client.clone() }
    }
}

impl EchoClient {
    pub async fn request(&self) {
        assert!(self.try_request().await, "the echo answers");
    }

    async fn try_request(&self) -> bool {
        self.client.request(self.subject.clone(), "{}".into()).await.is_ok_and(|reply| reply.status.is_none())
    }
}
