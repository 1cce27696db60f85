//! What is not as it should be, as sentences: each names who, what and how much.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    SERVICES,
    observer::Movement,
    parts::{JournalStatus, ObservedView, RelayStatus, ReplicaStatus, StreamStatus},
    replies::{Reply, State},
};
use crate::words::{duration, events, list, number, rate, seconds};

/// A view that is behind for longer is named. Its batch window is a tenth of a second.
const LATE: Duration = Duration::from_secs(5);
/// A lag that has grown for longer is named, if it is more than a moment's.
const RISING: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_secs(1);
/// A stream that stands still for longer behind the journal is named. The relay looks at the journal every second.
pub const RELAY_STUCK: Duration = Duration::from_secs(3);
/// A stream that is further behind is named.
const RELAY_BEHIND: u64 = 10_000;
/// A replica that has not answered for longer is named. One reply may have been late.
const SILENT: Duration = Duration::from_secs(3);
/// Several replicas may lead the same view while one takes over from the other, but not for longer.
const HANDOVER: Duration = Duration::from_secs(5);
/// The share of a limit from which on it is named.
const NEAR_LIMIT: f64 = 0.8;

/// Services of which no replica answers.
pub fn missing_services(answers: &[&ReplicaStatus], journal: &JournalStatus, views: &[ObservedView]) -> Vec<String> {
    if answers.is_empty() {
        return vec!["no replica of any service answers".to_owned()];
    }
    let is_missing = |service: &str| !answers.iter().any(|replica| replica.service == service);
    let mut problems = Vec::new();
    if is_missing("command") {
        problems.push(format!(
            "no replica of the command service answers: commands are not carried out, {}",
            match journal.position {
                Some(position) => format!("and the journal is at {} at least", number(position)),
                None => "and the journal's position is unknown".to_owned(),
            }
        ));
    }
    if is_missing("projection") {
        problems
            .push(format!("no replica of the projection service answers: the views stand still{}", standing(views)));
    }
    if is_missing("query") {
        problems.push("no replica of the query service answers: queries are not answered".to_owned());
    }
    problems
}

/// Where the views stand, and how far they are behind.
fn standing(views: &[ObservedView]) -> String {
    let positions = || views.iter().filter_map(|view| view.status.position);
    let (Some(lowest), Some(highest)) = (positions().min(), positions().max()) else { return String::new() };
    let lag = views.iter().filter_map(|view| view.status.lag_events).max().unwrap_or_default();
    let stuck = views.iter().filter_map(|view| view.movement.stuck).max().filter(|stuck| !stuck.is_zero());
    let range = lowest != highest;
    let at = if range { format!("{} to {}", number(lowest), number(highest)) } else { number(lowest) };
    if lag == 0 {
        return format!(" at {at}, and no event is waiting yet");
    }
    let up_to = if range { "up to " } else { "" };
    let for_time = stuck.map(|stuck| format!(" for {}", duration(stuck))).unwrap_or_default();
    format!(" at {at}, {up_to}{} behind{for_time}", events(lag))
}

/// Replicas of the same name. A name must be unique.
pub fn doubled_names(replies: &[Reply]) -> Vec<String> {
    let mut names = BTreeMap::new();
    for reply in replies {
        *names.entry((&reply.name, &reply.id)).or_insert(0) += 1;
    }
    let doubled = names.into_iter().filter(|(_, count)| *count > 1);
    doubled
        .map(|((service, name), count)| {
            format!("{count} {service} replicas have the name {name}, which must be unique")
        })
        .collect()
}

/// A replica that has answered before, and does not any more.
pub fn silence(replica: &ReplicaStatus) -> Option<String> {
    let silent = seconds(replica.silent_seconds);
    (silent >= SILENT).then(|| format!("{} has not answered for {}", title(replica), duration(silent)))
}

