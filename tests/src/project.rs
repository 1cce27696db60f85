//! A copy of the project in which a test changes the sources and builds them. It shares the dependencies that are built
//! already, and nothing in it is built again that has not changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What lies in the project's directory and is not part of it.
const OTHERS: [&str; 3] = [".git", ".stack", "target"];

/// A copy of the project.
pub struct Project {
    root: PathBuf,
    target: PathBuf,
}

impl Project {
    /// A copy as the project is now, in the directory `name` beside that of the build profile.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn copy(name: &str) -> Self {
        Self::changed_copy(name, "", &[])
    }

    /// The same, but for texts of one file, which are replaced by others.
    ///
    /// # Panics
    /// If the file does not have each text exactly once.
    pub fn changed_copy(name: &str, path: &str, replacements: &[(&str, &str)]) -> Self {
        let original = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project");
        // .../target/debug/deps/extending-0123456789abcdef
        let own = std::env::current_exe().expect("the program's own path");
        let profile = own.ancestors().nth(2).expect("cargo has built it");
        let root = profile.with_file_name(name);
        // All copies share one, in which the dependencies are, whose paths are the same for all.
        let target = profile.with_file_name("extending").join("target");
        let change = |file: &Path| -> Vec<u8> {
            let mut text = fs::read(file).unwrap();
            if file == original.join(path) {
                for (from, to) in replacements {
                    let before = String::from_utf8(text).unwrap();
                    assert_eq!(before.matches(from).count(), 1, "{path} must have this once: {from}");
                    text = before.replace(from, to).into_bytes();
                }
            }
            text
        };
        synchronize(original, &root, &OTHERS, &change);
        // The servers' programs, if they are there: the copy need not fetch them again.
        let servers = root.join(".stack/servers");
        if !servers.exists() {
            fs::create_dir_all(root.join(".stack")).unwrap();
            let theirs = original.join(".stack/servers");
            fs::create_dir_all(&theirs).unwrap();
            std::os::unix::fs::symlink(theirs, servers).unwrap();
        }
        for built in ["deps", "build", ".fingerprint"] {
            copy_built(&profile.join(built), &target.join("debug").join(built));
        }
        Self { root, target }
    }

    /// The text of a file of the copy.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.join(path)).expect("the copy has the file")
    }

    /// Adds lines to the end of a file.
    pub fn append(&self, path: &str, lines: &str) {
        self.write(path, &(self.read(path) + lines));
    }

    /// Changes the file as the diff says.
    ///
    /// # Panics
    /// If the file does not have what the diff changes, or has it twice.
    pub fn change(&self, path: &str, diff: &str) {
        let side = |other: char| -> String {
            let lines = diff.lines().filter(|line| !line.starts_with(other));
            lines.map(|line| format!("{}\n", line.get(1..).unwrap_or_default())).collect()
        };
        let (before, after, text) = (side('+'), side('-'), self.read(path));
        assert_eq!(text.matches(&before).count(), 1, "{path}:\n{before}");
        self.write(path, &text.replacen(&before, &after, 1));
    }

    /// Writes a file, whose path is relative to the copy.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, path: &str, text: &str) {
        fs::write(self.root.join(path), text).unwrap();
    }

    /// Takes a program that was built in the copy out of the target directory, where the next copy may overwrite it.
    ///
    /// # Panics
    /// If it has not been built.
    pub fn take(&self, program: &str) -> PathBuf {
        let taken = self.root.join("target").join(program);
        fs::create_dir_all(self.root.join("target")).unwrap();
        // A program that still runs cannot be written, but it can be replaced.
        let copy = taken.with_extension("new");
        fs::copy(self.target.join("debug").join(program), &copy).unwrap();
        fs::rename(copy, &taken).unwrap();
        taken
    }

    /// Adds a line to the list in the file.
    ///
    /// # Panics
    /// If the file has no list.
    pub fn add_line(&self, path: &str, line: &str) {
        let text = fs::read_to_string(self.root.join(path)).unwrap();
        let (list, after) = text.split_once(")\n}\n").expect("the list ends");
        self.write(path, &format!("{list})\n{line}}}\n{after}"));
    }

    /// Runs a program in the copy, and returns what it said.
    ///
    /// # Panics
    /// If it fails.
    pub fn succeeds(&self, program: &str, arguments: &[&str]) -> String {
        let (success, told) = self.run(program, arguments);
        assert!(success, "{program} {arguments:?}\n{told}");
        told
    }

    /// Runs a program in the copy, and returns what it said.
    ///
    /// # Panics
    /// If it does not fail.
    pub fn fails(&self, program: &str, arguments: &[&str]) -> String {
        let (success, told) = self.run(program, arguments);
        assert!(!success, "{program} {arguments:?}\n{told}");
        told
    }

    fn run(&self, program: &str, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(program);
        // What cargo says to this test of this crate would be news to build scripts, and build them again.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_") && name != "CARGO_HOME") {
            command.env_remove(name);
        }
        command.args(arguments).current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
        let told = [output.stdout, output.stderr].map(|told| String::from_utf8_lossy(&told).into_owned()).concat();
        (output.status.success(), told)
    }
}

/// Makes the second a copy of the first, but for what has one of these names; `text` reads a file. What is the same
/// already is not touched, so that it is not built again.
fn synchronize(from: &Path, to: &Path, but: &[&str], text: &dyn Fn(&Path) -> Vec<u8>) {
    if from.is_file() {
        let text = text(from);
        if fs::read(to).ok().as_ref() != Some(&text) {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(to, text).unwrap();
            fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
        }
        return;
    }
    fs::create_dir_all(to).unwrap();
    let names = |directory: &Path| -> Vec<_> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| !but.iter().any(|but| name == but)).collect()
    };
    let wanted = names(from);
    for name in names(to).into_iter().filter(|name| !wanted.contains(name)) {
        // What an earlier run added, or what the project has no more.
        let left = to.join(name);
        if left.is_dir() { fs::remove_dir_all(left).unwrap() } else { fs::remove_file(left).unwrap() }
    }
    for name in wanted {
        synchronize(&from.join(&name), &to.join(&name), &["__pycache__"], text);
    }
}

/// Copies every library and every record of the first directory into the second, where it is not there yet. Programs,
/// which have no extension and are large, are left out, except those of build scripts. Links would not do: cargo writes
/// some of these files in place. It compares times, so the copies keep them.
fn copy_built(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy_built(&entry, &to);
        } else if !to.exists() && (entry.extension().is_some() || !from.ends_with("deps")) {
            fs::copy(&entry, &to).unwrap();
            let modified = fs::metadata(&entry).and_then(|metadata| metadata.modified()).unwrap();
            fs::File::options().write(true).open(&to).and_then(|file| file.set_modified(modified)).unwrap();
        }
    }
}
