"""Settings: each option takes what it documents, and refuses the rest with a sentence that names what came."""

import dataclasses
import inspect
import math
import re

import pytest

import dynaexq
from dynaexq.errors import DynaExqError, SettingsError
from dynaexq.settings import DEFAULT_HALF_LIFE, OPTION_NAMES, Options, Settings, parse_bytes, resolve

SIZES = {
    "20GB": 20 * 10**9,
    "20GiB": 20 * 2**30,
    "1B": 1,
    "1.5KiB": 1536,
    "1.001KB": 1001,  # 1000.9999... in binary floating point
    "3MB": 3_000_000,
    "2TiB": 2**41,
    "24 GiB": 24 * 2**30,
    "24gb": 24 * 10**9,
    " 24 gib ": 24 * 2**30,
    1: 1,
    20 * 2**30: 20 * 2**30,
}

NOT_SIZES = [
    "GB",
    "",
    "20",
    "20 GBs",
    "20Gi",
    "2 0GB",
    "-1GB",
    "1e3MB",
    "0GB",
    "0.3B",
    0,
    -1,
    1.5,
    math.nan,
    True,
    None,
    [1],
]

BAD_TIERS = {
    "not a tuple": ("int4", "'int4'"),
    "empty": ((), "()"),
    "none": (None, "None"),
    "a set has no base": ({"int4"}, "{'int4'}"),
    "unknown": (("int4", "int5"), "'int5'"),
    "no such upgrade": (("int3", "int8"), "'int8'; take one of those"),
    "bits": ((4,), "4"),
    "descending": (("int8", "int4"), "('int8', 'int4'); did you mean ('int4', 'int8')?"),
    "twice the same": (("int4", "int4"), "('int4', 'int4'); did you mean ('int4',)?"),
    "three": (("int2", "int4", "int8"), "('int2', 'int4', 'int8')"),
}

BAD_OPTIONS = [
    ("allocation", "per-layer"),
    ("policy", "greedy"),
    ("policy", None),
    ("host_copy", "vram"),
    ("quantizer", "gptq"),
    ("group_size", 16),
    ("group_size", 64.0),
    ("group_size", "64"),
    ("hysteresis", -0.1),
    ("hysteresis", math.nan),
    ("hysteresis", math.inf),
    ("hysteresis", "0.1"),
    ("hysteresis", True),
    ("alpha", 1.0),
    ("alpha", 1.5),
    ("alpha", -0.1),
    ("alpha", math.nan),
    ("half_life", 0),
    ("half_life", -512),
    ("half_life", math.inf),
    ("half_life", "512"),
    *[
        (option, value)
        for option in ("update_interval", "max_context", "max_batch")
        for value in (0, -1, 1.5, True, "8", None)
    ],
    *[("copy_rate_limit", value) for value in (0, -1, 0.0, -0.5, 1.5, math.nan, True, "500 MBit", "fast")],
]


def refused(match: str, **options: object) -> None:
    with pytest.raises(SettingsError, match=match):
        Settings(**options)


def test_the_defaults_are_settings_and_hotness_forgets_by_tokens():
    settings = Settings()
    assert settings.tiers == settings.hbm_budget == "auto"
    assert settings.half_life == DEFAULT_HALF_LIFE
    assert settings.alpha is None


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_size_is_bytes_or_a_number_with_a_unit(size):
    assert parse_bytes(size) == Settings(hbm_budget=size).hbm_budget == SIZES[size]


@pytest.mark.parametrize("size", NOT_SIZES, ids=repr)
def test_a_budget_that_is_no_size_is_refused(size):
    refused(f"hbm_budget.*got {re.escape(repr(size))}", hbm_budget=size)


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS, ids=lambda value: repr(value).strip("'"))
def test_a_bad_value_is_refused_by_dial_and_value(option, value):
    refused(f"{option}.*got {re.escape(repr(value))}", **{option: value})


@pytest.mark.parametrize(("tiers", "came"), BAD_TIERS.values(), ids=BAD_TIERS)
def test_a_bad_ladder_is_refused_by_what_came(tiers, came):
    refused(f"tier.*got {re.escape(came)}", tiers=tiers)


def test_a_list_of_tiers_is_kept_as_a_tuple():
    assert Settings(tiers=["int4", "int8"]).tiers == ("int4", "int8")


