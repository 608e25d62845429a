# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.report.text import (
    NOT_MEASURED,
    change,
    change_interval,
    clip,
    duration,
    interval,
    memory,
    metric_title,
    number,
    p_value,
    percent,
    plain,
    quantity,
    trial_name,
    words,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-17, "0"), (0.64213, "0.642"), (12.0, "12.0"), (99.97, "100"), (9.996, "10.0"), (-6.666, "−6.67")],
)
def test_numbers_have_three_significant_digits_and_a_real_minus(value, text):
    assert number(value) == text


def test_large_numbers_keep_their_integer_digits():
    assert number(12345.678) == "12,346"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_number_is_not_measured(value):
    assert number(value) == NOT_MEASURED


def test_rates_are_percentages():
    assert [percent(one) for one in (0.0, 0.0083333, 0.5, 1.0, None)] == ["0%", "0.833%", "50.0%", "100%", NOT_MEASURED]


def test_a_ratio_is_printed_as_it_is():
    assert quantity(0.98123, "number") == "0.981"
    assert interval(0.95, 1.01, "number") == "0.950 to 1.01"


def test_an_interval_of_rates_names_its_unit_once():
    assert interval(0.0046, 0.0587) == "0.460 to 5.87%"


def test_a_change_carries_its_sign_and_points():
    assert [change(one) for one in (0.6333, -0.6, 0.0)] == ["+63.3 points", "−60.0 points", "0 points"]
    assert change(-0.02, "number") == "−0.0200"
    assert change_interval(-0.716, 0.011) == "−71.6 to 1.10"


def test_small_p_values_are_bounded_and_large_ones_capped():
    assert [p_value(one) for one in (1e-12, 0.0123, 1.0000001, None)] == ["< 0.001", "0.0123", "1.00", NOT_MEASURED]


def test_settings_read_as_typed():
    assert [plain(one) for one in (0.95, True, None, ["a", 2], {"x": 0.5}, [], "t")] == [
        "0.95", "yes", "none", "a, 2", "x=0.5", "none", "t",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1,023 bytes"), (8_321_499_136, "7.75 GiB"), (None, NOT_MEASURED)]
)
def test_memory_is_in_the_unit_that_suits_it(count, text):
    assert memory(count) == text


def test_durations_grow_units():
    assert [duration(one) for one in (4.1, 89.0, 125, 7260)] == ["4.10 s", "89.0 s", "2 min 5 s", "2 h 1 min"]


def test_a_trial_is_named_after_its_only_coefficient():
    assert trial_name("linear", {"coefficient": 0.4}) == "linear 0.4"
    assert trial_name("blend", {"a": 0.1, "b": 2}) == "blend a=0.1, b=2"
    assert trial_name("copy", {}) == "copy"


def test_unknown_metrics_read_as_words():
    assert metric_title("harm_rate") == "Harm rate"
    assert metric_title("toxic_share") == "Toxic share"
    assert words("") == ""


def test_long_text_is_clipped_and_the_rest_counted():
    assert clip("abcdef", 6) == ("abcdef", 0)
    assert clip("abcdef", 4) == ("abcd…", 2)
