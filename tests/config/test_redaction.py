"""Secrets are masked; settings with similar names are not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import redact
from distft.config.redaction import MASK


@pytest.mark.parametrize(
    "name",
    [
        "password", "db_password", "PGPASSWORD_password", "hf_token", "token", "accessToken", "auth-token",
        "api_key", "wandbApiKey", "WANDB_API_KEY", "client_secret", "aws_secret_access_key",
        "aws_access_key_id", "credentials", "authorization", "private_key", "passphrase",
    ],
)  # fmt: skip
def test_settings_with_a_secret_name_are_masked(name: str) -> None:
    assert redact({"a": [{name: "hunter2"}]}) == {"a": [{name: MASK}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "bpe.model"), ("num_tokens", 3), ("tokens_seen", 10**9), ("global_batch_tokens", 8),
        ("pad_token", "<pad>"), ("bos_token_id", 1), ("token_dtype", "uint16"), ("tokens_per_s", 1.5),
        ("max_token", 7), ("key", "k"), ("author", "A. Writer"), ("secretary", "x"), ("num_kv_heads", 2),
        ("password", None), ("api_key", ""), ("keys", ["a"]), ("monkey", "x"), ("compass", "x"),
    ],
)  # fmt: skip
def test_settings_that_are_not_secret_are_kept(name: str, value: Any) -> None:
    assert redact({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://user:pw@host/path", "s3://***@host/path"),
        ("postgres://u:p@h/db?password=x&a=1", "postgres://***@h/db?password=***&a=1"),
        ("https://h/p?X-Amz-Signature=abc&token=def", "https://h/p?X-Amz-Signature=***&token=***"),
        ("hf_" + "a" * 30, MASK),
        ("use sk-proj-" + "a1" * 12 + " here", f"use {MASK} here"),
        ("AKIA" + "A" * 16, MASK),
        ("Bearer abc.def", f"Bearer {MASK}"),
        ("tracker.api_key=abc", f"tracker.api_key={MASK}"),
        ("tokenizer=x num_tokens=3 train.max_steps=5", "tokenizer=x num_tokens=3 train.max_steps=5"),
        ("user@host:path", "user@host:path"),
    ],
)
def test_secrets_inside_text_are_masked(text: str, masked: str) -> None:
    assert redact([text]) == [masked]


def test_everything_below_a_secret_name_is_masked() -> None:
    assert redact({"credentials": {"user": "me", "list": ["x", 1], "on": True}}) == {
        "credentials": {"user": MASK, "list": [MASK, MASK], "on": True}
    }


@given(
    st.recursive(st.integers() | st.text("abc /", max_size=4), lambda v: st.dictionaries(st.text("ab_"), v))
)
def test_masking_is_idempotent_and_keeps_data_without_secrets(value: Any) -> None:
    assert redact(value) == value
    secret = {"password": value, "x": value}
    assert redact(redact(secret)) == redact(secret)
