// Clients from npm, unmodified, against a server: prints what each of them got as JSON.
//
// usage: node clients.mjs ADDRESS
import { InferenceClient } from "@huggingface/inference";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const address = process.argv[2];
const model = "scripted";
const hello = [{ role: "user", content: "Hello" }];
const weather = [{ role: "user", content: "Tell me the weather in Seoul?" }];
const who = [{ role: "user", content: "Who was first?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string" } },
        required: ["city"],
      },
    },
  },
];
const Role = z.object({ kind: z.enum(["author", "engineer"]), since: z.number().int().nullable() });
const Person = z.object({ name: z.string(), roles: z.array(Role).min(1) });

const sdk = new OpenAI({ baseURL: `${address}/v1`, apiKey: "k", maxRetries: 0 });
const hub = new InferenceClient("k", { endpointUrl: address });
const chatHub = new InferenceClient("k", { endpointUrl: `${address}/v1/chat/completions` });
const ai = createOpenAICompatible({
  name: "server",
  baseURL: `${address}/v1`,
  supportsStructuredOutputs: true,
})(model);

async function all(items) {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}

const cases = {
  async openai_chat() {
    const found = await sdk.chat.completions.create({ model, messages: hello });
    const stream = await sdk.chat.completions.create({ model, messages: hello, stream: true });
    const chunks = await all(stream);
    return {
      whole: found.choices[0].message.content,
      streamed: chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""),
    };
  },

  async openai_parse() {
    const found = await sdk.chat.completions.parse({
      model,
      messages: who,
      temperature: 0,
      response_format: zodResponseFormat(Person, "person"),
    });
    return found.choices[0].message.parsed;
  },

  async openai_tools() {
    const asked = [];
    const runner = sdk.chat.completions.runTools({
      model,
      messages: weather,
      temperature: 0,
      stream: true,
      tools: [
        {
          type: "function",
          function: {
            ...tools[0].function,
            parse: JSON.parse,
            function: ({ city }) => {
              asked.push(city);
              return "rain, 12 degrees";
            },
          },
        },
      ],
    });
    return { content: await runner.finalContent(), asked };
  },

  async openai_model() {
    return { id: (await sdk.models.retrieve(model)).id };
  },

  async hub_text() {
    const parameters = { max_new_tokens: 8, return_full_text: false };
    const found = await hub.textGeneration({ inputs: "Hello", parameters });
    const chunks = await all(hub.textGenerationStream({ inputs: "Hello", parameters }));
    // The stream of a local server is OpenAI's, whatever the type says.
    const streamed = chunks.map((chunk) => chunk.choices[0].text).join("");
    return { whole: found.generated_text, streamed };
  },

  async hub_chat() {
    const found = await chatHub.chatCompletion({ messages: hello, temperature: 0 });
    const chunks = await all(chatHub.chatCompletionStream({ messages: hello, temperature: 0 }));
    return {
      whole: found.choices[0].message.content,
      streamed: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""),
    };
  },

  async hub_tools() {
    const found = await chatHub.chatCompletion({ messages: weather, temperature: 0, tools });
    return found.choices[0].message.tool_calls[0].function;
  },

  async ai_text() {
    const found = await generateText({ model: ai, messages: hello });
    const streamed = streamText({ model: ai, messages: hello });
    return { whole: found.text, streamed: await streamed.text };
  },

  async ai_object() {
    const found = await generateObject({ model: ai, messages: who, schema: Person, temperature: 0 });
    return found.object;
  },

  async ai_tools() {
    const asked = [];
    const options = {
      model: ai,
      messages: weather,
      temperature: 0,
      stopWhen: stepCountIs(3),
      tools: {
        get_weather: tool({
          description: "The weather in a city.",
          inputSchema: z.object({ city: z.string() }),
          execute: async ({ city }) => {
            asked.push(city);
            return "rain, 12 degrees";
          },
        }),
      },
    };
    const whole = (await generateText(options)).text;
    const parts = await all(streamText(options).fullStream);
    return {
      whole,
      streamed: parts.filter((part) => part.type === "text-delta").map((part) => part.text),
      deltas: parts.filter((part) => part.type === "tool-input-delta").map((part) => part.delta),
      asked,
    };
  },
};

const results = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    results[name] = await run();
  } catch (error) {
    results[name] = { error: String(error?.stack ?? error) };
  }
}
console.log(JSON.stringify(results));
