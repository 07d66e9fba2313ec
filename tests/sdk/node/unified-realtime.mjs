// openai: a realtime session on /v1, whose model picks the provider.
import OpenAI from "openai";
import { checkSession } from "./realtime.mjs";

const client = new OpenAI({ apiKey: process.env.CLIENT_KEY, baseURL: `${process.env.TLS_BASE}/v1` });
await checkSession(client, process.argv[2]);
console.log("ok");
