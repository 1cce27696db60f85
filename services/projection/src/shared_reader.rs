//! Reads the stream once for all views of this replica, as long as they are near each other. A view that is far behind,
//! or recovering from an error, has a dedicated reader and holds nobody up.
//!
//! The invariants are those of a reader: each view gets the events in the order of their positions, none twice and none
//! left out; and it goes on only behind the event at which it stands. A view that stands on another event than the
//! window has at that position gets a dedicated reader, which compares with the stream, and says what is wrong.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use runtime::Nats;
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    event::{Size, StreamMessage},
    history::{self, Standing, StreamHistory},
    reader::{ReadError, Reader},
};

/// How much is read from the stream at once.
const CHUNK: Size = Size { events: 500, bytes: 1 << 20 };
/// Bytes of events in the window at which reading waits for the slowest view.
const WINDOW_BYTES: usize = 4 << 20;
/// Bytes of events that stay in the window for a view that joins, although all views have had them.
const RETAINED_BYTES: usize = 128 << 10;
/// How many events a view that joins may be away from the others.
const JOIN_DISTANCE: u64 = 20_000;
/// How long the slowest view may hold up the others before it goes on with a dedicated reader. In a busy shop, a view
/// with a batch window may write for longer than this, and orders must not wait for it.
const MAX_STALL: Duration = Duration::from_millis(300);
/// The same while the views are catching up: nobody waits for the next event then, and reading once for all costs less.
const MAX_STALL_CATCHING_UP: Duration = Duration::from_secs(3);

/// One reader for all views of a replica.
pub struct SharedReader {
    nats: Nats,
    stream: String,
    state: Mutex<State>,
    appended: Notify,
    consumed: Notify,
}

#[derive(Default)]
struct State {
    window: Window,
    /// How many windows were begun at the position of a view that joined, each with another reader.
    windows: u64,
    /// The position of each subscription that shares the reader.
    positions: HashMap<u64, u64>,
    last_subscription: u64,
    /// Stops the task that reads.
    stop: Option<DropGuard>,
    /// Why the last reader ended, and the last subscription that it concerns: each of them fails with this error, as it
    /// would with a dedicated reader.
    failed: Option<(u64, ReadError)>,
}

/// A run of consecutive events.
#[derive(Default)]
struct Window {
    /// Where the window began; its position is that before the first event.
    start: Standing,
    /// The event before the first one, if it was in the window.
    evicted: Option<Arc<StreamMessage>>,
    events: VecDeque<Arc<StreamMessage>>,
    bytes: usize,
}

/// The events of one view, through the shared reader or a dedicated one.
pub struct Subscription {
    shared: Arc<SharedReader>,
    view: &'static str,
    /// The last event that was returned.
    standing: Standing,
    /// Identifies the subscription while it shares the reader.
    id: Option<u64>,
    /// The number of the window that is known to follow `standing`.
    compared: Option<u64>,
    dedicated: Option<Reader>,
    may_join: bool,
}

enum Found {
    Events(Vec<Arc<StreamMessage>>),
    /// The next event has not been read yet.
    NotYet,
    /// The window has moved beyond the next event: the view has fallen behind.
    Evicted,
}

