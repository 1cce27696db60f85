//! The cost of a measurement: the processor time of each process that takes part.

use std::{collections::BTreeMap, ffi::OsStr, fs, path::Path};

use serde::Deserialize;

/// The processes that take part, by their names in the table.
#[derive(Clone, Default)]
pub struct Machine {
    processes: Vec<(&'static str, u32)>,
}

/// Processor time in seconds, by the name of the process.
pub type Cpu = BTreeMap<&'static str, f64>;

/// The unit of `/proc/<pid>/stat`: `USER_HZ`, which is 100 on Linux whatever the kernel's own tick is.
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Deserialize)]
struct Record {
    pid: u32,
}

impl Machine {
    /// The servers of a stack, and this process as `load`.
    pub fn of(stack: &Path) -> Self {
        let mut machine = Self::default();
        for server in ["nats", "postgres", "mongodb"] {
            let record = fs::read(stack.join("run").join(server).with_extension("json")).expect("the server runs");
            let Record { pid } = serde_json::from_slice(&record).expect("the record names a process");
            machine.add(server, pid);
        }
        machine.add("load", std::process::id());
        machine
    }

    pub fn add(&mut self, name: &'static str, pid: u32) {
        self.processes.push((name, pid));
    }

    /// The processor time that each process has used so far.
    pub fn cpu(&self) -> Cpu {
        // This leaves out `self`, which would count this process twice.
        let is_process = |name: &OsStr| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        let all: Vec<Stat> = fs::read_dir("/proc")
            .expect("/proc is there")
            .filter_map(|entry| entry.ok().filter(|entry| is_process(&entry.file_name())))
            .filter_map(|entry| Stat::read(&entry.path().join("stat")))
            .collect();
        let mut cpu = Cpu::new();
        for (name, pid) in &self.processes {
            let own = all.iter().filter(|stat| stat.pid == *pid);
            // Only PostgreSQL has child processes, on one level. The main process accounts for those that have ended.
            let children = all.iter().filter(|stat| *name == "postgres" && stat.parent == *pid);
            let ended: f64 = if *name == "postgres" { own.clone().map(|stat| stat.ended).sum() } else { 0.0 };
            *cpu.entry(name).or_default() += ended + own.chain(children).map(|stat| stat.used).sum::<f64>();
        }
        cpu
    }
}

/// The processor time used between two readings.
pub fn between(before: &Cpu, after: &Cpu) -> Cpu {
    after.iter().map(|(name, used)| (*name, used - before.get(name).copied().unwrap_or_default())).collect()
}

struct Stat {
    pid: u32,
    parent: u32,
    used: f64,
    /// The time of child processes that have ended.
    ended: f64,
}

impl Stat {
    /// `None` if the process has ended meanwhile.
    fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        // The name, in parentheses, may contain spaces and parentheses.
        let (pid, rest) = text.split_once(' ')?;
        let fields: Vec<&str> = rest.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        // See proc(5): the first of these fields is `state`, number 3 there.
        let seconds = |user, system| Some((ticks(user)? + ticks(system)?) / TICKS_PER_SECOND);
        Some(Self {
            pid: pid.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            used: seconds(11, 12)?,
            ended: seconds(13, 14)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_process_counts_once() {
        let mut machine = Machine::default();
        machine.add("load", std::process::id());
        let own = || Stat::read(Path::new("/proc/self/stat")).expect("we run").used;
        let (before, own_before) = (machine.cpu(), own());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            std::hint::black_box(begin);
        }
        let (used, own) = (between(&before, &machine.cpu())["load"], own() - own_before);
        assert!((used - own).abs() < 0.2 * own, "{used} s, not {own} s");
    }
}
