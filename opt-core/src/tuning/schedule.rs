//! How the learning rate goes over the steps of a run: transformers' schedules, by their names.

use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{f64::consts::PI, fmt, str::FromStr};

/// The shape of a schedule.
///
/// All but [`Schedule::Constant`] begin with a warmup, over which the rate grows in a straight line from 0. Names and
/// formulas are those of transformers 4.57.6 (`SchedulerType`, `optimization.py`).
///
/// ```
/// use opt_core::tuning::schedule::Schedule;
/// assert_eq!("cosine".parse::<Schedule>()?, Schedule::Cosine);
/// assert_eq!(Schedule::ConstantWithWarmup.to_string(), "constant_with_warmup");
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Schedule {
    /// The same rate at every step.
    Constant,
    /// The same rate at every step after the warmup.
    ConstantWithWarmup,
    /// In a straight line down to 0 at the last step. The default, as it is transformers'.
    #[default]
    Linear,
    /// Half a wave of a cosine down to 0.
    Cosine,
    /// Half a wave of a cosine down to `min` times the rate.
    CosineWithMinLr {
        /// The lowest factor, `0.0..=1.0`; transformers' `min_lr_rate`.
        min: f64,
    },
    /// A power of what is left of the run, down to the rate `lr_end`.
    Polynomial {
        /// The exponent; 1 is a straight line.
        power: f64,
        /// The rate at the end; it must be below the rate at the start.
        lr_end: f64,
    },
    /// The root of the warmup's steps (10000 without) over the steps so far.
    InverseSqrt,
}

/// The names, with the settings that transformers has where one is given by name alone.
const NAMES: [(&str, Schedule); 7] = [
    ("constant", Schedule::Constant),
    ("constant_with_warmup", Schedule::ConstantWithWarmup),
    ("linear", Schedule::Linear),
    ("cosine", Schedule::Cosine),
    // transformers has no default here: a tenth is what papers on language models use (arXiv 2203.15556).
    ("cosine_with_min_lr", Schedule::CosineWithMinLr { min: 0.1 }),
    ("polynomial", Schedule::Polynomial { power: 1.0, lr_end: 1e-7 }),
    ("inverse_sqrt", Schedule::InverseSqrt),
];

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::Constant => "constant",
            Schedule::ConstantWithWarmup => "constant_with_warmup",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
            Schedule::CosineWithMinLr { .. } => "cosine_with_min_lr",
            Schedule::Polynomial { .. } => "polynomial",
            Schedule::InverseSqrt => "inverse_sqrt",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    /// By name, with transformers' settings; `min` of [`Schedule::CosineWithMinLr`] is then 0.1.
    fn from_str(name: &str) -> Result<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, schedule)| *schedule).ok_or_else(|| {
            let known = NAMES.map(|(known, _)| known).join(", ");
            Error::new(ErrorKind::Option, format_args!("schedule: expected one of {known}, found {name:?}"))
        })
    }
}

/// A schedule over a run: the learning rate of each step.
///
/// ```
/// use opt_core::tuning::schedule::{LearningRate, Schedule};
/// let rate = LearningRate::new(Schedule::Linear, 1e-3, 10, 110)?;
/// assert_eq!(rate.at(0), 0.0);
/// assert_eq!(rate.at(10), 1e-3);
/// assert_eq!(rate.factor(60), 0.5);
/// # Ok::<(), opt_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    schedule: Schedule,
    peak: f64,
    warmup: u64,
    steps: u64,
}

