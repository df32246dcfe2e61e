"""Secrets do not get into what a run writes down: environments, texts, configs."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.cli.compose import compose
from moetrain.config import UserError
from moetrain.telemetry.redact import REDACTED, environment, looks_like_key, redact

HEX, WORD = "0123456789abcdef", string.ascii_letters + string.digits
NAMES = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD", "my_secret_thing"]
keys = st.one_of(
    st.text(HEX, min_size=40, max_size=40),
    st.text(HEX, min_size=40, max_size=40).map("local-".__add__),
    st.text(WORD, min_size=60, max_size=80).map("wandb_v1_".__add__),
    st.text(WORD, min_size=34, max_size=34).map("hf_".__add__),
    st.text(WORD, min_size=36, max_size=36).map("ghp_".__add__),
    st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=16).map("AKIA".__add__),
)
around = st.text(" \n\t\"'=:,;/()[]{}", max_size=5)


@given(st.sampled_from(NAMES), st.text(min_size=1).filter(lambda x: x not in REDACTED))
def test_of_a_suspicious_name_only_the_name_is_dumped(name: str, value: str) -> None:
    assert environment({name: value, "HOME": "/home/me"}) == {name: REDACTED, "HOME": "/home/me"}


@given(keys, around, around)
def test_a_key_is_known_by_its_shape_wherever_it_stands(key: str, before: str, after: str) -> None:
    text = f"some words{before or ' '}{key}{after or ' '}more words"
    assert key not in redact(text, {})
    assert key not in str(environment({"INNOCENT": text}))
    assert looks_like_key(key)


@given(st.text(WORD + "!$%&+/", min_size=8).filter(lambda x: x not in REDACTED), around, around)
def test_what_the_environment_keeps_secret_is_taken_out_of_texts(value: str, before: str, after: str) -> None:
    assert value not in redact(f"-{before}{value}{after}-", {"SOME_PASSWORD": value})


@given(st.text(WORD, min_size=20).filter(lambda x: any(c.isdigit() for c in x) and any(c.isalpha() for c in x)))
def test_what_a_text_calls_a_key(value: str) -> None:
    for line in (f"+api_key: {value}", f'+    "token": "{value}",', f"+export MY_SECRET={value}"):
        assert value not in redact(line, {})


def test_urls_and_private_keys() -> None:
    assert redact("https://me:hunter2@host/x.git", {}) == f"https://{REDACTED}@host/x.git"
    pem = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----"
    assert redact(f"a\n{pem}\nb", {}) == f"a\n{REDACTED}\nb"
    assert redact(pem[:50], {}) == REDACTED, "one that was cut off"


@pytest.mark.parametrize(
    "text",
    [
        "diff --git a/x.py b/x.py\nindex 01437f8..4e344d9 100644\n-    tokens = batch.tokens\n+    token: Tensor",
        "token_ids = tokenizer.encode(text)", "optim.lr=3e-4 run.name=key-value-2", "step-00000010",
        "x_TKD = key_TKD.transpose(1, 2)", "sorted(found, key=lambda change: change.step)",
    ],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    assert redact(text, {"HOME": "/home/me", "MONKEY": "short"}) == text


@pytest.mark.parametrize("name", ["wandb_project", "wandb_entity", "wandb_name"])
def test_a_key_in_the_config_is_refused_and_not_repeated(name: str) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    with pytest.raises(UserError, match=f"logging.{name} looks like an API key") as found:
        compose([f"logging.{name}='{key}'"])
    assert key not in str(found.value)
