"""The demo's worker: a client's newest request is done, and no slow job holds up an urgent one."""

from __future__ import annotations

import threading

import pytest

from distill.demonstration.worker import Dropped, Worker

WAIT = 20  # seconds, never reached


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


class Work:
    """Jobs that note their steps, and that wait at each until the test lets them go on."""

    def __init__(self):
        self.done: list[str] = []
        self.begun = threading.Event()
        self.go = threading.Event()

    def job(self, name, steps=1, *, wait=False):
        for i in range(steps):
            if wait:
                self.begun.set()
                assert self.go.wait(WAIT)
            self.done.append(f"{name}{i}")
            yield
        return name


def test_of_many_requests_only_the_first_and_the_last_are_done(worker):
    work = Work()
    first = worker.submit("tab", [(1, work.job("first", wait=True))])
    assert work.begun.wait(WAIT)
    later = [worker.submit("tab", [(1, work.job(f"text {i} "))])[0] for i in range(50)]
    work.go.set()
    assert later[-1].result(WAIT) == "text 49 "
    for future in [*first, *later[:-1]]:
        with pytest.raises(Dropped):
            future.result(WAIT)
    assert work.done == ["first0", "text 49 0"]
    assert (worker.requests, worker.dropped) == (51, 50)


def test_a_dropped_job_stops_at_its_next_step(worker):
    work = Work()
    (slow,) = worker.submit("tab", [(9, work.job("slow", 28, wait=True))])
    assert work.begun.wait(WAIT)
    (new,) = worker.submit("tab", [(9, work.job("new"))])
    work.go.set()
    assert new.result(WAIT) == "new"
    assert work.done == ["slow0", "new0"]
    assert isinstance(slow.exception(WAIT), Dropped)


def test_an_urgent_job_waits_for_one_step_of_a_slow_one(worker):
    work = Work()
    (slow,) = worker.submit("other tab", [(9, work.job("slow", 3, wait=True))])
    assert work.begun.wait(WAIT)
    (urgent,) = worker.submit("tab", [(1, work.job("urgent", 2))])
    work.go.set()
    assert slow.result(WAIT) == "slow"
    assert urgent.result(WAIT) == "urgent"
    assert work.done == ["slow0", "urgent0", "urgent1", "slow1", "slow2"]
    assert worker.dropped == 0


def test_jobs_of_a_request_are_done_in_the_order_of_urgency(worker):
    work = Work()
    (hold,) = worker.submit("other tab", [(0, work.job("hold", wait=True))])
    assert work.begun.wait(WAIT)
    futures = worker.submit("tab", [(28, work.job("teacher")), (1, work.job("student"))])
    work.go.set()
    assert [f.result(WAIT) for f in [hold, *futures]] == ["hold", "teacher", "student"]
    assert work.done == ["hold0", "student0", "teacher0"]


def test_a_job_that_fails_tells_who_asked_and_no_one_else(worker):
    def broken():
        yield
        raise ValueError("strength=2: too much")

    (wrong,) = worker.submit("tab", [(1, broken())])
    with pytest.raises(ValueError, match="too much"):
        wrong.result(WAIT)
    assert worker.submit("tab", [(1, Work().job("next"))])[0].result(WAIT) == "next"


def test_closing_tells_all_who_wait():
    worker, work = Worker(), Work()
    (future,) = worker.submit("tab", [(1, work.job("slow", 5, wait=True))])
    assert work.begun.wait(WAIT)
    threading.Timer(0.05, work.go.set).start()
    worker.close()
    assert isinstance(future.exception(WAIT), Dropped)
    assert work.done == ["slow0"]
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit("tab", [])


def test_a_request_without_jobs_drops_those_before(worker):
    work = Work()
    (hold,) = worker.submit("other tab", [(0, work.job("hold", wait=True))])
    assert work.begun.wait(WAIT)
    (old,) = worker.submit("tab", [(1, work.job("old"))])
    assert worker.submit("tab", []) == []
    work.go.set()
    assert isinstance(old.exception(WAIT), Dropped)
    assert hold.result(WAIT) == "hold"
    assert work.done == ["hold0"]


def test_a_request_that_a_newer_one_has_overtaken_is_dropped(worker):
    work = Work()
    (new,) = worker.submit("tab", [(1, work.job("new", wait=True))], moment=2.0)
    assert work.begun.wait(WAIT)
    (late,) = worker.submit("tab", [(1, work.job("late"))], moment=1.0)
    (other,) = worker.submit("other tab", [(1, work.job("other"))], moment=1.0)
    work.go.set()
    assert isinstance(late.exception(WAIT), Dropped)
    assert [new.result(WAIT), other.result(WAIT)] == ["new", "other"]
    assert (worker.requests, worker.dropped) == (3, 1)
