# NOT RUN YET: written beside the code, built by nobody so far.
# The router, without torch. Build from the repository's root: docker build -f deploy/router.Dockerfile .
FROM python:3.11-slim

WORKDIR /opt/microserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gen gen
COPY services services
RUN pip install --no-cache-dir -c constraints.txt ".[kubernetes]"

USER nobody
WORKDIR /tmp
EXPOSE 50050 8080
# In a container the loopback interface reaches nobody; TLS flags are in docs/operations.md.
ENTRYPOINT ["microserve-router", "--listen", "0.0.0.0:50050", "--http-listen", "0.0.0.0:8080"]
