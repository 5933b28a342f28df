//! A training's course.

use anyhow::Result;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

/// What was measured up to a step since the one before.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    /// Tokens read so far.
    pub tokens: u64,
    /// Mean `−log p` of text, in nats.
    pub text: f64,
    /// The same of answers.
    pub answers: f64,
    /// The gradient's norm at this step, before it was shortened.
    pub norm: f64,
    /// Learning rate of this step.
    pub rate: f64,
}

/// Both losses against tokens, as an SVG.
pub fn draw(title: &str, points: &[Point]) -> Result<String> {
    let mut svg = String::new();
    let tokens = |point: &Point| point.tokens as f64 / 1e6;
    let end = points.last().map_or(1.0, tokens);
    let top = points.iter().map(|p| p.text.max(p.answers)).fold(1.0, f64::max);
    {
        let root = SVGBackend::with_string(&mut svg, (640, 360)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("million tokens")
            .y_desc("nats a token")
            .draw()?;
        let text = RGBColor(0, 114, 178);
        let answers = RGBColor(213, 94, 0);
        let mut line = |name: &str, color: RGBColor, of: fn(&Point) -> f64| -> Result<()> {
            chart
                .draw_series(LineSeries::new(
                    points.iter().map(|p| (tokens(p), of(p))),
                    color.stroke_width(2),
                ))?
                .label(name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
            Ok(())
        };
        line("text", text, |point| point.text)?;
        line("answers", answers, |point| point.answers)?;
        chart.configure_series_labels().background_style(WHITE).border_style(WHITE).draw()?;
        root.present()?;
    }
    Ok(svg)
}
