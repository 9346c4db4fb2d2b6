"""Makes fastpoem/assets/rhymes.txt, the two rhyme tables, out of what packages of PyPI hold.

    pip install pypinyin==0.55.0 opencc && pip download --no-deps qieyun==0.13.3
    python tools/rhyme_tables.py qieyun-0.13.3-py3-none-any.whl > fastpoem/assets/rhymes.txt

平水韵 is 广韵 with its 206 rhymes merged into the 106 that examinations went by: `qieyun` has each character of 广韵 with its rhyme. 中华新韵 sorts
today's finals into 14 groups: `pypinyin` has today's pronunciations. Characters that 广韵 has in another form get the groups of that form.
"""

import csv
import io
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable

from opencc import OpenCC
from pypinyin.constants import PHRASES_DICT, PINYIN_DICT
from pypinyin.contrib.tone_convert import to_finals, to_initials, to_tone3

HEADER = """\
# The rhyme groups of Chinese characters, made by tools/rhyme_tables.py: a table begins with its name, a line is a tone, a group and its characters.
# 平水韵: the readings of 广韵 (1008) in the package qieyun 0.13.3 of the nk2028 project, CC0 1.0, merged from its 206 rhymes into the 106 of 平水韵.
# 中华新韵: the 14 groups of 《中华新韵（十四韵）》 (中华诗词学会, 2004), from the pronunciations in the package pypinyin 0.55.0, MIT,
# Copyright (c) 2016 mozillazg, 闲耘.
"""
# The rhymes of 广韵 in each group of 平水韵
PINGSHUI = {
    "上平": "一东:東 二冬:冬鍾 三江:江 四支:支脂之 五微:微 六鱼:魚 七虞:虞模 八齐:齊 九佳:佳皆 十灰:灰咍 十一真:眞真諄臻 "
    "十二文:文欣 十三元:元魂痕 十四寒:寒桓 十五删:刪山",
    "下平": "一先:先仙 二萧:蕭宵 三肴:肴 四豪:豪 五歌:歌戈 六麻:麻 七阳:陽唐 八庚:庚耕清 九青:青 十蒸:蒸登 十一尤:尤侯幽 十二侵:侵 "
    "十三覃:覃談 十四盐:鹽添嚴 十五咸:咸銜凡",
    "上声": "一董:董 二肿:腫 三讲:講 四纸:紙旨止 五尾:尾 六语:語 七麌:麌姥 八荠:薺 九蟹:蟹駭 十贿:賄海 十一轸:軫準 十二吻:吻隱 "
    "十三阮:阮混很 十四旱:旱緩 十五潸:潸產 十六铣:銑獮 十七筱:篠小 十八巧:巧 十九皓:晧 二十哿:哿果 二十一马:馬 二十二养:養蕩 "
    "二十三梗:梗耿靜 二十四迥:迥拯等 二十五有:有厚黝 二十六寝:寑 二十七感:感敢 二十八俭:琰忝儼 二十九豏:豏檻范",
    "去声": "一送:送 二宋:宋用 三绛:絳 四寘:寘至志 五未:未 六御:御 七遇:遇暮 八霁:霽祭 九泰:泰 十卦:卦怪夬 十一队:隊代廢 "
    "十二震:震稕 十三问:問焮 十四愿:願慁恨 十五翰:翰換 十六谏:諫襇 十七霰:霰線 十八啸:嘯笑 十九效:效 二十号:号 二十一个:箇過 "
    "二十二祃:禡 二十三漾:漾宕 二十四敬:映諍勁 二十五径:徑證嶝 二十六宥:宥候幼 二十七沁:沁 二十八勘:勘闞 二十九艳:豔㮇釅 "
    "三十陷:陷鑑梵",
    "入声": "一屋:屋 二沃:沃燭 三觉:覺 四质:質術櫛 五物:物迄 六月:月沒 七曷:曷末 八黠:黠鎋 九屑:屑薛 十药:藥鐸 十一陌:陌麥昔 "
    "十二锡:錫 十三职:職德 十四缉:緝 十五合:合盍 十六叶:葉怗 十七洽:洽狎業乏",
}
# The finals of today in each group of 中华新韵, -i behind z c s zh ch sh r
XIN = (
    "一麻:a,ia,ua 二波:o,e,uo 三皆:ie,üe,ê 四开:ai,uai 五微:ei,uei 六豪:ao,iao 七尤:ou,iou 八寒:an,ian,uan,üan "
    "九文:en,in,uen,ün 十唐:ang,iang,uang 十一庚:eng,ing,ueng,ong,iong 十二齐:i,er,ü 十三支:-i 十四姑:u"
)
RARE = 0.05  # of a character's places in phrases: a reading that is no more common is left out
# What 广韵 writes otherwise or does not have, and a character that has the same rhyme there
AS = (
    "窗窻 魂䰟 剑劒 胸胷 联连 鬰鬱 潇蕭 鞍安 烹彭 匆聰 怱聰 煮渚 髙高 鬭鬥 皓浩 鶑鶯 槁浩 稿浩 着著 臯高 裙群 缈眇 迤迆 享想 匝答 髭支 斾沛 "
    "旆沛 拆坼 鳯鳳 撑瞠 琉流 倘黨 飚標 飙標 飈標 泼撥 隣鄰 馿驢 餠餅 勾鉤 罕旱 蝴胡 踈疏 廻回 鏁鎖 虀齏 閙鬧 峩峨 羮羹 摹模 壳角 畧略 栢柏 嗅臭 "
    "奁廉 邉邊 樗書 潄漱 冗勇 笻邛 孽列 穉稚 垄隴 碗管 撒薩 焙背 耗到 玳代 蒂帝 搘支 秖支 逈迥 腮哉 姮恒 輙輒 槩概 觑御 做佐 纒纏 覊羈 壖緣 嫦常 "
    "暌睽 讐讎 蠧蠹 肇兆 呌叫 祛墟 柿市 滚衮 婷亭 砖專 頳貞 濒頻 窝戈 濶闊 幙幕 廐救 厩救 烱迥 缗岷 翺翱 敧奇 氊氈 淘陶 葅魚 箎池 卮支 躭耽 "
    "嶤堯 磵澗 毘毗 嘴紙 飡餐 榕容 寜寧 穏穩 寃冤 逰遊 葡蒲 勲勳 嚢囊 眀明 氷冰 帯帶 颕穎 涙淚 荘莊 幷并 呵訶 婀阿 琊邪 粧妝 鵶鴉 鎻鎖 鸎鶯 闗關 膓腸 郷鄉 "
    "虵蛇 濵濱 堦階 舡船 帬裙 铓忙 螀將 飖搖 秾農 飏陽 挝麻 籯盈 籝盈 譍鷹 猨猿 罇樽 凖準 覧覽 撃擊 歴歷 闘鬥 憇憩 衘銜 啣銜 湼涅 "
    "玛馬 霊靈 昻昂 劔劒 聨连 聫连 覔覓 縁緣 賖奢 饧清 曽曾 乗乘 剰剩 黒黑 恵惠 壊壞 奨獎"
)
# Readings of 平水韵 that 广韵 lacks, by what the regulated verses of Tang and Song rhyme with
ADDED = {
    "涯": "六麻",
    "忘": "七阳",
    "漫": "十四寒",
    "厌": "十四盐",
    "厭": "十四盐",
    "粗": "七虞",
    "攒": "十四寒",
    "攢": "十四寒",
    "么": "五歌",
}

