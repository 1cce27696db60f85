//! The generations of the views as MongoDB has them: which there are, what each is for, and how one takes the place of
//! another. The invariants: of one version of a view at most one generation serves and at most one is being built; a
//! generation changes its state in one write, which demands the state that it had.

use bson::{Bson, Document, doc};
use futures_util::TryStreamExt;
use mongodb::{ClientSession, Collection, Database, error::Error, options::WriteConcern};
use views::layout::{self, Checkpoint, Generation, Generations, State};

use crate::comparison::Comparison;

/// How long a generation that nobody shall read any more stays, in milliseconds. Queries that still read it, because
/// their replica has not heard yet, take less.
const DROPPED_AFTER_MS: i64 = 15_000;

/// Access to the generations of all views.
#[derive(Clone)]
pub struct Catalog {
    database: Database,
    views: Collection<Generations>,
}

/// What became of a wish to change a view's generations.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Done(i32),
    /// It is so already, or on its way there.
    Already(i32),
}

/// Why a view's generations are not changed as wished.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Unavailable(#[from] Error),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
}

impl Catalog {
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone(), views: database.collection(layout::VIEWS) }
    }

    /// The generations of all views.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn all(&self) -> Result<Vec<Generations>, Error> {
        self.views.find(doc! {}).await?.try_collect().await
    }

    /// The generations of one view; `None` if it has had none yet.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn of(&self, view: &str) -> Result<Option<Generations>, Error> {
        self.views.find_one(doc! { "_id": view }).await
    }

    /// Makes sure that this version of the view has a generation that serves, or one that is being built to.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn ensure(&self, view: &str, version: i32) -> Result<(), Error> {
        self.take_over_older_record(view).await?;
        let empty = doc! { "$setOnInsert": { "last": 0, "generations": [] } };
        self.views.update_one(doc! { "_id": view }, empty).upsert(true).await?;
        self.add(view, version, State::Building, &[State::Building, State::Serving], doc! {}).await.map(drop)
    }

    /// Begins to build a generation that will take the place of the serving one.
    ///
    /// # Errors
    /// If MongoDB is unavailable, or the generation before is to be returned to.
    pub async fn rebuild(&self, view: &str, version: i32, force: bool) -> Result<Change, Refusal> {
        let added = self.add(view, version, State::Building, &[State::Building], doc! { "force": force }).await?;
        let found = if added { None } else { self.of(view).await? };
        let mut building = found.iter().flat_map(|it| it.of(version)).filter(|it| it.state == State::Building);
        if let Some(returning) = building.find(|it| it.returns) {
            let number = returning.number;
            return Err(Refusal::Conflict(format!("the view {view} is returning to its generation {number}")));
        }
        self.added(view, version, State::Building, added).await
    }

    /// Begins to build a generation that will be compared with the serving one.
    ///
    /// # Errors
    /// If MongoDB is unavailable, or no generation serves.
    pub async fn verify(&self, view: &str, version: i32, values: bool) -> Result<Change, Refusal> {
        if self.of(view).await?.is_none_or(|view| view.serving(version).is_none()) {
            let message =
                format!("no generation of version {version} of the view {view} serves, which could be verified");
            return Err(Refusal::Conflict(message));
        }
        let options = doc! { "values": values };
        let added = self.add(view, version, State::Verifying, &[State::Verifying], options).await?;
        self.added(view, version, State::Verifying, added).await
    }

    /// Begins to return to a generation that served before, by default the last one: it is brought up to date, and then
    /// serves again. Who names the generation can ask twice.
    ///
    /// # Errors
    /// If MongoDB is unavailable, there is no such generation, or another one is being built.
    pub async fn roll_back(
        &self,
        view: &str,
        version: i32,
        number: Option<i32>,
        force: bool,
    ) -> Result<Change, Refusal> {
        let found = self.of(view).await?;
        let is_meant = |generation: &&Generation| number.is_none_or(|number| generation.number == number);
        let states = |state| found.iter().flat_map(|it| it.of(version)).filter(move |it| it.state == state);
        if let Some(number) = number.filter(|number| states(State::Serving).any(|it| it.number == *number)) {
            return Ok(Change::Already(number));
        }
        if let Some(building) = states(State::Building).next() {
            let number = building.number;
            if building.returns && is_meant(&building) {
                return Ok(Change::Already(number));
            }
            return Err(Refusal::Conflict(format!(
                "the generation {number} of the view {view} is being built already"
            )));
        }
        let Some(previous) = states(State::Previous).filter(is_meant).max_by_key(|previous| previous.since) else {
            let message = format!("the view {view} has no such generation of version {version} to return to");
            return Err(Refusal::NotFound(message));
        };
        let building = doc! { "state": name(State::Building), "since": "$$NOW", "force": force, "returns": true };
        match self.set_state(view, previous.number, &[State::Previous], &building).await? {
            true => Ok(Change::Done(previous.number)),
            false => Err(Refusal::Conflict(format!("the generations of the view {view} are being changed: try again"))),
        }
    }

    /// Marks a generation that is not needed any more to be dropped.
    ///
    /// # Errors
    /// If MongoDB is unavailable, there is no such generation, or it is needed.
    pub async fn drop(&self, view: &str, number: i32, version: i32) -> Result<Change, Refusal> {
        let found = self.of(view).await?;
        let Some(generation) = found.as_ref().and_then(|view| view.find(number)) else {
            return Err(Refusal::NotFound(format!("the view {view} has no generation {number}")));
        };
        match generation.state {
            State::Dropping => return Ok(Change::Already(number)),
            State::Serving if generation.version == version => {
                let message = format!("the generation {number} of the view {view} serves: only another can replace it");
                return Err(Refusal::Conflict(message));
            }
            State::Serving if generation.idle_since.is_none() => {
                let message = format!(
                    "the generation {number} of the view {view} serves version {} of the view, whose replicas keep it \
                     up to date: stop these first",
                    generation.version
                );
                return Err(Refusal::Conflict(message));
            }
            State::Building if found.iter().all(|view| view.serving(generation.version).is_none()) => {
                let message = format!("the generation {number} of the view {view} is the only one of its version");
                return Err(Refusal::Conflict(message));
            }
            _ => {}
        }
        match self.set_state(view, number, &[generation.state], &dropping()).await? {
            true => Ok(Change::Done(number)),
            false => Err(Refusal::Conflict(format!("the generations of the view {view} are being changed: try again"))),
        }
    }

    /// Marks a generation that is of no use any more to be dropped.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn give_up(&self, view: &str, number: i32, state: State) -> Result<(), Error> {
        self.set_state(view, number, &[state], &dropping()).await.map(drop)
    }

    /// Keeps what a comparison has found, and says what became of the newer generation.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn compared(
        &self,
        view: &str,
        number: i32,
        (from, to): (State, State),
        comparison: &Comparison,
    ) -> anyhow::Result<()> {
        let record = doc! { "comparison": serde_json::to_string(comparison)? };
        let comparisons = self.database.collection::<Document>(layout::COMPARISONS);
        let id = doc! { "_id": layout::collection(view, number) };
        comparisons.replace_one(id, record).upsert(true).await?;
        self.set_state(view, number, &[from], &doc! { "state": name(to), "since": "$$NOW" }).await?;
        Ok(())
    }

    /// What was found when a generation was compared with the serving one, in JSON; `None` if it was not.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn comparison(&self, collection: &str) -> Result<Option<String>, Error> {
        let comparisons = self.database.collection::<Document>(layout::COMPARISONS);
        let found = comparisons.find_one(doc! { "_id": collection }).await?;
        Ok(found.and_then(|found| found.get_str("comparison").ok().map(ToOwned::to_owned)))
    }

    /// Says why a generation must not be served, or that nothing is wrong with it any more.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn set_problem(&self, view: &str, number: i32, problem: Option<&str>) -> Result<(), Error> {
        let filter = doc! { "_id": view, "generations.number": number };
        let change = match problem {
            Some(problem) => doc! { "$set": { "generations.$.problem": problem } },
            None => doc! { "$unset": { "generations.$.problem": "" } },
        };
        self.views.update_one(filter, change).await.map(drop)
    }

    /// Notes that nobody keeps a generation up to date, or that somebody does.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn set_idle(&self, view: &str, number: i32, is_idle: bool) -> Result<(), Error> {
        let exists = doc! { "$elemMatch": { "number": number, "idle_since": { "$exists": !is_idle } } };
        let change = match is_idle {
            true => doc! { "$currentDate": { "generations.$.idle_since": true } },
            false => doc! { "$unset": { "generations.$.idle_since": "" } },
        };
        self.views.update_one(doc! { "_id": view, "generations": exists }, change).await.map(drop)
    }

    /// Makes a generation the serving one of its version, in one transaction of this new session. Both writers must have been stopped: the
    /// checkpoints must have these terms, and the one that served until now must be at the same position.
    ///
    /// # Errors
    /// If MongoDB is unavailable, or the generations or the checkpoints are not as they should be. It is then unknown
    /// whether the generation serves.
    pub async fn switch(&self, switch: &Switch<'_>, mut session: ClientSession) -> anyhow::Result<()> {
        session.start_transaction().write_concern(WriteConcern::majority()).await?;
        let checkpoints = self.database.collection::<Checkpoint>(layout::CHECKPOINTS);
        let Switch { view, number, term, position, from } = *switch;
        let demand = async |number: i32, term: i64, session: &mut _| {
            let filter =
                doc! { "_id": layout::collection(view, number), "term": term, "position": i64::try_from(position)? };
            // A write, so that the transaction conflicts with whoever writes the checkpoint meanwhile.
            let change = vec![doc! { "$set": { "switched": "$$NOW" } }, doc! { "$unset": "rate" }];
            let updated = checkpoints.update_one(filter, change).session(session).await?;
            anyhow::ensure!(updated.matched_count == 1, "the checkpoint of {view}@{number} was moved by somebody else");
            anyhow::Ok(())
        };
        demand(number, term, &mut session).await?;
        let mut filter = vec![doc! { "$elemMatch": { "number": number, "state": name(State::Building) } }];
        let mut branches = vec![branch(
            number,
            &doc! { "state": name(State::Serving), "since": "$$NOW", "force": false, "returns": false },
        )];
        if let Some(Stopped { number, term, state }) = from {
            if let Some(term) = term {
                demand(number, term, &mut session).await?;
            }
            filter.push(doc! { "$elemMatch": { "number": number, "state": name(State::Serving) } });
            branches.push(branch(number, &doc! { "state": name(state), "since": "$$NOW" }));
        }
        let filter =
            doc! { "_id": view, "$and": filter.into_iter().map(|it| doc! { "generations": it }).collect::<Vec<_>>() };
        let switched = self.views.update_one(filter, vec![map(branches)]).session(&mut session).await?;
        anyhow::ensure!(switched.matched_count == 1, "the generations of the view {view} have been changed");
        Ok(session.commit_transaction().await?)
    }

    /// Drops what is not needed any more: the generations that were marked `grace_ms` ago, or that nobody has kept up to
    /// date or returned to for so long.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn clean_up(&self, view: &Generations, grace_ms: i64) -> Result<(), Error> {
        let now = self.now().await?;
        let is_over = |since: bson::DateTime, ms: i64| now.timestamp_millis() - since.timestamp_millis() >= ms;
        for Generation { number, version, state, since, idle_since, .. } in &view.generations {
            let is_forgotten = idle_since.is_some_and(|since| is_over(since, grace_ms));
            match state {
                State::Dropping if is_over(*since, DROPPED_AFTER_MS.min(grace_ms.max(1))) => {
                    self.forget(&view.view, *number).await?;
                }
                State::Previous | State::Verified | State::Refused
                    if is_over(*since, grace_ms) || is_superseded(view, *number, *version, *state) =>
                {
                    self.set_state(&view.view, *number, &[*state], &dropping()).await?;
                }
                State::Serving | State::Building | State::Verifying if is_forgotten => {
                    tracing::info!(
                        view = view.view,
                        generation = number,
                        version,
                        "dropping a generation that nobody keeps up to date"
                    );
                    self.set_state(&view.view, *number, &[*state], &dropping()).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Drops the documents of a generation, which nobody reads.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn drop_documents(&self, view: &str, number: i32) -> Result<(), Error> {
        let collection = layout::collection(view, number);
        // Without its checkpoint nobody can write it any more.
        for records in [layout::CHECKPOINTS, layout::LEASES] {
            self.database.collection::<Document>(records).delete_one(doc! { "_id": &collection }).await?;
        }
        self.database.collection::<Document>(&collection).drop().await
    }

    /// Drops all that belongs to a generation, and then forgets it.
    async fn forget(&self, view: &str, number: i32) -> Result<(), Error> {
        self.drop_documents(view, number).await?;
        let collection = layout::collection(view, number);
        self.database.collection::<Document>(layout::COMPARISONS).delete_one(doc! { "_id": collection }).await?;
        let forgotten = doc! { "$pull": { "generations": { "number": number, "state": name(State::Dropping) } } };
        self.views.update_one(doc! { "_id": view }, forgotten).await?;
        tracing::info!(view, generation = number, "dropped a generation of the view");
        Ok(())
    }

    /// The time by the server's clock.
    async fn now(&self) -> Result<bson::DateTime, Error> {
        let reply = self.database.run_command(doc! { "hello": 1 }).await?;
        reply.get_datetime("localTime").copied().map_err(Error::custom)
    }

    /// Adds a generation with these options, unless the version has one in one of these states.
    async fn add(
        &self,
        view: &str,
        version: i32,
        state: State,
        unless: &[State],
        options: Document,
    ) -> Result<bool, Error> {
        let states: Vec<&str> = unless.iter().map(|state| name(*state)).collect();
        let such = doc! { "$elemMatch": { "version": version, "state": { "$in": states } } };
        let number = doc! { "$add": ["$last", 1] };
        let mut generation = doc! { "number": &number, "version": version, "state": name(state), "since": "$$NOW" };
        generation.extend(options);
        let change = doc! { "last": number, "generations": { "$concatArrays": ["$generations", [generation]] } };
        let filter = doc! { "_id": view, "generations": { "$not": such } };
        let added = self.views.update_one(filter, vec![doc! { "$set": change }]).await?;
        Ok(added.matched_count == 1)
    }

    async fn added(&self, view: &str, version: i32, state: State, is_new: bool) -> Result<Change, Refusal> {
        let found = self.of(view).await?;
        let mut such = found.iter().flat_map(|found| found.of(version)).filter(|found| found.state == state);
        match such.next() {
            Some(generation) if is_new => Ok(Change::Done(generation.number)),
            Some(generation) => Ok(Change::Already(generation.number)),
            None => Err(Refusal::Conflict(format!("the generations of the view {view} are being changed: try again"))),
        }
    }

    /// Returns whether the generation had one of these states.
    async fn set_state(&self, view: &str, number: i32, from: &[State], set: &Document) -> Result<bool, Error> {
        let from: Vec<&str> = from.iter().map(|state| name(*state)).collect();
        let such = doc! { "$elemMatch": { "number": number, "state": { "$in": from } } };
        let change = map(vec![branch(number, set)]);
        let changed = self.views.update_one(doc! { "_id": view, "generations": such }, vec![change]).await?;
        Ok(changed.matched_count == 1)
    }

    /// A program of before kept one generation, which served.
    async fn take_over_older_record(&self, view: &str) -> Result<(), Error> {
        let records = self.database.collection::<Document>(layout::VIEWS);
        let older = doc! { "_id": view, "generations": { "$exists": false } };
        let Some(record) = records.find_one(older.clone()).await? else { return Ok(()) };
        let number = record.get_i32("generation").map_err(Error::custom)?;
        let checkpoints = self.database.collection::<Checkpoint>(layout::CHECKPOINTS);
        let checkpoint = checkpoints.find_one(doc! { "_id": layout::collection(view, number) }).await?;
        let generations = match checkpoint {
            Some(Checkpoint { version, .. }) => {
                vec![doc! { "number": number, "version": version, "state": name(State::Serving), "since": "$$NOW" }]
            }
            None => vec![],
        };
        let present = doc! { "$set": { "last": number, "generations": generations } };
        records.update_one(older, vec![present, doc! { "$unset": "generation" }]).await.map(drop)
    }
}

/// How one generation takes the place of another.
pub struct Switch<'a> {
    pub view: &'a str,
    /// The generation that is to serve.
    pub number: i32,
    /// The term of its writer.
    pub term: i64,
    /// The position of both.
    pub position: u64,
    /// The one that has served, if there is one.
    pub from: Option<Stopped>,
}

/// A generation that serves no longer.
#[derive(Clone, Copy)]
pub struct Stopped {
    pub number: i32,
    /// The term under which its writer was stopped; `None` if it is damaged, so that nobody can say where it is.
    pub term: Option<i64>,
    /// The state that it comes into.
    pub state: State,
}

/// Whether the version has a newer generation in the same state. Of each, the newest is enough.
fn is_superseded(view: &Generations, number: i32, version: i32, state: State) -> bool {
    let newest = view.of(version).filter(|other| other.state == state).max_by_key(|other| (other.since, other.number));
    newest.is_some_and(|newest| newest.number != number)
}

fn dropping() -> Document {
    doc! { "state": name(State::Dropping), "since": "$$NOW" }
}

/// The change of one generation, as a part of [`map`].
fn branch(number: i32, set: &Document) -> Bson {
    let is_meant = doc! { "$eq": ["$$generation.number", number] };
    doc! { "case": is_meant, "then": { "$mergeObjects": ["$$generation", set] } }.into()
}

/// The stage of an update that changes some of the generations.
fn map(branches: Vec<Bson>) -> Document {
    let changed = doc! { "$switch": { "branches": branches, "default": "$$generation" } };
    doc! { "$set": { "generations": { "$map": { "input": "$generations", "as": "generation", "in": changed } } } }
}

/// The state as it is stored.
fn name(state: State) -> &'static str {
    match state {
        State::Building => "building",
        State::Serving => "serving",
        State::Previous => "previous",
        State::Verifying => "verifying",
        State::Verified => "verified",
        State::Refused => "refused",
        State::Dropping => "dropping",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_stored_as_they_are_read() {
        for state in [
            State::Building,
            State::Serving,
            State::Previous,
            State::Verifying,
            State::Verified,
            State::Refused,
            State::Dropping,
        ] {
            assert_eq!(serde_json::json!(state), name(state));
        }
    }
}
