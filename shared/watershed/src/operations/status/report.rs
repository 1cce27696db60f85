//! How an installation is doing, from what its replicas say. Invariant: no single replica's answer is needed. A view is
//! known if anybody names it, and the head of the journal is the highest position that anybody has seen.

use std::{collections::BTreeMap, time::Duration};

use domain::Timestamp;
use serde::Serialize;

use super::{
    observer::{Movement, Observer},
    parts::{BuildStatus, JournalStatus, ObservedView, RelayStatus, ReplicaStatus, StreamStatus, ViewStatus},
    problems,
    replies::{Reply, State, View},
};

#[derive(Debug, Serialize)]
pub struct Report {
    /// What is not as it should be, in words; the causes before what follows from them.
    pub problems: Vec<String>,
    /// What is worth knowing, but is not wrong.
    pub hints: Vec<String>,
    pub journal: JournalStatus,
    pub relay: RelayStatus,
    pub stream: StreamStatus,
    pub views: Vec<ViewStatus>,
    /// The generations that are being built.
    pub builds: Vec<BuildStatus>,
    pub replicas: Vec<ReplicaStatus>,
    /// Whether a further look, soon, will tell more.
    #[serde(skip)]
    pub is_open: bool,
}

/// One set of replies, and when they came.
pub struct Look {
    /// Since the first look.
    pub elapsed: Duration,
    pub at: Timestamp,
    pub replies: Vec<Reply>,
}

/// The installation whose replicas count.
pub struct Scope {
    pub stream: String,
    pub prefix: String,
}

impl Scope {
    /// Whether the replica belongs to this installation.
    pub fn has(&self, reply: &Reply) -> bool {
        let metadata = &reply.metadata;
        let prefix = metadata.prefix.as_deref().unwrap_or_default();
        metadata.stream.as_deref() == Some(&self.stream) && prefix == self.prefix
    }
}

impl Report {
    /// What the replies say, together with those before.
    pub fn new(scope: &Scope, observer: &mut Observer, look: Look) -> Self {
        let Look { elapsed: now, at, replies } = look;
        let (own, others): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| scope.has(reply));
        let doubled = problems::doubled_names(&own);
        let replicas = observer.replicas(now, own);
        let replicas: Vec<ReplicaStatus> = replicas.iter().map(|seen| ReplicaStatus::new(seen, at)).collect();
        let answers: Vec<&ReplicaStatus> = replicas.iter().filter(|replica| replica.answers()).collect();

        let (journal, stream, movement) = positions(scope, observer, now, &answers);
        let relay = RelayStatus { replicas: names(answers.iter().filter(|replica| replica.figures.relay)) };
        let contested = observer.holds(now, "relay", relay.replicas.len() > 1);
        let views = views(observer, now, &answers, journal.position);

        let problems = [
            problems::missing_services(&answers, &journal, &views),
            doubled,
            replicas.iter().filter_map(problems::silence).collect(),
            problems::of_the_relay(&answers, &relay, &stream, &movement, contested),
            problems::unreadable_views(&answers),
            problems::of_the_views(&answers, &stream, &views),
            answers.iter().flat_map(|replica| problems::of_a_replica(replica)).collect(),
        ];
        let hints = [
            if answers.is_empty() { problems::other_installations(&others) } else { vec![] },
            problems::different_revisions(&answers),
            answers.iter().filter_map(|replica| problems::without_figures(replica)).collect(),
        ];
        Self {
            problems: problems.concat(),
            hints: hints.concat(),
            is_open: movement.may_be_stuck && movement.stuck < Some(problems::RELAY_STUCK),
            builds: builds(&answers, stream.position),
            journal,
            relay,
            stream,
            views: views.into_iter().map(|view| view.status).collect(),
            replicas,
        }
    }

    /// Whether no replica answers at all.
    pub fn is_unanswered(&self) -> bool {
        !self.replicas.iter().any(ReplicaStatus::answers)
    }
}

