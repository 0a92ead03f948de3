// OpenAI's client for Node against `opt serve`. Prints `N passed, M failed`.
//
//     python3 ci/serve/server.py node ci/clients/openai_client.mjs OPENAI/index.mjs
//
// The numbers are compared by openai_client.py; here it is whether this client can do the same.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { basename, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const openai = await import(pathToFileURL(resolve(process.argv[2])));
const { OPT, OPT_URL, OPT_MODEL, OPT_KEYED_URL, OPT_KEY } = process.env;
const model = basename(OPT_MODEL);
const connect = (url, apiKey = "none") => new openai.default({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000 });
const client = connect(OPT_URL);
const complete = (prompt, settings = {}) => client.completions.create({ model, prompt, ...settings });
const greedy = { temperature: 0, max_tokens: 24 };

function command(prompt, ...flags) {
  const all = ["generate", prompt, "--model", OPT_MODEL, "--max-new-tokens", "24", "--json", "--quiet", ...flags];
  return JSON.parse(execFileSync(OPT, all, { encoding: "utf8" }));
}

async function raised(kind, call) {
  const error = await Promise.resolve().then(call).then(() => undefined, (error) => error);
  assert.ok(error instanceof kind, `expected ${kind.name}, found ${error}`);
  return error;
}

const checks = {
  async "greedy text is the command's"() {
    const { sequences: [{ text }], prompt_ids } = command("The river");
    const answer = await complete("The river", greedy);
    assert.equal(answer.choices[0].text, text);
    assert.equal(answer.usage.prompt_tokens, prompt_ids.length);
    assert.equal((await complete(prompt_ids, greedy)).choices[0].text, text);
    const both = await complete(["The river", "The old house"], { ...greedy, n: 2 });
    assert.deepEqual(both.choices.map(({ index }) => index), [0, 1, 2, 3]);
    assert.equal(both.choices[1].text, text);
  },
  async "a stream grows to the whole text"() {
    const whole = await complete("The river", { ...greedy, logprobs: 2 });
    let [text, usage, reason, pieces, tokens] = ["", undefined, undefined, 0, []];
    for await (const piece of await complete("The river", { ...greedy, logprobs: 2, stream: true, stream_options: { include_usage: true } })) {
      pieces += 1;
      usage = piece.usage ?? usage;
      for (const choice of piece.choices) {
        text += choice.text;
        tokens.push(...(choice.logprobs?.tokens ?? []));
        reason = choice.finish_reason ?? reason;
      }
    }
    assert.equal(text, whole.choices[0].text);
    assert.deepEqual(tokens, whole.choices[0].logprobs.tokens);
    assert.deepEqual(usage, whole.usage);
    assert.equal(reason, "length");
    assert.ok(pieces > 10, `${pieces} pieces`);
  },
  async "a seed repeats, and a stop string ends the text"() {
    const drawn = () => complete("The river", { seed: 3, max_tokens: 20, top_p: 0.9 });
    assert.equal((await drawn()).choices[0].text, (await drawn()).choices[0].text);
    const whole = (await complete("The river", greedy)).choices[0].text;
    const stop = whole.slice(10, 14);
    const cut = (await complete("The river", { ...greedy, stop: [stop] })).choices[0];
    assert.equal(cut.text, whole.slice(0, whole.indexOf(stop)));
    assert.equal(cut.finish_reason, "stop");
  },
  async "extras go through"() {
    const { sequences: [{ text }] } = command("The river", "--num-beams", "3");
    assert.equal((await complete("The river", { ...greedy, num_beams: 3 })).choices[0].text, text);
    const plain = (await complete("The river", greedy)).choices[0].text;
    assert.equal((await complete("The river", { max_tokens: 24, top_k: 1 })).choices[0].text, plain);
  },
  async "embeddings in base64, which this client asks for, are those in numbers"() {
    const [packed, numbers] = await Promise.all([undefined, "float"].map((encoding_format) =>
      client.embeddings.create({ model, input: ["The river", "The old house"], encoding_format })));
    assert.deepEqual(packed.data.map(({ embedding }) => embedding.map(Math.fround)),
      numbers.data.map(({ embedding }) => embedding.map(Math.fround)));
    assert.ok(Math.abs(packed.data[1].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-4);
  },
  async "models are listed"() {
    const ids = [];
    for await (const { id } of client.models.list()) ids.push(id);
    assert.deepEqual(ids, [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
    await raised(openai.NotFoundError, () => client.models.retrieve("gpt-4"));
  },
  async "errors are typed"() {
    const error = await raised(openai.BadRequestError, () => complete("x", { temperature: -1 }));
    assert.equal(error.param, "temperature");
    assert.equal(error.status, 400);
    const unknown = await raised(openai.NotFoundError, () => client.completions.create({ model: "gpt-4", prompt: "x" }));
    assert.equal(unknown.code, "model_not_found");
    const wrong = connect(OPT_KEYED_URL, "wrong");
    await raised(openai.AuthenticationError, () => wrong.completions.create({ model, prompt: "x" }));
    const right = connect(OPT_KEYED_URL, OPT_KEY);
    assert.equal((await right.completions.create({ model, prompt: "x", max_tokens: 1 })).choices.length, 1);
  },
  async "an aborted stream ends on the server too"() {
    const metric = async (name) =>
      Number(new RegExp(`^${name} (\\S+)$`, "m").exec(await (await fetch(`${OPT_URL}/metrics`)).text())[1]);
    const before = await metric("opt_cancelled_total");
    const stream = await complete("The river", { max_tokens: 450, stream: true });
    let seen = 0;
    for await (const _ of stream) if (++seen === 3) stream.controller.abort();
    assert.ok(seen < 450, `${seen} pieces`);
    const end = Date.now() + 10_000;
    while ((await metric("opt_cancelled_total")) === before || (await metric("opt_batch_running")) > 0) {
      assert.ok(Date.now() < end, "the server goes on");
      await new Promise((done) => setTimeout(done, 20));
    }
  },
};

let [passed, failed] = [0, 0];
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    passed += 1;
    console.log(`ok ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}\n${error.stack}`);
  }
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed > 0 ? 1 : 0;
