"""Readers as judges: dialogues, replies kept, failures that are no wrong answers, an endpoint over HTTP."""

import threading

import pytest
from helpers.chat_server import chat_server, pictures, texts
from PIL import Image

import unimm
from unimm.evaluation.items import EvalItem
from unimm.evaluation.judges.base import Dialogue, JudgeQuestion, JudgeReply, JudgeTask, JudgeUnavailableError
from unimm.evaluation.judges.openai_endpoint import OpenAIReader, connect
from unimm.evaluation.judges.readers import ModelReader, Reader, ReaderJudge, file_word, parse_judge
from unimm.evaluation.setup import load_reader

IMAGE = Image.new("RGB", (3, 2), "red")
RED = (255, 0, 0)


def tasks(n: int) -> list[JudgeTask]:
    return [JudgeTask(item=EvalItem(id=f"{i}", group="a", prompt="", seed=0, answer=f"answer {i}")) for i in range(n)]


def two_questions(task: JudgeTask) -> Dialogue:
    """What is there, then whether it is right: the replies are "thing" and "yes" or "no"."""
    seen = yield JudgeQuestion(parts=(IMAGE, f"what is in {task.item.id}?"), max_tokens=7)
    verdict = yield JudgeQuestion(
        parts=(f"is {seen} the {task.item.answer}?",), max_tokens=5, understood=lambda reply: reply in ("yes", "no")
    )
    return float(verdict == "yes"), verdict


class Scripted(Reader):
    """Replies in turn, or by a function of the question."""

    name = "scripted"

    def __init__(self, replies, workers=1):
        self.replies, self.workers, self.asked = replies, workers, []

    def identity(self):
        return {"kind": "scripted"}

    def answer(self, question):
        self.asked.append(question.text)
        said = self.replies(question.text) if callable(self.replies) else self.replies.pop(0)
        return said if isinstance(said, JudgeReply) else JudgeReply(reply=said)


def judged(reader, n=1, dialogue=two_questions):
    judge = ReaderJudge(reader, dialogue, protocol={"sha256": "0"})
    return {task.item.id: verdict for task, verdict in judge.judge(tasks(n))}


def test_a_dialogue():
    reader = Scripted(["a cup", "yes"])
    verdict = judged(reader)["0"]
    assert reader.asked == ["what is in 0?", "is a cup the answer 0?"]
    assert (verdict.score, verdict.reason) == (1.0, "yes")
    assert [one.reply for one in verdict.replies] == ["a cup", "yes"]


def test_a_reply_that_was_not_asked_for_is_asked_for_again():
    verdict = judged(Scripted(["a cup", "perhaps", "", "no"]))["0"]
    assert verdict.score == 0.0 and [one.reply for one in verdict.replies] == ["a cup", "perhaps", "", "no"]


def test_nonsense_is_a_failure_and_no_wrong_answer():
    verdict = judged(Scripted(["a cup", "perhaps", "perhaps", "I am a teapot"]))["0"]
    assert verdict.score is None and "not understood: 'I am a teapot'" in verdict.reason
    assert len(verdict.replies) == 4


def test_a_question_that_fails_is_a_failure():
    verdict = judged(Scripted([JudgeReply(reply=None, tries=3, error="timeout")]))["0"]
    assert verdict.score is None and verdict.reason == "timeout" and verdict.replies[0].tries == 3


def test_a_judge_that_is_down_stops_the_run_after_some_items():
    reader = Scripted(lambda text: JudgeReply(reply=None, error="connection refused"))
    judge = ReaderJudge(reader, two_questions, protocol={})
    seen = []
    with pytest.raises(JudgeUnavailableError, match="failed on 8 items one after another.*connection refused"):
        seen += [verdict for _, verdict in judge.judge(tasks(100))]
    assert len(reader.asked) == 8


def test_dialogues_side_by_side():
    barrier = threading.Barrier(4, timeout=20)

    def reply(text):
        if text.startswith("what"):
            barrier.wait()  # no reply until four are asked at once
            return "a cup"
        return "yes" if text.endswith(("0?", "2?")) else "no"

    verdicts = judged(Scripted(reply, workers=4), 8)
    assert {name: verdict.score for name, verdict in verdicts.items()} == {str(i): float(i in (0, 2)) for i in range(8)}


def test_the_prompts_are_part_of_a_judges_key():
    keys = {ReaderJudge(Scripted([]), two_questions, protocol={"sha256": name}).key() for name in "ab"}
    assert len(keys) == 2 and all(key.startswith("scripted-") for key in keys)


# ---- a model in process


class Answers:
    """A model with the one verb that a reader needs."""

    def understand(self, images, question, *, text_sampling):
        assert text_sampling.temperature == 0
        if "forever" in question:
            raise ValueError("got 900 tokens:\nexpected at most 512")
        return f"{len(images or [])} images, {question}"


def test_a_model_of_ours_as_a_reader():
    reader = ModelReader(Answers(), "owner/name", weights={"sha256": "1"})
    assert reader.name == "vlm-owner-name" and reader.identity()["weights"] == {"sha256": "1"}
    asked = JudgeQuestion(parts=("before", IMAGE, IMAGE, "what?"), max_tokens=3, system="be strict")
    assert reader.answer(asked).reply == "2 images, be strict\n\nbefore\nwhat?"
    assert reader.answer(JudgeQuestion(parts=("what?",), max_tokens=3)).reply == "0 images, what?"
    failed = reader.answer(JudgeQuestion(parts=("forever",), max_tokens=3))
    assert failed.reply is None and failed.error == "got 900 tokens: expected at most 512"


