"""What is known of an assignment, and the file that holds it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from softsphere.clusters import Clusters

ASSIGNMENT = torch.tensor([1, -1, 0, 1, -1, 1])
COUNTS = torch.tensor([2, 50, 5, 1, 40, 2])


def made(vectors: bool = True) -> Clusters:
    torch.manual_seed(0)
    return Clusters(ASSIGNMENT, COUNTS, torch.randn(6, 3) if vectors else None)


def test_sizes_and_shares_are_those_of_the_definition():
    clusters = made()
    assert (clusters.num_classes, clusters.num_clusters, clusters.shortlist) == (6, 2, 2)
    assert clusters.sizes.tolist() == [1, 3]
    assert clusters.shares.tolist() == [0.5, 0.5]
    assert clusters.tail_share == 0.1
    assert clusters.outputs == pytest.approx(2 + 2 + 0.1 * (0.5 * 1 + 0.5 * 3))
    assert clusters.classes(1).tolist() == [0, 5, 3]
    assert clusters.classes(-1).tolist() == [1, 4]


def test_an_empty_cluster_and_a_shortlist_of_all_classes_are_described_as_well():
    gap = Clusters(torch.tensor([0, 2, 2]), torch.ones(3))
    assert gap.sizes.tolist() == [1, 0, 2] and gap.classes(1).tolist() == []
    whole = Clusters(torch.full((2,), -1), torch.ones(2))
    assert (whole.num_clusters, whole.shortlist, whole.outputs) == (0, 2, 2)
    assert whole.sizes.tolist() == whole.shares.tolist() == []
    assert repr(whole) == "Clusters(num_classes=2, shortlist=2, num_clusters=0)"
    with pytest.raises(ValueError, match=r"^cluster must be −1 for the shortlist, got 0$"):
        whole.classes(0)


def test_the_tensors_have_the_dtypes_of_the_docstring_whatever_was_given():
    clusters = Clusters(ASSIGNMENT.short(), COUNTS.half(), torch.ones(6, 2).bfloat16())
    assert clusters.assignment.dtype == torch.int64
    assert clusters.counts.dtype == torch.float64
    assert clusters.vectors.dtype == torch.float32


def test_a_class_without_any_count_counts_like_the_rarest():
    assert Clusters(torch.tensor([0, 0, 0]), torch.tensor([0, 3, 7])).counts.tolist() == [3, 3, 7]


def test_repr_names_the_sizes():
    assert repr(made()) == (
        "Clusters(num_classes=6, shortlist=2, num_clusters=2, tail_share=0.1, "
        "largest_share=0.5, vectors=(6, 3))"
    )


@pytest.mark.parametrize("vectors", [True, False])
def test_a_saved_file_is_loaded_as_it_was(tmp_path, vectors):
    clusters = made(vectors)
    clusters.save(tmp_path / "c.pt")
    again = Clusters.load(tmp_path / "c.pt")
    assert torch.equal(again.assignment, clusters.assignment)
    assert torch.equal(again.counts, clusters.counts)
    assert (again.vectors is None) == (not vectors)
    assert not vectors or torch.equal(again.vectors, clusters.vectors)


def test_vectors_can_be_left_out_of_the_file(tmp_path):
    made().save(str(tmp_path / "c.pt"), vectors=False)
    assert Clusters.load(str(tmp_path / "c.pt")).vectors is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    made().save(tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        made(vectors=False).save(tmp_path / "c.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    assert (tmp_path / "c.pt").read_bytes() == before


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_files_of_another_kind_are_refused_and_no_code_in_them_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made().save("whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("clusters")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"format": "softsphere.clusters 1", "assignment": Harmful()}, "harmful.pt")
    torch.save({"assignment": ASSIGNMENT}, "other.pt")
    torch.save(ASSIGNMENT, "tensor.pt")
    torch.save({"format": "softsphere.clusters 1"}, "hollow.pt")
    torch.save({"format": "softsphere.clusters 2", "classes": ASSIGNMENT}, "later.pt")
    with pytest.raises(ValueError, match=r"^later.pt was written by another version.*clusters 2"):
        Clusters.load("later.pt")
    for name in ("cut", "empty", "text", "pickle", "harmful", "other", "tensor", "hollow"):
        with pytest.raises(ValueError, match=rf"^{name}.pt is not a file of clusters"):
            Clusters.load(f"{name}.pt")
    assert not (tmp_path / "harmed").exists()
    spoiled = torch.load("whole.pt") | {"assignment": ASSIGNMENT.float() + 0.5}
    torch.save(spoiled, "spoiled.pt")
    with pytest.raises(ValueError, match=r"^spoiled\.pt is damaged: assignment"):
        Clusters.load("spoiled.pt")
    with pytest.raises(FileNotFoundError):
        Clusters.load("absent.pt")


@pytest.mark.parametrize("width", [2, 3, 8])
def test_rows_have_the_width_and_the_deviation_asked_for(width):
    torch.manual_seed(0)
    clusters = Clusters(torch.zeros(4000).long(), torch.ones(4000), 7 + torch.randn(4000, 3))
    rows = clusters.rows(width, std=0.05)
    assert rows.shape == (4000, width) and rows.dtype == torch.float32
    assert float(rows.std(correction=0)) == pytest.approx(0.05, rel=0.05)
    assert torch.equal(rows, clusters.rows(width, 0.05))
    # The first columns are the centred directions.
    own = clusters.vectors / clusters.vectors.norm(dim=1, keepdim=True)
    own = (own - own.mean(0))[:, :width]
    cosine = torch.cosine_similarity(rows[:, : own.shape[1]], own)
    torch.testing.assert_close(cosine, torch.ones(4000))


def test_rows_of_classes_without_a_vector_are_drawn():
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    vectors[2] = 0
    clusters = Clusters(torch.zeros(5).long(), torch.ones(5), vectors)
    rows = clusters.rows(4, 0.1)
    assert rows[2].all()
    assert not torch.equal(rows[2], clusters.rows(4, 0.1, seed=1)[2])
    assert torch.equal(rows[[0, 1, 3, 4], :3], clusters.rows(4, 0.1, seed=1)[[0, 1, 3, 4], :3])


def test_rows_of_equal_vectors_are_finite():
    assert Clusters(torch.zeros(3).long(), torch.ones(3), torch.ones(3, 2)).rows(2).isfinite().all()


def test_small_differences_of_wide_vectors_are_kept():
    vectors = 1 + 3e-5 * torch.randn(6, 1024, generator=torch.Generator().manual_seed(1))
    rows = Clusters(torch.zeros(6).long(), torch.ones(6), vectors).rows(1024)
    unit = torch.nn.functional.normalize(vectors.double())
    cosine = torch.cosine_similarity(rows.double(), unit - unit.mean(0))
    assert cosine.min() > 0.99


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factors", [torch.zeros(50), torch.linspace(0.1, 30, 50)])
def test_vectors_without_differences_leave_all_rows_to_chance(factors):
    """Multiples of one vector have directions that differ by rounding alone."""
    vectors = factors.unsqueeze(1) * torch.randn(7, generator=torch.Generator().manual_seed(1))
    given = torch.zeros(50).long(), torch.ones(50)
    rows = Clusters(*given, vectors).rows(4)
    assert torch.equal(rows, Clusters(*given, torch.zeros(50, 7)).rows(4))


def test_a_file_with_a_wrong_number_is_refused(tmp_path, monkeypatch):
    """torch.load would read it: it looks at no checksum."""
    monkeypatch.chdir(tmp_path)
    made = Clusters(ASSIGNMENT, torch.ones(len(ASSIGNMENT)))
    made.save("whole.pt")
    content = Path("whole.pt").read_bytes()
    place = content.index(made.assignment.int().numpy().tobytes())
    for at in range(place, place + 4 * len(ASSIGNMENT)):
        for bit in (1, 2):
            Path("bad.pt").write_bytes(
                content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
            )
            with pytest.raises(ValueError, match=r"^bad\.pt is damaged: its numbers"):
                Clusters.load("bad.pt")


def test_a_file_has_checksums_even_where_pytorch_writes_none(tmp_path):
    made = Clusters(ASSIGNMENT, torch.ones(len(ASSIGNMENT)))
    torch.serialization.set_crc32_options(False)
    try:
        made.save(tmp_path / "made.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert Clusters.load(tmp_path / "made.pt").assignment.equal(made.assignment)
