"""A chat in the browser, streamed, over a packed model whose precision follows what is said.

    pip install gradio
    python examples/gradio_chat.py [CHECKPOINT]

Without a checkpoint it is the embedded model, which completes text rather than converses.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import gradio
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import dynaexq

MODEL = sys.argv[1] if sys.argv[1:] else str(Path(__file__).parent / "tiny-moe")

config = dynaexq.DynaExqConfig(hbm_budget=os.environ.get("DYNAEXQ_HBM_BUDGET", "5MB"))
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def answer(message: str, history: list[dict[str, str]]) -> Iterator[str]:
    """The answer so far, again and again as it grows."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    turns.append({"role": "user", "content": message})
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 64}).start()
    said = ""
    for piece in streamer:
        said += piece
        yield said


def report() -> str:
    """What the runtime shows, as a page."""
    return model.dynaexq.report()._repr_html_()


with gradio.Blocks(title="dynaexq") as page:
    gradio.ChatInterface(answer, api_name="chat")
    shown = gradio.HTML(label="precision")
    gradio.Button("precision").click(report, outputs=shown, api_name="report")

if __name__ == "__main__":
    page.launch(server_name="127.0.0.1", server_port=int(os.environ.get("PORT", "7860")))
