# NOT RUN YET: written beside the code, built by nobody so far.
# The KV transfer service, one a node, without torch. It shares memory with the engines of its node: see compose.yaml.
# Build from the repository's root: docker build -f deploy/kvtransfer.Dockerfile .
FROM python:3.11-slim

WORKDIR /opt/microserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gen gen
COPY services services
RUN pip install --no-cache-dir -c constraints.txt '.[kvtransfer]'

USER nobody
WORKDIR /tmp
EXPOSE 50060 9100
ENTRYPOINT ["microserve-kvtransfer", "--listen", "0.0.0.0:50060", "--metrics-host", "0.0.0.0", "--metrics-port", "9100"]
