"""One batch on its way through nanolm, with the shapes of the table in docs/one_batch.md.

python docs/one_batch.py runs/demo-data        (a folder that `nanolm prepare` wrote)
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # a bare checkout is enough

from nanolm import build
from nanolm.config.load import load_config
from nanolm.training.loader import Loader

SHAPE = ["--model.d_model=384", "--data.row_length=256", "--train.global_batch=16"]


def show(what: str, *values: object) -> None:
    shapes = [
        f"{list(v.shape)!s:<15} {str(v.dtype).removeprefix('torch.')}"
        if hasattr(v, "shape")
        else str(v)
        for v in values
    ]
    print(f"{what:<42} {'   '.join(shapes)}")


def walk(folder: str, objective_name: str, trunk: str) -> None:
    names = [f"--objective.name={objective_name}", f"--model.trunk={trunk}"]
    config = load_config([*SHAPE, *names, f"--data.path={folder}"])
    tokenizer = build.build_tokenizer(config)
    config = build.resolve(config, tokenizer)
    objective = build.build_objective(config, tokenizer)
    print(f"\n{objective_name}, {trunk}")

    stream = build.build_stream(config, objective, "train")
    rows = stream.rows(0, 16)
    show("1 RowStream.rows(0, 16)", f"{len(rows)} rows", rows[0].tokens)

    loader = Loader(stream, objective, global_batch=16, micro_batch=16)
    (batch,) = next(iter(loader))
    for name, tensor in batch.tensors.items():
        show(f"2 batch[{name!r}]", tensor)
    show("  targets counted before the first backward", batch.counts)

    learner = build.build_learner(config, objective)
    inputs = objective.inputs(batch.tensors)
    hidden = learner.trunk(inputs)
    show("4 trunk(inputs): hidden states", hidden)
    terms = objective.loss(hidden, learner.heads, batch.tensors)
    for name, term in terms.items():
        show(f"5 terms[{name!r}]: sum / count", f"{term.sum.item():.1f} / {int(term.count)}")

    sum(terms[t].sum / batch.counts[t] * w for t, w in objective.weights.items()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters()])
    show("6 one denominator, backward: gradient norm", f"{float(norm):.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    walk(sys.argv[1], "clm", "decoder")
    walk(sys.argv[1], "mlm", "encoder")
