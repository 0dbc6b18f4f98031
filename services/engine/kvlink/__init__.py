"""The engine's link to the KV transfer service of its node: KvPort over gRPC, and the pool that both of them map."""
