"""The engine on bagel-nano: batches equal to single runs, fair turns, cancelling, deadlines, refusals, draining."""

import pytest
from helpers.serving import ROUNDING, asks, draws, levels_apart

from unimm import TextSampling
from unimm.generation.decode_batch import DecodeBatch
from unimm.generation.stepwise import TextInProgress, advance_texts, run_alone
from unimm.serving.engine import Engine
from unimm.serving.events import (
    ChoiceDone,
    DeadlineError,
    EngineStoppedError,
    ImagePreview,
    QueueFullError,
    RequestCancelledError,
    TextPiece,
    WorkerFailedError,
)
from unimm.serving.limits import ServingLimits
from unimm.serving.queue import FairQueue
from unimm.serving.ticket import Ticket
from unimm.serving.worker import Choice

SCENE = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def engine(nano):
    with Engine({"nano": nano}) as running:
        yield running


def test_every_answer_is_the_librarys_whatever_else_runs(engine, nano):
    drawn = nano.generate(SCENE, seed=3, steps=4).image
    tickets = [
        engine.submit("nano", draws(SCENE, seed=3, steps=4)),
        engine.submit("nano", draws("a green triangle", seed=1, steps=7), n=2, previews=2),
        engine.submit("nano", draws(drawn, "make the circle green", seed=5, steps=5)),
        engine.submit("nano", asks(drawn, "how many shapes are there?")),
        engine.submit("nano", draws("three minus two squares", think=True, seed=1, steps=3)),
        engine.submit("nano", asks(drawn, "what is it?", text_sampling=TextSampling(temperature=1.0), seed=8)),
    ]
    scene, triangles, edit, count, thought, sampled = (ticket.result() for ticket in tickets)
    assert levels_apart(scene[0].images[0], drawn) <= ROUNDING
    expected = nano.generate("a green triangle", seed=1, steps=7, n=2).images
    assert len(triangles) == 2
    assert all(levels_apart(a.images[0], b) <= ROUNDING for a, b in zip(triangles, expected, strict=True))
    expected = nano.generate("make the circle green", images=drawn, seed=5, steps=5).image
    assert levels_apart(edit[0].images[0], expected) <= ROUNDING
    assert count[0].text == nano.understand(drawn, "how many shapes are there?")
    expected = nano.generate("three minus two squares", think=True, seed=1, steps=3)
    assert thought[0].reasoning == expected.text
    assert levels_apart(thought[0].images[0], expected.image) <= ROUNDING
    warm = TextSampling(temperature=1.0)
    assert sampled[0].text == nano.understand(drawn, "what is it?", text_sampling=warm, seed=8)


def test_interleaved_outputs(engine, nano):
    outputs = ("text", "image", "text")
    drawn = nano.generate(SCENE, seed=3, steps=2).image
    (answer,) = engine.submit("nano", asks("a red circle", drawn, "and?", outputs=outputs, steps=3, seed=4)).result()
    first, image, last = nano.interleave(["a red circle", drawn, "and?"], outputs=outputs, steps=3, seed=4)
    assert answer.outputs[0] == first and answer.outputs[2] == last
    assert levels_apart(answer.images[0], image) <= ROUNDING
    assert answer.done.n_images == 1 and answer.done.n_tokens >= 2


def test_events_come_in_order(engine):
    events = list(engine.submit("nano", draws(SCENE, steps=6), previews=2))
    assert [type(event).__name__ for event in events] == ["ImagePreview", "ImagePreview", "ImageDone", "ChoiceDone"]
    assert [(one.step, one.n_steps, one.index) for one in events if isinstance(one, ImagePreview)] == [
        (2, 6, 0),
        (4, 6, 1),
    ]


def test_equal_beginnings_are_prefilled_once(nano):
    system = "you answer every question about the picture in a single word, and nothing else at all"
    with Engine({"nano": nano}) as engine:
        first = engine.submit("nano", asks("what is red?", system=system)).result()
        prefixes = engine._workers["nano"].prefixes
        assert prefixes.n_reused_tokens == 0 and prefixes.n_bytes > 0
        again = engine.submit("nano", asks("what is red?", system=system)).result()
        assert prefixes.n_reused_tokens > 0
    assert first[0].text == again[0].text


