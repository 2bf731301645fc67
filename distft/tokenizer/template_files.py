"""Where chat templates are: in the files of a tokenizer, or in a file of their own. Does not import Jinja."""

from collections.abc import Mapping
from typing import Any

from distft import storage
from distft.errors import DataError
from distft.storage import AnyPath
from distft.tokenizer.files import CHAT_TEMPLATE_FILE, CONFIG_FILE, json_object, read_limited

DEFAULT, TOOL_USE = "default", "tool_use"  # names, where a model has several templates
MAX_TEMPLATE_BYTES = 1 << 20  # the longest in use have 30 KiB
PLAIN_ROLES = ("system", "user", "assistant")  # those of the template below
# For a tokenizer without one. No special tokens but bos and eos, so that any vocabulary can write it.
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] or message['content'] is not string %}
        {{- raise_exception('the plain template has the roles system, user and assistant, and no tools: set '
            'chat.template') }}
    {%- endif %}
    {{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
    {{- (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant:\\n' }}
{%- endif %}
"""


def templates_of_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """The templates in a tokenizer's files, by name: `chat_template.jinja`, else tokenizer_config.json.

    Raises `DataError` for what transformers would not have written.
    """
    if CHAT_TEMPLATE_FILE in files:
        return {DEFAULT: template_text(CHAT_TEMPLATE_FILE, files[CHAT_TEMPLATE_FILE])}
    if CONFIG_FILE not in files:
        return {}
    found = json_object(CONFIG_FILE, files[CONFIG_FILE]).get("chat_template")
    if found is None:
        return {}
    named = {DEFAULT: found} if isinstance(found, str) else _named(found)
    if named is None or not all(isinstance(text, str) for item in named.items() for text in item):
        raise DataError(
            f"{CONFIG_FILE}: chat_template must be a text, or a list of objects with name and template."
        )
    return named


def _named(found: Any) -> dict[Any, Any] | None:
    try:
        return {item["name"]: item["template"] for item in found}
    except (TypeError, KeyError):
        return None


def files_of_templates(templates: Mapping[str, str]) -> dict[str, bytes]:
    """The default template as the file that `templates_of_files` and transformers read."""
    return {CHAT_TEMPLATE_FILE: templates[DEFAULT].encode()} if DEFAULT in templates else {}


def template_text(path: AnyPath, data: bytes) -> str:
    """The template that `data`, the content of `path`, is. Raises `DataError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.") from None


def read_template(path: AnyPath) -> str:
    """The template in a file, or in a directory of transformers. Raises `DataError`."""
    try:
        if not (storage.exists(path) and storage.is_directory(path)):
            return template_text(path, read_limited(path, MAX_TEMPLATE_BYTES, subject="chat template "))
        files = {}
        for name in (CHAT_TEMPLATE_FILE, CONFIG_FILE):
            if storage.exists(storage.join(path, name)):
                files[name] = read_limited(storage.join(path, name), MAX_TEMPLATE_BYTES)
        found = templates_of_files(files)
    except OSError as error:
        raise DataError(f"chat template {path} cannot be read: {error}.") from error
    if DEFAULT not in found:
        raise DataError(
            f"{path} has no chat template: neither {CHAT_TEMPLATE_FILE} nor one in {CONFIG_FILE}."
        )
    return found[DEFAULT]
