//! A file that exists while the service is ready, for scripts and supervisors to wait for.

use std::path::{Path, PathBuf};

/// Says that the service is ready; removes the file when dropped.
pub struct Ready(Option<PathBuf>);

impl Ready {
    /// Says that the service is ready: in the log, and by the file if one is configured.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn announce(file: Option<&Path>) -> std::io::Result<Self> {
        if let Some(file) = file {
            std::fs::write(file, std::process::id().to_string())?;
        }
        tracing::info!("the service is ready");
        Ok(Self(file.map(Path::to_owned)))
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            // If the file was removed with its directory, there is nothing left to do.
            let _ = std::fs::remove_file(file);
        }
    }
}
