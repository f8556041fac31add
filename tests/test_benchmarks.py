"""The tables that the benchmarks print."""

import json

import pytest

from benchmarks.learning import merge, table


def write(path, tested, **rows):
    path.write_text(json.dumps({"test_images": tested, "rows": rows}))
    return path


def scores(mean, grid, knn):
    return {"mean": mean, "grid": grid, "knn": knn}


def test_runs_are_joined_row_by_row(tmp_path):
    first = write(tmp_path / "a.json", 100, pixels=[scores(0.3, 0.8, 0.7)])
    second = write(tmp_path / "b.json", 100, pixels=[scores(0.5, 0.9, 0.7)], random=[scores(0.1, 0.2, 0.3)])
    lines = table(*merge([first, second])).splitlines()
    assert "100 images" in lines[0]
    assert lines[-2:] == [
        "| pixels | 2 | 40.0 (30.0 to 50.0) | 85.0 (80.0 to 90.0) | 70.0 (70.0 to 70.0) |",
        "| random | 1 | 10.0 (10.0 to 10.0) | 20.0 (20.0 to 20.0) | 30.0 (30.0 to 30.0) |",
    ]


def test_runs_on_other_test_images_are_not_joined(tmp_path):
    files = [write(tmp_path / f"{n}.json", n, pixels=[scores(0.3, 0.8, 0.7)]) for n in (100, 200)]
    with pytest.raises(SystemExit, match="different images"):
        merge(files)
