"""Everything a card can tell, in one command: `python -m benchmarks.card --out DIR`. Where there is no GPU the same code runs small on the CPU.

`entries` lists what is measured, the most valuable first; `checks`, `forms`, `speed`, `bandwidth`, `tools` and `learn` measure; `worker` is the
process that they run in, `results` keeps what they found in DIR/card.json, `markdown` and `draw` make it readable.
"""
