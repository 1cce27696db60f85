//! A TCP proxy between a service and a server, which can delay or swallow the traffic, or cut the connections.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::ServerAddr;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

/// Forwards everything until it is told otherwise. The proxy ends when this is dropped.
pub struct Proxy {
    pub url: String,
    state: Arc<State>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct State {
    delay_millis: AtomicU64,
    swallows: AtomicBool,
    refuses: AtomicBool,
    cut: Notify,
}

impl Proxy {
    /// Starts a proxy in front of the server of a NATS URL. The proxy's URL has the same user and password.
    ///
    /// # Panics
    /// If it cannot listen.
    pub async fn start(url: &str) -> Self {
        let server: ServerAddr = url.parse().expect("a URL");
        let target = format!("{}:{}", server.host(), server.port());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let state = Arc::new(State::default());
        let url = url.replace(&target, &address);
        let task = tokio::spawn(accept(listener, target, Arc::clone(&state)));
        Self { url, state, _task: AbortOnDropHandle::new(task) }
    }

    /// From now on, delays the bytes in each direction.
    pub fn delay(&self, delay: Duration) {
        self.state.delay_millis.store(u64::try_from(delay.as_millis()).expect("a short time"), Relaxed);
    }

    /// From now on, discards all bytes, but keeps the connections open.
    pub fn swallow(&self) {
        self.state.swallows.store(true, Relaxed);
    }

    /// From now on, closes every new connection at once.
    pub fn refuse(&self) {
        self.state.refuses.store(true, Relaxed);
    }

    /// Cuts all connections, in the middle of whatever they carry.
    pub fn cut(&self) {
        self.state.cut.notify_waiters();
    }
}

async fn accept(listener: TcpListener, target: String, state: Arc<State>) {
    while let Ok((client, _)) = listener.accept().await {
        if state.refuses.load(Relaxed) {
            continue;
        }
        let Ok(server) = TcpStream::connect(&target).await else { continue };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            tokio::select! {
                () = state.cut.notified() => {}
                ((), ()) = async { tokio::join!(forward(from_client, to_server, &state), forward(from_server, to_client, &state)) } => {}
            }
        });
    }
}

/// Forwards the bytes, each chunk after the delay. The delay does not limit the throughput.
async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, state: &State) {
    let (chunks, mut waiting) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let reading = async move {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut chunk).await {
            let due = Instant::now() + Duration::from_millis(state.delay_millis.load(Relaxed));
            if !state.swallows.load(Relaxed) && chunks.send((due, chunk[..read].to_vec())).is_err() {
                return;
            }
        }
    };
    let writing = async {
        while let Some((due, chunk)) = waiting.recv().await {
            sleep_until(due).await;
            if to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
