"""The client of chat-completions servers against a real HTTP server that misbehaves."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.endpoint import AskSettings, EndpointTeacher, estimate_tokens, token_probabilities
from preceptor.grounding.labeling import teach
from preceptor.grounding.pseudo_labels import ContentHashes, Prompt, PseudoLabels, prompts_of_turn
from preceptor.teachers.chat_client import ChatClient, ClientSettings, check_address
from preceptor.teachers.label_store import Label, read_labels
from tests.grounding.answering_server import Asked, question_of, reply, serving
from tests.grounding.asked_data import data, image

QUICK = {"timeout": 5.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The client's own waits before a retry, which begin at half a second."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def teacher(asked: Asked, ask: AskSettings | None = None, concurrent: int = 3, **client: Any) -> EndpointTeacher:
    settings = ClientSettings(asked.url, **{**QUICK, **client})
    return EndpointTeacher("m", settings, ask or AskSettings(), concurrent=concurrent)


def prompts(folder, images=4, questions=3) -> list[Prompt]:
    return list(prompts_of_turn(data(folder, images, questions).samples, 0, ContentHashes(), {}))


def answered(who: EndpointTeacher, asked: list[Prompt]) -> tuple[dict[str, Label], dict[str, str]]:
    labels: list[Label] = []
    reasons = dict(who.answer(asked, set(), labels.extend))
    assert len({label.key for label in labels}) == len(labels)
    return {label.key: label for label in labels}, reasons


def first_try_only(what):
    """A fault of the first request of each question."""
    seen: Counter[str] = Counter()

    def fault(number: int, body: dict[str, Any]):
        key = json.dumps(body["messages"])
        seen[key] += 1
        return what if seen[key] == 1 else None

    return fault


def test_what_is_sent_and_what_comes_back(tmp_path):
    file = image(tmp_path, 0)
    turns = (("Where?", "here"), ("Why?", ""))
    dialogue = Dialogue("d", (file, file), turns, "mia", "ct", "g", "train")
    with serving() as asked:
        who = teacher(asked, AskSettings(system_prompt="Be brief.", max_tokens=7))
        labels, reasons = answered(who, [Prompt("ab" * 32, 1, dialogue)])
    assert reasons == {}
    (body,) = asked.bodies
    system, one, two, three = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in one["content"]] == ["image_url", "image_url", "text"]
    assert (two, three) == ({"role": "assistant", "content": "here"}, {"role": "user", "content": "Why?"})
    kind, _, encoded = one["content"][0]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert np.array_equal(np.asarray(sent), np.asarray(Image.open(file)))
    assert {name: body[name] for name in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs", "n")} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 7,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
    }
    assert body["skip_special_tokens"] is False
    (label,) = labels.values()
    expected = reply(body)["choices"][0]
    assert label.answer == expected["message"]["content"].removesuffix("<|im_end|>")
    first = math.exp(expected["logprobs"]["content"][0]["logprob"])
    assert (label.confidence, label.margin) == (pytest.approx(first, abs=1e-6), pytest.approx(first - 0.25, abs=1e-6))
    assert label.source == "top_logprobs"
    assert label.logprobs == pytest.approx([math.log(first)] * 3, abs=1e-6)
    assert (label.turn, label.tokens, label.ended) == (1, 3, True)
    assert who.used == 13


def test_pixels_are_sent_and_nothing_else_of_a_file(tmp_path):
    """EXIF, text chunks and names stay here; large images are shrunk."""
    picture = Image.new("RGB", (300, 200), (9, 8, 7))
    exif = Image.Exif()
    exif[0x010E] = "SMITH^JOHN"
    picture.save(tmp_path / "smith.jpg", exif=exif, comment=b"SMITH^JOHN")
    dialogue = Dialogue("smith-1", (tmp_path / "smith.jpg",), (("?", ""),), "mia", "ct", "smith", "train")
    with serving() as asked:
        answered(teacher(asked, AskSettings(max_pixels=28 * 28)), [Prompt("ab" * 32, 0, dialogue)])
    url = asked.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = base64.b64decode(url.partition(",")[2])
    width, height = Image.open(io.BytesIO(sent)).size
    assert width * height <= 28 * 28
    assert width / height == pytest.approx(1.5, rel=0.05)
    assert b"SMITH" not in sent
    assert "smith" not in json.dumps(asked.bodies).lower()
    assert "smith" not in json.dumps(asked.headers).lower()


@pytest.mark.parametrize(
    "fault",
    ["drop", "half", "broken", "empty", (500, {}, "oops"), (503, {}, ""), (429, {}, "slow down"), (502, {}, "<html>")],
    ids=str,
)
def test_failures_that_pass_are_tried_again(tmp_path, fault):
    asked_for = prompts(tmp_path, 2, 3)
    with serving() as calm:
        undisturbed, _ = answered(teacher(calm), asked_for)
    with serving(first_try_only(fault)) as asked:
        labels, reasons = answered(teacher(asked), asked_for)
    assert reasons == {}
    assert labels == undisturbed
    assert len(asked.bodies) == 12


def test_a_server_that_hangs_is_given_up_on(tmp_path):
    asked_for = prompts(tmp_path, 1, 2)
    with serving(first_try_only("hang")) as asked:
        labels, reasons = answered(teacher(asked, timeout=0.3), asked_for)
    assert reasons == {}
    assert len(labels) == 2
    assert len(asked.bodies) == 4


def test_retry_after_is_honoured_by_all(tmp_path):
    """As seconds: nobody asks before; and as a date."""
    asked_for = prompts(tmp_path, 1, 4)
    with serving(lambda number, body: (429, {"Retry-After": "1"}, "") if number == 0 else None) as asked:
        labels, _ = answered(teacher(asked, concurrent=1), asked_for)
    assert len(labels) == 4
    assert min(asked.times[1:]) - asked.times[0] >= 1.0

    def in_two_seconds(number: int, body: dict[str, Any]):
        return (503, {"Retry-After": formatdate(time.time() + 2, usegmt=True)}, "") if number == 0 else None

    with serving(in_two_seconds) as asked:
        answered(teacher(asked, concurrent=1), asked_for[:1])
    assert asked.times[1] - asked.times[0] >= 0.95  # dates have whole seconds


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ((500, {}, ""), "it answers with 500"),
        ("broken", "its answer is not a chat completion"),
        ("empty", "its answer is not a chat completion"),
        ("half", "the connection failed (RemoteProtocolError)"),
        ("drop", "the connection failed (RemoteProtocolError)"),
        ("hang", "it was silent for 0.3 s (ReadTimeout)"),
    ],
    ids=str,
)
def test_retries_end_with_the_reason(tmp_path, fault, reason):
    with serving(lambda number, body: fault) as asked:
        _, reasons = answered(teacher(asked, retries=2, timeout=0.3), prompts(tmp_path, 1, 1))
    assert list(reasons.values()) == [f"{reason}, in 3 tries"]
    assert len(asked.bodies) == 3


def test_a_retry_after_without_end_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("preceptor.teachers.chat_client.LONGEST_WAIT", 0.2)
    with serving(lambda number, body: (429, {"Retry-After": "86400"}, "") if number == 0 else None) as asked:
        labels, _ = answered(teacher(asked, concurrent=1), prompts(tmp_path, 1, 1))
    assert len(labels) == 1
    assert asked.times[1] - asked.times[0] >= 0.19


def test_nothing_of_the_environment_is_sent(tmp_path, monkeypatch):
    """Not the keys and names that other programs use with OpenAI, and not the operating system."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with serving() as asked:
        answered(teacher(asked), prompts(tmp_path, 1, 2))
    for headers in asked.headers:
        assert "secret" not in json.dumps(headers)
        assert not [name for name in headers if name.startswith(("authorization", "x-stainless", "openai"))]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refuses the API key; set the right one in PRECEPTOR_API_KEY"),
        (403, "access is forbidden"),
        (404, "does not know the model 'm'"),
    ],
)
def test_what_cannot_succeed_stops_all(tmp_path, status, said):
    asked_for = prompts(tmp_path, 4, 4)
    kept: list[Label] = []
    with (
        serving(lambda number, body: (status, {}, '{"error": "sk-secret"}') if number >= 4 else None) as asked,
        pytest.raises(UserError, match=said) as error,
    ):
        teacher(asked, concurrent=2).answer(asked_for, set(), kept.extend)
    assert 3 <= len(kept) <= 4
    assert len(asked.bodies) <= 6
    assert "sk-secret" not in str(error.value)


