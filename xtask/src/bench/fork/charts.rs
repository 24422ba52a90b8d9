//! The drawings of docs/benchmarks.md: how forks' times are distributed, and what many forks take of memory.

use std::error::Error;
use std::ops::Range;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, LineSeries, PathElement, RGBColor, SVGBackend,
    SeriesLabelPosition, WHITE,
};

use super::BenchError;
use super::figures::{Findings, Kind, RUN, Setting, Time, WORK};
use super::fleet::{Fleet, Step};
use super::{MEMORY, MIB};
use crate::bench::rows::count;

/// Names of the files in docs/.
pub(super) const LATENCY: &str = "fork-latency.svg";
pub(super) const MEMORY_USE: &str = "fleet-memory.svg";

const SIZE: (u32, u32) = (860, 440);
/// About so many numbers are wanted along the time or the forks.
const LABELS: usize = 12;
const TEXT: (&str, u32) = ("sans-serif", 15);
const TITLE: (&str, u32) = ("sans-serif", 18);

/// Colours that are told apart also by those who see few (Okabe and Ito).
const BLACK: RGBColor = RGBColor(0, 0, 0);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const BLUE: RGBColor = RGBColor(0, 114, 178);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const RED: RGBColor = RGBColor(213, 94, 0);

/// What stands around the lines.
struct Frame {
    file: &'static str,
    title: &'static str,
    axes: [&'static str; 2],
    /// Where no line is.
    legend: SeriesLabelPosition,
}

/// A line of a chart.
struct Line {
    name: String,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
}

/// What share of forks had come so far, by the time since their request.
pub(super) fn latency(findings: &Findings) -> Result<String, BenchError> {
    let floor = findings.floors.iter().find(|floor| floor.memory == MEMORY);
    let mut lines = vec![Line {
        name: "kvm_floor: the kernel alone".to_owned(),
        colour: BLACK,
        points: cumulative(floor.into_iter().flat_map(|floor| &floor.totals).copied()),
    }];
    let curves: [(Kind, &str, Time, RGBColor); 4] = [
        (Kind::Armed, "the guest runs (t_run)", RUN, GREEN),
        (Kind::Cold, "the guest runs (t_run)", RUN, BLUE),
        (Kind::Armed, "the guest's first answer (t_work)", WORK, ORANGE),
        (Kind::Cold, "the guest's first answer (t_work)", WORK, RED),
    ];
    for (kind, what, time, colour) in curves {
        let series = findings.series_of(kind, MEMORY, Setting::Single);
        lines.push(Line {
            name: format!("{} fork: {what}", kind.name()),
            colour,
            points: cumulative(series.into_iter().flat_map(|series| series.forks().map(time))),
        });
    }
    lines.retain(|line| !line.points.is_empty());
    let times = || lines.iter().flat_map(|line| &line.points).map(|(time, _)| *time);
    let (least, most) = (times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
    let x = (least * 0.8..most * 1.2).log_scale();
    let frame = Frame {
        file: LATENCY,
        title: "Forks of a 512 MiB template, one by one: share that had come so far",
        axes: ["milliseconds since the request", "%"],
        legend: SeriesLabelPosition::LowerRight,
    };
    draw(&frame, x, 0.0..100.0, &lines)
}

/// Each value with the share, in percent, of those that are not larger.
fn cumulative(values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let all = count(values.len() as u64);
    let shares = (1..).map(|rank| count(rank) * 100.0 / all);
    values.into_iter().zip(shares).collect()
}

/// Memory against the number of forks.
pub(super) fn memory(fleet: &Fleet) -> Result<String, BenchError> {
    type Bytes = fn(&Step) -> f64;
    let curves: [(&str, Bytes, RGBColor); 3] = [
        ("the host has less available", |step| step.taken, RED),
        ("PSS of all VMMs", |step| count(step.pss), BLUE),
        ("private, with page tables", |step| count(step.private), GREEN),
    ];
    let lines: Vec<Line> = curves
        .into_iter()
        .map(|(name, bytes, colour)| Line {
            name: name.to_owned(),
            colour,
            points: std::iter::once((0.0, 0.0))
                .chain(
                    fleet
                        .steps
                        .iter()
                        .map(|step| (count(step.forks), bytes(step) / count(MIB))),
                )
                .collect(),
        })
        .collect();
    let all = || lines.iter().flat_map(|line| &line.points);
    let forks = all().map(|(forks, _)| *forks).fold(1.0, f64::max);
    let most = all().map(|(_, bytes)| *bytes).fold(1.0, f64::max);
    let frame = Frame {
        file: MEMORY_USE,
        title: "Live forks of one 512 MiB template, each of which has written",
        axes: ["forks", "MiB"],
        legend: SeriesLabelPosition::UpperLeft,
    };
    draw(&frame, 0.0..forks, 0.0..most * 1.05, &lines)
}

/// Draws lines from left to right, with a legend.
fn draw<X>(frame: &Frame, x: X, y: Range<f64>, lines: &[Line]) -> Result<String, BenchError>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut svg = String::new();
    draw_to(&mut svg, frame, x, y, lines).map_err(|error| BenchError::Chart {
        what: frame.file,
        why: error.to_string(),
    })?;
    // Files end with a line's end.
    svg.push('\n');
    Ok(svg)
}

fn draw_to<X>(
    svg: &mut String,
    frame: &Frame,
    x: X,
    y: Range<f64>,
    lines: &[Line],
) -> Result<(), Box<dyn Error>>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| error.to_string())?;
    let mut chart = ChartBuilder::on(&root)
        .caption(frame.title, TITLE)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(x, y)
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .x_desc(frame.axes[0])
        .y_desc(frame.axes[1])
        .x_labels(LABELS)
        .x_label_formatter(&|value| plain(*value))
        .y_label_formatter(&|value| plain(*value))
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .light_line_style(WHITE)
        .draw()
        .map_err(|error| error.to_string())?;
    for Line { name, colour, points } in lines {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))
            .map_err(|error| error.to_string())?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    chart
        .configure_series_labels()
        .position(frame.legend.clone())
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .label_font(TEXT)
        .draw()
        .map_err(|error| error.to_string())?;
    root.present().map_err(|error| error.to_string())?;
    drop(chart);
    Ok(())
}

/// A number without decimals that say nothing.
fn plain(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_along_an_axis_are_short() {
        assert_eq!(
            [0.05, 0.5, 1.0, 10.0, 500.0].map(plain),
            ["0.05", "0.5", "1", "10", "500"]
        );
    }

    #[test]
    fn shares_rise_to_all_of_them() {
        let found = cumulative([3.0, f64::NAN, 1.0].into_iter());
        assert_eq!(found, [(1.0, 50.0), (3.0, 100.0)]);
    }

    #[test]
    fn a_drawing_has_its_axes_and_the_name_of_each_line() {
        let lines = [Line {
            name: "the line".to_owned(),
            colour: BLUE,
            points: vec![(1.0, 0.0), (100.0, 50.0)],
        }];
        let frame = Frame {
            file: LATENCY,
            title: "title",
            axes: ["across", "up"],
            legend: SeriesLabelPosition::LowerRight,
        };
        let svg = draw(&frame, (1.0..100.0).log_scale(), 0.0..100.0, &lines);
        let svg = svg.expect("it can be drawn");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(
            ["title", "across", "up", "the line"]
                .iter()
                .all(|text| svg.contains(text))
        );
    }
}
