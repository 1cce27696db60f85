//! Operations: what an operator asks or tells a service, `ops.<noun>.<verb>`, as endpoints of the service that does the
//! work. Only the NATS user `operator` may send them (`nats.conf`). Each operation is one request type with its
//! function, and one line in its service's list.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use wire::{Code, Failure, RequestHeaders, Subjects};

use crate::micro::{Endpoint, EndpointDescription, Reply, Request, Response};

/// How many operations of one kind may run at the same time.
const MAX_RUNNING: usize = 8;

/// The request of an operation, and what it does.
pub trait Operation: DeserializeOwned + JsonSchema + Send + 'static {
    const NOUN: &'static str;
    const VERB: &'static str;
    const DESCRIPTION: &'static str;

    /// What the service's operations work on.
    type Context: Send + Sync + 'static;

    /// Takes note of who asks, if the header `Actor` tells.
    #[must_use]
    fn asked_by(self, _actor: Option<String>) -> Self {
        self
    }

    /// Returns the body of the reply.
    ///
    /// # Errors
    /// The failure to answer with.
    fn run(self, context: &Self::Context) -> impl Future<Output = Result<Value, Failure>> + Send;
}

/// The endpoint of an operation. Its tasks are tracked, so that the service can finish them when it stops.
pub fn endpoint<O: Operation>(subjects: &Subjects, context: &Arc<O::Context>, tasks: &TaskTracker) -> Endpoint {
    let description = EndpointDescription {
        name: format!("{}-{}", O::NOUN, O::VERB),
        subject: subjects.operation(O::NOUN, O::VERB),
        description: O::DESCRIPTION.to_owned(),
        schema: schemars::schema_for!(O).as_value().to_string(),
    };
    let (context, tasks, running) = (Arc::clone(context), tasks.clone(), Arc::new(Semaphore::new(MAX_RUNNING)));
    let handle = move |request: Request| {
        let (context, permit) = (Arc::clone(&context), Arc::clone(&running).try_acquire_owned());
        tasks.spawn(async move {
            let response = match &permit {
                Ok(_) => run::<O>(&request.headers, &request.payload, &context).await,
                Err(_) => Err(Failure::new(Code::Overloaded, "this operation is being run several times already")),
            };
            request.respond(response).await;
        });
    };
    Endpoint { description, open: None, handle: Box::new(handle) }
}

async fn run<O: Operation>(headers: &[u8], payload: &[u8], context: &O::Context) -> Response {
    let RequestHeaders { actor, .. } = RequestHeaders::parse(headers)?;
    let operation: O = domain::parse(payload)?;
    let body = operation.asked_by(actor).run(context).await?;
    Ok(Reply { position: None, body: body.to_string().into() })
}
