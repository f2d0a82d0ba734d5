"""The hub of the tests, as the real client meets it."""

import hashlib
from pathlib import Path

import pytest

from tests.writesae_lens.published.hub import Client, Hub, RemoteError

PRELOAD = """
import time
from pathlib import Path
from huggingface_hub import (
    HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, list_repo_files, snapshot_download
)

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


def test_a_gated_repository(hub, client):
    hub.put("user/gated", "a.txt", b"one")
    for status, token in ((401, False), (403, False), (403, "hf_other")):
        hub.gate("user/gated", status)
        with pytest.raises(RemoteError, match="restricted") as caught:
            client.run("fetched('user/gated', 'a.txt', token=token)", token=token)
        assert caught.value.mro[:2] == ["GatedRepoError", "RepositoryNotFoundError"]
        assert f"{403 if token else 401} Client Error" in caught.value.message
    assert client.run("result = [HfApi().model_info('user/gated').gated, list_repo_files('user/gated')]") == [
        "manual",
        ["a.txt"],
    ]
    hub.gate("user/gated", 401)
    assert client.run("result = fetched('user/gated', 'a.txt', token='hf_other')") == "one"


def test_an_interrupted_download_is_resumed(hub, client):
    hub.put("user/cut", "resumed.bin", BIG)
    hub.interrupt("resumed.bin", after=len(BIG) - 1000, times=1)
    path = client.run("result = hf_hub_download('user/cut', 'resumed.bin')")
    assert Path(path).read_bytes() == BIG
    assert hub.ranges == [("resumed.bin", f"bytes={10 << 20}-")]


def test_a_download_interrupted_each_time(hub, client, cache):
    hub.put("user/broken", "broken.bin", b"abc" * 1000)
    hub.interrupt("broken.bin", after=1000, times=6)
    with pytest.raises(RemoteError) as caught:
        client.run("hf_hub_download('user/broken', 'broken.bin')")
    assert caught.value.kind == "RemoteProtocolError"
    assert hub.requests.count(("GET", "/user/broken/resolve/main/broken.bin")) == 6
    blobs = cache / "hub" / "models--user--broken" / "blobs"
    assert all(path.suffix == ".incomplete" for path in blobs.iterdir())
    assert client.run("result = fetched('user/broken', 'broken.bin')") == "abc" * 1000


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
        client.run("list_repo_files('user/new')")
    client.run("api = HfApi(token='hf_own')")
    assert client.run("result = api.whoami()['name']") == "user"
    upload = "result = api.upload_folder(repo_id='user/new', folder_path=folder, path_in_repo='in').oid"
    commit = client.run(upload, folder=str(tmp_path))
    assert hub.files("user/new", commit) == {f"in/{name}": data for name, data in files.items()}
    assert client.run(upload, folder=str(tmp_path)) == commit, "nothing has changed"
    client.run("api.upload_file(path_or_fileobj=b'# card', path_in_repo='README.md', repo_id='user/new')")
    client.run("api.delete_file('in/a.txt', 'user/new')")
    assert hub.files("user/new") == {"README.md": b"# card", "in/folder/b.bin": files["folder/b.bin"]}
    assert hub.files("user/new", commit).keys() == {"in/a.txt", "in/folder/b.bin"}
    with pytest.raises(RemoteError, match="Repository Not Found"):
        client.run("api.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='user/nobody')")


def test_listings(hub, client):
    files = {"a.txt": b"one", "b/c.txt": b"two", "b/d/e.txt": b"three", "bc.txt": b""}
    commit = hub.put("user/listed", files)
    assert client.run("result = list_repo_files('user/listed')") == sorted(files)
    tree = "result = [entry.path for entry in HfApi().list_repo_tree('user/listed', path)]"
    assert client.run(tree, path=None) == ["a.txt", "b", "bc.txt"]
    assert client.run(tree, path="b") == ["b/c.txt", "b/d"]
    with pytest.raises(RemoteError) as caught:
        client.run(tree, path="c")
    assert caught.value.kind == "RemoteEntryNotFoundError"
    asked = "HfApi().get_paths_info('user/listed', ['b', 'bc.txt', 'no'])"
    assert client.run(f"result = [entry.path for entry in {asked}]") == ["b", "bc.txt"]
    info = "info = HfApi().model_info('user/listed', revision='main')"
    assert client.run(f"{info}\nresult = [info.sha, info.private, len(info.siblings)]") == [commit, False, 4]
    folder = Path(client.run("result = snapshot_download('user/listed')"))
    assert folder.name == commit
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.txt")} == files


def test_offline(hub, client, cache):
    hub.put("user/warm", "a.txt", b"one")
    client.run("fetched('user/warm', 'a.txt')")
    with Client("http://127.0.0.1:9", cache, PRELOAD, HF_HUB_OFFLINE="1") as offline:
        assert offline.run("result = fetched('user/warm', 'a.txt')") == "one"
        with pytest.raises(RemoteError) as caught:
            offline.run("fetched('user/warm', 'b.txt')")
        assert caught.value.mro[:3] == ["LocalEntryNotFoundError", "FileNotFoundError", "OSError"]
        with pytest.raises(RemoteError) as caught:
            offline.run("list_repo_files('user/warm')")
        assert caught.value.mro[:2] == ["OfflineModeIsEnabled", "ConnectionError"]


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
