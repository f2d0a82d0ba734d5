"""The hub of the tests, as the real client meets it; test_pretrained.py covers the rest by use."""

import hashlib
from pathlib import Path

import pytest

from tests.writesae_lens.published.hub import Client, Hub, RemoteError

PRELOAD = """
import time
from pathlib import Path
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

time.sleep = lambda seconds: None  # between its attempts the client waits, 23 s in all for a hub that is away

def fetched(*arguments, **options):
    return Path(hf_hub_download(*arguments, **options)).read_text()
"""
BIG = bytes(range(256)) * (11 << 12)  # 11 MiB: the client writes, and resumes at, 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "cache"


@pytest.fixture(scope="module")
def client(hub, cache):
    with Client(hub, cache, PRELOAD) as client:
        yield client


def test_a_file_comes_with_its_commit(hub, client):
    commit = hub.put("user/plain", {"a.txt": b"one", "a folder/é%.txt": b"two"})
    assert client.run("result = fetched('user/plain', 'a.txt')") == "one"
    assert client.run("result = fetched('user/plain', 'a folder/é%.txt')") == "two"
    assert ("HEAD", "/user/plain/resolve/main/a.txt") in hub.requests
    metadata = client.run("""
        got = get_hf_file_metadata(hf_hub_url("user/plain", "a.txt"))
        result = [got.commit_hash, got.etag, got.size, got.xet_file_data]
    """)
    assert metadata == [commit, hashlib.sha256(b"one").hexdigest(), 3, None]


def test_revisions(hub, client):
    first = hub.put("user/revisions", "a.txt", b"first")
    hub.tag("user/revisions", "v1")
    second = hub.put("user/revisions", "a.txt", b"second")
    hub.put("user/revisions", "a.txt", b"other", revision="a/branch")
    assert len({first, second}) == 2
    assert {len(first), len(second)} == {40}
    expected = {"v1": "first", first: "first", second: "second", "main": "second", "a/branch": "other"}
    fetch = "result = {name: fetched('user/revisions', 'a.txt', revision=name) for name in names}"
    assert client.run(fetch, names=list(expected)) == expected
    client.run("HfApi().create_branch('user/revisions', branch='old', revision='v1')")
    assert hub.files("user/revisions", "old") == {"a.txt": b"first"}


@pytest.mark.parametrize(
    ("repo", "revision", "kind", "base"),
    [
        ("user/missing", "main", "RemoteEntryNotFoundError", "EntryNotFoundError"),
        ("user/missing", "v9", "RevisionNotFoundError", "HfHubHTTPError"),
        ("user/missing", "0" * 40, "RevisionNotFoundError", "HfHubHTTPError"),
        ("user/nobody", "main", "RepositoryNotFoundError", "HfHubHTTPError"),
    ],
)
def test_what_is_missing(hub, client, repo, revision, kind, base):
    hub.put("user/missing", "a.txt", b"one")
    with pytest.raises(RemoteError) as caught:
        client.run("hf_hub_download(repo, 'b.txt', revision=revision)", repo=repo, revision=revision)
    assert caught.value.kind == kind
    assert {base, "OSError"} <= set(caught.value.mro)
    assert "404 Client Error" in caught.value.message


def test_an_interrupted_download_is_resumed(hub, client):
    hub.put("user/cut", "resumed.bin", BIG)
    hub.interrupt("resumed.bin", after=len(BIG) - 1000, times=1)
    path = client.run("result = hf_hub_download('user/cut', 'resumed.bin')")
    assert Path(path).read_bytes() == BIG
    assert hub.ranges == [("resumed.bin", f"bytes={10 << 20}-")]


def test_uploads(hub, client, tmp_path):
    files = {"a.txt": b"one", "folder/b.bin": bytes(range(256))}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    create = "result = HfApi().create_repo('user/new', private=True, exist_ok={})"
    assert client.run(create.format(False)) == f"{hub.endpoint}/user/new"
    assert client.run(create.format(True)) == f"{hub.endpoint}/user/new"
    with pytest.raises(RemoteError, match="409"):
        client.run(create.format(False))
    with pytest.raises(RemoteError, match="Repository Not Found"):
        client.run("HfApi().model_info('user/new')")
    client.run("api = HfApi(token='hf_own')")
    upload = "result = api.upload_folder(repo_id='user/new', folder_path=folder, path_in_repo='in').oid"
    commit = client.run(upload, folder=str(tmp_path))
    assert hub.files("user/new", commit) == {f"in/{name}": data for name, data in files.items()}
    assert client.run(upload, folder=str(tmp_path)) == commit, "nothing has changed"
    client.run("api.upload_file(path_or_fileobj=b'# card', path_in_repo='README.md', repo_id='user/new')")
    assert hub.files("user/new").keys() == {"README.md", "in/a.txt", "in/folder/b.bin"}
    assert hub.files("user/new", commit).keys() == {"in/a.txt", "in/folder/b.bin"}
    info = "info = api.model_info('user/new')"
    assert client.run(f"{info}\nresult = [info.private, len(info.siblings)]") == [True, 3]
    with pytest.raises(RemoteError, match="Repository Not Found"):
        client.run("api.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='user/nobody')")


def test_a_closed_hub(client, cache):
    with Hub() as gone:
        gone.put("user/warm", "a.txt", b"two")
        assert client.run("result = fetched('user/warm', 'a.txt', endpoint=url)", url=gone.endpoint) == "two"
    assert client.run("result = fetched('user/warm', 'a.txt', endpoint=url)", url=gone.endpoint) == "two"
    with pytest.raises(RemoteError) as caught:
        client.run("fetched('user/cold', 'a.txt', endpoint=url)", url=gone.endpoint)
    assert caught.value.kind == "LocalEntryNotFoundError"


def test_what_a_client_answers(cache):
    with Client("http://127.0.0.1:9", cache, "import os, time", timeout=20, OWN="own") as client:
        assert client.run("x = y + 1\nprint('printed')\nos.system('echo spoken')\nresult = x", y=1) == 2
        assert client.run("result = [x, os.environ['OWN'], os.environ.get('HF_TOKEN')]") == [2, "own", None]
        assert client.run("pass") is None
        assert {"printed", "spoken"} <= set(client.stderr.split())
        with pytest.raises(RemoteError) as caught:
            client.run("raise FileNotFoundError('no: such')")
        assert (caught.value.kind, caught.value.message) == ("FileNotFoundError", "no: such")
        assert caught.value.mro[:2] == ["FileNotFoundError", "OSError"]
        assert 'File "<client>", line 1' in caught.value.traceback
        for code in ("result = {1, 2}", "raise SystemExit(1)", "x ="):
            with pytest.raises(RemoteError):
                client.run(code)
        client.timeout = 0.1
        with pytest.raises(TimeoutError):
            client.run("time.sleep(60)")
    client = Client("http://127.0.0.1:9", cache)
    with pytest.raises(RuntimeError, match="last words"):
        client.run("import os, sys; print('last words'); os._exit(3)")
    client.close()
