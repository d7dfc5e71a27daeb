"""The public names: what `dir`, completion, `help` and pickle see of the package."""

import importlib
import pickle
import pkgutil
import pydoc
import re

import pytest

import lamina as lm

#: public functions that hide the package of the same name
HIDING = {"reuse", "watch"}


def test_dir_shows_the_public_names_only():
    assert set(dir(lm)) == {*lm.__all__, "__all__", "__doc__", "__version__"}
    assert not {"errors", "schedules", "annotations", "resolve", "_startup"} & set(dir(lm))


def missing(doc: str) -> list[str]:
    """Return the public names that a text does not have."""
    return sorted(set(lm.__all__) - set(re.findall(r"\w+", doc)))


def test_help_begins_with_an_index_of_all_names():
    assert lm.__doc__ is not None
    assert missing(lm.__doc__) == []
    assert missing(lm.__doc__.replace("early_stop", "")) == ["early_stop"]
    assert max(map(len, lm.__doc__.splitlines())) <= 100
    shown = pydoc.plain(pydoc.render_doc(lm))
    assert shown.index("Looking before training") < shown.index("class Adam")


def test_the_index_has_no_name_that_is_gone():
    assert lm.__doc__ is not None
    index = lm.__doc__.split("explains one of them.")[1].split("Imported by name")[0]
    listed = {
        name
        for line in index.splitlines()
        if line.startswith("    ")
        for name in re.split(r"\s{2,}", line.strip())[0].split(", ")
    }
    assert listed <= {*lm.__all__, "optim"}


def test_no_public_name_hides_a_package():
    packages = {module.name for module in pkgutil.iter_modules(lm.__path__)}
    hidden = {
        name
        for name in packages & set(lm.__all__)
        if getattr(lm, name) is not importlib.import_module(f"lamina.{name}")
    }
    assert hidden == HIDING


@pytest.mark.parametrize("name", [name for name in lm.__all__ if callable(getattr(lm, name))])
def test_public_names_can_be_pickled(name):
    value = getattr(lm, name)
    assert pickle.loads(pickle.dumps(value)) is value
