"""A reader behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, OpenAI itself."""

import base64
import time
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from unimm.evaluation.judges.base import JudgeQuestion, JudgeReply, JudgeUnavailableError
from unimm.evaluation.judges.readers import Reader, file_word

if TYPE_CHECKING:
    from openai import OpenAI

# calls at a time; UniSandBox's and ImgEdit's own number
WORKERS = 32
# tries of a call that fails for now: a connection refused, a timeout, too many requests, an error of the server
CALLS = 5
FIRST_PAUSE = 1.0
TIMEOUT = 600.0


class NotAReplyError(ValueError):
    """What an endpoint sent instead of a chat completion."""


class OpenAIReader(Reader):
    """Asks an endpoint's chat completions, at temperature 0."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        workers: int = WORKERS,
        calls: int = CALLS,
        extra_body: dict[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """url: up to and with /v1. model: its name there; unless given, the endpoint's only one. calls: tries of one
        call; the pause before the next doubles. extra_body: options of the endpoint's own.

        Raises JudgeUnavailableError where the endpoint cannot be reached, or does not say which model.
        """
        self._client = connect(url)
        self._calls = calls
        self._sleep = sleep
        self._extra_body = extra_body
        self._url = url
        self.workers = workers
        self._model = model or self._only_model()
        self.name = f"openai-{file_word(self._model)}"

    def identity(self) -> dict[str, Any]:
        extra = {"extra_body": self._extra_body} if self._extra_body else {}
        return {"kind": "openai", "model": self._model, "url": self._url, "temperature": 0, **extra}

    def answer(self, question: JudgeQuestion) -> JudgeReply:
        """One reply; calls that fail for now are made again after a pause."""
        import openai

        error = ""
        for tried in range(1, self._calls + 1):
            try:
                return JudgeReply(reply=self._complete(question), tries=tried)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as refusal:
                raise JudgeUnavailableError(
                    f"{self._url} refuses {self._model}: {_said(refusal)}; check the key, the address and the name"
                ) from refusal
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as passing:
                error = _said(passing)
            except NotAReplyError as nonsense:
                error = str(nonsense)
            except openai.APIError as lasting:
                # this question is refused, as one about a picture that a filter rejects; others may not be
                return JudgeReply(reply=None, tries=tried, error=_said(lasting))
            if tried < self._calls:
                self._sleep(FIRST_PAUSE * 2 ** (tried - 1))
        return JudgeReply(reply=None, tries=self._calls, error=f"{error} ({self._calls} calls)")

    def _complete(self, question: JudgeQuestion) -> str:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in question.parts
        ]
        # a text alone as every endpoint takes it, those of models without images too
        plain = question.text if not question.images else content
        messages: list[Any] = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": plain})
        completion: Any = self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=question.max_tokens,
            temperature=0,
            extra_body=self._extra_body,
        )
        # the client passes on whatever came, a page of HTML too
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
            raise NotAReplyError(f"got {completion!r:.100} from {self._url}: expected a chat completion")
        return choices[0].message.content or ""

    def _only_model(self) -> str:
        import openai

        try:
            names = [one.id for one in self._client.models.list()]
        except openai.APIError as error:
            raise JudgeUnavailableError(
                f"cannot ask {self._url} which models it has: {_said(error)}; check the address, which ends in /v1, or "
                "name the model: --judge-model NAME"
            ) from error
        if len(names) != 1:
            raise JudgeUnavailableError(
                f"{self._url} has {len(names)} models ({', '.join(names[:5])}): name the judge's, --judge-model NAME"
            )
        return names[0]


def connect(url: str) -> "OpenAI":
    """A client that does not try again by itself; the key is OPENAI_API_KEY, where that is set."""
    try:
        from openai import OpenAI, OpenAIError
    except ImportError as error:
        raise ValueError("a judge behind an endpoint needs the client of OpenAI: pip install 'unimm[eval]'") from error
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"got --judge openai:{url}: expected an address, as in openai:http://localhost:8000/v1")
    try:
        return OpenAI(base_url=url, max_retries=0, timeout=TIMEOUT)
    except OpenAIError:
        # no key is set: servers of one's own ask for none
        return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT)


def data_url(image: Image.Image) -> str:
    """An image in an address, as PNG."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
