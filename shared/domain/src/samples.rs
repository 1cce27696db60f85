//! What the samples of all aggregates lead to, for the tests of everything that is built on aggregates: views,
//! services.

use crate::{Aggregates, CommandType, Recorded, Sample, Timestamp, commands, sample_lists};

/// The moment at which all samples happen.
const MOMENT: &str = "2026-01-31T09:30:00Z";

/// The samples of all aggregates in the order of the list, each with the command that it is a request for.
///
/// # Panics
/// If an aggregate has a sample for a verb that none of its commands has.
pub fn samples() -> impl Iterator<Item = (&'static CommandType, &'static Sample)> {
    sample_lists().into_iter().flat_map(|(kind, samples)| {
        samples.iter().map(move |sample| {
            let known = commands().find(|known| (known.aggregate, known.verb) == (kind, sample.verb));
            (known.unwrap_or_else(|| panic!("SAMPLES of `{kind}`: there is no command `{}`", sample.verb)), sample)
        })
    })
}

/// The events that the samples lead to, at positions from 1 on.
///
/// # Panics
/// If a sample is not what it says: accepted, or refused with its code.
pub fn sample_events() -> Vec<Recorded> {
    let now: Timestamp = MOMENT.parse().unwrap_or_default();
    let mut aggregates = Aggregates::default();
    let mut events = Vec::new();
    for (known, sample) in samples() {
        let name = format!("SAMPLES of `{}`: {} {}", known.aggregate, sample.verb, sample.request);
        let command = (known.parse)(sample.request.as_bytes(), crate::Id::default())
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
