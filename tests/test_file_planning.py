"""File planning: no answer in a prompt, trees before the change, an F1 that cannot be fooled, splits by package."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from script_loading import load_script
from typer.testing import CliRunner

from rft.cli import app
from rft.config import load_config
from rft.data import load_items, load_rows, overlap, parse_item
from rft.envs.shell import ShellEnvironment, ShellEnvironmentConfig
from rft.envs.tasks.file_planning import history, patches, planning, rows, trees
from rft.envs.tasks.file_planning.grader import grade
from rft.envs.tasks.file_planning.way import grade as grade_way
from rft.types import Item, Message, ToolCall, ToolResult

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/file_planning.yaml"
DATA = ROOT / "data/file_planning"
SPLITS = ("train", "validation", "test")
PATCH = """\
From 611974f8c3231d87ca572feda72eb6d1a5a6b309 Mon Sep 17 00:00:00 2001
From: Somebody <somebody@example.org>
Date: Mon, 13 Jan 2014 12:13:31 +0000
Subject: [PATCH 2/7] lib/url: check_host() must refuse an empty
 name
Origin: upstream,
 in lib/url.c

The loop in url.c (see src/main.c, too) read past the end.

Signed-off-by: Somebody <somebody@example.org>
Bug: https://example.org/lib/url.c
---
 lib/url.c      | 3 ++-
 new.c          | 1 +
 2 files changed, 3 insertions(+), 1 deletion(-)

