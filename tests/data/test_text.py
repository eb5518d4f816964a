import gzip
import json

import pytest

from qmoe_jax.data import read_documents
from qmoe_jax.errors import DataError


def jsonl(*texts):
    return "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts).encode()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "c4-train.00000-of-01024.json.gz"])
def test_json_lines(tmp_path, name):
    texts = ["one", "two\nlines", "", "drei \u00e4\u20ac", 'quote "', "line\u2028separator"]
    assert list(read_documents(write(tmp_path / name, jsonl(*texts)))) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_paragraphs_are_documents(tmp_path, name):
    path = write(tmp_path / name, "\n\none\n  still one\n\n \t\n\ntwo \u00e4".encode())
    assert list(read_documents(path)) == ["one\nstill one", "two \u00e4"]


def test_windows_line_ends_byte_order_mark_and_no_final_newline(tmp_path):
    content = b"\xef\xbb\xbf" + jsonl("a", "b").replace(b"\n", b"\r\n").rstrip()
    assert list(read_documents(write(tmp_path / "a.jsonl", content))) == ["a", "b"]


def test_several_files_patterns_and_commas(tmp_path):
    for name in "cba":
        write(tmp_path / f"{name}.jsonl", jsonl(name))
    write(tmp_path / "d,e.txt", b"d")
    assert list(read_documents(str(tmp_path / "*.jsonl"))) == ["a", "b", "c"]
    assert list(read_documents(f"{tmp_path}/c.jsonl, {tmp_path}/[ab].jsonl")) == ["c", "a", "b"]
    assert list(read_documents([tmp_path / "b.jsonl", f"{tmp_path}/d,e.txt"])) == ["b", "d"]
    assert list(read_documents(f"{tmp_path}/d,e.txt")) == ["d"]


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    documents = read_documents(write(tmp_path / "a.jsonl", jsonl("a", "b") + b"not JSON\n"))
    assert [next(documents), next(documents)] == ["a", "b"]
    with pytest.raises(DataError, match="line 3"):
        next(documents)


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"\n", "empty line"),
        (b"  \r\n", "empty line"),
        (b"plain words\n", "not JSON .*'plain words'"),
        (b'{"text": "cut o\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b'["text"]\n', 'not an object with a string "text"'),
        (b'{"content": "x"}\n', 'not an object with a string "text"'),
        (b'{"text": 3}\n', 'not an object with a string "text"'),
        (b'{"text": null}\n', 'not an object with a string "text"'),
        (b'{"text": "caf\xe9"}\n', r"not UTF-8 \(byte 0xe9 at position 13"),
        (b'{"text": "\\ud800"}\n', "the text has half a surrogate pair at character 0"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_bad_line_is_named(tmp_path, bad, message, name):
    path = write(tmp_path / name, jsonl("good") + bad + jsonl("good"))
    with pytest.raises(DataError, match=f"{name}, line 2: {message}"):
        list(read_documents(path))


def test_plain_text_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "a.txt", b"good\n\nalso good\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt, line 4: not UTF-8"):
        list(read_documents(path))


@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.jsonl.gz", b""), ("a.txt", b""), ("a.txt", b" \n\n")])
def test_empty_file(tmp_path, name, content):
    with pytest.raises(DataError, match=f"{name}: empty"):
        list(read_documents(write(tmp_path / name, content)))


@pytest.mark.parametrize("keep", [1, 8, 100, -1])
def test_truncated_gzip(tmp_path, keep):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*map(str, range(1000))))[:keep])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, after line \d+: broken or truncated gzip"):
        list(read_documents(path))


def test_gzip_with_changed_bytes(tmp_path):
    content = bytearray(gzip.compress(jsonl(*map(str, range(1000)))))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        list(read_documents(tmp_path / "a.jsonl.gz"))


def test_not_gzip_despite_its_name(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(jsonl("a"))
    with pytest.raises(DataError, match="broken or truncated gzip"):
        list(read_documents(tmp_path / "a.jsonl.gz"))


def test_missing_unknown_and_no_files_are_refused_before_reading(tmp_path):
    write(tmp_path / "a.jsonl", jsonl("a"))
    write(tmp_path / "a.parquet", b"PAR1")
    cases = {
        f"{tmp_path}/none.jsonl": "no such text file",
        f"{tmp_path}/a.jsonl,{tmp_path}/none*.jsonl": "none.*no such text file",
        f"{tmp_path}/a.parquet": "a.parquet: unknown kind",
        f"{tmp_path}": "not a file",
        "": "No text file",
    }
    for paths, message in cases.items():
        with pytest.raises(DataError, match=message):
            read_documents(paths)