impl LearningRate {
    /// The rates of a run of `steps` steps, the first `warmup` of which lead up to the rate `peak`.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a rate that is not a positive number, settings of the schedule out of range, and a
    /// warmup where the schedule has none or that is longer than the run.
    pub fn new(schedule: Schedule, peak: f64, warmup: u64, steps: u64) -> Result<Self> {
        let refuse = |message: fmt::Arguments<'_>| Err(Error::new(ErrorKind::Option, message));
        if !(peak.is_finite() && peak > 0.0) {
            return refuse(format_args!("learning rate: expected a number above 0, found {peak}"));
        }
        if warmup > 0 && schedule == Schedule::Constant {
            return refuse(format_args!(
                "schedule: constant has no warmup, found {warmup} steps of it; constant_with_warmup has"
            ));
        }
        if warmup > steps {
            return refuse(format_args!(
                "warmup: expected at most as many steps as the run has, {steps}, found {warmup}"
            ));
        }
        match schedule {
            Schedule::CosineWithMinLr { min } if !(0.0..=1.0).contains(&min) => {
                refuse(format_args!("cosine_with_min_lr: expected a lowest factor of 0 to 1, found {min}"))
            }
            Schedule::Polynomial { power, .. } if !(power.is_finite() && power > 0.0) => {
                refuse(format_args!("polynomial: expected a power above 0, found {power}"))
            }
            Schedule::Polynomial { lr_end, .. } if !(lr_end >= 0.0 && lr_end < peak) => refuse(format_args!(
                "polynomial: expected a rate at the end of 0 or more and below {peak}, found {lr_end}"
            )),
            _ => Ok(Self { schedule, peak, warmup, steps }),
        }
    }

    /// The learning rate of step `step`; the first is 0.
    pub fn at(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    /// What the peak is multiplied by at step `step`; the first is 0. Steps past the end are defined as transformers
    /// defines them: a cosine comes up again.
    pub fn factor(&self, step: u64) -> f64 {
        if self.schedule == Schedule::Constant {
            return 1.0;
        }
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let since = (step - self.warmup) as f64;
        let after = (self.steps - self.warmup).max(1) as f64;
        let cosine = 0.5 * (1.0 + (PI * since / after).cos());
        match self.schedule {
            Schedule::Constant | Schedule::ConstantWithWarmup => 1.0,
            Schedule::Linear => self.steps.saturating_sub(step) as f64 / after,
            Schedule::Cosine => cosine.max(0.0),
            Schedule::CosineWithMinLr { min } => (cosine * (1.0 - min) + min).max(0.0),
            Schedule::Polynomial { power, lr_end } => {
                let left = (1.0 - since / after).max(0.0);
                ((self.peak - lr_end) * left.powf(power) + lr_end) / self.peak
            }
            Schedule::InverseSqrt => {
                let scale = if self.warmup > 0 { self.warmup as f64 } else { 10_000.0 };
                (scale / (since + scale)).sqrt()
            }
        }
    }

    /// The schedule's shape.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for (name, schedule) in NAMES {
            assert_eq!(name.parse::<Schedule>().unwrap(), schedule);
            assert_eq!(schedule.to_string(), name);
            let json = serde_json::to_string(&schedule).unwrap();
            assert!(json.contains(name), "{json}");
            assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        }
        let error = "cosines".parse::<Schedule>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Option);
        assert!(error.to_string().ends_with(r#"inverse_sqrt, found "cosines""#), "{error}");
    }

    #[test]
    fn settings_out_of_range() {
        let polynomial = |power, lr_end| Schedule::Polynomial { power, lr_end };
        for (schedule, peak, warmup, expected) in [
            (Schedule::Linear, 0.0, 0, "learning rate: expected a number above 0, found 0"),
            (Schedule::Linear, f64::NAN, 0, "learning rate: expected a number above 0, found NaN"),
            (Schedule::Constant, 0.1, 3, "schedule: constant has no warmup, found 3 steps"),
            (
                Schedule::Cosine,
                0.1,
                11,
                "warmup: expected at most as many steps as the run has, 10, found 11",
            ),
            (Schedule::CosineWithMinLr { min: 1.5 }, 0.1, 0, "expected a lowest factor of 0 to 1, found 1.5"),
            (polynomial(0.0, 0.0), 0.1, 0, "polynomial: expected a power above 0, found 0"),
            (
                polynomial(1.0, 0.1),
                0.1,
                0,
                "expected a rate at the end of 0 or more and below 0.1, found 0.1",
            ),
        ] {
            let error = LearningRate::new(schedule, peak, warmup, 10).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Option);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
