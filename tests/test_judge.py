"""A judge behind HTTP, with a server that is slow, fails, limits requests, drops connections or returns nonsense."""

import time
from email.utils import formatdate

import pytest
from judge_server import Behaviour, judge_server

from halos_trl.scoring.chat_client import ChatClient
from halos_trl.scoring.judge import JudgePrompt, JudgeScorer
from halos_trl.scoring.samples import read_samples

KEY = "sk-secret-0123456789"
ASK = JudgePrompt("{completion}")


def samples(n):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)]
    return read_samples((f"s.jsonl, item {i}", row) for i, row in enumerate(rows)).samples


def judge(url, *, concurrency=4, prompt=ASK, **settings):
    settings = {"timeout": 5.0, "retries": 3, "delay": 0.01, "key": KEY} | settings
    return JudgeScorer(ChatClient(url, "judge", **settings), prompt, concurrency)


def verdicts(scorer, n):
    return sorted(scorer(list(enumerate(samples(n)))))


def number_of(text):
    return int(text.split()[-1])


def test_every_sample_is_asked_once_and_scored(monkeypatch):
    def behave(text, _):
        return Behaviour(f"Well. Score: {number_of(text) / 2}", delay=0.02)

    with judge_server(behave) as (url, log):
        found = verdicts(judge(url, concurrency=3, options={"temperature": 0, "model": "no"}), 10)
    assert [(v.position, v.score) for v in found] == [(i, i / 2) for i in range(10)]
    assert sorted(map(number_of, log.texts)) == list(range(10))
    assert 1 < log.most_at_once <= 3
    assert {h["Authorization"] for h in log.headers} == {f"Bearer {KEY}"}
    assert all(body["model"] == "judge" and body["temperature"] == 0 for body in log.bodies)


@pytest.mark.parametrize(
    "trouble",
    [
        Behaviour(status=500, body="oh"),
        Behaviour(status=503),
        Behaviour(status=429, headers={"Retry-After": "0"}),
        Behaviour(drop=True),
        Behaviour(body="<html>a proxy</html>"),
        Behaviour(body='{"choices": []}'),
        Behaviour(delay=0.5),
    ],
    ids=["500", "503", "429", "dropped", "html", "no choice", "slow"],
)
def test_what_may_pass_is_tried_again(trouble):
    def behave(text, number):
        return trouble if number < 2 and number_of(text) % 2 else Behaviour("Score: 3")

    with judge_server(behave) as (url, log):
        found = verdicts(judge(url, timeout=0.2), 4)
    assert [v.score for v in found] == [3.0] * 4
    assert {i: sum(number_of(text) == i for text in log.texts) for i in range(4)} == {0: 1, 1: 3, 2: 1, 3: 3}


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(as_date):
    def behave(text, number):
        # A date has whole seconds, so the wait for one is 1 to 2 seconds.
        after = formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
        return Behaviour("Score: 1") if number else Behaviour(status=429, headers={"Retry-After": after})

    with judge_server(behave) as (url, _):
        start = time.monotonic()
        assert [v.score for v in verdicts(judge(url, delay=0.0), 1)] == [1.0]
    assert time.monotonic() - start > (0.9 if as_date else 0.4)


def test_waits_grow_and_stay_below_a_minute():
    client = ChatClient("http://localhost/v1", "m", delay=1.0)
    for number, longest in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        assert all(longest / 2 <= client.wait(number, None) <= longest for _ in range(20))
    assert client.wait(0, 1e9) == 600.0


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7.0),
        ("I would say **Score:** 7.5/10", 7.5),
        ("Score: 2 at first sight. On reflection:\nScore: 9", 9.0),
        (" 8/10. ", 8.0),
        ("6", 6.0),
        ("I cannot judge this; as of 2024 I have no opinion.", None),
        ("Score: excellent", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("", None),
        (None, None),
    ],
)
def test_scores_are_read_from_replies(reply, score):
    assert JudgePrompt().score(reply) == score


def test_unreadable_replies_are_kept_out_and_not_asked_again(caplog):
    def behave(text, _):
        return Behaviour(None if number_of(text) == 1 else "banana" if number_of(text) == 2 else "Score: 4")

    with judge_server(behave) as (url, log):
        found = verdicts(judge(url), 4)
    assert [v.score for v in found] == [4.0, None, None, 4.0]
    assert found[1].reason == found[2].reason == "the judge's reply contains no score"
    assert found[2].reply == "banana"
    assert caplog.text.count("contains no score") == 1 and "The judge's reply about s.jsonl, item" in caplog.text
    assert len(log.texts) == 4


