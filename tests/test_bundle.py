"""Bundles: what is in them, how they go on, what they refuse, and that one installs where there is no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
from bundling import a_model, a_project, a_wheel, an_index, an_order
from loopback import without_network

from rft.bundle import install
from rft.bundle.making import make, take_order
from rft.bundle.target import DEFAULT_GLIBC, Target, parse_target
from rft.errors import UserError, WorldError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here asks an index: pip gets `index`, a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project, a model, data, an index and the bundle of them; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    an_index(folder / "index")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"NO_INDEX": "1", "CONFIG_FILE": os.devnull, "FIND_LINKS": str(folder / "index")}.items():
            patch.setenv(f"PIP_{name}", value)
        make(an_order(folder), lambda text: None)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The bundle, to be changed."""
    return Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))


def installed(bundle: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(bundle / "install"), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def names_of(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_was_asked_and_links_are_files(made: Path) -> None:
    bundle = made / "bundle"
    held = names_of(bundle)
    assert {"install", "install.py", "project.tar", "bundle.json", "MANIFEST"} <= held
    assert {"models/tiny/config.json", "models/tiny/model.safetensors", "data/rows.jsonl"} <= held
    assert not (bundle / "models/tiny/model.safetensors").is_symlink()
    wheels = {name.partition("/")[2].partition("-py3")[0] for name in held if name.startswith("wheels/")}
    assert wheels == {"alpha-1.0", "beta-2.0.post1", "torch-2.13.0+cpu", "transformers-5.17.0", "from_source-0.3"}
    with tarfile.open(bundle / "project.tar") as archive:
        assert archive.getmember("rft/envs").issym(), "the checkout's own links stay links"
        assert "scripts/setup" in archive.getnames()


def test_the_manifest_is_one_of_sha256sum_and_names_everything_else(made: Path) -> None:
    bundle = made / "bundle"
    result = subprocess.run(["sha256sum", "--quiet", "-c", "MANIFEST"], cwd=bundle, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert install.listed(bundle).keys() == names_of(bundle) - {"MANIFEST", ".rft-bundle"}


def test_the_real_checkout_is_carried_without_what_is_made_in_it(tmp_path: Path) -> None:
    from rft.bundle.contents import checkout, pack_project

    pack_project(checkout(), tmp_path / "project.tar", {"constraints/cuda.txt": b"torch==1\n"})
    with tarfile.open(tmp_path / "project.tar") as archive:
        names = archive.getnames()
        replaced = archive.extractfile("constraints/cuda.txt")
        assert replaced is not None and replaced.read() == b"torch==1\n"
    assert {"rft/cli/offline.py", "trainers/grpo.py", "configs/quickstart.yaml", "scripts/setup", "LICENSE"} <= {*names}
    assert len(names) == len({*names})
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "models", "data", "runs"))]


# --- going on --------------------------------------------------------------------------------------------------------


