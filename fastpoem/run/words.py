"""The console's words in two languages. English stands where a line is said; here is what it is in Chinese.

A line is looked up by its English template, so one that is not here is said in English. Errors, and what another program may read (piped
lines, unless --lang zh says otherwise), are English always.
"""

from __future__ import annotations

import os
from typing import Any

ZH = {
    # Before training
    "data": "数据",
    "batches": "批次",
    "model": "模型",
    "device": "设备",
    "training": "训练",
    "checkpoints": "检查点",
    "{0:,} poems from {1}": "{1} 共 {0:,} 首诗",
    "{0:,} poems from {1} (cached in {2}, {3:.1f} s)": "{1} 共 {0:,} 首诗（缓存在 {2}，{3:.1f} 秒）",
    "copies of other poems, not trained on: {0:,}": "与其他诗重复、不参与训练：{0:,} 首",
    "copies of other poems: {0:,} (--dedup trains on one of each)": "与其他诗重复：{0:,} 首（--dedup 每种只训练一首）",
    "validation on {0:,} poems of {1}": "用 {1} 的 {0:,} 首诗验证",
    "of these, {0:,} are in the training text too: on them the loss says nothing of new poems": "其中 {0:,} 首训练文本里也有：它们的损失说明不了新诗",
    "held out for validation: {0:,} poems": "留出用于验证：{0:,} 首诗",
    "held out for validation: {0:,} poems, and {1:,} copies of them left out": "留出用于验证：{0:,} 首诗，另去掉与其重复的 {1:,} 首",
    "{0:,} held out for validation": "留出 {0:,} 首用于验证",
    "validation on {0:,} poems of your own": "用自备的 {0:,} 首验证",
    "{0} tokens": "{0} 个 token",
    "{0} processes, which divide the poems": "{0} 个进程（分担诗）",
    "{0} processes, which divide the poems and the update": "{0} 个进程（分担诗和参数更新）",
    "{0} processes, which divide the poems, the weights and the update": "{0} 个进程（分担诗、权重和参数更新）",
    "{0} length buckets": "{0} 个长度桶",
    "{0} poems, {1}": "每批 {0} 首，{1}",
    "packed ({0})": "首尾相接打包（{0}）",
    "of like length ({0})": "按长度分桶（{0}）",
    "padded ({0})": "补齐到最长（{0}）",
    "no padding": "无补齐",
    "{0:.1%} padding": "补齐占 {0:.1%}",
    "{0:,} steps an epoch": "每轮 {0:,} 步",
    "{0} layers × {1} wide": "{0} 层 × 宽 {1}",
    "{0} parameters": "{0} 参数",
    "weights from seed {0}": "权重由种子 {0} 随机生成",
    "weights of {0}": "权重来自 {0}",
    "{0} threads": "{0} 线程",
    "1 thread": "1 线程",
    "in {0} ({1})": "{0} 精度（{1}）",
    "{0} epochs": "{0} 轮",
    "1 epoch": "1 轮",
    "{0:,} steps": "{0:,} 步",
    "1 step": "1 步",
    ", ": "，",
    "learning rate {0:.2g}, {1}": "学习率 {0:.2g}，{1}",
    "warm-up {0:,} steps": "预热 {0:,} 步",
    "{0} of memory at most": "内存最高 {0}",
    "{0} each, {1} kept": "每个 {0}，保留 {1} 个",
    "the whole run will take about {0}, validation apart": "全程约需 {0}（验证除外）",
    "peak learning rate {0:.2g} for a model {1} wide": "宽 {1} 的模型用峰值学习率 {0:.2g}",
    "--lr {0:.2g} is for going on from trained weights: from scratch, about {1:.1g} learns more": "--lr {0:.2g} 适合接着训练好的权重继续；从头训练用 {1:.1g} 左右学得更多",
    "poems that were cut to {0} tokens: {1:,}": "截断到 {0} 个 token的诗：{1:,} 首",
    "{0:.1%} of the tokens are [UNK], characters that the vocabulary lacks: {1} …; --grow-vocab adds them": "{0:.1%} 的 token 是 [UNK]，词表缺这些字：{1} …；--grow-vocab 会补上",
    "asked for": "按参数指定",
    "as the run began": "与这次训练开始时相同",
    "attention in C": "注意力用 C 实现",
    "as without FSDP": "与不用 FSDP 时相同",
    "too small a step for bf16 to pay": "步太小，bf16 不划算",
    "the GPU has it": "GPU 支持",
    # Progress
    "the first step …": "正在做第一步 …",
    "epoch {0}/{1}": "第 {0}/{1} 轮",
    "step {0}/{1}": "第 {0}/{1} 步",
    "mean loss {0}": "平均损失 {0}",
    "loss {0}": "损失 {0}",
    "acc {0}": "准确率 {0}",
    "validation loss {0:.4f}": "验证损失 {0:.4f}",
    "of {0} poems {1} are in a form, {2} rhyme": "{0} 首诗中 {1} 符合格式，{2} 押韵",
    "{0} tok/s": "{0} token/秒",
    "left {0}": "剩余 {0}",
    "saving": "正在保存",
    "epoch": "轮",
    "step": "步",
    "loss": "损失",
    "accuracy": "准确率",
    "validation loss": "验证损失",
    "val. loss": "验证损失",
    "val. accuracy": "验证准确率",
    "tokens/s": "token/秒",
    "{0} lines before these": "更早的 {0} 行",
    "skipped {0} ({1})": "跳过 {0} 步（{1}）",
    "loading PyTorch": "正在加载 PyTorch",
    "reading {0}": "正在读取 {0}",
    "checking {0}": "正在校验 {0}",
    "looking for copies of poems": "正在查找重复的诗",
    "looking for characters that the vocabulary lacks": "正在查找词表里没有的字",
    "measuring which precision is faster": "正在测试哪种精度更快",
    "choosing how to batch": "正在选择批次方式",
    "making the model": "正在创建模型",
    "reading the weights of {0}": "正在读取 {0} 的权重",
    "getting the step ready": "正在准备训练步",
    "compiling and recording the step": "正在编译训练步并录制 CUDA graph",
    "reading the newest checkpoint": "正在读取最新的检查点",
    "validating on {0:,} poems": "正在 {0:,} 首诗上验证",
    "writing a few poems": "正在写几首诗",
    "waiting for the last checkpoint to be written": "正在等待上一个检查点写完",
    "writing the last checkpoint": "正在写入最后的检查点",
    "reading the best checkpoint": "正在读取最好的检查点",
    "writing the model": "正在写入模型",
    "time": "用时",
    "memory": "内存",
    "about {0} for {1:,} steps, validation apart": "{1:,} 步约需 {0}（验证除外）",
    "{0:.2g} s a step": "每步 {0:.2g} 秒",
    "{0} poems/s": "每秒 {0} 首",
    "{0} in these steps at most": "这几步最高 {0}",
    "timing {0} steps": "正在试跑 {0} 步计时",
    "poems after step {0:,}:": "第 {0:,} 步后写的诗：",
    "step {0} of {1} is done: going on": "已完成 {0}/{1} 步，继续训练",
    "step {0} of {1} is done: nothing is left to do": "已完成 {0}/{1} 步，没有剩余的步数",
    # At the end
    "trained": "训练",
    "best": "最好",
    "write": "写诗",
    "{0} in {1}": "{0}用时 {1}",
    "validation loss {0:.4f} after step {1:,}, {2}": "第 {1:,} 步后验证损失 {0:.4f}，{2}",
    "the trained model is in {0}": "训练好的模型在 {0}",
    "stopped after a complete checkpoint; go on with: {0}": "已写完检查点并停止；继续训练：{0}",
    "stopped by {0} after a complete checkpoint; go on with: {1}": "收到 {0}，写完检查点后停止；继续训练：{1}",
    "nothing was written: without --dry-run, this is trained": "没有写入任何文件；去掉 --dry-run 即开始训练",
    # The page of demo
    "the page is at {0} (Ctrl-C ends it)": "网页在 {0}（按 Ctrl-C 结束）",
    "How the poem begins": "开头",
    "Form": "体裁",
    "none": "不限",
    "Acrostic": "藏头",
    "Rhyme": "押韵",
    "The first character of each line. Acrostic and rhyme need a form.": "每句的第一个字。藏头和押韵需先选体裁。",
    "Number of poems": "首数",
    "More": "更多",
    "Temperature": "温度",
    "Write": "写诗",
    "Poems": "诗",
    # Evaluate
    "{0:,} poems, {1:,} tokens": "{0:,} 首诗，{1:,} 个 token",
    "held out of {0}": "从 {0} 中留出的验证集",
    "the model was trained on this text: on new poems its loss is higher": "模型就是用这份文本训练的：新诗的损失会更高",
    "perplexity per token": "困惑度（每 token）",
    "perplexity per character": "困惑度（每字）",
    "loss per poem": "每首的损失",
    "[UNK] among the tokens": "[UNK] 的比例",
    "loss without [UNK]": "[UNK] 以外的损失",
    "frequencies alone": "只知道频率的损失",
    "loss among trained ids": "训练过的 id 中的损失",
    "characters": "字数",
    "form": "体裁",
    "poems": "首数",
    "other": "其他",
    "up to {0}": "不超过 {0}",
    "{0} to {1}": "{0} 至 {1}",
    "over {0}": "{0} 以上",
    "of {0} poems written by the model": "模型自己写的 {0} 首诗",
    "in a form": "符合格式",
    "rhyming": "押韵",
    "tones right, in a form": "符合格式且平仄全合",
    "with a run of 4 twice": "有 4 字重复出现",
    "different poems": "互不相同",
    "longest run copied": "与数据相同的最长片段",
    "{0} tokens, {1:.0f} in the median; {2} poems whole": "{0} 个 token，中位数 {1:.0f}；{2} 首整首相同",
    # Tones
    "in no form": "不合任何体裁",
    "rhymes in {0} {1}": "押{0}{1}",
    "no rhyme by {0}": "按{0}不押韵",
    "{0}, off: {1}": "{0}，不合律：{1}",
    "{0}, every tone right": "{0}，平仄全合",
    "{0}, no tone known to be off": "{0}，已知的字没有不合律的",
    "not in the book: {0}": "韵书中没有：{0}",
    "{0} (line {1}, {2})": "{0}（第 {1} 句第 {2} 字）",
    "; ": "；",
}


