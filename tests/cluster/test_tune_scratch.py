"""Of a killed search's files, those go that Ray Tune made, and no others."""

from pathlib import Path

from distft.cluster.tune.scratch import EXPERIMENT, remove_dead_scratch, scratch_directory


def test_only_scratch_of_a_dead_search_is_removed(tmp_path: Path) -> None:
    kept = [".ray_reservation", ".ray_0123456", ".ray_ABCDEFGH", "a.ray_01234567", ".ray_foreign_"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".ray_foreign_" / "notes").touch()
    (tmp_path / ".ray_linked__").symlink_to(tmp_path / "a.ray_01234567")
    (tmp_path / ".ray_a_file__").touch()
    kept += [".ray_linked__", ".ray_a_file__"]
    with scratch_directory(tmp_path) as scratch:  # as a killed process leaves it
        (Path(scratch) / EXPERIMENT / "trial").mkdir(parents=True)
        remove_dead_scratch(tmp_path)
        assert not Path(scratch).exists()
        Path(scratch).mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
