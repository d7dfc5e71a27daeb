"""Which versions are supported: bounds with reasons, which are tried and named in errors."""

import re
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lamina import __version__, errors
from lamina._util import compat
from lamina.errors import LaminaError, MissingExtraError, require

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
RUNTIME = [*PROJECT["dependencies"]]
OPTIONAL = [
    each
    for extra, listed in PROJECT["optional-dependencies"].items()
    for each in listed
    if extra not in ("demo", "dev", "docs") and not each.startswith("lamina[")
]


def bound(requirement):
    name, found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    return name, found


def pinned(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.replace("_", "-").lower(): version for name, version in pins}


def releases(changelog):
    return re.findall(r"^## \[([^\]]+)\](?: - ([\d-]+))?$", changelog, re.MULTILINE)


def test_the_version_is_that_of_the_newest_release_in_every_text():
    unreleased, newest, *_ = releases((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert unreleased == ("Unreleased", "")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r"^version: (.*)\ndate-released: (.*)$", citation, re.MULTILINE)
    assert newest == cited.groups()
    assert newest[0] == __version__


def test_canary_a_release_without_a_date_or_out_of_place_is_seen():
    assert releases("## [Unreleased]\n\n## [0.2.0] - 2026-11-26\n### Added\n") == [
        ("Unreleased", ""),
        ("0.2.0", "2026-11-26"),
    ]
    assert releases("# [Unreleased]\n## 0.2.0\n") == []


def test_every_requirement_has_a_lower_bound():
    for listed in PROJECT["optional-dependencies"].values():
        for each in listed:
            assert each.startswith("lamina[") or bound(each)
    assert all(bound(each) for each in RUNTIME)


@pytest.mark.parametrize("requirement", RUNTIME + OPTIONAL)
def test_every_bound_of_what_users_install_has_its_reason(requirement):
    assert re.search(rf'^    "{re.escape(requirement)}",  # \S.{{15,}}$', TEXT, re.MULTILINE)


@pytest.mark.parametrize("requirement", RUNTIME + OPTIONAL)
def test_the_oldest_versions_are_the_ones_that_are_tried(requirement):
    name, oldest = bound(requirement)
    if name == "lightning":  # needs a process of its own; only its newest is tried
        return
    version = pinned("constraints-oldest.txt")[name]
    assert version.removesuffix(".0").startswith(oldest)


@pytest.mark.parametrize("requirement", RUNTIME + OPTIONAL)
def test_the_newest_versions_are_within_the_bounds(requirement):
    name, oldest = bound(requirement)
    assert errors.release_of(pinned("constraints.txt")[name]) >= errors.release_of(oldest)


def test_the_versions_that_are_checked_at_run_time_are_the_bounds():
    bounds = dict(bound(each) for each in OPTIONAL)
    assert bounds == errors.OLDEST


def test_the_python_that_is_promised():
    assert PROJECT["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Python 3.11" in readme
    assert f"torch {dict(map(bound, RUNTIME))['torch']}" in readme


@pytest.mark.skipif(Path(sys.prefix).name != ".venv-oldest", reason="about make test-oldest")
def test_the_oldest_versions_are_installed():
    assert sys.version_info[:2] == (3, 11)
    for name, version in pinned("constraints-oldest.txt").items():
        assert metadata.version(name) == version, name


# ---------------------------------------------------------------------- a package that is too old


@pytest.mark.parametrize("package", errors.OLDEST)
@pytest.mark.parametrize("version", ["0.9", "0.9.0rc1", "0"])
def test_a_package_that_is_too_old_is_named_before_it_is_imported(package, version, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    monkeypatch.setattr("importlib.import_module", lambda _: pytest.fail("imported"))
    oldest = errors.OLDEST[package]
    with pytest.raises(MissingExtraError) as told:
        require(f"{package}.part", "cli", "The command line")
    assert str(told.value) == (
        f"The command line needs {package} {oldest} or newer, but {version} is installed. Update "
        f"it with: pip install --upgrade '{package}>={oldest}'"
    )


@pytest.mark.parametrize("package", errors.OLDEST)
def test_a_local_or_later_version_is_taken(package, monkeypatch):
    for version in (errors.OLDEST[package], errors.OLDEST[package] + ".0+cu130", "999.dev1"):
        monkeypatch.setattr(metadata, "version", lambda _, version=version: version)
        assert errors._check_version(package, "A test") is None


def test_versions_are_compared_as_numbers():
    assert errors.release_of("2.13.0+cpu") == [2, 13, 0]
    assert errors.release_of("10.1rc2") == [10, 1]
    assert errors.release_of("unknown") == []
    assert errors.release_of("2.10") > errors.release_of("2.9.1")


def test_the_command_line_names_an_old_package_in_one_line(monkeypatch, capsys):
    from lamina.cli import main

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.9" if name == "typer" else real(name))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("lamina: The command line needs typer 0.16 or newer")


# -------------------------------------------------------------------------- torch's own versions


class Old:
    """A scheduler as torch's were before 2.9."""

    def __init__(self):
        self._step_count, self.epochs = 3, []

    def step(self, epoch=None):
        warnings.warn("the epoch is deprecated", UserWarning, stacklevel=2)
        self._step_count += 1
        self.epochs.append(epoch)


class New(Old):
    def _update_lr(self, epoch=None):
        self.epochs.append(("moved", epoch))


def test_a_scheduler_is_moved_without_counting_a_step():
    old, new = Old(), New()
    for scheduler in (old, new):
        compat.update_lr(scheduler, 0)
        compat.update_lr(scheduler)
        assert scheduler._step_count == 3
    assert old.epochs == [0, None]
    assert new.epochs == [("moved", 0), ("moved", None)]


def test_torchs_schedulers_move_as_in_its_own_sequence():
    def rates(library, move):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = library.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        move(scheduler)
        return optimizer.param_groups[0]["lr"], scheduler.last_epoch

    schedulers = torch.optim.lr_scheduler
    assert rates(schedulers, lambda each: compat.update_lr(each, 0)) == (1.0, 0)
    assert rates(schedulers, compat.update_lr) == (0.0625, 4)


def test_what_this_torch_lacks_says_since_when_it_is_there():
    if hasattr(torch.optim, "swap_in_optimizer_params_and_state"):
        ours = compat.swap_in_optimizer_params_and_state
        assert ours is torch.optim.swap_in_optimizer_params_and_state
    else:
        with pytest.raises(LaminaError, match=r"came with torch 2\.13, but this is torch"):
            compat.swap_in_optimizer_params_and_state(None)


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.13.0+cpu", "2.14.1"])
def test_a_run_notes_the_build_of_torch(version, monkeypatch):
    from lamina.training.run_folder import versions

    monkeypatch.setattr(torch, "__version__", version)
    assert versions()["torch"] == version


def test_the_version_of_a_package_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(metadata, "version", lambda name: read.append(name) or "99.0")
    for _ in range(3):
        require("filelock", "train", "this test")
        assert errors.version_of("accelerate") == "99.0"
    assert sorted(read) == ["accelerate", "filelock"]
