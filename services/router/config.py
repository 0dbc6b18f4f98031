"""The router's configuration: command line, environment, defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.router.admission.ticket import AdmissionLimits
from services.router.fleet.endpoint_slices import ServiceTarget
from services.router.fleet.recovery import RetryLimits
from services.router.keys import is_key
from services.router.planning.host import PlannerLimits
from services.router.planning.topics import TopicLimits
from services.router.programs.runner import MAX_BUFFERED_TOKENS, POLICY_TIMEOUT_S, RunLimits
from services.router.programs.watchdog import BLOCK_TIMEOUT_S, GIVE_UP_TIMEOUT_S, WatchdogLimits
from services.rpc.bind import LOOPBACK_HOSTS, split_address
from services.rpc.server import ServerConfig
from services.rpc.tls import ClientTls

_SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(ServerConfig):
    """Routes requests to engines by policies."""

    listen: str = field(default="127.0.0.1:50050", metadata={"help": "host:port to serve gRPC on; port 0: a free one"})
    metrics_port: int | None = field(
        default=None, metadata={"help": "port to serve /metrics on beside --http-listen; none: off"}
    )
    engine: tuple[str, ...] = field(default=(), metadata={"help": "host:port of an engine; may be repeated"})
    engine_dns: tuple[str, ...] = field(
        default=(), metadata={"help": "host:port whose every address is an engine; may be repeated"}
    )
    dns_interval: float = field(default=5.0, metadata={"help": "seconds between two looks at --engine-dns"})
    engine_kubernetes: tuple[str, ...] = field(
        default=(),
        metadata={"help": "namespace/service[:port] whose ready endpoints are engines; may be repeated"},
    )
    register_token: str | None = field(
        default=None, metadata={"help": "token by which engines may join by themselves; none: off", "secret": True}
    )
    register_by_certificate: bool = field(
        default=False, metadata={"help": "engines may join by a certificate that --tls-client-ca trusts"}
    )
    register_lease: float = field(
        default=10.0, metadata={"help": "seconds for which an engine that joined by itself stays unless heard of again"}
    )
    policy: str = field(
        default="data_parallel",
        metadata={"help": "program for requests that name none: NAME or FILE.py, with :PARAMETERS if it has some"},
    )
    policy_file: tuple[Path, ...] = field(default=(), metadata={"help": "a program to have at hand; may be repeated"})
    policy_timeout: float = field(
        default=POLICY_TIMEOUT_S, metadata={"help": "seconds a program may take between two chunks"}
    )
    policy_block_timeout: float = field(
        default=BLOCK_TIMEOUT_S,
        metadata={"help": "seconds a program may keep the event loop to itself before it is interrupted"},
    )
    planner: str | None = field(
        default=None, metadata={"help": "planner to run: NAME or FILE.py, with :PARAMETERS if it has some; none: off"}
    )
    planner_file: tuple[Path, ...] = field(default=(), metadata={"help": "a planner to have at hand; may be repeated"})
    planner_interval: float = field(default=2.0, metadata={"help": "seconds between two looks of the planner"})
    planner_timeout: float = field(
        default=60.0, metadata={"help": "seconds a planner may take for one look, moves included, before it is cut"}
    )
    planner_moves: int = field(default=2, metadata={"help": "contexts that the planner moves at once, at most"})
    planner_bytes_per_s: float = field(
        default=200e6, metadata={"help": "bytes a second that it moves from one engine to another, on average"}
    )
    planner_topic_tokens: int = field(
        default=256, metadata={"help": "tokens that prompts must have in common at least to be of one topic"}
    )
    request_timeout: float = field(
        default=600.0, metadata={"help": "seconds a request may take, whatever its own deadline"}
    )
    client_timeout: float = field(
        default=60.0, metadata={"help": "seconds for which a client may take nothing of its answer"}
    )
    max_requests: int = field(default=1024, metadata={"help": "requests waiting and running; more are refused"})
    max_sessions: int = field(default=4096, metadata={"help": "sessions open at once; more are refused"})
    max_client_sessions: int = field(
        default=1024,
        metadata={"help": "of these, those of one tenant by its key, or, without such a key, of one host"},
    )
    max_queued: int = field(default=256, metadata={"help": "requests that wait in each priority; more are refused"})
    queue_timeout: float = field(default=5.0, metadata={"help": "seconds a request may wait for its turn"})
    prompt_queue: float = field(
        default=2.0, metadata={"help": "seconds of computing prompts that the engines are given in advance"}
    )
    max_buffered_tokens: int = field(
        default=MAX_BUFFERED_TOKENS, metadata={"help": "tokens kept for a client that reads too slowly"}
    )
    max_retries: int = field(
        default=3, metadata={"help": "failures of engines that a request survives without getting a token further"}
    )
    stranded_timeout: float = field(
        default=30.0, metadata={"help": "seconds for which a stream that was cut off waits for an engine to go on with"}
    )
    breaker_failures: int = field(
        default=5, metadata={"help": "failures in a row after which an engine is left alone for a while"}
    )
    breaker_first: float = field(default=1.0, metadata={"help": "seconds for which it is left alone at first"})
    breaker_longest: float = field(default=30.0, metadata={"help": "seconds for which it is left alone at most"})
    max_traces: int = field(default=1000, metadata={"help": "recent requests whose verbs are kept"})
    http_listen: str | None = field(
        default=None, metadata={"help": "host:port for the OpenAI-compatible API, /health and /metrics; none: off"}
    )
    api_key: tuple[str, ...] = field(
        default=(), metadata={"help": "key that clients must send; may be repeated; none: all may call", "secret": True}
    )
    tenant_key_file: Path | None = field(
        default=None,
        metadata={"help": "file of lines TENANT KEY: a client with such a key is that tenant, whatever it says"},
    )
    salt_by_tenant: bool = field(
        default=False,
        metadata={
            "help": "keep what is cached of a tenant's prompts from all others, who could tell by the time taken"
        },
    )
    admin_key: tuple[str, ...] = field(
        default=(),
        metadata={"help": "key that AdminService wants instead of --api-key; may be repeated", "secret": True},
    )
    admin_listen: str | None = field(
        default=None, metadata={"help": "host:port of its own for AdminService, beside --listen"}
    )
    allow_policy_upload: bool = field(
        default=False, metadata={"help": "take source of policies and planners at --admin-listen"}
    )
    upload_key_file: Path | None = field(
        default=None, metadata={"help": "file that holds a key of --admin-listen alone, beside those of --admin-key"}
    )
    engine_tls_ca: Path | None = field(default=None, metadata={"help": "PEM roots of the engines' certificates"})
    engine_tls_cert: Path | None = field(default=None, metadata={"help": "PEM certificate to show to engines (mTLS)"})
    engine_tls_key: Path | None = field(default=None, metadata={"help": "PEM private key of --engine-tls-cert"})

    engine_tls_name: str | None = field(
        default=None, metadata={"help": "name in the engines' certificates where it is not the host of their address"}
    )

    def __post_init__(self) -> None:
        ServerConfig.__post_init__(self)
        self.check_message_bytes()
        self._check_sources()
        if len(set(self.engine)) < len(self.engine):
            raise ValueError("an --engine is named twice")
        for address in (*self.engine, *self.engine_dns, self.http_listen, self.admin_listen):
            if address is not None:
                split_address(address)
        for name in (
            "policy_timeout",
            "policy_block_timeout",
            "planner_interval",
            "planner_timeout",
            "planner_moves",
            "planner_bytes_per_s",
            "planner_topic_tokens",
            "request_timeout",
            "client_timeout",
            "max_requests",
            "max_sessions",
            "max_client_sessions",
            "max_queued",
            "queue_timeout",
            "prompt_queue",
            "max_buffered_tokens",
            "max_traces",
            "dns_interval",
            "register_lease",
            "breaker_failures",
            "breaker_first",
            "breaker_longest",
        ):
            if not getattr(self, name) > 0:  # also what is no number
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.max_retries < 0 or not self.stranded_timeout >= 0:
            raise ValueError("--max-retries and --stranded-timeout must not be negative")
        if (self.engine_tls_cert is None) != (self.engine_tls_key is None):
            raise ValueError("--engine-tls-cert and --engine-tls-key go together")
        if self.engine_tls_cert is not None and self.engine_tls_ca is None:
            raise ValueError("--engine-tls-cert needs --engine-tls-ca")
        for key in (*self.api_key, *self.admin_key):
            if not is_key(key):
                raise ValueError("an --api-key or --admin-key must be printable ASCII with no space around it")
        if self.engine_tls_name is not None and self.engine_tls_ca is None:
            raise ValueError("--engine-tls-name needs --engine-tls-ca")
        if self.tenant_key_file is not None and not (self.api_key or self.admin_key):
            raise ValueError("--tenant-key-file needs --admin-key: without one all could change the fleet")
        if self.salt_by_tenant and self.tenant_key_file is None:
            raise ValueError("--salt-by-tenant needs --tenant-key-file: tenants would be whoever clients say they are")
        self._check_upload()

    @property
    def engine_tls(self) -> ClientTls | None:
        """How to reach engines; None: in clear text."""
        if self.engine_tls_ca is None:
            return None
        return ClientTls(self.engine_tls_ca, self.engine_tls_cert, self.engine_tls_key, self.engine_tls_name)

    @property
    def admission_limits(self) -> AdmissionLimits:
        """How much may begin."""
        return AdmissionLimits(
            max_requests=self.max_requests,
            max_queued=self.max_queued,
            queue_s=self.queue_timeout,
            prompt_s=self.prompt_queue,
        )

    @property
    def run_limits(self) -> RunLimits:
        """What a program may take."""
        return RunLimits(
            between_chunks_s=self.policy_timeout,
            max_buffered=self.max_buffered_tokens,
            retries=RetryLimits(self.max_retries, self.stranded_timeout),
        )

    @property
    def planner_limits(self) -> PlannerLimits:
        """What a planner may take, and what it is shown."""
        return PlannerLimits(
            self.planner_interval,
            self.planner_timeout,
            self.planner_moves,
            self.planner_bytes_per_s,
            topics=TopicLimits(self.planner_topic_tokens),
        )

    @property
    def watchdog_limits(self) -> WatchdogLimits:
        """How long the event loop may stand still."""
        block_s = self.policy_block_timeout
        return WatchdogLimits(block_s, max(GIVE_UP_TIMEOUT_S, 4 * block_s))

    def _check_sources(self) -> None:
        sources = (self.engine, self.engine_dns, self.engine_kubernetes, self.register_token)
        if not any(sources) and not self.register_by_certificate:
            raise ValueError("no engine can join: give --engine, --engine-dns, --engine-kubernetes or --register-token")
        for target in self.engine_kubernetes:
            ServiceTarget.parse(target)
        if self.register_token is not None and len(self.register_token) < _SHORTEST_TOKEN:
            raise ValueError(f"--register-token must have at least {_SHORTEST_TOKEN} characters")
        if self.register_by_certificate and self.tls_client_ca is None:
            raise ValueError("--register-by-certificate needs --tls-client-ca")

    def _check_upload(self) -> None:
        if self.upload_key_file is not None and self.admin_listen is None:
            raise ValueError("--upload-key-file is for --admin-listen")
        if not self.allow_policy_upload:
            return
        if self.admin_listen is None:
            raise ValueError("--allow-policy-upload needs --admin-listen: no code is taken where clients call")
        # Uploaded code runs as the router: whoever may send it proves who they are, and from afar nobody listens in.
        if not self.admin_key and self.upload_key_file is None and self.tls_client_ca is None:
            raise ValueError("--allow-policy-upload needs --admin-key, --upload-key-file or --tls-client-ca")
        if split_address(self.admin_listen)[0] not in LOOPBACK_HOSTS and self.tls_client_ca is None:
            raise ValueError("--allow-policy-upload beyond this machine needs --tls-client-ca")
