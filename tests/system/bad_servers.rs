//! Servers that are absent, refuse the password, or speak another protocol. Each service logs that once, with the
//! server's address and the variable that names the server, and never with the password.

use tests::{System, eventually, stays};
use tokio::{io::AsyncWriteExt, net::TcpListener};

const PASSWORD: &str = "NotThePassword7";

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_server_is_logged_once_with_its_variable_and_address() {
    let system = System::new().await;
    let absent = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other_address = other.local_addr().unwrap().to_string();
    let _other = tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await;
        }
    });
    let mut cases = vec![];
    for (role, variable, flag, url) in [
        ("query", "NATS_URL", "--nats-url", system.stack.url("NATS_QUERY_URL")),
        ("command", "POSTGRES_URL", "--postgres-url", &system.postgres_url()),
        ("query", "MONGODB_URL", "--mongodb-url", system.stack.url("MONGODB_QUERY_URL")),
        ("projection", "MONGODB_URL", "--mongodb-url", system.stack.url("MONGODB_PROJECTION_URL")),
    ] {
        let (scheme, rest) = url.split_once("://").unwrap();
        let (credentials, rest) = rest.split_once('@').unwrap();
        let (user, _) = credentials.split_once(':').unwrap();
        let end = rest.find('/').unwrap_or(rest.len());
        let (address, path) = rest.split_at(end);
        for (what, address) in [("password", address), ("absent", &absent), ("other", &other_address)] {
            let url = format!("{scheme}://{user}:{PASSWORD}@{address}{path}");
            let log = system.stack.directory().join(format!("{}-{role}-{variable}-{what}.log", system.prefix));
            let process = system.logged_process(role, &[flag, &url], &log);
            cases.push((process, log, variable, address.to_owned()));
        }
    }
    for (process, log, variable, address) in &mut cases {
        let matching = || {
            let text = std::fs::read_to_string(&*log).unwrap();
            text.lines().filter(|line| line.contains(&**variable) && line.contains(&**address)).count()
        };
        eventually(&format!("{} names the server that cannot be used", log.display()), async || {
            (matching() > 0).then_some(())
        })
        .await;
        assert!(!process.has_ended(), "{}", log.display());
    }
    // All of them keep retrying meanwhile.
    let lines = || cases.iter().map(|(_, log, ..)| std::fs::read_to_string(log).unwrap().lines().count()).max();
    stays("the retries are not logged", true, async || lines() <= Some(3)).await;
    for (_, log, ..) in &cases {
        let text = std::fs::read_to_string(log).unwrap();
        assert!(!text.contains(PASSWORD), "{text}");
        assert!(text.lines().count() <= 3, "{text}");
    }
}
