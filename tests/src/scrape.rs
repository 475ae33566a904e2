//! Prometheus metrics as a test reads them.

/// One scrape.
#[derive(Clone, Debug)]
pub struct Scrape {
    /// The text as it was served.
    pub text: String,
}

impl Scrape {
    /// Scrapes the program at `ADDRESS:PORT`.
    #[track_caller]
    pub fn of(address: &str) -> Self {
        let answer = reqwest::blocking::get(format!("http://{address}/metrics")).expect("metrics are served");
        assert!(answer.status().is_success(), "{}", answer.status());
        Self { text: answer.text().expect("metrics are text") }
    }

    /// The series of a metric whose labels contain `labels` (such as `job="j1"`), summed; `None` if there is none.
    pub fn sum(&self, name: &str, labels: &str) -> Option<f64> {
        let series = self.text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, found_labels) = series.split_once('{').unwrap_or((series, ""));
            (found == name && found_labels.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        series.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// As [`Self::sum`], of a metric that must be there.
    #[track_caller]
    pub fn value(&self, name: &str, labels: &str) -> f64 {
        self.sum(name, labels).unwrap_or_else(|| panic!("no {name}{{{labels}}} in\n{}", self.text))
    }
}
