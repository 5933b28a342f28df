//! A picture of each task and length: score against the share of the context removed.

use super::Row;
use anyhow::Result;
use plotters::prelude::*;

/// Methods in the order and colour of the legend; others follow in grey.
const COLOURS: [(&str, RGBColor); 16] = [
    ("mlp", RGBColor(208, 28, 60)),
    ("linear", RGBColor(240, 120, 40)),
    ("mlp, first free", RGBColor(232, 140, 160)),
    ("linear, first free", RGBColor(248, 190, 150)),
    ("mlp, 9,000 pieces", RGBColor(130, 0, 50)),
    ("KVzip+", RGBColor(20, 20, 20)),
    ("KVzip", RGBColor(120, 120, 120)),
    ("AdaKV ExpectedAttention", RGBColor(0, 110, 190)),
    ("SnapKV", RGBColor(0, 150, 130)),
    ("AdaKV SnapKV", RGBColor(90, 190, 170)),
    ("PyramidKV", RGBColor(120, 180, 60)),
    ("H2O", RGBColor(130, 90, 190)),
    ("TOVA", RGBColor(190, 110, 210)),
    ("KeyDiff", RGBColor(150, 120, 60)),
    ("Knorm", RGBColor(200, 170, 90)),
    ("StreamingLLM", RGBColor(90, 140, 220)),
];
/// Those to look at first.
const WIDE: [&str; 4] = ["mlp", "linear", "mlp, 9,000 pieces", "KVzip+"];
const GREY: RGBColor = RGBColor(190, 190, 190);

/// File names and SVGs.
pub fn draw(rows: &[Row]) -> Result<Vec<(String, String)>> {
    let mut cells: Vec<(&str, usize)> = Vec::new();
    for row in rows {
        if !cells.contains(&(&row.task, row.context)) {
            cells.push((&row.task, row.context));
        }
    }
    let draw = |&(task, context): &(&str, usize)| {
        let rows: Vec<&Row> =
            rows.iter().filter(|row| row.task == task && row.context == context).collect();
        Ok((format!("{task}-{context}.svg"), one(task, context, &rows)?))
    };
    cells.iter().map(draw).collect()
}

fn one(task: &str, context: usize, rows: &[&Row]) -> Result<String> {
    let nats = task == "answer-nll" || task == "perplexity";
    let full = rows.iter().find(|row| row.method == "full");
    let mut methods: Vec<(&str, RGBColor)> = COLOURS.to_vec();
    for row in rows.iter().filter(|row| row.asked > 0.0) {
        if !methods.iter().any(|(method, _)| *method == row.method) {
            methods.push((&row.method, GREY));
        }
    }
    methods.retain(|(method, _)| rows.iter().any(|row| row.method == *method && row.asked > 0.0));
    let scores = rows.iter().filter(|row| row.asked >= 0.0).map(|row| row.score);
    let (least, most) =
        scores.fold((f64::MAX, f64::MIN), |(a, b), score| (a.min(score), b.max(score)));
    let axis = if nats { least - 0.1..most.min(least + 4.0) + 0.1 } else { 0.0..1.02 };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, legend) = root.split_horizontally(680);
        let n = rows.iter().map(|row| row.n);
        let n = match (n.clone().min(), n.max()) {
            (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
            (least, _) => least.unwrap_or(0).to_string(),
        };
        let mut chart = ChartBuilder::on(&left)
            .caption(format!("{task}, {context} tokens, {n} samples"), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..1.0, axis)?;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(240, 240, 240))
            .x_desc("share of the context removed")
            .y_desc(if nats { "nats a token (lower is better)" } else { "right answers" })
            .x_label_formatter(&|x| format!("{:.0} %", 100.0 * x))
            .y_label_formatter(&|y| {
                if nats { format!("{y:.2}") } else { format!("{:.0} %", 100.0 * y) }
            })
            .draw()?;
        if let Some(full) = full {
            let line = [(0.0, full.score), (1.0, full.score)];
            chart.draw_series(LineSeries::new(line, GREY.stroke_width(1)))?;
        }
        let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        for (index, (method, colour)) in methods.iter().enumerate() {
            let mut points: Vec<(f64, f64)> = rows
                .iter()
                .filter(|row| row.method == *method && row.asked > 0.0)
                .map(|row| (row.removed, row.score))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points.splice(0..0, full.map(|full| (0.0, full.score)));
            let wide = if WIDE.contains(method) { 3 } else { 1 };
            chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(wide)))?;
            let dots =
                points.iter().map(|point| Circle::new(*point, 2 + wide / 2, colour.filled()));
            chart.draw_series(dots)?;
            let y = 60 + 22 * index as i32;
            legend.draw(&PathElement::new(vec![(8, y), (32, y)], colour.stroke_width(wide + 1)))?;
            legend.draw_text(method, &text(13), (40, y - 7))?;
        }
        let y = 70 + 22 * methods.len() as i32;
        legend.draw_text("grey line: full cache", &text(12), (8, y))?;
        root.present()?;
    }
    Ok(svg)
}
