//! The curve of a training as loss.svg.

use plotters::{
    element::PathElement,
    prelude::{ChartBuilder, IntoDrawingArea, RGBColor, SVGBackend, WHITE},
    style::Color,
};
use serde_json::Value;
use std::path::Path;

const TRAINING: RGBColor = RGBColor(150, 170, 200);
const EVALUATION: RGBColor = RGBColor(200, 80, 40);

/// The losses of a log: of the steps, and of the evaluations.
pub(crate) fn curves(log: &[Value]) -> [Vec<(f64, f64)>; 2] {
    let of = |key: &str| {
        let point = |line: &Value| Some((line["step"].as_f64()?, line.get(key)?.as_f64()?));
        log.iter().filter_map(point).collect()
    };
    [of("loss"), of("eval_loss")]
}

/// Draws the losses over the steps. A log without any is no drawing.
pub(crate) fn draw(path: &Path, log: &[Value]) -> Result<(), String> {
    let [training, evaluation] = curves(log);
    let all = || training.iter().chain(&evaluation);
    let Some(last) = all().map(|(step, _)| *step).max_by(f64::total_cmp) else { return Ok(()) };
    let low = all().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
    let high = all().map(|(_, loss)| *loss).fold(f64::NEG_INFINITY, f64::max);
    let margin = 0.05 * (high - low).max(1e-3);
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let area = SVGBackend::new(path, (900, 520)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last.max(1.0), low - margin..high + margin)
        .map_err(|e| failed(&e))?;
    chart.configure_mesh().x_desc("steps").y_desc("loss, nats").draw().map_err(|e| failed(&e))?;
    for (name, color, width, points) in
        [("training", TRAINING, 1, training), ("evaluation", EVALUATION, 2, evaluation)]
    {
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(std::iter::once(PathElement::new(points, color.stroke_width(width))))
            .map_err(|e| failed(&e))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw().map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_drawing_has_both_curves() {
        let log = [
            json!({ "step": 1, "loss": 3.0 }),
            json!({ "step": 2, "loss": 2.5 }),
            json!({ "step": 2, "eval_loss": 2.75 }),
            json!({ "step": 3, "loss": null }),
        ];
        assert_eq!(curves(&log), [vec![(1.0, 3.0), (2.0, 2.5)], vec![(2.0, 2.75)]]);
        let path = std::env::temp_dir().join(format!("opt-loss-{}.svg", std::process::id()));
        draw(&path, &log).expect("it can be drawn");
        let text = std::fs::read_to_string(&path).expect("it is there");
        let _ = std::fs::remove_file(&path);
        assert!(
            text.contains("training") && text.contains("evaluation") && text.contains("<polyline"),
            "{text}"
        );
        draw(&path, &[]).expect("nothing to draw");
        assert!(!path.exists());
    }
}
