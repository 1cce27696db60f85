//! The connection by which requests arrive and replies leave: this project's own, and used for nothing else.
//!
//! Clients choose the headers and the reply subject of a request. The client library ends its connection, or panics, at
//! many that it cannot read, and forgets a subscription before the server has heard that it ended, so that what was on its
//! way is lost. Here neither can be. The invariants: what a client sent is handed on as it came, and ends nothing; after
//! [`Listener::stop_taking`] the server sends no more, and all that it had sent has been handed on; a reply is written
//! whole, and again where the connection was lost while it was being written.

use std::{
    convert::Infallible,
    io,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::ServerAddr;
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    Backoff, LogThrottle,
    nats::{Credentials, Servers, address},
    protocol::{Connect, Delivery, Info, Operation, ProtocolError, take_operation},
    tls,
};

/// A server that is silent for so long is asked whether it is there, and is gone if it does not say so as long again.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may take to say that it has taken what was sent, when the service stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Bytes of replies that may wait to be written. Whoever has more to say waits.
const MAX_BUFFERED: usize = 16 << 20;

/// What is listened to.
pub struct Subscription {
    pub subject: String,
    pub queue_group: Option<&'static str>,
    /// Must not block: it hands the message on.
    pub handle: Box<dyn FnMut(Delivery) + Send>,
}

/// The connection, which is made anew whenever it is lost.
pub struct Listener {
    shared: Arc<Shared>,
    subscriptions: usize,
    task: AbortOnDropHandle<()>,
}

/// Where replies go. It is there before its connection, for those who are listened for to hold.
#[derive(Clone, Default)]
pub struct Publisher(Arc<Shared>);

#[derive(Default)]
struct Shared {
    send_buffer: Mutex<SendBuffer>,
    /// There is something in the outbox.
    not_empty: Notify,
    /// There is room in the outbox.
    not_full: Notify,
    status: watch::Sender<Status>,
}

/// Says that nobody listens any more, also if a handler has panicked.
struct EndGuard {
    shared: Arc<Shared>,
    ended: CancellationToken,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.shared.status.send_modify(|status| status.state = State::Down);
        self.ended.cancel();
    }
}

/// What is to be written. Nothing that holds its lock can leave it half changed.
#[derive(Default)]
struct SendBuffer {
    /// Messages, which stay when the connection is lost.
    messages: BytesMut,
    /// What is written behind them, and is of this connection alone.
    control: BytesMut,
    /// Sent on this connection.
    pings: u64,
    /// Its answer is the last thing that is listened for.
    last: Option<Ping>,
}

/// What the server has said.
#[derive(Clone, Copy, Default)]
struct Status {
    /// Which connection this is, 1 for the first.
    connection: u64,
    state: State,
    pongs: u64,
    max_payload: usize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Down,
    /// The server has not yet said that it has taken the subscriptions.
    Subscribing,
    Up,
}

/// A `PING`, by whose answer it is known that the server has taken all before it.
#[derive(Clone, Copy)]
struct Ping {
    connection: u64,
    number: u64,
}

impl Ping {
    fn is_settled(&self, status: &Status) -> bool {
        status.connection != self.connection || status.state == State::Down || status.pongs >= self.number
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the server refused: {0}")]
    Refused(String),
    #[error("the server ended the connection")]
    Closed,
    #[error("the server does not answer")]
    TimedOut,
    #[error("the server is about to stop")]
    LameDuck,
}

type Reading = ReadHalf<Box<dyn Stream>>;
type Writing = WriteHalf<Box<dyn Stream>>;

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Starts to connect, and goes on trying. `name` is what the server shows of the connection. Nobody listens any more when
    /// `ended` is cancelled: it was closed, or a handler has panicked.
    pub fn start(
        servers: Servers,
        name: String,
        subscriptions: Vec<Subscription>,
        publisher: Publisher,
        ended: CancellationToken,
    ) -> Self {
        let (shared, count) = (publisher.0, subscriptions.len());
        let listening = run(Arc::clone(&shared), servers, name, subscriptions);
        let guard = EndGuard { shared: Arc::clone(&shared), ended };
        let task = tokio::spawn(async move {
            let _guard = guard;
            listening.await;
        });
        Self { shared, subscriptions: count, task: AbortOnDropHandle::new(task) }
    }

