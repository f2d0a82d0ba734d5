"""Automatic labels: tested on held-out contexts, failures retried and listed, an endpoint on loopback."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pandas as pd
import pytest

from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.use.autolabel import ChatEndpoint, label_features
from writesae_lens.use.labels import add_labels, labels_of

N = 8


def context(kind: str, word: str, number: int) -> dict[str, Any]:
    """A context of three tokens, the feature active on the middle one."""
    active = 0 if kind == "silent" else 1.5
    tokens = [f"{kind}{number} ", word if active else "nothing", " end"]
    return {"kind": kind, "passage": 0, "position": 0, "at": 1, "coefficient": active, "tokens": tokens,
            "activations": [0, active, 0]}  # fmt: skip


def line(feature: int, n_random: int = N, n_silent: int = N) -> dict[str, Any]:
    """A feature that is active on one word."""
    kinds = {"top": 3, "random": n_random, "silent": n_silent}
    contexts = [context(k, f"word{feature}", n) for k, count in kinds.items() for n in range(count)]
    about = {"layer": 1, "head": 2, "feature": feature, "sae": "sha256:00", "n_active": 20}
    return about | {"contexts": contexts, "promoted": [{"text": " next"}]}


def table(*features: int) -> pd.DataFrame:
    return pd.DataFrame([line(feature) for feature in features])


def name_the_word(feature: dict[str, Any]) -> str:
    """A labeller that names the active token."""
    assert {c["kind"] for c in feature["contexts"]} == {"top"}
    return feature["contexts"][0]["tokens"][1]


def says_where_the_word_is(label: str, texts: list[str]) -> list[bool]:
    return [label in text for text in texts]


def test_labels_go_through_a_csv_into_the_sae(tmp_path):
    path = tmp_path / "features.jsonl"
    lines = [line(0), line(1) | {"n_active": 0}, line(7)]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = tmp_path / "new" / "labels.csv"
    found = label_features(path, name_the_word, out, says_where_the_word_is, verbose=False)
    assert found[["feature", "label"]].to_numpy().tolist() == [[0, "word0"], [7, "word7"]]
    assert (found.balanced_accuracy == 1).all()
    assert (found.chance == 0.5).all()
    assert (found.n_judged == 2 * N).all()
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=9, d_sae=8, k=2))
    sae.cfg.metadata.hook_name = "blocks.1.linear_attn.hook_write.2"
    add_labels(sae, out)
    assert labels_of(sae) == {0: "word0", 7: "word7"}


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda label, texts: [True] * len(texts), 0.5),
        (lambda label, texts: [label not in text for text in texts], 0.0),
        # Half of the firing ones, and none of the others: (1/2 + 1) / 2.
        (lambda label, texts: [any(f"random{n} " in text for n in range(N // 2)) for text in texts], 0.75),
    ],
)
def test_the_score_is_the_balanced_accuracy(tmp_path, judge, expected):
    found = label_features(table(3), name_the_word, tmp_path / "labels.csv", judge, verbose=False)
    assert found.balanced_accuracy.tolist() == [expected]


def test_the_judge_sees_held_out_contexts_half_of_which_fire_in_an_order_that_says_nothing(tmp_path):
    seen = []

    def judge(label, texts):
        seen.append(texts)
        return [True] * len(texts)

    features = pd.DataFrame([line(0), line(1), line(2, n_random=5), line(3, n_silent=0)])
    with pytest.warns(ResultWarning, match="1 of 4 features have no score"):
        found = label_features(features, name_the_word, tmp_path / "a.csv", judge, n_judged=6, verbose=False)
    assert found.n_judged.tolist() == [12, 12, 10, 0]
    for texts in seen:
        assert not any(text.startswith("top") for text in texts)
        assert sum(text.startswith("random") for text in texts) == len(texts) / 2
    orders = [[text.startswith("random") for text in texts] for texts in seen]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0], reverse=True)


def test_failures_are_tried_again_and_then_listed(tmp_path):
    calls: dict[int, int] = {}

    def labeller(feature):
        number = feature["feature"]
        calls[number] = calls.get(number, 0) + 1
        if number == 1 or (number == 2 and calls[2] < 3):
            raise TimeoutError("no answer\nin time")
        return "" if number == 3 else "=label"

    out = tmp_path / "labels.csv"
    with pytest.warns(
        ResultWarning, match=r"2 of 4 features have no label \(TimeoutError: no answer in time"
    ):
        found = label_features(table(0, 1, 2, 3), labeller, out, wait=0.0, verbose=False)
    assert calls == {0: 1, 1: 3, 2: 3, 3: 3}
    assert found.label.tolist() == ["=label", "", "=label", ""]
    assert found.error.tolist()[:3] == ["", "TimeoutError: no answer in time", ""]
    assert found.error[3] == "ValueError: the labeller returned '', no label"
    calls.clear()
    again = label_features(
        table(0, 1, 2, 3), lambda f: calls.update({f["feature"]: 1}) or "b", out, verbose=False
    )
    assert calls == {1: 1, 3: 1}
    assert again.label.tolist() == ["=label", "b", "=label", "b"]


def test_a_judge_that_fails_leaves_the_label_and_says_so(tmp_path):
    out = tmp_path / "labels.csv"
    with pytest.warns(ResultWarning, match=r"1 of 1 features have no score \(ValueError: the judge returned"):
        found = label_features(table(0), name_the_word, out, lambda *_: [1, 0], wait=0.0, verbose=False)
    assert found.label.tolist() == ["word0"]
    assert found.balanced_accuracy.isna().all()
    again = label_features(table(0), name_the_word, out, says_where_the_word_is, verbose=False)
    assert again.balanced_accuracy.tolist() == [1.0]


def test_a_fault_of_the_callable_stops_the_run_and_keeps_what_is_done(tmp_path):
    def labeller(feature):
        if feature["feature"] == 1:
            raise KeyboardInterrupt
        return name_the_word(feature)

    out = tmp_path / "labels.csv"
    with pytest.raises(KeyboardInterrupt):
        label_features(table(0, 1, 2), labeller, out, says_where_the_word_is, verbose=False)
    assert pd.read_csv(out).label.tolist() == ["word0"]
    resumed = label_features(table(0, 1, 2), name_the_word, out, says_where_the_word_is, verbose=False)
    whole = label_features(
        table(0, 1, 2), name_the_word, tmp_path / "b.csv", says_where_the_word_is, verbose=False
    )
    pd.testing.assert_frame_equal(resumed, whole)
    assert out.read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_what_is_no_export_is_refused(tmp_path):
    out = tmp_path / "labels.csv"
    with pytest.raises(WriteSAEError, match="does not read as an export"):
        label_features(tmp_path / "none.jsonl", name_the_word, out, verbose=False)
    with pytest.raises(WriteSAEError, match="an export has layer, head, feature"):
        label_features(pd.DataFrame({"feature": [1]}), name_the_word, out, verbose=False)
    with pytest.raises(WriteSAEError, match="none of these features is active anywhere"):
        label_features(table(0).assign(n_active=0), name_the_word, out, verbose=False)
    with pytest.raises(WriteSAEError, match="two SAEs of one cell"):
        label_features(
            pd.concat([table(0), table(0).assign(sae="sha256:01")]), name_the_word, out, verbose=False
        )
    assert not out.exists()
    label_features(table(0), name_the_word, out, verbose=False)
    with pytest.raises(WriteSAEError, match="with labels of another SAE"):
        label_features(table(0).assign(sae="sha256:01"), name_the_word, out, verbose=False)
    (tmp_path / "other.csv").write_text("feature,label\n1,x\n")
    with pytest.raises(WriteSAEError, match="no file of label_features"):
        label_features(table(0), name_the_word, tmp_path / "other.csv", verbose=False)


class Stub(BaseHTTPRequestHandler):
    """Answers each request with the next of the server's replies: a status and a body, or seconds to wait."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, self.headers.get("Authorization"), body))
        status, content = server.replies.pop(0)
        if status == "late":
            time.sleep(content)
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server(monkeypatch):
    """A stub of an endpoint, with the replies that it is given."""
    stub: Any = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.replies, stub.requests = [], []
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{stub.server_port}/v1/")
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield stub
    stub.shutdown()
    thread.join()
    stub.server_close()


