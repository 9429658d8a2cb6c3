//! The picture of a run: the stall of every client over time and the steps as bands on the same axis, as one SVG.
//!
//! Invariant: no text from outside gets into the SVG; its size is bounded whatever the samples are.

use std::collections::BTreeMap;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::plan::Step;
use crate::report::lag::Lag;
use crate::report::samples::{Sample, Samples};
use crate::report::{Report, StepLine, StepOutcome};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Width and height in pixels: fits a laptop's screen beside nothing else.
const SIZE: (u32, u32) = (1100, 640);
/// The upper part, for the clients.
const CLIENTS_HEIGHT: u32 = 320;
/// Of the picture of the lag.
const LAG_HEIGHT: u32 = 220;
/// Left of both axes, wide enough for the longest step name; equal, so that the time axes line up.
const LEFT: u32 = 110;
/// More dots than this make a page that browsers scroll badly.
const DOTS_MAX: usize = 8000;

/// Draws it; the SVG element. Empty if the run never began a step.
pub fn draw(report: &Report, samples: &Samples) -> String {
    let Some(span) = Span::of(report) else { return String::new() };
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let (upper, lower) = root.split_vertically(CLIENTS_HEIGHT);
        clients(&upper, report, samples, &span)
            .and_then(|()| steps(&lower, report, &span))
            .and_then(|()| root.present())
    };
    drawn.map_or_else(undrawn, |()| svg)
}

/// Draws the lag of replication over the run, with the steps as bands; the SVG element.
pub fn lag(report: &Report, lag: &Lag) -> String {
    let Some(held) = Span::of(report) else { return String::new() };
    let at_ms: Vec<f64> = lag.points.iter().map(|point| held.ms(point.at_us)).collect();
    let (Some(first_ms), Some(last_ms)) = (at_ms.first(), at_ms.last()) else { return String::new() };
    // One beat alone has no length.
    let span = Span { zero_us: held.zero_us, from_ms: *first_ms, to_ms: last_ms.max(first_ms + 1.0) };
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, LAG_HEIGHT)).into_drawing_area();
        let points = at_ms.iter().zip(&lag.points).map(|(at_ms, point)| (*at_ms, point.lag_ms));
        curve(&root, report, points, &span).and_then(|()| root.present())
    };
    drawn.map_or_else(undrawn, |()| svg)
}

fn curve(area: &Area<'_>, report: &Report, points: impl Iterator<Item = (f64, f64)> + Clone, span: &Span) -> Drawn {
    let top_ms = points.clone().map(|point| point.1).fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(span.from_ms..span.to_ms, 0.0..top_ms)?;
    let mut mesh = chart.configure_mesh();
    mesh.y_desc("lag, ms").light_line_style(WHITE).label_style(("sans-serif", 12));
    mesh.x_desc("milliseconds since the pause began").draw()?;
    chart.draw_series(bands(report, span, top_ms))?;
    chart.draw_series(LineSeries::new(points, RGBColor(0, 119, 187).stroke_width(2)))?;
    Ok(())
}

fn undrawn(error: DrawingAreaErrorKind<std::io::Error>) -> String {
    format!("<!-- the picture could not be drawn: {} -->", crate::report::html::escape(&error.to_string()))
}

/// The steps that hold clients, each as high as the picture.
fn bands<'a>(report: &'a Report, span: &'a Span, top_ms: f64) -> impl Iterator<Item = Rectangle<(f64, f64)>> + 'a {
    report.steps.iter().filter(|step| step.name.holds_clients()).map(move |step| {
        let (from, to) = edges(step, span);
        Rectangle::new([(from, 0.0), (to, top_ms)], colour(step).mix(0.18).filled())
    })
}

/// The stretch of time that is drawn.
struct Span {
    zero_us: u64,
    from_ms: f64,
    to_ms: f64,
}

impl Span {
    /// The pause and as much again on both sides; the whole run if clients were never held.
    fn of(report: &Report) -> Option<Span> {
        let first = report.steps.first()?;
        let end_us = |step: &StepLine| step.at_us + (step.ms * 1000.0) as u64;
        let last_us = report.steps.iter().map(end_us).max()?;
        let held = report.steps.iter().find(|step| step.name.holds_clients());
        let zero_us = held.map_or(first.at_us, |step| step.at_us);
        let to_us = report.pause_us().map_or(last_us, |(_, to)| to.max(last_us));
        let long_ms = (to_us.saturating_sub(zero_us) as f64 / 1000.0).max(1.0);
        // A tenth of a second shows how quiet it was before and after.
        let around_ms = if held.is_some() { long_ms.max(100.0) } else { long_ms * 0.05 };
        Some(Span { zero_us, from_ms: -around_ms, to_ms: long_ms + around_ms })
    }

    fn ms(&self, at_us: u64) -> f64 {
        (at_us as f64 - self.zero_us as f64) / 1000.0
    }

    fn clip(&self, ms: f64) -> f64 {
        ms.clamp(self.from_ms, self.to_ms)
    }
}