def language(asked: str, on_a_terminal: bool) -> str:
    """ "en" or "zh": the one asked for; for auto the locale's, and on a terminal only."""
    if asked != "auto":
        return asked
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if on_a_terminal and locale.lower().startswith("zh") else "en"


def put(lang: str, english: str, *values: Any) -> str:
    """A line in a language. english: a template of str.format where there are values, else the line itself."""
    line = ZH.get(english, english) if lang == "zh" else english
    return line.format(*values) if values else line


def rounded(amount: float) -> str:
    """Three digits of it: 508, 12.3k, 1.24M."""
    if amount < 999.5:
        return f"{amount:.0f}"
    unit, size = ("k", 1e3) if amount < 999.5e3 else ("M", 1e6)
    return f"{amount / size:#.3g}".rstrip(".") + unit


def share(amount: float) -> str:
    """9.8%, 100%."""
    return f"{amount:.1%}".replace("100.0%", "100%")


def clock(seconds: float) -> str:
    """8s, 5m03, 2h07, 3d04h: in seven columns."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    hours, rest = divmod(whole, 3600)
    return f"{hours}h{rest // 60:02d}" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def size(count: float) -> str:
    """812 MiB, 1.2 GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 1000 * 2**20 else f"{count / 2**30:.1f} GiB"