def test_an_endpoint_labels_and_judges(server, tmp_path):
    chat, out = ChatEndpoint(), tmp_path / "labels.csv"
    server.replies += [said(' "a word" '), said("Here: [2, 3]")]
    found = label_features(table(5), chat.label, out, chat.judge, n_judged=2, verbose=False)
    assert found.label.tolist() == ["a word"]
    (path, key, asked), (_, _, judged) = server.requests
    assert (path, key, asked["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    question = asked["messages"][0]["content"]
    assert "1. 'top0 <<word5>> end'" in question
    assert "random" not in question
    assert "[' next']" in question
    shown = judged["messages"][0]["content"]
    assert "described as: a word\n" in shown
    fires = [f"{n}. 'random" in shown for n in range(1, 5)]
    accuracy = sum((n in (2, 3)) == fires[n - 1] for n in range(1, 5)) / 4
    assert found.balanced_accuracy.tolist() == [accuracy]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((429, b""), "OSError: the server answers 429 Too Many Requests"),
        ((503, b""), "OSError: the server answers 503"),
        (("late", 0.4), "TimeoutError: timed out"),
        ((200, b"<html>"), "JSONDecodeError: Expecting value"),
        ((200, {"choices": []}), "ValueError: the reply has no choices"),
        (said(None), "ValueError: the reply's content is None"),
        (said(""), "ValueError: the reply is no label: ''"),
        (said("x" * 300), "ValueError: the reply is no label: 'xxx"),
    ],
)
def test_replies_that_are_none_are_asked_for_again(server, tmp_path, reply, error):
    chat = ChatEndpoint(timeout=0.2)
    server.replies += [reply, said("at last")]
    found = label_features(table(0), chat.label, tmp_path / "a.csv", wait=0.0, verbose=False)
    assert found.label.tolist() == ["at last"]
    server.replies += [reply] * 3
    with pytest.warns(ResultWarning, match="1 of 1 features have no label"):
        found = label_features(table(0), chat.label, tmp_path / "b.csv", wait=0.0, verbose=False)
    assert found.error[0].startswith(error)
    assert len(server.requests) == 5


