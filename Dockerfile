# Rankwise with the versions that are tested (constraints.txt); on a CPU, or on a GPU that the host gives (`docker run --gpus all`).
#
#   docker build -t rankwise .
#   docker run --rm -v "$PWD/runs:/study/runs" -v rankwise-cache:/cache rankwise compare smoke --out runs/smoke
#
# The package index's own torch carries CUDA (3 GB); for a small image name PyTorch's index of CPU builds:
#   docker build --build-arg INDEX=... -t rankwise .
# Not built by the gate: no registry is within its reach.
FROM python:3.12-slim-bookworm

ARG INDEX
# The CPU's compiled passes are built with the machine's own compiler, at the first run on it.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 rankwise && mkdir -p /study /cache && chown rankwise /study /cache

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY variants variants
COPY experiments experiments
COPY reports reports
COPY rankwise rankwise
RUN pip install --no-cache-dir ${INDEX:+--extra-index-url "$INDEX"} -c constraints.txt ".[gguf,onnx]" && rm -rf /source

USER rankwise
ENV RANKWISE_CACHE=/cache XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
WORKDIR /study
ENTRYPOINT ["rankwise"]
CMD ["--help"]
