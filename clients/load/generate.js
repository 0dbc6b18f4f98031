// Load on the gRPC door, with k6. What it calls it learns by reflection.
//
//   k6 run --vus 8 --duration 20s clients/load/generate.js        (ROUTER=localhost:50050 unless told)
//
// ghz sends the same file:
//
//   ghz --insecure --call microserve.router.v1.RouterService.Complete --data-file clients/load/requests.json \
//       --concurrency 8 --duration 20s localhost:50050
import { check } from 'k6';
import grpc from 'k6/net/grpc';

const requests = JSON.parse(open('./requests.json'));
const client = new grpc.Client();

export const options = { thresholds: { checks: ['rate==1'] } };

function connect() {
  client.connect(__ENV.ROUTER || 'localhost:50050', { plaintext: true, reflect: true });
}

// k6 keeps what reflection tells it for all its users in one table, into which two must not write at a time: so it is
// filled before they begin.
export function setup() {
  connect();
  client.close();
}

export default function () {
  if (__ITER === 0) {
    connect();
  }
  const reply = client.invoke('microserve.router.v1.RouterService/Complete', requests[__ITER % requests.length]);
  check(reply, {
    'status is OK': (r) => r.status === grpc.StatusOK,
    'tokens came': (r) => r.message.response && r.message.response.usage.outputTokenCount > 0,
  });
}
