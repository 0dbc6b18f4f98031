// Streams an answer: client ADDRESS PROMPT MAX_TOKENS.
#include <charconv>
#include <chrono>
#include <iostream>
#include <string>
#include <string_view>
#include <system_error>

#include <grpcpp/grpcpp.h>

#include "microserve/router/v1/router.grpc.pb.h"

namespace router = microserve::router::v1;

namespace {

constexpr std::chrono::minutes kTimeout{1};

const std::string& Name(grpc::StatusCode code) {
  static const std::string names[] = {
      "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
      "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
      "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
  return names[code];
}

grpc::Status Run(const std::string& address, const std::string& prompt, unsigned max_tokens) {
  auto stub = router::RouterService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  router::GenerateRequest request;  // names no model: the fleet's only one is meant
  request.set_text(prompt);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kTimeout);
  auto reader = stub->Generate(&context, request);
  for (router::GenerateResponse piece; reader->Read(&piece);) {
    std::cout << piece.text() << std::flush;
    if (piece.has_usage()) {
      std::cerr << "\n" << piece.usage().prompt_token_count() << " prompt tokens, "
                << piece.usage().output_token_count() << " output tokens\n";
    }
  }
  return reader->Finish();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string_view number = count == 4 ? arguments[3] : "";
  unsigned max_tokens = 0;
  const auto [end, error] = std::from_chars(number.begin(), number.end(), max_tokens);
  if (error != std::errc{} || end != number.end()) {
    std::cerr << "usage: client ADDRESS PROMPT MAX_TOKENS\n";
    return 2;
  }
  const grpc::Status status = Run(arguments[1], arguments[2], max_tokens);
  if (status.ok()) return 0;
  std::cerr << Name(status.error_code()) << ": " << status.error_message() << "\n";
  return 1;
}
