"""Bare checkout, editable install and wheel all work, and install no top-level name but nanolm."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROBE = """
import nanolm, nanolm.data.permutation, nanolm.kernels
from nanolm.errors import UserError
print(nanolm.data.permutation.__file__)
"""


def python(*words: str, cwd: pathlib.Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=env or None
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pip(*words: str, cwd: pathlib.Path) -> None:
    python("-m", "pip", *words, "-q", "--no-deps", "--no-build-isolation", cwd=cwd)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
    """The project's own files, so that builds leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("nanolm", "kernels", "data", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def test_bare_checkout_works_from_any_directory(tmp_path):
    found = python("-c", PROBE, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert found == str(ROOT / "data" / "permutation.py")


@pytest.fixture
def bare(tmp_path):
    """Settings of a process that has this checkout and its libraries, but neither jsonargparse nor
    wandb, as on a cluster where nothing may be installed."""
    for name in ("jsonargparse", "wandb"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    paths = f"{tmp_path}:{ROOT}"
    return {"cwd": tmp_path, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.mark.slow
def test_a_bare_checkout_prepares_trains_and_evaluates_without_jsonargparse_and_wandb(bare):
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = [str(library / name) for name in ("argparse.py", "textwrap.py", "statistics.py")]
    nanolm = ("-m", "nanolm")
    python(
        *nanolm, "prepare", *texts, "--out=data", "--vocab_size=512", "--val_fraction=0.3", **bare
    )
    model = ("--model.d_model=32", "--model.n_layers=1", "--model.n_heads=2")
    sizes = ("--data.row_length=32", "--train.global_batch=4", "--train.steps=3")
    run = ("--data.path=data", "--run.dir=run", "--run.log_every=1", "--run.device=cpu")
    printed = python(*nanolm, "train", *model, *sizes, *run, **bare)
    assert "W&B is off for the rest of this run" in printed and "no wandb here" in printed
    assert (bare["cwd"] / "run" / "summary.json").is_file()
    assert "bits_per_byte" in python(*nanolm, "evaluate", "--run=run", "--device=cpu", **bare)


@pytest.mark.slow
def test_help_without_jsonargparse_is_one_sentence_and_its_remedy_works(bare):
    for command in (["train"], ["finetune"], ["prepare"], ["kernels", "list"]):
        words = [sys.executable, "-m", "nanolm", *command, "--help"]
        environment = {key: value for key, value in bare.items() if key != "cwd"}
        done = subprocess.run(
            words, cwd=bare["cwd"], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 2 and done.stderr.startswith("nanolm: --help is written by")
        assert len(done.stderr.splitlines()) == 1
    assert "d_model:" in python("-m", "nanolm", "train", "--print_config", **bare)


def test_the_kernels_package_of_others_stays_importable(tmp_path):
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path / 'site')!r})\nimport kernels\n"
    code += "import nanolm.kernels\nprint(kernels.whose)"
    assert python("-c", code, cwd=ROOT) == "theirs"


def test_the_wheel_installs_only_nanolm(copy, tmp_path):
    pip("wheel", ".", "-w", str(tmp_path), cwd=copy)
    (wheel,) = tmp_path.glob("nanolm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"nanolm"}
    modules = {name for name in names if name.endswith(".py")}
    for folder, inside in (
        ("nanolm", "nanolm"),
        ("data", "nanolm/data"),
        ("kernels", "nanolm/kernels"),
    ):
        for path in (copy / folder).rglob("*.py"):
            assert f"{inside}/{path.relative_to(copy / folder)}" in modules
    pip("install", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    found = python("-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert found == str(tmp_path / "site" / "nanolm" / "data" / "permutation.py")


def test_the_editable_install_works(copy, tmp_path):
    # Without --ignore-installed pip would remove the nanolm of the environment that runs the tests.
    pip("install", "--ignore-installed", "--prefix", str(tmp_path), "-e", ".", cwd=copy)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    # -S: its libraries, but not the editable install of the environment itself, which would win.
    libraries = sysconfig.get_paths()["purelib"]
    paths = f"site.addsitedir({str(site)!r}); sys.path.append({libraries!r})"
    code = f"import site, sys; {paths}\n{PROBE}"
    assert python("-S", "-c", code, cwd=tmp_path) == str(copy / "data" / "permutation.py")
