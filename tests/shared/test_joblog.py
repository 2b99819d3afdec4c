"""A job's own log: what is logged while it runs, and no more than its share."""

import logging
import os

from shared import joblog


def test_what_is_logged_meanwhile_is_in_the_file(tmp_path):
    log = logging.getLogger("lanner.test")
    log.warning("before")
    with joblog.logged(tmp_path / "attempt-1.log"):
        log.warning("meanwhile é")
    log.warning("after")
    assert (tmp_path / "attempt-1.log").read_text().endswith("WARNING lanner.test meanwhile é\n")


def test_what_forked_children_log_is_in_it_too(tmp_path):
    log = logging.getLogger("lanner.test")
    with joblog.logged(tmp_path / "attempt-1.log"):
        for number in range(3):
            if os.fork() == 0:
                log.warning("child %d", number)
                os._exit(0)
            os.wait()
    assert [line.split()[-1] for line in (tmp_path / "attempt-1.log").read_text().splitlines()] == ["0", "1", "2"]


def test_it_takes_no_more_once_it_is_long_and_a_full_disk_is_none_of_its_business(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(joblog, "MOST", 1000)
    log = logging.getLogger("lanner.test")
    with joblog.logged(tmp_path / "attempt-1.log"):
        for _ in range(100):
            log.warning("x" * 100)
    assert 1000 <= (tmp_path / "attempt-1.log").stat().st_size < 1300
    (tmp_path / "attempt-2.log").symlink_to("/dev/full")
    with joblog.logged(tmp_path / "attempt-2.log"):
        log.warning("lost")
    assert "Traceback" not in capsys.readouterr().err