def test_half_life_and_alpha_exclude_each_other():
    assert Settings(alpha=0.9).half_life is None
    assert Settings(alpha=0.0).alpha == 0.0
    assert Settings(half_life=100).half_life == 100
    refused("not both, got half_life=512 and alpha=0.9", half_life=512, alpha=0.9)


@pytest.mark.parametrize("options", [{"tau_h": 0.5}, {"tau_c": 0.1}, {"tau_h": 0.5, "tau_c": 0.1}], ids=str)
@pytest.mark.parametrize("policy", ["topn", "frozen"])
def test_thresholds_need_the_threshold_policy(policy, options):
    refused(
        f"got policy='{policy}', tau_h={options.get('tau_h')} and tau_c={options.get('tau_c')}",
        policy=policy,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"tau_h": 0.5}, {"tau_c": 0.1}], ids=str)
def test_the_threshold_policy_needs_both_thresholds(options):
    refused(
        f"needs both.*got tau_h={options.get('tau_h')} and tau_c={options.get('tau_c')}", policy="threshold", **options
    )


def test_an_expert_is_never_demoted_above_the_threshold_that_promotes_it():
    assert Settings(policy="threshold", tau_h=0.5, tau_c=0.5).tau_c == 0.5
    refused("tau_h must be a number of at least 0.5, got 0.2", policy="threshold", tau_h=0.2, tau_c=0.5)
    refused("tau_c must be a number of at least 0, got -1", policy="threshold", tau_h=0.2, tau_c=-1)


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, None), (0.25, 0.25), (1.0, 1.0), (10**8, 10**8), ("500MB", 5 * 10**8)], ids=repr
)
def test_a_copy_rate_limit_is_a_share_of_the_link_or_bytes_a_second(limit, kept):
    assert Settings(copy_rate_limit=limit).copy_rate_limit == kept


def test_a_policy_may_be_a_callable():
    policy = lambda score, upgraded, slots: upgraded
    assert Settings(policy=policy).policy is policy


@pytest.mark.parametrize("of", [Settings, dynaexq.DynaExqConfig])
def test_an_unknown_option_is_named_beside_what_was_probably_meant(of):
    with pytest.raises(SettingsError, match="unknown option hbm_buget, tier; did you mean hbm_budget, tiers"):
        of(tier="int4", hbm_buget="20GiB", hysteresis=0.2)


def test_an_option_under_its_old_name_is_told_the_new_one():
    with pytest.raises(SettingsError, match=r"unknown option tick_every; did you mean update_interval\?"):
        dynaexq.DynaExqConfig(tick_every=32)


@pytest.mark.parametrize("of", [Options, Settings, dynaexq.DynaExqConfig])
def test_every_option_is_a_typed_documented_field_of_the_signature(of):
    parameters = inspect.signature(of).parameters
    fields = [field for field in dataclasses.fields(of) if field.name in OPTION_NAMES]
    assert [field.name for field in fields] == list(OPTION_NAMES)
    for field in fields:
        assert parameters[field.name].default == field.default
        assert re.search(rf"\b{field.name}\b.*:", Options.__doc__)
    assert all(option in dynaexq.DynaExqConfig.__doc__ for option in OPTION_NAMES)


def test_the_first_place_that_names_an_option_decides():
    environment, stored = {"DYNAEXQ_HBM_BUDGET": "2GB"}, {"hbm_budget": "3GB", "hysteresis": 0.1}
    assert resolve({"hbm_budget": "1GB"}, stored, environment).hbm_budget == 10**9
    assert resolve({"hbm_budget": "auto"}, stored, environment).hbm_budget == "auto"
    assert resolve({}, stored, environment).hbm_budget == 2 * 10**9
    assert resolve({}, stored, {}).hbm_budget == 3 * 10**9
    assert resolve({}, {}, {}).hbm_budget == "auto"
    assert resolve({}, stored, {}).hysteresis == 0.1
    assert resolve({"hysteresis": 0.2}, stored, {}).hysteresis == 0.2


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().hysteresis = 0.5


def test_a_settings_error_is_caught_as_ours_and_as_a_value_error():
    assert issubclass(SettingsError, DynaExqError)
    assert issubclass(SettingsError, ValueError)


def test_a_configuration_takes_dials_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        dynaexq.DynaExqConfig("20GiB")
