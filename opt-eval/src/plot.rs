//! Scores with their standard errors as a drawing: a panel for each metric, a line for each task, a mark for each report.

use crate::{Error, ErrorKind, Result, report::Report};
use plotters::{
    coord::Shift,
    element::{Circle, PathElement, Rectangle, Text},
    prelude::{DrawingArea, IntoDrawingArea, RGBColor, SVGBackend, WHITE},
    style::{
        Color, IntoFont, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};
use std::path::Path;

/// Marks of the reports, told apart by people who see no red or green too (Okabe and Ito 2008).
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const GREY: RGBColor = RGBColor(210, 210, 210);
const DARK: RGBColor = RGBColor(60, 60, 60);
const WIDTH: u32 = 900;
const LINE: i32 = 22;
/// Room over a panel's lines for its title, and under them for the scale.
const TITLE: i32 = 34;
const SCALE: i32 = 34;
const TOP: i32 = 14;

/// One mark: which report's, its value and standard error.
struct Mark {
    report: usize,
    value: f64,
    stderr: f64,
}

/// One metric: its name, and for each task the marks of the reports that have it.
struct Panel {
    title: String,
    tasks: Vec<(String, Vec<Mark>)>,
}

/// Draws the scores of reports as an SVG file, each with a bar of one standard error to either side. Labels name the
/// reports; at most six are told apart by color. The file appears when it is complete.
///
/// ```
/// # use opt_eval::{plot, report::{MetricResult, Report, RunInfo, TaskResult}};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("scores.svg");
/// let mut report = Report::new(RunInfo::new("facebook/opt-125m"));
/// let mut piqa = TaskResult::new("piqa", 1838);
/// piqa.metrics.push(MetricResult::new("acc", 0.63).stderr(0.011));
/// report.add_task(piqa);
/// plot::scores(&path, &[("opt-125m", &report)])?;
/// assert!(std::fs::read_to_string(&path)?.starts_with("<svg"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no score to draw, [`ErrorKind::Io`] if the file cannot be written.
pub fn scores<L: AsRef<str>>(path: impl AsRef<Path>, reports: &[(L, &Report)]) -> Result<()> {
    let path = path.as_ref();
    let text = svg(reports).map_err(|e| e.at(path.display()))?;
    crate::report::write_whole(path, &text)
}

/// The text of [`scores`]' file.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no score to draw.
pub fn svg<L: AsRef<str>>(reports: &[(L, &Report)]) -> Result<String> {
    let labels: Vec<&str> = reports.iter().map(|(label, _)| label.as_ref()).collect();
    let panels = panels(&reports.iter().map(|(_, report)| *report).collect::<Vec<_>>());
    if panels.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "no scores to draw"));
    }
    let legend = LINE * labels.len() as i32;
    let height = panels.iter().map(Panel::height).sum::<i32>() + legend + 2 * TOP;
    let mut text = String::new();
    draw(&mut text, height, &labels, &panels)
        .map_err(|e| Error::new(ErrorKind::Io, format!("the drawing failed: {e}")))?;
    Ok(text)
}

fn panels(reports: &[&Report]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for (place, report) in reports.iter().enumerate() {
        for (task, scores) in &report.results {
            for score in scores.metrics.iter().filter(|score| score.value.is_finite()) {
                let title = match score.filter.as_str() {
                    crate::report::NO_FILTER => score.metric.clone(),
                    filter => format!("{} ({filter})", score.metric),
                };
                let mark = Mark { report: place, value: score.value, stderr: score.stderr.unwrap_or(0.0) };
                let panel = found_or_new(
                    &mut panels,
                    |p| p.title == title,
                    || Panel { title: title.clone(), tasks: Vec::new() },
                );
                let Some(panel) = panel else { continue };
                let entry = found_or_new(&mut panel.tasks, |(t, _)| t == task, || (task.clone(), Vec::new()));
                if let Some((_, marks)) = entry {
                    marks.push(mark);
                }
            }
        }
    }
    panels.sort_by(|a, b| a.title.cmp(&b.title));
    for panel in &mut panels {
        panel.tasks.sort_by(|a, b| a.0.cmp(&b.0));
    }
    panels
}

