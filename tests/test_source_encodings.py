"""Sources in any encoding: no document is changed by it, and what does not fit is counted."""

import json
from collections import Counter

import pytest

from nanolm.data.prepare.clean import decode
from nanolm.data.text_files import check_encoding
from nanolm.errors import UserError
from tests.test_sources import read

WORDS = "Weiß, Дом и сад\nвода 秦川 x\n\n".encode()


@pytest.mark.parametrize("kind", ["file", "line", "paragraph", "jsonl", "json", "array"])
@pytest.mark.parametrize(
    ("encoding", "mark", "asked"),
    [
        ("utf-8", b"\xef\xbb\xbf", "auto"),
        *((f"utf-{bits}-{order}", None, "auto") for bits in (16, 32) for order in ("le", "be")),
        *((f"utf-{bits}-{order}", b"", "same") for bits in (16, 32) for order in ("le", "be")),
        ("gb18030", b"", "same"),
    ],
)
def test_an_encoding_changes_no_document(tmp_path, encoding, mark, asked, kind):
    texts = [f"{WORDS.decode()}{n}" for n in range(40)]
    name, content = {
        "jsonl": (
            "a.jsonl",
            "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts),
        ),
        "json": (
            "a.json",
            "\n".join(json.dumps({"text": t}, ensure_ascii=False, indent=1) for t in texts),
        ),
        "array": ("a.json", json.dumps([{"text": t} for t in texts], ensure_ascii=False)),
    }.get(kind, ("a.txt", "".join(texts)))
    common = {} if "json" in name else {"txt_documents": kind}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / name).write_bytes(content.encode())
    mark = "\ufeff".encode(encoding) if mark is None else mark
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    asked = encoding if asked == "same" else asked
    wanted = read(tmp_path / "plain" / name, **common)
    found = read(tmp_path / name, encoding=asked, **common)
    if "json" in name:
        assert wanted == texts
    elif found[0].startswith(b"\xef\xbb\xbf"):  # which cleaning takes away
        found[0] = found[0][3:]
    assert found == wanted


def test_what_a_file_is_holds_for_all_of_it(tmp_path):
    """A file of many pieces is dropped whole, once, or read whole."""
    text = "Все счастливые семьи похожи друг на друга\n" * 60_000
    for name, content, reason in (
        ("marked", text.encode("utf-16"), None),
        ("le", text.encode("utf-16-le"), "utf-16-le"),
        ("be", text.encode("utf-16-be"), "utf-16-be"),
        ("ascii", ("plain words\n" * 200_000).encode("utf-16-be"), "utf-16-be"),
        ("wide", text.encode("utf-32-le"), "utf-32-le"),
        ("elf", b"\x7fELF\0\0\n" + text.encode(), "binary file"),
    ):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(content)
        for documents in ("line", "paragraph", "auto"):
            counts = Counter()
            found = read(path, counts, txt_documents=documents)
            if reason is None:
                assert b"\n".join(part.rstrip() for part in found) == text.rstrip().encode()
            else:
                (key,) = counts
                assert found == [] and counts[key] == 1 and reason in key
        if reason not in (None, "binary file"):
            wanted = content.decode(reason).encode().splitlines()
            assert read(path, encoding=reason, txt_documents="line") == wanted


def test_text_that_its_encoding_does_not_have_is_undecodable(tmp_path):
    (tmp_path / "odd.txt").write_bytes("fine\n".encode("utf-16") + b"\x00\xd8\n\0ok\0\n\0x")
    (tmp_path / "greek.txt").write_bytes(b"fine\n\xd2\n")
    for name, encoding in (("odd", "auto"), ("greek", "cp1253")):
        counts = Counter()
        options = {"encoding": encoding, "txt_documents": "line"}
        found = read(tmp_path / f"{name}.txt", **options)
        texts = [decode(raw, "drop", counts) for raw in found]
        assert texts[0] == "fine" and None in texts[1:]
        assert decode(found[1], "replace", counts).count("\ufffd") == 1
    for content in (b"\0x\0", b"\0x\xd8\x3d"):  # the file ends within a character
        (tmp_path / "cut.txt").write_bytes(b"\xfe\xff" + content)
        assert [decode(raw, "drop", Counter()) for raw in read(tmp_path / "cut.txt")] == [None]
    for wrong in ("utf-99", "rot13", "base64", "a\0b", ""):
        with pytest.raises(UserError, match="is no text encoding"):
            check_encoding(wrong)


@pytest.mark.parametrize("odd", [b'{"text": "a\0b"}', b"\0" * 4096], ids=["inside", "padding"])
@pytest.mark.parametrize("place", [0, 1, 20, 500, 999, 1000])
def test_a_nul_in_one_record_spoils_no_other(tmp_path, odd, place):
    """Wherever it stands, as padding behind the last record that a crash left, too."""
    rows = [json.dumps({"text": f"text number {n}"}).encode() for n in range(1000)]
    for name, lines in (("long.jsonl", rows), ("short.ndjson", rows[: max(2, place)])):
        lines = [*lines[:place], odd, *lines[place:]]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        counts = Counter()
        found = read(tmp_path / name, counts)
        assert found == [json.loads(line)["text"] for line in lines if line != odd]
        assert counts == {"dropped/not a JSON object": 1}


def test_a_file_of_no_records_is_no_text_whatever_it_is_called(tmp_path):
    for name in ("a.jsonl", "a.json", "a.txt"):
        (tmp_path / name).write_bytes(b"\x7fELF\0\0\0{}\n" * 9)
        counts = Counter()
        assert read(tmp_path / name, counts) == [] and counts == {"dropped/binary file": 1}
