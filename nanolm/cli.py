"""The command line: `nanolm COMMAND …`, the same as `python -m nanolm COMMAND …`.

A command is a module with an `Arguments` dataclass (whose fields' docstrings are its `--help`),
`run(arguments)`, and perhaps `POSITIONAL`, the fields that words without a key fill. Only the
command's own module is imported, so `nanolm prepare` needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys

from nanolm.errors import NO_DRIVER, UserError
from nanolm.files import refused_by_the_disk

COMMANDS = {
    "prepare": ("nanolm.commands.prepare", "text -> tokenizer and token shards"),
    "data inspect": ("nanolm.commands.data.inspect", "what a prepared folder holds"),
    "data verify": ("nanolm.commands.data.verify", "re-check every checksum and token id"),
    "train": ("nanolm.commands.train", "pretrain a model"),
    "finetune": ("nanolm.commands.finetune", "turn a checkpoint into a classifier, tagger, …"),
    "study": ("nanolm.commands.study", "a table of fine-tuning experiments, cell by cell"),
    "predict": ("nanolm.commands.predict", "labels, spans or texts of a fine-tuned model"),
    "explain": ("nanolm.commands.explain", "which tokens made a model say what it says"),
    "merge": ("nanolm.commands.merge", "fold an adapter into its base's weights"),
    "export": ("nanolm.commands.export", "a model as one folder, also for transformers"),
    "import": ("nanolm.commands.import_", "a published checkpoint as a nanolm folder"),
    "parity": ("nanolm.commands.parity", "our models beside transformers', random weights"),
    "evaluate": ("nanolm.commands.evaluate", "figures of a checkpoint on a split"),
    "compare": ("nanolm.commands.compare", "two evaluated runs side by side"),
    "generate": ("nanolm.commands.generate", "write text with a decoder"),
    "fill": ("nanolm.commands.fill", "fill masks with an encoder"),
    "estimate": ("nanolm.commands.estimate", "memory, speed and days of a run, before it starts"),
    "profile": ("nanolm.commands.profile", "operators and phases of one step, Chrome trace"),
    "walk": ("nanolm.commands.walk", "one real row through one step, function by function"),
    "doctor": ("nanolm.commands.doctor", "replay a step, name its first non-finite tensor"),
    "runs": ("nanolm.commands.runs", "runs as a table"),
    "plot": ("nanolm.commands.plot", "curves of one or several runs as PNG"),
    "figures": ("nanolm.commands.figures", "the pictures of the docs, or a run's curves, as SVG"),
    "kernels list": ("nanolm.commands.kernels.list", "kernels: what they serve, or why not"),
    "kernels check": ("nanolm.commands.kernels.check", "is a kernel right? the conformance suite"),
    "kernels bench": ("nanolm.commands.kernels.bench", "kernels of an op beside each other"),
    "kernels roofline": ("nanolm.commands.kernels.roofline", "least time of each kernel, on paper"),
    "kernels doctor": ("nanolm.commands.kernels.doctor", "first run on a new GPU"),
    "kernels memory": ("nanolm.commands.kernels.memory", "peak memory of the projected loss"),
    "kernels compile": ("nanolm.commands.kernels.compile", "registers and spills, without a GPU"),
    "bench prepare": ("nanolm.commands.bench.prepare", "preparation beside its encoders"),
    "bench data": ("nanolm.commands.bench.data", "loader throughput beside other loaders"),
    "bench finetune": ("nanolm.commands.bench.finetune", "fine-tuning beside padded loops"),
    "bench scale": ("nanolm.commands.bench.scale", "step time with 1 and 2 processes"),
    "bench train": ("nanolm.commands.bench.train", "step throughput beside other models"),
}


def usage() -> str:
    """One line per command, more where the terminal is narrow."""
    from nanolm.tables import beside  # noqa: PLC0415  (imports rich)

    width = max(map(len, COMMANDS))
    lines = [beside([name], [width], text) for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: nanolm COMMAND [--help] …", "", *lines])


def run(argv: list[str]) -> None:
    """Run one command; raises UserError for bad input."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        import nanolm  # noqa: PLC0415

        print(f"nanolm {nanolm.__version__}")
        return
    n_words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name = " ".join(argv[:n_words])
    if name not in COMMANDS:
        raise UserError(no_such_command(argv))
    module = importlib.import_module(COMMANDS[name][0])
    if hasattr(module, "main"):  # reads its own command line (the config of a run)
        module.main(argv[n_words:])
        return
    from nanolm.config.load import parse  # noqa: PLC0415

    positional = getattr(module, "POSITIONAL", ())
    module.run(
        parse(module.Arguments, argv[n_words:], prog=f"nanolm {name}", positional=positional)
    )


def no_such_command(argv: list[str]) -> str:
    """The sentence for words that begin no command: the commands of their group, or all."""
    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    words = [argv[0], *(word for word in argv[1:2] if not word.startswith("-"))]
    name = " ".join(words if group else words[:1])
    near = [] if group and len(words) == 1 else difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"there is no command {name!r}; {guess}choose from {', '.join(group or COMMANDS)}"


def main(argv: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit status 2.

    Ctrl-C ends with status 130, and who stops reading our output, as `head` does, with 141: what a
    shell gives for programs that the signals SIGINT and SIGPIPE end.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        if not _rank_0_says(str(error)):
            print(f"nanolm: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("nanolm: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        # What is still buffered would be written when Python ends, and fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except SystemExit as ended:
        # rich, which prints our tables, ends the program itself, with status 1.
        if isinstance(ended.__context__, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise
    except OSError as error:
        sentence = refused_by_the_disk(error)
        if sentence is None:
            raise
        print(f"nanolm: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        sentence = lacked(error)
        if sentence is None:
            raise
        told = str(error).splitlines()[:1]
        print(f"nanolm: {sentence} ({' '.join(told)})", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


OUT_OF_MEMORY = (
    "there is not enough memory for a model, a batch or a file of this size; make it smaller "
    "(of a run, `nanolm estimate CONFIG` says what it needs)"
)


NO_GPU = (
    "a Triton kernel was called, and there is no GPU here: set TRITON_INTERPRET=1 before the "
    "command, which interprets it slowly, or name another kernel under `kernels:`"
)


def lacked(error: Exception) -> str | None:
    """What the machine lacks that the error is about, and the remedy; None for any other error."""
    if lacks_memory(error):
        return OUT_OF_MEMORY
    return NO_GPU if NO_DRIVER in str(error) else None


def lacks_memory(error: Exception) -> bool:
    """Whether Python, or torch in its own words, could not have what was asked for."""
    signs = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _rank_0_says(sentence: str) -> bool:
    """Whether this is another rank of a launch whose rank 0 prints the same sentence."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    from nanolm.distributed.launch_store import told_elsewhere  # noqa: PLC0415  (imports torch)

    return told_elsewhere(sentence)