diff --git a/lib/url.c b/lib/url.c
--- a/lib/url.c
+++ b/lib/url.c
@@ -1 +1 @@
-a
+b
diff --git a/new.c b/new.c
--- /dev/null
+++ b/new.c
@@ -0,0 +1 @@
+b
--- a/old.c
+++ /dev/null
@@ -1 +0,0 @@
-a
"""


# --- descriptions ----------------------------------------------------------------------------------------------------


def test_a_patch_becomes_its_text_and_the_files_it_edits() -> None:
    assert patches.edited_files(PATCH) == ["lib/url.c", "old.c"], "what it creates cannot be found"
    text = patches.description(PATCH)
    assert (
        text
        == "lib/url: check_host() must refuse an empty name The loop in url.c (see src/main.c, too) read past the end."
    )
    told = patches.without_file_names(text, ["lib/url.c", "src/main.c"])
    assert told == "check_host() must refuse an empty name The loop in (see, too) read past the end."


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Description: A\n B\nAuthor: x\n y\nForwarded: no\n\n--- a/f\n+++ b/f\n", "A B"),
        ("#!/bin/sh /usr/share/dpatch/dpatch-run\n## x.dpatch by y\n## DP: Fix it\n\n@DPATCH@\ndiff x", "Fix it"),
        (
            "Subject: netrc: parse\n\nNote: a sentence\nReviewed-by: x\nOpenBSD-Commit-ID: 3\n",
            "netrc: parse Note: a sentence",
        ),
        ("Index: a/f\n--- a/f\n+++ b/f\n", ""),
        ("", ""),
    ],
)
def test_headers_of_all_kinds(raw: str, expected: str) -> None:
    assert patches.description(raw) == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see lib/url.c.", True),
        ("see URL.C: it", True),
        ("in a/lib/url.c and", True),
        ("the url is", False),
        ("curl.c", False),
        ("url.conf", False),
    ],
)
def test_names_of_files_are_found_and_taken_out(text: str, names: bool) -> None:
    assert patches.names_a_file(text, ["lib/url.c"]) == names
    cleaned = patches.without_file_names(text, ["lib/url.c"])
    assert not patches.names_a_file(cleaned, ["lib/url.c"]) and (cleaned == text) == (not names)


def test_identifiers() -> None:
    assert rows.identifiers("netrc: parse user_name of getHost and trim() words") == [
        "netrc",
        "user_name",
        "getHost",
        "trim",
    ]
    assert rows.identifiers("Fix a crash on empty lines") == []


# --- trees -----------------------------------------------------------------------------------------------------------


def test_what_a_tree_shows() -> None:
    shown = ["lib/url.c", "configure.ac", "Makefile.am", "util/grub.d/10_linux.in", "src/EDITME", "sshd_config"]
    hidden = ["debian/rules", "tests/a.c", "docs/a.c", "po/de.po", "README", "ChangeLog.2", "configure", ".git/config"]
    assert [path for path in [*shown, *hidden, "/abs.c", "a.md"] if trees.is_source(path)] == shown
    assert trees.sources({"b.c": b"x", "a.c": b"x", "c.c": b"\0", "d.c": b"", "e.c": b"x" * 400_001}) == {
        "a.c": b"x",
        "b.c": b"x",
    }


def archive(files: dict[str, str], **links: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return data.getvalue()


def test_archives_hold_regular_files_alone() -> None:
    """No link and no path of an archive leads anywhere."""
    assert trees.read_archive(io.BytesIO(archive({"top/a.c": "x"}, evil="/etc/passwd"))) == {"a.c": b"x"}
    assert trees.read_archive(io.BytesIO(archive({"a.c": "x", "b/c.c": "y"}))) == {"a.c": b"x", "b/c.c": b"y"}
    climbing = trees.read_archive(
        io.BytesIO(archive({"../../a.c": "x", "/abs/b.c": "x", "t/../c.c": "x", "ok/d.c": "x"}))
    )
    assert trees.sources(climbing) == {"ok/d.c": b"x"}


def test_a_tree_is_written_once(tmp_path: Path) -> None:
    written: dict[str, Path] = {}
    for name in ("one", "two", "one"):
        trees.write_tree(tmp_path / name, {"a/b.c": b"x"}, written)
    assert (tmp_path / "two/a/b.c").read_bytes() == b"x" and (tmp_path / "one/a/b.c").stat().st_nlink == 2


# --- the grade -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("lib/url.c\nREADME.d", 0.5),
        ("lib/url.c, lib/url.h", 1.0),
        ("/tree/lib/url.c\n./lib/url.h:3:int", 1.0),
        ("EDITME", 0.0),
        ("lib/url.c " * 1000, 2 / 3),
        ("\n".join(["lib/url.c", "lib/url.h", *(f"f{n}.c" for n in range(8))]), 4 / 12),
        ("\n".join(["lib/url.c", "lib/url.h", *(f"f{n}.c" for n in range(9))]), 0.0),
        (None, 0.0),
    ],
)
def test_f1_of_file_sets(answer: str | None, expected: float) -> None:
    assert grade({"output_text": answer}, {"files": ["lib/url.c", "lib/url.h"]}) == pytest.approx(expected)


def test_a_file_without_ending_counts_alone_on_its_line() -> None:
    assert grade({"output_text": "sshd_config"}, {"files": ["sshd_config"]}) == 1.0
    assert grade({"output_text": "edit the sshd_config there"}, {"files": ["sshd_config"]}) == 0.0


def test_the_way() -> None:
    def way(answer: str, *results: str, is_error: bool = False) -> float:
        trace = [{"role": "tool", "content": result, "is_error": is_error} for result in results]
        return grade_way({"output_text": answer, "trace": [{"role": "assistant", "content": answer}, *trace]}, {})

    assert way("lib/url.c") == way("lib/url.c", "lib/url.c", is_error=True) == 0.0
    assert way("lib/url.c", "./lib/url.c:3\n./b.c:1\n") == 1.0
    assert way("lib/url.c\nmade/up.c", "./lib/url.c:3") == 0.75
    assert way("", "./lib/url.c:3") == way("../", "./lib/url.c:3") == 0.5
    assert way("(no output)", "(no output)") == way("Is a directory", "grep: .: Is a directory\n[exit code 2]") == 0.5


def test_graders_are_fast_on_hostile_text() -> None:
    started = time.monotonic()
    for text in ("-" * 50_000 + "!", ":" * 50_000 + "x", "a/" * 25_000 + "\u2028", "./" * 25_000):
        sample = {"output_text": text, "trace": [{"role": "tool", "content": text}]}
        assert grade(sample, {"files": ["a.c"]}) == 0.0
        assert grade_way(sample, {}) >= 0.5
    assert time.monotonic() - started < 1


def told(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_cases_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told("grade", "test", str(CONFIG), "configs/cases/file_planning.jsonl")


# --- preparing it ----------------------------------------------------------------------------------------------------


def write_package(folder: Path, name: str, version: str) -> None:
    """A source package of three files, with a patch to each; one has no text, one only creates a file."""
    folder.mkdir(parents=True)
    code = {f"{name}/lib/{stem}.c": f"int {stem}_{name[:2]};\n" * 3 + "common\n" for stem in ("one", "two", "three")}
    described = {
        f"{stem}.patch": f"Subject: {stem}_{name[:2]} must be common, see {stem}.c\n\n"
        f"--- a/lib/{stem}.c\n+++ b/lib/{stem}.c\n@@ -1 +1 @@\n"
        for stem in ("one", "two", "three")
    }
    described["new.patch"] = "Subject: new_thing\n\n--- /dev/null\n+++ b/new.c\n@@ -0,0 +1 @@\n"
    described["bare.patch"] = "--- a/lib/one.c\n+++ b/lib/one.c\n"
    series = "# comment\n\n" + "\n".join(f"{patch} -p1" for patch in described)
    held = {f"debian/patches/{patch}": text for patch, text in described.items()}
    files = {
        f"{name}_1.orig.tar.gz": archive({**code, f"{name}/README": "common"}),
        f"{name}_1-1.debian.tar.gz": archive({**held, "debian/patches/series": series}),
    }
    lines = [f" {hashlib.sha256(data).hexdigest()} {len(data)} {file}\n" for file, data in files.items()]
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / f"{name}_1-1.dsc").write_text(
        f"Source: {name}\nVersion: {version}\nChecksums-Sha256:\n{''.join(lines)}Files:\n"
    )


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("prepare_file_planning")


@pytest.fixture(scope="module")
def prepared(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the script writes, from stand-ins for the seven packages that are already downloaded."""
    place = tmp_path_factory.mktemp("planning")
    for name, version in script.PINS.items():
        write_package(place / "debian" / name, name, version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["debian_sources"], "KEPT", place / "debian")
        for out in ("data", "again"):
            patch.setattr("sys.argv", ["prepare_file_planning", "--out", str(place / out)])
            script.main()
        yield place / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_preparing_again_writes_the_same_bytes(prepared: Path) -> None:
    assert contents(prepared) == contents(prepared.parent / "again")


