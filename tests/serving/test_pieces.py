"""Pieces of serving without a model: reasoning told apart, stop strings, sizes, prefixes, limits, the supervisor."""

from types import SimpleNamespace

import pytest
import torch
import uvicorn
from uvicorn.supervisors.multiprocess import Process

from unimm.generation.kv_cache import KVCache
from unimm.generation.stepwise import TextAssembler
from unimm.sequence.parts import text_part
from unimm.serving.limits import ServingLimits
from unimm.serving.prefix_cache import PrefixCache
from unimm.serving.server import Supervisor
from unimm.serving.sizes import parse_openai_size
from unimm.serving.thinking import ThinkSplitter


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100])
def test_reasoning_is_told_apart_however_the_text_is_cut(n):
    text = "<think>two minus one < three</think>one<th"
    splitter = ThinkSplitter(enabled=True)
    pieces = [piece for i in range(0, len(text), n) for piece in splitter.push(text[i : i + n])] + splitter.rest()
    joined = {kind: "".join(one for channel, one in pieces if channel == kind) for kind in ("reasoning", "text")}
    assert joined == {"reasoning": "two minus one < three", "text": "one<th"}
    assert ThinkSplitter(enabled=False).push(text) == [("text", text)]


def test_a_stop_string_is_held_back_until_it_is_none():
    assembler = TextAssembler(lambda ids: "".join(map(chr, ids)), ("end", "stop"))
    given = [assembler.push(ord(letter)) for letter in "an enemy's "]
    assert "".join(given) == "an enem" and not assembler.is_stopped
    given += [assembler.push(ord(letter)) for letter in "end"]
    assert assembler.is_stopped and assembler.text == "an enemy's "
    assert "".join(given) + assembler.rest() == "an enemy's "


def test_sizes():
    assert parse_openai_size("64x32") == (32, 64)
    assert parse_openai_size("auto") is None is parse_openai_size(None)
    for size in ("64", "64X32", "-1x2", "64x32x1", "1" * 6 + "x1"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_openai_size(size)


def cache_of(n: int) -> KVCache:
    """Rows that carry their own numbers."""
    return KVCache((torch.arange(n, dtype=torch.float32).view(1, 1, n, 1, 1).expand(1, 2, n, 1, 1),), n)


def test_the_longest_common_beginning_is_reused():
    prefixes = PrefixCache(max_bytes=10_000)
    first = list(range(20))
    prefixes.store([text_part(first)], cache_of(20))
    # in two parts, of which the second differs in the middle
    cache, left = prefixes.split([text_part(first[:10]), text_part([*first[10:15], 99, 98])])
    assert cache.next_position == 15 and cache.length == 15
    assert [part.ids.tolist() for part in left] == [[99, 98]]
    # all of it: one row is left to compute
    cache, left = prefixes.split([text_part(first)])
    assert cache.length == 19 and left[0].ids.tolist() == [19]
    # too short
    cache, left = prefixes.split([text_part(first[:5])])
    assert cache.length == 0 and len(left) == 1


def test_prefixes_stay_within_their_bytes():
    prefixes = PrefixCache(max_bytes=2 * 20 * 4 * 2)
    for k in range(5):
        prefixes.store([text_part([100 * k + i for i in range(20)])], cache_of(20))
    assert prefixes.n_bytes <= prefixes.max_bytes
    assert prefixes.split([text_part([400 + i for i in range(20)])])[0].length == 19
    assert prefixes.split([text_part(list(range(20)))])[0].length == 0


def test_limits_are_positive():
    with pytest.raises(ValueError, match="max_running 0"):
        ServingLimits(max_running=0)


def test_a_worker_may_take_long_to_start_but_not_to_answer(monkeypatch):
    """Imports and models take as long as they do; later a worker that does not answer is killed."""
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.SIGNALS", {})  # the tests' own stay as they are
    events = []
    alive = SimpleNamespace(
        pid=7, is_alive=lambda: True, kill=lambda: events.append("killed"), join=lambda: None, exitcode=-9
    )
    config = uvicorn.Config("none", workers=1, timeout_worker_healthcheck=0)
    supervisor = Supervisor(config, [])
    worker = Process(config, [])
    worker.process = alive
    supervisor.processes = [worker]
    monkeypatch.setattr(Process, "start", lambda self: events.append("begun anew"))
    for _ in range(3):
        supervisor.keep_subprocess_alive()
    assert not events, "it has not answered yet"
    worker.child_conn.recv()
    worker.child_conn.send(True)
    supervisor.keep_subprocess_alive()
    assert events == ["killed", "begun anew"], "and this time it did not answer"
    supervisor.processes[0].parent_conn.close()
