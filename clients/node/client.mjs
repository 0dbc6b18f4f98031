// Streams an answer: node client.mjs ADDRESS PROMPT MAX_TOKENS. The contract is read from protos/ beside this file.
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const TIMEOUT_MS = 60_000;

const [address, prompt, maxTokens] = process.argv.slice(2);
if (process.argv.length !== 5 || !/^\d+$/.test(maxTokens)) {
  console.error('usage: client ADDRESS PROMPT MAX_TOKENS');
  process.exit(2);
}
const definition = loadSync('microserve/router/v1/router.proto', {
  includeDirs: [fileURLToPath(new URL('protos', import.meta.url))],
  enums: String,
  defaults: true,
});
const { RouterService } = grpc.loadPackageDefinition(definition).microserve.router.v1;
const router = new RouterService(address, grpc.credentials.createInsecure());

async function main() {
  // No model is named: the fleet's only one is meant.
  const request = { text: prompt, sampling: { maxTokens: Number(maxTokens) } };
  let usage;
  for await (const piece of router.Generate(request, { deadline: Date.now() + TIMEOUT_MS })) {
    process.stdout.write(piece.text);
    usage = piece.usage ?? usage;
  }
  console.error(`\n${usage.promptTokenCount} prompt tokens, ${usage.outputTokenCount} output tokens`);
}

try {
  await main();
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  router.close();
}
