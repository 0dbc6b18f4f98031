// Asks many prompts at once over one stream: node session.mjs ADDRESS MAX_TOKENS PROMPT... prints a line of JSON for each.
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const [address, maxTokens, ...prompts] = process.argv.slice(2);
if (!prompts.length || !/^\d+$/.test(maxTokens)) {
  console.error('usage: session ADDRESS MAX_TOKENS PROMPT...');
  process.exit(2);
}
const definition = loadSync('microserve/router/v1/router.proto', {
  includeDirs: [fileURLToPath(new URL('protos', import.meta.url))],
  enums: String,
  defaults: true,
  oneofs: true,
  longs: Number,
});
const { RouterService } = grpc.loadPackageDefinition(definition).microserve.router.v1;
const router = new RouterService(address, grpc.credentials.createInsecure());

const session = router.Session();
const texts = prompts.map(() => '');
session.on('data', ({ outputs }) => {
  for (const output of outputs) {
    const prompt = prompts[output.callId];
    texts[output.callId] += output.response?.text ?? '';
    if (output.last) console.log(JSON.stringify({ prompt, text: texts[output.callId], error: output.error?.reason }));
  }
});
session.on('error', (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
session.on('status', () => router.close());
prompts.forEach((text, callId) => {
  const request = { text, sampling: { maxTokens: Number(maxTokens) } };
  session.write({ generate: { callId, request, timeout: { seconds: 60 } } });
});
session.end();