def test_a_dead_server_stops_the_run_after_what_was_under_way():
    """Position 1 fails for good while 0 and 2 are being answered: their verdicts arrive, and no more is asked."""

    def behave(text, _):
        return Behaviour(status=500) if number_of(text) == 1 else Behaviour("Score: 6", delay=0.3)

    with judge_server(behave) as (url, log):
        found = []
        with pytest.raises(
            ValueError, match=r"about s\.jsonl, item 1 \(attempts: 4, the last error: status 500.*same command again"
        ):
            for verdict in judge(url, concurrency=3)(list(enumerate(samples(50)))):
                found.append(verdict.position)
    assert sorted(found) == sorted(set(map(number_of, log.answered)))
    assert {0, 2} <= set(found) and len(log.answered) < 10


def test_a_wrong_key_stops_at_once_and_is_not_shown():
    with judge_server(lambda *_: Behaviour(status=401, body=f"Incorrect API key: {KEY}")) as (url, log):
        with pytest.raises(ValueError, match=r"Incorrect API key: <the API key>\. Check the API key") as error:
            verdicts(judge(url, concurrency=1), 5)
    assert KEY not in str(error.value) and len(log.texts) == 1
    assert KEY not in repr(judge(url)) and KEY not in str(judge(url).settings)


def test_single_refused_requests_are_counted():
    def behave(text, _):
        return Behaviour(status=400, body="too long") if number_of(text) in (0, 3) else Behaviour("Score: 2")

    with judge_server(behave) as (url, _):
        found = verdicts(judge(url, concurrency=1), 5)
    assert [v.score for v in found] == [None, 2.0, 2.0, None, 2.0]
    assert found[0].reason == "the server refused the request: status 400: too long"


def test_a_server_that_refuses_everything_stops_the_run():
    with judge_server(lambda *_: Behaviour(status=400, body="unknown option `temprature`")) as (url, log):
        found = []
        with pytest.raises(ValueError, match=r"refused all of the first 10 requests.*`temprature`"):
            for verdict in judge(url)(list(enumerate(samples(100)))):
                found.append(verdict)
    assert found == [] and len(log.texts) < 20


def test_redirects_are_not_followed():
    with judge_server(lambda *_: Behaviour("Score: 1")) as (other, other_log):
        answer = Behaviour(status=307, headers={"Location": f"{other}/chat/completions"})
        with judge_server(lambda *_: answer) as (url, _), pytest.raises(ValueError, match="Pass the address that it"):
            verdicts(judge(url), 1)
    assert other_log.texts == []


def test_templates_replace_what_they_name_only():
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {completion}?"}],
        "output": "A {prompt}.",
        "answer": 42,
    }
    (sample,) = read_samples([("s.json, item 0", row)]).samples
    template = 'Q: {prompt}\nA: {completion} ({answer}) Reply like {"score": 1} or {other}.'
    assert JudgePrompt(template).text(sample) == (
        'Q: system: Be brief.\n\nuser: What is {completion}?\nA: A {prompt}. (42) Reply like {"score": 1} or {other}.'
    )
    assert "\nA {prompt}.\n" in JudgePrompt().text(sample)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JudgePrompt("Rate {prompt}."), "no `{completion}`"),
        (lambda: JudgePrompt(pattern="Score: ("), "not a valid regular expression"),
        (lambda: JudgePrompt(pattern="Score"), "no group"),
        (lambda: judge("localhost:8000/v1"), "expected one like"),
        (lambda: judge("http://me:word@localhost/v1"), "contains a password"),
        (lambda: judge("http://localhost/v1?key=1"), "without `\\?`"),
        (lambda: judge("http://localhost/v1", key="two words"), "API key contains"),
        (lambda: judge("http://localhost/v1", concurrency=0), "expected at least 1"),
        (lambda: judge("http://localhost/v1", retries=-1), "at least 0 retries"),
        (lambda: judge("http://localhost/v1", timeout=0), "a time above 0"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "word@" not in str(error.value)
