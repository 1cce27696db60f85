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

/// `42 %`; rounded down, so that it is 100 only at the end.
pub fn percent(done: u64, total: u64) -> String {
    format!("{} %", if total == 0 { 100 } else { u128::from(done.min(total)) * 100 / u128::from(total) })
}

/// `512 B`, `1.5 MB`
pub fn bytes(bytes: u64) -> String {
    let (mut size, mut unit) = (bytes as f64, "B");
    for larger in ["kB", "MB", "GB", "TB"] {
        if size < 999.5 {
            break;
        }
        (size, unit) = (size / 1_000.0, larger);
    }
    if unit == "B" || size >= 99.95 { format!("{size:.0} {unit}") } else { format!("{size:.1} {unit}") }
}

/// `1 document`, `1,234 documents`
pub fn documents(count: u64) -> String {
    if count == 1 { "1 document".to_owned() } else { format!("{} documents", number(count)) }
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
        assert_eq!(
            [(0, 7), (6_999, 7_000), (7, 7), (0, 0)].map(|(done, all)| percent(done, all)),
            ["0 %", "99 %", "100 %", "100 %"]
        );
        let sizes = [0, 999, 1_000, 99_900, 123_456, 999_700, 1_234_567_890];
        assert_eq!(sizes.map(bytes), ["0 B", "999 B", "1.0 kB", "99.9 kB", "123 kB", "1.0 MB", "1.2 GB"]);
        assert_eq!([1, 2_000].map(documents), ["1 document", "2,000 documents"]);
        assert_eq!(short("0192d3a0-7c1e-7b5a-9f00-3c2b1a000001"), "…1a000001");
    }
}
