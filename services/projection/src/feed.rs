//! The stream as the views of this replica read it: once for all of them, as long as they are near each other. A view
//! that is far behind, or in trouble, has a reader of its own and holds nobody up.
//!
//! The invariant is a reader's: each view gets the events in the order of their positions, none twice and none left out.

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
    projector::Size,
    reader::{Arrival, Reader, Unreadable},
};

/// Events that are read at once.
const CHUNK: Size = Size { events: 500, bytes: 1 << 20 };
/// Bytes of events that wait for the slowest view.
const WINDOW: usize = 4 << 20;
/// Bytes of events that stay for a view that joins.
const STAYING: usize = 128 << 10;
/// How far a view that joins may be from the others, in events.
const NEAR: u64 = 20_000;
/// How long the slowest view may hold up the others. Then it goes on by itself. While a shop is busy, a view that gathers may
/// write for longer than this; orders must not wait for it.
const PATIENCE: Duration = Duration::from_millis(300);
/// The same where the stream has far more to come: nobody waits for the next event, and to read once for all costs less.
const PATIENCE_FAR: Duration = Duration::from_secs(3);

/// What the views of a replica read together.
pub struct Feed {
    nats: Nats,
    stream: String,
    state: Mutex<State>,
    grown: Notify,
    consumed: Notify,
}

#[derive(Default)]
struct State {
    window: Window,
    /// How far each view is that takes part.
    views: HashMap<u64, u64>,
    last_view: u64,
    /// Stops whoever reads for all.
    stop: Option<DropGuard>,
    /// Of the last reader that was lost: all views begin anew, as each would with its own.
    failed: Option<(u64, Unreadable)>,
}

/// Events, one position after the other.
#[derive(Default)]
struct Window {
    /// The position before the first.
    start: u64,
    events: VecDeque<Arc<Arrival>>,
    bytes: usize,
}

/// One view's place.
pub struct Place {
    feed: Arc<Feed>,
    view: &'static str,
    /// Of the last event that was handed out.
    position: u64,
    number: Option<u64>,
    own: Option<Reader>,
    is_alone: bool,
}

enum Found {
    Events(Vec<Arc<Arrival>>),
    /// It is to be read.
    NotYet,
    /// The view has fallen behind.
    Gone,
}

