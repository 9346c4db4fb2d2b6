"""`fastpoem demo RUN`: a page in the browser to write poems on, for trying a model without learning flags.

The page is Gradio's, which brings what such a page needs: streaming, a queue, a layout for phones. What is written and what is refused is
`generate`'s own, and so are the messages. It listens on 127.0.0.1 alone and asks nothing of the network. Poems are written for one
visitor at a time, the others wait in the queue: two at once would each take twice as long. The model is found anew for each request, so a
page of a run that is being trained writes with its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import html
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastpoem import signals
from fastpoem.cli import alone, parse, prog, run_command
from fastpoem.errors import InputError, say
from fastpoem.generate import FEW
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.poems import growing
from fastpoem.poetry.forms import FORMS, INNER, LAST
from fastpoem.poetry.rhyme import PINGSHUI, XINYUN

HOST = "127.0.0.1"
PRIVATE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
FONTS = ["system-ui", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]  # those of the machine
CSS = """
#note [role=alert] { color: var(--error-text-color) }
#poems textarea { font: 1.35rem/2 "Kaiti SC", STKaiti, KaiTi, "Noto Serif CJK SC", "Songti SC", SimSun, serif }
"""


@dataclass(frozen=True)
class DemoConfig:
    """A page in the browser to write poems on. RUN may stand alone."""

    model: str
    """A run's folder, the folder of a model, or a Hugging Face name."""
    port: int | None = None
    """Where the page listens, for this machine alone. None: the first free port from 7860 on."""
    browser: bool = True
    """Open the page in the browser."""
    lang: Literal["auto", "en", "zh"] = "auto"
    """Language of the page. auto: that of the locale."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> DemoConfig:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise InputError(f"--port {self.port}", "out of range", "use 1 to 65535")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    args = [*(sys.argv[1:] if argv is None else argv)]
    config = parse(DemoConfig, alone(DemoConfig, "model", args), prog=prog("demo")).check()
    os.environ.update(PRIVATE)
    past_proxies = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST]  # Gradio asks its own page
    os.environ["no_proxy"] = ",".join(filter(None, past_proxies))
    try:
        signals.imported("gradio")
    except ImportError:
        raise InputError("demo", "gradio is not installed", "pip install 'fastpoem[demo]'") from None
    signals.imported("torch")
    from fastpoem.engine.precision import choose_device
    from fastpoem.model.find import resolve_folder
    from fastpoem.run.console import Voice
    from fastpoem.run.trained import trained_model
    from fastpoem.run.words import language, put

    given, model = config.model, trained_model(config.model, say)
    if model == given:  # no run: a name of the hub is asked for once
        model = str(resolve_folder(given))
        config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(config, device=str(choose_device(config.device, say)))
    next(growing(GenerateConfig(model, device=config.device), say))  # a model that cannot write is refused here
    lang = language(config.lang, on_a_terminal=True)  # of the page, wherever the console's lines go
    address = _open(page(config, given, lambda english: put(lang, english)), config)
    Voice(lang=config.lang).say("the page is at {0} (Ctrl-C ends it)", address)
    with signals.StopRequest() as stop:
        while stop.signal is None:
            stop.wait(3600)
    signals.ask()
    return 0


def page(config: DemoConfig, given: str, word: Callable[[str], str]) -> Any:
    """The page, not yet opened. given: the model, as the user named it. word: puts the page's words into its language."""
    import gradio as gr

    from fastpoem.run.trained import trained_model

    def write(
        prompt: str, form: str, acrostic: str, rhyme: str, count: int, temperature: float, top_k: int, top_p: float
    ) -> Iterator[tuple[Any, str]]:
        """All the poems so far, with every character that they get, and what there is to say of the prompt, or why nothing is written."""
        poems, notes = dict[int, str](), list[str]()
        try:
            asked = GenerateConfig(
                trained_model(config.model, lambda line: None), (prompt,), count, temperature=temperature, top_k=top_k,
                top_p=top_p, form=form or None, acrostic=acrostic.strip() or None, rhyme=rhyme or None, device=config.device,
            )  # fmt: skip
            for number, poem in growing(asked.check(), notes.append):
                poems[number] = _in_lines(poem, each=bool(form))
                yield "\n\n".join(poems.values()), _said("status", notes)
        except InputError as error:
            yield gr.skip(), _said("alert", [str(error)])
        except signals.Stopped:  # here a thread of the server's; the main one ends the process
            return

    none, narrow = (word("none"), ""), {"min_width": 140}
    with gr.Blocks(title="fastpoem", analytics_enabled=False) as made:
        gr.Markdown(f"# fastpoem\n{word('model')} `{given}`")
        with gr.Row():
            with gr.Column(min_width=320):
                prompt = gr.Textbox(label=word("How the poem begins"), placeholder="春江", autofocus=True)
                with gr.Row():
                    form = gr.Dropdown([none, *FORMS], value="", label=word("Form"), filterable=False, **narrow)
                    books = [none, PINGSHUI, XINYUN]
                    rhyme = gr.Dropdown(books, value="", label=word("Rhyme"), filterable=False, **narrow)
                about = word("The first character of each line. Acrostic and rhyme need a form.")
                acrostic = gr.Textbox(label=word("Acrostic"), placeholder="春夏秋冬", info=about)
                count = gr.Slider(1, FEW, 1, step=1, label=word("Number of poems"))
                with gr.Accordion(word("More"), open=False):
                    temperature = gr.Slider(0, 2, GenerateConfig.temperature, step=0.05, label=word("Temperature"))
                    top_k = gr.Slider(0, 200, GenerateConfig.top_k, step=1, label="top-k")
                    top_p = gr.Slider(0.05, 1, GenerateConfig.top_p, step=0.05, label="top-p")
                button = gr.Button(word("Write"), variant="primary")
                note = gr.HTML(elem_id="note")
            with gr.Column(min_width=320):
                poems = gr.Textbox(label=word("Poems"), lines=12, max_lines=40, buttons=["copy"], elem_id="poems")
        gr.on(
            [button.click, prompt.submit, acrostic.submit], write, concurrency_limit=1, api_name="write",
            inputs=[prompt, form, acrostic, rhyme, count, temperature, top_k, top_p], outputs=[poems, note],
        )  # fmt: skip
    return made


def _said(role: str, lines: Sequence[str]) -> str:
    return "".join(f'<p role="{role}">{html.escape(line)}</p>' for line in lines)


def _in_lines(poem: str, each: bool) -> str:
    """A poem as it is set: a sentence a line, or each line of its form, so that an acrostic is seen."""
    return re.sub(rf"([{INNER if each else LAST}])\s*(?=\S)", r"\1\n", poem)


def _open(made: Any, config: DemoConfig) -> str:
    """The page's address, from where it is served by threads of its own. Raises InputError where the port is taken."""
    import gradio as gr

    try:
        _, address, _ = made.launch(
            server_name=HOST, server_port=config.port, share=False, inbrowser=config.browser, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, mcp_server=False, enable_monitoring=False, footer_links=[],
            theme=gr.themes.Default(primary_hue="red", neutral_hue="stone", font=FONTS, font_mono=["monospace"]), css=CSS,
        )  # fmt: skip
    except OSError:
        port = f"--port {config.port or 'from 7860 on'}"
        raise InputError(port, "is in use or not permitted", "give another") from None
    return str(address)


if __name__ == "__main__":
    run_command(main)
