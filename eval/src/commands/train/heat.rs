//! R² of each layer and kv head as a heat map.

use anyhow::Result;
use plotters::prelude::*;

const CELL: i32 = 22;
const LEFT: i32 = 64;
const TOP: i32 = 64;

/// An SVG: a panel for each set of rows, layers downwards, kv heads across, light for 0 and dark for 1.
pub fn draw(panels: &[(&str, &[Vec<f64>])]) -> Result<String> {
    let layers = panels.iter().map(|(_, r2)| r2.len()).max().unwrap_or(0) as i32;
    let heads = panels.iter().flat_map(|(_, r2)| r2.iter().map(Vec::len)).max().unwrap_or(0) as i32;
    let wide = (2 * CELL * heads).max(150);
    let size = (LEFT + panels.len() as i32 * (wide + 40), TOP + CELL * layers + 16);
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (size.0 as u32, size.1 as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        for (panel, (name, r2)) in panels.iter().enumerate() {
            let x = LEFT + panel as i32 * (wide + 40);
            let all: Vec<f64> = r2.iter().flatten().copied().collect();
            let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
            root.draw_text(name, &text(14), (x, 8))?;
            root.draw_text(&format!("mean R² {mean:.3}"), &text(13), (x, 26))?;
            for head in 0..heads {
                root.draw_text(&format!("head {head}"), &text(11), (x + head * 2 * CELL, 46))?;
            }
            for (layer, row) in r2.iter().enumerate() {
                let y = TOP + layer as i32 * CELL;
                if panel == 0 {
                    root.draw_text(&format!("layer {layer}"), &text(11), (8, y + 5))?;
                }
                for (head, &value) in row.iter().enumerate() {
                    let x = x + head as i32 * 2 * CELL;
                    let share = value.clamp(0.0, 1.0); // NaN stays NaN and is drawn as 0
                    let shade = |light: f64, dark: f64| (light + share * (dark - light)) as u8;
                    let color =
                        RGBColor(shade(247.0, 8.0), shade(251.0, 48.0), shade(255.0, 107.0));
                    let cell = [(x, y), (x + 2 * CELL - 2, y + CELL - 2)];
                    root.draw(&Rectangle::new(cell, color.filled()))?;
                    let ink = if share > 0.5 { WHITE } else { BLACK };
                    let label = ("sans-serif", 11).into_font().color(&ink);
                    root.draw_text(&format!("{value:.2}"), &label, (x + 11, y + 5))?;
                }
            }
        }
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_and_head_has_its_number() {
        let svg = draw(&[("held out", &[vec![0.25, 0.5], vec![f64::NAN, 0.75]])]).unwrap();
        for wanted in ["held out", "layer 1", "head 1", "0.25", "NaN", "0.75"] {
            assert!(svg.contains(wanted), "{wanted}");
        }
    }
}
