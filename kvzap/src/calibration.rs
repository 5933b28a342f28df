use crate::{Error, Result, file};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Which threshold removes which share, as seen on other texts: `calibration.json` beside a surrogate.
///
/// A share of the judged tokens belongs to a threshold whatever the length of the text; a share of all tokens does not, as
/// the newest are never judged. So quantiles of the scores of judged tokens are kept, and a wanted share of all is turned into
/// one of the judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The scores' quantiles, evenly from the lowest to the highest: of N + 1 numbers, number i has a share i / N of the
    /// scores under it.
    quantiles: Vec<f32>,
    /// Of each layer and kv head, the share of its scores under the threshold that removes half of all.
    half: Vec<Vec<f64>>,
}

const FILE: &str = "calibration.json";
/// A step for each half percent.
const STEPS: usize = 200;

impl Calibration {
    /// From the scores of judged tokens of some texts, for each layer and kv head. NaN counts for nothing.
    ///
    /// # Errors
    /// [`Error::NoRows`] for a layer without scores.
    pub fn new(scores: &[Vec<Vec<f32>>]) -> Result<Self> {
        let numbers = |heads: &[Vec<f32>]| heads.iter().flatten().filter(|x| !x.is_nan()).count();
        if let Some(layer) = scores.iter().position(|heads| numbers(heads) == 0) {
            return Err(Error::NoRows { layer });
        }
        let mut all: Vec<f32> = scores.iter().flatten().flatten().copied().collect();
        all.retain(|score| !score.is_nan());
        if all.is_empty() {
            return Err(Error::NoRows { layer: 0 });
        }
        all.sort_by(f32::total_cmp);
        let quantiles: Vec<f32> =
            (0..=STEPS).map(|step| all[(step * (all.len() - 1)).div_ceil(STEPS)]).collect();
        let middle = quantiles[STEPS / 2];
        let under = |head: &Vec<f32>| {
            head.iter().filter(|&&score| score < middle).count() as f64 / head.len().max(1) as f64
        };
        let half = scores.iter().map(|heads| heads.iter().map(under).collect()).collect();
        Ok(Self { quantiles, half })
    }

    /// Reads `calibration.json` in the folder of a surrogate.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let path = folder.as_ref().join(FILE);
        let wrong = |reason| Error::Calibration { path: path.clone(), reason };
        let text = std::fs::read(&path).map_err(|cause| wrong(cause.to_string()))?;
        let read: Self = serde_json::from_slice(&text).map_err(|cause| wrong(cause.to_string()))?;
        if read.quantiles.len() < 2 || !read.quantiles.is_sorted() {
            return Err(wrong("its quantiles do not rise".to_owned()));
        }
        Ok(read)
    }

    /// Writes it there.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let path = folder.as_ref().join(FILE);
        let text = serde_json::to_string_pretty(self).map_err(|source| Error::Calibration {
            path: path.clone(),
            reason: source.to_string(),
        })?;
        file::write(&path, format!("{text}\n").as_bytes())
    }

    /// The threshold under which a share of the judged tokens lies, 0 to 1, between two quantiles on the line.
    pub fn threshold_of_judged(&self, share: f64) -> Result<f32> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Share(share));
        }
        let place = share * (self.quantiles.len() - 1) as f64;
        let (below, above) = (place.floor() as usize, place.ceil() as usize);
        let (a, b) = (self.quantiles[below], self.quantiles[above]);
        Ok(a + (place - below as f64) as f32 * (b - a))
    }

    /// The threshold that removes about a share `remove` of all `tokens` of a text, the newest `window` of which stay.
    ///
    /// # Errors
    /// [`Error::Share`] if `remove` is no share, or more than can go.
    pub fn threshold(&self, remove: f64, tokens: usize, window: usize) -> Result<f32> {
        let judged = crate::judged(tokens, window).len() as f64;
        if remove == 0.0 {
            return Ok(f32::NEG_INFINITY);
        }
        if !(0.0..=1.0).contains(&remove) {
            return Err(Error::Share(remove));
        }
        if remove * tokens as f64 > judged {
            return Err(Error::TooMuch { remove, tokens, window });
        }
        self.threshold_of_judged(remove * tokens as f64 / judged)
    }

    /// Of each layer and kv head, the share that goes at the threshold which removes half of all judged tokens.
    pub fn half(&self) -> &[Vec<f64>] {
        &self.half
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn even() -> Calibration {
        // One head has the low scores, the other the high ones.
        let scores = |first: i32| (first..first + 1000).map(|i| i as f32 / 100.0).collect();
        Calibration::new(&[vec![scores(-1000), scores(0)]]).unwrap()
    }

    #[test]
    fn a_share_of_all_tokens_is_turned_into_one_of_the_judged() {
        let calibration = even(); // scores -10 to 10
        assert!((calibration.threshold_of_judged(0.25).unwrap() + 5.0).abs() < 0.02);
        // Half of 256 tokens is all that is older than the newest 128.
        assert_eq!(calibration.threshold(0.5, 256, 128).unwrap(), 9.99);
        assert!((calibration.threshold(0.25, 256, 128).unwrap()).abs() < 0.02);
        assert_eq!(calibration.threshold(0.0, 10, 128).unwrap(), f32::NEG_INFINITY);
        assert_eq!(calibration.half(), [[1.0, 0.0]]);
        for (remove, tokens) in [(0.6, 256), (0.1, 128)] {
            let error = calibration.threshold(remove, tokens, 128).unwrap_err();
            assert!(matches!(error, Error::TooMuch { .. }), "{error}");
        }
        for remove in [-0.1, 1.1, f64::NAN] {
            assert!(matches!(calibration.threshold(remove, 999, 128), Err(Error::Share(_))));
        }
    }

    #[test]
    fn files_come_back_and_foreign_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        assert!(matches!(Calibration::load(folder.path()), Err(Error::Calibration { .. })));
        even().save(folder.path()).unwrap();
        assert_eq!(Calibration::load(folder.path()).unwrap(), even());
        for text in
            ["", "{}", r#"{"quantiles": [2, 1], "half": []}"#, r#"{"quantiles": [], "half": []}"#]
        {
            std::fs::write(&path, text).unwrap();
            let error = Calibration::load(folder.path()).unwrap_err().to_string();
            assert!(error.contains(FILE) && error.contains("longctx calibrate"), "{error}");
        }
        assert!(matches!(
            Calibration::new(&[vec![vec![f32::NAN]]]),
            Err(Error::NoRows { layer: 0 })
        ));
    }
}
