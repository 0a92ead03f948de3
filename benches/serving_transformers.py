"""What a user would write instead of `opt serve`: transformers behind FastAPI, one request at a time.

    python3 benches/serving_transformers.py MODEL PORT

Beside serving_peers.py, which starts it. POST /v1/completions with prompt (token ids), max_tokens, min_tokens and stream.
"""
import asyncio, json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoTokenizer, OPTForCausalLM, TextIteratorStreamer

path, port = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(path)
model = OPTForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
app, turn = FastAPI(), threading.Lock()
# Two for each client: asyncio's own few would all wait for each other.
threads = ThreadPoolExecutor(256)


def beside(work, *arguments):
    return asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def generate(body, **options):
    # A model's generate() is not to be called from two threads at once.
    with turn, torch.inference_mode():
        ids = torch.tensor([body["prompt"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=body["max_tokens"],
                              min_new_tokens=body.get("min_tokens", 0), **options)
        return made[0, ids.shape[1]:].tolist()


@app.post("/v1/completions")
async def completions(body: dict):
    if not body.get("stream"):
        made = await beside(generate, body)
        return {"choices": [{"text": tokenizer.decode(made)}], "usage": {"completion_tokens": len(made)}}

    async def events():
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        work = beside(partial(generate, body, streamer=streamer))
        texts = iter(streamer)
        while (text := await beside(next, texts, None)) is not None:
            yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(await work)}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
