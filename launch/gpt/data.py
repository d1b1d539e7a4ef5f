"""Text without a download, and batches that depend only on seed and step."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# The corpus is split into blocks; every _HELD_OUT-th block is for evaluation only.
_BLOCK = 1 << 16
_HELD_OUT = 20
_UINT16_SUFFIXES = (".u16", ".uint16")


def standard_library() -> Path:
    """Folder of the interpreter's standard library: tens of megabytes of text."""
    return Path(sysconfig.get_paths()["stdlib"])


class Corpus:
    """Tokens, split into training and held-out blocks.

    Args:
        path: A text file, whose bytes are the tokens; a folder, whose text files are concatenated; or a file of
            little-endian uint16 tokens, named ``.u16`` or ``.uint16``. A single file is memory-mapped. ``None``: the
            standard library's source.
        seq_len: Tokens per sequence; one more is read as the target of the last.

    Raises:
        OSError: if ``path`` cannot be read.
        ValueError: if the corpus is too small.
    """

    def __init__(self, path: Path | None, seq_len: int) -> None:
        self.seq_len = seq_len
        folder = standard_library() if path is None else path
        if not folder.exists():
            raise FileNotFoundError(f"--data {folder}: no such file or folder")
        if folder.is_dir():
            self.tokens = _read_folder(folder, "*.py" if path is None else "*")
        else:
            self.tokens = _map_file(folder)
        self.block = min(_BLOCK, self.tokens.numel() // (2 * _HELD_OUT))
        if self.block < seq_len + 1:
            raise ValueError(
                f"the corpus {folder} has {self.tokens.numel():,} tokens; --seq-len {seq_len} needs at least "
                f"{2 * _HELD_OUT * (seq_len + 1):,}"
            )
        blocks = torch.arange(self.tokens.numel() // self.block)
        held_out = blocks % _HELD_OUT == _HELD_OUT - 1
        self.training_blocks, self.held_out_blocks = blocks[~held_out], blocks[held_out]
        wide = self.tokens.dtype != torch.uint8
        self.vocabulary = 256 if not wide else 64 * (int((self.tokens.int() & 0xFFFF).max()) // 64 + 1)

    def batch(self, seed: int, step: int, batch_size: int, part: slice, *, held_out: bool = False) -> Tensor:
        """Sequences of a global batch, which does not depend on the number of ranks.

        Args:
            seed: Seed of the order.
            step: Index of the batch.
            batch_size: Sequences in the global batch.
            part: The sequences to read.
            held_out: Whether to read held-out blocks; default: training blocks.

        Returns:
            int64 [sequences in ``part``, seq_len + 1].
        """
        # A generator uses 32 bits of its seed, so the three values are hashed instead of packed.
        digest = hashlib.sha256(f"{seed}/{step}/{held_out}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        blocks = self.held_out_blocks if held_out else self.training_blocks
        chosen = blocks[torch.randint(len(blocks), (batch_size,), generator=generator)]
        offsets = torch.randint(self.block - self.seq_len, (batch_size,), generator=generator)
        starts = (chosen * self.block + offsets)[part].tolist()
        return torch.stack([self._read(start, self.seq_len + 1) for start in starts])

    def _read(self, start: int, length: int) -> Tensor:
        tokens = self.tokens[start : start + length].long()
        return tokens if self.tokens.dtype == torch.uint8 else tokens & 0xFFFF

    def unigram_entropy(self) -> float:
        """Entropy of the held-out tokens' frequencies, in nats per token."""
        count = torch.zeros(self.vocabulary, dtype=torch.float64)
        for block in self.held_out_blocks.tolist():
            tokens = self._read(block * self.block, self.block)
            count += torch.bincount(tokens, minlength=self.vocabulary)
        share = count[count > 0] / count.sum()
        return float(-(share * share.log()).sum())


def _read_folder(folder: Path, pattern: str) -> Tensor:
    """The bytes of all text files in ``folder``, sorted by path; files with a NUL byte are skipped."""
    pieces = []
    for file in sorted(folder.rglob(pattern)):
        if file.is_file() and "site-packages" not in file.parts and not file.name.startswith("."):
            content = file.read_bytes()
            if content and b"\0" not in content:
                pieces.append(content)
    return torch.frombuffer(bytearray(b"\n".join(pieces) or b"\n"), dtype=torch.uint8)


def _map_file(file: Path) -> Tensor:
    """The tokens of a file, memory-mapped; uint16 as int16, for which torch has more operators."""
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"--data {file} is empty")
    file.open("rb").close()  # an OSError for an unreadable file, instead of torch's RuntimeError
    if file.suffix in _UINT16_SUFFIXES:
        return torch.from_file(str(file), shared=False, size=size // 2, dtype=torch.int16)
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
