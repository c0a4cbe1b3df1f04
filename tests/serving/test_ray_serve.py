"""examples/serve_ray on a local cluster: two replicas, one of them killed under load."""

import base64
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import yaml
from helpers.paths import ROOT
from helpers.serving import ROUNDING, levels_apart
from PIL import Image

openai = pytest.importorskip("openai", reason="needs the extra test")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")

EXAMPLE = ROOT / "examples" / "serve_ray"
PROMPT = "a red circle left of a blue square"
STEPS = 16
N_CLIENTS = 8
START_S = 240
# what `serve run` does, without Ray's dashboard, which takes longer to start than all the rest
RUN = """
import sys

import ray
from ray import serve
from serve_app import build
from serve_options import Options

ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(build(Options(access="loopback", replicas=2)), blocking=True)
"""


def descendants(pid: int) -> list[int]:
    """The processes that a process began, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def replicas_of(pid: int) -> set[int]:
    """The replicas among a process's descendants; Ray names its processes."""
    named = {one: Path(f"/proc/{one}/cmdline") for one in descendants(pid)}
    return {one for one, path in named.items() if path.exists() and b"ray::ServeReplica" in path.read_bytes()}


def processor_ticks(pid: int) -> int:
    """What a process has had of the processor's time."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))


def busiest(pids: set[int]) -> int:
    """The process that works most in the next half second."""
    began = {pid: processor_ticks(pid) for pid in pids}
    time.sleep(0.5)
    return max(pids, key=lambda pid: processor_ticks(pid) - began[pid])


def eventually(condition, seconds=START_S):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def ray_serve(folder):
    """The base address and the process of two replicas, on a cluster of their own."""
    port = free_port()
    command = [sys.executable, "-c", RUN, str(port)]
    paths = os.pathsep.join([str(EXAMPLE), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # 15 otherwise: other work on the machine would starve its workers
    environment["RAY_worker_niceness"] = "0"
    environment.pop("RAY_ADDRESS", None)
    environment["RAY_AUTH_TOKEN"] = uuid.uuid4().hex  # Ray would write one into the home directory
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        started = descendants(process.pid) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            for one in started:
                if Path(f"/proc/{one}").exists():
                    os.kill(one, signal.SIGKILL)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    with ray_serve(folder) as (url, process):
        log = folder / "log"

        def failed() -> bool:
            said = log.read_text()
            return process.poll() is not None or "DEPLOY_FAILED" in said or "Traceback" in said

        eventually(lambda: failed() or (is_up(url) and len(replicas_of(process.pid)) == 2))
        assert not failed(), log.read_text()[-4000:]
        yield url, process.pid


@pytest.fixture
def options_of(monkeypatch):
    """The options of the example, which need no Ray."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delenv("UNIMM_API_KEYS", raising=False)
    return importlib.import_module("serve_options").Options


def test_options_are_a_server_plan(options_of, monkeypatch):
    asked = {"models": "bagel-nano, janus-nano", "cpus": "2", "memory_mb": "100", "access": "loopback"}
    plan = options_of(**asked).plan()
    assert plan.models == ("bagel-nano", "janus-nano") and plan.threads == 2
    assert plan.limits.memory_bytes == 100 * 2**20 and plan.rules.hosts and not plan.rules.api_keys
    assert options_of(access="anyone").plan().rules.hosts == ()
    with pytest.raises(ValueError, match="got no API keys: set UNIMM_API_KEYS"):
        options_of().plan()
    monkeypatch.setenv("UNIMM_API_KEYS", "one-key-of-the-cluster,another-key-of-the-cluster")
    assert options_of().plan().rules.is_key("another-key-of-the-cluster")
    with pytest.raises(ValueError, match="replica"):
        options_of(replica=2)
    configured = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())["applications"][0]["args"]
    assert options_of(**configured).plan().models == ("bagel-nano",)


def test_replicas_are_fixed_or_autoscaled(options_of):
    assert options_of(replicas=2).n_replicas() == {"num_replicas": 2}
    configured = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())["applications"][0]["args"]
    assert options_of(**configured).n_replicas() == {
        "autoscaling_config": {
            "min_replicas": 2,
            "max_replicas": 8,
            "target_ongoing_requests": 8,
            "upscale_delay_s": 30,
            "downscale_delay_s": 600,
        }
    }
    with pytest.raises(ValueError, match="got max_replicas 1: expected at least replicas 2"):
        options_of(replicas=2, max_replicas=1).n_replicas()


# a minute and more: two processes load torch and a model, and a third takes the place of the one that is killed
@needs_ray
@pytest.mark.nightly
def test_a_replica_killed_under_load_loses_no_request(cluster, nano):
    url, pid = cluster
    before = replicas_of(pid)
    statuses = []
    hooks = {"response": [lambda response: statuses.append(response.status_code)]}
    with (
        httpx.Client(event_hooks=hooks, timeout=300) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client,
        ThreadPoolExecutor(N_CLIENTS) as pool,
    ):

        def draw(seed: int) -> Image.Image:
            more = {"seed": seed, "steps": STEPS}
            answer = client.images.generate(model="bagel-nano", prompt=PROMPT, extra_body=more)
            return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))

        asked = [pool.submit(draw, seed) for seed in range(3 * N_CLIENTS)]
        eventually(lambda: any(one.done() for one in asked))
        os.kill(busiest(before), signal.SIGKILL)
        images = [one.result() for one in asked]
    for seed, image in enumerate(images):
        assert levels_apart(image, nano.generate(PROMPT, seed=seed, steps=STEPS).image) <= ROUNDING
    # Ray answers what ran on the killed replica by 500; the client asks again
    assert statuses.count(200) == len(asked) and 500 in statuses, statuses
    eventually(lambda: len(replicas_of(pid) - before) == 1)


@needs_ray
@pytest.mark.nightly
def test_streams_errors_and_clients_that_go_pass_through_ray(cluster, nano):
    url, _ = cluster
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        events = list(
            client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 3, "steps": 4})
        )
        assert [one.type.split(".")[1] for one in events] == ["partial_image"] * 2 + ["completed"]
        image = Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json)))
        assert levels_apart(image, nano.generate(PROMPT, seed=3, steps=4).image) <= ROUNDING
        with pytest.raises(openai.BadRequestError, match="expected at most 250"):
            client.images.generate(prompt=PROMPT, extra_body={"steps": 251})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json={"prompt": PROMPT, "steps": 250}, timeout=1)
    # each of two replicas answers some of these
    eventually(lambda: all(httpx.get(f"{url}/health", timeout=60).json()["running"] == 0 for _ in range(8)), 5)
