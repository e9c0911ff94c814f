"""A study as a table: on the terminal, and as Markdown between markers of a docs file.

mean ± standard error over seeds, sqrt(sum (x - mean)^2 / (n - 1) / n)
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence

from rich.console import Group as Lines
from rich.text import Text

from nanolm.errors import UserError, require
from nanolm.files import write_text
from nanolm.finetune.study.config import StudyConfig
from nanolm.finetune.study.run import Group, Record, Results, finished_records
from nanolm.tables import tables


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The table's head, its lines and what is said beneath."""

    head: list[str]
    lines: list[list[str]]
    notes: list[str]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None for a single value."""
    n = len(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def shown(values: Sequence[float]) -> str:
    """0.861 ± 0.004."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def sheet(study: StudyConfig, groups: list[Group], results: Results) -> Sheet:
    """All that is finished; what is not is left empty."""
    found = [(group, finished_records(group, results)) for group in groups]
    head, lines = costs(study, found) if study.costs else beside(study, found)
    return Sheet(head, lines, [*choices(found), spent(groups, results, study)])


def beside(
    study: StudyConfig, found: list[tuple[Group, list[Record] | None]]
) -> tuple[list[str], list[list[str]]]:
    """A line for each row, a column for each variant, the yardstick beside them."""
    variants = list(study.variants)
    head = ["row", "metric", "yardstick", "goal", *(name or "test" for name in variants)]
    by_place = {(group.row.name, group.variant): records for group, records in found}
    lines = []
    for row in dict.fromkeys(group.row.name for group, _ in found):
        config = next(r for r in study.rows if r.name == row)
        metric = next(reported_by(g) for g, _ in found if g.row.name == row)
        bars = ["" if bar is None else f"{bar:.3f}" for bar in (config.yardstick, config.goal)]
        cells = [by_place.get((row, variant)) for variant in variants]
        lines.append([row, metric, *bars, *(on_test(records, metric) for records in cells)])
    return head, lines


def costs(
    study: StudyConfig, found: list[tuple[Group, list[Record] | None]]
) -> tuple[list[str], list[list[str]]]:
    """A line for each row and variant: metric, trainable parameters, seconds, peak memory."""
    head = ["row", *(["variant"] if len(study.variants) > 1 else []), "metric", "val", "test"]
    head += ["trained parameters", "seconds", "peak MiB"]
    lines = []
    for group, records in found:
        line = [group.row.name, *([group.variant] if len(study.variants) > 1 else [])]
        metric, reported = metric_of(group, records), reported_by(group)
        line.append(metric if metric == reported else f"{metric}, {reported}")
        if records is None:
            lines.append(line + [""] * (len(head) - len(line)))
            continue
        mean = {key: statistics.fmean(r[key] for r in records) for key in ("seconds", "peak_mib")}
        line += [shown([record["val"] for record in records]), on_test(records, reported)]
        line += [f"{records[0]['trained_params']:,}", f"{mean['seconds']:.0f}"]
        lines.append([*line, f"{mean['peak_mib']:.0f}"])
    return head, lines


def metric_of(group: Group, records: list[Record] | None) -> str:
    """The figure that chose: as the runs resolved it, or before there are any as configured."""
    return records[0]["metric"] if records else group.finals[0][0].metric


def reported_by(group: Group) -> str:
    """The figure of the test split."""
    return group.finals[0][0].reported


def on_test(records: list[Record] | None, reported: str) -> str:
    """The reported figure on test, mean and standard error."""
    if records is None:
        return ""
    return shown([record["test"][reported] for record in records])


def choices(found: list[tuple[Group, list[Record] | None]]) -> list[str]:
    """What the grid chose, in one line; none when there was no grid."""
    named = []
    for group, records in found:
        if records and group.tries:
            setting = ", ".join(f"{k} {v}" for k, v in records[0]["setting"].items())
            named.append(f"{' '.join(filter(None, [group.row.name, group.variant]))}: {setting}")
    return [f"Chosen on val — {'; '.join(named)}."] if named else []


def spent(groups: list[Group], results: Results, study: StudyConfig) -> str:
    """Seeds, cells and CPU minutes."""
    keys = {cell.key for group in groups for cell in group.cells}
    records = [results.cells[key] for key in sorted(keys & results.cells.keys())]
    minutes = sum(record["cpu_seconds"] for record in records) / 60
    seeds = f"mean ± standard error of {len(study.seeds)} seeds"
    seeds = seeds if len(study.seeds) > 1 else "one seed"
    return (
        f"Test split, {seeds}; {len(records)} cells, {minutes:.1f} CPU minutes in all "
        f"(one thread a cell)."
    )


def grid_of(study: StudyConfig, made: Sheet) -> Lines:
    """The table for the terminal."""
    words = made.head.index("metric") + 1
    parts = tables(made.head, made.lines, left=words)
    return Lines(Text(f"study {study.name}", style="bold"), *parts, *map(Text, made.notes))


def markdown(made: Sheet) -> str:
    """The table as Markdown."""
    rows = [made.head, ["---"] * len(made.head), *made.lines]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([text, *made.notes])


def markers(study: StudyConfig) -> tuple[str, str]:
    """The lines between which the table stands."""
    return f"<!-- study: {study.name} -->", f"<!-- end of study: {study.name} -->"


def split_page(study: StudyConfig) -> tuple[str, str]:
    """The page before and after the table; raises UserError when it has no place for one."""
    path = pathlib.Path(str(study.table))
    begin, end = markers(study)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table: cannot read {path}: {error}") from None
    require(
        text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end),
        f"table: {path} needs one line {begin} and below it one line {end}",
    )
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def write_page(study: StudyConfig, made: Sheet) -> None:
    """Puts the table in its place."""
    before, after = split_page(study)
    write_text(pathlib.Path(str(study.table)), f"{before}\n\n{markdown(made)}\n\n{after}")
