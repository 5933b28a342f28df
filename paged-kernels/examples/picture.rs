//! Draws what `bench_cuda` measured: microseconds of a layer's attention beside the best library and the floor.
//!
//! `cargo run -p paged-kernels --example picture -- paged-kernels/benches/results/h100.json paged-kernels/pictures/attention.svg`

use plotters::prelude::*;
use serde_json::Value;
use std::error::Error;

/// Told apart by people who see fewer colours (after Okabe and Ito).
const OURS: RGBColor = RGBColor(0, 114, 178);
const LIBRARY: RGBColor = RGBColor(213, 94, 0);
const FLOOR: RGBColor = RGBColor(150, 150, 150);

/// What is compared in a case, in microseconds.
struct Case {
    name: String,
    floor: f64,
    ours: f64,
    library: f64,
    /// The best library where nothing is pruned.
    whole: f64,
}

fn cases(rows: &[Value]) -> Result<Vec<Case>, Box<dyn Error>> {
    let attend = |keep: f64, dist: &'static str| {
        rows.iter().filter(move |row| {
            row["op"] == "attend" && row["keep"].as_f64() == Some(keep) && row["dist"] == dist
        })
    };
    let number = |row: &Value, key: &str| row[key].as_f64().ok_or(format!("a row has no `{key}`"));
    attend(0.25, "ragged")
        .map(|row| {
            let whole = attend(1.0, "uniform").find(|whole| whole["case"] == row["case"]);
            Ok(Case {
                name: row["case"].as_str().unwrap_or_default().replace('x', " × "),
                floor: number(row, "floor_us")?,
                ours: number(row, "us")?,
                library: number(row, "best_peer_us")?,
                whole: number(whole.ok_or("a case is not measured whole")?, "best_peer_us")?,
            })
        })
        .collect()
}

/// An SVG: a line a case, from the floor to what the best library takes where nothing is pruned.
fn svg(cases: &[Case], card: &str) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (760, 360)).into_drawing_area();
    root.fill(&WHITE)?;
    let height = cases.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(38)
        .y_label_area_size(64)
        .build_cartesian_2d((1.0..500.0).log_scale(), 0.0..height + 1.2)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(WHITE)
        .y_labels(0)
        .x_desc(format!("µs a layer, {card}"))
        .draw()?;
    let text = ("sans-serif", 12).into_font();
    for (i, case) in cases.iter().enumerate() {
        let y = height - i as f64 - 0.4;
        chart.draw_series([PathElement::new([(case.floor, y), (case.whole, y)], FLOOR)])?;
        chart.draw_series([
            EmptyElement::at((1.0, y)) + Text::new(case.name.clone(), (-62, -5), text.clone())
        ])?;
        chart.draw_series([
            Circle::new((case.whole, y), 5, LIBRARY.stroke_width(2)),
            Circle::new((case.library, y), 5, LIBRARY.filled()),
            Circle::new((case.ours, y), 5, OURS.filled()),
        ])?;
        chart.draw_series([PathElement::new(
            [(case.floor, y - 0.2), (case.floor, y + 0.2)],
            FLOOR.stroke_width(3),
        )])?;
        let label = |us: f64| format!("{us:.*}", usize::from(us < 9.995) + usize::from(us < 99.95));
        for (us, below, color) in
            [(case.ours, 8, OURS), (case.library, -19, LIBRARY), (case.whole, -19, LIBRARY)]
        {
            chart.draw_series([EmptyElement::at((us, y))
                + Text::new(label(us), (-10, below), text.clone().color(&color))])?;
        }
    }
    let legend = height + 0.75;
    chart.draw_series([PathElement::new(
        [(1.1, legend - 0.2), (1.1, legend + 0.2)],
        FLOOR.stroke_width(3),
    )])?;
    chart.draw_series([
        Circle::new((9.0, legend), 5, OURS.filled()),
        Circle::new((30.0, legend), 5, LIBRARY.filled()),
        Circle::new((145.0, legend), 5, LIBRARY.stroke_width(2)),
    ])?;
    for (x, name) in [
        (1.1, "floor: kept bytes at the rate of reads"),
        (9.0, "ours, a quarter kept"),
        (30.0, "best library, a quarter kept"),
        (145.0, "and all kept"),
    ] {
        chart.draw_series([
            EmptyElement::at((x, legend)) + Text::new(name, (9, -6), text.clone())
        ])?;
    }
    root.present()?;
    drop(chart);
    drop(root);
    Ok(svg)
}

fn main() -> std::process::ExitCode {
    match draw() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn draw() -> Result<(), Box<dyn Error>> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [results, picture] = &arguments[..] else {
        return Err("usage: picture results.json picture.svg".into());
    };
    let in_file = |error: &dyn Error| format!("{results}: {error}; bench_cuda writes such a file");
    let text = std::fs::read_to_string(results).map_err(|error| in_file(&error))?;
    let rows: Vec<Value> = serde_json::from_str(&text).map_err(|error| in_file(&error))?;
    let cases = cases(&rows).map_err(|error| in_file(&*error))?;
    let card = rows.first().and_then(|row| row["card"].as_str()).unwrap_or("a card");
    std::fs::write(picture, svg(&cases, card)?)
        .map_err(|error| format!("{picture}: {error}; is there such a folder?"))?;
    Ok(())
}
