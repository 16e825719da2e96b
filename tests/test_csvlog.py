"""`metrics.csv`: every row is there at once, whatever columns come later and whenever the run is
killed.
"""

from __future__ import annotations

import csv
import os

import pytest

from distill.report.curves import read
from distill.training.csv_logger import CsvLog


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = CsvLog(str(tmp_path))
    for step in (1, 2):
        log.log_metrics({"g/adv": 0.5}, step)
        assert rows_of(tmp_path)[-1] == {"step": str(step), "g/adv": "0.5"}


def test_a_row_costs_no_more_after_many(tmp_path):
    """It is appended: the file stays the same one, and grows by the row alone."""
    log = CsvLog(str(tmp_path))
    log.log_metrics({"g/adv": 0.5}, 1)
    before = (tmp_path / "metrics.csv").stat()
    for step in range(2, 3000):
        log.log_metrics({"g/adv": 0.5}, step)
    after = (tmp_path / "metrics.csv").stat()
    assert after.st_ino == before.st_ino
    log.log_metrics({"g/adv": 0.5}, 3000)
    assert (tmp_path / "metrics.csv").stat().st_size - after.st_size == len("3000,0.5\r\n")


def test_a_new_column_goes_behind_the_others_and_loses_no_row(tmp_path):
    log = CsvLog(str(tmp_path))
    log.log_metrics({"g/adv": 0.5}, 1)
    log.log_metrics({"d/r1": 2.0, "d/adv": 1.0}, 2)
    log.log_metrics({"g/adv": 0.25}, 3)
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines() == [
        "step,g/adv,d/adv,d/r1",
        "1,0.5",
        "2,,1.0,2.0",
        "3,0.25,,",
    ]
    curves, strange = read(tmp_path / "metrics.csv")
    assert curves["g/adv"].tolist() == [[1, 3], [0.5, 0.25]]
    assert not strange


def test_going_on_drops_what_is_done_again_and_what_is_torn(tmp_path):
    log = CsvLog(str(tmp_path))
    for iteration in range(1, 9):  # a head start of three, then steps
        log.log_metrics({"iteration": iteration, "g/adv": 0.5}, max(0, iteration - 3))
    log.log_metrics({"images_per_second": 7.0}, 4)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"\0\0\0\0\n2,0.")
    again = CsvLog(str(tmp_path))
    again.resume_at(step=4, iteration=7)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "0", "0", "1", "2", "3", "4", "4"]
    again.log_metrics({"iteration": 8, "g/adv": 0.5}, 5)
    assert rows_of(tmp_path)[-1] == {"step": "5", "iteration": "8", "g/adv": "0.5"}
    again.resume_at(step=0, iteration=2)  # stopped in the middle of the head start
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["1", "2"]


def test_going_on_from_nothing_makes_no_file(tmp_path):
    CsvLog(str(tmp_path)).resume_at(step=0, iteration=0)
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_being_written_is_not_read(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,g/adv\n1,0.5\n2,0.2", encoding="utf-8")
    assert read(tmp_path / "metrics.csv")[0]["g/adv"].tolist() == [[1], [0.5]]


def test_a_full_disk_leaves_no_half_row(tmp_path):
    resource = pytest.importorskip("resource")
    log = CsvLog(str(tmp_path))
    log.log_metrics({"g/adv": 0.5}, 1)
    before = (tmp_path / "metrics.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))  # room for half a row
    try:
        with pytest.raises(OSError, match="No space left"):
            log.log_metrics({"g/adv": 0.25}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_the_file_survives_a_power_cut_with_its_checkpoint(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = CsvLog(str(tmp_path))
    log.save()  # before anything is logged
    log.log_metrics({"g/adv": 0.5}, 1)
    log.save()
    assert len(synced) == 1


def test_a_new_column_late_in_a_run_parses_no_row_and_keeps_them_on_disk(tmp_path, monkeypatch):
    """A file of 100,000 rows is copied as it is, without a torn last line, and flushed: a
    checkpoint relies on rows that were flushed before.
    """
    rows = b"".join(b"%d,0.5\r\n" % step for step in range(1, 100_001))
    (tmp_path / "metrics.csv").write_bytes(b"step,g/adv\r\n" + rows + b"100001,0.")
    log, parsed, synced = CsvLog(str(tmp_path)), [], []
    with monkeypatch.context() as patch:
        patch.setattr(csv, "reader", parsed.append)
        patch.setattr(os, "fsync", synced.append)
        log.log_metrics({"d/late": 2.0}, 100_001)
    assert (tmp_path / "metrics.csv").read_bytes() == (
        b"step,g/adv,d/late\r\n" + rows + b"100001,,2.0\r\n"
    )
    assert (parsed, len(synced)) == ([], 1)