impl SharedReader {
    pub fn new(nats: &Nats, stream: &str) -> Self {
        Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            state: Mutex::default(),
            appended: Notify::new(),
            consumed: Notify::new(),
        }
    }

    /// Subscribes a view to the events after those that it has read. Unless it `may_join` the others, it gets a
    /// dedicated reader.
    ///
    /// # Errors
    /// If the stream does not exist (yet) or is another one than was read before, or if NATS does not answer.
    pub async fn subscribe(
        self: &Arc<Self>,
        view: &'static str,
        after: Standing,
        may_join: bool,
    ) -> Result<Subscription, ReadError> {
        let shared = Arc::clone(self);
        let mut subscription =
            Subscription { shared, view, standing: after, id: None, compared: None, dedicated: None, may_join };
        if !subscription.join(true) {
            subscription.dedicated = Some(Reader::open(&self.nats, &self.stream, view, &after).await?);
        }
        Ok(subscription)
    }

    /// Compares what a view has read with the stream.
    ///
    /// # Errors
    /// As [`history::compare`].
    pub async fn compare(&self, standing: &Standing) -> Result<StreamHistory, ReadError> {
        history::compare(&self.nats, &self.stream, standing).await
    }

    /// Reads the events after those before into the window, until it is stopped.
    async fn fill(self: Arc<Self>, after: Standing, stop: CancellationToken) {
        let opened = stop.run_until_cancelled(Reader::open(&self.nats, &self.stream, "views", &after)).await;
        let mut reader = match opened {
            None => return,
            Some(Ok(reader)) => reader,
            Some(Err(error)) => return self.fail(&stop, error),
        };
        let mut max_stall = MAX_STALL_CATCHING_UP;
        loop {
            let stalled = stop.run_until_cancelled(timeout(max_stall, self.has_room())).await;
            if stalled.is_some_and(|waited| waited.is_err()) {
                self.state().window.shrink(WINDOW_BYTES / 2);
            }
            match stop.run_until_cancelled(reader.next(CHUNK)).await {
                None => return reader.close().await,
                Some(Ok(messages)) => {
                    let is_catching_up = messages.last().is_some_and(StreamMessage::is_catching_up);
                    max_stall = if is_catching_up { MAX_STALL_CATCHING_UP } else { MAX_STALL };
                    self.state().window.append(messages);
                }
                Some(Err(error)) => return self.fail(&stop, error),
            }
            self.appended.notify_waiters();
        }
    }

    /// Waits until the slowest view has taken enough events for the window to have room.
    async fn has_room(&self) {
        loop {
            let mut consumed = pin!(self.consumed.notified());
            consumed.as_mut().enable();
            if self.state().window.bytes < WINDOW_BYTES {
                return;
            }
            consumed.await;
        }
    }

    fn fail(&self, stop: &CancellationToken, error: ReadError) {
        // Once this task is stopped, the window belongs to another one.
        let mut state = self.state();
        if !stop.is_cancelled() {
            state.fail(error);
        }
        drop(state);
        self.appended.notify_waiters();
    }

    /// A poisoned lock is used all the same: no code that holds it can panic halfway through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscription {
    /// Waits for an event, and returns it with those that are there behind it and fit into the room. The last one may
    /// exceed the bytes. The call can be cancelled without losing an event.
    ///
    /// # Errors
    /// If the order cannot be kept, or the reader is gone. The subscription cannot be used any more then.
    pub async fn next(&mut self, room: Size) -> Result<Vec<Arc<StreamMessage>>, ReadError> {
        loop {
            if self.id.is_none() {
                return self.next_dedicated(room).await;
            }
            let shared = Arc::clone(&self.shared);
            let mut appended = pin!(shared.appended.notified());
            appended.as_mut().enable();
            match self.next_shared(room)? {
                Found::Events(events) => return Ok(events),
                Found::Evicted => {
                    self.leave();
                    continue;
                }
                Found::NotYet => {}
            }
            appended.await;
        }
    }

    /// From now on the view may share the reader.
    pub fn allow_joining(&mut self) {
        self.may_join = true;
    }

    /// Deletes the consumer of a dedicated reader.
    pub async fn close(mut self) {
        self.leave();
        if let Some(dedicated) = self.dedicated.take() {
            dedicated.close().await;
        }
    }

    async fn next_dedicated(&mut self, room: Size) -> Result<Vec<Arc<StreamMessage>>, ReadError> {
        let SharedReader { nats, stream, .. } = &*self.shared;
        if self.dedicated.is_none() {
            self.dedicated = Some(Reader::open(nats, stream, self.view, &self.standing).await?);
        }
        let Some(dedicated) = &mut self.dedicated else { return Ok(vec![]) };
        let messages = dedicated.next(room).await?;
        self.standing = *dedicated.standing();
        if self.join(false)
            && let Some(dedicated) = self.dedicated.take()
        {
            tokio::spawn(dedicated.close());
        }
        Ok(messages.into_iter().map(Arc::new).collect())
    }

    fn next_shared(&mut self, room: Size) -> Result<Found, ReadError> {
        let mut state = self.shared.state();
        let Some(id) = self.id else { return Ok(Found::Evicted) };
        if let Some((last, error)) = &state.failed
            && id <= *last
        {
            return Err(error.clone());
        }
        if self.compared != Some(state.windows) {
            match state.window.follows(&self.standing) {
                Some(true) => self.compared = Some(state.windows),
                None if self.standing.position > state.window.end() => return Ok(Found::NotYet),
                Some(false) | None => return Ok(Found::Evicted),
            }
        }
        let found = state.window.after(self.standing.position, room);
        if let Found::Events(events) = &found
            && let Some(last) = events.last()
        {
            self.standing = last.standing();
            state.positions.insert(id, self.standing.position);
            state.evict();
            drop(state);
            self.shared.consumed.notify_waiters();
        }
        Ok(found)
    }

    /// Joins the others if they are near. For a `new` view that is not far behind them, the window begins again at its
    /// position, so that the others wait for it.
    fn join(&mut self, new: bool) -> bool {
        if !self.may_join {
            return false;
        }
        let mut state = self.shared.state();
        let (start, end, position) = (state.window.start.position, state.window.end(), self.standing.position);
        let follows = state.window.follows(&self.standing);
        let is_near = position >= start && position <= end + if new { JOIN_DISTANCE } else { 0 };
        let is_in_reach = is_near && follows != Some(false);
        if !is_in_reach {
            let is_waited_for = new && position < start && start - position <= JOIN_DISTANCE;
            if !is_waited_for && !state.positions.is_empty() {
                return false;
            }
            state.window = Window { start: self.standing, ..Window::default() };
            state.windows += 1;
        }
        self.compared = (!is_in_reach || follows == Some(true)).then_some(state.windows);
        if !is_in_reach || state.stop.is_none() {
            let stop = CancellationToken::new();
            tokio::spawn(Arc::clone(&self.shared).fill(state.window.last(), stop.clone()));
            state.stop = Some(stop.drop_guard());
        }
        state.last_subscription += 1;
        let id = state.last_subscription;
        state.positions.insert(id, position);
        drop(state);
        if !is_in_reach {
            // Some views may now be behind the window, or ahead of it.
            self.shared.appended.notify_waiters();
        }
        self.id = Some(id);
        true
    }

    fn leave(&mut self) {
        if let Some(id) = self.id.take() {
            let mut state = self.shared.state();
            state.positions.remove(&id);
            if state.positions.is_empty() {
                state.stop = None;
                state.window = Window { start: state.window.last(), ..Window::default() };
            }
            drop(state);
            // This may have been the slowest view.
            self.shared.consumed.notify_waiters();
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.leave();
    }
}

