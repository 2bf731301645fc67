"""Secrets are masked; settings with similar names are not."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.average import AveragedCheckpoint
from distft.checkpoint.manifest import Manifest, Progress
from distft.config import Settings, dump_yaml, parse, parse_yaml, redact, redact_message
from distft.config.redaction import MASK
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError


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
        ("special.hf_token=abc", f"special.hf_token={MASK}"),  # only the last part is the setting's name
        ("storage.key=abc", "storage.key=abc"),
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


_WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=36, max_size=44)
_HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
_KEYS = {  # every form of a key that is recognised by itself: name -> its text, from a random word
    "hugging face": lambda word: f"hf_{word}",
    "openai": lambda word: f"sk-proj-{word}",
    **{f"github {kind}": lambda word, kind=kind: f"gh{kind}_{word}" for kind in "opsur"},
    "github fine-grained": lambda word: f"github_pat_{word}",
    "gitlab": lambda word: f"glpat-{word}",
    **{f"slack {kind}": lambda word, kind=kind: f"xox{kind}-{word}" for kind in "abprs"},
    "aws": lambda word: f"AKIA{word[:16].upper()}",
    "aws for a session": lambda word: f"ASIA{word[:16].upper()}",
    "google": lambda word: f"AIza{word}",
    "google oauth": lambda word: f"ya29.{word}",
    "stripe": lambda word: f"sk_live_{word}",
    "nvidia": lambda word: f"nvapi-{word}",
    "npm": lambda word: f"npm_{word}",
    "pypi": lambda word: f"pypi-{word}",
    "json web token": lambda word: f"eyJ{word}.eyJ{word}.{word}",
    "bearer": lambda word: f"Bearer {word}",
    "basic": lambda word: f"Authorization: Basic {word}==",
    "private key": lambda word: f"-----BEGIN RSA PRIVATE KEY-----\n{word}\n-----END RSA PRIVATE KEY-----",
}
_NAMES = (  # of settings, headers and parameters of a URL whose value is a secret
    "password", "db_passwd", "passphrase", "passkey", "passcode", "pwd", "secret", "clientSecrets",
    "credential", "aws_credentials", "apikey", "api_key", "X-Api-Key", "access_key", "AWSAccessKeyId",
    "secret_key", "SecretKey", "private_key", "auth_key", "AccountKey", "storage_key", "shared_key",
    "signing-key", "X-Amz-Signature", "jwt", "session_cookie", "token", "hf_token", "accessToken",
    "X-Amz-Security-Token", "auth", "authorization", "bearer", "sig", "sas",
)  # fmt: skip
_PLACES = (  # where a text stands among others
    "{}",
    "before {} after",
    "s3://bucket/path and {}",
    "line one\n{}\nline three",
    "('{}',)",
    '"{}"',
)


def _shown(value: Any) -> str:
    return repr(value) + to_yaml(value)


@pytest.mark.parametrize("kind", _KEYS)
@pytest.mark.parametrize("place", _PLACES)
@given(word=_WORD)
def test_no_key_of_a_known_form_is_shown_wherever_it_stands(kind: str, place: str, word: str) -> None:
    text = place.format(_KEYS[kind](word))
    for public in (redact(text), redact({"note": [text]}), redact({text: 1}), redact_message(text)):
        assert word[:16] not in _shown(public)
        assert word[:16].upper() not in _shown(public)


@pytest.mark.parametrize("name", _NAMES)
@given(word=_WORD)
def test_no_value_of_a_secret_name_is_shown_in_data_or_in_text(name: str, word: str) -> None:
    for value in (
        {name: word},
        {"a": [{name: [word, {"b": word}]}]},
        f"{name}={word}",
        f"--{name}={word}",
        f"{name}: {word}",
        f'{{"{name}": "{word}"}}',
        f"{name}='{word} {word}'",
        f"https://host/path?a=1&{name}={word}&b=2",
    ):
        assert word not in _shown(redact(value)), value
    assert word not in redact_message(f"cannot open https://host/p?x=1&{name}={word}: refused")


_LOGINS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="/?#:"), min_size=8, max_size=20
)


@given(_LOGINS, _LOGINS, st.sampled_from(["s3", "https", "postgres", "simplecache::s3", "hdfs"]))
def test_no_login_in_a_url_is_shown_and_the_rest_of_it_is(user: str, password: str, protocol: str) -> None:
    url = f"{protocol}://{user}:{password}@bucket/path"
    for public in (redact(url), redact_message(f"{url} does not exist"), *redact({url: 0}), *redact([url])):
        assert f"{protocol}://{MASK}@bucket/path" in public
        assert user not in public.replace(protocol, "")
        assert password not in public


class Places(Settings):
    path: str
    api_key: str = "hunter2"


def test_a_configuration_for_others_has_no_secrets_and_still_parses() -> None:
    settings = Places(path="s3://me:pw@bucket/x")
    text = dump_yaml(settings, redacted=True)
    assert "hunter2" not in text
    assert "pw" not in text
    assert parse(Places, parse_yaml(text)) == Places(path=f"s3://{MASK}@bucket/x", api_key=MASK)


def test_a_wrong_setting_with_a_login_is_told_without_it() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Places, {"path": "x", "pathh": "s3://me:pw@bucket/x"})
    assert "me:pw" not in str(caught.value)


def test_an_average_names_its_sources_without_logins() -> None:
    progress = Progress(step=1)
    manifest = Manifest(run_id="a", progress=progress, config={}, written_by={}, parameters={}, files=[])
    sources: Any = [
        SimpleNamespace(path=f"s3://me:pw{i}@bucket/step_{i}", manifest=manifest, format="distft")
        for i in (1, 2)
    ]
    average = AveragedCheckpoint(sources)
    assert list(average.manifest.written_by["average_of"]) == [f"s3://{MASK}@bucket/step_{i}" for i in (1, 2)]
    assert "me:pw" not in average.summary


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["x" * 3_000_000, "x." * 1_000_000, "://x" * 200_000, "a" + " " * 500_000])
def test_a_long_text_takes_no_quadratic_time(text: str) -> None:
    assert redact(text) == text
