// Load on the OpenAI-compatible door, with k6: whole chats, one connection a user.
//
//   k6 run --vus 8 --duration 20s clients/load/chat.js        (ROUTER=http://localhost:8080 unless told)
import { check } from 'k6';
import http from 'k6/http';

const url = `${__ENV.ROUTER || 'http://localhost:8080'}/v1/chat/completions`;
const params = { headers: { 'Content-Type': 'application/json' }, timeout: '120s' };

export const options = { thresholds: { checks: ['rate==1'] } };

export default function () {
  const messages = [{ role: 'user', content: `Tell me about the number ${__VU * 1000 + __ITER}.` }];
  const reply = http.post(url, JSON.stringify({ messages, max_tokens: 16 }), params);
  check(reply, {
    'status is 200': (r) => r.status === 200,
    'tokens are counted': (r) => r.json('usage.completion_tokens') > 0,
    'the answer says why it ended': (r) => ['stop', 'length'].includes(r.json('choices.0.finish_reason')),
  });
}
