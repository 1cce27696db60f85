//! The figures of this process, under the names that Prometheus' own client libraries use. Read from `/proc`; where
//! there is none, they are left out.

use std::fs;

use crate::figures::Figures;

/// Clock ticks per second in `/proc/*/stat`, which Linux fixes at 100 for all programs (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Bytes of a memory page on all machines that the project is built for.
const PAGE: f64 = 4096.0;

pub fn figures(figures: &mut Figures) {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().and_then(|text| Stat::parse(&text)) {
        figures.counter("process_cpu_seconds", "Processor time of the process", &[], stat.cpu_seconds);
        figures.gauge("process_resident_memory_bytes", "Resident memory of the process", &[], stat.resident_bytes);
        figures.gauge("process_threads", "Threads of the process", &[], stat.threads);
        if let Some(boot) = boot_seconds() {
            let start = boot + stat.start_seconds;
            figures.gauge("process_start_time_seconds", "When the process started, as Unix time", &[], start);
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        figures.gauge("process_open_fds", "Open file descriptors", &[], open.count() as f64);
    }
    if let Some(limit) = file_limit() {
        figures.gauge("process_max_fds", "The largest number of open file descriptors", &[], limit);
    }
}

/// Fields of `/proc/self/stat`, see proc(5).
struct Stat {
    cpu_seconds: f64,
    resident_bytes: f64,
    threads: f64,
    /// From the boot of the machine.
    start_seconds: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The second field, the program's name in parentheses, may contain spaces.
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // `fields[0]` is the third one.
        let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_seconds: (number(14)? + number(15)?) / TICKS,
            threads: number(20)?,
            start_seconds: number(22)? / TICKS,
            resident_bytes: number(24)? * PAGE,
        })
    }
}

fn boot_seconds() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn file_limit() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}