def check_rows(folder: Path) -> None:
    """Nothing leaks, every gold file is in its tree, no package is in two splits, and rft loads the rows."""
    specs = asyncio.run(ShellEnvironment(ShellEnvironmentConfig(root=str(folder))).discover())
    splits = {name: load_items(folder / f"{name}.jsonl", specs) for name in SPLITS}
    for item in [*splits["train"], *splits["validation"], *splits["test"]]:
        asked = " ".join(message.content for message in item.messages)
        assert not patches.names_a_file(asked, item.row["files"]), (item.row["name"], asked)
        assert not any(path.lower() in asked.lower() for path in item.row["files"] if "/" in path or "." in path)
        assert all((folder / "trees" / item.row["tree"] / path).is_file() for path in item.row["files"])
        assert 0 < len(item.row["files"]) <= 10 and len(item.row["text"]) <= rows.MAX_TEXT_CHARS
        assert not any(message.role in ("assistant", "tool") for message in item.messages)
    found = [{item.row["source"] for item in items} for items in splits.values()]
    assert sum(map(len, found)) == len(set().union(*found))
    assert overlap(splits["train"], splits["validation"] + splits["test"]) == 0
    shown = [json.loads(line) for line in (folder / "warmup.jsonl").read_text().splitlines()]
    assert {row["source"] for row in shown} <= found[0], "demonstrations are of training packages alone"


def test_rows(prepared: Path, script: ModuleType) -> None:
    check_rows(prepared)
    held = {
        name: [json.loads(line) for line in (prepared / f"{name}.jsonl").read_text().splitlines()] for name in SPLITS
    }
    assert {name: len(lines) for name, lines in held.items()} == {"train": 9, "validation": 3, "test": 9}
    assert all(row["source"] in script.SPLITS for lines in held.values() for row in lines)
    one = next(row for row in held["test"] if row["name"] == "one.patch" and row["source"] == "curl")
    assert one["messages"][-1] == {"role": "user", "content": "Change: one_cu must be common, see"}
    assert one["files"] == ["lib/one.c"] and one["identifiers"] == ["one_cu"]
    assert sorted(contents(prepared / "trees/curl")) == ["lib/one.c", "lib/three.c", "lib/two.c"]


