"""``manifest.json`` in any layout: whether it lists a file's SHA-256."""

import json

import pytest

from writesae_lens import WriteSAEError
from writesae_lens.published import manifest

FOLDER = "writesae/qwen0p8b/L9_H4"
HASH, OTHER = "c0ffee00" * 8, "a" * 64


def check(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return manifest.check(tmp_path / "manifest.json", f"{FOLDER}/best.pt", HASH)


def refusal(tmp_path, content):
    with pytest.raises(WriteSAEError) as caught:
        check(tmp_path, content)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TAGS = (f"{FOLDER}/best.pt", FOLDER, "writesae_qwen0p8b_L9_H4", "WriteSAE/qwen0p8b-L9-H4")


@pytest.mark.parametrize("tag", [*TAGS, "writesae-qwen0p8b-l9.h4"])
@pytest.mark.parametrize(
    "entry", [lambda x: {"sha256": x}, lambda x: {"SHA-256": x.upper(), "size": 1}, lambda x: x]
)
@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"checkpoints": x}])
def test_the_tag_of_the_file_decides(tmp_path, tag, entry, wrapped):
    assert check(tmp_path, wrapped({"other": {"sha256": 64 * "0"}, tag: entry(HASH)})) is True
    message = refusal(tmp_path, wrapped({tag: entry(OTHER)}))
    assert HASH in message
    assert OTHER in message
    # Without a tag of the file, any tag's SHA-256 will do.
    assert check(tmp_path, wrapped({"other": entry(HASH)})) is True
    assert check(tmp_path, wrapped({"other": entry(OTHER)})) is False


@pytest.mark.parametrize(
    ("content", "listed"),
    [
        ({"files": [{"path": f"{FOLDER}/best.pt", "SHA-256": HASH}]}, True),
        ({"writesae": {"qwen0p8b": {"L9_H4": {"sha256": f"sha256:{HASH}", "size": 1}}}}, True),
        ({"sha256": {"WriteSAE qwen0p8b L9-H4": HASH}}, True),
        ({"another name": {"sha256": OTHER}, FOLDER: {"sha256": None}, "list": [1, None]}, False),
        ({"../../../outside": {"sha256": OTHER, "path": "/etc/passwd"}, "/x": {"file": "../../y"}}, False),
        ([], False),
    ],
)
def test_other_layouts(tmp_path, content, listed):
    assert check(tmp_path, content) is listed


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"a/x": {"sha256": "1" * 64}, "y": {"path": FOLDER, "hash": "sha256:" + "0" * 64}}, "0" * 64),
        ({FOLDER: {"sha256": "2" * 64}, FOLDER.replace("/", "_"): "3" * 64}, "says " + "2" * 64 + ": "),
        (
            {FOLDER.replace("/", x): n * 64 for x, n in ("_2", "-3")},
            "says " + "2" * 64 + " and " + "3" * 64,
        ),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (" " * (5 << 20), "more than the 4,194,304"),
        (f'{{"a": "{HASH}", "a": "{OTHER}"}}', "'a' stands twice"),
    ],
)
def test_refusals(tmp_path, content, part):
    assert part in refusal(tmp_path, content)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"\xff")
    with pytest.raises(WriteSAEError, match="is not JSON"):
        manifest.check(tmp_path / "manifest.json", "x/best.pt", HASH)
