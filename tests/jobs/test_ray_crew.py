"""The Ray driver's part: which workers it starts, waits for and gives up, on a stand-in for Ray and its clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from making import make_job

from fastcfg.errors import Error
from fastcfg.jobs import Job, JobError, Spec, all_units, ray_runner
from fastcfg.jobs.worker import Outcome, Sampled


class RayError(Exception):
    cause: BaseException | None = None


class RayActorError(RayError):
    pass


class StandIn:
    """Of the module ray, what the driver uses. started, killed: actors; a reference is ready once `answer` says so."""

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError)

    def __init__(self) -> None:
        self.clock, self.on = 0.0, [node("a"), node("b")]
        self.started: list[Actor] = []
        self.killed: list[Actor] = []
        self.ready: dict[Any, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return self.on

    def remote(self, _: type) -> StandIn:
        return self

    def options(self, *, max_concurrency: int, node: str) -> Callable[..., Any]:
        assert max_concurrency == 3  # for take, events and finish

        def start() -> SimpleNamespace:
            self.started.append(Actor(node))
            return self.started[-1].handle

        return SimpleNamespace(remote=start)

    def answer(self, ref: Any, result: Any) -> None:
        self.ready[ref] = result

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        del num_returns, timeout
        return [ref for ref in refs if ref in self.ready], [ref for ref in refs if ref not in self.ready]

    def get(self, ref: Any) -> Any:
        result = self.ready.pop(ref)
        if isinstance(result, BaseException):
            raise result
        return result

    def kill(self, actor: SimpleNamespace) -> None:
        self.killed.append(next(one for one in self.started if one.handle is actor))


class Actor:
    """An actor of the stand-in, whose calls are references (actor, method, n)."""

    def __init__(self, on: str):
        self.on, self.calls = on, []
        self.handle = SimpleNamespace(**{name: self._method(name) for name in ("start", "take", "events", "finish")})

    def _method(self, name: str) -> SimpleNamespace:
        def call(*given: Any) -> tuple[Any, ...]:
            self.calls.append((name, given))
            return self, name, len(self.calls)

        return SimpleNamespace(remote=call)

    def last(self, name: str) -> tuple[Any, ...]:
        """The reference of its last such call."""
        return self, name, max(n + 1 for n, (called, _) in enumerate(self.calls) if called == name)


def node(name: str, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Alive": alive, "Resources": {"CPU": 4.0}}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(ray_runner, "_options", lambda place: {"node": place.node})
    clock = SimpleNamespace(monotonic=lambda: stand_in.clock, sleep=lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(ray_runner, "time", clock)
    return stand_in


@pytest.fixture
def job(tiny_spec: Spec, tmp_path: Path) -> Job:
    return make_job(tiny_spec, tmp_path / "job", [])


@pytest.fixture
def crew(ray: StandIn, job: Job) -> ray_runner._Crew:
    return ray_runner._Crew(ray, job, None)


def listened(crew: ray_runner._Crew) -> list[Outcome | Sampled]:
    return list(crew.listen())


def begun(ray: StandIn, crew: ray_runner._Crew, processor: str | None = None) -> list[Actor]:
    """The crew's actors, which have started."""
    crew.look()
    for actor in ray.started:
        ray.answer(actor.last("start"), processor or crew.job.resolved.processor)
    assert listened(crew) == []
    return ray.started


def test_every_node_has_one_actor_and_one_that_joins_gets_its_own(ray: StandIn, crew: ray_runner._Crew) -> None:
    crew.look()
    assert [actor.on for actor in ray.started] == ["a", "b"]
    ray.on = [*ray.on, node("c")]
    ray.clock = 1.9
    crew.look()  # too soon for another look
    assert len(ray.started) == 2
    ray.clock = 2.0
    crew.look()
    assert [actor.on for actor in ray.started] == ["a", "b", "c"]


def test_a_run_waits_for_a_node_for_five_minutes(ray: StandIn, crew: ray_runner._Crew) -> None:
    ray.on = []
    for ray.clock in (0.0, 200.0, 300.0):
        crew.look()
    ray.clock = 303.0
    with pytest.raises(JobError, match="has had no CPU for 300 s"):
        crew.look()


def test_the_five_minutes_begin_when_the_last_node_goes(ray: StandIn, crew: ray_runner._Crew) -> None:
    actors = list(begun(ray, crew))
    ray.clock = 200.0
    crew.look()
    ray.on = []
    for actor in actors:
        ray.answer(actor.last("events"), RayActorError("the node died"))
    assert listened(crew) == []
    ray.clock = 500.0
    crew.look()
    ray.clock = 503.0
    with pytest.raises(JobError, match="no CPU for 300 s"):
        crew.look()