def test_demonstrations_judge_nothing(prepared: Path) -> None:
    """What is shown follows from the text and the tree: with other files to be found it is the same."""
    row = json.loads((prepared / "train.jsonl").read_text().splitlines()[0])
    hits = rows.Hits(contents(prepared / "trees" / row["tree"]))
    shown = rows.demonstration_of(row, hits)
    assert shown is not None and shown == rows.demonstration_of({**row, "files": ["lib/none.c"]}, hits)
    called, result, answer = shown["messages"][-3:]
    assert "grep -rci common . " in json.loads(called["tool_calls"][0]["function"]["arguments"])["command"]
    assert result["content"] == "./lib/two.c:1\n./lib/three.c:1\n./lib/one.c:1\n" and answer["content"] == "./lib/two.c"
    assert rows.demonstration_of({**row, "text": "unheard words"}, hits) is None


def test_demonstrations_are_rows_that_end_with_an_answer(prepared: Path) -> None:
    specs = asyncio.run(ShellEnvironment(ShellEnvironmentConfig(root=str(prepared))).discover())
    path = prepared / "warmup.jsonl"
    shown = load_rows(path, lambda row, name, found: parse_item(row, name, specs, found, ends_with="assistant"))
    assert [len(item.messages) for item in shown] == [5] * 9


def test_a_damaged_download_is_not_used(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sys.modules["debian_sources"]
    monkeypatch.setattr(sources, "KEPT", tmp_path / "debian")
    monkeypatch.setenv("PATH", str(tmp_path))
    write_package(tmp_path / "debian/curl", "curl", "1-1")
    assert [package.version for package in sources.source_packages({"curl": "1-1"})] == ["1-1"]
    (tmp_path / "debian/curl/curl_1.orig.tar.gz").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"there is no apt-get here\n  cure: run it on Debian"):
        sources.source_packages({"curl": "1-1"})


APT = {  # an archive that has versions 1-1 and 1-3 of curl, and lost the files of 1-3
    "apt-config": """echo "LIST='{place}/sources.list'"; echo "PARTS='{place}/none'" """,
    "apt-cache": """printf 'Package: curl\\nVersion: 1-3\\n\\nPackage: curl\\nVersion: 1-1\\n'""",
    "apt-get": """case "$*" in
*update*) exit 0;;
*curl=1-1) cp {place}/archive/curl/* .;;
*) echo 'E: 404 Not Found' >&2; exit 100;;
esac""",
}


@pytest.mark.parametrize("pin", ["1-3", "1-2", "1-1"])
def test_a_vanished_version_gives_way(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pin: str
) -> None:
    sources = sys.modules["debian_sources"]
    write_package(tmp_path / "archive/curl", "curl", "1-1")
    (tmp_path / "sources.list").write_text("deb http://example.org/debian stable main\n")
    for name, text in APT.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + text.replace("{place}", str(tmp_path)) + "\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sources, "KEPT", tmp_path / "kept")
    (package,) = sources.source_packages({"curl": pin})
    assert package.version == "1-1" and package.archive("orig").name == "curl_1.orig.tar.gz"
    assert ("curl: 1-1 in place of" in capsys.readouterr().out) == (pin != "1-1")


def test_entries_of_apt_become_source_entries(script: ModuleType) -> None:
    as_deb_src = sys.modules["debian_sources"].as_deb_src
    one_line = "# deb x\ndeb [arch=amd64 signed-by=/k] http://h/debian stable main\ndeb-src http://h/s stable main\n"
    assert as_deb_src(one_line) == one_line.replace("\ndeb [", "\ndeb-src [")
    assert as_deb_src("Types: deb deb-src\nURIs: http://h\n") == "Types: deb-src\nURIs: http://h\n"


# --- a history -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve commits after the first; number n edits f<n>.c, of which only its tree before knows the line."""
    place = tmp_path_factory.mktemp("git") / "thing"
    place.mkdir()
    identity = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z"}
    environment = {
        **os.environ,
        **identity,
        **dates,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
    }

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(place), *arguments], check=True, capture_output=True, env=environment, timeout=60
        )

    git("init", "-q")
    for number in range(12):
        (place / f"f{number}.c").write_text(f"int thing_{number};\nshared\n" + "thing\n" * number)
    git("add", ".")
    git("commit", "-qm", "start")
    for number in range(12):
        (place / f"f{number}.c").write_text("int gone;\nshared\n")
        git("commit", "-qam", f"Remove thing_{number} from f{number}.c of the shared code\n\nSigned-off-by: x")
    return place