impl Feed {
    pub fn new(nats: &Nats, stream: &str) -> Self {
        Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            state: Mutex::default(),
            grown: Notify::new(),
            consumed: Notify::new(),
        }
    }

    /// Begins behind a position; `is_alone` if the view is not to read with the others.
    ///
    /// # Errors
    /// If there is no such stream (yet), or no answer.
    pub async fn open(self: &Arc<Self>, view: &'static str, after: u64, is_alone: bool) -> Result<Place, Unreadable> {
        let mut place = Place { feed: Arc::clone(self), view, position: after, number: None, own: None, is_alone };
        if !place.join(true) {
            place.own = Some(Reader::open(&self.nats, &self.stream, view, after).await?);
        }
        Ok(place)
    }

    /// Reads what comes after a position into the window until it is stopped.
    async fn fill(self: Arc<Self>, after: u64, stop: CancellationToken) {
        let opened = stop.run_until_cancelled(Reader::open(&self.nats, &self.stream, "views", after)).await;
        let mut reader = match opened {
            None => return,
            Some(Ok(reader)) => reader,
            Some(Err(error)) => return self.fail(&stop, error),
        };
        let mut patience = PATIENCE_FAR;
        loop {
            if stop.run_until_cancelled(timeout(patience, self.has_room())).await.is_some_and(|waited| waited.is_err())
            {
                self.state().window.shrink(WINDOW / 2);
            }
            match stop.run_until_cancelled(reader.next(CHUNK)).await {
                None => return reader.close().await,
                Some(Ok(arrivals)) => {
                    let is_far = arrivals.last().is_some_and(|last| last.pending > NEAR);
                    patience = if is_far { PATIENCE_FAR } else { PATIENCE };
                    self.state().window.append(arrivals);
                }
                Some(Err(error)) => return self.fail(&stop, error),
            }
            self.grown.notify_waiters();
        }
    }

    /// Waits until the slowest view has taken enough.
    async fn has_room(&self) {
        loop {
            let mut consumed = pin!(self.consumed.notified());
            consumed.as_mut().enable();
            if self.state().window.bytes < WINDOW {
                return;
            }
            consumed.await;
        }
    }

    fn fail(&self, stop: &CancellationToken, error: Unreadable) {
        // Once it is stopped, the window is another's.
        let mut state = self.state();
        if !stop.is_cancelled() {
            state.fail(error);
        }
        drop(state);
        self.grown.notify_waiters();
    }

    /// Nothing that holds this lock can leave it half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits for an event, then takes with it what else is there and finds room: the last may go beyond the bytes.
    /// Nothing is lost if the call is cancelled.
    ///
    /// # Errors
    /// If the order cannot be kept up, or the reader is gone. Then this is of no more use.
    pub async fn next(&mut self, room: Size) -> Result<Vec<Arc<Arrival>>, Unreadable> {
        loop {
            if self.number.is_none() {
                return self.next_alone(room).await;
            }
            let feed = Arc::clone(&self.feed);
            let mut grown = pin!(feed.grown.notified());
            grown.as_mut().enable();
            match self.take(room)? {
                Found::Events(events) => return Ok(events),
                Found::Gone => {
                    self.leave();
                    continue;
                }
                Found::NotYet => {}
            }
            grown.await;
        }
    }

    /// From now on the view may read with the others.
    pub fn may_join(&mut self) {
        self.is_alone = false;
    }

    /// Lets the server forget the consumer that is of no more use.
    pub async fn close(mut self) {
        self.leave();
        if let Some(own) = self.own.take() {
            own.close().await;
        }
    }

    async fn next_alone(&mut self, room: Size) -> Result<Vec<Arc<Arrival>>, Unreadable> {
        let Feed { nats, stream, .. } = &*self.feed;
        if self.own.is_none() {
            self.own = Some(Reader::open(nats, stream, self.view, self.position).await?);
        }
        let Some(own) = &mut self.own else { return Ok(vec![]) };
        let arrivals = own.next(room).await?;
        self.position = own.position();
        if self.join(false)
            && let Some(own) = self.own.take()
        {
            tokio::spawn(own.close());
        }
        Ok(arrivals.into_iter().map(Arc::new).collect())
    }

    fn take(&mut self, room: Size) -> Result<Found, Unreadable> {
        let mut state = self.feed.state();
        let Some(number) = self.number else { return Ok(Found::Gone) };
        if let Some((last, error)) = &state.failed
            && number <= *last
        {
            return Err(error.clone());
        }
        let found = state.window.after(self.position, room);
        if let Found::Events(events) = &found {
            self.position += events.len() as u64;
            state.views.insert(number, self.position);
            state.forget();
            drop(state);
            self.feed.consumed.notify_waiters();
        }
        Ok(found)
    }

    /// Joins the others if they are near; those wait for a view that is `new` and not far behind them.
    fn join(&mut self, new: bool) -> bool {
        if self.is_alone {
            return false;
        }
        let mut state = self.feed.state();
        let (start, end) = (state.window.start, state.window.end());
        let is_in_sight = self.position >= start && self.position <= end + if new { NEAR } else { 0 };
        if !is_in_sight {
            let is_waited_for = new && self.position < start && start - self.position <= NEAR;
            if !is_waited_for && !state.views.is_empty() {
                return false;
            }
            state.window = Window { start: self.position, ..Window::default() };
        }
        if !is_in_sight || state.stop.is_none() {
            let stop = CancellationToken::new();
            tokio::spawn(Arc::clone(&self.feed).fill(state.window.end(), stop.clone()));
            state.stop = Some(stop.drop_guard());
        }
        state.last_view += 1;
        let number = state.last_view;
        state.views.insert(number, self.position);
        drop(state);
        if !is_in_sight {
            // Some may be behind the window now, or ahead of it.
            self.feed.grown.notify_waiters();
        }
        self.number = Some(number);
        true
    }

    fn leave(&mut self) {
        if let Some(number) = self.number.take() {
            let mut state = self.feed.state();
            state.views.remove(&number);
            if state.views.is_empty() {
                state.stop = None;
                state.window = Window { start: state.window.end(), ..Window::default() };
            }
            drop(state);
            // The slowest may have been this.
            self.feed.consumed.notify_waiters();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl State {
    /// Forgets what all views have.
    fn forget(&mut self) {
        let slowest = self.views.values().copied().min().unwrap_or(u64::MAX);
        while self.window.bytes > STAYING && self.window.start < slowest && self.window.forget_first() {}
    }

    fn fail(&mut self, error: Unreadable) {
        self.failed = Some((self.last_view, error));
        self.views.clear();
        self.stop = None;
        self.window = Window { start: self.window.end(), ..Window::default() };
    }
}

impl Window {
    fn end(&self) -> u64 {
        self.start + self.events.len() as u64
    }

    /// What was read for another window is left out.
    fn append(&mut self, arrivals: Vec<Arrival>) {
        for arrival in arrivals {
            if arrival.position == self.end() + 1 {
                self.bytes += arrival.message.length;
                self.events.push_back(Arc::new(arrival));
            }
        }
    }

    fn after(&self, position: u64, room: Size) -> Found {
        if position < self.start {
            return Found::Gone;
        }
        let first = usize::try_from(position - self.start).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let fits = |arrival: &&Arc<Arrival>| {
            let fits = bytes < room.bytes;
            bytes += arrival.message.length;
            fits
        };
        let events: Vec<_> = self.events.iter().skip(first).take(room.events).take_while(fits).cloned().collect();
        if events.is_empty() { Found::NotYet } else { Found::Events(events) }
    }

    fn shrink(&mut self, bytes: usize) {
        while self.bytes > bytes && self.forget_first() {}
    }

    fn forget_first(&mut self) -> bool {
        let Some(first) = self.events.pop_front() else { return false };
        self.start += 1;
        self.bytes -= first.message.length;
        true
    }
}

#[cfg(test)]
mod tests {
    use async_nats::Message;

    use super::*;

    const ROOM: Size = Size { events: 100, bytes: 1_000 };

    fn arrival(position: u64) -> Arrival {
        let message = Message {
            subject: "evt.user.updated".into(),
            reply: None,
            payload: "".into(),
            headers: None,
            status: None,
            description: None,
            length: 100,
        };
        Arrival::new(position, uuid::Uuid::nil(), 0, message)
    }

    fn window(start: u64, positions: std::ops::RangeInclusive<u64>) -> Window {
        let mut window = Window { start, ..Window::default() };
        window.append(positions.map(arrival).collect());
        window
    }

    fn positions(found: Found) -> Vec<u64> {
        match found {
            Found::Events(events) => events.iter().map(|event| event.position).collect(),
            Found::NotYet | Found::Gone => vec![],
        }
    }

    #[test]
    fn a_view_gets_what_comes_after_its_position() {
        let window = window(10, 11..=15);
        assert_eq!(positions(window.after(10, ROOM)), [11, 12, 13, 14, 15]);
        assert_eq!(positions(window.after(13, ROOM)), [14, 15]);
        assert!(matches!(window.after(15, ROOM), Found::NotYet));
        assert!(matches!(window.after(17, ROOM), Found::NotYet), "it is ahead of the others");
        assert!(matches!(window.after(9, ROOM), Found::Gone));
        assert_eq!(positions(window.after(10, Size { events: 2, ..ROOM })), [11, 12]);
        assert_eq!(positions(window.after(10, Size { bytes: 150, ..ROOM })), [11, 12], "the last may go beyond");
    }

    #[test]
    fn what_does_not_follow_is_left_out() {
        let mut window = window(10, 11..=12);
        window.append(vec![arrival(12), arrival(14), arrival(13)]);
        assert_eq!(positions(window.after(10, ROOM)), [11, 12, 13]);
    }

    #[test]
    fn what_all_views_have_is_forgotten_but_for_a_rest() {
        let mut state = State { window: window(0, 1..=10_000), ..State::default() };
        state.views = HashMap::from([(1, 9_999), (2, 4_000)]);
        state.forget();
        assert_eq!(state.window.start, 4_000);
        assert_eq!(state.window.bytes, 600_000);
        state.views.insert(2, 10_000);
        state.forget();
        assert!(state.window.bytes <= STAYING && state.window.bytes > STAYING - 200);
        assert_eq!(state.window.end(), 10_000);
    }
}
