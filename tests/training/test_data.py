"""The text's split and the batches: deterministic, disjoint, and functions of their arguments alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_triton.training.data import batch, evaluation_windows, load_corpus, part_of, relative_files, split_by_file
from moe_triton.training.errors import TrainingError


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


def write_tree(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<{name}>" + "text " * 40)


def test_split_is_by_whole_files_and_disjoint() -> None:
    texts = {f"package/module_{i}.py": f"<{i}>".encode() * 9 for i in range(200)}
    train, validation, held_out = split_by_file(texts)
    for name, text in texts.items():
        found = [text in part.split(b"\n") for part in (train, validation, held_out)]
        assert found == [part_of(name) == part for part in ("train", "validation", "held_out")]
    assert len(held_out) > 0
    assert len(validation) > 0
    assert len(train) > 10 * len(held_out)


def test_split_of_known_names_never_changes() -> None:
    # Fixed by SHA-256: a change of the rule would make old and new held-out losses incomparable.
    assert [part_of(name) for name in ("asyncio/locks.py", "operator.py", "sysconfig.py")] == ["held_out"] * 3
    assert [part_of(name) for name in ("datetime.py", "json/encoder.py", "wave.py")] == ["validation"] * 3
    assert [part_of(name) for name in ("pathlib.py", "argparse.py", "ast.py")] == ["train"] * 3


def test_reading_order_and_place_do_not_matter(tmp_path: Path) -> None:
    names = [f"{folder}/file{i}.txt" for folder in ("a", "b") for i in range(60)]
    write_tree(tmp_path / "one", names)
    write_tree(tmp_path / "two", names[::-1])
    one, two = load_corpus(tmp_path / "one", 16), load_corpus(tmp_path / "two", 16)
    assert one.digest == two.digest
    assert torch.equal(one.train, two.train)
    (tmp_path / "two" / "a" / "file0.txt").write_text("changed")
    assert load_corpus(tmp_path / "two", 16).digest != one.digest


def test_standard_library_by_default() -> None:
    corpus = load_corpus(None, 128)
    assert corpus.train.dtype == torch.uint8
    assert corpus.train.numel() > 10 * corpus.held_out.numel() > 10 * 512 * 128
    assert "standard library" in corpus.source
    starts = {as_bytes(part[:2000]) for part in (corpus.train, corpus.validation, corpus.held_out)}
    assert len(starts) == 3


def test_one_file_is_cut_at_its_end(tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 100
    (tmp_path / "book.txt").write_bytes(text)
    corpus = load_corpus(tmp_path / "book.txt", 64)
    assert b"".join(as_bytes(p) for p in (corpus.train, corpus.validation, corpus.held_out)) == text


def test_binary_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, ["text.txt", ".git/config"])
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0" * 50)
    assert sorted(relative_files(tmp_path, "", ())) == ["picture.bin", "text.txt"]
    assert load_corpus(tmp_path, 4).num_files == 1


@pytest.mark.parametrize("content", [None, b"", b"short", b"\0" * 4000])
def test_unusable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"some\.txt"):
        load_corpus(path, 64)


def test_empty_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"--data: .* holds no text"):
        load_corpus(tmp_path, 64)


def test_batches_are_functions_of_seed_and_step() -> None:
    text = torch.arange(10_000).to(torch.uint8)
    first = batch(text, 3, 7, 4, 16)
    torch.manual_seed(99)
    assert torch.equal(first, batch(text, 3, 7, 4, 16))
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64
    assert torch.equal((first[:, 1:] - first[:, :-1]) % 256, torch.ones(4, 16, dtype=torch.int64))  # consecutive bytes
    assert not torch.equal(first, batch(text, 3, 8, 4, 16))
    assert not torch.equal(first, batch(text, 4, 7, 4, 16))


def test_batches_reach_both_ends() -> None:
    text = torch.arange(20).to(torch.uint8)
    starts = {int(row[0]) for step in range(50) for row in batch(text, 0, step, 4, 16)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize(("size", "windows"), [(17, 1), (32, 1), (33, 2), (1000, 10)])
def test_evaluation_windows_predict_every_byte_at_most_once(size: int, windows: int) -> None:
    text = torch.arange(size)
    found = evaluation_windows(text, 16, limit=10)
    assert found.shape == (windows, 17)
    predicted = found[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)
