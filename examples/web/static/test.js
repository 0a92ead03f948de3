// What transformers computed, against what comes out in this browser. The report is like that of cargo's tests.

const lines = [];
let failed = 0;

/** Adds a line to the report; whoever started this browser is told at once, another server does not care. */
async function say(line) {
  lines.push(line);
  document.getElementById("result").textContent = lines.join("\n");
  await fetch("report", { method: "POST", body: line }).catch(() => {});
}

/** Runs one test; what it throws is why it failed. */
async function check(name, body) {
  const start = performance.now();
  try {
    await body();
    await say(`test ${name} ... ok (${Math.round(performance.now() - start)} ms)`);
  } catch (error) {
    failed += 1;
    await say(`test ${name} ... FAILED: ${error.message ?? error}`);
  }
}

function equal(found, expected, what) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
  if (a !== b) throw new Error(`${what}: expected ${b}, found ${a}`);
}

/** Equal to `most` of the larger of `expected` and 1. */
function close(found, expected, most, what) {
  const off = Math.abs(found - expected);
  if (!(off <= most * Math.max(1, Math.abs(expected)))) throw new Error(`${what}: expected ${expected}, found ${found}`);
}

async function json(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

/** One recorded call of generate, as a stream and as a whole. */
async function generated(model, recorded) {
  const streamed = recorded.outputs.map(() => ({ ids: [], text: "" }));
  const see = (text, id, sequence) => {
    streamed[sequence].ids.push(id);
    streamed[sequence].text += text;
  };
  const answer = await model.generate_ids(new Uint32Array(recorded.prompt), JSON.stringify(recorded.config), see);
  const { sequences } = JSON.parse(answer);
  equal(sequences.map((s) => s.ids), recorded.outputs, "ids");
  equal(streamed.map((s) => s.ids), recorded.outputs, "streamed ids");
  if (recorded.finish) equal(sequences.map((s) => s.finish), recorded.finish, "finish");
  if (recorded.output_texts) {
    equal(sequences.map((s) => s.text), recorded.output_texts, "text");
    equal(streamed.map((s) => s.text), recorded.output_texts, "streamed text");
  }
  recorded.sequences_scores?.forEach((score, i) => close(sequences[i].score, score, 1e-4, `score ${i}`));
  // Recorded are the processed scores: those of the model itself where nothing processes them.
  if (Object.keys(recorded.config).join() === "max_new_tokens") {
    recorded.token_logprobs?.forEach((p, i) => close(sequences[0].logprobs[i], p, 1e-4, `log-probability ${i}`));
  }
}

async function novels(load) {
  const model = await load("model");
  await say(`device: ${model.device}`);
  const recorded = await json("fixtures/texts/generation.json");
  for (const [index, call] of recorded.entries()) {
    await check(`texts/generation.json ${index} ${call.name}`, async () => {
      equal([...model.encode(call.text)], call.prompt, "prompt ids");
      await generated(model, call);
    });
  }
  await check("several calls at once", () => Promise.all(recorded.slice(0, 5).map((call) => generated(model, call))));
  await check("a callback ends it", async () => {
    const { prompt, outputs } = recorded[0];
    let seen = 0;
    const stop = () => ++seen < 3;
    const answer = await model.generate_ids(new Uint32Array(prompt), `{"max_new_tokens": 40}`, stop);
    const [sequence] = JSON.parse(answer).sequences;
    equal([sequence.ids, sequence.finish], [outputs[0].slice(0, 3), "stop"], "ids");
  });
  await check("the same seed gives the same text, no seed another", async () => {
    const run = async (seed) => {
      const settings = JSON.stringify({ max_new_tokens: 24, do_sample: true, seed });
      return JSON.parse(await model.generate("The river", settings)).sequences[0].text;
    };
    const [a, b, c, d] = [await run(7), await run(7), await run(), await run()];
    equal(a, b, "seed 7");
    if (c === d) throw new Error(`twice the same without a seed: ${c}`);
  });
  await check("texts/perplexity.json", async () => {
    const { passage } = await json("fixtures/texts/perplexity.json");
    const found = await model.score(new Uint32Array(passage.ids));
    equal(found.length, passage.nll.length, "scores");
    passage.nll.forEach((nll, i) => close(-found[i], nll, 1e-4, `token ${i}`));
  });
  await check("texts/logits.json", async () => {
    const expected = await json("fixtures/texts/logits.json");
    const found = await model.logits(new Uint32Array(expected.ids));
    const vocabulary = found.length / expected.ids.length;
    expected.positions.forEach(({ ids, values }, row) => {
      ids.forEach((id, i) => close(found[row * vocabulary + id], values[i], 2e-5, `position ${row}, token ${id}`));
    });
  });
  await check("what cannot be run is an error", async () => {
    const refused = async (ids, settings, word) => {
      const message = await model.generate_ids(new Uint32Array(ids), settings).then(() => "nothing", (e) => e.message);
      if (!message.includes(word)) throw new Error(`expected an error about ${word}, found ${message}`);
    };
    await refused([], "{}", "prompt");
    await refused([9999], "{}", "vocabulary");
    await refused([2], `{"num_beams": 0}`, "num_beams");
    await refused([2], "{", "JSON");
  });
  model.free();
}

/** Every processor and every search, on small models with random weights. */
async function searches(load) {
  const files = {};
  for (const name of ["greedy", "beam", "contrastive", "group_beam"]) {
    files[name] = await json(`fixtures/generation/${name}.json`);
  }
  const here = Object.values(files).flat();
  for (const name of new Set(here.map((call) => call.model))) {
    const model = await load(`fixtures/models/${name}`);
    for (const [file, calls] of Object.entries(files)) {
      // Rules are functions, which JSON has none of; classifier-free guidance is not offered.
      const able = calls.filter((c) => c.model === name && !("prefix_rule" in c.config || "guidance_scale" in c.config));
      await check(`generation/${file}.json, ${able.length} calls on ${name}`, async () => {
        for (const call of able) {
          await generated(model, call).catch((e) => Promise.reject(new Error(`${call.name}: ${e.message ?? e}`)));
        }
      });
    }
    model.free();
  }
}

async function end() {
  const passed = lines.filter((line) => line.startsWith("test ")).length - failed;
  const outcome = failed === 0 && passed > 0 ? "ok" : "FAILED";
  document.title = `${outcome}: ${passed} passed, ${failed} failed`;
  await say(`\ntest result: ${outcome}. ${passed} passed; ${failed} failed; 0 ignored`);
}

export async function test(load) {
  document.getElementById("device").textContent = "Testing …";
  await novels(load);
  await searches(load);
  await end();
}

/** Ends the tests with what kept them from running. */
export async function fail(error) {
  failed += 1;
  await say(`test the page ... FAILED: ${error.message ?? error}`);
  await end();
}