def test_an_interrupted_bundle_is_not_installed_and_goes_on(made: Path, copy: Path, tmp_path: Path) -> None:
    for name in ("project", "tiny"):
        (tmp_path / name).symlink_to(made / name)
    shutil.copytree(made / "index", tmp_path / "index", ignore=shutil.ignore_patterns("beta*", "transformers*"))
    before = (copy / "MANIFEST").read_bytes()
    next((copy / "wheels").glob("alpha-*")).unlink()
    (copy / "data/rows.jsonl").unlink()
    (copy / "wheels/.downloading-old").mkdir()
    (copy / "wheels/gamma-1.0-py3-none-any.whl").write_bytes(b"of an earlier state")

    def interrupt(text: str) -> None:
        if text.startswith("copying"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(an_order(tmp_path), interrupt)
    refused = installed(copy, str(tmp_path / "there"))
    assert refused.returncode == 1 and "is not complete: it has no MANIFEST" in refused.stderr
    assert not (tmp_path / "there").exists()
    make(an_order(tmp_path), lambda text: None)  # the index lacks wheels that are there already
    assert (copy / "MANIFEST").read_bytes() == before
    assert not (copy / "wheels/.downloading-old").exists()


def test_a_bundle_made_again_holds_what_is_asked_now(made: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "project").symlink_to(made / "project")
    other = a_model(tmp_path / "other")
    make(an_order(tmp_path, models=[other]), lambda text: None)
    assert {name for name in names_of(copy) if name.startswith("models")} == {
        "models/other/config.json",
        "models/other/model.safetensors",
    }


def test_two_cannot_make_one_bundle(made: Path, copy: Path, tmp_path: Path) -> None:
    import fcntl

    for name in ("project", "tiny"):
        (tmp_path / name).symlink_to(made / name)
    fd = os.open(copy, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(WorldError, match="made by another process"):
        make(an_order(tmp_path), lambda text: None)
    os.close(fd)
    assert (copy / "MANIFEST").exists()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (("gpu", None, "2.31"), "--target: no target is called gpu"),
        (("cpu", "3.9", "2.31"), "--python: rft needs Python 3.11 or newer, not 3.9"),
        (("cpu", "three", "2.31"), "--python: 'three' is no version"),
        (("cpu", None, "new"), "--glibc: 'new' is no version"),
        (("cuda", "3.99", "2.31"), "--python: what CUDA builds need is resolved by pip"),
    ],
)
def test_targets_that_cannot_be_are_refused(asked: tuple[str, str | None, str], problem: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_target(*asked)
    assert str(refused.value).startswith(problem)
    assert "cure: " in str(refused.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("full", "is not empty and no bundle"),
        ("file", "is a file"),
        ("bare", "--model .*bare: holds no config.json"),
        ("none", "--model .*none: no such folder"),
        ("gone", "--data .*gone: no such file or folder"),
        ("torn", "is a link to nothing"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "bare").mkdir()
    (a_model(tmp_path / "torn") / "model.safetensors").unlink()
    (tmp_path / "torn/model.safetensors").symlink_to("nowhere")
    out = tmp_path / (name if name in ("full", "file") else "out")
    models = [tmp_path / name] if name in ("bare", "none", "torn") else []
    data = [tmp_path / name] if name == "gone" else []
    with pytest.raises(UserError, match=problem):
        take_order(out, parse_target("cpu", None, DEFAULT_GLIBC), models, data, a_project(tmp_path / "project"))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/letter.txt").read_text() == "mine"


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    models = [a_model(tmp_path / "a/same"), a_model(tmp_path / "b/same")]
    with pytest.raises(UserError, match="its place in the bundle, models/same, is taken"):
        an_order(tmp_path, models=models)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(UserError, match=r"0.1 GB of disk are free, the bundle needs about 1.5 GB"):
        an_order(tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_the_command_line_refuses_in_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rft", "bundle", str(tmp_path / "out"), "--target", "tpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "error: --target: no target is called tpu\n  cure: --target cpu, or --target cuda\n"


def test_a_package_without_a_wheel_for_the_target_is_named(tmp_path: Path) -> None:
    index = an_index(tmp_path / "index")
    a_project(tmp_path / "project", {"only-new": "1.0"})
    a_wheel(index, "only-new", "1.0", tag="py3-none-manylinux_2_99_x86_64")
    with pytest.raises(WorldError) as refused:
        make(an_order(tmp_path), lambda text: None)
    assert "glibc 2.31: only-new==1.0" in str(refused.value)
    assert "a newer --glibc" in str(refused.value)
    assert not (tmp_path / "bundle/MANIFEST").exists()


def test_wheels_are_those_of_the_other_python(tmp_path: Path) -> None:
    index = an_index(tmp_path / "index")
    a_project(tmp_path / "project", {"native": "1.0"})
    for tag in ("cp311-cp311-manylinux_2_17", "cp398-cp398-manylinux_2_17", "cp398-cp398-manylinux_2_99"):
        a_wheel(index, "native", "1.0", tag=f"{tag}_{os.uname().machine}")
    facts = make(an_order(tmp_path, python="3.98"), lambda text: None)
    (wheel,) = (tmp_path / "bundle/wheels").iterdir()
    assert wheel.name == f"native-1.0-cp398-cp398-manylinux_2_17_{os.uname().machine}.whl"
    assert facts.needs_glibc == (2, 17)
    result = installed(tmp_path / "bundle", str(tmp_path / "there"))
    assert result.returncode == 2
    assert "needs Python 3.98 with venv;" in result.stderr and "cure: " in result.stderr


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a-1-cp38-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_34_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_aarch64.whl", False),
        ("a-1-cp311-cp311-macosx_11_0_arm64.whl", False),
    ],
)
def test_what_fits_a_target(name: str, fits: bool) -> None:
    assert Target("cpu", (3, 11), "x86_64", (2, 31)).fits(name) is fits


# --- installing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models/tiny/model.safetensors", "models/tiny/model.safetensors differs from its checksum"),
        ("wheels/alpha-1.0-py3-none-any.whl", "wheels/alpha-1.0-py3-none-any.whl differs from its checksum"),
    ],
)
def test_a_changed_byte_is_named_before_anything_is_written(copy: Path, tmp_path: Path, name: str, said: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[100] ^= 1
    (copy / name).write_bytes(data)
    result = installed(copy, str(tmp_path / "there"))
    assert result.returncode == 1
    assert said in result.stderr and "cure: copy these files again" in result.stderr
    assert not (tmp_path / "there").exists()


def test_missing_files_are_named(copy: Path) -> None:
    (copy / "data/rows.jsonl").unlink()
    (copy / "project.tar").unlink()
    result = installed(copy, "--check")
    assert result.returncode == 1
    assert "install: data/rows.jsonl is missing; project.tar is missing" in result.stderr


def test_a_whole_bundle_passes_the_check_and_writes_nothing(made: Path, tmp_path: Path) -> None:
    result = installed(made / "bundle", "--check", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "every file is as it was written" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.98"}, "this bundle is for Python 3.98, and this is"),
        ({"machine": "s390x"}, "this bundle is for Linux on s390x"),
        ({"needs_glibc": [2, 99]}, "its wheels need glibc 2.99, and this system has"),
    ],
)
def test_another_machine_is_refused(made: Path, change: dict[str, object], said: str) -> None:
    facts = json.loads((made / "bundle/bundle.json").read_text())
    with pytest.raises(SystemExit) as refused:
        install.check_machine(facts | change)
    assert said in str(refused.value) and "cure: " in str(refused.value)


