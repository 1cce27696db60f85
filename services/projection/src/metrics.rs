//! What the projection service counts and shows of the views that this replica leads.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use domain::Timestamp;
use runtime::{Counter, Family, Histogram, KnownPosition, Label, Monitor, Problem, age, locked, now, number, rounded};
use serde_json::{Value, json};
use views::{View, Visitor};

/// A view counts as catching up while its oldest unseen event is older than this.
const CATCHING_UP_LAG: Duration = Duration::from_secs(10);
/// A view that has events to come and does not move for this long stands still.
const STANDING_STILL: Duration = Duration::from_secs(30);
/// Events keep coming if the last ones came no longer ago than this.
const MOVING: Duration = Duration::from_secs(3);
/// The weight of the last second or so in the rate of events.
const RATE_WEIGHT: f64 = 0.2;

pub struct Metrics {
    pub views: Vec<Arc<ViewMetrics>>,
    /// The last sequence of the stream.
    pub stream: KnownPosition,
    /// When the stream was last seen to grow.
    grown_at: Mutex<Option<Instant>>,
    /// The generations that this replica builds, by view and number.
    builds: Mutex<BTreeMap<(&'static str, i32), Build>>,
    pub transaction_duration: Histogram,
}

/// The metrics of one view.
pub struct ViewMetrics {
    pub view: &'static str,
    pub version: i32,
    leading: Mutex<Option<Leading>>,
    events: Counter,
    documents: Counter,
    visible: Histogram,
    gained: Counter,
    lost: Counter,
}

/// What is known of a view while this replica leads it.
#[derive(Clone, Debug)]
pub struct Leading {
    pub term: i64,
    since: Timestamp,
    generation: i32,
    /// The position up to which queries see the view; `None` until it was taken over.
    pub position: Option<u64>,
    moved_at: Instant,
    /// Whether the view fits the stream; `None` until that was compared.
    fits: Option<bool>,
    /// Why the view does not move.
    failing: Option<String>,
    /// Seconds for which the oldest event that is not visible has been recorded; `None` if that is not known.
    lag: Option<f64>,
    events_per_second: f64,
    /// The position when the rate was last computed, and when that was.
    counted: u64,
    counted_at: Instant,
}

impl Metrics {
    pub fn new(monitor: &Monitor) -> Arc<Self> {
        struct Names(Vec<(&'static str, i32)>);

        impl Visitor for Names {
            fn visit<V: View>(&mut self) {
                self.0.push((V::NAME, V::VERSION));
            }
        }

        let mut names = Names(Vec::new());
        views::visit(&mut names);
        let counters = |name, help| {
            let family = Family::<Label, Counter>::default();
            monitor.register(name, help, family.clone());
            family
        };
        let events = counters("watershed_view_events", "Events up to which the view was written");
        let documents = counters("watershed_view_documents_written", "Documents that were written or deleted");
        let gained = counters("watershed_leases_gained", "How often this replica began to lead the view");
        let lost = counters("watershed_leases_lost", "How often this replica lost the view's lease against its will");
        let visible = monitor.durations_by_view(
            "watershed_view_visible_seconds",
            "Time from recording an event to its being visible, of the oldest event of each batch",
        );
        let of_view = |(view, version)| {
            let label = [("view", view)];
            Arc::new(ViewMetrics {
                view,
                version,
                leading: Mutex::default(),
                events: events.get_or_create_owned(&label),
                documents: documents.get_or_create_owned(&label),
                visible: visible.get_or_create_owned(&label),
                gained: gained.get_or_create_owned(&label),
                lost: lost.get_or_create_owned(&label),
            })
        };
        let metrics = Arc::new(Self {
            views: names.0.into_iter().map(of_view).collect(),
            stream: KnownPosition::default(),
            grown_at: Mutex::default(),
            builds: Mutex::default(),
            transaction_duration: monitor
                .duration("watershed_transaction_duration_seconds", "Time of a MongoDB transaction, up to its commit"),
        });
        metrics.show(monitor);
        metrics
    }

    /// The metrics of a view.
    pub fn of<V: View>(&self) -> Arc<ViewMetrics> {
        let found = self.views.iter().find(|metrics| metrics.view == V::NAME);
        Arc::clone(found.expect("`new` has made metrics for each view"))
    }

    fn show(self: &Arc<Self>, monitor: &Monitor) {
        let metrics = Arc::clone(self);
        monitor.add_figures(move |figures| {
            if let Some(position) = metrics.stream.get() {
                figures.gauge("watershed_stream_position", "The last sequence of the stream", &[], position as f64);
            }
            for view in &metrics.views {
                let (label, leading) = ([("view", view.view)], view.leading());
                let is_leading = number(leading.is_some());
                figures.gauge("watershed_view_leading", "1 if this replica leads the view", &label, is_leading);
                let Some(leading) = leading else { continue };
                figures.gauge("watershed_view_term", "The term of the view's lease", &label, leading.term as f64);
                let failing = number(leading.failing.is_some());
                figures.gauge("watershed_view_failing", "1 if the view stands still after an error", &label, failing);
                let Some(position) = leading.position else { continue };
                let help = "The position up to which queries see the view";
                figures.gauge("watershed_view_position", help, &label, position as f64);
                let lag = metrics.lag_events(position) as f64;
                figures.gauge("watershed_view_lag_events", "Events that the view does not show yet", &label, lag);
                if let Some(lag) = leading.lag {
                    let help = "Age of the oldest event that the view does not show yet";
                    figures.gauge("watershed_view_lag_seconds", help, &label, lag);
                }
            }
        });
        let metrics = Arc::clone(self);
        monitor.add_data(move |data| {
            data.insert("stream".into(), json!({ "position": metrics.stream.json() }));
            let views = metrics.views.iter().filter_map(|view| view.json(&metrics));
            data.insert("views".into(), views.collect());
            let build = |((view, generation), build): (&(&str, i32), &Build)| {
                let Build { state, failing, position, events_per_second } = build;
                json!({
                    "view": view, "generation": generation, "state": state, "reason": failing, "position": position,
                    "events_per_second": events_per_second.map(rounded),
                })
            };
            data.insert("builds".into(), locked(&metrics.builds).iter().map(build).collect());
        });
        let metrics = Arc::clone(self);
        monitor.add_check(move || {
            let builds = locked(&metrics.builds);
            let failing = builds.iter().filter_map(|((view, number), build)| {
                let reason = build.failing.as_ref()?;
                Some(Problem::other(format!("the generation {number} of the view {view} is not being built: {reason}")))
            });
            metrics.views.iter().filter_map(|view| view.problem(&metrics)).chain(failing).collect()
        });
    }

    /// Says how far the stream is.
    pub fn stream_observed(&self, last: u64) {
        let is_first = self.stream.get().is_none();
        if !is_first && self.stream.get() < Some(last) {
            *locked(&self.grown_at) = Some(Instant::now());
        }
        self.stream.set(last);
    }

    /// Whether events keep coming.
    pub fn is_stream_moving(&self) -> bool {
        locked(&self.grown_at).is_some_and(|at| at.elapsed() < MOVING)
    }

    /// Says that this replica builds a generation, until the guard is dropped.
    pub fn building(self: &Arc<Self>, view: &'static str, number: i32, state: &'static str) -> BuildGuard {
        let build = Build { state, failing: None, position: None, events_per_second: None };
        locked(&self.builds).insert((view, number), build);
        BuildGuard(Arc::clone(self), (view, number))
    }

    /// Says how far a generation is that this replica builds, and how many events per second it takes.
    pub fn built(&self, view: &'static str, number: i32, position: u64, events_per_second: Option<f64>) {
        if let Some(build) = locked(&self.builds).get_mut(&(view, number)) {
            (build.position, build.events_per_second) = (Some(position), events_per_second);
        }
    }

    /// How many events the stream has after a position.
    pub fn lag_events(&self, position: u64) -> u64 {
        self.stream.get().unwrap_or(position).saturating_sub(position)
    }
}

impl ViewMetrics {
    pub fn leading(&self) -> Option<Leading> {
        self.lock().clone()
    }

    /// Says that this replica has acquired the view's lease. It leads the view until the guard is dropped.
    pub fn lead(self: &Arc<Self>, term: i64) -> LeadingGuard {
        self.gained.inc();
        *self.lock() = Some(Leading {
            term,
            since: now(),
            generation: 0,
            position: None,
            moved_at: Instant::now(),
            fits: None,
            failing: None,
            lag: None,
            events_per_second: 0.0,
            counted: 0,
            counted_at: Instant::now(),
        });
        LeadingGuard(Arc::clone(self), term)
    }

    pub fn lease_lost(&self) {
        self.lost.inc();
    }

    /// Says that the view was taken over at its stored checkpoint.
    pub fn taken_over(&self, generation: i32, position: u64) {
        self.change(|leading| {
            (leading.generation, leading.position, leading.counted) = (generation, Some(position), position);
            (leading.moved_at, leading.counted_at) = (Instant::now(), Instant::now());
        });
    }

    /// Says that the view is visible up to this position.
    pub fn moved(&self, position: u64) {
        self.change(|leading| {
            if leading.position < Some(position) {
                (leading.position, leading.moved_at) = (Some(position), Instant::now());
            }
        });
    }

    /// Counts a batch that was written. `oldest` is when its oldest event was recorded.
    pub fn written(&self, events: u64, documents: usize, oldest: Option<Timestamp>) {
        self.events.inc_by(events);
        self.documents.inc_by(documents as u64);
        let Some(leading) = self.leading() else { return };
        // What was recorded before this replica led the view says nothing of its speed.
        if let Some(oldest) = oldest.filter(|oldest| *oldest >= leading.since) {
            self.visible.observe(age(oldest).as_secs_f64());
        }
    }

    /// Says whether the view fits the stream.
    pub fn compared(&self, fits: bool) {
        self.change(|leading| leading.fits = Some(fits));
    }

    pub fn failing(&self, reason: String) {
        self.change(|leading| leading.failing = Some(reason));
    }

    pub fn recovered(&self) {
        self.change(|leading| leading.failing = None);
    }

    /// Says how old the oldest event is that is not visible, if that is known, and computes the rate.
    pub fn observed(&self, lag: Option<f64>) {
        self.change(|leading| {
            let position = leading.position.unwrap_or_default();
            let seconds = leading.counted_at.elapsed().as_secs_f64().max(0.001);
            let rate = position.saturating_sub(leading.counted) as f64 / seconds;
            leading.events_per_second += RATE_WEIGHT * (rate - leading.events_per_second);
            (leading.counted, leading.counted_at) = (position, Instant::now());
            leading.lag = lag;
            if lag == Some(0.0) {
                // It waits for events, and does not stand still.
                leading.moved_at = Instant::now();
            }
        });
    }

    fn json(&self, metrics: &Metrics) -> Option<Value> {
        let leading = self.leading()?;
        let lag_events = leading.position.map(|position| metrics.lag_events(position));
        let state = match &leading {
            Leading { failing: Some(_), .. } => "failing",
            Leading { position: None, .. } => "catching_up",
            Leading { lag: Some(lag), .. } if *lag > CATCHING_UP_LAG.as_secs_f64() => "catching_up",
            Leading { .. } => "live",
        };
        Some(json!({
            "view": self.view, "generation": leading.generation, "version": self.version, "term": leading.term,
            "position": leading.position, "lag_events": lag_events, "lag_seconds": leading.lag.map(rounded),
            "events_per_second": rounded(leading.events_per_second), "state": state, "reason": leading.failing, "fits": leading.fits,
        }))
    }

    fn problem(&self, metrics: &Metrics) -> Option<Problem> {
        let Leading { position, moved_at, failing, .. } = self.leading()?;
        let at = position.map(|position| format!(" at position {position}")).unwrap_or_default();
        if let Some(reason) = failing {
            return Some(Problem::other(format!("the view {} stands still{at}: {reason}", self.view)));
        }
        let is_behind = position.is_none_or(|position| metrics.lag_events(position) > 0);
        (is_behind && moved_at.elapsed() > STANDING_STILL)
            .then(|| Problem::blocking(format!("the view {} stands still{at} for no known reason", self.view)))
    }

    fn change(&self, change: impl FnOnce(&mut Leading)) {
        if let Some(leading) = &mut *self.lock() {
            change(leading);
        }
    }

    /// A panic cannot poison the lock: no code that holds it can leave the data half changed.
    fn lock(&self) -> MutexGuard<'_, Option<Leading>> {
        self.leading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a generation while this replica builds it.
struct Build {
    /// What it is built for.
    state: &'static str,
    /// Why the build does not go on.
    failing: Option<String>,
    /// Its stored checkpoint; `None` until it is known.
    position: Option<u64>,
    events_per_second: Option<f64>,
}

/// This replica builds the generation while this exists.
pub struct BuildGuard(Arc<Metrics>, (&'static str, i32));

impl BuildGuard {
    /// Says why the build does not go on, or that it does.
    pub fn set_failing(&self, reason: Option<String>) {
        if let Some(build) = locked(&self.0.builds).get_mut(&self.1) {
            build.failing = reason;
        }
    }
}

impl Drop for BuildGuard {
    fn drop(&mut self) {
        locked(&self.0.builds).remove(&self.1);
    }
}

/// This replica leads the view, under this term, while this exists.
pub struct LeadingGuard(Arc<ViewMetrics>, i64);

impl Drop for LeadingGuard {
    fn drop(&mut self) {
        let mut leading = self.0.lock();
        // A task that is aborted may end only after the next one has begun.
        if leading.as_ref().is_some_and(|leading| leading.term == self.1) {
            *leading = None;
        }
    }
}
