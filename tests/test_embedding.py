"""The examples of docs/embedding.md, each run as it stands there, and what the document says of them."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_fused_dit import random_model
from torch.utils.data import DataLoader

import fastcfg

DOCUMENT = Path(__file__).parent.parent / "docs" / "embedding.md"
TIMEOUT = 120  # seconds, after which something hangs


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "tiny.safetensors"
    fastcfg.save(random_model(num_classes=10), path)
    return str(path)


def example(title: str, checkpoint: str = "") -> str:
    """The code under a heading, with a tiny model in the shipped one's place."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.S | re.M)
    assert section is not None
    (code,) = re.findall(r"```python\n(.*?)```", section[1], re.S)
    return code.replace('"fashion-mnist"', repr(checkpoint))


def run(code: str) -> dict:
    namespace: dict = {"__name__": "__main__"}
    exec(compile(code, str(DOCUMENT), "exec"), namespace)
    return namespace


def test_every_example_is_run() -> None:
    headings = re.findall(r"^## (.*)$", DOCUMENT.read_text(), re.M)
    assert headings == ["In a service", "In a data loader", "Beside training"]
    assert DOCUMENT.read_text().count("```python") == len(headings)


def test_a_service_gives_each_request_what_it_would_get_alone(checkpoint: str) -> None:
    made = run(example("In a service", checkpoint))
    assert not made["service"].thread.is_alive()
    sampler = made["sampler"]
    for k, image in enumerate(made["images"]):
        assert torch.equal(image, sampler([k], 1.0 + k / 4, [100 + k])[0])


def test_a_service_joins_what_waits_and_fails_only_the_wrong_request(checkpoint: str) -> None:
    made = run(example("In a service", checkpoint))
    sampler = made["sampler"]
    calls: list[int] = []
    started = threading.Event()

    class Watched:
        batch = sampler.batch

        def __call__(self, labels, scales, seeds):
            calls.append(len(labels))
            assert started.wait(TIMEOUT)
            return sampler(labels, scales, seeds)

    service = made["Service"](Watched())
    first = service.ask(1, 2.0, 5)
    while not calls:  # the thread has taken the first alone
        threading.Event().wait(0.01)
    good, wrong, cancelled = service.ask(2, 3.0, 6), service.ask(99, 3.0, 7), service.ask(3, 3.0, 8)
    assert cancelled.cancel()
    service.waiting.put(None)  # as `close` does, with requests before it
    started.set()
    with pytest.raises(fastcfg.Error, match="label 99"):
        wrong.result(TIMEOUT)
    assert torch.equal(good.result(TIMEOUT), sampler([2], 3.0, [6])[0])
    assert torch.equal(first.result(TIMEOUT), sampler([1], 2.0, [5])[0])
    service.thread.join(TIMEOUT)
    assert not service.thread.is_alive()
    assert calls == [1, 2, 1, 1]


def test_any_thread_may_call_one_sampler(checkpoint: str) -> None:
    sampler = fastcfg.Sampler(fastcfg.load(checkpoint), steps=3, batch=2, dtype="fp32")
    want = [sampler([k], 2.0, [k]) for k in range(4)]
    got: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda k=k: got.update({k: sampler([k], 2.0, [k])})) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert all(torch.equal(got[k], want[k]) for k in range(4))


@pytest.fixture
def generated(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The loader's example as a file, which spawned workers import."""
    (tmp_path / "generated_example.py").write_text(example("In a data loader", checkpoint))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "generated_example", raising=False)
    return importlib.import_module("generated_example")


def test_a_loaders_example_runs(checkpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    # What is run here lies in no file that a worker could import
    run(example("In a data loader", checkpoint).replace("num_workers=2", "num_workers=0"))
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(line.startswith("torch.Size([8, 3, 8, 8]) [") for line in printed)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_a_loaders_samples_depend_on_neither_workers_nor_order(
    generated: ModuleType, checkpoint: str, context: str, workers: int
) -> None:
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    labels = [0, 7, 9, 9, 1, 2]
    model = fastcfg.load(checkpoint)
    want = fastcfg.Sampler(model, steps=20, batch=8, dtype="fp32")(labels, 2.0, seeds=0)
    dataset = generated.Generated(labels, 2.0)
    options = {"num_workers": workers, "multiprocessing_context": context, "timeout": TIMEOUT}
    backwards = list(range(len(labels)))[::-1]
    batches = list(DataLoader(dataset, batch_size=2, sampler=backwards, **options))
    assert torch.equal(torch.cat([images for images, _ in batches]), want[backwards])
    assert torch.cat([y for _, y in batches]).tolist() == labels[::-1]
    assert dataset.sampler is None


def test_a_compiled_function_samples_by_what_is_not_traced(checkpoint: str) -> None:
    sampler = fastcfg.Sampler(fastcfg.load(checkpoint), steps=2, batch=2, dtype="fp32")
    sample = torch.compiler.disable(sampler.__call__)
    compiled = torch.compile(lambda labels: sample(labels, 2.0) * 2, backend="eager")
    assert torch.equal(compiled([0, 1]), sampler([0, 1], 2.0) * 2)


def test_a_sampler_made_before_a_fork_works_after_it(checkpoint: str) -> None:
    if "fork" not in torch.multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    sampler = fastcfg.Sampler(fastcfg.load(checkpoint), steps=3, batch=2, dtype="fp32")
    want = sampler([1, 2], 2.0)
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(sampler([1, 2], 2.0).tolist()))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0
    assert queue.get() == want.tolist()


def test_sampling_beside_training_follows_the_average_and_leaves_training_alone() -> None:
    torch.manual_seed(0)
    made = run(example("Beside training"))
    sampler, averaged, samples = made["sampler"], made["averaged"], made["samples"]
    assert torch.equal(samples, fastcfg.Sampler(averaged.module, steps=10, batch=3, dtype="fp32")([0, 1, 2], 3.0, 0))
    before = [p.clone() for p in made["model"].parameters()]
    drawn = torch.get_rng_state()
    sampler([0, 1, 2], 3.0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.is_grad_enabled()
    assert all(map(torch.equal, before, made["model"].parameters()))
    # The same training without any sampling
    torch.manual_seed(0)
    quiet = run(re.sub(r"    if step % 10 == 0:\n.*", "", example("Beside training"), flags=re.S))
    assert all(map(torch.equal, averaged.parameters(), quiet["averaged"].parameters()))


def test_old_weights_are_refused_until_refreshed() -> None:
    made = run(example("Beside training").replace("sampler.refresh()  #", "pass  #").replace("samples = sampler(", "dict("))
    sampler, averaged = made["sampler"], made["averaged"]
    with pytest.raises(fastcfg.Error, match="weights changed since the sampler copied them"):
        sampler([0], 3.0)
    sampler.refresh()
    first = sampler([0], 3.0)
    for changed in (
        lambda p: p.detach().lerp_(torch.ones_like(p), 0.1),
        lambda p: p.detach().copy_(2 * p.detach()),
    ):
        with torch.no_grad():
            changed(averaged.module.final_layer.linear.bias)
        with pytest.raises(fastcfg.Error, match="refresh"):
            sampler([0], 3.0)
        sampler.refresh()
        assert not torch.equal(sampler([0], 3.0), first)
    averaged.module.final_layer.linear.bias.data.zero_()  # torch counts no write here, as the document says
    sampler([0], 3.0)
    averaged.module.train()
    with pytest.raises(fastcfg.Error, match="training mode"):
        sampler([0], 3.0)
