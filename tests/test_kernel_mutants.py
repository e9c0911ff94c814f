"""Every planted bug is found by some check, and an unchanged copy by none."""

import pytest
import torch

from tests.kernel_tools.mutants import MUTANTS, Mutant, build, table, verdict

if torch.cuda.is_available():
    pytest.skip("mutants run in the interpreter", allow_module_level=True)


@pytest.fixture
def small_tiles(monkeypatch):
    from nanolm.kernels import launch

    for kind in launch.KINDS:
        monkeypatch.setitem(launch.INTERPRETER, kind, launch.Launch(16, 16))


def test_each_planted_bug_is_found(small_tiles, tmp_path, capsys):
    honest = build(None, 99, tmp_path)
    assert set(verdict(Mutant("none", "", "", "", "narrow"), honest).values()) == {"-"}
    verdicts = {}
    for index, mutant in enumerate(MUTANTS):
        verdicts[mutant.name] = verdict(mutant, build(mutant, index, tmp_path))
    with capsys.disabled():
        print("\n" + table(verdicts))
    assert len(MUTANTS) >= 12
    missed = [name for name, found in verdicts.items() if "found" not in found.values()]
    assert not missed
    only = [name for name, found in verdicts.items() if found["numbers"] != "found"]
    assert len(only) >= 3  # the sanitizer earns its place