def test_too_many_failures_in_a_row_stop_all_and_others_do_not(tmp_path):
    asked_for = prompts(tmp_path, 5, 4)
    kept: list[Label] = []
    with (
        serving(lambda number, body: (500, {}, "") if number >= 6 else None) as asked,
        pytest.raises(
            UserError, match=r"3 requests in a row have failed, the last one because it answers with 500, in 2"
        ),
    ):
        teacher(asked, concurrent=1, retries=1, max_failures=3).answer(asked_for, set(), kept.extend)
    assert len(kept) == 6
    assert len(asked.bodies) == 6 + 3 * 2
    # Every other one fails: none of these are in a row.
    bad = {question_of_prompt(prompt) for prompt in asked_for[::2]}
    assert bad
    keys = {prompt.key for prompt in asked_for[::2]}
    images = {json.dumps(m) for m in messages(asked_for[::2], asked.url)}
    long = (400, {}, "too long")
    with serving(lambda number, body: long if json.dumps(body["messages"]) in images else None) as asked:
        labels, reasons = answered(teacher(asked, concurrent=1, max_failures=2), asked_for)
    assert set(reasons) == keys
    assert set(labels) == {prompt.key for prompt in asked_for[1::2]}
    assert set(reasons.values()) == {"it answers with 400"}