@pytest.mark.parametrize("verdict", ["none", "[0, 1]", "[99]", '["a"]'])
def test_verdicts_that_are_none_are_listed(server, verdict):
    server.replies.append(said(verdict))
    with pytest.raises(ValueError, match="the reply is no list of numbers from 1 to 2"):
        ChatEndpoint().judge("label", ["a", "b"])
    server.replies.append(said("[]"))
    assert ChatEndpoint().judge("label", ["a", "b"]) == [False, False]


@pytest.mark.parametrize("reply", [(401, {"error": "wrong key"}), (404, b"no such model"), (302, b"")])
def test_a_refusal_stops_the_run_at_once_and_does_not_show_the_key(server, tmp_path, reply):
    server.replies.append(reply)
    with pytest.raises(WriteSAEError, match=rf"/v1/chat/completions answers {reply[0]}") as error:
        label_features(table(0, 1), ChatEndpoint().label, tmp_path / "a.csv", wait=0.0, verbose=False)
    assert len(server.requests) == 1
    assert "secret" not in str(error.value)


def test_an_endpoint_needs_a_model_and_an_address(monkeypatch):
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(WriteSAEError, match="which language model"):
        ChatEndpoint("http://127.0.0.1")
    with pytest.raises(WriteSAEError, match="is no address of a server"):
        ChatEndpoint("file:///etc", "m")
