//! The samples of all aggregates and the events that they lead to, for the tests of views and services.

use crate::{Aggregates, CommandType, Recorded, Sample, Timestamp, commands, sample_lists};

/// The time at which all samples are executed.
const NOW: &str = "2026-01-31T09:30:00Z";

/// The samples of all aggregates, in the order of the list, each with its command.
///
/// # Panics
/// If there is no command for the verb of a sample.
pub fn samples() -> impl Iterator<Item = (&'static CommandType, &'static Sample)> {
    sample_lists().into_iter().flat_map(|(kind, samples)| {
        samples.iter().map(move |sample| {
            let command_type =
                commands().find(|command_type| (command_type.aggregate, command_type.verb) == (kind, sample.verb));
            (
                command_type.unwrap_or_else(|| panic!("SAMPLES of `{kind}`: there is no command `{}`", sample.verb)),
                sample,
            )
        })
    })
}

/// The events that the samples lead to, with positions from 1.
///
/// # Panics
/// If a sample does not have the outcome that it declares.
pub fn sample_events() -> Vec<Recorded> {
    let now: Timestamp = NOW.parse().unwrap_or_default();
    let mut aggregates = Aggregates::default();
    let mut events = Vec::new();
    for (command_type, sample) in samples() {
        let name = format!("SAMPLES of `{}`: {} {}", command_type.aggregate, sample.verb, sample.request);
        let command = (command_type.parse)(sample.request.as_bytes(), crate::Id::default())
            .unwrap_or_else(|malformed| panic!("{name}: {malformed}"));
        let result = aggregates.execute(command, None, now);
        assert_eq!(result.as_ref().err().map(|rejection| rejection.code), sample.refused, "{name}");
        events.extend(result.unwrap_or_default());
    }
    for (position, event) in (1..).zip(&mut events) {
        event.position = position;
    }
    events
}