fn clients(area: &Area<'_>, report: &Report, samples: &Samples, span: &Span) -> Drawn {
    let dots = thinned(samples, span);
    let top_ms = dots.iter().flat_map(|(_, dots)| dots).map(|dot| dot.1).fold(1.0, f64::max) * 1.1;
    let count = samples.0.len();
    let caption = if count == 0 {
        "no client samples were given (--clients FILE)".to_owned()
    } else {
        format!("stall of {count} clients, ms; one dot a statement, at the moment it was sent")
    };
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, 30)
        .build_cartesian_2d(span.from_ms..span.to_ms, 0.0..top_ms)?;
    chart.configure_mesh().y_desc("stall, ms").light_line_style(WHITE).label_style(("sans-serif", 12)).draw()?;
    chart.draw_series(bands(report, span, top_ms))?;
    for (at, dots) in &dots {
        let hue = Palette99::pick(*at).mix(0.8);
        chart.draw_series(dots.iter().map(|dot| Circle::new(*dot, 2, hue.filled())))?;
    }
    Ok(())
}

fn steps(area: &Area<'_>, report: &Report, span: &Span) -> Drawn {
    let rows = Step::ALL.len();
    let mut chart = ChartBuilder::on(area)
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(span.from_ms..span.to_ms, (0..rows as i32 - 1).into_segmented())?;
    let name = |value: &SegmentValue<i32>| match value {
        SegmentValue::CenterOf(row) => {
            let from_below = usize::try_from(*row).ok().and_then(|row| Step::ALL.iter().rev().nth(row));
            from_below.map(|step| step.name().to_owned()).unwrap_or_default()
        }
        SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.y_labels(rows).y_label_formatter(&name).light_line_style(WHITE).label_style(("sans-serif", 12));
    mesh.x_desc("milliseconds since the pause began").draw()?;
    chart.draw_series(report.steps.iter().map(|step| {
        let row = Step::ALL.iter().rev().position(|of_row| *of_row == step.name).unwrap_or(0) as i32;
        let (from, to) = edges(step, span);
        Rectangle::new([(from, SegmentValue::Exact(row)), (to, SegmentValue::Exact(row + 1))], colour(step).filled())
    }))?;
    Ok(())
}

/// Where a step's band begins and ends; at least a pixel wide, so that a fast one is seen.
fn edges(step: &StepLine, span: &Span) -> (f64, f64) {
    let from = span.ms(step.at_us);
    let pixel_ms = (span.to_ms - span.from_ms) / f64::from(SIZE.0);
    (span.clip(from), span.clip((from + step.ms).max(from + pixel_ms)))
}

fn colour(step: &StepLine) -> RGBColor {
    match step.outcome {
        StepOutcome::Failed | StepOutcome::BrokenOff => RGBColor(204, 51, 17),
        StepOutcome::Undone => RGBColor(136, 136, 136),
        StepOutcome::Done if step.name.holds_clients() => {
            // Neighbours in two tones, so that short bands can be told apart.
            if (step.name as usize).is_multiple_of(2) { RGBColor(0, 119, 187) } else { RGBColor(51, 187, 238) }
        }
        StepOutcome::Done => RGBColor(187, 187, 187),
    }
}

/// The worst statement of each client in each narrow slice of time: what the eye would see of all of them.
fn thinned(samples: &Samples, span: &Span) -> Vec<(usize, Vec<(f64, f64)>)> {
    let slices = (DOTS_MAX / samples.0.len().max(1)).clamp(20, 400) as f64;
    let slice_ms = (span.to_ms - span.from_ms) / slices;
    let shown = samples.0.values().take(DOTS_MAX / 20).enumerate();
    shown.map(|(at, of_client)| (at, worst(of_client, span, slice_ms))).collect()
}

fn worst(of_client: &[Sample], span: &Span, slice_ms: f64) -> Vec<(f64, f64)> {
    let mut worst: BTreeMap<i64, (f64, f64)> = BTreeMap::new();
    for sample in of_client {
        let at_ms = span.ms(sample.at_us);
        if at_ms < span.from_ms || at_ms > span.to_ms {
            continue;
        }
        let dot = (at_ms, sample.stall_us as f64 / 1000.0);
        let slice = worst.entry((at_ms / slice_ms).floor() as i64).or_insert(dot);
        if dot.1 > slice.1 {
            *slice = dot;
        }
    }
    worst.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{committed, fold};

    #[test]
    fn the_picture_shows_steps_and_clients_and_stays_small() {
        let report = fold(committed());
        let (from_us, _) = report.pause_us().unwrap();
        let many = (0..20_000u64).map(|n| Sample { at_us: from_us + n * 7, stall_us: n % 90_000 }).collect::<Vec<_>>();
        let samples = Samples((0..64).map(|client| (format!("<client {client}>"), many.clone())).collect());
        let svg = draw(&report, &samples);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{}", &svg[..80]);
        for step in Step::ALL {
            assert!(svg.contains(step.name()), "{step} has no label");
        }
        assert!(!svg.contains("client 1>"));
        assert!(svg.len() < 4_000_000, "{} bytes", svg.len());
    }

    #[test]
    fn a_run_that_never_began_has_no_picture() {
        assert_eq!(draw(&fold(committed()[..1].to_vec()), &Samples::default()), "");
    }
}