def question_of_prompt(prompt: Prompt) -> str:
    return prompt.dialogue.turns[-1][0]


def messages(asked_for: list[Prompt], url: str) -> list[Any]:
    who = EndpointTeacher("m", ClientSettings(url))
    return [who._messages(prompt) for prompt in asked_for]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "at most 4096\ntokens"}}, "with 400 (at most 4096 tokens); check"),
        ({"detail": "pinned"}, "with 400 (pinned); check"),
        ({"error": "no"}, "with 400 (no); check"),
        ({"error": {"message": "a key sk-secret-123 of"}}, "with 400; check"),
        ({"error": {"message": ["x"]}}, "with 400; check"),
        ([1], "with 400; check"),
    ],
    ids=str,
)
def test_the_last_failure_is_told_in_the_servers_words(tmp_path, monkeypatch, body, said):
    monkeypatch.setenv("PRECEPTOR_API_KEY", "sk-secret-123")
    with serving(lambda number, asked: (400, {}, json.dumps(body))) as asked, pytest.raises(UserError) as error:
        teacher(asked, max_failures=1).answer(prompts(tmp_path, 1, 1), set(), lambda labels: None)
    assert said in str(error.value)


def test_a_server_that_is_not_there(tmp_path):
    with serving() as asked:
        url = asked.url
    who = EndpointTeacher("m", ClientSettings(url, retries=1, max_failures=2, **QUICK))
    with pytest.raises(UserError, match=r"2 requests in a row have failed.*the connection failed \(ConnectError\)"):
        who.answer(prompts(tmp_path), set(), lambda labels: None)


