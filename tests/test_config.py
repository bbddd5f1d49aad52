"""A session's arguments: read once, held to each other, and written down again."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from millpond import BudgetError, MillpondError, PolicyError, Session, SessionConfig, policies
from millpond.policies.methods.mikv import MiKV
from tests.cache.text_model import Newest
from tests.models.tiny import tiny

CONFIGS = [
    SessionConfig(),
    SessionConfig(budget="64MiB", policy="infinipot-v:alpha=0.3:thresholds=(1, 2, 4)", positions="absolute"),
    SessionConfig(policy="keydiff+diversity", system="Be brief.", reserve_tokens=40),
    SessionConfig(policy="mikv:base=keydiff:bits=2", admission="curvestream", recent_frames=3),
    SessionConfig(policy="rekv", host_budget="2GB", host_path="host"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_comes_back_from_plain_values(config: SessionConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert SessionConfig.from_dict(values) == config
    assert policies.read(values["policy"]) == config.policy


def test_what_is_written_is_what_it_means() -> None:
    config = CONFIGS[1]
    assert config == SessionConfig(budget=64 << 20, policy=config.policy, positions="absolute")
    assert config.to_dict()["policy"] == "infinipot-v:alpha=0.3:thresholds=(1, 2, 4)"
    assert SessionConfig().to_dict()["policy"] == "infinipot-v"
    assert (CONFIGS[4].host_budget, CONFIGS[4].host_path) == (2_000_000_000, Path("host"))


def test_a_policy_that_one_word_cannot_tell_is_not_written() -> None:
    @dataclass(frozen=True)
    class Stranger(Newest):
        name = "infinipot-v"

    for policy in (Newest(), Stranger(), MiKV(base=policies.get("keydiff"))):
        with pytest.raises(PolicyError, match="cannot be written in one word"):
            SessionConfig(policy=policy).to_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"positions": "relative"}, MillpondError, "positions must be 'absolute' or 'contiguous', not 'relative'"),
        ({"policy": "nobody"}, PolicyError, "no policy is called 'nobody'"),
        ({"budget": "much"}, BudgetError, "cannot read 'much' as a size"),
        ({"budget": 0}, BudgetError, "at least one byte"),
        ({"recent_frames": -1}, MillpondError, "recent_frames must be a whole number, at least 0, not -1"),
        ({"host_budget": "1MiB"}, PolicyError, "host memory do not go together: leave out host_budget and host_path"),
        ({"host_path": "."}, PolicyError, "host memory do not go together"),
        (
            {"policy": "infinipot-v-released", "admission": "curvestream"},
            PolicyError,
            "an admission do not go together: it thins frames",
        ),
        ({"policy": None}, PolicyError, "policy must be a name or a Policy, not None"),
        ({"policy": policies.get("keydiff").__class__}, PolicyError, "policy must be a name or a Policy, not <class"),
        ({"policy": "mikv:base=3"}, PolicyError, "mikv: base must be a name or a Policy, not 3"),
        ({"admission": 3}, PolicyError, "admission must be a name or an Admission, not 3"),
        ({"recent_frames": True}, MillpondError, "recent_frames must be a whole number, at least 0, not True"),
        ({"reserve_tokens": -1}, MillpondError, "reserve_tokens must be a whole number, at least 0, not -1"),
        ({"reserve_tokens": "40"}, MillpondError, "reserve_tokens must be a whole number, at least 0, not '40'"),
        ({"system": 3}, MillpondError, "system must be text, not 3"),
        ({"policy": "rekv", "host_budget": 1 << 20, "host_path": 3}, MillpondError, "host_path must be a path, not 3"),
        ({"sistem": ""}, MillpondError, "a session has no argument 'sistem'; it has: budget, policy"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SessionConfig.from_dict(arguments)


def test_a_session_is_made_from_a_config_or_from_its_fields() -> None:
    family, config = tiny("qwen2_vl"), SessionConfig(policy="keydiff", recent_frames=2)
    session = Session(family, config, budget="2MiB")
    assert session.config == Session(family, budget="2MiB", policy="keydiff", recent_frames=2).config
    session.resize("3MiB")
    assert (
        session.config == session.fork().config == SessionConfig(budget=3 << 20, policy=config.policy, recent_frames=2)
    )
    assert session.plan == Session(family, session.config).plan
    with pytest.raises(TypeError, match="sistem"):
        Session(family, budget="2MiB", sistem="")  # type: ignore[call-arg]
    with pytest.raises(MillpondError, match="arguments by name, or a SessionConfig first, not '2MiB'"):
        Session(family, "2MiB")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="needs a budget"):
        Session(family, config)