/// The journal, the stream, and how the stream follows the journal.
fn positions(
    scope: &Scope,
    observer: &mut Observer,
    now: Duration,
    answers: &[&ReplicaStatus],
) -> (JournalStatus, StreamStatus, Movement) {
    let figures = || answers.iter().map(|replica| &replica.figures);
    let journal = figures().filter_map(|it| it.journal.position).max();
    let stream = figures().filter_map(|it| it.stream.position).max();
    let views = figures().flat_map(|it| &it.views).filter_map(|view| view.position).max();
    let head = journal.max(stream).max(views);
    let journal = JournalStatus {
        position: head,
        is_known: journal.is_some(),
        events_per_second: head.and_then(|head| observer.movement(now, "journal", head, 0).events_per_second),
    };
    let lag = head.zip(stream).map(|(head, stream)| head.saturating_sub(stream));
    let movement = stream.zip(lag).map(|(stream, lag)| observer.movement(now, "stream", stream, lag));
    let movement = movement.unwrap_or_default();
    let stream = StreamStatus {
        name: scope.stream.clone(),
        prefix: scope.prefix.clone(),
        position: stream,
        lag_events: lag,
        events_per_second: movement.events_per_second,
    };
    (journal, stream, movement)
}

/// All views that anybody names, by name and generation.
fn views(observer: &mut Observer, now: Duration, answers: &[&ReplicaStatus], head: Option<u64>) -> Vec<ObservedView> {
    let replies = || answers.iter().flat_map(|replica| replica.figures.views.iter().map(move |view| (*replica, view)));
    let mut latest: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, view) in replies() {
        let generation = latest.entry(&view.view).or_default();
        *generation = view.generation.unwrap_or_default().max(*generation);
    }
    let mut named: BTreeMap<(&str, u64), Vec<(&ReplicaStatus, &View)>> = BTreeMap::new();
    for (replica, view) in replies() {
        // A replica that has just become the leader has not read the generation yet. Others may have none to read.
        let generation = view.generation.filter(|number| *number > 0).unwrap_or(latest[&*view.view]);
        named.entry((&view.view, generation)).or_default().push((replica, view));
    }
    let views = named.into_iter().map(|((view, generation), replies)| {
        let mut leading: Vec<_> = replies.iter().filter(|(replica, _)| replica.service == "projection").collect();
        leading.sort_by_key(|(_, view)| view.term);
        let leader = leading.last().map(|(replica, view)| (&replica.replica, *view));
        let seen = replies.iter().filter_map(|(_, view)| view.position).max();
        let position = leader.and_then(|(_, led)| led.position).or(seen);
        let lag = head.zip(position).map(|(head, position)| head.saturating_sub(position));
        let what = format!("view {view}@{generation}");
        let movement = position.zip(lag).map(|(position, lag)| observer.movement(now, &what, position, lag));
        let movement = movement.unwrap_or_default();
        // Where nobody tells the age of what is not yet visible, it is at least as old as it has been seen here.
        let seen = movement.stuck.filter(|stuck| !stuck.is_zero()).map(|stuck| stuck.as_secs_f64());
        let told = leader.and_then(|(_, led)| led.lag_seconds);
        let lag_seconds = told.or(if lag == Some(0) { Some(0.0) } else { seen });
        let status = ViewStatus {
            view: view.to_owned(),
            generation,
            version: leader.and_then(|(_, led)| led.version),
            position,
            lag_events: lag,
            lag_seconds,
            events_per_second: leader.and_then(|(_, led)| led.events_per_second).or(movement.events_per_second),
            leader: leader.map(|(replica, _)| replica.clone()),
            term: leader.and_then(|(_, led)| led.term),
            state: match leader {
                Some((_, led)) => led.state,
                None if generation == 0 => State::Unserved,
                None => State::Abandoned,
            },
            reason: leader.and_then(|(_, led)| led.reason.clone()),
        };
        let leaders: Vec<String> = leading.iter().map(|(replica, _)| replica.replica.clone()).collect();
        let contested = observer.holds(now, &what, leaders.len() > 1);
        ObservedView { status, movement, leaders, contested }
    });
    views.collect()
}