def test_without_logprobs(tmp_path):
    """One answer has no confidence, several have their agreement, and the record says so."""
    asked_for = prompts(tmp_path, 3, 2)
    with serving(answer=lambda body: reply(body, logprobs=False)) as asked:
        labels, _ = answered(teacher(asked), asked_for)
        assert {(label.confidence, label.margin, label.source) for label in labels.values()} == {(None, None, None)}
        labels, _ = answered(teacher(asked, AskSettings(temperature=1.0, candidates=5)), asked_for)
    for label in labels.values():
        counts = Counter(label.candidates)
        assert sum(counts.values()) == 5
        assert label.source == "agreement"
        # The answers are "answer 0" to "answer 2", which are the same or not.
        assert label.confidence == pytest.approx(counts[label.answer] / 5)
        assert counts[label.answer] == max(counts.values())


def test_a_server_that_gives_one_answer_at_a_time(tmp_path):
    """As transformers' does: several requests then, with different seeds."""

    def one(body: dict[str, Any]) -> dict[str, Any]:
        return reply({**body, "n": 1}, logprobs=False)

    with serving(answer=one) as asked:
        labels, _ = answered(teacher(asked, AskSettings(temperature=1.0, candidates=4)), prompts(tmp_path, 1, 2))
    assert len(asked.bodies) == 8
    assert [len(label.candidates) for label in labels.values()] == [4, 4]
    by_question = [{body["seed"] for body in asked.bodies if question_of(body) == q} for q in set(asked.questions)]
    assert [len(seeds) for seeds in by_question] == [4, 4]


def test_fields_that_a_server_refuses_are_left_out(tmp_path, caplog):
    def fault(number: int, body: dict[str, Any]):
        extra = {"skip_special_tokens", "top_logprobs"} & set(body)
        return (422, {}, json.dumps({"detail": f"Unexpected fields in the request: {extra}"})) if extra else None

    def bare(body: dict[str, Any]) -> dict[str, Any]:
        found = reply(body)
        found["choices"][0]["message"]["content"] = "the liver (1,2),(30,40)"
        for token in found["choices"][0]["logprobs"]["content"]:
            token.pop("top_logprobs", None)
        return found

    with serving(fault, answer=bare) as asked, caplog.at_level(logging.INFO):
        labels, reasons = answered(teacher(asked, concurrent=8, max_failures=2), prompts(tmp_path, 3, 4))
    assert reasons == {}
    assert 12 + 1 <= len(asked.bodies) <= 12 + 8
    assert "does not accept skip_special_tokens, top_logprobs" in caplog.text
    # Marks are special tokens, which this server leaves out: they are put back.
    assert {label.answer for label in labels.values()} == {"the liver <|box_start|>(1,2),(30,40)<|box_end|>"}
    assert {label.source for label in labels.values()} == {"logprobs"}


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(tmp_path, monkeypatch):
    with serving() as proxy, serving() as asked:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        labels, _ = answered(teacher(asked), prompts(tmp_path, 1, 1))
    assert len(labels) == 1
    assert proxy.bodies == []


def test_a_redirect_is_not_followed(tmp_path):
    with serving() as elsewhere:
        there = {"Location": f"{elsewhere.url}/chat/completions"}
        with serving(lambda number, body: (307, there, "")) as asked:
            _, reasons = answered(teacher(asked), prompts(tmp_path, 1, 1))
    assert list(reasons.values()) == ["it answers with 307"]
    assert elsewhere.bodies == []


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.7:8000/v1",
        "https://api.example.org/v1",
        "http://127.0.0.1.example.org",
        "http://gpu/v1",
        "http://[2001:db8::1]/v1",
        "http://0.0.0.0:8000/v1",
    ],
)
def test_images_leave_the_machine_only_where_that_is_allowed(url):
    with pytest.raises(UserError, match="is not this machine, and patients' images and questions would be sent there"):
        EndpointTeacher("m", ClientSettings(url))
    EndpointTeacher("m", ClientSettings(url, allow_remote=True))


