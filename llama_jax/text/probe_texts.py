"""Texts that tokenizers often encode differently; none contains the name of a special token."""

_LETTERS = (
    "naïve café Straße ÀÉÎ ﬁ ﬀ ½ ² ① Ⅷ ㎏ ｆｕｌｌ ﾊﾝ ﾊﾞ ẛ̣ ǆ İı ſ µ Å ﷺ é e\u0301 e\u0323\u0301 "
    "q\u0307\u0323 ﬁ\u0301 \u0344 a\u0308\u0304 ṩ s\u0323\u0307 각 \u1100\u1161\u11a8 \u1100\u1161 "
    "日本語 中文字符 漢字かな交じり 한국어 العربية עברית हिन्दी ไทย Ελληνικά русский Việt ngữ"
)
_SIGNS = (
    "🦙 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷 1\ufe0f\u20e3 ☃\ufe0f ❤ \U0001f9d1\u200d\U0001f680 "
    "\U0010ffff “quotes” ‘x’ «y» – — … ‰ € £ ™ © ☺ ∑∫√≤≠ →⇒ ▁ \u2581\u2581 _ __ ~ ～ ` ´"
)
_SPACES = (
    "\u00a0 \u2000 \u2003\u2009 \u200b \u200c \u200d \u200e \u202e \u2028 \u2029 \u2060 \u3000 "
    "\ufeff \u00ad \u0085 \u1680 \u180e \u205f"
)
_CODE = (
    'def f(x, *, y=1_000):\n\t"""Doc."""\n    return {**x, \'k\': [y] * 2}  # why?\n\n\nclass A:\n'
    "        if a!=b and not(c): #\n            x += 1;y = '\\n'\n\n\n    @property\n"
)
_PLAIN = (
    "Hello, world!  It's   2023, they're 1234567 times\t\tbetter.\r\n\r\nDON'T  I'LL x^2 + y_3 <= "
    "1e-10 http://a.b/c?d=e&f=%20#g user@example.com 3.14159 -0x7FFF 0123456789 (a)[b]{c}<d>/e\\f|g"
)
_EDGES = (
    *(
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\0",
        "a\0b",
        "\x01\x02\x1b\x7f",
        " \n \n ",
    ),
    *(
        "\u2581",
        "\u2581\u2581",
        " \u2581",
        "\u2581 ",
        "\u2581a",
        "a\u2581b",
        " \u2581 a \u2581 ",
        "a\u2581 ",
    ),
    *("a", " a", "  a", "a ", "a  ", " a ", "   a  b   c    ", "a\nb", "a \n b", "\ta\t", "  \ta"),
    *(
        "0",
        "00",
        "1 2",
        "<0x0A>",
        "<0x41",
        "0x0A>",
        "<",
        "<>",
        "<|x|>",
        "[x]",
        "\u0301",
        " \u0301a",
    ),
    *(
        "\u200d",
        "\ufeff",
        "\ufeffa",
        "\ufffd",
        "\ufdd0",
        "\U000e0001",
        "é" * 40,
        "日" * 40,
        "🦙" * 9,
    ),
    *("a" * 300, "ab" * 200, "aab" * 100, "1" * 100, "-" * 77, "=" * 200, "xyz" * 500, "\n" * 33),
)


def _texts() -> tuple[str, ...]:
    long = (_LETTERS, _SIGNS, _SPACES, _CODE, _PLAIN)
    words = [word for text in (_LETTERS, _SIGNS, _PLAIN) for word in text.split(" ")]
    marks = [f"a{mark}b {mark} c" for mark in _SPACES.split(" ")]
    runs = [
        before + " " * count + after
        for count in range(1, 70)
        for before, after in (("", ""), ("", "x"))
    ]
    runs += [f"x{' ' * count}y\n{' ' * count}z" for count in range(1, 70)]
    runs += [letter * count for letter in "\t\n\u3000\u2581" for count in range(2, 20)]
    controls = [f"a{chr(code)}b" for code in (*range(0x20), *range(0x7F, 0xA1))]
    return (*_EDGES, *long, " ".join(long), "\n\n".join(long), *words, *marks, *runs, *controls)


HARD_TEXTS = _texts()