    /// Waits until the server has taken all subscriptions.
    pub async fn up(&self) {
        // The sender lives in `self`.
        let _ = self.shared.status.subscribe().wait_for(|status| status.state == State::Up).await;
    }

    /// Ends the subscriptions; returns when the server has said that it sends no more, and everything that came before was
    /// handed on. A server that does not answer is not waited for.
    pub async fn drain(&self) {
        let ping = {
            let mut send_buffer = self.shared.send_buffer();
            let ping = self.shared.unsubscribe(&mut send_buffer, self.subscriptions);
            send_buffer.last = Some(ping);
            ping
        };
        if !self.shared.wait_for_pong(ping).await {
            // The handlers, for whose end others wait, end with it.
            self.task.abort();
        }
    }

    /// Waits until the server has taken all replies, and closes the connection.
    pub async fn close(self) {
        let ping = self.shared.ping(&mut self.shared.send_buffer());
        self.shared.wait_for_pong(ping).await;
    }
}

impl Publisher {
    /// Bytes of a message at most, headers included.
    pub fn max_payload(&self) -> usize {
        self.0.status.borrow().max_payload
    }

    /// Publishes a message; waits while too much waits to be written. The headers are a whole block, or nothing.
    pub async fn publish(&self, subject: &str, headers: &[u8], payload: &[u8]) {
        loop {
            let mut not_full = pin!(self.0.not_full.notified());
            not_full.as_mut().enable();
            if self.try_publish(subject, headers, payload) {
                return;
            }
            not_full.await;
        }
    }

    /// Publishes a message if there is room for it.
    pub fn try_publish(&self, subject: &str, headers: &[u8], payload: &[u8]) -> bool {
        {
            let messages = &mut self.0.send_buffer().messages;
            if messages.len() >= MAX_BUFFERED {
                return false;
            }
            append_message(messages, subject, headers, payload);
        }
        self.0.not_empty.notify_one();
        true
    }
}

fn append_message(messages: &mut BytesMut, subject: &str, headers: &[u8], payload: &[u8]) {
    let length = headers.len() + payload.len();
    messages.reserve(length + subject.len() + 40);
    let line = if headers.is_empty() {
        format!("PUB {subject} {length}\r\n")
    } else {
        format!("HPUB {subject} {} {length}\r\n", headers.len())
    };
    for part in [line.as_bytes(), headers, payload, b"\r\n"] {
        messages.extend_from_slice(part);
    }
}

impl Shared {
    fn send_buffer(&self) -> MutexGuard<'_, SendBuffer> {
        self.send_buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ping(&self, send_buffer: &mut SendBuffer) -> Ping {
        send_buffer.control.extend_from_slice(b"PING\r\n");
        send_buffer.pings += 1;
        self.not_empty.notify_one();
        Ping { connection: self.status.borrow().connection, number: send_buffer.pings }
    }

    /// Asks the server to send no more; its answer comes behind all that it has sent.
    fn unsubscribe(&self, send_buffer: &mut SendBuffer, subscriptions: usize) -> Ping {
        for number in 1..=subscriptions {
            send_buffer.control.extend_from_slice(format!("UNSUB {number}\r\n").as_bytes());
        }
        self.ping(send_buffer)
    }

    /// Waits until the `PING` was answered, or will not be; `false` if that cannot be told in time.
    async fn wait_for_pong(&self, ping: Ping) -> bool {
        timeout(FLUSH_TIMEOUT, self.status.subscribe().wait_for(|status| ping.is_settled(status))).await.is_ok()
    }

