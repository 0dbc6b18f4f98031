"""The gRPC front door: messages in, messages out; what is done is GenerationService's."""