Groups = dict[tuple[str, str], set[str]]  # of tone and group: characters


def pingshui(wheel: str) -> Groups:
    text = zipfile.ZipFile(wheel).read("Qieyun/rhyme_book.csv").decode()
    simple, other = OpenCC("t2s").convert, [OpenCC(name).convert for name in ("jp2t", "tw2t", "s2t")]
    group_of: dict[tuple[str, str], tuple[str, str]] = {}
    for tone, groups in PINGSHUI.items():
        for name, rhymes in (group.split(":") for group in groups.split()):
            group_of |= {(rhyme, tone[-1] if tone[-1] == "平" else tone[0]): (tone, name) for rhyme in rhymes}
    groups_of: dict[str, set[tuple[str, str]]] = defaultdict(set)  # of each character
    for row in csv.DictReader(io.StringIO(text)):
        if row["資料名稱"] == "廣韻":
            one = row["字頭"] or row["字頭覈校前"]
            for form in {one, simple(one)}:
                groups_of[form].add(group_of[row["韻部原貌"], row["最簡描述"][-1]])
    given = dict(groups_of)
    for one in map(chr, range(0x4E00, 0xA000)):
        if one not in given and (forms := [convert(one) for convert in other if convert(one) in given]):
            groups_of[one] = given[forms[0]]
    for one, like in AS.split():
        if one not in given:
            groups_of[one] = given.get(like) or given[simple(like)]
    for one, name in ADDED.items():
        groups_of[one].add(next(group for group in group_of.values() if group[1] == name and "平" in group[0]))
    return by_group((one, group) for one, groups in groups_of.items() for group in groups)


def xin() -> Groups:
    group_of = {final: name for name, finals in (g.split(":") for g in XIN.split()) for final in finals.split(",")}
    in_phrases: dict[str, Counter[str]] = defaultdict(Counter)  # of each character, its readings
    for phrase, readings in PHRASES_DICT.items():
        if len(phrase) == len(readings):
            for one, said in zip(phrase, readings, strict=True):
                in_phrases[one][said[0]] += 1
    found = []
    for one in map(chr, [ord("〇"), *range(0x4E00, 0xA000)]):
        readings = PINYIN_DICT.get(ord(one), "").split(",")
        seen = in_phrases[one]
        for said in {readings[0], *(each for each in readings if seen[each] > RARE * seen.total())} - {""}:
            initial, final, tone = to_initials(said), to_finals(said, v_to_u=True), to_tone3(said)[-1]
            if final == "i" and initial in ("zh", "ch", "sh", "r", "z", "c", "s"):
                final = "-i"
            if tone in "1234" and final in group_of:  # neither light nor a nasal alone
                found.append((one, ("平声" if tone in "12" else "仄声", group_of[final])))
    return by_group(found)


def by_group(pairs: Iterable[tuple[str, tuple[str, str]]]) -> Groups:
    groups: Groups = defaultdict(set)
    for one, group in pairs:
        groups[group].add(one)
    return groups


def main() -> None:
    print(HEADER, end="")
    new = [name.split(":")[0] for name in XIN.split()]
    old = [(tone, name.split(":")[0]) for tone, names in PINGSHUI.items() for name in names.split()]
    for book, groups, order in (
        ("平水韵", pingshui(sys.argv[1]), old),
        ("中华新韵", xin(), [(tone, name) for tone in ("平声", "仄声") for name in new]),
    ):
        print(book)
        for tone, name in order:
            print(tone, name, "".join(sorted(groups[tone, name])))


if __name__ == "__main__":
    main()