def test_addresses():
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1", "https://127.9.9.9"):
        assert check_address(url, False)
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:port/"):
        with pytest.raises(UserError, match="is not an http address"):
            check_address(url, True)
    with pytest.raises(UserError, match="contains a name, password or query") as error:
        check_address("http://me:secret@127.0.0.1/v1", True)
    assert "secret" not in str(error.value)


def test_the_key_is_sent_and_never_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PRECEPTOR_API_KEY", "sk-secret-123")
    whole = data(tmp_path / "images", 2, 2)
    with serving(first_try_only((500, {}, "sk-secret-123"))) as asked, caplog.at_level(logging.DEBUG):
        teach(tmp_path / "store", whole, whole.samples, teacher(asked))
    assert {headers["authorization"] for headers in asked.headers} == {"Bearer sk-secret-123"}
    assert "sk-secret" not in caplog.text
    assert "base64" not in caplog.text  # the images
    assert all(b"sk-secret" not in file.read_bytes() for file in (tmp_path / "store").iterdir())
    monkeypatch.delenv("PRECEPTOR_API_KEY")
    with serving() as asked:
        answered(teacher(asked), prompts(tmp_path, 1, 1))
    assert "authorization" not in asked.headers[0]


def test_no_more_at_once_and_in_a_minute_than_asked_for(tmp_path):
    asked_for = prompts(tmp_path, 3, 4)
    with serving(delay=0.05) as asked:
        answered(teacher(asked, concurrent=3), asked_for)
    assert asked.most_at_once == 3
    with serving() as asked:
        answered(teacher(asked, concurrent=4, requests_per_minute=1200), asked_for)
    assert asked.times[-1] - asked.times[0] >= 11 * 0.05 - 0.02


def test_tokens_that_have_run_out_stop_all(tmp_path):
    asked_for = prompts(tmp_path, 4, 4)
    kept: list[Label] = []
    with serving() as asked:
        who = EndpointTeacher("m", ClientSettings(asked.url, **QUICK), concurrent=1, max_tokens_total=60)
        with pytest.raises(UserError, match="65 tokens are used of --max-tokens-total 60"):
            who.answer(asked_for, set(), kept.extend)
    assert len(kept) == 5  # 13 tokens each


def test_a_store_taught_through_faults_equals_an_undisturbed_one(tmp_path):
    whole = data(tmp_path / "images", 4, 4)
    ask = AskSettings(temperature=0.8, candidates=3)
    with serving() as calm:
        teach(tmp_path / "calm", whole, whole.samples, teacher(calm, ask))
    kinds = ["drop", (500, {}, ""), "broken", "half", (429, {}, "")]
    seen: Counter[str] = Counter()

    def fault(number: int, body: dict[str, Any]):
        seen[json.dumps(body["messages"])] += 1
        return kinds[number % 5] if seen[json.dumps(body["messages"])] <= 2 else None

    with serving(fault) as asked:
        taught = teach(tmp_path / "store", whole, whole.samples, teacher(asked, ask))
    assert taught.unanswered == {}
    assert len(asked.bodies) == 3 * 16
    assert sorted(read_labels(tmp_path / "store"), key=lambda label: label.key) == sorted(
        read_labels(tmp_path / "calm"), key=lambda label: label.key
    )
    assert PseudoLabels.open(tmp_path / "store", whole).coverage == 1


def test_estimate(tmp_path):
    Image.new("RGB", (280, 140)).save(tmp_path / "a.png")
    dialogue = Dialogue("d", (tmp_path / "a.png",), (("abcdef", "yes"), ("abc", "")), "mia", "ct", "g", "train")
    later = replace(dialogue, turns=(("abcdef", ""), ("abc", "")))
    ask = AskSettings(temperature=1.0, candidates=2, max_tokens=10, system_prompt="abc")
    found = estimate_tokens([Prompt("a", 1, dialogue), Prompt("b", 1, later)], ask)
    assert found.images == 2 * 10 * 5
    assert found.texts == (2 + 1 + 1 + 1) + (2 + 10 + 1 + 1)
    assert found.answers == 2 * 2 * 10
    assert found.total == found.images + found.texts + found.answers
    assert estimate_tokens([Prompt("a", 1, dialogue)], replace(ask, max_pixels=140 * 70)).images in (5 * 2, 5 * 3)


