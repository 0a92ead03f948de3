"""OpenAI's client for Python against `opt serve`. Prints `N passed, M failed`.

    python3 ci/serve/server.py PYTHON ci/clients/openai_client.py

What the texts and numbers should be comes from `opt generate`, `opt score` and `opt embed`.
"""
import json, math, os, subprocess, sys, tempfile, traceback
from pathlib import Path

import openai
from openai import AsyncOpenAI, OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from server import MODEL, OPT, Server

NAME = Path(MODEL).name
PROMPTS = ["The river", "It was a dark and stormy night.", "“Naïve,” said he; "]


class Skip(Exception):
    pass


def connect(url, key="none", **options):
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **options)


def opt(*arguments, lines=None):
    """The objects that a command prints; `lines` are the objects of its input file."""
    with tempfile.TemporaryDirectory() as folder:
        if lines is not None:
            path = Path(folder, "lines.jsonl")
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            arguments = [str(path) if argument == "LINES" else argument for argument in arguments]
        ran = subprocess.run([OPT, *arguments, "--model", MODEL, "--json", "--quiet"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def greedy(prompts, tokens, *flags):
    lines = [{"prompt": prompt} if isinstance(prompt, str) else {"ids": prompt} for prompt in prompts]
    return opt("generate", "--prompts", "LINES", "--max-new-tokens", str(tokens), *flags, lines=lines)


def near(a, b, tolerance=1e-4):
    return len(a) == len(b) and all(math.isclose(x, y, abs_tol=tolerance) for x, y in zip(a, b))


def complete(client, prompt, **settings):
    extra = {name: settings.pop(name) for name in list(settings) if name in EXTRAS}
    return client.completions.create(model=NAME, prompt=prompt, extra_body=extra or None, **settings)


EXTRAS = {"top_k", "min_p", "repetition_penalty", "num_beams", "adapter", "return_token_ids", "regex", "no_repeat_ngram_size",
          "response_format"}


def greedy_text_is_the_commands(client):
    for prompt, line in zip(PROMPTS, greedy(PROMPTS, 24)):
        (expected,) = line["sequences"]
        answer = complete(client, prompt, max_tokens=24, temperature=0)
        (choice,) = answer.choices
        assert choice.text == expected["text"], (choice.text, expected["text"])
        assert choice.finish_reason == {"length": "length", "eos": "stop"}[expected["finish_reason"]]
        assert answer.object == "text_completion" and answer.model == NAME
        usage = answer.usage
        assert usage.prompt_tokens == len(line["prompt_ids"]) and usage.completion_tokens == len(expected["ids"])
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def lists_of_prompts_keep_their_order(client):
    single = [complete(client, prompt, max_tokens=12, temperature=0).choices[0].text for prompt in PROMPTS]
    together = complete(client, PROMPTS, max_tokens=12, temperature=0)
    assert [choice.text for choice in together.choices] == single
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    twice = complete(client, PROMPTS, max_tokens=12, temperature=0, n=2)
    assert [choice.text for choice in twice.choices] == [text for text in single for _ in range(2)]
    assert [choice.index for choice in twice.choices] == list(range(6))


def token_ids_are_taken_as_given(client):
    ids = greedy(PROMPTS[:2], 1)
    ids = [line["prompt_ids"] for line in ids]
    texts = complete(client, PROMPTS[:2], max_tokens=12, temperature=0)
    assert complete(client, ids[0], max_tokens=12, temperature=0).choices[0].text == texts.choices[0].text
    both = complete(client, ids, max_tokens=12, temperature=0, return_token_ids=True)
    assert [choice.text for choice in both.choices] == [choice.text for choice in texts.choices]
    expected = [line["sequences"][0]["ids"] for line in greedy(ids, 12)]
    assert [choice.token_ids for choice in both.choices] == expected
    # Without the token that the model's texts begin with it is another prompt.
    (line,) = greedy([ids[0][1:]], 12)
    assert complete(client, ids[0][1:], max_tokens=12, temperature=0).choices[0].text == line["sequences"][0]["text"]


def a_seed_repeats(client):
    def sample(**settings):
        return [c.text for c in complete(client, PROMPTS[0], max_tokens=20, **settings).choices]

    assert sample(seed=11) == sample(seed=11)
    assert len({*sample(seed=11), *sample(seed=12), *sample(seed=13)}) > 1
    assert sample(seed=11, n=3) == sample(seed=11, n=3) and len(set(sample(seed=11, n=3))) == 3
    assert len({sample()[0] for _ in range(4)}) > 1, "without a seed texts should differ"
    # The same alone and among others.
    together = complete(client, [PROMPTS[1], PROMPTS[0]], max_tokens=20, seed=11).choices
    alone = complete(client, PROMPTS[1], max_tokens=20, seed=11).choices[0].text
    assert together[0].text == alone


def best_of_returns_the_most_probable(client):
    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    everything = complete(client, PROMPTS[0], max_tokens=12, n=6, seed=5, logprobs=0).choices
    best = complete(client, PROMPTS[0], max_tokens=12, n=2, best_of=6, seed=5, logprobs=0).choices
    expected = sorted(everything, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best] == [choice.text for choice in expected]
    assert [choice.index for choice in best] == [0, 1]
    try:
        complete(client, PROMPTS[0], n=3, best_of=2)
    except openai.BadRequestError as error:
        assert "best_of" in str(error)
    else:
        raise AssertionError("best_of below n was taken")


def stop_strings_end_the_text(client):
    whole = complete(client, PROMPTS[1], max_tokens=40, temperature=0).choices[0].text
    stop = whole[20:24]
    cut = complete(client, PROMPTS[1], max_tokens=40, temperature=0, stop=["never there", stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop", (cut.text, whole)
    pieces = complete(client, PROMPTS[1], max_tokens=40, temperature=0, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in pieces if p.choices) == cut.text
    # It is looked for in what is produced only.
    assert complete(client, PROMPTS[1], max_tokens=8, temperature=0, stop="stormy").choices[0].text == whole[: len(
        complete(client, PROMPTS[1], max_tokens=8, temperature=0).choices[0].text)]


def logprobs_are_those_of_the_command(client):
    (line,) = greedy([PROMPTS[2]], 16, "--top-alternatives", "3")
    (expected,) = line["sequences"]
    choice = complete(client, PROMPTS[2], max_tokens=16, temperature=0, logprobs=3).choices[0]
    found = choice.logprobs
    assert near(found.token_logprobs, expected["logprobs"]), (found.token_logprobs, expected["logprobs"])
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == 16
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        assert len(top) in (3, 4) and math.isclose(top[token], logprob, abs_tol=1e-6)
        assert math.isclose(max(top.values()), logprob, abs_tol=1e-6), "greedy chose another than the likeliest"


def echo_scores_the_prompt(client):
    (line,) = opt("score", "--input", "LINES", lines=[{"text": PROMPTS[1]}])
    for tokens in (0, 3):
        choice = complete(client, PROMPTS[1], max_tokens=tokens, echo=True, logprobs=1, temperature=0).choices[0]
        assert choice.text.startswith(PROMPTS[1]) and (tokens > 0 or choice.text == PROMPTS[1])
        found = choice.logprobs
        prompt = len(found.tokens) - tokens
        assert "".join(found.tokens[:prompt]).removeprefix("</s>") == PROMPTS[1]
        # The first follows nothing, or what texts begin with.
        scored = [logprob for logprob in found.token_logprobs[:prompt] if logprob is not None]
        assert near(scored, line["logprobs"][-len(scored):]) and len(scored) >= prompt - 1
        at = found.text_offset
        ends = [*at[1:], len(choice.text)]
        assert all(choice.text[a:b] == token for token, a, b in zip(found.tokens, at, ends) if token != "</s>")


def streams_grow_to_the_whole_text(client):
    whole = complete(client, PROMPTS[0], max_tokens=30, temperature=0, logprobs=2)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        pieces = list(complete(client, PROMPTS[0], max_tokens=30, temperature=0, logprobs=2, stream=True, **options))
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        assert text == whole.choices[0].text and len(pieces) > 10
        tokens = [token for piece in pieces if piece.choices and piece.choices[0].logprobs for token in piece.choices[0].logprobs.tokens]
        assert tokens == whole.choices[0].logprobs.tokens
        reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
        assert reasons[-1] == "length" and not any(reasons[:-1])
        if options:
            assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
            assert all(piece.usage is None for piece in pieces[:-1])
        else:
            assert all(piece.usage is None for piece in pieces)
    several = list(complete(client, PROMPTS, max_tokens=10, temperature=0, stream=True))
    for index, prompt in enumerate(PROMPTS):
        text = "".join(p.choices[0].text for p in several if p.choices and p.choices[0].index == index)
        assert text == complete(client, prompt, max_tokens=10, temperature=0).choices[0].text


def extras_of_the_request_work(client):
    for extras, flags in [({"num_beams": 3}, ["--num-beams", "3"]),
                          ({"repetition_penalty": 1.3}, ["--repetition-penalty", "1.3"]),
                          ({"no_repeat_ngram_size": 2}, ["--no-repeat-ngram-size", "2"])]:
        (line,) = greedy([PROMPTS[0]], 24, *flags)
        found = complete(client, PROMPTS[0], max_tokens=24, temperature=0, **extras).choices[0].text
        assert found == line["sequences"][0]["text"], (extras, found)
    plain = complete(client, PROMPTS[0], max_tokens=16, temperature=0).choices[0].text
    # One candidate left is what greedy takes.
    assert complete(client, PROMPTS[0], max_tokens=16, top_k=1).choices[0].text == plain
    assert complete(client, PROMPTS[0], max_tokens=16, min_p=1.0).choices[0].text == plain
    assert complete(client, PROMPTS[0], max_tokens=16, top_p=1e-6).choices[0].text == plain


def adapters_are_models_of_their_own(client):
    with tempfile.TemporaryDirectory() as folder:
        # Enough of another text that greedy continuations change.
        text, adapter = Path(folder, "text.txt"), Path(folder, "sailors")
        text.write_text("The river ran down to the sea, and the ship sailed over the sea.\n" * 60)
        subprocess.run([OPT, "tune", "lora", "--model", MODEL, "--data", text, "--output", adapter, "--max-steps", "8", "--lr", "0.01",
                        "--batch-size", "2", "--seq-len", "32", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        expected = [greedy(PROMPTS[:1], 16, *flags)[0]["sequences"][0]["text"] for flags in ([], ["--adapter", str(adapter)])]
        assert expected[0] != expected[1], "the adapter changes nothing"
        with Server("--adapter", str(adapter)) as server:
            client = connect(server.url)
            assert sorted(model.id for model in client.models.list().data) == sorted([NAME, "sailors"])

            def text_of(model, **extras):
                return client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=16, temperature=0, extra_body=extras).choices[0].text

            assert [text_of(NAME), text_of("sailors"), text_of(NAME, adapter="sailors")] == [*expected, expected[1]]
            error = raised(openai.NotFoundError, lambda: text_of(NAME, adapter="soldiers"))
            assert (error.code, error.param) == ("model_not_found", "adapter")


def biases_and_penalties_work(client):
    (line,) = greedy([PROMPTS[0]], 12)
    banned = line["sequences"][0]["ids"][2]
    found = complete(client, PROMPTS[0], max_tokens=12, temperature=0, logit_bias={str(banned): -100}, return_token_ids=True)
    assert banned not in found.choices[0].token_ids
    forced = complete(client, PROMPTS[0], max_tokens=5, temperature=0, logit_bias={str(banned): 100}, return_token_ids=True)
    assert forced.choices[0].token_ids == [banned] * 5
    # A token that is pushed up comes again and again, unless what came before counts against it.
    settings = {"max_tokens": 8, "temperature": 0, "logit_bias": {str(banned): 6}, "return_token_ids": True}
    for penalty in ("presence_penalty", "frequency_penalty"):
        few = complete(client, PROMPTS[0], **settings, **{penalty: 2.0}).choices[0].token_ids.count(banned)
        many = complete(client, PROMPTS[0], **settings, **{penalty: -2.0}).choices[0].token_ids.count(banned)
        assert few < many, (penalty, few, many)
    frequent = complete(client, PROMPTS[0], max_tokens=60, temperature=0, frequency_penalty=2.0).choices[0].text
    assert frequent != complete(client, PROMPTS[0], max_tokens=60, temperature=0).choices[0].text


def json_schemas_hold(client):
    schema = {"type": "object", "properties": {"name": {"enum": ["river", "house"]}, "pages": {"type": "integer", "minimum": 1, "maximum": 999}},
              "required": ["name", "pages"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "book", "schema": schema, "strict": True}}
    try:
        for seed in range(4):
            text = complete(client, PROMPTS[0], max_tokens=60, seed=seed, response_format=form).choices[0].text
            value = json.loads(text)
            assert set(value) == {"name", "pages"} and value["name"] in ("river", "house")
            assert isinstance(value["pages"], int) and 1 <= value["pages"] <= 999
        text = complete(client, PROMPTS[0], max_tokens=20, regex=r"[0-9]{3}-[a-z]{4}").choices[0].text
        assert text[:3].isdigit() and text[3] == "-" and text[4:].islower() and len(text) == 8, text
    except openai.BadRequestError as error:
        if error.code == "unsupported_parameter":
            raise Skip(f"answers of a form ({error})") from None
        raise


def embeddings_are_the_commands(client):
    rows = [json.loads(line) for line in embedded(PROMPTS)]
    for encoding in (openai.omit, "float", "base64"):
        # The client asks for base64 by itself, and unpacks it.
        answer = client.embeddings.create(model=NAME, input=PROMPTS, encoding_format=encoding)
        assert [one.index for one in answer.data] == [0, 1, 2]
        for one, row in zip(answer.data, rows):
            found = one.embedding
            if encoding == "base64":
                import array, base64
                found = array.array("f", base64.b64decode(found)).tolist()
            assert near(found, row, 1e-5), encoding
            assert math.isclose(sum(x * x for x in found), 1, rel_tol=1e-4)
    (line,) = greedy([PROMPTS[0]], 1)
    by_ids = client.embeddings.create(model=NAME, input=line["prompt_ids"]).data[0].embedding
    assert near(by_ids, rows[0], 1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6


def embedded(texts):
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        subprocess.run([OPT, "embed", "--model", MODEL, "--input", source, "--output", result, "--pooling", "mean",
                        "--normalize", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        lines = result.read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [json.dumps(row.get("embedding", row.get("vector")) if isinstance(row, dict) else row) for row in parsed]


def models_are_listed(client):
    (model,) = client.models.list().data
    assert model.id == NAME and model.object == "model"
    assert client.models.retrieve(NAME).id == NAME
    assert raised(openai.NotFoundError, lambda: client.models.retrieve("gpt-4")).code == "model_not_found"


def raised(kind, call):
    try:
        call()
    except kind as error:
        assert type(error) is kind, error
        assert error.message and "\n" not in error.message
        return error
    raise AssertionError(f"expected {kind.__name__}")


def errors_are_typed(client):
    def bad(**settings):
        return raised(openai.BadRequestError, lambda: complete(client, settings.pop("prompt", PROMPTS[0]), **settings))

    error = raised(openai.NotFoundError, lambda: client.completions.create(model="gpt-4", prompt="x"))
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")
    assert bad(temperature=-1).param == "temperature"
    assert bad(max_tokens=-5).param == "max_tokens"
    assert bad(max_tokens=100000).code == "context_length_exceeded"
    assert bad(prompt="word " * 2000).code == "context_length_exceeded"
    assert bad(prompt=[1, 2, 99999999]).status_code == 400
    assert bad(prompt=[]).status_code == 400
    assert bad(suffix="after").param == "suffix"
    assert bad(logprobs=1000).param == "logprobs"
    assert bad(stop=["a"] * 1000).param == "stop"
    assert bad(num_beams="three").param == "num_beams"
    assert bad(adapter=7).param == "adapter"
    error = raised(openai.BadRequestError, lambda: client.completions.create(
        model=NAME, prompt="x", extra_body={"temperatur": 1}))
    assert "temperature" in error.message and error.param == "temperatur"
    error = raised(openai.NotFoundError, lambda: client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}]))
    assert "chat" in error.message
    error = raised(openai.BadRequestError, lambda: client.embeddings.create(model=NAME, input=[]))
    assert error.param == "input"
    assert complete(client, PROMPTS[0], max_tokens=1).choices


def keys_are_wanted(_):
    url, key = os.environ["OPT_KEYED_URL"], os.environ["OPT_KEY"]
    for wrong in ("none", key[:-1], key + "x"):
        client = connect(url, wrong)
        for call in (lambda: complete(client, "x", max_tokens=1), client.models.list,
                     lambda: client.embeddings.create(model=NAME, input="x")):
            assert raised(openai.AuthenticationError, call).status_code == 401
    assert complete(connect(url, key), "x", max_tokens=1).choices


def a_full_queue_is_told(_):
    with Server("--queue", "1") as server:
        client = connect(server.url)
        stream = complete(client, PROMPTS[0], max_tokens=400, stream=True)
        next(iter(stream))
        error = raised(openai.RateLimitError, lambda: complete(client, "x", max_tokens=1))
        assert int(error.response.headers["retry-after"]) >= 1
        stream.close()
        # The client's own retries wait and then succeed.
        again = connect(server.url).with_options(max_retries=5)
        assert complete(again, "x", max_tokens=1).choices


def a_closed_stream_is_cancelled(client):
    with Server() as server:
        client = connect(server.url)
        for turn in range(5):
            stream = complete(client, PROMPTS[0], max_tokens=450, stream=True)
            for _, piece in zip(range(3), stream):
                assert piece.choices
            stream.close()
            server.until(lambda: server.metric("opt_cancelled_total") == turn + 1)
        server.until(lambda: server.metric("opt_batch_running") == 0)
        assert server.metric("opt_generated_tokens_total") < 5 * 450
        assert complete(client, "x", max_tokens=1).choices


def many_at_once_are_as_alone(client):
    import asyncio

    prompts = [f"{prompt} {number}" for number in range(6) for prompt in PROMPTS]
    alone = [complete(client, prompt, max_tokens=12, temperature=0).choices[0].text for prompt in prompts]

    async def together():
        async with AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as many:
            async def one(prompt):
                text = ""
                stream = await many.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0, stream=True)
                async for piece in stream:
                    text += piece.choices[0].text if piece.choices else ""
                return text

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(together()) == alone


CHECKS = [greedy_text_is_the_commands, lists_of_prompts_keep_their_order, token_ids_are_taken_as_given, a_seed_repeats,
          best_of_returns_the_most_probable, stop_strings_end_the_text, logprobs_are_those_of_the_command, echo_scores_the_prompt,
          streams_grow_to_the_whole_text, extras_of_the_request_work, adapters_are_models_of_their_own, biases_and_penalties_work, json_schemas_hold,
          embeddings_are_the_commands, models_are_listed, errors_are_typed, keys_are_wanted, a_full_queue_is_told,
          a_closed_stream_is_cancelled, many_at_once_are_as_alone]


def main():
    client = connect(os.environ["OPT_URL"])
    passed = failed = 0
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            check(client)
        except Skip as why:
            print(f"skipped: {why}")
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        else:
            passed += 1
            print(f"ok {name}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
