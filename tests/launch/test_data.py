"""The corpus of launch/train.py: real text, and batches that do not depend on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gpt.data import Corpus, standard_library


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(32, 127)) * 500)
    return file


def test_a_batch_does_not_depend_on_its_split(text: Path) -> None:
    corpus = Corpus(text, seq_len=16)
    whole = corpus.batch(seed=1, step=7, batch_size=8, part=slice(0, 8))
    assert whole.shape == (8, 17)
    assert whole.dtype == torch.int64
    for ranks in (2, 4):
        share = 8 // ranks
        parts = [corpus.batch(1, 7, 8, slice(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    for seed, step in ((1, 8), (2, 7)):
        assert not torch.equal(corpus.batch(seed, step, 8, slice(0, 8)), whole)


def test_training_batches_exclude_held_out_text(text: Path) -> None:
    corpus = Corpus(text, seq_len=16)
    assert not set(corpus.training_blocks.tolist()) & set(corpus.held_out_blocks.tolist())
    share = len(corpus.held_out_blocks) / (len(corpus.training_blocks) + len(corpus.held_out_blocks))
    assert share == pytest.approx(0.05, abs=0.01)


def test_reads_the_text_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first " * 2000)
    (tmp_path / "b" / "c.txt").write_text("second " * 2000)
    (tmp_path / "d.bin").write_bytes(b"\0" * 100_000)
    tokens = bytes(Corpus(tmp_path, seq_len=8).tokens.tolist())
    assert tokens == b"first " * 2000 + b"\n" + b"second " * 2000


def test_reads_uint16_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.u16"
    tokens = torch.arange(60_000)
    file.write_bytes(tokens.to(torch.int32).to(torch.int16).numpy().tobytes())
    corpus = Corpus(file, seq_len=4)
    assert corpus.vocabulary == 60_032
    batch = corpus.batch(0, 0, 64, slice(0, 64))
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)
    assert batch.max() > 40_000


def test_unigram_entropy(tmp_path: Path) -> None:
    file = tmp_path / "even.txt"
    file.write_bytes(b"abcd" * 10_000)
    assert Corpus(file, seq_len=8).unigram_entropy() == pytest.approx(math.log(4), rel=1e-3)


def test_the_standard_library_is_tens_of_megabytes() -> None:
    corpus = Corpus(None, seq_len=128)
    assert standard_library().is_dir()
    assert corpus.tokens.numel() > 10_000_000
    assert b"def __init__(self" in bytes(corpus.tokens[:1_000_000].tolist())


def test_reports_unreadable_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Corpus(tmp_path / "nowhere", seq_len=8)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="--seq-len 8 needs at least"):
        Corpus(tmp_path / "short.txt", seq_len=8)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        Corpus(tmp_path / "empty.txt", seq_len=8)