def test_a_vision_language_model_as_a_reader(tmp_path):
    """One that is no unified model, by its folder."""
    unimm.load("metaquery-nano").mllm.save_pretrained(tmp_path)
    reader = load_reader(str(tmp_path), device="cpu", dtype="float32")
    assert reader.identity()["family"] == "QwenVL" and len(reader.identity()["weights"]["sha256"]) == 64
    image = Image.new("RGB", (64, 64), (235, 235, 235))
    assert reader.answer(JudgeQuestion(parts=(image, "what is in the picture?"), max_tokens=9)).reply


# ---- an endpoint


def endpoint(server, **options) -> OpenAIReader:
    return OpenAIReader(server.url, sleep=lambda seconds: None, **options)


def test_an_endpoint():
    with chat_server(lambda body: "yes" if "0" in texts(body) else "no") as server:
        reader = endpoint(server, extra_body={"top_k": 1})
        assert reader.name == "openai-judge" and reader.identity()["url"] == server.url
        verdicts = judged(reader, 2)
    assert [verdicts[name].score for name in "01"] == [1.0, 0.0]
    first = next(body for body in server.asked if "what is in 0" in texts(body))
    assert first["temperature"] == 0 and first["max_tokens"] == 7 and first["model"] == "judge" and first["top_k"] == 1
    assert [one["type"] for one in first["messages"][0]["content"]] == ["image_url", "text"]
    (picture,) = pictures(first)
    assert picture.size == (3, 2) and picture.getpixel((0, 0)) == RED
    second = next(body for body in server.asked if "is yes the" in texts(body))
    assert isinstance(second["messages"][0]["content"], str)


def test_a_system_prompt():
    with chat_server(lambda body: body["messages"][0]["content"]) as server:
        reply = endpoint(server).answer(JudgeQuestion(parts=("hello",), max_tokens=1, system="be strict"))
    assert reply.reply == "be strict" and server.asked[0]["messages"][0]["role"] == "system"


@pytest.mark.parametrize("trouble", [500, 503, 429, b"<html>busy</html>", b""])
def test_trouble_that_passes(trouble):
    left = [trouble, trouble]
    pauses = []
    with chat_server(lambda body: left.pop() if left else "yes") as server:
        reader = OpenAIReader(server.url, sleep=pauses.append)
        reply = reader.answer(JudgeQuestion(parts=("what?",), max_tokens=1))
    assert reply.reply == "yes" and reply.tries == 3 and pauses == [1.0, 2.0]


def test_trouble_that_lasts():
    with chat_server(lambda body: 503) as server:
        reply = endpoint(server, calls=3).answer(JudgeQuestion(parts=("what?",), max_tokens=1))
    assert reply.reply is None and reply.tries == 3 and "status 503" in reply.error


def test_a_question_that_is_refused_is_not_asked_again():
    """As a filter does; the other items are judged."""
    with chat_server(lambda body: 400 if "in 1" in texts(body) else "yes") as server:
        verdicts = judged(endpoint(server), 3)
    assert [verdicts[name].score for name in "012"] == [1.0, None, 1.0]
    assert "status 400" in verdicts["1"].reason and sum("in 1" in texts(body) for body in server.asked) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses(status):
    with (
        chat_server(lambda body: status) as server,
        pytest.raises(JudgeUnavailableError, match=f"refuses judge: .*status {status}"),
    ):
        judged(endpoint(server), 3)


def test_an_endpoint_that_is_not_there():
    with chat_server(lambda body: "yes") as server:
        pass
    with pytest.raises(JudgeUnavailableError, match="cannot ask .* which models it has"):
        endpoint(server)
    reply = endpoint(server, model="judge", calls=2).answer(JudgeQuestion(parts=("what?",), max_tokens=1))
    assert reply.reply is None and "2 calls" in reply.error


def test_an_endpoint_of_several_models():
    with chat_server(lambda body: body["model"], models=("a", "b")) as server:
        with pytest.raises(JudgeUnavailableError, match=r"2 models \(a, b\): name the judge's, --judge-model NAME"):
            endpoint(server)
        assert endpoint(server, model="b").answer(JudgeQuestion(parts=("what?",), max_tokens=1)).reply == "b"


def test_calls_are_made_side_by_side():
    barrier = threading.Barrier(3, timeout=20)

    def reply(body):
        if texts(body).startswith("what"):
            barrier.wait()
        return "yes"

    with chat_server(reply) as server:
        assert len(judged(endpoint(server, workers=3), 6)) == 6
    assert server.most == 3


def test_an_address_that_is_none():
    with pytest.raises(ValueError, match="expected an address, as in openai:http://localhost:8000/v1"):
        connect("localhost:8000")


# ---- how a judge is named


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ("exact", "exact", ""),
        ("vlm:bagel-nano", "vlm", "bagel-nano"),
        ("openai:http://localhost:8000/v1", "openai", "http://localhost:8000/v1"),
        ("detector", "detector", ""),
        ("detector:a/b,c/d", "detector", "a/b,c/d"),
    ],
)
def test_a_judge_by_name(text, kind, where):
    assert (parse_judge(text).kind, parse_judge(text).where) == (kind, where)


@pytest.mark.parametrize("text", ["", "vlm", "vlm:", "openai", "exact:3", "gpt-4"])
def test_a_wrong_name_of_a_judge(text):
    with pytest.raises(ValueError, match="expected exact, vlm:MODEL, openai:URL, or detector"):
        parse_judge(text)


def test_a_word_for_a_file():
    assert file_word("Qwen/Qwen2.5-VL-7B") == "Qwen-Qwen2.5-VL-7B" and file_word("../a b") == "a-b"
