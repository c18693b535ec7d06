// OpenAI's client for Node.js against a server: prints what came of each request, as JSON.
// node openai_client.mjs URL PACKAGE IMAGE MASK, PACKAGE being where npm has put `openai`
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const [url, packagePath, imagePath, maskPath] = process.argv.slice(2);
const { default: OpenAI, toFile } = await import(pathToFileURL(`${packagePath}/index.mjs`));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const STEPS = { seed: 7, num_inference_steps: 4 };
const file = (path) => toFile(fs.createReadStream(path), "image.png", { type: "image/png" });
const told = {};

async function refusal(request) {
  try {
    await request;
    return null;
  } catch (error) {
    const { status, code, param, type } = error;
    return { name: error.constructor.name, status, code, param, type };
  }
}

const drawn = await client.images.generate({ prompt: "a hat", n: 2, size: "128x128", ...STEPS });
told.generated = drawn.data.map((picture) => picture.b64_json);

const edited = await client.images.edit({
  prompt: "a fish",
  image: await file(imagePath),
  mask: await file(maskPath),
  ...STEPS,
});
told.edited = edited.data.map((picture) => picture.b64_json);

told.events = [];
const stream = await client.images.generate({
  prompt: "a hat",
  stream: true,
  partial_images: 2,
  seed: 7,
  num_inference_steps: 9,
});
for await (const event of stream) {
  told.events.push({ type: event.type, index: event.partial_image_index ?? null, b64_json: event.b64_json });
}

const generate = (fields) => refusal(client.images.generate({ prompt: "a hat", ...STEPS, ...fields }));
told.unknown_model = await generate({ model: "nothing" });
told.bad_size = await generate({ size: "huge" });
told.bad_sampler = await generate({ sampler: "magic" });
told.too_many = await generate({ n: 11 });
told.models = (await client.models.list()).data.map((model) => model.id);

const leaving = new AbortController();
const long = client.images.generate(
  { prompt: "leave", num_inference_steps: 150, n: 2 },
  { signal: leaving.signal },
);
setTimeout(() => leaving.abort(), 500);
told.aborted = (await refusal(long)).name;

const watched = await client.images.generate({
  prompt: "leave",
  stream: true,
  partial_images: 3,
  num_inference_steps: 150,
});
for await (const event of watched) {
  told.left_after = event.type;
  break; // which aborts the request
}
console.log(JSON.stringify(told));
