"""The HTTP application by the real client of OpenAI: answers equal to the library's, streams, errors."""

import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
from helpers.serving import ROUNDING, levels_apart
from PIL import Image

from unimm import TextSampling

SCENE = "a red circle left of a blue square"


def opened(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def at_uri(part: dict) -> Image.Image:
    return opened(part["image_url"]["url"].split(",", 1)[1])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def distance(a: Image.Image, b: Image.Image) -> float:
    """The mean difference of two images in levels."""
    return float(np.abs(np.asarray(a).astype(float) - np.asarray(b)).mean())


@pytest.fixture(scope="module")
def scene(nano):
    return nano.generate(SCENE, seed=3, steps=4).image


# ---- images


def test_images_are_the_librarys(client, nano, scene):
    answer = client.images.generate(model="bagel-nano", prompt=SCENE, n=2, extra_body={"seed": 3, "steps": 4})
    expected = nano.generate(SCENE, seed=3, steps=4, n=2).images
    assert len(answer.data) == 2 and answer.size == "64x64" and answer.output_format == "png"
    got = [opened(one.b64_json) for one in answer.data]
    assert all(levels_apart(a, b) <= ROUNDING for a, b in zip(got, expected, strict=True))
    assert answer.usage.input_tokens > 0 and answer.created > 0


def test_size_is_width_by_height_and_formats_are_files(client, nano):
    answer = client.images.generate(
        model="bagel-nano", prompt=SCENE, size="48x32", output_format="jpeg", extra_body={"seed": 1, "steps": 2}
    )
    image = opened(answer.data[0].b64_json)
    assert image.format == "JPEG" and image.size == (48, 32)
    expected = nano.generate(SCENE, seed=1, steps=2, size=(32, 48)).image
    assert levels_apart(image, expected) < 60  # JPEG loses colour's detail


def test_edits_take_several_images(client, nano, scene):
    options = {"seed": "5", "steps": "3"}
    answer = client.images.edit(
        model="bagel-nano", image=png(scene), prompt="make the circle green", extra_body=options
    )
    expected = nano.generate("make the circle green", images=scene, seed=5, steps=3).image
    assert levels_apart(opened(answer.data[0].b64_json), expected) <= ROUNDING
    both = [("a.png", png(scene)), ("b.png", png(expected))]
    answer = client.images.edit(model="bagel-nano", image=both, prompt="join them", extra_body=options)
    expected = nano.generate("join them", images=[scene, expected], seed=5, steps=3).image
    assert levels_apart(opened(answer.data[0].b64_json), expected) <= ROUNDING


def test_partial_images_stream(client, nano, scene):
    more = {"seed": 3, "steps": 4}
    events = list(
        client.images.generate(model="bagel-nano", prompt=SCENE, stream=True, partial_images=2, extra_body=more)
    )
    assert [one.type for one in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    assert levels_apart(opened(events[-1].b64_json), scene) <= ROUNDING
    assert distance(opened(events[1].b64_json), scene) < distance(opened(events[0].b64_json), scene)
    edited = list(
        client.images.edit(
            model="bagel-nano", image=png(scene), prompt="a", stream=True, partial_images=1, extra_body={"steps": "2"}
        )
    )
    assert [one.type for one in edited] == ["image_edit.partial_image", "image_edit.completed"]


def test_thinking_revises_the_prompt(client, nano):
    more = {"seed": 1, "steps": 3, "think": True}
    answer = client.images.generate(model="bagel-nano", prompt="three minus two squares", extra_body=more)
    expected = nano.generate("three minus two squares", think=True, seed=1, steps=3)
    assert answer.data[0].revised_prompt == expected.text
    assert levels_apart(opened(answer.data[0].b64_json), expected.image) <= ROUNDING


# ---- chat


def test_chat_answers_about_images(client, nano, scene):
    content = [
        {"type": "image_url", "image_url": {"url": uri(scene)}},
        {"type": "text", "text": "how many shapes are there?"},
    ]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="bagel-nano", messages=messages)
    expected = nano.understand(scene, "how many shapes are there?")
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.completion_tokens >= 1 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    turns = [*messages, {"role": "assistant", "content": expected}, {"role": "user", "content": "and what is red?"}]
    again = client.chat.completions.create(model="bagel-nano", messages=turns)
    inputs = [scene, "how many shapes are there?", expected, "and what is red?"]
    assert again.choices[0].message.content == next(iter(nano.interleave(inputs, outputs=("text",))))


def test_chat_streams_what_it_answers_whole(client, nano):
    ask = dict(
        model="bagel-nano", messages=[{"role": "user", "content": "a red circle and"}], temperature=1.0, top_p=0.9,
        seed=4, max_tokens=6, n=2,
    )  # fmt: skip
    whole = client.chat.completions.create(**ask)
    texts = [nano.understand(None, "a red circle and", text_sampling=TextSampling(
        temperature=1.0, top_p=0.9, max_tokens=6), seed=seed) for seed in (4, 5)]  # fmt: skip
    assert [one.message.content for one in whole.choices] == texts
    streamed = ["", ""]
    ends = {}
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
        last = chunk
    assert streamed == texts and last.usage.completion_tokens == whole.usage.completion_tokens
    assert ends == {one.index: one.finish_reason for one in whole.choices}


def test_stop_and_limit(client, nano):
    ask = dict(model="bagel-nano", messages=[{"role": "user", "content": "a red circle and"}], temperature=1.0, seed=4)
    whole = client.chat.completions.create(**ask, max_tokens=8).choices[0].message.content
    short = client.chat.completions.create(**ask, max_tokens=1).choices[0]
    assert short.finish_reason == "length" and whole.startswith(short.message.content)
    cut = client.chat.completions.create(**ask, max_tokens=8, stop=[whole[2:4]]).choices[0]
    assert cut.message.content == whole[: whole.index(whole[2:4])] and cut.finish_reason == "stop"


def test_texts_and_images_interleave(client, nano, scene):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    more = {"modalities": ["text", "image"], "steps": 3, "seed": 4}
    answer = client.chat.completions.create(model="bagel-nano", messages=messages, extra_body=more)
    text, image = nano.interleave(["a red circle"], outputs=("text", "image"), steps=3, seed=4)
    parts = answer.choices[0].message.content
    assert [part["type"] for part in parts] == ["text", "image_url"] and parts[0]["text"] == text
    assert levels_apart(at_uri(parts[1]), image) <= ROUNDING
    kinds = []
    for chunk in client.chat.completions.create(
        model="bagel-nano", messages=messages, stream=True, extra_body=more | {"partial_images": 1}
    ):
        for choice in chunk.choices:
            kinds += [part for part in choice.delta.content or [] if not isinstance(part, str)]
    assert "".join(part.get("text", "") for part in kinds) == text
    pictures = [part for part in kinds if part["type"] == "image_url"]
    assert [part.get("partial_image_index") for part in pictures] == [0, None]
    assert levels_apart(at_uri(pictures[1]), image) <= ROUNDING


def test_reasoning_before_an_image(client, nano):
    more = {"modalities": ["image"], "steps": 3, "seed": 1, "think": True}
    messages = [{"role": "user", "content": "three minus two squares"}]
    answer = client.chat.completions.create(model="bagel-nano", messages=messages, extra_body=more)
    expected = nano.generate("three minus two squares", think=True, seed=1, steps=3)
    message = answer.choices[0].message
    assert message.reasoning_content == expected.text
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert levels_apart(at_uri(message.content[0]), expected.image) <= ROUNDING


# ---- about the server


def test_models_health_metrics(client, address):
    assert [one.id for one in client.models.list()] == ["bagel-nano"]
    assert client.models.retrieve("bagel-nano").owned_by == "unimm"
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    client.images.generate(model="bagel-nano", prompt="a", extra_body={"steps": 1})
    text = httpx.get(f"{address}/metrics").text
    for name in ("unimm_queue 0.0", "unimm_running 0.0", "unimm_images_total", "unimm_tokens_total"):
        assert name in text
    assert 'unimm_stage_seconds_count{stage="denoise_step"}' in text


def test_errors_have_openais_shape_and_the_librarys_words(client):
    message = [{"role": "user", "content": "a"}]
    for options, words in (
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "a", "size": "63x64"}, "nearest is"),
        ({"prompt": "a", "size": "big"}, "WIDTHxHEIGHT"),
        ({"prompt": "a", "n": 99}, "expected 1 to 10"),
        ({"prompt": "a", "response_format": "url"}, "keeps no images"),
        ({"prompt": "a", "extra_body": {"steps": 0}}, "steps 0"),
        ({"prompt": "a", "extra_body": {"negative_prompt": "b"}}, "no negative_prompt"),
        ({"prompt": "a", "extra_body": {"colour": "b"}}, "unknown field colour"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            client.images.generate(model="bagel-nano", **options)
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="expected one of bagel-nano"):
        client.chat.completions.create(model="gpt", messages=message)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="does not support"):
        client.chat.completions.create(model="bagel-nano", messages=message, tools=tools)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="bagel-nano", messages=message, temperature=-1)
    for url, words in (
        ("file:///etc/passwd", "expected a data URI"),
        ("/etc/passwd", "expected a data URI"),
        ("https://example.com/a.png", "fetches no remote images"),
        ("data:image/png;base64,AAAA", "cannot read image 1"),
        ("data:image/png;base64,A", "base64 is broken"),
    ):
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="bagel-nano", messages=[{"role": "user", "content": content}])


def test_malformed_bodies_are_answered(address):
    url = f"{address}/v1/chat/completions"
    half = b'{"messages": [], "\\ud800": 1}'
    for body, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"{}", 400), (half, 400)):
        answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(url, content=b"{}").status_code == 415
    assert httpx.get(url).status_code == 405 and httpx.get(f"{address}/v1/nothing").status_code == 404
    assert httpx.post(f"{address}/v1/images/edits", data={"prompt": "a"}, files={"x": b"a"}).status_code == 400
    assert json.loads(httpx.get(f"{address}/health").text)["status"] == "ok"
