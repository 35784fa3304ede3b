"""Makes and finds parts of a `tokenizer.json`, the format of the tokenizers library."""

from collections.abc import Mapping
from typing import Any


def special_token(number: int, name: str) -> dict[str, Any]:
    """Returns a special added token, whose name is searched for before a text is normalized."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": name, **flags, "special": True}


def beginning(tokens: Mapping[str, int]) -> dict[str, Any]:
    """Returns a post-processor that puts special tokens before each text.

    Args:
      tokens: ids of the special tokens, by name.
    """
    begin = [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens]
    first, second = ({"Sequence": {"id": id, "type_id": kind}} for id, kind in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, *begin, second],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in tokens.items()
        },
    }


def without_space(described: Any) -> Any:
    """Returns a tokenizer.json, or a part of it, changed so that it puts no space before a text."""
    if isinstance(described, list):
        return [without_space(one) for one in described if not _prepends(one)]
    if not isinstance(described, dict):
        return described
    if _prepends(described):
        return None
    made = {
        key: value if key in ("model", "added_tokens") else without_space(value)
        for key, value in described.items()
    }
    if made.get("type") == "Metaspace":
        made["prepend_scheme"] = "never"
    if made.get("type") == "ByteLevel":
        made["add_prefix_space"] = False
    return made


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


def decoders(described: Any) -> list[dict[str, Any]]:
    """Returns a decoder of a tokenizer.json, and all decoders nested in it."""
    if not isinstance(described, dict):
        return []
    inner = described.get("decoders") or ()
    return [described, *(part for one in inner for part in decoders(one))]


def split_patterns(described: Any) -> list[str]:
    """Returns the regular expressions whose matches a pre-tokenizer splits out of a text.

    They include those of nested pre-tokenizers.
    """
    if not isinstance(described, dict):
        return []
    inner = described.get("pretokenizers") or ()
    found = [pattern for one in inner for pattern in split_patterns(one)]
    if described.get("type") == "Split" and described.get("behavior") == "Isolated":
        found.append(described["pattern"].get("Regex", ""))
    return [pattern for pattern in found if pattern]