pub fn of_the_relay(
    answers: &[&ReplicaStatus],
    relay: &RelayStatus,
    stream: &StreamStatus,
    movement: &Movement,
    contested: Option<Duration>,
) -> Vec<String> {
    if !answers.iter().any(|replica| replica.service == "command" && replica.ready.is_some()) {
        return vec![];
    }
    let lag = stream.lag_events.unwrap_or_default();
    let at = stream.position.map(|position| format!(" at {}, {} behind the journal", number(position), events(lag)));
    let at = at.unwrap_or_default();
    let mut problems = Vec::new();
    match &relay.replicas[..] {
        [] => problems.push(format!("no replica of the command service runs the relay: the stream stands still{at}")),
        running => {
            let stuck = movement.stuck.unwrap_or_default();
            let who = format!("the relay ({})", list(running));
            if stuck >= RELAY_STUCK {
                problems.push(format!("{who} publishes nothing: the stream stands still{at}, for {}", duration(stuck)));
            } else if lag >= RELAY_BEHIND {
                problems.push(format!("{who} is late: the stream is{at}"));
            }
        }
    }
    if let Some(lasting) = contested.filter(|lasting| *lasting >= HANDOVER) {
        let running = list(&relay.replicas);
        problems
            .push(format!("the command replicas {running} all say that they run the relay, for {}", duration(lasting)));
    }
    problems
}

/// Views that query replicas cannot read, by reason. What the view's leader says is said there.
pub fn unreadable_views(answers: &[&ReplicaStatus]) -> Vec<String> {
    let views = |service| {
        let replicas = answers.iter().filter(move |replica| replica.service == service);
        replicas.flat_map(|replica| replica.figures.views.iter().map(move |view| (replica, view)))
    };
    let is_told = |name: &str, reason: &str| {
        views("projection")
            .any(|(_, led)| led.view == name && led.reason.as_deref().is_some_and(|it| it.contains(reason)))
    };
    let mut unreadable: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for (replica, view) in views("query") {
        let Some(reason) = view.reason.as_deref().filter(|reason| !is_told(&view.view, reason)) else { continue };
        unreadable.entry((&view.view, reason)).or_default().push(replica.replica.clone());
    }
    let sentence = |((view, reason), replicas): ((&str, &str), Vec<String>)| {
        let who = if replicas.len() == 1 { "query replica" } else { "the query replicas" };
        format!("the view {view} cannot be read by {who} {}: {reason}", list(&replicas))
    };
    unreadable.into_iter().map(sentence).collect()
}

pub fn of_the_views(answers: &[&ReplicaStatus], stream: &StreamStatus, views: &[ObservedView]) -> Vec<String> {
    // Without a projection replica, one sentence says it of all views.
    if !answers.iter().any(|replica| replica.service == "projection") {
        return vec![];
    }
    views.iter().flat_map(|view| [trouble(view, stream), contest(view)]).flatten().collect()
}

fn trouble(ObservedView { status, movement, .. }: &ObservedView, stream: &StreamStatus) -> Option<String> {
    let name = status.title();
    let position = status.position.map_or_else(|| "an unknown position".to_owned(), number);
    let lag = status.lag_events.unwrap_or_default();
    // Why it cannot be read is said by those who cannot read it.
    if status.state == State::Unserved {
        return None;
    }
    let Some(leader) = &status.leader else {
        let stuck = movement.stuck.filter(|stuck| !stuck.is_zero());
        let for_time = stuck.map(|stuck| format!(" for {}", duration(stuck))).unwrap_or_default();
        return Some(format!(
            "no projection replica leads the view {name}: it stands still at {position}, {} behind{for_time}",
            events(lag)
        ));
    };
    if status.state == State::Failing {
        let reason = status.reason.as_deref().unwrap_or("it does not say why");
        return Some(format!("the view {name} fails at {position} (projection replica {leader}): {reason}"));
    }
    // What the relay has not published yet is not the view's fault.
    if status.position >= stream.position {
        return None;
    }
    let age = seconds(status.lag_seconds.unwrap_or_default());
    let rising = movement.rising.filter(|(_, lasting)| *lasting >= RISING && age >= MOMENT);
    if age < LATE && rising.is_none() {
        return None;
    }
    let speed = status.events_per_second.map(|speed| format!(" at {} events/s", rate(speed))).unwrap_or_default();
    let tail = match rising {
        Some((from, lasting)) => format!(", and more and more: {} ago it was {}", duration(lasting), events(from)),
        None if status.state == State::CatchingUp => format!(", and is catching up{speed}"),
        None => String::new(),
    };
    Some(format!(
        "the view {name} is {} behind, the oldest for {}{tail} (projection replica {leader})",
        events(lag),
        duration(age)
    ))
}

fn contest(ObservedView { status, leaders, contested, .. }: &ObservedView) -> Option<String> {
    let lasting = contested.filter(|lasting| *lasting >= HANDOVER)?;
    let (leaders, name) = (list(leaders), status.title());
    Some(format!("the projection replicas {leaders} all say that they lead the view {name}, for {}", duration(lasting)))
}

