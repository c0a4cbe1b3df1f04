"""Serving under load: how much batching gains, what a lone request waits, and that nothing is lost or changed.

    python benchmarks/serving.py engine               # the gain in one process, in its processor's time
    python benchmarks/serving.py gain                 # 16 clients against one after the other, in one run
    python benchmarks/serving.py lone                 # a lone request against model.generate
    python benchmarks/serving.py load --minutes 3     # a mix of chat, draw, edit and think, with faults
    python benchmarks/serving.py all --short          # a minute of all three, for tests

The server is `unimm serve` in processes of its own, the clients are OpenAI's. Every answer is compared with the
library's for its seed. Each part ends with a report, or with one JSON line (--json); the exit code is 1 where an answer
is lost or wrong, a refusal does not say when to come back, or memory grows.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import torch
from PIL import Image

import unimm
from unimm.generation.stepwise import ModelRequest, RequestMessage
from unimm.serving.engine import Engine

MODEL = "bagel-nano"
PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle",
    "two blue circles",
    "a yellow square above a red triangle",
)
QUESTIONS = ("how many shapes are there?", "what is red?", "what is left of the square?")
ROUNDING = 1  # levels of 255 that a pixel at a level's edge may move
MAX_WAITING = 16  # under load: with the 32 that run fewer than there are clients, so that the bound is met
WARM_UP_S = 60  # memory may grow for so long, and is flat then
FLAT = 0.1  # by at most so much of it the memory may differ between the first and the last third of what follows


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """`unimm serve` on a free port: its address, and the id of its first process."""
    command = [sys.executable, "-m", "unimm", "serve", "--model", MODEL, "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
            assert found, "the server says where it listens"
            wait_healthy(found[0])
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait(120)


def wait_healthy(url: str) -> None:
    """Wait until a server takes requests."""
    for _ in range(6000):
        if is_healthy(url):
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} did not come up")


def is_healthy(url: str) -> bool:
    """Whether a server takes requests now."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def resident_bytes(pid: int) -> int:
    """Anonymous memory of the worker, the one child that is no tracker."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            total += 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])
    return total


def worker_seconds(pid: int) -> float:
    """Processor time of the worker so far: other work on the machine disturbs it less than the clock's."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def opened(b64: str) -> Image.Image:
    """The image of a base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def levels_apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images in levels."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) if a.size == b.size else 255


def png(image: Image.Image) -> bytes:
    """A PNG file's bytes."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


# ---- gain, and a lone request


async def draw(client: openai.AsyncOpenAI, seed: int, **options: Any) -> Image.Image:
    """An image of a seed."""
    prompt = PROMPTS[seed % len(PROMPTS)]
    answer = await client.images.generate(model=MODEL, prompt=prompt, extra_body={"seed": seed} | options)
    return opened(answer.data[0].b64_json)


