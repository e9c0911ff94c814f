"""Losses that a change of the house must not change: written down before it, compared after it.

    python -m tests.same_losses --folder OLD --out losses.json                       before
    python -m tests.same_losses --folder NEW --against losses.json --old OLD         after

Six runs of 20 steps, by the command line alone: the demo's CLM and MLM, a fine-tuning run and one
with LoRA from the first, two ranks under DDP and under FSDP. Losses are compared bit for bit, and
the command exits with 1 where one differs; --old evaluates the runs that were written before, so
that checkpoints and data stay readable.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
COMMON = [
    *("--train.steps=20", "--run.log_every=1", "--run.wandb.mode=disabled", "--run.device=cpu"),
    *("--eval.every=0", "--eval.batches=2", "--run.threads=1", "--run.checkpoint_every=0"),
    "--schedule.warmup=5",
]
SMALL = ["--model.n_layers=2", "--model.d_model=128", "--model.n_heads=2"]
PRETRAIN = "configs/pretrain/demo_{}.yaml"


def python(*words: str) -> None:
    """Runs Python on this checkout; its output is shown."""
    print("$", *words, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def torchrun(*words: str) -> None:
    """Two ranks of train.py."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    python(*launcher, "train.py", *words)


def losses(run: pathlib.Path) -> list[str]:
    """The losses of a run's lines, training and validation, each exactly."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]).hex() for line in lines]


def take(folder: pathlib.Path) -> dict[str, list[str]]:
    """{run: losses} of all six, made in the folder."""
    data = folder / "data"
    if not (data / "manifest.json").is_file():
        python(
            *("-m", "nanolm", "prepare", "stdlib", f"--out={data}", "--vocab_size=4096"),
            *("--tokenizer_type=bpe", "--workers=2"),
        )

    def words(name: str, objective: str) -> list[str]:
        config = PRETRAIN.format(objective)
        return [f"--config={config}", f"--data.path={data}", f"--run.dir={folder / name}", *COMMON]

    for objective in ("clm", "mlm"):
        python("-m", "nanolm", "train", *words(objective, objective))
    tuned = ["-m", "nanolm", "finetune", "--config=configs/finetune/demo_clm.yaml", *COMMON]
    tuned.append(f"--init_from={folder / 'clm'}")
    python(*tuned, f"--run.dir={folder / 'finetune'}")
    python(*tuned, f"--run.dir={folder / 'lora'}", "--peft.name=lora")
    torchrun(*words("ddp", "clm"), *SMALL)
    torchrun(*words("fsdp", "clm"), *SMALL, "--distributed.strategy=fsdp")
    names = ("clm", "mlm", "finetune", "lora", "ddp", "fsdp")
    return {name: losses(folder / name) for name in names}


def main() -> None:
    """Writes the losses down, or compares them with those that were."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where data and runs are made, and kept")
    parser.add_argument("--out", help="write the losses to this file")
    parser.add_argument("--against", help="compare them with those of this file")
    parser.add_argument("--old", help="a folder of an earlier call: its runs are evaluated again")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.folder)
    found = take(folder)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    if arguments.old:
        for name in ("clm", "mlm", "ddp", "fsdp", "finetune", "lora"):
            python("-m", "nanolm", "evaluate", str(pathlib.Path(arguments.old) / name))
    if arguments.against:
        before = json.loads(pathlib.Path(arguments.against).read_text())
        for name, values in found.items():
            same = values == before[name]
            first, last = (float.fromhex(value) for value in (values[0], values[-1]))
            verdict = "the same bits" if same else "DIFFERENT"
            print(f"{name:<10} {len(values)} losses, {first:.6f} to {last:.6f}: {verdict}")
        raise SystemExit(0 if found == before else 1)


if __name__ == "__main__":
    main()
