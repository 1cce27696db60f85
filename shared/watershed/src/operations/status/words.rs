//! Numbers, durations and names as people read them.

use std::time::Duration;

/// `1,234,567`
pub fn number(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// `1 event`, `1,234 events`
pub fn events(count: u64) -> String {
    if count == 1 { "1 event".to_owned() } else { format!("{} events", number(count)) }
}

/// `0.3 s`, `12 s`, `5 min`, `3 h`, `2 d`
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        0 if duration.is_zero() => "0 s".to_owned(),
        0..10 if duration.subsec_millis() >= 50 => format!("{:.1} s", duration.as_secs_f64()),
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// `12.5`, `1,234`
pub fn rate(events_per_second: f64) -> String {
    if events_per_second < 100.0 {
        return format!("{events_per_second:.1}");
    }
    number(events_per_second.round() as u64)
}

/// A duration of so many seconds; zero if that is no duration.
pub fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// `a`, `a and b`, `a, b and c`
pub fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [only] => only.clone(),
        [others @ .., last] => format!("{} and {last}", others.join(", ")),
    }
}

/// A name in at most twelve characters. The end of a generated one tells replicas apart.
pub fn short(name: &str) -> String {
    let length = name.chars().count();
    if length <= 12 {
        return name.to_owned();
    }
    format!("…{}", name.chars().skip(length - 8).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_durations_are_readable() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(number), ["0", "999", "1,000", "1,234,567"]);
        let durations = [0, 40, 300, 9_949, 12_900, 119_000, 300_000, 7_200_000, 172_800_000];
        let shown = durations.map(|millis| duration(Duration::from_millis(millis)));
        assert_eq!(shown, ["0 s", "0 s", "0.3 s", "9.9 s", "12 s", "119 s", "5 min", "2 h", "2 d"]);
        assert_eq!([0.0, 12.46, 1234.5].map(rate), ["0.0", "12.5", "1,235"]);
        assert_eq!(short("0192d3a0-7c1e-7b5a-9f00-3c2b1a000001"), "…1a000001");
    }
}
