"""Whether today's code fine-tunes as an older commit did: rows of a study, a few steps.

    git worktree add --detach ../older COMMIT
    python -m tests.same_study --old ../older --data DIR --out /tmp/same [--only question_type]

Both trees train every row of their own configs/study/tasks.yaml (`--study methods`: of that) from
random weights, seed 0, here; printed is whether all losses, and all figures of val, are the same
bits. DIR is the study's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import yaml

HERE = pathlib.Path(__file__).parent.parent
CHANGED = {
    "weights": "random",
    "train.steps": 20,
    "schedule.warmup": 5,
    "data.limit": 600,
    "run.log_every": 1,
    "run.seed": 0,
    "optim.lr": 0.005,
    "run.wandb.mode": "disabled",
}
SHAPES = {
    "en_encoder": ("small_encoder.yaml", "en"),
    "zh_encoder": ("small_encoder.yaml", "zh"),
    "en_decoder": ("small_decoder.yaml", "en"),
}


def call(tree: pathlib.Path, *words: object) -> None:
    """Run Python in a tree, on one thread; raises CalledProcessError with what it said."""
    environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def prepare(old: pathlib.Path, data: pathlib.Path, out: pathlib.Path) -> None:
    """Tokenizers by today's code, and for each shape one step by the older one, which both open."""
    english = [f"table:{data}/{name}/train.jsonl:text" for name in ("question_type", "sms_spam")]
    chinese = [f"table:{data}/zh_ner/train.jsonl:tokens", "--source_options"]
    chinese.append('{table: {joiner: ""}}')
    for name, sources in (("en", english), ("zh", chinese)):
        if not (out / name / "manifest.json").exists():
            words = ("prepare", *sources, "--out", out / name, "--vocab_size", 4096)
            call(HERE, "-m", "nanolm", *words)
    for name, (config, corpus) in SHAPES.items():
        if not (out / name / "summary.json").exists():
            words = ("--config", f"configs/pretrain/{config}", "--data.path", out / corpus)
            words += ("--run.dir", out / name, "--train.steps", 1, "--schedule.warmup", 0)
            call(old, "train.py", *words, "--eval.batches", 1, "--run.wandb.mode", "disabled")


def overrides(tree: pathlib.Path, study: str) -> dict[str, dict[str, Any]]:
    """Row -> the keys that it sets, of a tree's study."""
    found = yaml.safe_load((tree / f"configs/study/{study}.yaml").read_text(encoding="utf-8"))
    rows = found["rows"]
    return {row["name"]: found["overrides"] | row.get("overrides", {}) for row in rows}


def lines_of(
    tree: pathlib.Path,
    keys: dict[str, Any],
    folder: pathlib.Path,
    data: pathlib.Path,
    out: pathlib.Path,
) -> list[dict[str, Any]]:
    """metrics.jsonl of one row, trained unless it was before."""
    if not (folder / "summary.json").exists():
        keys = keys | CHANGED
        keys.pop("train.epochs", None)
        places = {"data": data} | {name: out / name for name in SHAPES}
        words = [
            f"--{key}={value.format(**places) if isinstance(value, str) else json.dumps(value)}"
            for key, value in keys.items()
        ]
        call(tree, "-m", "nanolm", "finetune", *words, f"--run.dir={folder}")
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """What two runs have not in common: steps whose losses differ, figures of val that differ."""
    found = []
    for kind in ("train", "val"):
        pairs = zip(*([x for x in lines if x["kind"] == kind] for lines in (old, new)), strict=True)
        for a, b in pairs:
            keys = ["loss"] if kind == "train" else sorted(a.keys() & b.keys() - {"time"})
            found += [
                f"{kind} step {a['step']} {key} {a[key]} {b[key]}"
                for key in keys
                if a[key] != b[key] and "second" not in key
            ]
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("old", "data", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--study", default="tasks", choices=("tasks", "methods"))
    arguments = parser.parse_args()
    old, data, out = (getattr(arguments, name).resolve() for name in ("old", "data", "out"))
    out.mkdir(parents=True, exist_ok=True)
    prepare(old, data, out)
    rows = {tree: overrides(tree, arguments.study) for tree in (old, HERE)}
    for row in arguments.only or rows[HERE]:
        runs = [
            lines_of(tree, rows[tree][row], out / side / row.replace(" ", "-"), data, out)
            for side, tree in (("old", old), ("new", HERE))
        ]
        print(f"{row}: {'; '.join(differences(*runs)[:6]) or 'the same bits'}", flush=True)


if __name__ == "__main__":
    main()