impl State {
    /// Evicts the events that all views have had.
    fn evict(&mut self) {
        let slowest = self.positions.values().copied().min().unwrap_or(u64::MAX);
        while self.window.bytes > RETAINED_BYTES && self.window.start.position < slowest && self.window.evict_first() {}
    }

    fn fail(&mut self, error: ReadError) {
        self.failed = Some((self.last_subscription, error));
        self.positions.clear();
        self.stop = None;
        self.window = Window { start: self.window.last(), ..Window::default() };
    }
}

impl Window {
    /// The position of the last event.
    fn end(&self) -> u64 {
        self.start.position + self.events.len() as u64
    }

    /// The last event.
    fn last(&self) -> Standing {
        self.events.back().map_or_else(|| self.before(), |last| last.standing())
    }

    /// The event before the first one.
    fn before(&self) -> Standing {
        self.evicted.as_ref().map_or(self.start, |evicted| evicted.standing())
    }

    /// Whether the event at which somebody stands is the one that the window has there; `None` if it does not have that
    /// position yet, or any more.
    fn follows(&self, standing: &Standing) -> Option<bool> {
        let offset = usize::try_from(standing.position.checked_sub(self.start.position)?).ok()?;
        let found = if offset == 0 { self.before() } else { self.events.get(offset - 1)?.standing() };
        let is_known = found.mark.is_some() && standing.mark.is_some();
        Some(found.mark == standing.mark || !is_known)
    }

    /// Appends the messages that follow the window's end, and drops those that were read for an earlier window.
    fn append(&mut self, messages: Vec<StreamMessage>) {
        for message in messages {
            if message.position == self.end() + 1 {
                self.bytes += message.bytes();
                self.events.push_back(Arc::new(message));
            }
        }
    }

    fn after(&self, position: u64, room: Size) -> Found {
        let Some(first) = position.checked_sub(self.start.position) else { return Found::Evicted };
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let fits = |message: &&Arc<StreamMessage>| {
            let fits = bytes < room.bytes;
            bytes += message.bytes();
            fits
        };
        let events: Vec<_> = self.events.iter().skip(first).take(room.events).take_while(fits).cloned().collect();
        if events.is_empty() { Found::NotYet } else { Found::Events(events) }
    }

    fn shrink(&mut self, bytes: usize) {
        while self.bytes > bytes && self.evict_first() {}
    }

