//! An endpoint: what is done with a request, from its headers to its reply. Each request is answered exactly once, and
//! what is being answered at the same time is bounded.

use std::{sync::Arc, time::Duration};

use runtime::micro::{Reply, Request};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use views::{Key, Plan, Query};
use wire::{Failure, RequestHeaders};

use crate::{
    Config,
    lookup::{Lookup, Wanted},
    page,
    positions::{self, Position, Reached},
    reply, report,
    store::Store,
};

/// What all endpoints share.
pub struct Shared {
    pub store: Store,
    pub tasks: TaskTracker,
    in_flight: Arc<Semaphore>,
    max_in_flight: u32,
    min_position_wait: Duration,
    max_reply_bytes: usize,
}

impl Shared {
    pub fn new(config: &Config, store: Store, tasks: TaskTracker) -> Self {
        Self {
            store,
            tasks,
            in_flight: Arc::new(Semaphore::new(config.max_in_flight as usize)),
            max_in_flight: config.max_in_flight,
            min_position_wait: config.min_position_wait(),
            max_reply_bytes: config.max_reply_bytes,
        }
    }
}

/// One endpoint.
pub struct Responder {
    pub view: &'static str,
    pub query: &'static Query,
    pub position: Position,
    pub lookup: Arc<Lookup>,
    pub shared: Arc<Shared>,
}

/// A request that was understood.
struct Asked {
    plan: Plan,
    min_position: u64,
    /// Held until the reply is out.
    permit: OwnedSemaphorePermit,
}

impl Responder {
    /// Sees to it that the request is answered, without waiting for that.
    pub fn take(self: &Arc<Self>, request: Request) {
        let reached = *self.position.borrow();
        match (self.admit(&request), reached) {
            (Err(failure), _) => {
                self.shared.tasks.spawn(request.respond(Err(failure)));
            }
            // By far the most frequent case needs no task of its own.
            (Ok(Asked { plan: Plan::Get(key), min_position, permit }), Some(reached))
                if reached.position >= min_position =>
            {
                self.look_up(request, key, reached, permit);
            }
            (Ok(asked), _) => {
                self.shared.tasks.spawn(Arc::clone(self).answer(request, asked));
            }
        }
    }

    fn admit(&self, request: &Request) -> Result<Asked, Failure> {
        let permit = Arc::clone(&self.shared.in_flight).try_acquire_owned();
        let permit = permit.map_err(|_| reply::overloaded(self.shared.max_in_flight))?;
        self.shared.store.check()?;
        let headers = RequestHeaders::parse(&request.headers)?;
        let plan = (self.query.plan)(&request.payload)?;
        Ok(Asked { plan, min_position: headers.min_position.unwrap_or(0), permit })
    }

    fn look_up(&self, request: Request, key: Key, reached: Reached, permit: OwnedSemaphorePermit) {
        self.lookup.add(Wanted { request, noun: self.query.noun, key, reached, permit });
    }

    async fn answer(self: Arc<Self>, request: Request, asked: Asked) {
        let Self { view, position, shared, .. } = &*self;
        let Asked { plan, min_position, permit } = asked;
        let reached = match positions::wait(view, position.clone(), min_position, shared.min_position_wait).await {
            Ok(reached) => reached,
            Err(failure) => return request.respond(Err(failure)).await,
        };
        let body = match plan {
            Plan::Get(key) => return self.look_up(request, key, reached, permit),
            Plan::List(list) => page::read(&shared.store, view, reached, list, shared.max_reply_bytes).await,
            Plan::Report(report) => report::read(&shared.store, view, reached, report, shared.max_reply_bytes).await,
        };
        request.respond(body.map(|body| Reply { position: reached.position, body })).await;
        drop(permit);
    }
}
