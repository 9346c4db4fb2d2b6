"""What in a text does not look like poems, found at the price of one table look-up a character; and what can be removed safely.

A training text is taken as it is. But a model learns what it is given: page furniture, titles on lines of their own, half a corpus in
the other script. So each poem is looked at as it passes, what is odd is counted with an example, and the person decides.
"""

import html
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

SPACE, DIGIT, LATIN, HOLE, BRACKET, SIMPLE, TRADITION, MARK = (1 << bit for bit in range(8))
SPACES = "\t\u00a0\u00ad\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200b\u202f\u205f\u3000\ufeff "
MARKS = "。！？，；：、!?,;."
BREAK_MARK = "\ufdd3"  # stands for the token of line breaks while a text is looked at
SHOWN = 24  # characters of an example
TITLE = 20  # a line of its own up to this long, without any mark, may be a title or a name
SAYS = {
    "spaces": "have spaces inside",
    "digits": "have digits",
    "latin": "have Latin letters",
    "holes": "have □ or the like for a lost character",
    "brackets": "have brackets or notes",
    "entities": "have HTML entities or tags",
    "titles": "are short and without a mark among others with marks: titles or names on lines of their own?",
    "stanzas": "are groups of lines set apart by blank lines; each line is taken for a poem",
    "traditional": "have traditional characters, the others simplified ones (--convert t2s)",
    "simplified": "have simplified characters, the others traditional ones (--convert s2t)",
    "framed": "came with the tokenizer's own frame, which was not set twice",
}  # of so many poems
# The commonest characters of poems that only one of the two scripts has.
SIMPLIFIED = (
    "风来时为归见长诗谁门处声书东飞开头远应尘还黄闻犹马独难过旧满梦龙阳岂华岁红树两别随乐问阴语传惊叶边楼国终经鸟寻轻穷怀数绿临鱼对车绝兴汉儿离虽动学断关宫会鸣苍乡虚双连觉爱残萧节晓听识贤怜静灵画转横园论亲"
    "观忧遗凉说师许争遥笔纷鹤忆颜异饮圣愿乱灯载诸细阁迟谢劳辞带缘贵轩吴结倾凤顾兰锦径飘欢罗种盘报禅图丝极赋宝况户鸡举伤荣机谈计变鬓军贫孙骑点题参邻试负张陈鸿齐桥岭频厌隐泽携壮摇记业尝称兹杨渐实庐盖阙纵镜雾"
    "读乌赏钱钓银帘势谓扫烦脱斋渔昼罢义饱条莲内肠轮暂养积宾丛壶寿挂沧扬战圆适悬驱驾闭剑访丰拟浅绕拥严属营咏荡区荆墙饭诚视约颇驰洒谋词调堕写达环炉羡烛琼县庙觞号响惭窥浑鸾涧际挥绣屡戏话买层"
)
TRADITIONAL = (
    "風來時爲歸見長詩誰門處聲書東飛開頭遠應塵還黃聞猶馬獨難過舊滿夢龍陽豈華歲紅樹兩別隨樂問陰語傳驚葉邊樓國終經鳥尋輕窮懷數綠臨魚對車絕興漢兒離雖動學斷關宮會鳴蒼鄉虛雙連覺愛殘蕭節曉聽識賢憐靜靈畫轉橫園論親"
    "觀憂遺涼說師許爭遙筆紛鶴憶顏異飲聖願亂燈載諸細閣遲謝勞辭帶緣貴軒吳結傾鳳顧蘭錦徑飄歡羅種盤報禪圖絲極賦寶況戶雞舉傷榮機談計變鬢軍貧孫騎點題參鄰試負張陳鴻齊橋嶺頻厭隱澤攜壯搖記業嘗稱茲楊漸實廬蓋闕縱鏡霧"
    "讀烏賞錢釣銀簾勢謂掃煩脫齋漁晝罷義飽條蓮內腸輪暫養積賓叢壺壽掛滄揚戰圓適懸驅駕閉劍訪豐擬淺繞擁嚴屬營詠蕩區荊牆飯誠視約頗馳灑謀詞調墮寫達環爐羨燭瓊縣廟觴號響慚窺渾鸞澗際揮繡屢戲話買層"
)

_BITS = {
    "spaces": SPACE,
    "digits": DIGIT,
    "latin": LATIN,
    "holes": HOLE,
    "brackets": BRACKET,
    "traditional": TRADITION,
    "simplified": SIMPLE,
}
_MARKUP = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});|</?[A-Za-z][^<>\n]{0,200}>")
_NOTE = re.compile(
    r"（[^（）\n]{0,200}）|\([^()\n]{0,200}\)|〔[^〔〕\n]{0,200}〕|【[^【】\n]{0,200}】|［[^［］\n]{0,200}］|｛[^｛｝\n]{0,200}｝"
    r"|\[(?![A-Za-z]+[0-9]*\])[^\[\]\n]{0,200}\]|[\u2460-\u2473]"  # [unused1] may be a token
)
_GAP = re.compile(f"(?<![!-~{SPACES}])[{SPACES}]+|(?<![{SPACES}])[{SPACES}]++(?![!-~])|[\u00ad\u200b\ufeff]+")