    /// Begins a connection: what is written first.
    fn begin(
        &self,
        name: &str,
        credentials: Option<&Credentials>,
        subscriptions: &[Subscription],
        info: &Info,
    ) -> BytesMut {
        let connect = Connect {
            name,
            user: credentials.map(|it| it.user.as_str()),
            pass: credentials.map(|it| it.password.as_str()),
            lang: "rust",
            version: env!("CARGO_PKG_VERSION"),
            protocol: 1,
            verbose: false,
            pedantic: false,
            headers: true,
            no_responders: true,
        };
        let connect = serde_json::to_string(&connect).unwrap_or_default();
        let mut first = BytesMut::from(format!("CONNECT {connect}\r\n").as_bytes());
        let mut send_buffer = self.send_buffer();
        send_buffer.control.clear();
        send_buffer.pings = 1;
        if send_buffer.last.is_none() {
            for (number, Subscription { subject, queue_group, .. }) in (1..).zip(subscriptions) {
                let group = queue_group.map(|group| format!("{group} ")).unwrap_or_default();
                first.extend_from_slice(format!("SUB {subject} {group}{number}\r\n").as_bytes());
            }
        }
        first.extend_from_slice(b"PING\r\n");
        self.status.send_modify(|status| {
            let connection = status.connection + 1;
            *status = Status { connection, state: State::Subscribing, pongs: 0, max_payload: info.max_payload };
        });
        first
    }

    /// Waits for something to write.
    async fn next_to_write(&self) -> (Bytes, Bytes) {
        loop {
            {
                let mut send_buffer = self.send_buffer();
                if !send_buffer.messages.is_empty() || !send_buffer.control.is_empty() {
                    return (send_buffer.messages.split().freeze(), send_buffer.control.split().freeze());
                }
            }
            self.not_empty.notified().await;
        }
    }

    /// Messages that may not have been written go before all others.
    fn put_back(&self, messages: &[u8]) {
        let waiting = &mut self.send_buffer().messages;
        let later = waiting.split();
        waiting.extend_from_slice(messages);
        waiting.extend_from_slice(&later);
    }
}

async fn run(shared: Arc<Shared>, mut servers: Servers, name: String, mut subscriptions: Vec<Subscription>) {
    let mut backoff = Backoff::default();
    let mut log_throttle = LogThrottle::default();
    loop {
        let server = servers.next();
        let error = match timeout(CONNECT_TIMEOUT, connect(&server)).await {
            Ok(Ok((stream, info))) => {
                servers.learn(&info.connect_urls);
                let error = serve(&shared, &name, &servers, stream, &info, &mut subscriptions).await;
                if shared.status.borrow().state == State::Up {
                    backoff.reset();
                    log_throttle.reset();
                }
                error
            }
            Ok(Err(error)) => error,
            Err(_) => ConnectionError::TimedOut,
        };
        if shared.send_buffer().last.is_some() {
            subscriptions.clear();
        }
        shared.status.send_modify(|status| status.state = State::Down);
        if log_throttle.is_due(&error.to_string()) {
            tracing::warn!(server = address(&server), reason = %error, "no connection for requests, trying again");
        }
        backoff.wait().await;
    }
}

/// Connects, and hears the server's first word.
async fn connect(server: &ServerAddr) -> Result<(Box<dyn Stream>, Info), ConnectionError> {
    let mut stream = TcpStream::connect((server.host(), server.port())).await?;
    stream.set_nodelay(true)?;
    let mut read = BytesMut::new();
    let info = loop {
        match take_operation(&mut read)? {
            Some(Operation::Info(info)) => break info,
            Some(Operation::Error(reason)) => return Err(ConnectionError::Refused(reason)),
            Some(_) => return Err(ProtocolError::Unknown("no INFO first".to_owned()).into()),
            // A server that wants TLS says nothing more before it.
            None if stream.read_buf(&mut read).await? == 0 => return Err(ConnectionError::Closed),
            None => {}
        }
    };
    if info.tls_required || server.tls_required() {
        let stream = tls::connect(server.host(), stream).await?;
        return Ok((Box::new(stream), info));
    }
    Ok((Box::new(stream), info))
}

