# NOT RUN YET: written beside the code, built by nobody so far.
# An engine. Build from the repository's root: docker build -f deploy/engine.Dockerfile .
# --build-arg TORCH_INDEX=URL takes torch from another index, for instance one with CPU-only wheels.
FROM python:3.11-slim

ARG TORCH_INDEX=
WORKDIR /opt/microserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gen gen
COPY services services
RUN if [ -n "$TORCH_INDEX" ]; then \
      pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch; \
    fi && \
    pip install --no-cache-dir -c constraints.txt ".[engine]"

# Models are fetched into the cache once: mount a volume here. A new one of Docker's begins with what the image has there.
ENV XDG_CACHE_HOME=/cache
RUN mkdir /cache && chown nobody /cache
USER nobody
WORKDIR /tmp
# As every installation does. From /tmp, so that it is the installed package, which kept machine code belongs to.
RUN python -m services.engine.kernels
VOLUME /cache
EXPOSE 50051 9101
ENTRYPOINT ["microserve-engine"]
