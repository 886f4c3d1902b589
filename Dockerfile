# A server for trained models, without a network at run time.
#   docker build -t preceptor .                                                                       (CPU)
#   docker build -t preceptor:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   (NVIDIA GPU)
# Run it with compose.yaml, or see docs/how-to/deploy.md.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" \
    '.[serve,dicom]'

FROM ${PYTHON}
COPY --from=build /opt/venv /opt/venv
# Caches of libraries go to /tmp, the only place that is writable: run the container with --read-only --tmpfs /tmp.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["preceptor"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