def test_a_history_is_a_task(
    repository: Path,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for out in ("data", "again"):
        monkeypatch.setattr(
            "sys.argv", ["p", "--git", str(repository), "--out", str(tmp_path / out), "--max-commits", "10"]
        )
        script.main()
    assert contents(tmp_path / "data") == contents(tmp_path / "again")
    held = {
        name: [json.loads(line) for line in (tmp_path / f"data/{name}.jsonl").read_text().splitlines()]
        for name in SPLITS
    }
    assert [held[name][0]["files"] for name in ("test", "validation")] == [["f11.c"], ["f10.c"]], (
        "the newest is for test"
    )
    assert sorted(row["files"][0] for row in held["train"]) == sorted(f"f{number}.c" for number in range(2, 10))
    row = held["test"][0]
    assert row["messages"][-1]["content"] == "Change: Remove thing_11 from of the shared code"
    tree = tmp_path / "data/trees" / row["tree"]
    assert "thing_11" in (tree / "f11.c").read_text() and "gone" in (tree / "f10.c").read_text(), "the tree before it"
    assert (tree / "f10.c").stat().st_nlink > 1, "trees share what is the same"


def test_what_a_history_can_be_wrong_with(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["p", "--git", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"not a git repository(.|\n)*cure: name the folder of a git repository"):
        script.main()
    with pytest.raises(history.HistoryError, match="is not the id of a commit"):
        history.files_of(repository, "--output=/tmp/x")
    (only,) = planning.of_history(repository, "thing", 1)
    assert only.split == "test"


# --- the config ------------------------------------------------------------------------------------------------------


def calls(folder: Path, tree: str, *commands: str) -> list[ToolResult]:
    """The results of commands in a session as the config opens it, over trees in `folder`."""
    config = load_config(CONFIG, [f"environment.root={folder}/trees/{{item.tree}}"])

    async def story() -> list[ToolResult]:
        assert isinstance(config.environment, ShellEnvironmentConfig)
        environment = ShellEnvironment(config.environment)
        item = Item(id="i", row={"tree": tree}, messages=[Message(role="user", content="x")])
        session = await environment.open(item, "trace")
        try:
            made = [ToolCall(id="c", call_id="c", name="shell", arguments=json.dumps({"command": c})) for c in commands]
            return [await session.call(call) for call in made]
        finally:
            await session.close()

    return asyncio.run(asyncio.wait_for(story(), 60))


def test_the_shell_shows_what_the_rows_were_chosen_by(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = rows.COMMAND.format(word="common")
    found, written, others, long = calls(
        prepared, "curl", command, "echo x > lib/one.c", "ls ..; cat ../../*.jsonl ../rsync/lib/one.c", "seq 10000"
    )
    hits = rows.Hits(contents(prepared / "trees/curl"))
    assert found.output == "".join(f"./{path}:{num}\n" for path, num in hits.best("COMMON"))
    assert "Read-only file system" in written.output
    assert "int" not in others.output and "Change" not in others.output and "rsync\n" not in others.output
    assert len(long.output) < 500, "a small model reads all of it"


def test_the_config_is_light_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG, [])
    assert config.environment is not None and config.environment.type == "shell" and config.warmup is not None
    assert set(config.shadow_graders) == {"f1"} and config.training.costs.tool_calls > 0


# --- the real thing --------------------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="data/file_planning is missing: scripts/prepare_file_planning"
)


@needs_data
def test_the_real_rows() -> None:
    check_rows(DATA)
    assert (DATA / "SOURCES.json").is_file()


@needs_data
@pytest.mark.slow
def test_the_probes_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told("grade", "probe", str(CONFIG), "--items", str(DATA / "train.jsonl"))


@needs_data
@pytest.mark.slow
def test_a_grep_over_the_largest_tree_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calls(DATA, "grub2", "grep -rci overflow .")
    started = time.monotonic()
    (result,) = calls(DATA, "grub2", rows.COMMAND.format(word="overflow"))
    assert result.output.count("\n") == rows.NUM_SHOWN
    assert time.monotonic() - started < 5, "measured: 0.3 s with the opening of the sandbox"
