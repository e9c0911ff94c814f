"""`nanolm study STUDY.yaml`: a table of fine-tuning experiments, restartable cell by cell.

STUDY.yaml is an instance of `StudyConfig`; any of its keys can be given beside it, as
in `nanolm study configs/study/tasks.yaml --data DIR --jobs 2`.
"""

from __future__ import annotations

import pathlib
import signal

from nanolm.config.load import parse
from nanolm.errors import UserError
from nanolm.finetune.study.config import StudyConfig
from nanolm.finetune.study.run import Results, Study, plan
from nanolm.finetune.study.table import grid_of, sheet, split_page, write_page
from nanolm.tables import show
from nanolm.terminal import say


def main(argv: list[str]) -> None:
    """Reads the study and runs it."""
    if argv and not argv[0].startswith("-"):
        argv = [f"--config={argv[0]}", *argv[1:]]
    run(parse(StudyConfig, argv, prog="nanolm study"))


def run(study: StudyConfig) -> None:
    """Runs what is missing of a study, prints the table and writes it into its page.

    Raises UserError before anything is run for a cell whose config is refused, and at the end for
    the first cell that failed.
    """
    if study.table is not None:
        split_page(study)
    results = Results(pathlib.Path(study.results or f"{study.out}/{study.name}.json"))
    groups = plan(study, results.defaults)
    say(
        f"study {study.name}: {len(groups)} groups of {len(study.seeds)} seeds, {study.jobs} at "
        f"once; {len(results.cells)} cells are in {results.path}"
    )
    runner = Study(study, results, say)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the cells too
    try:
        runner.run(groups)
    except KeyboardInterrupt:
        raise UserError(
            "interrupted; finished cells are kept, and the same command runs the others"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        made = sheet(study, groups, results)
        show(grid_of(study, made))
    if study.table is not None and study.only is None:
        write_page(study, made)