def measure_gain(url: str, pid: int, *, n_clients: int, rounds: int) -> dict[str, Any]:
    """Images a second of clients at once, and of the same requests one after the other, in turns."""

    async def at_once(seeds: range) -> tuple[float, float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            begin = time.perf_counter(), worker_seconds(pid)
            await asyncio.gather(*(draw(client, seed) for seed in seeds))
            return len(seeds) / (time.perf_counter() - begin[0]), len(seeds) / (worker_seconds(pid) - begin[1])

    async def in_turn(seeds: range) -> tuple[float, float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            begin = time.perf_counter(), worker_seconds(pid)
            for seed in seeds:
                await draw(client, seed)
            return len(seeds) / (time.perf_counter() - begin[0]), len(seeds) / (worker_seconds(pid) - begin[1])

    asyncio.run(in_turn(range(1)))
    pairs = [
        (asyncio.run(in_turn(range(i, i + n_clients))), asyncio.run(at_once(range(i, i + n_clients))))
        for i in range(rounds)
    ]
    alone, together = (statistics.median(one[0] for one in column) for column in zip(*pairs, strict=True))
    gains = [b[0] / a[0] for a, b in pairs]
    processor_gains = [b[1] / a[1] for a, b in pairs]
    return {
        "part": "gain",
        "clients": n_clients,
        "images_a_second_one_after_the_other": round(alone, 3),
        "images_a_second_at_once": round(together, 3),
        "gain": round(statistics.median(gains), 2),
        "gains": [round(one, 2) for one in gains],
        "gain_in_processor_time": round(statistics.median(processor_gains), 2),
    }


def measure_lone(url: str, pid: int, model: Any, *, n: int) -> dict[str, Any]:
    """Seconds of a lone request, and of model.generate in this process, in turns: by the clock, and of the processor.

    By the clock both wait for the processor where it has other work, a request more often: it wakes other threads and
    processes, and back. The processor's time is that of the work alone, of the server's worker and of the client.
    """

    async def one(seed: int) -> tuple[float, float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            await client.models.list()  # the connection is there
            begin = time.perf_counter(), worker_seconds(pid) + time.process_time()
            await draw(client, seed)
            return time.perf_counter() - begin[0], worker_seconds(pid) + time.process_time() - begin[1]

    def direct_one(seed: int) -> tuple[float, float]:
        begin = time.perf_counter(), time.process_time()
        model.generate(PROMPTS[seed % len(PROMPTS)], seed=seed)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    # the first of each warms up
    rows = [(asyncio.run(one(seed)), direct_one(seed)) for seed in range(n + 1)][1:]
    served, direct = ([row[i][0] for row in rows] for i in (0, 1))
    served_work, direct_work = (sum(row[i][1] for row in rows) for i in (0, 1))
    # the least is the least disturbed by other work on the machine
    return {
        "part": "lone",
        "n": n,
        "served_s": round(min(served), 3),
        "generate_s": round(min(direct), 3),
        "ratio": round(min(served) / min(direct), 3),
        "median_ratio": round(statistics.median(served) / statistics.median(direct), 3),
        "served_processor_s": round(served_work / n, 3),
        "generate_processor_s": round(direct_work / n, 3),
        "processor_ratio": round(served_work / direct_work, 3),
    }


def measure_engine(model: Any, *, n: int, rounds: int) -> dict[str, Any]:
    """Images a second of processor time: `generate` one by one, the engine one by one, and n requests at once.

    In one process with one thread, which other work on the machine disturbs less than the clock's time.
    """

    def request(seed: int) -> ModelRequest:
        message = RequestMessage(role="user", content=(PROMPTS[seed % len(PROMPTS)],))
        return ModelRequest(messages=(message,), outputs=("image",), seed=seed)

    columns: dict[str, list[float]] = {"generate": [], "engine_alone": [], "engine_at_once": []}
    apart = 0
    with Engine({MODEL: model}) as engine:
        engine.submit(MODEL, request(0)).result()
        for _ in range(rounds):
            few = range(max(1, n // 4))
            begin = time.process_time()
            direct = [model.generate(PROMPTS[seed % len(PROMPTS)], seed=seed).image for seed in few]
            columns["generate"].append(len(few) / (time.process_time() - begin))
            begin = time.process_time()
            for seed in few:
                engine.submit(MODEL, request(seed)).result()
            columns["engine_alone"].append(len(few) / (time.process_time() - begin))
            begin = time.process_time()
            tickets = [engine.submit(MODEL, request(seed)) for seed in range(n)]
            images = [ticket.result()[0].images[0] for ticket in tickets]
            columns["engine_at_once"].append(n / (time.process_time() - begin))
            apart = max(apart, *(levels_apart(a, b) for a, b in zip(direct, images, strict=False)))
    rates = {name: round(statistics.median(values), 3) for name, values in columns.items()}
    pairs = zip(columns["generate"], columns["engine_alone"], columns["engine_at_once"], strict=True)
    ratios = [(a / b, c / b, c / a) for a, b, c in pairs]
    alone, gain, gain_over_generate = (round(statistics.median(column), 3) for column in zip(*ratios, strict=True))
    return {
        "part": "engine",
        "at_once": n,
        "images_a_processor_second": rates,
        "gain_over_one_after_the_other": gain,
        "gain_over_generate": gain_over_generate,
        "lone_against_generate": alone,
        "most_levels_apart": apart,
    }


# ---- load and faults


class Expected:
    """The library's answers, each computed once."""

    def __init__(self, model: Any, steps: int):
        self.model = model
        self.steps = steps
        self.known: dict[Any, Any] = {}
        self.scene = model.generate(PROMPTS[0], seed=0, steps=steps).image

    def of(self, kind: str, seed: int) -> Any:
        """An image, a text, or reasoning and an image."""
        key = kind, seed
        if key not in self.known:
            self.known[key] = self._compute(kind, seed)
        return self.known[key]

    def _compute(self, kind: str, seed: int) -> Any:
        model, steps = self.model, self.steps
        if kind == "draw":
            return model.generate(PROMPTS[seed % len(PROMPTS)], seed=seed, steps=steps).image
        if kind == "edit":
            return model.generate("make the circle green", images=self.scene, seed=seed, steps=steps).image
        if kind == "think":
            made = model.generate("three minus two squares", think=True, seed=seed, steps=steps)
            return made.text, made.image
        warm = unimm.TextSampling(temperature=1.0, max_tokens=12)
        return model.understand(self.scene, QUESTIONS[seed % len(QUESTIONS)], text_sampling=warm, seed=seed)


class LoadTest:
    """Clients that ask for this and that until the time is over."""

    def __init__(self, url: str, expected: Expected, *, n_seeds: int):
        self.url = url
        self.expected = expected
        self.n_seeds = n_seeds
        self.counts: Counter[str] = Counter()
        self.most_levels = 0
        self.wrong: list[str] = []
        self.answers: list[tuple[str, int, Any]] = []
        self.seconds: list[float] = []
        self.waits: list[str] = []  # Retry-After of the refusals

    async def run(self, n_clients: int, seconds: float) -> None:
        """All clients at once."""
        end = time.monotonic() + seconds
        hooks = {"response": [self._note_refusal]}
        self.http = httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None), event_hooks=hooks)
        # refused requests are asked again after Retry-After, as the client does by itself
        async with openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=100, timeout=300, http_client=self.http
        ) as client:
            await asyncio.gather(*(self._client(client, random.Random(i), end) for i in range(n_clients)))

    async def _note_refusal(self, answer: httpx.Response) -> None:
        if answer.status_code == 429:
            self.waits.append(answer.headers.get("retry-after", ""))

    async def _client(self, client: openai.AsyncOpenAI, rng: random.Random, end: float) -> None:
        while time.monotonic() < end:
            kind = rng.choices(("draw", "edit", "chat", "think", "cancel", "malformed", "slow"), (6, 3, 6, 2, 2, 2, 1))[
                0
            ]
            self.counts[kind] += 1
            begin = time.perf_counter()
            try:
                await getattr(self, f"_{kind}")(client, rng.randrange(self.n_seeds), rng)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.wrong.append(f"{kind}: {type(error).__name__} {error}"[:200])
            if kind in ("draw", "edit", "chat", "think"):
                self.seconds.append(time.perf_counter() - begin)

    async def _draw(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        image = await draw(client, seed, steps=self.expected.steps)
        self.answers.append(("draw", seed, image))

    async def _edit(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        answer = await client.images.edit(
            model=MODEL,
            image=("a.png", png(self.expected.scene)),
            prompt="make the circle green",
            extra_body={"seed": str(seed), "steps": str(self.expected.steps)},
        )
        self.answers.append(("edit", seed, opened(answer.data[0].b64_json)))

    async def _chat(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        uri = "data:image/png;base64," + base64.b64encode(png(self.expected.scene)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": uri}},
            {"type": "text", "text": QUESTIONS[seed % len(QUESTIONS)]},
        ]
        ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": content}], "seed": seed}
        ask |= {"temperature": 1.0, "max_tokens": 12}
        if rng.random() < 0.5:
            answer = await client.chat.completions.create(**ask)
            text = answer.choices[0].message.content
        else:
            text = ""
            async for chunk in await client.chat.completions.create(**ask, stream=True):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        self.answers.append(("chat", seed, text))

    async def _think(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        answer = await client.images.generate(
            model=MODEL,
            prompt="three minus two squares",
            extra_body={"seed": seed, "steps": self.expected.steps, "think": True},
        )
        one = answer.data[0]
        self.answers.append(("think", seed, (one.revised_prompt or "", opened(one.b64_json))))

    async def _cancel(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        """Go away in the middle, of a whole answer or of a stream."""
        body = {"prompt": PROMPTS[0], "seed": seed, "stream": rng.random() < 0.5, "partial_images": 3}
        try:
            await asyncio.wait_for(self.http.post(f"{self.url}/v1/images/generations", json=body), rng.random())
        except TimeoutError:
            self.counts["cancelled"] += 1

    async def _malformed(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        body = rng.choice((b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "size": "1x1"}', b'{"prompt": ""}'))
        headers = {"Content-Type": "application/json"}
        answer = await self.http.post(f"{self.url}/v1/images/generations", content=body, headers=headers)
        if answer.status_code != 400 or "error" not in answer.json():
            self.wrong.append(f"malformed: {answer.status_code} {answer.text[:100]}")

    async def _slow(self, client: openai.AsyncOpenAI, seed: int, rng: random.Random) -> None:
        """Read a stream with a pause after each of its pieces."""
        body = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed, "steps": self.expected.steps, "stream": True}
        last = ""
        url = f"{self.url}/v1/images/generations"
        for _ in range(100):
            async with self.http.stream("POST", url, json=body | {"partial_images": 4}) as answer:
                if answer.status_code == 429:
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                    continue
                async for line in answer.aiter_lines():
                    await asyncio.sleep(0.2)
                    last = line if line.startswith("data: ") else last
                break
        self.answers.append(("draw", seed, opened(json.loads(last.removeprefix("data: "))["b64_json"])))

    # ---- afterwards

    def compare(self) -> None:
        """Every answer with the library's."""
        for kind, seed, got in self.answers:
            expected = self.expected.of(kind, seed)
            if kind == "chat":
                ok = got == expected
            elif kind == "think":
                ok = got[0] == expected[0] and self._close(got[1], expected[1])
            else:
                ok = self._close(got, expected)
            if not ok:
                self.wrong.append(f"{kind} of seed {seed} is not the library's")

    def _close(self, a: Image.Image, b: Image.Image) -> bool:
        apart = levels_apart(a, b)
        self.most_levels = max(self.most_levels, apart)
        return apart <= ROUNDING


def measure_load(
    url: str, pid: int, model: Any, *, n_clients: int, seconds: float, steps: int, n_seeds: int
) -> dict[str, Any]:
    """The mix, with the worker's memory every few seconds."""
    test = LoadTest(url, Expected(model, steps), n_seeds=n_seeds)
    memory: list[tuple[float, int]] = []
    begin = time.perf_counter()

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - begin, resident_bytes(pid)))
            await asyncio.sleep(1)

    async def both() -> None:
        watching = asyncio.create_task(watch())
        await test.run(n_clients, seconds)
        watching.cancel()

    asyncio.run(both())
    elapsed = time.perf_counter() - begin
    test.compare()
    settled = [n_bytes for at, n_bytes in memory if at >= min(WARM_UP_S, seconds / 3)]
    third = max(1, len(settled) // 3)
    before, after = (statistics.median(some) / 2**20 for some in (settled[:third], settled[-third:]))
    health = httpx.get(f"{url}/health", timeout=30).json()
    return {
        "part": "load",
        "clients": n_clients,
        "seconds": round(elapsed, 1),
        "asked": dict(sorted(test.counts.items())),
        "answers_compared": len(test.answers),
        "most_levels_apart": test.most_levels,
        "wrong_or_lost": test.wrong[:20],
        "n_wrong_or_lost": len(test.wrong),
        "refused_429": len(test.waits),
        "refused_without_retry_after": sum(not one.isdigit() for one in test.waits),
        "median_s": round(statistics.median(test.seconds), 2),
        "p95_s": round(sorted(test.seconds)[int(0.95 * len(test.seconds))], 2),
        "memory_mib": [round(n_bytes / 2**20) for _, n_bytes in memory[:: max(1, len(memory) // 12)]],
        "settled_memory_mib": [round(before, 1), round(after, 1)],
        "memory_is_flat": after <= before * (1 + FLAT),
        "left_running": health["running"] + health["waiting"],
    }


def show(found: dict[str, Any], *, as_json: bool) -> None:
    """A part's report."""
    if as_json:
        print(json.dumps(found), flush=True)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):{width}}  {value}", flush=True)
    print(flush=True)


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("engine", "gain", "lone", "load", "all"))
    parser.add_argument("--clients", type=int)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3, help="of the gain")
    parser.add_argument("--requests", type=int, default=12, help="of the lone ones")
    parser.add_argument("--seeds", type=int, default=24, help="of the load's answers")
    parser.add_argument("--steps", type=int, default=6, help="of the images of the load")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", action="store_true", help="one line a part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = unimm.load(MODEL)
    wrong = 0
    if options.part in ("engine", "all"):
        n = options.clients or (4 if options.short else 16)
        show(measure_engine(model, n=n, rounds=1 if options.short else options.rounds), as_json=options.json)
    if options.part == "engine":
        return
    with server(*(("--max-waiting", str(MAX_WAITING)) if options.part in ("load", "all") else ())) as (url, pid):
        if options.part in ("lone", "all"):
            show(measure_lone(url, pid, model, n=2 if options.short else options.requests), as_json=options.json)
        if options.part in ("gain", "all"):
            n = options.clients or (4 if options.short else 16)
            rounds = 1 if options.short else options.rounds
            show(measure_gain(url, pid, n_clients=n, rounds=rounds), as_json=options.json)
        if options.part in ("load", "all"):
            seconds = 10 if options.short else 60 * options.minutes
            n = options.clients or (6 if options.short else 64)
            n_seeds = 4 if options.short else options.seeds
            found = measure_load(url, pid, model, n_clients=n, seconds=seconds, steps=options.steps, n_seeds=n_seeds)
            show(found, as_json=options.json)
            wrong = found["n_wrong_or_lost"] + found["left_running"] + found["refused_without_retry_after"]
            wrong += not found["memory_is_flat"] and seconds > 2 * WARM_UP_S
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