def test_rows_that_join_and_leave_decode_as_alone(nano):
    """Texts of other lengths, one that joins later into the place of one that left."""
    requests = [asks(prompt, text_sampling=TextSampling(temperature=1.0, max_tokens=n), seed=n) for prompt, n in (
        ("what is it?", 3), ("name the colours", 12), ("who is left of the square?", 7),
    )]  # fmt: skip
    expected = [next(iter(run_alone(nano.start_run(request)))) for request in requests]
    works = []
    for request in requests:
        work = nano.start_run(request).work
        prefill = next(work)
        works.append(work.send(prefill.lm.prefill(prefill.caches, prefill.parts)))
    batch = DecodeBatch(nano.decoder)
    texts = [TextInProgress(works[0], batch), TextInProgress(works[1], batch)]
    running = list(texts)
    while running:
        advance_texts(batch, running)
        running = [one for one in running if one.result is None]
        if texts[0].result and len(texts) == 2:
            texts.append(TextInProgress(works[2], batch))
            running.append(texts[2])
    assert [one.result for one in texts] == expected
    assert batch.buffer.shape[2] == 0, "its memory is given back"


# ---- what goes wrong


def test_bad_requests_are_refused_with_the_librarys_words(engine, nano):
    for request, words in (
        (draws(" "), "empty prompt"),
        (draws("a", size=(3, 3)), "nearest is"),
        (draws("a", steps=0), "steps 0"),
        (asks("a " * 9000), "reach position"),
        (asks("a", text_sampling=TextSampling(max_tokens=10**6)), "at most 4096"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.submit("nano", request)
    with pytest.raises(NotImplementedError, match="negative_prompt"):
        engine.submit("nano", draws("a", negative_prompt="b"))
    with pytest.raises(ValueError, match="expected one of nano"):
        engine.submit("none", draws("a"))
    with Engine({"nano": nano}, limits=ServingLimits(memory_bytes=1000)) as small, pytest.raises(MemoryError):
        small.submit("nano", draws("a"))


def test_cancelled_requests_leave(engine):
    ticket = engine.submit("nano", draws(SCENE, steps=200), previews=100)
    next(iter(ticket))
    ticket.cancel()
    with pytest.raises(RequestCancelledError):
        ticket.result()
    # the next one is worked on, and nothing of the other is left
    engine.submit("nano", asks("what is it?", text_sampling=TextSampling(max_tokens=2))).result()
    assert engine.n_running == 0


def test_late_requests_end(engine):
    with pytest.raises(DeadlineError, match="not done in 0.05 seconds"):
        engine.submit("nano", draws(SCENE, steps=200), timeout_s=0.05).result()


def test_a_full_queue_says_when_to_come_back(nano):
    with Engine({"nano": nano}, limits=ServingLimits(max_running=1, max_waiting=2)) as engine:
        running = engine.submit("nano", draws(SCENE, steps=100), previews=50)
        next(iter(running))
        waiting = [engine.submit("nano", asks("a", text_sampling=TextSampling(max_tokens=1))) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 answers wait and 2 may") as caught:
            engine.submit("nano", asks("a"))
        assert caught.value.retry_after >= 1
        running.cancel()
        assert all(ticket.result()[0].done for ticket in waiting)
    with pytest.raises(EngineStoppedError):
        engine.submit("nano", asks("a"))


def test_stopping_drains(nano):
    engine = Engine({"nano": nano}).start()
    tickets = [engine.submit("nano", draws(SCENE, steps=3, seed=seed)) for seed in range(3)]
    engine.stop()
    assert all(ticket.result()[0].images for ticket in tickets)
    engine.start()
    late = engine.submit("nano", draws(SCENE, steps=200))
    engine.stop(drain_s=0)
    with pytest.raises(EngineStoppedError):
        late.result()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_breaks_begins_anew(nano, monkeypatch):
    """An error that no request can be blamed for: those at work hear of it, later ones are answered."""
    with Engine({"nano": nano}) as engine:
        worker = engine._workers["nano"]
        monkeypatch.setattr(worker, "advance", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(WorkerFailedError):
            engine.submit("nano", asks("a")).result()
        short = TextSampling(max_tokens=2)
        assert engine.submit("nano", asks("what is it?", text_sampling=short)).result()[0].done
        assert engine.stats.n_restarts == 1


def test_clients_take_turns():
    queue = FairQueue(10)
    for client, n in (("a", 3), ("b", 1), ("c", 2)):
        ticket = Ticket(model=client, n=n, timeout_s=1)
        queue.put([Choice(ticket, i, run=None) for i in range(n)], client=client)
    assert [queue.pop().ticket.model for _ in range(6)] == ["a", "b", "c", "a", "c", "a"]
    assert queue.peek() is None and len(queue) == 0


def test_an_event_is_given_once():
    ticket = Ticket(model="m", n=1, timeout_s=1)
    ticket.put(TextPiece(0, "a", "text"))
    ticket.put(TextPiece(0, "b", "reasoning"))
    ticket.put(ChoiceDone(0, "stop", 1, 2, 1, 0))
    (answer,) = ticket.result()
    assert (answer.text, answer.reasoning, answer.done.n_tokens) == ("a", "b", 2)
    assert list(ticket) == [] and ticket.has_ended
