"""Every work that the source or the documentation cites as "Author year" stands in
docs/references.md."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
REFERENCES = ROOT / "docs" / "references.md"
PLACES = ("nanolm", "kernels", "data", "docs", "configs")
KINDS = {".py", ".md", ".yaml", ".txt"}

NAME = r"(?:(?:[Vv]an |den |[Dd]e |Ben |Tjong |Kim )*[A-Z]\w*[a-z]\w*(?:-[A-Z]\w+)?)"
AUTHORS = rf"{NAME}(?:,? et al\.|(?:,| &| and) {NAME})?"
YEAR = r"(?:19|20)\d\d[a-z]?\b(?!-)"  # a letter tells two works of a year apart
CITATION = re.compile(rf"({AUTHORS}),? \(?({YEAR}(?:, {YEAR})*)")
ENTRY = re.compile(r"^- \*\*(.+?) (\d{4}[a-z]?)\*\*: \*(.+?)\*\. (.+)\.$", re.M)


def citations(text: str) -> set[str]:
    """The works that a text cites, as "Author year"; lines are joined first, comments too."""
    text = re.sub(r"\s+(?:#:?\s+|\|\s+)?", " ", text)
    found = CITATION.findall(text)
    return {
        f"{' '.join(names.split())} {year}" for names, years in found for year in years.split(", ")
    }


def cited() -> dict[str, list[str]]:
    """{work: the files that cite it} of the whole project."""
    works: dict[str, list[str]] = {}
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in KINDS and path != REFERENCES:
                for work in citations(path.read_text(encoding="utf-8")):
                    works.setdefault(work, []).append(str(path.relative_to(ROOT)))
    return works


def entries() -> dict[str, tuple[str, str]]:
    """{work: (title, where it appeared)} of the page."""
    found = ENTRY.findall(REFERENCES.read_text(encoding="utf-8"))
    return {f"{authors} {year}": (title, where) for authors, year, title, where in found}


def test_every_citation_has_an_entry():
    known = entries()
    missing = {work: files for work, files in cited().items() if work not in known}
    assert not missing, f"docs/references.md lacks {missing}"


def test_every_line_of_the_list_is_an_entry_in_its_place():
    lines = [
        line for line in REFERENCES.read_text(encoding="utf-8").splitlines() if line[:1] == "-"
    ]
    assert len(lines) == len(entries()) > 80
    assert lines == sorted(lines, key=str.casefold)
    numbers = [re.findall(r"arXiv:(\S+)", line.rstrip(".")) for line in lines]
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}|cs/\d{7}", n) for found in numbers for n in found)
    assert len({n for found in numbers for n in found}) == sum(map(len, numbers))


def test_letters_tell_all_works_of_a_year_apart():
    works = set(entries())
    lettered = {work[:-1] for work in works if work[-1].isalpha()}
    assert lettered, "two works are Liu et al. 2019"
    for work in lettered:
        found = sorted(other for other in works if other.startswith(work))
        assert found == [work + letter for letter in "abcdefgh"[: len(found)]]
        assert len(found) > 1


def test_a_model_is_cited_by_the_paper_that_bears_its_name():
    bearers = {
        name: work
        for work, (title, _) in entries().items()
        for name in re.findall(r"^(\w*[a-z]\w*[A-Z]\w*|[A-Z]{3,}\w*):", title)
    }
    assert {"RoBERTa", "BERT", "ALBERT", "XLNet", "LoRA"} <= set(bearers)
    named = re.compile(rf"(?<![\w-])({'|'.join(bearers)})(?: base)? \(({AUTHORS}),? ({YEAR})")
    seen = set()
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in KINDS and path != REFERENCES:
                for name, authors, year in named.findall(path.read_text(encoding="utf-8")):
                    assert f"{authors} {year}" == bearers[name], f"{path} on {name}"
                    seen.add(name)
    assert {"RoBERTa", "BERT", "ALBERT", "XLNet"} <= seen


def test_the_ways_of_citing_are_seen():
    text = """(Devlin et al. 2019; Howard & Ruder 2018, section 3), (Rajpurkar et al. 2016, 2018),
    in-batch negatives of van den Oord et
    # al. (2018), as in Caruana 1997, | Press and
    Wolf 2017 |, Tjong Kim Sang & De Meulder 2003; not CT-RSA 2002,
    on 2026-11-22 or Muon (2026-11-22), RoBERTa (Liu et al. 2019b)"""
    assert citations(text) == {
        "Devlin et al. 2019",
        "Howard & Ruder 2018",
        "Rajpurkar et al. 2016",
        "Rajpurkar et al. 2018",
        "van den Oord et al. 2018",
        "Caruana 1997",
        "Press and Wolf 2017",
        "Liu et al. 2019b",
        "Tjong Kim Sang & De Meulder 2003",
    }
