//! The connection by which a service receives requests and sends replies. It is this project's own client, and used for
//! nothing else.
//!
//! Clients choose the headers and the reply subject of a request. The client library closes its connection, or
//! panics, on many that it cannot read; and it forgets a subscription before the server has processed that it ended,
//! so that messages in flight are lost. Neither can happen here. The invariants: a client's message is passed on
//! unchanged, and can never end the connection; after [`Listener::drain`] the server sends no more, and all messages
//! that it had sent have been passed on, also those of a subscription that was closed meanwhile; a reply is written
//! whole, and written again if the connection was lost while it was being written.

use std::{
    convert::Infallible,
    future::pending,
    io,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::ServerAddr;
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use wire::Credentials;

use crate::{
    Backoff, LogThrottle, Pulse,
    nats::{Servers, address},
    protocol::{Connect, Delivery, Info, Operation, ProtocolError, take_operation},
    tls,
};

/// A server that sends nothing for so long is pinged; if it does not answer for as long again, the connection is lost.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the server to process what was sent, when the service stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest number of bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// How the server's error begins if the user may not subscribe to a subject.
const MAY_NOT_SUBSCRIBE: &str = "Permissions Violation for Subscription";
/// Bytes of replies that may wait to be written; [`Publisher::publish`] waits while there are more.
const MAX_BUFFERED: usize = 16 << 20;

/// A subscription, and the handler of its messages.
pub struct Subscription {
    pub subject: String,
    pub queue_group: Option<&'static str>,
    /// Whether the subscription is wanted at present; it always is if `None`.
    pub open: Option<watch::Receiver<bool>>,
    /// Must not block, but pass the message on. It may still be called when the subscription has just been closed.
    pub handle: Handler,
}

pub type Handler = Box<dyn FnMut(Delivery) + Send>;

/// What a subscription subscribes to.
struct Topic {
    subject: String,
    queue_group: Option<&'static str>,
    open: Option<watch::Receiver<bool>>,
}

/// The connection, which is reopened whenever it is lost.
pub struct Listener {
    shared: Arc<Shared>,
    subscriptions: usize,
    task: AbortOnDropHandle<()>,
}

/// The sending side of the connection. It exists before its listener, so that the listener's handlers can hold it.
#[derive(Clone, Default)]
pub struct Publisher(Arc<Shared>);

#[derive(Default)]
struct Shared {
    send_buffer: Mutex<SendBuffer>,
    /// Notified when something is added to the send buffer.
    not_empty: Notify,
    /// Notified when there is room in the send buffer.
    not_full: Notify,
    status: watch::Sender<Status>,
}

/// Says that the listener has ended, even if a handler has panicked.
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

/// The data to be written. A panic cannot poison it: no code that holds its lock can leave it half changed.
#[derive(Default)]
struct SendBuffer {
    /// Messages, which are kept if the connection is lost.
    messages: BytesMut,
    /// Protocol operations, which are written after the messages, and belong to the present connection alone.
    control: BytesMut,
    /// The number of pings that were sent on this connection.
    pings: u64,
    /// The server was told to send no more on this connection.
    is_leaving: bool,
    /// The ping whose answer is the last thing to be read.
    last: Option<Ping>,
}

/// The connection's status, as far as the server has reported it.
#[derive(Clone, Copy, Default)]
struct Status {
    /// The number of this connection, 1 for the first.
    connection: u64,
    state: State,
    pongs: u64,
    max_payload: usize,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Down,
    /// The server has not confirmed the subscriptions yet.
    Subscribing,
    Up,
}

/// A `PING`, whose answer shows that the server has processed everything before it.
#[derive(Clone, Copy)]
struct Ping {
    connection: u64,
    number: u64,
}

impl Ping {
    /// Whether it has been answered, or never will be.
    fn is_settled(&self, status: &Status) -> bool {
        status.connection != self.connection || status.state == State::Down || status.pongs >= self.number
    }
}

/// Why the connection was lost, or could not be opened.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the server reported an error: {0}")]
    Refused(String),
    #[error("the server closed the connection")]
    Closed,
    #[error("the server does not respond")]
    TimedOut,
    #[error("the server is shutting down")]
    LameDuck,
}

