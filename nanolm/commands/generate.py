"""`nanolm generate`: write text with a decoder or encoder-decoder, to the terminal as it comes."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from nanolm.commands.json_file import write_json
from nanolm.commands.pretrained import require_pretrained
from nanolm.config.ranges import Count, Seed, Within
from nanolm.distributed.devices import DeviceWord
from nanolm.errors import require
from nanolm.inference.beam_search import BeamSearch, write_best
from nanolm.inference.chat import ChatGenerator, require_chat
from nanolm.inference.generate import Generator, write
from nanolm.inference.generate_from_source import GENERATORS
from nanolm.inference.sampling import Sampling
from nanolm.saved import open_saved
from nanolm.tables import open_console
from nanolm.terminal import columns

POSITIONAL = ("run",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Sampling):
    """Write text with a decoder, or with an encoder-decoder from a source."""

    run: str
    """Folder of a run or of a checkpoint."""
    prompt: list[str] | str = ""
    """Text to continue, or a list of texts; '' writes from scratch. An encoder-decoder reads it as
    its source, in which <mask> is a gap."""
    count: Annotated[int, Within(1, 1 << 16)] = 1
    """Continuations of each prompt."""
    max_tokens: Count = 200
    """Tokens to write at most."""
    beams: Annotated[int, Within(1, 256)] = 1
    """Texts that are followed side by side to find the most probable whole one; 1 draws token by
    token. With more, nothing is drawn: temperature and its kin do not count."""
    length_penalty: Annotated[float, Within(-100, 100)] = 1.0
    """Beams are compared by their log probability over their length to this power."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Strings that end a text."""
    seed: Seed = 0
    """Seed of the draws."""
    chat: bool = False
    """Read each prompt as a user's message, in the model's own chat template, and write the answer:
    for published models that have one."""
    cache: bool = True
    """Keep keys and values instead of recomputing them."""
    stream: bool = True
    """Show a single text while it is written."""
    device: DeviceWord = "cpu"
    """Where it is computed; auto takes CUDA when there is any."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Plug-ins that the checkpoint was trained with."""
    json: str | None = None
    """Also write prompts and texts to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.beams == 1 or (self.count == 1 and not self.stop),
            "beams find one text up to its end: leave --count and --stop out, or --beams",
        )


def run(arguments: Arguments) -> None:
    """Generate and print."""
    saved = open_saved(arguments.run, device=arguments.device, plugins=arguments.plugins)
    require_pretrained(saved, "generate")
    kind = GENERATORS.get(saved.config.model.trunk, Generator)
    if arguments.chat:
        require_chat(saved.tokenizer, saved.config.model.trunk)
        kind = ChatGenerator
    given = [arguments.prompt] if isinstance(arguments.prompt, str) else arguments.prompt
    prompts = [prompt for prompt in given for _ in range(arguments.count)]
    shown = 0
    alone = arguments.stream and len(prompts) == 1
    if alone:
        print(prompts[0], end="\n" if arguments.chat else "", flush=True)

    def show(index: int, text: str) -> None:
        nonlocal shown
        if alone:
            print(text[shown:], end="", flush=True)
            shown = len(text)

    generator = kind(saved, use_cache=arguments.cache)
    held = [generator.held(prompt) for prompt in prompts]
    stems, begins = [stem for stem, _ in held], [spaces for _, spaces in held]
    if arguments.beams > 1:
        search = BeamSearch(arguments.beams, arguments.max_tokens, arguments.length_penalty)
        texts = write_best(generator, stems, search, begins)
        show(0, texts[0])
    else:
        texts = write(
            generator,
            stems,
            begins=begins,
            max_tokens=arguments.max_tokens,
            sampling=arguments,
            seed=arguments.seed,
            stop=arguments.stop,
            on_text=show,
        )
    console = open_console(highlight=False)
    if alone:
        print()
    else:
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            console.rule(f"sample {index + 1}")
            between = "\n" if arguments.chat else ""
            # A file or a pipe gets the text as it is, without ends of lines that are not in it.
            whole = columns() is None
            console.print(prompt + between + text, markup=False, soft_wrap=whole)
    write_json(arguments.json, [{"prompt": p, "text": t} for p, t in zip(prompts, texts)])
