//! A NATS client that writes bytes as no library would, to test what a message can do to its receiver.

use std::time::Duration;

use async_nats::ServerAddr;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

/// A connection. The server ends it when it cannot parse the bytes.
pub struct Raw {
    writing: OwnedWriteHalf,
    reading: AbortOnDropHandle<()>,
}

impl Raw {
    /// # Panics
    /// If the server does not take the connection.
    pub async fn connect(url: &str) -> Self {
        let server: ServerAddr = url.parse().expect("a URL");
        let stream = TcpStream::connect((server.host(), server.port())).await.expect("NATS takes the connection");
        let (reading, mut writing) = stream.into_split();
        let (user, pass) = (server.username().expect("a user"), server.password().expect("a password"));
        let connect = format!(
            r#"CONNECT {{"user":"{user}","pass":"{pass}","verbose":false,"pedantic":false,"headers":true,"no_responders":true}}"#
        );
        writing.write_all(format!("{connect}\r\nPING\r\n").as_bytes()).await.expect("NATS takes it");
        let mut reading = BufReader::new(reading);
        let mut line = String::new();
        while line.trim_end() != "PONG" {
            line.clear();
            assert_ne!(reading.read_line(&mut line).await.expect("NATS answers"), 0, "{line}");
        }
        Self { writing, reading: AbortOnDropHandle::new(tokio::spawn(read_all(reading))) }
    }

    /// Publishes a message with these bytes as its header block.
    pub async fn publish(&mut self, subject: &str, reply: &[u8], headers: &[u8], payload: &[u8]) {
        let length = headers.len() + payload.len();
        let line =
            [format!("HPUB {subject} ").as_bytes(), reply, format!(" {} {length}\r\n", headers.len()).as_bytes()]
                .concat();
        // A lost connection shows in [`Raw::is_lost`].
        let _ = self.writing.write_all(&[&line, headers, payload, b"\r\n"].concat()).await;
    }

    /// Whether the server has ended the connection.
    pub fn is_lost(&self) -> bool {
        self.reading.is_finished()
    }

    /// Gives the server a moment to answer what was sent, or to end the connection.
    pub async fn settle(&mut self) {
        let _ = self.writing.write_all(b"PING\r\n").await;
        let _ = timeout(Duration::from_millis(20), &mut self.reading).await;
    }
}

async fn read_all(mut reading: BufReader<OwnedReadHalf>) {
    let mut line = Vec::new();
    while reading.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        line.clear();
    }
}