type Reading = ReadHalf<Box<dyn Stream>>;
type Writing = WriteHalf<Box<dyn Stream>>;

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Starts to connect, and keeps trying. `name` is the connection's name in the server's monitoring. `ended` is
    /// cancelled when the listener has ended: because it was closed, or because a handler has panicked.
    pub fn start(
        servers: Servers,
        name: String,
        subscriptions: Vec<Subscription>,
        publisher: Publisher,
        pulse: Pulse,
        ended: CancellationToken,
    ) -> Self {
        let (shared, count) = (publisher.0, subscriptions.len());
        let listening = run(Arc::clone(&shared), servers, name, subscriptions, pulse);
        let guard = EndGuard { shared: Arc::clone(&shared), ended };
        let task = tokio::spawn(async move {
            let _guard = guard;
            listening.await;
        });
        Self { shared, subscriptions: count, task: AbortOnDropHandle::new(task) }
    }

    /// Tells whether the server has confirmed all subscriptions, also after `self` is gone.
    pub fn is_up(&self) -> impl Fn() -> bool + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.status.borrow().state == State::Up
    }

    /// Waits until the server has confirmed all subscriptions.
    pub async fn up(&self) {
        // The sender lives in `self`.
        let _ = self.shared.status.subscribe().wait_for(|status| status.state == State::Up).await;
    }

    /// Ends the subscriptions; returns when the server has confirmed that, and all messages that it sent before have
    /// been passed on. Gives up on a server that does not respond.
    pub async fn drain(&self) {
        let ping = {
            let mut send_buffer = self.shared.send_buffer();
            let ping = self.shared.unsubscribe(&mut send_buffer, self.subscriptions);
            send_buffer.last = Some(ping);
            ping
        };
        if !self.shared.wait_for_pong(ping).await {
            // Aborting the task drops the handlers, whose end others wait for.
            self.task.abort();
        }
    }

    /// Waits until the server has received all replies, and closes the connection.
    pub async fn close(self) {
        let ping = self.shared.ping(&mut self.shared.send_buffer());
        self.shared.wait_for_pong(ping).await;
    }
}

impl Publisher {
    /// The largest message that the server accepts, in bytes, headers included.
    pub fn max_payload(&self) -> usize {
        self.0.status.borrow().max_payload
    }

    /// Publishes a message; waits while the send buffer is full. `headers` is a complete header block, or empty.
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

    /// Publishes a message if the send buffer has room; returns whether it had.
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

    /// Tells the server to send no more. It answers the returned ping after everything that it has sent.
    fn unsubscribe(&self, send_buffer: &mut SendBuffer, subscriptions: usize) -> Ping {
        send_buffer.is_leaving = true;
        for number in 1..=subscriptions {
            send_buffer.control.extend_from_slice(format!("UNSUB {number}\r\n").as_bytes());
        }
        self.ping(send_buffer)
    }

    /// Opens or closes a subscription on this connection, as is wanted now. The server has sent what it sends before it
    /// reads that a subscription ends, and its handler stays, so that nothing is lost.
    fn follow(&self, number: usize, Topic { subject, queue_group, open }: &mut Topic) {
        let mut send_buffer = self.send_buffer();
        let is_open = open.as_mut().is_none_or(|open| *open.borrow_and_update());
        if send_buffer.is_leaving {
            return;
        }
        let operation = match is_open {
            true => subscribe(number, subject, *queue_group),
            false => format!("UNSUB {number}\r\n"),
        };
        send_buffer.control.extend_from_slice(operation.as_bytes());
        self.not_empty.notify_one();
    }

    /// Waits until the ping has been answered, or never will be; `false` if the server did not respond in time.
    async fn wait_for_pong(&self, ping: Ping) -> bool {
        timeout(FLUSH_TIMEOUT, self.status.subscribe().wait_for(|status| ping.is_settled(status))).await.is_ok()
    }

    /// Starts a connection; returns the bytes to write first.
    fn begin(&self, name: &str, credentials: Option<&Credentials>, topics: &mut [Topic], info: &Info) -> BytesMut {
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
        send_buffer.is_leaving = send_buffer.last.is_some();
        if !send_buffer.is_leaving {
            for (number, Topic { subject, queue_group, open }) in (1..).zip(topics) {
                if open.as_mut().is_none_or(|open| *open.borrow_and_update()) {
                    first.extend_from_slice(subscribe(number, subject, *queue_group).as_bytes());
                }
            }
        }
        first.extend_from_slice(b"PING\r\n");
        self.status.send_modify(|status| {
            let connection = status.connection + 1;
            *status = Status { connection, state: State::Subscribing, pongs: 0, max_payload: info.max_payload };
        });
        first
    }

    /// Waits until there is something to write; returns the messages and the protocol operations.
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

    /// Puts messages that may not have been written in front of all others.
    fn put_back(&self, messages: &[u8]) {
        let waiting = &mut self.send_buffer().messages;
        let later = waiting.split();
        waiting.extend_from_slice(messages);
        waiting.extend_from_slice(&later);
    }
}

/// The protocol operation that opens a subscription. One that is open already stays as it is.
fn subscribe(number: usize, subject: &str, queue_group: Option<&str>) -> String {
    let group = queue_group.map(|group| format!("{group} ")).unwrap_or_default();
    format!("SUB {subject} {group}{number}\r\n")
}

