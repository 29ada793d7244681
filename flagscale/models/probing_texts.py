"""Texts on which two tokenizers that differ are likely to show it."""

from __future__ import annotations

import functools
import unicodedata

_PLAIN = (
    "Steps:\n\n1. a\n2. b\r\n\r\n\tc  d   e\n\n\n f \n",
    "0 12 345 6789 1234567 3.14159 1,000,000 0x1F 1e-9 2026-11-28 v1.2.3 ١٢٣ Ⅳ ½ x² \uff14\uff12",
    " leading,  two   three    four  trailing   ",
    "   \n  \n\t\t\n\u00a0\u2003\u3000\u200b.",
    "I'm, you're, he'd, we've, they'll, it's; I'M YOU'RE HE'D WE'VE; d'accord l\u2019été",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTTPServer2Go iPhone15",
    "def f(x: int) -> str:\n    if x >= 10 and not x % 2:\n\treturn f'{x!r}'  # ok\n\n\n@a.b\n",
    "for(int i=0;i<n;++i){a[i]+=b->c::d<T>(&e);}//...\n/* ***** */ #include <x.h>\n",
    '{"key": [1, null, "\\u00e9"], "url": "https://a.example/b?c=d&e=%20#f"}',
    "<p class='x'>&amp;</p> $x_1^{2}$ \\frac{a}{b} **bold** `code` ~~~ === --- ... !!! ???",
    "café naïve Zürich ǅ \u017f ﬁ Å K ㎏ ① ™ cafe\u0301 nai\u0308ve Zu\u0308rich A\u030a",
    "e\u0301\u0323 o\u0308\u0304 n\u0303\u0303\u0303 \u0301x क\u093cि ה\u05b7\u05bc",
    "😀 👍🏽 👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f 🏴\u200d☠\ufe0f a😀b 1😀2",
    "中文和English混排\uff0c第\uff11\uff12章。日本語のテキスト、カタカナ。",
    "한국어 문장입니다. ภาษาไทย",
    "a\x00b\x07c\x7fd\ufeffe\ufffdf\U000e0041",
    "aaaaaaaaaaaaaaaaaaaaaaaa ================ \n\n\n\n\n\n\n\n                x",
)
_A_SCRIPT = 12  # characters


@functools.cache
def probing_texts() -> tuple[str, ...]:
    """Digits, blanks, line ends, accents, combining marks, code, emoji, and one of every script.

    A script is what the names of its characters begin with; of each there are its first letters,
    marks and digits, as one word, before and after ASCII's, and decomposed.
    """
    scripts: dict[tuple[str, str], list[str]] = {}
    for code in range(0x20000):  # ideographs alone are above
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind in "LMN":
            script = unicodedata.name(character, "").split(" ")[0]
            found = scripts.setdefault((script, kind), [])
            if len(found) < _A_SCRIPT:
                found.append(character)
    texts = list(_PLAIN)
    for script in dict.fromkeys(name for name, _ in scripts):
        letters, marks, numbers = ("".join(scripts.get((script, kind), ())) for kind in "LMN")
        mixed = "".join(letter + mark for letter, mark in zip(letters, marks, strict=False))
        word = f"{letters} {mixed}{numbers} 12{letters[:3]}34\n{numbers}{letters[-3:]}, {marks}."
        texts += [word, unicodedata.normalize("NFD", word)]
    return tuple(texts)
