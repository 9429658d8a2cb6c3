//! What clients saw, from a file of theirs: lines of `client,at_us,stall_us`.
//!
//! Invariant: a file that does not read is an error with its line; at most `SAMPLES_MAX` samples are kept in memory.

use std::collections::BTreeMap;
use std::path::Path;

/// One statement of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When it was sent, microseconds since 1970.
    pub at_us: u64,
    /// How long its first byte of answer took beyond the client's own median, microseconds.
    pub stall_us: u64,
}

/// The samples of every client, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Samples(pub BTreeMap<String, Vec<Sample>>);

/// 64 clients at 100 statements a second for five minutes, and as much again.
pub const SAMPLES_MAX: usize = 4_000_000;

/// A line that does not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: line {line}: {problem}")]
pub struct SamplesError {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl Samples {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Samples, SamplesError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| SamplesError {
            file: file.clone(),
            line: 0,
            problem: error.to_string(),
        })?;
        Samples::parse(&text).map_err(|(line, problem)| SamplesError { file, line, problem })
    }

    fn parse(text: &str) -> Result<Samples, (usize, String)> {
        let mut samples = Samples::default();
        for (at, line) in text.lines().enumerate() {
            if line.trim().is_empty() || (at == 0 && line.trim() == "client,at_us,stall_us") {
                continue;
            }
            if at >= SAMPLES_MAX {
                return Err((at + 1, format!("more than {SAMPLES_MAX} samples")));
            }
            let (client, sample) = sample(line).ok_or_else(|| (at + 1, "is not client,at_us,stall_us".to_owned()))?;
            samples.0.entry(client.to_owned()).or_default().push(sample);
        }
        Ok(samples)
    }
}

fn sample(line: &str) -> Option<(&str, Sample)> {
    // From the right: a client's name may contain commas.
    let (rest, stall_us) = line.rsplit_once(',')?;
    let (client, at_us) = rest.rsplit_once(',')?;
    Some((client, Sample { at_us: at_us.trim().parse().ok()?, stall_us: stall_us.trim().parse().ok()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_with_and_without_a_header() {
        let samples = Samples::parse("client,at_us,stall_us\na,1,2\nb,c,3,4\na,5,6\n").unwrap();
        assert_eq!(samples.0["a"].len(), 2);
        assert_eq!(samples.0["b,c"], [Sample { at_us: 3, stall_us: 4 }]);
        assert_eq!(Samples::parse("a,1\n").unwrap_err().0, 1);
        assert_eq!(Samples::parse("a,1,2\na,1,-2\n").unwrap_err().0, 2);
    }
}
