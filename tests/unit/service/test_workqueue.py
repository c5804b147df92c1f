# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work queues: each task once, one thread at a time for each, in the order of their times."""

import threading
import time
from functools import partial

import pytest

from libvirt_natns.daemons.libvirtd import QEMU
from libvirt_natns.service.libvirt_watch import Subject
from libvirt_natns.service.workqueue import Background, Workers, WorkQueue


def test_equal_tasks_wait_once() -> None:
    queue: WorkQueue[Subject] = WorkQueue()
    queue.put(Subject(QEMU, "guest", "1", "web"))
    queue.put(Subject(QEMU, "guest", "1", "renamed"))
    queue.put(Subject(QEMU, "guest", "2", "other"))
    taken = [queue.take(), queue.take()]
    assert [task and task.uuid for task in taken] == ["1", "2"]
    queue.close()
    assert queue.take() is None


def test_earlier_of_two_times_counts() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.put("late", 3600)
    queue.put("soon", 0.02)
    queue.put("late", 0.0)
    queue.put("late", 3600)
    assert [queue.take(), queue.take()] == ["late", "soon"]


def test_task_in_work_is_given_out_when_it_is_over() -> None:
    """Another that changes meanwhile is not held up by it."""
    queue: WorkQueue[str] = WorkQueue()
    queue.put("slow")
    assert queue.take() == "slow"
    queue.put("slow")
    queue.put("other")
    assert queue.take() == "other"
    taken: list[str | None] = []
    waiting = threading.Thread(target=lambda: taken.append(queue.take()))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    queue.done("slow")
    waiting.join(10)
    assert taken == ["slow"]


def test_every_worker_gets_its_share() -> None:
    queue: WorkQueue[int] = WorkQueue()
    done: list[int] = []

    def work() -> None:
        while (task := queue.take()) is not None:
            done.append(task)
            queue.done(task)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for number in range(200):
        queue.put(number, number % 7 / 1000)
    deadline = time.monotonic() + 10
    while len(done) < 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    queue.close()
    for worker in workers:
        worker.join(10)
    assert sorted(done) == list(range(200))


def test_a_task_that_waits_keeps_its_time_or_gets_another() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.put_new("a", 0.0)
    queue.put_new("a", 3600)
    assert queue.take() == "a"
    queue.put("b", 0.0)
    queue.postpone("b", 3600)
    queue.put_new("a", 0.02)
    queue.put("c", 0.01)
    queue.drop("c")
    assert not queue.is_idle()
    queue.done("a")
    assert not queue.is_idle(60)
    assert queue.take() == "a"
    queue.done("a")
    assert queue.is_idle(60)
    assert not queue.is_idle(3600)


def test_the_leader_goes_first_and_alone() -> None:
    queue: WorkQueue[str] = WorkQueue(leader="host")
    queue.put("host", 3600)
    queue.put("a", 0.01)
    queue.put("b", 0.02)
    assert queue.take() == "host"
    taken: list[str | None] = []
    waiting = threading.Thread(target=lambda: taken.append(queue.take()))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    queue.done("host")
    waiting.join(10)
    assert taken == ["a"]
    # The leader itself waits for no other task.
    queue.put("host")
    assert queue.take() == "host"


def test_a_leader_that_is_postponed_does_not_hold_up_others() -> None:
    queue: WorkQueue[str] = WorkQueue(leader="host")
    queue.postpone("host", 3600)
    queue.put("a")
    assert queue.take() == "a"
    queue.put("b", 0.01)
    assert queue.take() == "b"
    # The end of the delay is a matter of time alone.
    queue.postpone("host", 0.02)
    assert queue.take() == "host"


@pytest.mark.parametrize("again", ["put", "drop", "take"])
def test_a_leader_leads_again_after_a_delay_that_has_ended(again: str) -> None:
    queue: WorkQueue[str] = WorkQueue(leader="host")
    queue.postpone("host", 3600)
    if again == "drop":
        queue.drop("host")
    else:
        queue.put("host")
    if again == "take":
        assert queue.take() == "host"
        queue.done("host")
    queue.put("a")
    if again != "put":
        queue.put("host", 3600)
    assert queue.take() == "host"


def test_workers_finish_their_task_and_leave_the_rest() -> None:
    queue: WorkQueue[str] = WorkQueue()
    begun, release = threading.Event(), threading.Event()
    done: list[str] = []

    def work(task: str) -> None:
        begun.set()
        assert release.wait(10)
        done.append(task)

    workers = Workers(queue, work, 1, "worker")
    workers.start()
    queue.put("first")
    assert begun.wait(10)
    queue.put("second")
    threading.Timer(0.05, release.set).start()
    workers.stop(10)
    assert done == ["first"]
    assert queue.take() is None


def test_an_error_of_one_task_ends_no_worker(capsys: pytest.CaptureFixture[str]) -> None:
    queue: WorkQueue[str] = WorkQueue()
    done = threading.Event()

    def work(task: str) -> None:
        if task == "bad":
            raise KeyError(task)
        done.set()

    workers = Workers(queue, work, 1, "worker")
    workers.start()
    queue.put("bad")
    queue.put("good", 0.01)
    assert done.wait(10)
    workers.stop(10)
    assert "KeyError: 'bad'" in capsys.readouterr().err


# -- in the background -----------------------------------------------------------


def test_work_in_the_background_survives_a_lack_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    failed: list[Exception] = []
    background = Background(failed.append)
    background.start()
    monkeypatch.setattr(threading.Thread, "start", fail)
    done: list[str] = []
    over = threading.Event()

    def last() -> None:
        done.append("later")
        over.set()

    def first() -> None:
        done.append("soon")
        background.after(0.01, last)
        raise KeyError("bug")

    background.soon(first)
    assert over.wait(10)
    background.stop()
    assert done == ["soon", "later"]
    assert [type(error) for error in failed] == [KeyError]


def test_the_background_ends_with_the_work_that_is_due() -> None:
    background = Background(lambda error: None)
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    for number in range(20):
        background.soon(partial(work, number))
    background.after(3600, partial(work, 20))
    background.start()
    background.stop()
    assert sorted(done) == list(range(20))


def test_the_background_does_not_wait_for_ever() -> None:
    background = Background(lambda error: None)
    release = threading.Event()
    background.start()
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(10)
        over.set()

    background.soon(work)
    assert begun.wait(10)
    background.stop(0.05)
    assert not over.is_set()
    release.set()