def test_wrong_settings_are_said():
    with pytest.raises(UserError, match="3 candidates at temperature 0"):
        AskSettings(candidates=3)
    with pytest.raises(UserError, match="max_tokens 0 must be at least 1"):
        AskSettings(max_tokens=0)


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), min_size=1, max_size=6))
def test_probabilities_of_tokens_against_plain_sums(rows):
    """With all alternatives in any order, and the lower bound of the margin without them."""
    rows = [[value / sum(row) for value in row] for row in rows]
    tokens = [{"logprob": math.log(max(row)), "top_logprobs": [{"logprob": math.log(p)} for p in row]} for row in rows]
    found = token_probabilities({"content": tokens}, greedy=False)
    ordered = [sorted(row, reverse=True) for row in rows]
    assert found.confidence == pytest.approx(np.mean([row[0] for row in ordered]))
    assert found.margin == pytest.approx(np.mean([row[0] - row[1] for row in ordered]), abs=1e-9)
    alone = token_probabilities({"content": [{"logprob": token["logprob"]} for token in tokens]}, greedy=True)
    assert alone.source == "logprobs"
    assert alone.confidence == pytest.approx(found.confidence)
    assert 0 <= alone.margin <= found.margin + 1e-9
    unknown = token_probabilities({"content": [{"logprob": -1.0}]}, greedy=False)
    assert (unknown.logprobs, unknown.confidence, unknown.source) == ((-1.0,), None, None)


@pytest.mark.parametrize(
    "found",
    [None, {}, {"content": None}, {"content": []}, {"content": [{}]}, "no", {"content": [{"logprob": float("nan")}]}],
)
def test_logprobs_that_cannot_be_read_are_none(found):
    assert token_probabilities(found, greedy=True).confidence is None


def test_a_client_gives_the_whole_answer():
    with serving() as asked:

        async def one() -> dict[str, Any]:
            async with ChatClient(ClientSettings(asked.url + "/"), "m", None) as client:
                return await client.complete({"messages": [{"role": "user", "content": "?"}], "temperature": 0})

        assert asyncio.run(one())["usage"] == {"prompt_tokens": 10, "completion_tokens": 3}


def test_images_and_system_messages_are_sent_where_the_data_have_them(tmp_path):
    """The image of a second question is not shown with the first one."""
    files = (image(tmp_path, 0), image(tmp_path, 1, side=30))
    turns = (("Before <image> what?", "a"), ("And <image> now?", ""))
    dialogue = Dialogue("d", files, turns, "mia", "ct", "g", "unlabelled", system="Be brief.")
    whole = replace(data(tmp_path / "images", 0), samples=[dialogue])
    with serving() as asked:
        teach(tmp_path / "store", whole, whole.samples, teacher(asked, AskSettings(system_prompt="Be kind.")))
    first, second = sorted((body["messages"] for body in asked.bodies), key=len)
    assert first[0] == second[0] == {"role": "system", "content": "Be kind.\nBe brief."}
    assert [part["type"] for part in first[1]["content"]] == ["text", "image_url", "text"]
    assert second[1:3] == [first[1], {"role": "assistant", "content": "a"}]
    assert [part.get("text") for part in second[3]["content"]] == ["And ", None, " now?"]
    sizes = []
    for message in (second[1], second[3]):
        encoded = message["content"][1]["image_url"]["url"].partition(",")[2]
        sizes.append(Image.open(io.BytesIO(base64.b64decode(encoded))).size)
    assert sizes == [(20, 20), (30, 30)]
    # Another system message makes it another question.
    assert ContentHashes().keys(dialogue)[0] != ContentHashes().keys(replace(dialogue, system=""))[0]
