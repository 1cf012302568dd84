"""bench.json: what was measured stays, whatever happens next."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpostcopy.bench.book import FILE, BookError, BookFile, find_subject, read_book
from qpostcopy.bench.model import Book, Session
from tests.bench.test_matrix import MATRIX, SUBJECT, run_of


def test_each_run_is_on_disk_at_once(tmp_path: Path) -> None:
    file = BookFile(tmp_path / "new" / "folder")
    file.add(session=Session(id="s", subject=SUBJECT))
    runs = [run_of(cell) for cell in MATRIX.cells[:2]]
    for count, run in enumerate(runs, 1):
        file.add(run=run)
        assert read_book(file.path).runs == tuple(runs[:count])
    again = BookFile(file.directory)
    assert again.book == file.book


def test_a_session_learns_more(tmp_path: Path) -> None:
    file = BookFile(tmp_path)
    for name in ("s", "t"):
        file.add(session=Session(id=name, subject=SUBJECT))
    file.update_session(Session(id="t", subject=SUBJECT, rates={"10.0/256": 2000}))
    assert [session.id for session in read_book(file.path).sessions] == ["s", "t"]
    assert read_book(file.path).sessions[1].rates == {"10.0/256": 2000}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Invalid JSON"),
        ('{"v": 1, "runs": [{"engine": "x"}]}', "runs.0"),
        ('{"v": 1, "more": 1}', "more"),
    ],
)
def test_a_file_that_is_none_is_refused_and_kept(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / FILE
    path.write_text(text)
    with pytest.raises(BookError, match=said) as caught:
        BookFile(tmp_path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert path.read_text() == text


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text(Book().model_dump_json().replace('"v":1', '"v":2'))
    with pytest.raises(BookError, match="v: "):
        BookFile(tmp_path)


def test_no_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BookError, match="No such file") as caught:
        read_book(tmp_path / FILE)
    assert caught.value.remedy == "run scripts/bench first"


def test_the_subject_is_this_code_this_guest_and_this_machine(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"a")
    subject = find_subject([image], {"10.0": "10.0.1"})
    assert subject == find_subject([image], {"10.0": "10.0.1"})
    assert subject != find_subject([image], {"10.0": "10.0.2"})
    assert subject.machine.cores >= 1
    assert subject.machine.cpu
    image.write_bytes(b"b")
    assert subject.guest != find_subject([image], {"10.0": "10.0.1"}).guest