def test_a_disk_that_is_too_small_is_told(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(SystemExit, match=r"0.1 GB of disk are free at .*, installing needs 0.3 GB"):
        install.check_disk(made / "bundle", tmp_path / "there")


def test_a_folder_with_something_else_in_it_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    result = installed(made / "bundle", str(tmp_path))
    assert result.returncode == 1
    assert "is not empty and not an installation of this bundle" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_it_installs_without_a_network_proves_the_result_and_does_so_again(made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made / "bundle", tmp_path / "a stick/bundle"))
    command = without_network(["sh", str(bundle / "install")])
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "PYTHON": sys.executable}
    (tmp_path / "home").mkdir()
    for _ in range(2):  # the second finds everything
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert result.returncode == 0, result.stderr
        assert "install: rft is in" in result.stdout and "check-offline" in result.stdout
    there = tmp_path / "home/rft"
    assert (there / "rft/envs").is_symlink() and os.access(there / "scripts/setup", os.X_OK)
    assert (there / "models/tiny/model.safetensors").read_bytes() == (made / "tiny/model.safetensors").read_bytes()
    code = "import alpha, torch, transformers, rft.config, importlib.metadata as m; print(m.version('torch'))"
    python = [there / ".venv/bin/python", "-c", code]
    found = subprocess.run(python, capture_output=True, text=True, timeout=300, env=environment, cwd=there)
    assert found.stdout.strip() == "2.13.0+cpu", found.stderr
    stamp = json.loads((there / ".venv/rft-setup.json").read_text())
    assert "cpu" in stamp, "scripts/setup has nothing left to do there"


@pytest.mark.slow
def test_for_cuda_pip_resolves_and_the_bundle_installs_that(tmp_path: Path) -> None:
    a_wheel(an_index(tmp_path / "index"), "alpha", "1.1")  # newer than what was tested
    facts = make(an_order(tmp_path, "cuda"), lambda text: None)
    assert facts.target == "cuda"
    wheels = {path.name.partition("-py3")[0] for path in (tmp_path / "bundle/wheels").iterdir()}
    assert wheels == {"alpha-1.0", "beta-2.0.post1", "torch-2.13.0", "transformers-5.17.0", "from_source-0.3"}
    there = tmp_path / "there"
    result = installed(tmp_path / "bundle", str(there), PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    pinned = (there / "constraints/cuda.txt").read_text().splitlines()[1:]
    assert pinned == ["alpha==1.0", "beta==2.0.post1", "from-source==0.3", "torch==2.13.0", "transformers==5.17.0"]
    again = subprocess.run([sys.executable, there / "scripts/setup"], capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stdout) == (0, ""), "scripts/setup has nothing left to do there"


@pytest.mark.slow
def test_builds_without_cuda_are_refused_for_cuda(tmp_path: Path) -> None:
    index = an_index(tmp_path / "index")
    root = a_project(tmp_path / "project")
    a_wheel(index, "vision", "1.0")
    a_wheel(index, "vision", "1.0+cpu")
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace('"beta"', '"vision"'))
    with pytest.raises(UserError, match=r"pip chose builds without CUDA: vision==1.0\+cpu"):
        make(an_order(tmp_path, "cuda"), lambda text: None)