async fn run(shared: Arc<Shared>, mut servers: Servers, name: String, subscriptions: Vec<Subscription>, pulse: Pulse) {
    let (mut topics, mut handlers): (Vec<Topic>, Vec<Handler>) = subscriptions
        .into_iter()
        .map(|Subscription { subject, queue_group, open, handle }| (Topic { subject, queue_group, open }, handle))
        .unzip();
    let mut backoff = Backoff::default();
    let mut log_throttle = LogThrottle::default();
    loop {
        pulse.beat();
        let server = servers.next();
        let error = match timeout(CONNECT_TIMEOUT, connect(&server)).await {
            Ok(Ok((stream, info))) => {
                servers.learn(&info.connect_urls);
                let subscriptions = (&mut topics[..], &mut handlers);
                let error = serve(&shared, &name, &servers, stream, &info, subscriptions, &pulse).await;
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
            handlers.clear();
        }
        shared.status.send_modify(|status| status.state = State::Down);
        if log_throttle.is_due(&error.to_string()) {
            tracing::warn!(server = address(&server), reason = %error, "no connection to NATS for requests, retrying");
        }
        backoff.wait().await;
    }
}

/// Connects, and reads the server's `INFO`.
async fn connect(server: &ServerAddr) -> Result<(Box<dyn Stream>, Info), ConnectionError> {
    let mut stream = TcpStream::connect((server.host(), server.port())).await?;
    stream.set_nodelay(true)?;
    let mut read = BytesMut::new();
    let info = loop {
        match take_operation(&mut read)? {
            Some(Operation::Info(info)) => break info,
            Some(Operation::Error(reason)) => return Err(ConnectionError::Refused(reason)),
            Some(_) => return Err(ProtocolError::Unknown("something before its INFO".to_owned()).into()),
            // A server that requires TLS sends nothing else before the handshake.
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

/// Reads and writes until the connection is lost.
async fn serve(
    shared: &Shared,
    name: &str,
    servers: &Servers,
    stream: Box<dyn Stream>,
    info: &Info,
    (topics, handlers): (&mut [Topic], &mut Vec<Handler>),
    pulse: &Pulse,
) -> ConnectionError {
    let (reading, mut writing) = split(stream);
    let first = shared.begin(name, servers.credentials(), topics, info);
    if let Err(error) = writing.write_all(&first).await {
        return error.into();
    }
    let Err(error) = tokio::select! {
        ended = listen(shared, reading, handlers, servers.are_several(), pulse) => ended,
        ended = write(shared, writing) => ended,
        ended = follow(shared, topics) => match ended {},
    };
    error
}

/// Opens and closes the subscriptions as they are wanted.
async fn follow(shared: &Shared, topics: &mut [Topic]) -> Infallible {
    let following = (1..).zip(topics).map(|(number, topic)| async move {
        while let Some(open) = &mut topic.open {
            match open.changed().await {
                Ok(()) => shared.follow(number, topic),
                // Nobody is left who could want it otherwise.
                Err(_) => break,
            }
        }
    });
    join_all(following).await;
    pending().await
}

async fn listen(
    shared: &Shared,
    mut reading: Reading,
    handlers: &mut Vec<Handler>,
    has_alternatives: bool,
    pulse: &Pulse,
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
                    if let Some(handle) = handlers.get_mut(delivery.subscription.wrapping_sub(1)) {
                        handle(delivery);
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
                        // Others wait for the last request by waiting until the handlers have been dropped.
                        handlers.clear();
                    }
                    shared.status.send_replace(status);
                }
                // A service that may not subscribe cannot serve, and must not count as ready.
                Operation::Error(reason)
                    if shared.status.borrow().state == State::Subscribing || reason.starts_with(MAY_NOT_SUBSCRIBE) =>
                {
                    return Err(ConnectionError::Refused(reason));
                }
                // An error may concern a single message only. If it ends the connection, the server closes it.
                Operation::Error(reason) => {
                    // The subject, which may differ each time, follows a quotation mark.
                    if log_throttle.is_due(reason.split('"').next().unwrap_or_default()) {
                        tracing::error!(reason, "NATS reported an error on the connection for requests (NATS_URL)");
                    }
                    refused = Some(reason);
                }
                Operation::Info(info) if info.lame_duck_mode && has_alternatives && leaving.is_none() => {
                    leaving = Some(shared.unsubscribe(&mut shared.send_buffer(), handlers.len()));
                }
                Operation::Info(_) => {}
            }
        }
        if leaving.as_ref().is_some_and(|ping| ping.is_settled(&shared.status.borrow())) {
            return Err(ConnectionError::LameDuck);
        }
        pulse.beat();
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

/// Messages that are being written, and are put back if the connection is lost meanwhile.
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
