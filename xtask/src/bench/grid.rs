//! Tables, on the terminal and in Markdown.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::rows::{Bound, Target};

/// A rule above, below and under the header.
const RULED: TableStyle = TableStyle::new()
    .top_border(LineStyle::none().fill('─').junction('─'))
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));

/// A table of texts: the first column to the left, the others to the right.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    header: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Grid {
    pub(super) fn new(header: &[&str]) -> Self {
        Self {
            header: header.iter().map(|&text| text.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Targets, with `marks` for those that are met and those that are missed.
    pub(super) fn of_targets(targets: &[Target], marks: [&str; 2]) -> Self {
        let mut grid = Self::new(&["target", "is", "aim", ""]);
        for target in targets {
            let aim = match target.bound {
                Bound::AtMost(aim) => format!("at most {aim}"),
                Bound::AtLeast(aim) => format!("at least {aim}"),
            };
            let mark = marks[usize::from(!target.is_met())];
            grid.rows.push(vec![
                target.name.clone(),
                format!("{:.3}", target.value),
                aim,
                mark.to_owned(),
            ]);
        }
        grid
    }

    pub(super) fn terminal(&self) -> String {
        let mut table = Table::new();
        table.load_style(RULED);
        table.set_header(&self.header).add_rows(&self.rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    pub(super) fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = format!("|---|{}\n", "---:|".repeat(self.header.len().saturating_sub(1)));
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.header) + &rule + &rows
    }
}
