//! A responder serves one endpoint: it takes a request from its headers to its reply. Each request is answered exactly
//! once, and the number of requests in flight is bounded.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use runtime::{
    Monitor,
    micro::{Reply, Request},
    traces::{Ended, KeyValue, Kind},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use views::{Key, Plan, Query};
use wire::{Failure, RequestHeaders};

use crate::{
    Config,
    lookup::{Lookup, LookupRequest},
    metrics::Metrics,
    page,
    positions::{self, PositionReceiver, ViewPosition},
    reply, report,
    store::{Store, read_span},
};

/// What all endpoints share.
pub struct Shared {
    pub store: Store,
    pub tasks: TaskTracker,
    pub metrics: Arc<Metrics>,
    in_flight: Arc<Semaphore>,
    max_in_flight: u32,
    min_position_wait: Duration,
    max_reply_bytes: usize,
}

impl Shared {
    pub fn new(config: &Config, store: Store, tasks: TaskTracker, metrics: Arc<Metrics>) -> Self {
        Self {
            store,
            tasks,
            metrics,
            in_flight: Arc::new(Semaphore::new(config.max_in_flight as usize)),
            max_in_flight: config.max_in_flight,
            min_position_wait: config.min_position_wait(),
            max_reply_bytes: config.max_reply_bytes,
        }
    }

    /// Shows how many requests are in flight.
    pub fn show(&self, monitor: &Monitor) {
        let (permits, max) = (Arc::clone(&self.in_flight), self.max_in_flight as usize);
        let in_flight = move || max.saturating_sub(permits.available_permits());
        let figures = in_flight.clone();
        monitor.add_figures(move |it| {
            it.gauge("watershed_queries_in_flight", "Queries that are being answered", &[], figures() as f64);
            it.gauge("watershed_queries_in_flight_limit", "MAX_IN_FLIGHT", &[], max as f64);
        });
        monitor.add_data(move |data| {
            data.insert("in_flight".into(), in_flight().into());
            data.insert("max_in_flight".into(), max.into());
        });
    }
}

/// One endpoint.
pub struct Responder {
    pub view: &'static str,
    pub query: &'static Query,
    pub position: PositionReceiver,
    pub lookup: Arc<Lookup>,
    pub shared: Arc<Shared>,
}

/// A request whose headers and body have been parsed.
struct ParsedRequest {
    plan: Plan,
    min_position: u64,
    /// Counts the request as in flight until its reply has been sent.
    permit: OwnedSemaphorePermit,
}

impl Responder {
    /// Makes sure that the request will be answered; does not wait for the answer.
    pub fn take(self: &Arc<Self>, mut request: Request) {
        let view_position = self.position.borrow().as_ref().ok().copied();
        match (self.admit(&mut request), view_position) {
            (Err(failure), _) => {
                self.shared.tasks.spawn(request.respond(Err(failure)));
            }
            // By far the most frequent case, a get that need not wait for its view, needs no task of its own.
            (Ok(ParsedRequest { plan: Plan::Get(key), min_position, permit }), Some(view_position))
                if view_position.position >= min_position =>
            {
                self.look_up(request, key, view_position, permit);
            }
            (Ok(parsed), _) => {
                let span = request.log_span();
                self.shared.tasks.spawn(Arc::clone(self).answer(request, parsed).instrument(span));
            }
        }
    }

    fn admit(&self, request: &mut Request) -> Result<ParsedRequest, Failure> {
        let permit = Arc::clone(&self.shared.in_flight).try_acquire_owned();
        let permit = permit.map_err(|_| reply::overloaded(self.shared.max_in_flight))?;
        self.shared.store.check()?;
        let headers = RequestHeaders::parse(&request.headers)?;
        request.begin_trace(headers.traceparent);
        let plan = (self.query.plan)(&request.payload)?;
        Ok(ParsedRequest { plan, min_position: headers.min_position.unwrap_or(0), permit })
    }

    fn look_up(&self, request: Request, key: Key, view_position: ViewPosition, permit: OwnedSemaphorePermit) {
        self.lookup.add(LookupRequest { request, noun: self.query.noun, key, view_position, permit });
    }

    async fn answer(self: Arc<Self>, request: Request, parsed: ParsedRequest) {
        let Self { view, position, shared, .. } = &*self;
        let ParsedRequest { plan, min_position, permit } = parsed;
        let has_to_wait = position.borrow().as_ref().map_or(true, |current| current.position < min_position);
        let started = Instant::now();
        let waited = positions::wait(view, position.clone(), min_position, shared.min_position_wait).await;
        if has_to_wait {
            shared.metrics.min_position_wait.observe(started.elapsed().as_secs_f64());
            request.record(|| {
                let end = SystemTime::now();
                let min_position = i64::try_from(min_position).unwrap_or(i64::MAX);
                let attributes =
                    [KeyValue::new("watershed.view", *view), KeyValue::new("watershed.min_position", min_position)];
                Ended::new("wait for the view", Kind::Internal, end - started.elapsed(), end).with(attributes)
            });
        }
        let view_position = match waited {
            Ok(view_position) => view_position,
            Err(failure) => return request.respond(Err(failure)).await,
        };
        let began = SystemTime::now();
        let (operation, body) = match plan {
            Plan::Get(key) => return self.look_up(request, key, view_position, permit),
            Plan::List(list) => {
                ("find", page::read(&shared.store, view, view_position.generation, list, shared.max_reply_bytes).await)
            }
            Plan::Report(report) => {
                ("aggregate", report::read(&shared.store, view, view_position, report, shared.max_reply_bytes).await)
            }
        };
        request.record(|| read_span(operation, view, 1, began));
        request.respond(body.map(|body| Reply { position: Some(view_position.position), body })).await;
        drop(permit);
    }
}
