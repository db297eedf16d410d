// What a user of the Node SDK does, from uploading to asking the tuned model. Prints one JSON object: what came back.
// The address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY; the first argument is a training file.

import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const DEADLINE_MS = 240_000;
const client = new OpenAI({ maxRetries: 0 });
const told = {};

async function refusal(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return { class: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  return null;
}

async function untilEnded(id) {
  const started = Date.now();
  for (;;) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (["succeeded", "failed", "cancelled"].includes(job.status)) return job;
    if (Date.now() - started > DEADLINE_MS) throw new Error(`job ${id} is still ${job.status}`);
    await new Promise((resolve) => setTimeout(resolve, 500)); // between two polls, as users do
  }
}

// models and files
told.models = [];
for await (const model of client.models.list()) told.models.push(model.id);
const file = await client.files.create({ file: fs.createReadStream(process.argv[2]), purpose: "fine-tune" });
told.content = (await (await client.files.content(file.id)).text()) === fs.readFileSync(process.argv[2], "utf8");
told.missing = await refusal(() => client.files.retrieve("file-none"));
const deleted = await client.files.create({ file: await toFile(Buffer.from("{}\n"), "x.jsonl"), purpose: "fine-tune" });
told.deleted = (await client.files.delete(deleted.id)).deleted;

// answers of a remote model: text, stream, a tool loop
const chat = await client.chat.completions.create({ model: "strong", messages: [{ role: "user", content: "Hi" }] });
told.chat = chat.choices[0].message.content;
told.streamed = "";
for await (const event of await client.responses.create({ model: "strong", input: "Hi", stream: true })) {
  if (event.type === "response.output_text.delta") told.streamed += event.delta;
}
const add = {
  type: "function",
  function: {
    name: "add",
    description: "Adds two numbers.",
    parameters: { type: "object", properties: { a: { type: "number" }, b: { type: "number" } } },
    parse: JSON.parse,
    function: ({ a, b }) => String(a + b),
  },
};
const runner = client.chat.completions.runTools({
  model: "caller",
  messages: [{ role: "user", content: "2 + 3?" }],
  tools: [add],
});
told.toolLoop = await runner.finalContent();

// a job, its events page by page, its checkpoints and its model
const grader = { type: "string_check", name: "g", input: "{{sample.output_text}}", reference: "yes", operation: "like" };
const hyperparameters = { n_epochs: 1, batch_size: 2, compute_multiplier: 1 };
const body = (more) => ({
  model: "tiny",
  training_file: file.id,
  validation_file: file.id,
  method: { type: "reinforcement", reinforcement: { grader, hyperparameters: { ...hyperparameters, ...more } } },
});
told.refused = await refusal(() => client.fineTuning.jobs.create(body({ compute_multiplier: -1 })));
const job = await untilEnded((await client.fineTuning.jobs.create(body({}))).id);
told.job = { status: job.status, error: job.error?.message ?? null, hasModel: Boolean(job.fine_tuned_model) };
told.numEvents = 0;
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 2 })) {
  told.numEvents += event.object === "fine_tuning.job.event";
}
told.numCheckpoints = (await client.fineTuning.jobs.checkpoints.list(job.id)).data.length;
const answer = await client.responses.create({ model: job.fine_tuned_model, input: "Hi", max_output_tokens: 16 });
told.answeredBy = answer.model === job.fine_tuned_model && ["completed", "incomplete"].includes(answer.status);
told.cancelled = await refusal(() => client.fineTuning.jobs.cancel(job.id));

console.log(JSON.stringify(told));