/// The entry that is meant, which is added if it is missing.
fn found_or_new<T>(list: &mut Vec<T>, is: impl Fn(&T) -> bool, new: impl FnOnce() -> T) -> Option<&mut T> {
    match list.iter().position(is) {
        Some(place) => list.get_mut(place),
        None => {
            list.push(new());
            list.last_mut()
        }
    }
}

impl Panel {
    fn height(&self) -> i32 {
        TITLE + LINE * self.tasks.len() as i32 + SCALE
    }

    /// What the scale has to span, with a margin.
    fn span(&self) -> (f64, f64) {
        let marks = || self.tasks.iter().flat_map(|(_, marks)| marks);
        let low = marks().map(|m| m.value - m.stderr).fold(f64::INFINITY, f64::min);
        let high = marks().map(|m| m.value + m.stderr).fold(f64::NEG_INFINITY, f64::max);
        let margin = 0.05 * (high - low).max(1e-3 * high.abs()).max(1e-6);
        (low - margin, high + margin)
    }
}

/// Round numbers in a span, at most about six.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 6.0;
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil();
    (0..12).map(|i| (first + f64::from(i)) * step).take_while(|tick| *tick <= high).collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(text: &mut String, height: i32, labels: &[&str], panels: &[Panel]) -> Drawn {
    let area = SVGBackend::with_string(text, (WIDTH, u32::try_from(height)?)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut top = TOP;
    for (place, label) in labels.iter().enumerate() {
        let middle = top + LINE / 2;
        area.draw(&Circle::new((30, middle), 4, color(place).filled()))?;
        area.draw(&Text::new((*label).to_owned(), (42, middle), style(HPos::Left)))?;
        top += LINE;
    }
    // About seven pixels a letter.
    let names = panels.iter().flat_map(|panel| &panel.tasks).map(|(task, _)| task.chars().count());
    let left = 40 + 7 * i32::try_from(names.max().unwrap_or(0).min(50))?;
    for panel in panels {
        draw_panel(&area, (left, top), panel, labels.len())?;
        top += panel.height();
    }
    area.present()?;
    Ok(())
}

fn color(report: usize) -> RGBColor {
    COLORS.get(report % COLORS.len()).copied().unwrap_or(DARK)
}

fn style(horizontal: HPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", 13).into_font()).color(&DARK).pos(Pos::new(horizontal, VPos::Center))
}

fn draw_panel(area: &Area<'_>, (left, top): (i32, i32), panel: &Panel, reports: usize) -> Drawn {
    let right = WIDTH as i32 - 30;
    let (low, high) = panel.span();
    let at = |value: f64| left + ((value - low) / (high - low) * f64::from(right - left)).round() as i32;
    let upper = top + TITLE;
    let lower = upper + LINE * i32::try_from(panel.tasks.len())?;
    let spread = panel.tasks.iter().flat_map(|(_, marks)| marks).any(|mark| mark.stderr > 0.0);
    let title = if spread { format!("{}, ± one standard error", panel.title) } else { panel.title.clone() };
    area.draw(&Text::new(title, (left, top + TITLE / 2), style(HPos::Left)))?;
    let ticks = ticks(low, high);
    let step = ticks.first_chunk::<2>().map_or(high - low, |[a, b]| b - a);
    let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    for tick in ticks {
        let x = at(tick);
        area.draw(&PathElement::new([(x, upper), (x, lower)], GREY.stroke_width(1)))?;
        area.draw(&Text::new(format!("{tick:.decimals$}"), (x, lower + 12), style(HPos::Center)))?;
    }
    area.draw(&Rectangle::new([(left, upper), (right, lower)], DARK.stroke_width(1)))?;
    for (place, (task, marks)) in panel.tasks.iter().enumerate() {
        let middle = upper + LINE * i32::try_from(place)? + LINE / 2;
        area.draw(&Text::new(task.clone(), (left - 8, middle), style(HPos::Right)))?;
        for mark in marks {
            // Marks of several reports stand one under the other.
            let apart = (LINE - 8) / i32::try_from(reports.max(1))?;
            let y = middle + apart * i32::try_from(mark.report)? - apart * (i32::try_from(reports)? - 1) / 2;
            let color = color(mark.report);
            let ends = [(at(mark.value - mark.stderr), y), (at(mark.value + mark.stderr), y)];
            area.draw(&PathElement::new(ends, color.stroke_width(2)))?;
            area.draw(&Circle::new((at(mark.value), y), 3, color.filled()))?;
        }
    }
    Ok(())
}
