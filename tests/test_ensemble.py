"""Several seeds and folds in one command, and their runs as one model."""

import json

import pytest
import torch

from nanolm.data.tables.files import Table
from nanolm.data.tables.splits import fold_out
from nanolm.errors import UserError
from nanolm.finetune.ensemble import of_logits, open_together
from nanolm.finetune.run import main
from nanolm.finetune.splits import make_split
from nanolm.saved import open_saved
from tests.finetuned import QUIET, checkpoint, command, finetune, questions, table
from tests.test_objectives_tasks import RECORDS

SHORT = ("--optim.lr=3e-3", "--train.global_batch=12", "--objective.head_dropout=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split, n, start in (("train", 96, 0), ("val", 21, 1000), ("test", 21, 2000)):
        table(folder, split, questions(n, start))
    return folder


@pytest.fixture(scope="module")
def seeds(data, tmp_path_factory):
    """Three seeds of one run, from one command."""
    run = tmp_path_factory.mktemp("seeds") / "run"
    words = [f"--init_from={checkpoint('mlm')}", f"--data.path={data}", f"--run.dir={run}"]
    main([*words, *QUIET, *SHORT, "--run.seeds=[0,1,2]", "--train.steps=8"])
    return run


def test_seeds_report_mean_and_deviation(seeds, capsys):
    summary = json.loads((seeds / "summary.json").read_text())
    assert summary["runs"] == ["seed-0", "seed-1", "seed-2"]
    parts = [json.loads((seeds / name / "summary.json").read_text()) for name in summary["runs"]]
    values = [part["val"]["accuracy"] for part in parts]
    figure = summary["val"]["accuracy"]
    assert figure["values"] == values and figure["mean"] == pytest.approx(sum(values) / 3)
    assert figure["std"] == pytest.approx(float(torch.tensor(values).double().std()))
    assert summary["val"]["best accuracy"]["values"] == [part["best_val"] for part in parts]


def test_the_average_of_logits_and_of_weights(seeds, data, tmp_path):
    names = [str(seeds / name) for name in ("seed-0", "seed-1", "seed-2")]
    out = {}
    for average in ("logits", "weights"):
        path = tmp_path / f"{average}.json"
        more = ("--ensemble", *names[1:], f"--average={average}", f"--json={path}")
        command("evaluate", names[0], *more)
        out[average] = json.loads(path.read_text())
        assert out[average]["rows"] == 21 and out[average]["split"] == "test"
    assert not (seeds / "seed-0" / "evaluation").exists()  # it is not seed 0 that was evaluated
    lines = tmp_path / "lines.jsonl"
    command(
        "predict", names[0], str(data / "test.jsonl"), "--ensemble", *names[1:], f"--out={lines}"
    )
    assert len(lines.read_text().splitlines()) == 21
    # weights: the mean of each tensor
    middle = open_together(names[0], names[1:], "weights").learner.state_dict()
    each = [open_saved(name).learner.state_dict() for name in names]
    for key, tensor in middle.items():
        mean = torch.stack([state[key].double() for state in each]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


# One task of each shape of output: labels, tags, spans and a language model's scores.
@pytest.mark.parametrize(
    "name",
    [
        *("classify", "tag", "read", "choose_lm"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("regress", "choose", "choose_dual", "prompt")
        ),
    ],
)
def test_heads_beside_each_other_give_the_mean_of_their_outputs(name, tmp_path):
    table(tmp_path / "data", "train", RECORDS[name])
    table(tmp_path / "data", "val", RECORDS[name])
    words = [f"--objective.name={name}", "--train.steps=1", "--data.row_length=64"]
    words += ['--objective.words={"yes": list, "no": file}'] if name == "prompt" else []
    words += ["--objective.stride=16"] if name == "read" else []
    for seed in (0, 1):
        run = tmp_path / str(seed)
        finetune(checkpoint("mlm"), tmp_path / "data", run, *words, f"--run.seed={seed}")
    members = [open_saved(tmp_path / str(seed)) for seed in (0, 1)]
    task = members[0].learner.objective
    records = [json.loads(line) for line in (tmp_path / "data/val.jsonl").read_text().splitlines()]
    records = Table("val", records, list(range(len(records))))
    items = make_split("val", records, task, members[0].config.data).items
    batch = {key: torch.as_tensor(value) for key, value in task.collate(items).items()}
    both = of_logits(members)
    heads = []
    for learner in (*(member.learner for member in members), both):
        (head,) = learner.heads.values()
        outputs: list = []
        head.register_forward_hook(lambda m, i, o, outputs=outputs: outputs.append(o))
        with torch.no_grad():
            hidden = learner.trunk(task.inputs(batch))
            answers = task.answers(hidden, learner.heads, batch)
        assert len(answers) == len(items)
        heads.append(outputs[-1])
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)


def test_folds_cover_every_record_once_and_equal_records_stay_together(tmp_path):
    records = [record | {"id": i} for i, record in enumerate(questions(60))] * 2
    whole = Table("t", records, list(range(1, 121)))
    held: list[int] = []
    for fold in range(5):
        train, val = fold_out(whole, 5, fold)
        assert sorted(train.numbers + val.numbers) == whole.numbers
        texts = {json.dumps(record, sort_keys=True) for record in val.records}
        assert not texts & {json.dumps(record, sort_keys=True) for record in train.records}
        held += val.numbers
    assert sorted(held) == whole.numbers
    with pytest.raises(UserError, match=r"too small for data\.folds=50"):
        fold_out(Table("t", records[:3], [1, 2, 3]), 50, 0)
    run = tmp_path / "run"
    table(tmp_path / "data", "train", records)
    words = [f"--init_from={checkpoint('mlm')}", f"--data.path={tmp_path / 'data'}"]
    words.append(f"--run.dir={run}")
    main([*words, *QUIET, *SHORT, "--data.folds=2", "--train.steps=2"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["runs"] == ["fold-0", "fold-1"]
    sizes = [json.loads((run / n / "summary.json").read_text()) for n in summary["runs"]]
    assert sizes[0]["val_records"] == sizes[1]["train_records"]


def test_mistakes(seeds, data, tmp_path, monkeypatch):
    base = checkpoint("mlm")
    finetune(base, data, tmp_path / "random", *SHORT, "--train.steps=1", "--weights=random")
    first = str(seeds / "seed-0")
    with pytest.raises(UserError, match="started from the same pretrained weights"):
        open_together(first, [str(tmp_path / "random")], "weights")
    finetune(base, data, tmp_path / "long", *SHORT, "--train.steps=1", "--data.row_length=48")
    with pytest.raises(UserError, match=r"differs from .* in data\.row_length"):
        open_together(first, [str(tmp_path / "long")])
    with pytest.raises(UserError, match="was pretrained, not fine-tuned"):
        open_together(first, [str(base)])
    words = [f"--init_from={base}", f"--data.path={data}", *QUIET]
    for more, sentence in (
        (["--run.seeds=[1,1]"], "must be different seeds"),
        (["--data.fold=2", "--data.folds=2"], "must be below data.folds=2"),
    ):
        with pytest.raises(UserError, match=sentence):
            main([*words, *more])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the seeds one by one under torchrun"):
        main([*words, "--run.seeds=[1,2]"])


def test_two_evaluated_runs_are_compared(seeds):
    names = [str(seeds / name) for name in ("seed-1", "seed-2")]
    with pytest.raises(UserError, match="first run `nanolm evaluate"):
        command("compare", *names)
    for name in names:
        command("evaluate", name)
    printed = command("compare", *names)
    assert "macro_f1" in printed and "accuracy: " in " ".join(printed.split())