def _table() -> np.ndarray:
    """(code points,) uint8: what each is a sign of."""
    table: np.ndarray = np.zeros(0x110000, np.uint8)
    ascii_letters = "".join(map(chr, [*range(65, 91), *range(97, 123)]))
    for bit, chars in (
        (SPACE, SPACES),
        (DIGIT, "0123456789" + "".join(chr(0xFF10 + digit) for digit in range(10))),
        (LATIN, ascii_letters + "".join(chr(0xFEE0 + ord(char)) for char in ascii_letters)),
        (HOLE, "□■▢◻〓\ufffd"),
        (BRACKET, "()[]{}（）［］｛｝〔〕【】〖〗"),
        (SIMPLE, SIMPLIFIED),
        (TRADITION, TRADITIONAL),
        (MARK, MARKS),
    ):
        table[[ord(char) for char in chars]] |= bit
    table[0xC0:0x250] |= LATIN
    table[[0xD7, 0xF7]] = 0  # × and ÷
    return table


_TABLE = _table()


@dataclass
class Look:
    """What was seen of a text so far: poems of each kind of oddity, and the first of each."""

    line_break: str | None = None  # a token that is none of the text's own
    poems: int = 0
    found: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    gaps: int = 0  # blank lines, one or several, between lines
    removed: Counter[str] = field(default_factory=Counter)
    special: Counter[str] = field(default_factory=Counter)  # tokens such as [SEP] that stand in the text

    def at(self, lines: list[str], frame: tuple[str, str] = ("", ""), special: Iterable[str] = ()) -> list[str]:
        """Look at some poems, each on one line, and return them without a `frame` ([CLS] before, [SEP] behind, "" for none) that the
        tokenizer will set itself. `special` tokens that stand in them are counted: their names have Latin letters."""
        if not lines:
            return lines
        text = self._joined(lines)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)  # (characters,)
        starts = np.concatenate(([0], np.flatnonzero(points == 10) + 1))
        flags = _TABLE.take(points, mode="clip")  # which is faster than to raise, and none is outside
        seen = np.bitwise_or.reduceat(flags, starts)  # (poems,) uint8
        latin = np.flatnonzero(seen & LATIN).tolist()
        if any(mark in lines[place] for place in latin for mark in frame if mark):
            bare = [self._unframed(line, *frame) for line in lines]
            if bare != lines:
                return self.at([line for line in bare if line], special=special)
        for place in latin:
            for token in special:
                if number := lines[place].count(token):
                    self.special[token] += number
        self.poems += len(lines)
        for kind, bit in _BITS.items():
            self._count(kind, (seen & bit) != 0, lines)
        unmarked = (seen & MARK) == 0
        if unmarked.any():
            unmarked &= np.diff(starts, append=len(points) + 1) <= TITLE + 1
            self._count("titles", unmarked, lines)
        if "&" in text or "<" in text:
            self._count("entities", np.array([bool(_MARKUP.search(line)) for line in lines]), lines)
        return lines

    def _joined(self, lines: list[str]) -> str:
        text = "\n".join(lines)
        return text if self.line_break is None else text.replace(self.line_break, BREAK_MARK)

    def _unframed(self, line: str, head: str, tail: str) -> str:
        bare = line.removeprefix(head).strip().removesuffix(tail).strip()
        if bare != line:
            self.found["framed"] += 1
            self.examples.setdefault("framed", line[:SHOWN])
        return bare

    def _count(self, kind: str, which: np.ndarray, lines: list[str]) -> None:
        if number := int(which.sum()):
            self.found[kind] += number
            if kind not in self.examples:
                self.examples[kind] = lines[int(which.argmax())][:SHOWN]

    def report(self) -> list[list[object]]:
        """[kind, poems, an example] of what does not look like poems, the most frequent first."""
        found = self.found.copy()
        scripts = {kind: found.pop(kind, 0) for kind in ("simplified", "traditional")}
        fewer = min(scripts, key=scripts.__getitem__)
        if scripts[fewer]:
            found[fewer] = scripts[fewer]
        if found["titles"] > 0.7 * self.poems or found["titles"] < 0.01 * self.poems:
            del found["titles"]  # so few happen, and where most lines are bare that is the manner of the text
        if self.gaps and 1.5 <= self.poems / (self.gaps + 1) <= 50:
            found["stanzas"] = self.gaps + 1
        return [[kind, number, self.examples.get(kind, "")] for kind, number in found.most_common()]

    def cleaned(self, lines: list[str]) -> list[str]:
        """The poems without what is no part of them: markup, notes in brackets, spaces that part no words. What is empty then is left out."""
        text = self._joined(lines)
        if "&" in text or "<" in text:
            text, number = _MARKUP.subn(_plain, text)
            self.removed["entities and tags"] += number
        for _ in range(4):  # a note may hold another
            text, number = _NOTE.subn("", text)
            self.removed["notes"] += number
            if not number:
                break
        text, number = _GAP.subn("", text)
        self.removed["spaces"] += number
        if self.line_break is not None:
            text = text.replace(BREAK_MARK, self.line_break)
        return [line for line in map(str.strip, text.split("\n")) if line]


def _plain(markup: re.Match[str]) -> str:
    """What an entity stands for, on one line; nothing for a tag or an entity that there is not."""
    text = html.unescape(markup[0]) if markup[0][0] == "&" else ""
    return "" if text == markup[0] else " ".join(text.split()) or " "


def in_words(kind: str, number: int, poems: int, example: str = "") -> str:
    """`1,204 (3.1%) have digits: 春12 …` of so many poems."""
    share = f" ({number / poems:.1%})" if kind != "stanzas" and poems else ""
    return f"{number:,}{share} {SAYS.get(kind, kind)}" + (f", such as {example}" if example else "")