/// Listens and writes until the connection is lost.
async fn serve(
    shared: &Shared,
    name: &str,
    servers: &Servers,
    stream: Box<dyn Stream>,
    info: &Info,
    subscriptions: &mut Vec<Subscription>,
) -> ConnectionError {
    let (reading, mut writing) = split(stream);
    let first = shared.begin(name, servers.credentials(), subscriptions, info);
    if let Err(error) = writing.write_all(&first).await {
        return error.into();
    }
    let Err(error) = tokio::select! {
        ended = listen(shared, reading, subscriptions, servers.are_several()) => ended,
        ended = write(shared, writing) => ended,
    };
    error
}

async fn listen(
    shared: &Shared,
    mut reading: Reading,
    subscriptions: &mut Vec<Subscription>,
    has_alternatives: bool,
) -> Result<Infallible, ConnectionError> {
    let mut read = BytesMut::with_capacity(READ_BYTES);
    let mut ping_sent = false;
    let mut refused = None;
    let mut log_throttle = LogThrottle::default();
    let mut leaving: Option<Ping> = None;
    loop {
        while let Some(operation) = take_operation(&mut read)? {
            match operation {
                Operation::Message(delivery) => {
                    if let Some(subscription) = subscriptions.get_mut(delivery.subscription.wrapping_sub(1)) {
                        (subscription.handle)(delivery);
                    }
                }
                Operation::Ping => {
                    shared.send_buffer().control.extend_from_slice(b"PONG\r\n");
                    shared.not_empty.notify_one();
                }
                Operation::Pong => {
                    let mut status = *shared.status.borrow();
                    (status.pongs, status.state) = (status.pongs + 1, State::Up);
                    if shared.send_buffer().last.is_some_and(|last| last.is_settled(&status)) {
                        // Whoever waits for the last request waits for its handler to be gone.
                        subscriptions.clear();
                    }
                    shared.status.send_replace(status);
                }
                // Who may not listen is of no use, and must not count as ready.
                Operation::Error(reason) if shared.status.borrow().state == State::Subscribing => {
                    return Err(ConnectionError::Refused(reason));
                }
                // Where it ends the connection, the server ends it. It may speak of one message only.
                Operation::Error(reason) => {
                    // Behind a quotation mark stands what it was refused for.
                    if log_throttle.is_due(reason.split('"').next().unwrap_or_default()) {
                        tracing::error!(reason, "NATS refused something of the connection for requests (NATS_URL)");
                    }
                    refused = Some(reason);
                }
                Operation::Info(info) if info.lame_duck_mode && has_alternatives && leaving.is_none() => {
                    leaving = Some(shared.unsubscribe(&mut shared.send_buffer(), subscriptions.len()));
                }
                Operation::Info(_) => {}
            }
        }
        if leaving.as_ref().is_some_and(|ping| ping.is_settled(&shared.status.borrow())) {
            return Err(ConnectionError::LameDuck);
        }
        read.reserve(READ_BYTES);
        match timeout(PING_INTERVAL, reading.read_buf(&mut read)).await {
            Ok(Ok(0)) => return Err(refused.map_or(ConnectionError::Closed, ConnectionError::Refused)),
            Ok(Ok(_)) => (ping_sent, refused) = (false, None),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) if ping_sent => return Err(ConnectionError::TimedOut),
            Err(_) => {
                shared.ping(&mut shared.send_buffer());
                ping_sent = true;
            }
        }
    }
}

async fn write(shared: &Shared, mut writing: Writing) -> Result<Infallible, ConnectionError> {
    loop {
        let (messages, control) = shared.next_to_write().await;
        shared.not_full.notify_waiters();
        let mut unwritten = Unwritten { shared, messages };
        writing.write_all(&unwritten.messages).await?;
        unwritten.messages.clear();
        writing.write_all(&control).await?;
        writing.flush().await?;
    }
}

/// Messages that are being written: put back if the connection is lost meanwhile.
struct Unwritten<'a> {
    shared: &'a Shared,
    messages: Bytes,
}

impl Drop for Unwritten<'_> {
    fn drop(&mut self) {
        if !self.messages.is_empty() {
            self.shared.put_back(&self.messages);
        }
    }
}