/// All generations that are being built, by name.
fn builds(answers: &[&ReplicaStatus], stream: Option<u64>) -> Vec<BuildStatus> {
    let of = |replica: &&ReplicaStatus| {
        let leader = replica.replica.clone();
        let builds = replica.figures.builds.clone().into_iter();
        builds.map(move |build| {
            let events_left = stream.zip(build.position).map(|(stream, position)| stream.saturating_sub(position));
            let rate = build.events_per_second.filter(|rate| *rate > 0.0);
            BuildStatus {
                view: build.view,
                generation: build.generation,
                state: build.state,
                position: build.position,
                events_left,
                events_per_second: build.events_per_second,
                seconds_left: events_left.zip(rate).map(|(events, rate)| events as f64 / rate),
                leader: leader.clone(),
                reason: build.reason,
            }
        })
    };
    let mut builds: Vec<_> = answers.iter().flat_map(of).collect();
    builds.sort_by(|one, other| (&one.view, one.generation).cmp(&(&other.view, other.generation)));
    builds
}

fn names<'a>(replicas: impl Iterator<Item = &'a &'a ReplicaStatus>) -> Vec<String> {
    replicas.map(|replica| replica.replica.clone()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{Watched, healthy, led, query, reply, report};

    #[test]
    fn a_healthy_installation_has_no_problem() {
        let report = report(&healthy());
        assert_eq!((&report.problems[..], &report.hints[..]), (&[][..], &[][..]));
        assert_eq!(report.journal.position, Some(1042));
        assert_eq!(report.relay.replicas, ["c1"]);
        assert_eq!((report.stream.position, report.stream.lag_events), (Some(1042), Some(0)));
        let views: Vec<_> = report.views.iter().map(|it| (&*it.view, it.lag_seconds, it.leader.as_deref())).collect();
        assert_eq!(views, [("orders", Some(0.0), Some("p1")), ("users", Some(0.0), Some("p1"))]);
        assert!(!report.is_open && !report.is_unanswered());
    }

    #[test]
    fn only_replicas_of_the_own_installation_count() {
        let mut other = healthy();
        for reply in &mut other {
            reply["metadata"]["prefix"] = "t1".into();
        }
        let mut all = healthy();
        all.extend(other.clone());
        all.push(json!({"name": "somebody-s", "id": "x1", "version": "1.0.0", "endpoints": []}));
        assert_eq!(report(&all).replicas.len(), 3);
        let report = report(&other);
        assert!(report.is_unanswered());
        assert_eq!(report.problems, ["no replica of any service answers"]);
        let hint = "there are other installations on this server: --stream EVENTS --subject-prefix t1";
        assert_eq!(report.hints, [hint]);
        for reply in &mut other {
            reply["metadata"] = json!({"replica": "r1", "revision": "d80c91b0a1b2"});
        }
        let hint = "3 replicas do not say which installation they belong to: they are older than this program";
        assert_eq!(Watched::default().after(0, &other).hints, [hint]);
    }

    #[test]
    fn without_a_projection_replica_the_views_stand_still() {
        let mut replies = healthy();
        replies[1] = query("q2", 1000, 1042);
        replies[2] = query("q1", 1000, 1040);
        let mut watched = Watched::default();
        let first = watched.after(0, &replies);
        assert_eq!(
            first.problems,
            [
                "no replica of the projection service answers: the views stand still at 1,000 to 1,042, up to 42 events behind"
            ]
        );
        let [orders, users] = &first.views[..] else { panic!("two views") };
        assert_eq!((orders.position, orders.lag_events, orders.lag_seconds), (Some(1000), Some(42), None));
        assert_eq!((users.position, users.lag_seconds), (Some(1042), Some(0.0)));
        let later = watched.after(6, &replies);
        assert_eq!(later.views[0].lag_seconds, Some(6.0), "seen to stand still");
        assert!(later.problems[0].ends_with("up to 42 events behind for 6 s"), "{:?}", later.problems);
    }

    #[test]
    fn a_view_that_nobody_leads_is_named() {
        let mut replies = healthy();
        replies[1]["data"]["views"] = json!([led("users", 1, 1042, 0.0)]);
        replies[2] = query("q1", 1041, 1042);
        let report = report(&replies);
        assert_eq!(
            report.problems,
            ["no projection replica leads the view orders: it stands still at 1,041, 1 event behind"]
        );
    }

    #[test]
    fn a_view_that_fails_is_named_with_the_reason() {
        let mut replies = healthy();
        let view = &mut replies[1]["data"]["views"][0];
        view["state"] = "failing".into();
        view["reason"] = "the event order.gifted is unknown".into();
        view["position"] = 1040.into();
        let report = report(&replies);
        assert_eq!(
            report.problems,
            ["the view orders fails at 1,040 (projection replica p1): the event order.gifted is unknown"]
        );
    }

    #[test]
    fn what_a_view_s_leader_says_of_a_failure_is_said_once() {
        let mut replies = healthy();
        replies[1]["data"]["views"][0]["state"] = "failing".into();
        replies[1]["data"]["views"][0]["reason"] = "the event is unknown".into();
        replies[1]["data"]["problems"] = json!(["the view orders stands still at position 1042: the event is unknown"]);
        assert_eq!(
            report(&replies).problems,
            ["the view orders fails at 1,042 (projection replica p1): the event is unknown"]
        );
    }

    #[test]
    fn a_leader_that_has_not_read_its_view_yet_leads_it_all_the_same() {
        let mut replies = healthy();
        let view = &mut replies[1]["data"]["views"][0];
        view["generation"] = 0.into();
        view["position"] = json!(null);
        let report = report(&replies);
        assert_eq!(report.problems, [""; 0]);
        let orders = &report.views[0];
        assert_eq!((orders.generation, orders.position, orders.leader.as_deref()), (1, Some(1042), Some("p1")));
    }

    #[test]
    fn a_view_that_no_generation_serves_is_named_with_the_reason_and_its_build_is_shown() {
        let reason = "version 2 of it, which this program reads, is being built";
        let unserved = json!({"view": "orders", "generation": null, "position": null, "reason": reason});
        let mut replies = healthy();
        for (name, replica) in [("q1", 2), ("q2", 3)] {
            let mut reply = query(name, 1042, 1042);
            reply["data"]["views"][0] = unserved.clone();
            reply["data"]["ready"] = false.into();
            reply["data"]["problems"] = json!([format!("the view orders cannot be read: {reason}")]);
            replies.truncate(replica);
            replies.push(reply);
        }
        replies[1]["data"]["views"] = json!([led("users", 1, 1042, 0.0)]);
        replies[1]["data"]["builds"] = json!([
            {"view": "orders", "generation": 1, "state": "building", "position": 542, "events_per_second": 50.0},
        ]);
        let seen = report(&replies);
        assert_eq!(
            seen.problems,
            [
                "the view orders cannot be read by the query replicas q1 and q2: version 2 of it, which this program reads, \
                 is being built",
                "query replica q1 is not ready",
                "query replica q2 is not ready",
            ]
        );
        assert_eq!((seen.views[0].generation, seen.views[0].state), (0, super::State::Unserved));
        let [build] = &seen.builds[..] else { panic!("one build") };
        assert_eq!((build.events_left, build.seconds_left, &*build.leader), (Some(500), Some(10.0), "p1"));

        // While replicas of another version answer queries, that version's generation is shown as ever.
        replies[3] = query("q2", 1042, 1042);
        replies[1]["data"]["views"] = json!([led("orders", 3, 1042, 0.0), led("users", 1, 1042, 0.0)]);
        let seen = report(&replies);
        assert_eq!((seen.views[0].generation, seen.views[0].state), (1, super::State::Live));
        assert_eq!(seen.problems[0], format!("the view orders cannot be read by query replica q1: {reason}"));
    }

    #[test]
    fn the_problem_of_a_generation_is_said_once() {
        let mut replies = healthy();
        let reason = "the collection orders@1 was dropped";
        replies[1]["data"]["views"][0]["state"] = "failing".into();
        replies[1]["data"]["views"][0]["reason"] = reason.into();
        replies[2]["data"]["views"][0] =
            json!({"view": "orders", "generation": null, "position": null, "reason": reason});
        let problems = report(&replies).problems;
        assert_eq!(problems, [format!("the view orders fails at 1,042 (projection replica p1): {reason}")]);
    }

    #[test]
    fn a_view_that_is_late_is_named_and_one_that_is_a_moment_behind_is_not() {
        let mut replies = healthy();
        replies[1]["data"]["views"] = json!([led("orders", 3, 42, 12.0), led("users", 1, 1000, 0.4)]);
        assert_eq!(
            report(&replies).problems,
            ["the view orders is 1,000 events behind, the oldest for 12 s (projection replica p1)"]
        );
        replies[1]["data"]["views"][0]["state"] = "catching_up".into();
        assert_eq!(
            report(&replies).problems,
            [
                "the view orders is 1,000 events behind, the oldest for 12 s, and is catching up at 12.5 events/s (projection replica p1)"
            ]
        );
    }

    #[test]
    fn a_lag_that_rises_is_named_before_it_is_long() {
        let mut watched = Watched::default();
        let mut replies = healthy();
        for (position, problems) in [(1000, 0), (990, 0), (980, 0), (970, 1)] {
            replies[1]["data"]["views"] = json!([led("orders", 3, position, 2.0), led("users", 1, 1042, 0.0)]);
            let report = watched.after(2, &replies);
            assert_eq!(report.problems.len(), problems, "{:?}", report.problems);
            if problems > 0 {
                let expected = "the view orders is 72 events behind, the oldest for 2.0 s, and more and more: 6.0 s ago \
                    it was 42 events (projection replica p1)";
                assert_eq!(report.problems, [expected.replace(".0 s", " s")]);
            }
        }
    }

    #[test]
    fn without_a_command_replica_the_journal_is_unknown() {
        let replies = &healthy()[1..];
        let report = report(replies);
        assert_eq!(
            report.problems,
            [
                "no replica of the command service answers: commands are not carried out, and the journal is at 1,042 at least"
            ]
        );
        assert_eq!((report.journal.position, report.journal.is_known), (Some(1042), false));
    }

    #[test]
    fn nobody_runs_the_relay() {
        let mut replies = healthy();
        replies[0]["data"]["relay"] = false.into();
        replies[0]["data"]["journal"] = json!({"position": 1100});
        assert_eq!(
            report(&replies).problems,
            [
                "no replica of the command service runs the relay: the stream stands still at 1,042, 58 events behind the journal"
            ]
        );
    }

    #[test]
    fn a_relay_that_is_behind_is_named_if_it_stands_still_or_is_far_behind() {
        let mut replies = healthy();
        let mut watched = Watched::default();
        replies[0]["data"]["journal"] = json!({"position": 1100});
        let first = watched.after(0, &replies);
        assert_eq!(first.problems, [""; 0]);
        assert!(first.is_open, "one look does not tell whether it moves");
        assert!(watched.after(1, &replies).is_open);
        let later = watched.after(2, &replies);
        assert!(!later.is_open);
        assert_eq!(
            later.problems,
            [
                "the relay (c1) publishes nothing: the stream stands still at 1,042, 58 events behind the journal, for 3 s"
            ]
        );
        replies[0]["data"]["stream"] = json!({"position": 1090});
        let moves = watched.after(1, &replies);
        assert!(moves.problems.is_empty() && !moves.is_open, "{:?}", moves.problems);
        replies[0]["data"]["journal"] = json!({"position": 50_000});
        assert_eq!(
            watched.after(1, &replies).problems,
            ["the relay (c1) is late: the stream is at 1,090, 48,910 events behind the journal"]
        );
    }

    #[test]
    fn two_replicas_may_claim_the_same_for_a_moment_but_not_for_long() {
        let mut replies = healthy();
        let mut second = replies[0].clone();
        second["id"] = "c2".into();
        let mut other = replies[1].clone();
        other["id"] = "p2".into();
        other["data"]["views"] = json!([led("orders", 4, 1042, 0.0)]);
        replies.extend([second, other]);
        let mut watched = Watched::default();
        for seconds in [0, 2] {
            let report = watched.after(seconds, &replies);
            assert_eq!(report.problems, [""; 0]);
            assert_eq!((report.views[0].leader.as_deref(), report.views[0].term), (Some("p2"), Some(4)));
        }
        assert_eq!(
            watched.after(4, &replies).problems,
            [
                "the command replicas c1 and c2 all say that they run the relay, for 6 s",
                "the projection replicas p1 and p2 all say that they lead the view orders, for 6 s",
            ]
        );
        assert_eq!(watched.after(2, &healthy()).problems, [""; 0]);
    }

    #[test]
    fn a_replica_that_is_not_ready_says_why() {
        let mut replies = healthy();
        replies[0]["data"]["ready"] = false.into();
        replies[0]["data"]["problems"] = json!(["PostgreSQL does not answer"]);
        replies[1]["data"]["servers"]["mongodb"]["up"] = false.into();
        replies[2]["data"]["ready"] = false.into();
        assert_eq!(
            report(&replies).problems,
            [
                "command replica c1 is not ready: PostgreSQL does not answer",
                "projection replica p1: MongoDB is away",
                "query replica q1 is not ready",
            ]
        );
    }

    #[test]
    fn a_replica_that_falls_silent_is_named() {
        let mut replies = healthy();
        replies.push(query("q2", 1042, 1042));
        let mut watched = Watched::default();
        watched.after(0, &replies);
        assert_eq!(watched.after(2, &healthy()).problems, [""; 0], "one reply may be late");
        let report = watched.after(4, &healthy());
        assert_eq!(report.problems, ["query replica q2 has not answered for 6 s"]);
        assert_eq!(report.replicas.len(), 4);
        assert_eq!(watched.after(1, &replies).problems, [""; 0]);
        assert_eq!(watched.after(2000, &healthy()).problems, [""; 0], "it was removed");
    }

    #[test]
    fn replicas_of_different_revisions_are_a_hint() {
        let mut replies = healthy();
        replies[2]["metadata"]["revision"] = "ffffffffffff".into();
        let report = report(&replies);
        assert_eq!(report.problems, [""; 0]);
        let hint = "the replicas are of different revisions: d80c91b0a1b2 (command replica c1, projection replica p1); \
            ffffffffffff (query replica q1)";
        assert_eq!(report.hints, [hint]);
    }

    #[test]
    fn what_is_near_its_limit_is_named() {
        let mut replies = healthy();
        replies[0]["data"]["queue"]["commands"] = 7000.into();
        replies[2]["data"]["in_flight"] = 4096.into();
        assert_eq!(
            report(&replies).problems,
            [
                "command replica c1 is near its limit: 7,000 of 8,192 commands wait; more are refused with overloaded",
                "query replica q1 is near its limit: 4,096 of 4,096 queries are in flight; more are refused with overloaded",
            ]
        );
    }

    #[test]
    fn replicas_of_other_versions_count_as_far_as_they_can_be_read() {
        let mut replies = healthy();
        replies.push(reply("command", "c2", json!(null)));
        replies.push(reply("command", "c3", json!({"ready": true, "queue": "full"})));
        replies.push(reply("audit", "a1", json!({"ready": true, "something": "new"})));
        replies[1]["data"]["views"][0]["state"] = "resting".into();
        let report = report(&replies);
        assert_eq!(report.hints, ["command replica c2 tells no figures: it is older than this program"]);
        let [problem] = &report.problems[..] else { panic!("{:?}", report.problems) };
        assert!(problem.starts_with("the figures of command replica c3 cannot be read by this version"), "{problem}");
        assert_eq!(report.replicas.len(), 6);
    }

    #[test]
    fn two_replicas_of_one_name_are_named() {
        let mut replies = healthy();
        replies.push(replies[0].clone());
        assert_eq!(report(&replies).problems, ["2 command replicas have the name c1, which must be unique"]);
    }
}
