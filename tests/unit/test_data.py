"""Corpora, and the batches that are made of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from overlap_mtp.documents import pad_documents
from overlap_mtp.training.corpus import DataChangedError
from overlap_mtp.training.data import PIECE_TOKENS, BatchStream, Document, TokenError, fill, open_corpus


def stream_of(corpus, num_documents=None, **options) -> BatchStream:
    defaults = {"seq_len": 256, "batch_size": 2, "cp_size": 2, "kind": "zigzag", "vocab_size": 256}
    return BatchStream(corpus, **{**defaults, **options}, num_documents=num_documents)


def text(ids: np.ndarray) -> bytes:
    return bytes(ids.astype(np.uint8))


def test_the_default_corpus_is_the_standard_library():
    corpus = open_corpus()
    names = [document.path.name for document in corpus.documents]
    assert len(names) > 100
    assert all(document.num_tokens > 0 for document in corpus.documents)
    assert b"Abstract Base Classes" in text(corpus.documents[names.index("abc.py")].read(0, 400))


def test_a_folder_is_one_stream_that_starts_again_at_its_end(tmp_path):
    for name, words in [("a.txt", "first document"), ("c.txt", "the third one, a longer document")]:
        (tmp_path / name).write_text(words)
    corpus = open_corpus(tmp_path)
    assert [document.path.name for document in corpus.documents] == ["a.txt", "c.txt"]
    assert text(corpus.read(0, 17)) == b"first documentthe"
    corpus = open_corpus(tmp_path / "a.txt")
    assert len(corpus.documents) == 1
    assert text(corpus.read(9, 20)) == b"umentfirst documentf"
    assert text(corpus.read(14 * 5 + 1, 4)) == b"irst"


def test_a_fingerprint_is_of_lengths_order_and_tokens(tmp_path):
    def of(*texts: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, words in enumerate(texts):
            (folder / f"{number}.txt").write_text(words)
        (folder / "0.txt").rename(folder / "00.txt")  # names do not matter
        return open_corpus(folder).fingerprint

    assert of("ab", "cde") == of("ab", "cde")
    assert len({of("ab", "cde"), of("ab", "cdf"), of("cde", "ab"), of("abc", "de"), of("abcde")}) == 5


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_cut_into_documents(tmp_path, dtype):
    ids = np.arange(PIECE_TOKENS + 100, dtype=dtype)
    ids.tofile(tmp_path / "ids.bin")
    corpus = open_corpus(tmp_path / "ids.bin", dtype)
    assert [document.num_tokens for document in corpus.documents] == [PIECE_TOKENS, 100]
    assert np.array_equal(corpus.read(PIECE_TOKENS - 3, 6), ids[PIECE_TOKENS - 3 :][:6])


@pytest.mark.parametrize(
    ("name", "content", "dtype", "words"),
    [
        ("nowhere.txt", None, "uint16", r"nowhere\.txt does not exist"),
        ("empty.txt", b"", "uint16", r"empty\.txt is empty"),
        ("folder/empty.txt", b"", "uint16", r"empty\.txt is empty"),
        ("empty.bin", b"", "uint16", r"empty\.bin is empty"),
        ("odd.bin", b"123", "uint16", r"odd\.bin must hold a whole number of uint16 token ids, has 3 bytes"),
        ("odd.bin", b"123", "int8", "token_dtype must be one of uint16, uint32, got 'int8'"),
        ("folder/", None, "uint16", "folder holds no text"),
    ],
)
def test_missing_and_empty_data_are_named(tmp_path, name, content, dtype, words):
    folder, _, file = name.rpartition("/")
    (tmp_path / folder).mkdir(exist_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_corpus(tmp_path / (folder or file), dtype)


@pytest.mark.parametrize("num_documents", [None, 2])
def test_a_token_outside_the_vocabulary_is_named(tmp_path, num_documents):
    ids = np.full(9000, 7, np.uint16)
    ids[[20, PIECE_TOKENS + 30]] = 60_000
    ids.tofile(tmp_path / "ids.bin")
    stream = stream_of(open_corpus(tmp_path / "ids.bin"), num_documents, vocab_size=50_000)
    with pytest.raises(TokenError, match=r"token id 60000 in ids\.bin\[20\] is outside .* in \[0, 49999\]"):
        stream.batch(0)
    place = r"ids\.bin\[4126\]"  # in the second document
    with pytest.raises(TokenError, match=place):
        replace(stream, num_documents=None, batch_size=1).batch(16)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "zigzag_stream"])
def test_dense_batches_are_the_text_and_its_successors(kind):
    corpus = open_corpus()
    stream = stream_of(corpus, kind=kind)
    batch, layout = stream.batch(3)
    assert not layout.is_packed
    for row in range(2):
        at = (3 * 2 + row) * 256
        assert np.array_equal(batch["input_ids"][row], corpus.read(at, 256))
        assert np.array_equal(batch["labels"][row], corpus.read(at + 1, 256))
    assert batch["loss_mask"].eq(1).all()
    assert batch["position_ids"].tolist() == [list(range(256))] * 2
    again, _ = stream.batch(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "zigzag_stream"])
@pytest.mark.parametrize("num_documents", [1, 5, 20])
def test_packed_batches_hold_each_document_by_itself(kind, num_documents, batch_size):
    corpus = open_corpus()
    stream = stream_of(corpus, num_documents, kind=kind, batch_size=batch_size, seq_len=512)
    for step in range(4):
        batch, layout = stream.batch(step)
        assert layout.is_packed
        assert layout.num_documents == num_documents
        assert layout.seq_len == 512
        for i, (start, length) in enumerate(zip(layout.cu_seqlens, layout.valid_lengths, strict=False)):
            document = corpus.documents[(step * batch_size * num_documents + i) % len(corpus.documents)]
            assert 1 <= length <= document.num_tokens
            ids = batch["input_ids"][0, start : start + length]
            assert np.array_equal(ids, document.read(0, int(length)))
            end = layout.cu_seqlens[i + 1]
            assert torch.equal(batch["labels"][0, start : start + length - 1], ids[1:])
            assert batch["labels"][:, start + length - 1 : end].eq(0).all()
            mask = batch["loss_mask"][:, start:end]
            assert mask[:, : length - 1].eq(1).all()
            assert mask[:, length - 1 :].eq(0).all()
            assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))


def test_packing_keeps_the_proportions_of_real_lengths():
    corpus = open_corpus()
    _, layout = stream_of(corpus, 8, seq_len=8192, batch_size=1).batch(0)
    real = np.array([document.num_tokens for document in corpus.documents[:8]])
    assert np.corrcoef(real, layout.valid_lengths)[0, 1] > 0.999
    assert layout.valid_lengths.sum() > 0.9 * min(8192, real.sum())


def test_one_text_file_is_cut_into_documents(tmp_path):
    words = bytes(range(1, 251)) * 50
    (tmp_path / "one.txt").write_bytes(words)
    corpus = open_corpus(tmp_path / "one.txt")
    assert [document.num_tokens for document in corpus.documents] == [4096, 4096, 4096, 212]
    assert text(corpus.documents[1].read(0, 4096)) == words[4096:8192]
    with pytest.raises(ValueError, match="at most the 4 documents that the data holds, got 5"):
        stream_of(corpus, 5)
    with pytest.raises(ValueError, match=r"num_documents \(--documents\) must be in \[1, 63\] .* got 64"):
        stream_of(corpus, 64)
    stream = stream_of(corpus, 4, batch_size=1)
    lengths = [stream.batch(step)[1].valid_lengths.tolist() for step in range(4)]
    assert len({tuple(one) for one in lengths}) == 4  # every pass over the corpus is packed differently


def test_batches_are_the_same_at_every_cp_size():
    """If documents are padded to a multiple of all their units."""
    corpus, batches = open_corpus(), []
    for cp_size in (1, 2, 4, 8):
        stream = BatchStream(corpus, 1024, 2, cp_size, "zigzag", 256, num_documents=6, multiple_of=16)
        batch, layout = stream.batch(3)
        assert layout.cp_size == cp_size
        batches.append((batch, layout.cu_seqlens.tolist(), layout.valid_lengths.tolist()))
    for batch, bounds, lengths in batches[1:]:
        assert (bounds, lengths) == batches[0][1:]
        assert all(torch.equal(batch[name], batches[0][0][name]) for name in batch)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "zigzag_stream"])
def test_documents_are_padded_to_a_multiple(kind):
    documents = [torch.arange(length) for length in (5, 0, 16, 17)]
    _, layout = pad_documents(documents, 2, kind, multiple_of=16)
    assert layout.cu_seqlens.tolist() == [0, 16, 16, 32, 64]
    assert layout.valid_lengths.tolist() == [5, 0, 16, 17]
    with pytest.raises(ValueError, match="multiple_of must be >= 1"):
        pad_documents(documents, 2, kind, multiple_of=0)


IDS = np.arange(1, 9001) % 200


def write_ids(path: Path, dtype: str, header: tuple[int, ...] = ()) -> None:
    if path.suffix == ".npy":
        np.save(path, IDS.astype(dtype))
        return
    words = np.zeros(256 if header else 0, np.int32)
    words[: len(header)] = header
    path.write_bytes(words.tobytes() + IDS.astype(dtype).tobytes())


@pytest.mark.parametrize(
    ("name", "dtype", "header"),
    [
        ("x.BIN", "uint16", ()),
        ("x.bin", "uint16", (20240520, 1, 9000)),
        ("x.bin", "uint32", (20240801, 7, 9000)),
        *[("x.npy", dtype, ()) for dtype in ("uint8", "uint16", "int32", ">i4", "int64")],
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_files_of_ids_are_read_as_ids(tmp_path, name, dtype, header, in_folder):
    write_ids(tmp_path / name, dtype, header)
    (tmp_path / "sub").mkdir()
    if in_folder:
        write_ids(tmp_path / "sub" / name, dtype, header)
    corpus = open_corpus(tmp_path if in_folder else tmp_path / name)
    assert [one.num_tokens for one in corpus.documents] == [4096, 4096, 808] * (2 if in_folder else 1)
    assert np.array_equal(corpus.read(4000, 5000), IDS[4000:])
    batch, _ = stream_of(corpus, batch_size=1).batch(1)
    assert np.array_equal(batch["input_ids"][0], IDS[256:512])


@pytest.mark.parametrize("most", [200, 30_000, 128_000])
def test_uint32_ids_are_not_read_as_uint16(tmp_path, most):
    ids = np.random.default_rng(0).integers(1, most, 5000)
    ids.astype(np.uint32).tofile(tmp_path / "ids.bin")
    for path in (tmp_path, tmp_path / "ids.bin"):
        with pytest.raises(ValueError, match=r"ids\.bin seems to hold uint32 token ids"):
            open_corpus(path)
    assert np.array_equal(open_corpus(tmp_path, "uint32").read(0, 5000), ids)


@pytest.mark.parametrize("ids", [[0] * 100, [5, 0, 7, 0], [5, 0] * 9 + [5, 16], [5, 300] * 9], ids=str)
def test_uint16_ids_are_not_taken_for_uint32(tmp_path, ids):
    np.array(ids, np.uint16).tofile(tmp_path / "ids.bin")
    assert open_corpus(tmp_path / "ids.bin").read(0, len(ids)).tolist() == ids


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda at: (at / "x.npz").write_bytes(b"PK"), r"x\.npz is not read"),
        (lambda at: (at / "x.gz").write_bytes(b"\x1f\x8b\0\0"), r"x\.gz is not read"),
        (lambda at: (at / "x.parquet").write_bytes(b"PAR1"), r"x\.parquet is not read"),
        (
            lambda at: np.save(at / "x.npy", IDS.reshape(2, -1)),
            r"x\.npy must hold integers in 1-D, holds int64 of",
        ),
        (lambda at: np.save(at / "x.npy", IDS * 0.5), r"x\.npy must hold integers"),
        (lambda at: (at / "x.npy").write_bytes(b"text"), r"x\.npy is not a readable \.npy"),
        (lambda at: np.save(at / "x.npy", IDS[:0]), r"x\.npy holds no token id"),
        (
            lambda at: write_ids(at / "x.bin", "uint16", (20240520, 1, 9001)),
            r"x\.bin should have 19026 bytes",
        ),
        (
            lambda at: write_ids(at / "x.bin", "uint16", (20240520, 9, 9000)),
            r"x\.bin has a header of llm\.c, of version 9",
        ),
        (lambda at: write_ids(at / "x.bin", "uint16"), r"holds token ids \(.*x\.bin\) and text \(.*a\.txt\)"),
        (lambda at: (at / "broken").symlink_to("/nowhere"), "broken is neither a file nor a link to one"),
        (lambda at: os.mkfifo(at / "pipe"), "pipe is neither a file"),
        (lambda at: (at / "again").symlink_to(at), "again is a link to a folder that it is in"),
    ],
)
def test_what_a_folder_holds_is_read_or_refused_by_name(tmp_path, make, words):
    (tmp_path / "a.txt").write_text("text")
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        open_corpus(tmp_path)


@pytest.mark.parametrize("method", ["iterdir", "open"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, method):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.txt").write_text("text")
    real = getattr(Path, method)

    def refuse(self: Path, *arguments: str):
        if "private" in (self.name, self.parent.name):
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments)

    monkeypatch.setattr(Path, method, refuse)  # permissions do not bind root
    with pytest.raises(ValueError, match=r"private.* cannot be read: Permission denied"):
        open_corpus(tmp_path)


def test_links_are_followed_and_what_is_skipped_is_noted(tmp_path, caplog):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
    (folder / "a.txt").write_text("a\0b")
    (elsewhere / "b.md").write_text("b")
    (folder / "linked").symlink_to(elsewhere)
    for name, content in (("__init__.py", b""), ("a.pyc", b"\xcb\r\r\n\0\0")):
        (folder / name).write_bytes(content)
    assert [one.path.name for one in open_corpus(folder).documents] == ["a.txt", "b.md"]
    assert "1 files are empty and left out, the first is" in caplog.text
    assert "1 files are not text and left out, the first is" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("0" * 99),
        lambda path: path.write_text("0" * 101),
        lambda path: path.unlink(),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: (path.write_text("0" * 101), os.utime(path, ns=(7, 7))),  # as `rsync --times` does
    ],
)
def test_a_file_that_has_changed_is_named(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text("0" * 100)
    os.utime(path, ns=(7, 7))
    corpus = open_corpus(tmp_path)
    change(path)
    with pytest.raises(
        DataChangedError, match=r"a\.txt (has changed since it was opened|cannot be read any more)"
    ):
        corpus.read(50, 50)


def test_a_part_of_a_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("0" * 99)
    with pytest.raises(DataChangedError, match=r"a\.txt has changed"):
        Document(tmp_path / "a.txt", 100).read(50, 100)


def test_a_negative_id_is_outside_of_the_vocabulary(tmp_path):
    np.save(tmp_path / "x.npy", np.array([5, 6, -7, 8] * 100))
    with pytest.raises(TokenError, match=r"token id -7 in x\.npy\[2\] is outside"):
        stream_of(open_corpus(tmp_path)).batch(0)


@pytest.mark.parametrize(("seq_len", "num_documents"), [(1024, 8), (4096, 32), (4096, 128)])
def test_packing_fills_the_sequence(seq_len, num_documents):
    stream = stream_of(
        open_corpus().shuffled(0), num_documents, seq_len=seq_len, batch_size=1, multiple_of=16
    )
    assert stream.filled(20) > 0.98


def test_the_fill_that_is_reported_counts_no_padding(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("ten bytes.")
    corpus = open_corpus(tmp_path)
    assert stream_of(corpus, 2, seq_len=64).filled() == 20 / 64
    assert stream_of(corpus, seq_len=64).filled() == 1


@pytest.mark.parametrize("num_documents", [None, 2])
def test_the_layout_of_a_batch_names_its_tokens(num_documents):
    """So that ranks with other samples find out, although their bounds are equal."""
    stream = stream_of(open_corpus(), num_documents)
    names = [stream.batch(step)[1].batch for step in (0, 1, 2, 1)]
    assert all(names)
    assert names[1] == names[3]
    assert len(set(names)) == 3


def test_a_long_document_takes_the_units_that_short_ones_cannot_fill():
    sizes = np.array([31] * 40 + [176])
    assert fill(sizes, 65 * 16, 16).tolist() == [31] * 14 + [16] * 26 + [176]


def test_fill_is_the_best_that_these_documents_allow():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, unit = int(rng.integers(1, 20)), int(rng.choice([1, 4, 16]))
        sizes, seq_len = rng.integers(1, 200, count), unit * int(rng.integers(count, 100))
        lengths = fill(sizes, max(seq_len, unit * count), unit)
        used = np.minimum(sizes, unit)  # units are dealt to the document that can fill most of one
        for _ in range(max(seq_len, unit * count) // unit - count):
            gain = np.minimum(unit, sizes - used)
            used[gain.argmax()] += gain.max()
        assert lengths.sum() == used.sum()
        assert ((lengths >= 1) & (lengths <= sizes)).all()
        assert (-(-lengths // unit) * unit).sum() <= max(seq_len, unit * count)
