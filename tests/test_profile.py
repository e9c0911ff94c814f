"""`nanolm profile`: one step of the run, as a table and a Chrome trace."""

import contextlib
import io
import json

from nanolm import cli
from tests.prepared import SMALL, prepared_corpus


def test_one_step_as_table_and_trace(tmp_path):
    run = tmp_path / "na\udcefve"  # a name that is no text, as files may have
    words = [*SMALL, f"--data.path={prepared_corpus()}", f"--run.dir={run}"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.run(["profile", *words])
    assert "aten::" in text.getvalue() and "forward" in text.getvalue()
    trace = json.loads((run / "profile" / "rank-0.json").read_text())
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])
    assert sorted(p.name for p in run.iterdir()) == ["profile"]