/// What a replica says of itself, and limits that it is near.
pub fn of_a_replica(replica: &ReplicaStatus) -> Vec<String> {
    let title = title(replica);
    let figures = &replica.figures;
    if let Some(error) = &replica.unreadable {
        return vec![format!("the figures of {title} cannot be read by this version of `watershed`: {error}")];
    }
    let mut own = figures.problems.clone();
    if figures.problems.is_empty() {
        let away = figures.servers.iter().filter(|(_, server)| !server.up);
        own.extend(away.map(|(name, _)| format!("{} is away", server_name(name))));
    }
    // Why a view fails is said of the view.
    let reasons: Vec<&String> = figures.views.iter().filter_map(|view| view.reason.as_ref()).collect();
    own.retain(|problem| !reasons.iter().any(|reason| problem.contains(*reason)));
    let own = own.join("; ");
    let mut problems = match (figures.ready, own.is_empty()) {
        (Some(false), true) => vec![format!("{title} is not ready")],
        (Some(false), false) => vec![format!("{title} is not ready: {own}")],
        (_, true) => vec![],
        (_, false) => vec![format!("{title}: {own}")],
    };
    let mut limits = Vec::new();
    if let Some(queue) = &figures.queue {
        limits.push((queue.commands, queue.max_commands, "commands wait"));
        limits.push((queue.bytes, queue.max_bytes, "bytes of commands wait"));
    }
    if let (Some(in_flight), Some(max)) = (figures.in_flight, figures.max_in_flight) {
        limits.push((in_flight, max, "queries are in flight"));
    }
    for (count, max, what) in limits {
        if max > 0 && count as f64 >= NEAR_LIMIT * max as f64 {
            let (count, max) = (number(count), number(max));
            problems
                .push(format!("{title} is near its limit: {count} of {max} {what}; more are refused with overloaded"));
        }
    }
    problems
}

/// Replicas that were built from different revisions, as during an update.
pub fn different_revisions(answers: &[&ReplicaStatus]) -> Vec<String> {
    let mut revisions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for replica in answers {
        revisions.entry(&replica.revision).or_default().push(title(replica));
    }
    if revisions.len() < 2 {
        return vec![];
    }
    let groups: Vec<String> = revisions
        .into_iter()
        .map(|(revision, replicas)| {
            format!("{} ({})", if revision.is_empty() { "unknown" } else { revision }, replicas.join(", "))
        })
        .collect();
    vec![format!("the replicas are of different revisions: {}", groups.join("; "))]
}

/// A replica that tells nothing about itself.
pub fn without_figures(replica: &ReplicaStatus) -> Option<String> {
    let is_silent = replica.data.is_null() && replica.answers();
    is_silent.then(|| format!("{} tells no figures: it is older than this program", title(replica)))
}

/// What else is on this NATS server, for somebody who has asked for the wrong installation.
pub fn other_installations(others: &[Reply]) -> Vec<String> {
    let installations: BTreeSet<String> = others
        .iter()
        .filter_map(|reply| {
            let stream = reply.metadata.stream.as_deref()?;
            let prefix = reply.metadata.prefix.as_deref().filter(|prefix| !prefix.is_empty());
            Some(match prefix {
                Some(prefix) => format!("--stream {stream} --subject-prefix {prefix}"),
                None => format!("--stream {stream}"),
            })
        })
        .collect();
    let mut hints = Vec::new();
    if !installations.is_empty() {
        let installations = list(&Vec::from_iter(installations));
        hints.push(format!("there are other installations on this server: {installations}"));
    }
    let is_mute = |reply: &&Reply| SERVICES.contains(&&*reply.name) && reply.metadata.stream.is_none();
    match others.iter().filter(is_mute).count() {
        0 => {}
        1 => hints
            .push("1 replica does not say which installation it belongs to: it is older than this program".to_owned()),
        mute => hints.push(format!(
            "{mute} replicas do not say which installation they belong to: they are older than this program"
        )),
    }
    hints
}

/// `command replica c1`
fn title(replica: &ReplicaStatus) -> String {
    format!("{} replica {}", replica.service, replica.replica)
}

fn server_name(name: &str) -> &str {
    match name {
        "nats" => "NATS",
        "postgres" => "PostgreSQL",
        "mongodb" => "MongoDB",
        other => other,
    }
}