def test_a_node_that_is_taken_by_others_is_noted_once(
    ray: StandIn, crew: ray_runner._Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    for ray.clock in (0.0, 60.0):
        crew.look()
    assert capsys.readouterr().err == ""
    for ray.clock in (63.0, 66.0):
        crew.look()
    assert capsys.readouterr().err.splitlines() == [
        f"note: no worker runs on node host-{name} yet: is it busy? all 4 CPUs must be free for it" for name in "ab"
    ]


def test_a_worker_that_works_for_long_is_not_waited_for(
    ray: StandIn, crew: ray_runner._Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(ray, crew)
    ray.clock = 100.0
    crew.look()
    assert capsys.readouterr().err == ""


def test_a_worker_that_had_started_may_die_as_often_as_its_units(ray: StandIn, crew: ray_runner._Crew) -> None:
    ray.on = [node("a")]
    for death in range(4):
        crew.look()
        assert len(ray.started) == death + 1
        ray.answer(ray.started[-1].last("start"), crew.job.resolved.processor)
        assert listened(crew) == []
        ray.answer(ray.started[-1].last("events"), RayActorError("killed"))
        assert listened(crew) == []


def test_a_worker_may_die_twice_while_it_starts(
    ray: StandIn, crew: ray_runner._Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.on = [node("a")]
    for death in range(3):
        crew.look()  # at once after a death
        assert len(ray.started) == death + 1
        assert capsys.readouterr().err == ""
        ray.answer(ray.started[-1].last("start"), RayActorError("out of memory"))
        assert listened(crew) == []
        assert crew.hands == []
    assert "left out: node host-a: out of memory" in capsys.readouterr().err
    with pytest.raises(JobError, match="no worker could be started: node host-a: out of memory"):
        crew.look()
    assert ray.killed == ray.started


def test_a_worker_that_says_why_it_cannot_start_is_left_out_at_once_and_the_others_work(
    ray: StandIn, crew: ray_runner._Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    crew.look()
    error = RayError("a traceback")
    error.cause = Error("it does not see the job's folder")
    ray.answer(ray.started[0].last("start"), error)
    assert listened(crew) == []
    assert "left out: node host-a: it does not see the job's folder" in capsys.readouterr().err
    ray.clock = 10.0
    crew.look()
    assert [actor.on for actor in ray.started] == ["a", "b"]
    assert [hand.place.node for hand in crew.hands] == ["b"]


def test_deaths_of_a_node_that_is_gone_are_not_its_workers(ray: StandIn, crew: ray_runner._Crew) -> None:
    ray.on = [node("a")]
    for _ in range(4):
        crew.look()
        ray.on = [node("a", alive=False)]
        ray.answer(ray.started[-1].last("start"), RayActorError("the node died"))
        assert listened(crew) == []
        ray.on = [node("a")]  # it is back
    crew.look()
    assert len(ray.started) == 5


@pytest.mark.parametrize("there", [True, False])
def test_only_the_unit_that_a_worker_died_of_is_blamed(there: bool, ray: StandIn, crew: ray_runner._Crew, job: Job) -> None:
    crew.look()
    (hand, _) = crew.hands
    assert not hand.free  # it starts
    actor, _ = begun(ray, crew)
    one, two, *_ = all_units(job.spec)
    hand.give(one)
    assert (hand.free, hand.busy) == (False, True)
    ray.answer(actor.last("take"), None)
    assert listened(crew) == []
    assert (hand.free, hand.busy) == (True, True)  # computed, not yet written
    hand.give(two)
    ray.on = [node("a", alive=there), node("b")]
    ray.answer(actor.last("take"), RayActorError("killed"))
    ray.answer(actor.last("events"), RayActorError("killed"))  # who is buried is buried once
    why = "its worker on host-a ended: killed"
    assert listened(crew) == [Outcome(one, "lost", why), Outcome(two, "failed" if there else "lost", why)]
    assert [left.place.node for left in crew.hands] == ["b"]
    assert ray.killed == [actor]


def test_nobody_is_blamed_for_a_worker_that_was_computing_nothing(ray: StandIn, crew: ray_runner._Crew, job: Job) -> None:
    actor, _ = begun(ray, crew)
    unit = next(iter(all_units(job.spec)))
    crew.hands[0].give(unit)
    ray.answer(actor.last("take"), None)
    assert listened(crew) == []
    ray.answer(actor.last("events"), RayActorError("killed"))
    assert [(event.unit, event.status) for event in listened(crew)] == [(unit, "lost")]


def test_events_are_passed_on_and_heard_again(ray: StandIn, crew: ray_runner._Crew, job: Job) -> None:
    actor, _ = begun(ray, crew)
    unit = next(iter(all_units(job.spec)))
    hand = crew.hands[0]
    hand.give(unit)
    first = actor.last("events")
    ray.answer(first, [Sampled(unit, 3)])
    assert listened(crew) == [Sampled(unit, 3)]
    assert hand.busy
    assert actor.last("events") != first
    ray.answer(actor.last("events"), [Sampled(unit, 1), Outcome(unit, "written")])
    assert listened(crew) == [Sampled(unit, 1), Outcome(unit, "written")]
    assert not hand.busy


@pytest.mark.parametrize("same", [True, False])
def test_another_processor_is_mentioned_once(
    same: bool, ray: StandIn, crew: ray_runner._Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    there = crew.job.resolved.processor if same else "an abacus"
    begun(ray, crew, there)
    told = capsys.readouterr().err.splitlines()
    assert [("host-a is an abacus" in line, "host-b is an abacus" in line) for line in told] == (
        [] if same else [(True, False), (False, True)]
    )


def test_a_run_that_ends_lets_those_that_work_write_and_kills_all(ray: StandIn, crew: ray_runner._Crew) -> None:
    crew.look()
    working, starting = ray.started
    ray.answer(working.last("start"), crew.job.resolved.processor)
    assert listened(crew) == []
    crew.stop()
    assert [call for call, _ in working.calls].count("finish") == 1
    assert [call for call, _ in starting.calls] == ["start"]
    assert ray.killed == [working, starting]


def test_an_exception_of_a_node_is_told_in_a_line() -> None:
    traceback = RayError("ray::Actor.take()\n  File 'x.py', line 1\nKeyError: 'x'\nValueError: no such luck\nmore")
    assert ray_runner._reason(traceback) == "ValueError: no such luck"
    caused = RayError("a traceback")
    caused.cause = KeyError("label")
    assert ray_runner._reason(caused) == "KeyError: 'label'"
    assert ray_runner._reason(RayError("The actor died.\nmore")) == "The actor died."
    assert ray_runner._reason(RayError("")) == "RayError"