    fn evict_first(&mut self) -> bool {
        let Some(first) = self.events.pop_front() else { return false };
        self.start.position += 1;
        self.bytes -= first.bytes();
        self.evicted = Some(first);
        true
    }
}

#[cfg(test)]
mod tests {
    use async_nats::{HeaderMap, Message};

    use super::*;

    const ROOM: Size = Size { events: 100, bytes: 1_000 };

    fn message(position: u64) -> StreamMessage {
        message_of(position, 1)
    }

    /// The message at a position of one history or another.
    fn message_of(position: u64, history: u64) -> StreamMessage {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (wire::JOURNAL, uuid::Uuid::nil().to_string()),
            (wire::AGGREGATE_ID, uuid::Uuid::from_u128(history.into()).to_string()),
            (wire::AGGREGATE_VERSION, position.to_string()),
            (wire::RECORDED_AT, "2026-01-31T09:30:00.000Z".to_owned()),
        ] {
            headers.insert(name, value);
        }
        let raw = Message {
            subject: "evt.user.updated".into(),
            reply: None,
            payload: "".into(),
            headers: Some(headers),
            status: None,
            description: None,
            length: 100,
        };
        StreamMessage::new(position, uuid::Uuid::nil(), 0, raw)
    }

    fn window(start: u64, positions: std::ops::RangeInclusive<u64>) -> Window {
        let start = Standing { position: start, ..Standing::default() };
        let mut window = Window { start, ..Window::default() };
        window.append(positions.map(message).collect());
        window
    }

    fn positions(found: Found) -> Vec<u64> {
        match found {
            Found::Events(events) => events.iter().map(|event| event.position).collect(),
            Found::NotYet | Found::Evicted => vec![],
        }
    }

    #[test]
    fn a_view_gets_the_events_after_its_position() {
        let window = window(10, 11..=15);
        assert_eq!(positions(window.after(10, ROOM)), [11, 12, 13, 14, 15]);
        assert_eq!(positions(window.after(13, ROOM)), [14, 15]);
        assert!(matches!(window.after(15, ROOM), Found::NotYet));
        assert!(matches!(window.after(17, ROOM), Found::NotYet), "the view is ahead of the others");
        assert!(matches!(window.after(9, ROOM), Found::Evicted));
        assert_eq!(positions(window.after(10, Size { events: 2, ..ROOM })), [11, 12]);
        assert_eq!(
            positions(window.after(10, Size { bytes: 150, ..ROOM })),
            [11, 12],
            "the last one may exceed the bytes"
        );
    }

    #[test]
    fn messages_that_do_not_follow_the_window_are_dropped() {
        let mut window = window(10, 11..=12);
        window.append(vec![message(12), message(14), message(13)]);
        assert_eq!(positions(window.after(10, ROOM)), [11, 12, 13]);
    }

    #[test]
    fn events_that_all_views_have_had_are_evicted_but_for_the_latest() {
        let mut state = State { window: window(0, 1..=10_000), ..State::default() };
        state.positions = HashMap::from([(1, 9_999), (2, 4_000)]);
        state.evict();
        assert_eq!(state.window.before(), message(4_000).standing());
        assert_eq!(state.window.bytes, 600_000);
        state.positions.insert(2, 10_000);
        state.evict();
        assert!(state.window.bytes <= RETAINED_BYTES && state.window.bytes > RETAINED_BYTES - 200);
        assert_eq!(state.window.end(), 10_000);
    }

    #[test]
    fn a_window_follows_only_the_event_that_it_has_at_the_position() {
        let mut window = window(10, 11..=15);
        for position in 11..=15 {
            assert_eq!(window.follows(&message(position).standing()), Some(true));
            assert_eq!(window.follows(&message_of(position, 2).standing()), Some(false), "{position}");
        }
        let unknown = |position| Standing { position, ..Standing::default() };
        assert_eq!(window.follows(&unknown(12)), Some(true), "a checkpoint of before cannot be compared");
        assert_eq!(window.follows(&message(16).standing()), None);
        assert_eq!(window.follows(&message(9).standing()), None);
        assert!(window.evict_first() && window.evict_first());
        assert_eq!(window.follows(&message(11).standing()), None);
        assert_eq!(window.follows(&message(12).standing()), Some(true));
        assert_eq!(window.follows(&message_of(12, 2).standing()), Some(false));
        while window.evict_first() {}
        assert_eq!(window.last(), message(15).standing());
    }
}
