"""Warnings point at the user's line and are given once."""

import warnings

import lamina as lm
from lamina._util.notices import Notices, warn


def test_a_warning_points_at_the_line_of_the_user():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("a fact, and its fix")
    (one,) = caught
    assert one.category is lm.LaminaWarning
    assert one.filename == __file__
    assert str(one.message) == "a fact, and its fix"


def test_each_warning_is_given_once_for_an_optimizer():
    first, second = Notices(), Notices()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first.tell("one")
        first.tell("one")
        first.tell("two", key="one more")
        first.tell("three", key="one more")
        second.tell("one")
    assert [str(each.message) for each in caught] == ["one", "two", "one"]
    assert {each.filename for each in caught} == {__file__}
